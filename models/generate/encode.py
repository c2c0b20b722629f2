"""Encodes clips and captions to latents and text embeddings, for finetuning."""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from monarchrt.models.checkpoints.tensor_files import SafetensorsFile, write_arrays
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.files import locked, remove_abandoned
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.media.clips import captioned
from monarchrt.models.media.frames import LARGEST
from monarchrt.models.media.writer import check_folder

if TYPE_CHECKING:
    from monarchrt.models.generate.decoders import WanDecoder
    from monarchrt.models.generate.load import Components


MOST_ROWS = 100_000  # limit on tokens of a text, far above practical values


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """Encode a folder of captioned clips once, so that training needs neither VAE nor text encoder in memory."""

    clips: Path = Path("clips")
    """Folder of videos, each with its caption beside it: cat.mp4 and cat.txt; with --frames 1, images."""

    components: Path | None = None
    """Folder or Hugging Face repository with text encoder, tokenizer and VAE, official or diffusers."""

    out: Path = Path("latents")
    """Folder for one .safetensors file per clip, for `monarchrt train --latents`. Existing files are kept, so a stopped
    run can continue; files with other captions or sizes are refused. Encoded captions are in OUT.texts until it is
    done."""

    frames: int = 81
    """Frames to use from each clip, 4 k + 1."""

    height: int = 480
    """Pixels, a multiple of 16. Clips are resized to cover height x width and center-cropped."""

    width: int = 832
    """Pixels, a multiple of 16."""

    fps: float = 16.0
    """Frames per second at which to read a clip, by its timestamps; Wan was trained on 16. 0 takes the frames as
    stored, whatever their times."""

    stride: int = 1
    """Take every n-th of these frames."""

    rows: int = 512
    """Tokens of a text embedding; longer captions are truncated."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute dtype of both networks; auto is bf16 on a GPU."""

    keep_going: bool = False
    """Skip clips that cannot be used and list them at the end; otherwise the first one stops the command."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % 4 != 1:
            near = max(1, 1 + 4 * round((self.frames - 1) / 4))
            raise UserError(f"frames is {self.frames}; it must be 1 + 4 k, for example {near}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value > LARGEST:
                raise UserError(f"{name} is {value}; it must be at most {LARGEST}, a multiple of 16, for example 480")
            if value < 16 or value % 16:
                raise UserError(
                    f"{name} is {value}; it must be a multiple of 16, for example {max(16, value // 16 * 16)}"
                )
        if not (self.fps == 0 or 0.1 <= self.fps <= 1000):
            raise UserError(f"fps is {self.fps}; it must lie in [0.1, 1000], for example 16, or be 0 for stored frames")
        for name in ("stride", "rows"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.rows > MOST_ROWS:
            raise UserError(f"rows is {self.rows}; it must be at most {MOST_ROWS}, 512 for Wan")


def encode_clips(
    config: EncodeConfig, *, report: Callable[[str], None] = lambda line: print(line, file=sys.stderr)
) -> list[Path]:
    """Writes a file with `latents` [F, h, w, 16] and `text` [rows, width], float32, for each clip.

    All texts are encoded first, into a temporary folder beside `out`; then the encoder is freed and the VAE loaded.
    Each file appears complete or not at all.

    Args:
        config: The settings.
        report: Called with lines of progress.

    Returns:
        The files of all clips, including existing ones, without clips that were left out.

    Raises:
        UserError: If captions, parts or frames are missing, latents are NaN, another process writes to `out`, or an
            existing file has another caption or size; files written so far stay.
    """
    import jax

    from monarchrt.models.generate.load import find_components

    left_out: list[str] = []
    captions = captioned(config.clips, skip=left_out.append if config.keep_going else None)
    if config.components is None:
        raise UserError("no components were given; give --components, for example Wan-AI/Wan2.1-T2V-1.3B")
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"out {config.out} is not a folder that can be written to")
    files = {video: config.out / f"{video.stem}.safetensors" for video in captions}
    todo = [video for video in captions if not files[video].exists()]
    for video, caption in captions.items():
        if video not in todo:
            _check_kept(files[video], video, caption, config)
    if len(todo) < len(files):
        report(f"{len(files) - len(todo)} of {len(files)} clips are in {config.out} already")
    if todo:
        parts = find_components(GenerateConfig(components=config.components), config.components)
        check_folder("out", files[todo[0]])
        half = config.precision == "bf16" or (config.precision == "auto" and jax.default_backend() == "gpu")
        dtype = "bfloat16" if half else "float32"
        with locked(config.out, name="out"):
            for folder in (config.out, _texts_folder(config)):
                remove_abandoned(folder)
            wanted = {video: captions[video] for video in todo if not files[video].exists()}
            left_out += _encode(wanted, files, config, parts, dtype=dtype, report=report)
    for line in left_out:
        report(f"left out: {line}")
    written = [file for file in files.values() if file.exists()]
    if not written:
        raise UserError(f"clips {config.clips} has none that could be encoded; {len(left_out)} were left out")
    return written


def _encode(
    captions: dict[Path, str],
    files: dict[Path, Path],
    config: EncodeConfig,
    parts: "Components",
    *,
    dtype: str,
    report: Callable[[str], None],
) -> list[str]:
    """Writes the files of clips; returns a line for each clip that was left out, with the reason."""
    from monarchrt.models.generate.decoders import WanDecoder
    from monarchrt.models.umt5 import load_embeddings
    from monarchrt.models.vae import load_vae

    texts = _encode_captions(list(captions.values()), config, parts, dtype=dtype, report=report)
    with user_input():
        vae = WanDecoder(load_vae(parts.vae, dtype=dtype, param_dtype=dtype))
    if config.fps:
        report(f"clips are read at {config.fps:g} frames per second; --fps 0 takes the frames that are stored")
    left_out: list[str] = []
    for count, (video, caption) in enumerate(captions.items(), 1):
        try:
            latents = _latents(video, vae, config)
        except UserError as error:
            if not config.keep_going:
                raise
            left_out.append(str(error))
            report(f"{count}/{len(captions)} {video} is left out")
            continue
        text = load_embeddings(texts[caption], length=config.rows)[caption].astype(np.float32)
        metadata = {"caption": caption, "clip": video.name}
        write_arrays(files[video], {"latents": latents, "text": text}, metadata=metadata | _sizes(config))
        report(f"{count}/{len(captions)} {files[video]}: latents {latents.shape}, text {text.shape}")
    for path in set(texts.values()):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it may have files of an earlier run with other settings
        _texts_folder(config).rmdir()
    return left_out


def _latents(video: Path, vae: "WanDecoder", config: EncodeConfig) -> np.ndarray:
    """The latents of a clip, float32 [F, h, w, C]."""
    from monarchrt.models.media.video import read_clip

    frames = read_clip(
        video,
        height=config.height,
        width=config.width,
        fps=config.fps,
        stride=config.stride,
        max_frames=config.frames,
        min_frames=config.frames,
    )
    latents = np.asarray(vae.encode(frames[None])[0], np.float32)
    if not np.isfinite(latents).all():
        raise UserError(
            f"clip {video} produces latents that are NaN or infinite; check the VAE's weights, or use --precision fp32"
        )
    return latents


def _texts_folder(config: EncodeConfig) -> Path:
    out = config.out.resolve()
    return out.parent / f"{out.name}.texts"


def _encode_captions(
    captions: list[str], config: EncodeConfig, parts: "Components", *, dtype: str, report: Callable[[str], None]
) -> dict[str, Path]:
    """Files with the embedding of each caption; existing ones of an earlier run are kept."""
    from monarchrt.models.generate.text import encode_once

    if parts.text_encoder is None or parts.tokenizer is None:
        raise UserError(f"components {config.components} has no text encoder or tokenizer")
    return encode_once(
        captions, _texts_folder(config), encoder=parts.text_encoder, tokenizer=parts.tokenizer, rows=config.rows,
        dtype=dtype, report=report,
    )  # fmt: skip


def _sizes(config: EncodeConfig) -> dict[str, str]:
    """The settings that a file's header records."""
    return {name: f"{getattr(config, name):g}" for name in ("frames", "height", "width", "fps", "stride", "rows")}


