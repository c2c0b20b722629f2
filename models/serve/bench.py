"""Timing of video generation: first and steady blocks, stages, and whether playback would stall."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

import monarch_jax
from monarchrt.models.generate.decoders import to_host
from monarchrt.models.serve.engine import Engine
from monarchrt.models.web.encodings import ENCODINGS

PACKAGES = ("jax", "jaxlib", "flax", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "jax-triton", "triton", "av", "numpy")
SHARES = (50, 90, 99)
STAGED = 28  # blocks, at most, that are timed stage by stage
ENCODED = 5  # timed encodings of the prompt


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """When blocks arrive, relative to playback at a fixed frame rate.

    Attributes:
        first: Seconds from the request to the first block.
        gap_ms: Milliseconds between consecutive blocks, by percentile.
        deadlines_met: Fraction of the blocks after the first that arrived before their first frame was due.
        underruns: Number of times that playback stalled.
        stood: Total seconds that it stalled.
    """

    first: float
    gap_ms: dict[str, float]
    deadlines_met: float
    underruns: int
    stood: float


def percentiles(values: Sequence[float], *, scale: float = 1000.0) -> dict[str, float]:
    """The 50th, 90th and 99th percentile, by default in milliseconds of values in seconds.

    Examples:
        >>> percentiles([0.1, 0.2, 0.3])
        {'p50': 200.0, 'p90': 280.0, 'p99': 298.0}
    """
    return {f"p{share}": round(scale * float(np.percentile(values, share)), 3) for share in SHARES}


def cadence(arrivals: Sequence[float], frames: Sequence[int], *, fps: float) -> Cadence:
    """Simulates playback that starts with the first block and stalls until a late block arrives.

    Examples:
        >>> seen = cadence([1.0, 1.4, 2.9], [8, 8, 8], fps=16.0)
        >>> seen.first, seen.deadlines_met, seen.underruns, round(seen.stood, 3)
        (1.0, 0.5, 1, 0.9)

    Args:
        arrivals: Seconds from the request to each block, two blocks or more.
        frames: Number of frames of each block.
        fps: Frame rate of playback.

    Returns:
        Delays and stalls.
    """
    due, late = arrivals[0], []
    for arrival, before in zip(arrivals[1:], frames, strict=False):
        due += before / fps
        if arrival > due:
            late.append(arrival - due)
            due = arrival
    return Cadence(
        first=arrivals[0],
        gap_ms=percentiles(np.diff(arrivals).tolist()),
        deadlines_met=1 - len(late) / (len(arrivals) - 1),
        underruns=len(late),
        stood=float(sum(late)),
    )


@dataclass(kw_only=True)
class Samples:
    """Times of one measurement in seconds, as far as it got (`take_samples`).

    Attributes:
        text: The first encoding of the prompt.
        cold: From the request to each of the first three blocks, with compilation.
        arrivals: From the request to each block of the streamed video.
        frames: Number of frames of each of these blocks.
        programs: Events of programs compiled during the stream.
        stages: Times of each block by stage.
        paced: The same of a video that is generated at the speed of playback.
        texts: Further encodings of the prompt.
    """

    text: float | None = None
    cold: list[float] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    programs: list[str] = field(default_factory=list)
    stages: dict[str, list[float]] = field(default_factory=dict)
    paced: dict[str, list[float]] = field(default_factory=dict)
    texts: list[float] = field(default_factory=list)


def measure(engine: Engine, *, blocks: int, fps: float = 16.0, prompt: str | None = None) -> dict[str, Any]:
    """Times three videos: one that includes compilation, one streamed block by block, and one stage by stage.

    Args:
        engine: Generates them; its programs need not be compiled.
        blocks: Blocks of the streamed video, at least 3. The staged one has as many, at most 28.
        fps: Frame rate of playback.
        prompt: Prompt of the videos; None for the engine's sample.

    Returns:
        JSON values by name, see `summarize`.
    """
    samples = Samples()
    take_samples(engine, samples, blocks=blocks, prompt=prompt)
    return summarize(engine, samples, fps=fps)


def take_samples(
    engine: Engine, samples: Samples, *, blocks: int, prompt: str | None = None, pace: float | None = None
) -> None:
    """Times the three videos of `measure`, whose arguments it has, and with `pace` a fourth.

    Args:
        engine: As in `measure`.
        samples: Filled as times are taken, so that it holds what there is if this is interrupted.
        blocks: As in `measure`.
        prompt: As in `measure`.
        pace: Frames per second at which a further video is generated, stage by stage, each block when its first frame
            is due: as sessions generate by default.
    """
    said = engine.sample if prompt is None else prompt
    begin = time.perf_counter()
    texts = engine.embed(said, None)
    jax.block_until_ready(texts)
    samples.text = time.perf_counter() - begin
    _stream(engine, texts, 3, arrivals=samples.cold, frames=[], programs=[])
    video = engine.video(texts, 0)
    video.generate()
    video.count_anew()  # long streams run this program too; sessions compile it when they start
    jax.block_until_ready(video.generate())
    _stream(engine, texts, blocks, arrivals=samples.arrivals, frames=samples.frames, programs=samples.programs)
    _stages(engine, texts, min(blocks, STAGED), samples.stages)
    if pace is not None:
        _stages(engine, texts, min(blocks, STAGED), samples.paced, pace=pace)
    for _ in range(ENCODED):
        samples.texts.append(_seconds(lambda: engine.embed_anew(said)))


def summarize(engine: Engine, samples: Samples, *, fps: float = 16.0) -> dict[str, Any]:
    """The report of a measurement.

    Args:
        engine: The engine that was measured.
        samples: From `take_samples`; if that was interrupted, values without samples are left out.
        fps: Frame rate of playback.

    Returns:
        JSON values by name; times in seconds unless the name ends in `_ms`, memory in bytes.
    """
    return machine() | {
        "attention": str(engine.pipeline.model.config.attention),
        "dtype": engine.pipeline.model.config.dtype,
        "products": engine.pipeline.model.blocks.ffn.fc1.kernel[...].dtype.name,
        "height": engine.size[0],
        "width": engine.size[1],
        "window": engine.window,
        "formats": engine.formats(),
        **measured(samples, fps=fps),
        "memory": memory(),
        **_on_each_device(engine),
    }


def measured(samples: Samples, *, fps: float) -> dict[str, Any]:
    """The part of `summarize` that follows from the samples; arguments and values as there."""
    arrivals, frames = samples.arrivals, samples.frames
    cold: dict[str, Any] = {} if samples.text is None else {"text": samples.text}
    if samples.text is not None and samples.cold:
        cold["first_frames"] = samples.text + samples.cold[0]
    steady: dict[str, Any] = {}
    if arrivals:
        steady["first_frames"] = arrivals[0]
    if len(arrivals) > 2:
        between = np.diff(arrivals)[1:]  # without the second block, whose decoder program differs from the later ones
        steady["block_ms"] = percentiles(between.tolist())
        steady["p99_over_p50"] = float(np.percentile(between, 99) / np.percentile(between, 50))
    stages = {"text": samples.texts} | {name: taken[2:] or taken for name, taken in samples.stages.items()}
    steady |= {f"{name}_ms": percentiles(seconds) for name, seconds in stages.items() if seconds}
    paced = {f"{name}_ms": percentiles(taken[2:] or taken) for name, taken in samples.paced.items() if taken}
    if arrivals:
        steady |= {"frames_per_second": sum(frames) / arrivals[-1], "compiled": len(samples.programs)}
    seen = cadence(arrivals, frames, fps=fps) if len(arrivals) > 1 else None
    return {
        "blocks": len(arrivals),
        "frames": sum(frames),
        "cold": cold,
        "steady": steady,
        **({"paced": paced} if paced else {}),
        "cadence": {"fps": fps} if seen is None else {"fps": fps} | dataclasses.asdict(seen),
    }


def _on_each_device(engine: Engine) -> dict[str, Any]:
    """Memory in bytes by device number, if there are several devices."""
    devices = list(engine.held_on(1))
    return {} if len(devices) == 1 else {"memory_of_devices": {str(device.id): memory(device) for device in devices}}


def _seconds(call: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - begin


def _stream(
    engine: Engine, texts: Any, blocks: int, *, arrivals: list[float], frames: list[int], programs: list[str]
) -> None:
    """Streams a video, as sessions do: the next block is dispatched before the frames of the previous one are fetched.

    Args:
        engine: Generates it.
        texts: Of `Engine.embed`.
        blocks: Number of blocks.
        arrivals: Gets the seconds until each block's frames are on the host.
        frames: Gets the number of frames of each block.
        programs: Gets an event for each program that is compiled meanwhile.
    """

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        begin, waiting = time.perf_counter(), []

        def fetch() -> None:
            while waiting:
                count = np.asarray(waiting.pop(0)).shape[1]
                arrivals.append(time.perf_counter() - begin)
                frames.append(count)

        video, state = engine.video(texts, 0), None
        for _ in range(blocks):
            latents = video.generate(meanwhile=fetch)
            state = engine.start_decoder() if state is None else state
            shown, _, state = engine.decode(latents, state)
            to_host(shown)
            waiting.append(shown)
        fetch()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _stages(
    engine: Engine, texts: Any, blocks: int, took: dict[str, list[float]], *, pace: float | None = None
) -> None:
    """Adds the seconds of each block by stage; each stage ends before the next starts.

    With `pace`, frames per second, a block is not begun before its first frame is due.

    The stages are the network, the decoder with the copy of its frames to the host, and each encoding.
    """
    video, state = engine.video(texts, 1), engine.start_decoder()
    names = ["network", "decoder", *engine.formats()]
    begin = time.perf_counter()
    for block in range(blocks):
        if pace is not None:
            time.sleep(max(0.0, begin + engine.frames(block) / pace - time.perf_counter()))
        times = [time.perf_counter()]
        latents = jax.block_until_ready(video.generate())
        times.append(time.perf_counter())
        shown, _, state = engine.decode(latents, state)
        pictures = np.asarray(shown)[0]
        times.append(time.perf_counter())
        for encoding in map(ENCODINGS.__getitem__, engine.formats()):
            size = len(pictures) if encoding.by_block else 1
            for index in range(0, len(pictures), size):
                encoding.encode(pictures[index : index + size], engine.frames(block) + index, engine.fps)
            times.append(time.perf_counter())
        for name, seconds in zip(names, np.diff(times).tolist(), strict=True):
            took.setdefault(name, []).append(seconds)


def machine() -> dict[str, Any]:
    """The environment of a measurement: device, driver, priority (as set by `nice`), versions, git commit."""
    device = jax.devices()[0]
    folder = Path(__file__).parent
    return {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "nice": os.getpriority(os.PRIO_PROCESS, 0),
        "platform": device.platform,
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "python": platform.python_version(),
        "versions": {"monarchrt": monarch_jax.__version__} | _versions(),
        "commit": _said("git", "-C", str(folder), "rev-parse", "HEAD"),
    }


def _versions() -> dict[str, str]:
    """Versions of the installed packages among `PACKAGES`."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _said(*command: str) -> str | None:
    """The first line that a program prints; None if it is not installed, or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if run.returncode else next(iter(run.stdout.splitlines()), None)


def memory(device: Any = None) -> dict[str, int]:
    """Bytes in use, and at their peak, on a device.

    Args:
        device: The device; None for the first one, and the peak of this process on the host.

    Returns:
        `in_use` and `peak`, if the device reports them; `host_peak` without a device.
    """
    stats = (device or jax.devices()[0]).memory_stats() or {}
    names = {"in_use": "bytes_in_use", "peak": "peak_bytes_in_use"}
    own = {name: int(stats[theirs]) for name, theirs in names.items() if theirs in stats}
    return own if device is not None else own | {"host_peak": _host_peak()}


def _host_peak() -> int:
    """Peak resident bytes of this process; Linux reports KiB, macOS bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
