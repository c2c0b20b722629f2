"""Makes a video file: passes the pipeline's frames to the writer, the live page and the progress bar."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Array, Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from monarchrt.models.attention.registry import EXACT, exact
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.config import NAMES_FILES, OF_THE_PAGE, GenerateConfig
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.plan import Plan
from monarchrt.models.generate.stream import LivePage, check_port
from monarchrt.models.generate.tensors import save_latents, save_noise, seed_noise
from monarchrt.models.lora.merging import parse_scaled
from monarchrt.models.media.metrics import Fidelity, fidelity
from monarchrt.models.media.video import side_by_side, write_video
from monarchrt.models.media.writer import check_folder, check_writable, open_writer
from monarchrt.models.sampling import Noise


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a generation.

    Attributes:
        path: The video.
        frames: Number of frames.
        seconds: Seconds from the first call to the last frame, including compilation.
        first_frame: Seconds until the first frames.
        fidelity: PSNR and SSIM to the other video of `compare` or `compare_dense`, if it was made.
        comparison: The video with both side by side, if it was made.
    """

    path: Path
    frames: int
    seconds: float
    first_frame: float
    fidelity: Fidelity | None = None
    comparison: Path | None = None


def comparison_path(out: Path) -> Path:
    """Path of the side-by-side video.

    Examples:
        >>> comparison_path(Path("cat.mp4")).name
        'cat-compare.mp4'
        >>> comparison_path(Path("cat/%05d.png")).parent.name
        'cat-compare'
    """
    if "%" in out.stem and out.suffix.lower() == ".png":  # a file per frame: a folder of their own
        return out.parent.with_name(f"{out.parent.name}-compare") / out.name
    return out.with_name(f"{out.stem}-compare{out.suffix}")


def check_outputs(config: GenerateConfig, *, also_read: Mapping[str, Path] | None = None) -> None:
    """Raises UserError unless all output files can be written; before any computation, without JAX.

    Existing files are not replaced without `overwrite`, and no file is written twice, or both read and written.

    Args:
        config: The settings.
        also_read: Further files that are read, by the name of their setting.
    """
    outputs = {"out": config.out}
    if config.compare_dense or config.compare:
        outputs["the comparison"] = comparison_path(config.out)
    tensors = {name: getattr(config, name) for name in ("save_embeddings", "save_noise", "save_latents")}
    outputs |= {name: path for name, path in tensors.items() if path is not None}
    named = {name: getattr(config, name) for name in (*NAMES_FILES, "compare") if name != "lora"}
    read = {name: Path(value) for name, value in named.items() if value is not None}
    with user_input():
        read |= {f"lora {text}": Path(parse_scaled(text)[0]) for text in config.lora}
    inputs = {name: path for name, path in (read | dict(also_read or {})).items() if path.exists()}
    _check_collisions(outputs, inputs)
    for name, path in outputs.items():
        if name in tensors:
            _check_tensor_file(name, path, overwrite=config.overwrite)
        else:
            check_writable(path, overwrite=config.overwrite)
    if config.stream:
        check_port(config.host, config.port)
        return
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in OF_THE_PAGE:
        if (value := getattr(config, name)) != defaults[name]:
            raise UserError(f"{name} is {value}, but there is no page without stream; add --stream, or leave it out")


def _check_collisions(outputs: Mapping[str, Path], inputs: Mapping[str, Path]) -> None:
    seen: dict[Path, str] = {}
    for name, path in outputs.items():
        if (other := seen.setdefault(path.expanduser().resolve(), name)) != name:
            raise UserError(f"{name} {path} is the file of {other}, too; give another name to one of them")
        for source, given in inputs.items():
            where = given.expanduser().resolve()
            inside = given.is_dir() and path.exists() and where in path.expanduser().resolve().parents
            if inside or (path.exists() and given.exists() and path.samefile(given)):
                kind = "a file of" if inside else "the file of"
                raise UserError(f"{name} {path} is {kind} {source} {given}, which is read; give another name")


