"""Training examples: windows of a clip, or precomputed latents with their text embeddings.

A source is a pure function of an index: example number `g` (counted over the whole run, step * batch + position) is
always the same for the same seed. There is no iterator, so the only thing a checkpoint has to remember is the step.
"""

import functools
import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8

from monarchrt.models.checkpoints.tensor_files import SafetensorsFile
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.media.latents import PatchDCT
from monarchrt.models.media.video import read_clip
from monarchrt.train.config import DataConfig
from monarchrt.train.digests import FileDigests

_NAMES = ("latents", "text")  # of the tensors in a file of latents


class Batch(NamedTuple):
    """Latents [B, F, h, w, C] and text embeddings [B, L, D], both float32."""

    latents: Float32[np.ndarray, "b f h w c"]
    text: Float32[np.ndarray, "b l d"]


@runtime_checkable
class Source(Protocol):
    """What the training loop needs to know about the data."""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape (F, h, w, C) of one example."""
        ...

    @property
    def held_out(self) -> int:
        """Number of held-out examples."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes when the content changes; compared on resume."""
        ...

    def train_batch(self, step: int, batch: int, seed: int) -> Batch:
        """The batch of a step, counted from 0: a pure function of its arguments."""
        ...

    def held_out_batch(self, indices: Sequence[int]) -> Batch:
        """Held-out examples, each index in 0...held_out-1; never augmented."""
        ...


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def example_order(step: int, batch: int, seed: int, count: int) -> list[tuple[int, int]]:
    """Says which examples a step trains on: every epoch visits each example once, in an order of its own.

    Args:
        step: Step, counted from 0.
        batch: Examples per step.
        seed: Seed of the order.
        count: Number of different examples.

    Returns:
        For each position in the batch (index of the example, number of the draw since the start).

    Example:
        >>> sorted(index for index, _ in example_order(0, 4, seed=1, count=4))
        [0, 1, 2, 3]
    """
    draws = range(step * batch, (step + 1) * batch)
    return [(int(_epoch_order(seed, draw // count, count)[draw % count]), draw) for draw in draws]


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` different indices, spread evenly over 0...count-1.

    Example:
        >>> spread(9, 3)
        [0, 4, 8]
    """
    return sorted({round(x) for x in np.linspace(0, count - 1, min(wanted, count))})


class ClipWindows:
    """Windows of one clip held in memory, split by time into a training and a held-out part.

    Frames [0, n_train) are trained on, then `gap` frames belong to neither, the rest is held out: no frame is in both.

    Attributes:
        frames: The whole clip, uint8 [T, H', W', 3].
        transform: Pixels to latents and back.

    Example:
        >>> config = DataConfig(frames=3, height=16, width=16, held_out=0.4, gap=1)
        >>> windows = ClipWindows(np.zeros((12, 16, 16, 3), np.uint8), config)
        >>> windows.train_starts, windows.held_out_starts
        (range(0, 5), range(8, 10))
        >>> windows.train_batch(0, batch=2, seed=0).latents.shape
        (2, 3, 2, 2, 192)
    """

    def __init__(
        self,
        frames: UInt8[np.ndarray, "t H W 3"],
        config: DataConfig,
        *,
        text_shape: tuple[int, int] = (1, 1),
        name: str = "the clip",
    ):
        """Splits a clip.

        Args:
            frames: The clip at the size read, at least height x width.
            config: Window size, split and augmentation.
            text_shape: Shape (L, D) of the text embedding; it is zero, as there is no text encoder here.
            name: What errors call the clip.

        Raises:
            UserError: If either part is shorter than one window.
        """
        self.frames = frames
        self.transform = PatchDCT(patch=config.patch, whitening=config.whitening)
        self._config = config
        self._text_shape = text_shape
        total, window = len(frames), config.frames
        n_train = total - round(total * config.held_out)
        first_held_out = n_train + config.gap
        self.train_starts = range(0, n_train - window + 1)
        self.held_out_starts = range(first_held_out, total - window + 1)
        if not self.train_starts or not self.held_out_starts:
            part = "training" if not self.train_starts else "held-out"
            have = n_train if not self.train_starts else max(0, total - first_held_out)
            raise UserError(
                f"{name} has {total} frames at stride {config.stride}; with held_out {config.held_out} and gap "
                f"{config.gap} the {part} part has {have}, fewer than one window of frames {window}; use a longer "
                f"video, fewer frames, a smaller gap or another held_out"
            )

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape (F, h, w, C) of one window's latents."""
        config = self._config
        return (config.frames, config.height // config.patch, config.width // config.patch, self.transform.channels)

    @property
    def held_out(self) -> int:
        """Number of held-out windows."""
        return len(self.held_out_starts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the decoded frames."""
        return hashlib.sha256(np.ascontiguousarray(self.frames)).hexdigest()

    def train_batch(self, step: int, batch: int, seed: int) -> Batch:
        """The windows of a step, counted from 0."""
        order = example_order(step, batch, seed, len(self.train_starts))
        return self._encode(self._augment(self.train_starts[index], draw, seed) for index, draw in order)

    def held_out_batch(self, indices: Sequence[int]) -> Batch:
        """Held-out windows, cropped in the middle."""
        return self._encode(self.held_out_window(index) for index in indices)

    def held_out_window(self, index: int) -> UInt8[np.ndarray, "f H W 3"]:
        """Pixels of one held-out window, uint8 [F, height, width, 3]."""
        return self._window(self.held_out_starts[index])

    def _window(self, start: int, corner: tuple[int, int] | None = None) -> np.ndarray:
        config = self._config
        free = self.frames.shape[1] - config.height, self.frames.shape[2] - config.width
        top, left = corner if corner else (free[0] // 2, free[1] // 2)
        return self.frames[start : start + config.frames, top : top + config.height, left : left + config.width]

    def _augment(self, start: int, draw: int, seed: int) -> np.ndarray:
        config = self._config
        if config.crop == 1 and not config.flip:
            return self._window(start)
        rng = np.random.default_rng([seed, 1, draw])
        free = self.frames.shape[1] - config.height, self.frames.shape[2] - config.width
        window = self._window(start, (int(rng.integers(free[0] + 1)), int(rng.integers(free[1] + 1))))
        return window[:, :, ::-1] if config.flip and rng.random() < 0.5 else window

    def _encode(self, windows: Iterable[np.ndarray]) -> Batch:
        latents = self.transform.encode(np.stack(list(windows)))
        return Batch(latents, np.zeros((len(latents), *self._text_shape), np.float32))


class LatentFolder:
    """Precomputed latents and text embeddings: one .safetensors file per example.

    Each file holds `latents` [F, h, w, C] and `text` [L, D] in any float type. Files are taken in the order of their
    names; the last fraction is held out.
    """

    def __init__(self, folder: Path | str, config: DataConfig, *, digests: Path | None = None):
        """Opens a folder; only the headers are read.

        Args:
            folder: Where the files are.
            config: Its `held_out` sets the split.
            digests: File of the digests of an earlier start, whose files `fingerprint` need not read again.

        Raises:
            UserError: If the folder has fewer than two files, or names, dtypes or shapes are wrong or differ.
        """
        folder = Path(folder)
        self._digests = FileDigests(digests)
        if not folder.is_dir():
            raise UserError(f"latents {folder} is not a folder; give one with .safetensors files")
        files = sorted(folder.glob("*.safetensors"))
        if len(files) < 2:
            raise UserError(f"latents {folder} has {len(files)} .safetensors files; at least 2 are needed")
        shapes = {path: _latent_shapes(path) for path in files}
        first = shapes[files[0]]
        for path, shape in shapes.items():
            if shape != first:
                raise UserError(f"latents {path} has shapes {shape}, but {files[0]} has {first}; all must agree")
        self._latents, self._text = first
        n_held_out = min(len(files) - 1, max(1, round(len(files) * config.held_out)))
        self.train_files, self.held_out_files = files[:-n_held_out], files[-n_held_out:]

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Shape (F, h, w, C) of one example."""
        frames, height, width, channels = self._latents
        return (frames, height, width, channels)

    @property
    def text_shape(self) -> tuple[int, int]:
        """Shape (L, D) of one text embedding."""
        length, dim = self._text
        return (length, dim)

    @property
    def held_out(self) -> int:
        """Number of held-out examples."""
        return len(self.held_out_files)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the names and contents of the files.

        Raises:
            UserError: If a number in a file is NaN or infinite.
        """
        digest, files = hashlib.sha256(), self.train_files + self.held_out_files
        # every file that no earlier start has read is read here, before the first step
        for path, content in zip(files, self._digests.of(files, check=_check_finite), strict=True):
            digest.update(path.name.encode())
            digest.update(content)
        return digest.hexdigest()

    def keep_digests(self) -> None:
        """Writes what `fingerprint` found to the file of digests, if one was named."""
        self._digests.keep()

    def train_batch(self, step: int, batch: int, seed: int) -> Batch:
        """The examples of a step, counted from 0."""
        order = example_order(step, batch, seed, len(self.train_files))
        return self._load(self.train_files[index] for index, _ in order)

    def held_out_batch(self, indices: Sequence[int]) -> Batch:
        """Held-out examples."""
        return self._load(self.held_out_files[index] for index in indices)

    def _load(self, paths: Iterable[Path]) -> Batch:
        latents, text = zip(*map(_read, paths), strict=True)
        return Batch(np.stack(latents), np.stack(text))


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Latents and text of a file, in float32; the safetensors library's own reader has no BF16."""
    with user_input():
        file = SafetensorsFile(path, only=_NAMES)
        latents, text = (file.read(name).astype(np.float32) for name in _NAMES)
    return latents, text


def _check_finite(path: Path) -> None:
    for name, array in zip(_NAMES, _read(path), strict=True):
        if not np.isfinite(array).all():
            raise UserError(f"latents {path} has {name} that are NaN or infinite; make the file again")


def _latent_shapes(path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            names = set(file.keys())
            if not set(_NAMES) <= names:
                raise UserError(f"latents {path} holds {sorted(names)}; it needs 'latents' and 'text'")
            slices = [file.get_slice(name) for name in _NAMES]
            latents, text = (tuple(part.get_shape()) for part in slices)
            kinds = [part.get_dtype() for part in slices]
    except SafetensorError as error:
        raise UserError(f"latents {path} is cut off or damaged ({error})") from error
    except OSError as error:  # a folder, a link to nothing
        raise UserError(f"latents {path} cannot be read: {error.strerror or error}") from error
    if len(latents) != 4 or len(text) != 2:
        raise UserError(f"latents {path} has latents {latents} and text {text}; they must be [F, h, w, C] and [L, D]")
    if not set(kinds) <= {"F64", "F32", "F16", "BF16"}:
        raise UserError(f"latents {path} has dtypes {' and '.join(kinds)}; they must be floats, for example F32")
    return latents, text


def open_source(
    config: DataConfig, *, text_shape: tuple[int, int] = (1, 1), digests: Path | None = None
) -> ClipWindows | LatentFolder:
    """Opens the data that a config names.

    Args:
        config: Exactly one of `video` and `latents` must be set.
        text_shape: Shape (L, D) of the zero text embedding that goes with a video.
        digests: As `LatentFolder`.

    Returns:
        A source.

    Raises:
        UserError: If neither or both are set, or the data cannot be used.
    """
    if (config.video is None) == (config.latents is None):
        given = "neither was" if config.video is None else "both were"
        raise UserError(f"{given} given; give either video (--video CLIP.mp4) or latents (--latents FOLDER)")
    if config.latents is not None:
        return LatentFolder(config.latents, config, digests=digests)
    frames = read_clip(
        Path(config.video or ""),
        height=round(config.height * config.crop),
        width=round(config.width * config.crop),
        stride=config.stride,
    )
    return ClipWindows(frames, config, text_shape=text_shape, name=f"video {config.video}")