def _check_kept(path: Path, video: Path, caption: str, config: EncodeConfig) -> None:
    """Raises UserError unless an existing file has the same settings and caption, according to its header."""
    try:
        file = SafetensorsFile(path)
    except ValueError as error:
        raise UserError(f"{str(error).rstrip('.')}; delete it, or give another --out") from error
    shapes = [file.infos[name].shape for name in ("latents", "text") if name in file.infos]
    if [len(shape) for shape in shapes] != [4, 2]:
        raise UserError(f"{path} holds no latents and text of a clip; delete it, or give another --out")
    (frames, height, width, _), (rows, _) = shapes
    wanted = {"caption": caption, "clip": video.name} | _sizes(config)
    # headers of older versions have no sizes: the shapes of the arrays give all but the stride
    derived = {"frames": 1 + 4 * (frames - 1), "height": 8 * height, "width": 8 * width, "rows": rows}
    # with sizes but no frame rate, the clip was read as stored
    rate = {"fps": "0"} if "stride" in file.metadata else {}
    stored = wanted | {name: str(value) for name, value in derived.items()} | rate | file.metadata
    if other := [name for name in wanted if stored[name] != wanted[name]]:
        differences = ", ".join(f"{name} {stored[name]!r} instead of {wanted[name]!r}" for name in other)
        raise UserError(f"{path} already exists, with {differences}; delete it, or give another --out")