def _check_tensor_file(name: str, path: Path, *, overwrite: bool) -> None:
    if path.is_dir():
        raise UserError(f"{name} {path} is a folder; give the name of a file, for example {path / 'a.safetensors'}")
    if path.exists() and not overwrite:
        raise UserError(f"{name} {path} exists already; give another name, or --overwrite")
    check_folder(name, path)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{name} {path} exists and cannot be written to")


def make_video(
    pipeline: VideoPipeline,
    text: Float[Array, "1 L E"],
    *,
    plan: Plan,
    negative: Float[Array, "1 M E"] | None = None,
    initial: Float[Array, "1 K h w C"] | None = None,
    noise: Noise | None = None,
    reference: Callable[[], VideoPipeline] | None = None,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> Result:
    """Generates the video and writes it and the other requested outputs.

    Ctrl-C and SIGTERM end it early; the file keeps the frames generated so far.

    Args:
        pipeline: Network and decoder.
        text: Embedding of the prompt.
        plan: The plan, with the output paths.
        negative: Embedding of the negative prompt.
        initial: Latents that the video starts with.
        noise: Noise to use instead of the seed's.
        reference: Loads the model of `compare`.
        report: Called with lines of progress.

    Returns:
        The result.

    Raises:
        UserError: If the port is in use or a file cannot be written.
        KeyboardInterrupt: If it was stopped; the message says what was kept.
    """
    config = plan.config
    if config.save_noise is not None:
        given = 0 if initial is None else initial.shape[1]
        used = noise or seed_noise(plan, channels=pipeline.model.config.out_channels, given=given)
        report(f"the noise is saved in {save_noise(config.save_noise, used)}")
    latents: list[Any] | None = None if config.save_latents is None else []
    options: dict[str, Any] = dict(plan=plan, negative=negative, initial=initial, noise=noise)
    with user_input():
        parts = _traced(pipeline(text, **options, keep=latents))
    compares = config.compare_dense or reference is not None
    kept: list[np.ndarray] = []
    with contextlib.ExitStack() as stack:
        page = None
        if config.stream:
            title = config.prompt or Path(config.checkpoint or "").name
            page = LivePage(
                host=config.host, port=config.port, fps=config.fps or 16.0, title=title, total=config.frames
            )
            stack.enter_context(page)
            report(f"frames are shown while they are generated at {page.url}")
        try:
            result = _write(parts, plan, page, kept if compares else None, report)
        finally:
            if config.save_latents is not None and latents:  # those of the frames so far
                report(
                    f"the latents are saved in {save_latents(config.save_latents, np.concatenate(latents, axis=1)[0])}"
                )
        if page is not None:
            _let_watch(page, config.linger, report)
    if not compares:
        return result
    if reference is None:
        report(f"the same weights with {EXACT} attention")
        other = VideoPipeline(pipeline.model.with_attention(exact()), pipeline.decoder, mesh=pipeline.mesh)
    else:
        report(f"the same by {config.compare}")
        other = reference()
    parts = other(text, **options)
    try:
        with _signals_stop():
            return dataclasses.replace(result, **_compare(parts, np.concatenate(kept), plan))
    except KeyboardInterrupt as stop:
        raise _stopped(f"stopped; {config.out} is whole, but not compared", stop) from None


def _compare(parts: Iterator[np.ndarray], video: np.ndarray, plan: Plan) -> dict[str, Any]:
    """Makes the other video and writes both side by side; returns the fields of `Result` on the comparison."""
    config = plan.config
    label = EXACT if config.compare is None else Path(config.compare).name
    reference = np.concatenate(list(_shown(parts, plan, label)))
    ours = plan.kinds if config.compare_dense else Path(config.checkpoint or "").name or "ours"
    both = side_by_side([reference, video], labels=[label, ours], zoom=config.zoom or 1)
    path = write_video(comparison_path(config.out), both, fps=config.fps or 16.0, quality=config.quality)
    return {"fidelity": fidelity(video, reference), "comparison": path}


def _write(
    parts: Iterator[np.ndarray],
    plan: Plan,
    page: LivePage | None,
    kept: list[np.ndarray] | None,
    report: Callable[[str], None],
) -> Result:
    """Writes the file; on Ctrl-C or an error, with the frames generated so far."""
    config = plan.config
    begin, first = time.monotonic(), 0.0
    writer = open_writer(
        config.out,
        fps=config.fps or 16.0,
        quality=config.quality,
        settings=config.stored(),
        title=config.prompt,
        overwrite=config.overwrite,
    )
    try:
        with writer, _signals_stop():
            for frames in _shown(parts, plan, "frames"):
                if not writer.frames:
                    first = time.monotonic() - begin
                seen = _enlarged(frames, config.zoom or 1)
                if page is not None:
                    page.show(seen)
                writer.write(seen)
                if kept is not None:
                    kept.append(frames)
    except KeyboardInterrupt as stop:
        if page is not None:
            page.end("stopped")
        count = writer.frames
        what = f"{count} of {config.frames} frames are kept in {config.out}" if count else "no frame was ready"
        raise _stopped(f"stopped; {what}", stop) from None
    except UserError:  # an error of writing, whose message says which frames were kept
        raise
    except Exception:
        if writer.frames:
            report(f"{writer.frames} of {config.frames} frames are kept in {config.out}, generated before an error")
        raise
    if page is not None:
        page.end("finished")
    return Result(path=config.out, frames=writer.frames, seconds=time.monotonic() - begin, first_frame=first)


def _traced(parts: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Passes parts on; a ValueError of the attention while the first part is traced becomes a UserError."""
    with user_input():
        first = next(parts, None)
    if first is not None:
        yield first
    yield from parts


def _enlarged(frames: np.ndarray, zoom: int) -> np.ndarray:
    return frames if zoom == 1 else frames.repeat(zoom, axis=1).repeat(zoom, axis=2)


def _stopped(message: str, stop: KeyboardInterrupt) -> KeyboardInterrupt:
    said = KeyboardInterrupt(message)
    said.code = getattr(stop, "code", 130)  # type: ignore[attr-defined]
    return said


def _shown(parts: Iterator[np.ndarray], plan: Plan, label: str) -> Iterator[np.ndarray]:
    """Passes frames on and updates a progress bar on a terminal."""
    console = Console(stderr=True)
    if plan.config.quiet or not console.is_terminal:
        yield from parts
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[speed]}"), console=console, transient=True) as bar:
        task = bar.add_task(label, total=plan.config.frames, speed="compiling and making the first frames")
        begin, done = 0.0, 0
        for frames in parts:
            now = time.monotonic()
            if begin:  # the time of the first frames includes compilation
                done += len(frames)
            begin = begin or now
            speed = f"{done / (now - begin):.1f} frames/s" if done else ""
            bar.update(task, advance=len(frames), speed=speed)
            yield frames


def _let_watch(page: LivePage, seconds: float, report: Callable[[str], None]) -> None:
    """Keeps the page open until a browser has received everything, for at most `seconds`, or until Ctrl-C."""
    if not page.watched and seconds:
        report(f"all frames are generated; the page stays open for {seconds:.0f} s, Ctrl-C ends it")
    with contextlib.suppress(KeyboardInterrupt):
        page.wait(seconds)


@contextlib.contextmanager
def _signals_stop() -> Iterator[None]:
    """SIGINT and SIGTERM raise KeyboardInterrupt with exit code 128 + signal, even if the parent ignores SIGINT."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number, frame):
        stop = KeyboardInterrupt("stopped")
        stop.code = 128 + number  # type: ignore[attr-defined]
        raise stop

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
