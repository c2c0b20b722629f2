"""Sources of training examples: windows of clips, or precomputed latents with text embeddings.

A source is a pure function of an index: example number `g` of a run (step * batch + position) is always the same for
the same seed. There is no iterator, so a checkpoint only has to store the step.
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
from monarchrt.models.files import listed
from monarchrt.models.media.latents import PatchDCT
from monarchrt.models.media.windows import cut, held_out_count, window_starts
from monarchrt.models.processes.alike import listing
from monarchrt.train.data_settings import DataConfig
from monarchrt.train.digests import FileDigests

_NAMES = ("latents", "text")  # tensors in a file of latents
_WAN_CHANNELS = (16, 48)  # latent channels of the VAEs of Wan 2.1 and 2.2


class Batch(NamedTuple):
    """Latents [B, F, h, w, C] and text embeddings [B, L, D], both float32."""

    latents: Float32[np.ndarray, "b f h w c"]
    text: Float32[np.ndarray, "b l d"]


@runtime_checkable
class Source(Protocol):
    """The interface of the data for training."""

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
        """A digest of the content, which resuming compares."""
        ...

    def train_batch(self, step: int, batch: int, seed: int) -> Batch:
        """The batch of a step: a pure function of its arguments, called in another thread.

        Args:
            step: Number of the batch, counted from 0.
            batch: Number of examples.
            seed: Seed of order and augmentation.
        """
        ...

    def held_out_batch(self, indices: Sequence[int]) -> Batch:
        """Held-out examples without augmentation; indices are 0...held_out-1."""
        ...


@runtime_checkable
class ReadsParts(Protocol):
    """Base class of sources that can read a part of a batch, for a process whose devices hold only that part."""

    def train_part(self, step: int, batch: int, seed: int, rows: range) -> Batch:
        """The examples of `train_batch` at `rows`, without reading the others.

        Args:
            step: Number of the batch, counted from 0.
            batch: Number of examples of the whole batch.
            seed: Seed of order and augmentation.
            rows: Positions in the batch.
        """
        ...

    def train_batch(self, step: int, batch: int, seed: int) -> Batch:
        """The whole batch of a step, counted from 0."""
        return self.train_part(step, batch, seed, range(batch))


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def example_order(step: int, batch: int, seed: int, count: int, rows: range | None = None) -> list[tuple[int, int]]:
    """The examples of a step. Every epoch visits each example once, in a random order of its own.

    Args:
        step: Step, counted from 0.
        batch: Examples per step.
        seed: Seed of the order.
        count: Number of examples.
        rows: Positions in the batch; None for all.

    Returns:
        For each position, the index of the example, and its number counted over the whole run.

    Examples:
        >>> sorted(index for index, _ in example_order(0, 4, seed=1, count=4))
        [0, 1, 2, 3]
    """
    draws = range(step * batch, (step + 1) * batch)
    draws = draws if rows is None else draws[rows.start : rows.stop]
    return [(int(_epoch_order(seed, draw // count, count)[draw % count]), draw) for draw in draws]


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` distinct indices, spread evenly over 0...count-1.

    Examples:
        >>> spread(9, 3)
        [0, 4, 8]
    """
    return sorted({round(x) for x in np.linspace(0, count - 1, min(wanted, count))})


class ClipWindows(ReadsParts):
    """Windows of clips in memory; no frame is both in a training window and in a held-out one.

    A single clip is split by time: frames [0, n_train) are for training, the next `gap` frames are left out, and the
    rest is held out. Of several clips, the last ones are held out entirely; a window lies in one clip.

    Attributes:
        frames: The frames of all clips, one after the other, uint8 [T, H', W', 3].
        transform: Converts pixels to latents and back.

    Examples:
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
        lengths: Sequence[int] = (),
    ):
        """Splits clips into training and held-out windows.

        Args:
            frames: The frames of all clips, at least height x width pixels.
            config: Window size, split and augmentation.
            text_shape: Shape (L, D) of the text embeddings, which are zero.
            name: Name of the clips in messages.
            lengths: Number of frames of each clip; empty for a single clip.

        Raises:
            UserError: If the training part or the held-out part is shorter than one window.
        """
        self.frames = frames
        self.transform = PatchDCT(patch=config.patch, whitening=config.whitening)
        self._config = config
        self._text_shape = text_shape
        self._lengths = tuple(lengths)
        total, window = len(frames), config.frames
        self.train_starts, self.held_out_starts = window_starts(
            self._lengths or (total,), window=window, held_out=config.held_out, gap=config.gap
        )
        if self.train_starts and self.held_out_starts:
            return
        if len(lengths) > 1:
            raise UserError(f"{name} has clips of {min(lengths)} frames, fewer than one window of {window}")
        n_train = total - round(total * config.held_out)
        part = "training" if not self.train_starts else "held-out"
        have = n_train if not self.train_starts else max(0, total - n_train - config.gap)
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
        """SHA-256 of the decoded frames and, for several clips, of their lengths."""
        digest = hashlib.sha256(np.ascontiguousarray(self.frames))
        if len(self._lengths) > 1:
            digest.update(repr(self._lengths).encode())
        return digest.hexdigest()

    def train_part(self, step: int, batch: int, seed: int, rows: range) -> Batch:
        """The windows at `rows` of a step's batch, with augmentation."""
        order = example_order(step, batch, seed, len(self.train_starts), rows)
        return self._encode(self._augment(self.train_starts[index], draw, seed) for index, draw in order)

    def held_out_batch(self, indices: Sequence[int]) -> Batch:
        """Held-out windows, center-cropped."""
        return self._encode(self.held_out_window(index) for index in indices)

    def held_out_window(self, index: int) -> UInt8[np.ndarray, "f H W 3"]:
        """Pixels of one held-out window, uint8 [F, height, width, 3]."""
        return self._window(self.held_out_starts[index])

    def _window(self, start: int, corner: tuple[int, int] | None = None) -> np.ndarray:
        config = self._config
        if corner is None:
            return cut(self.frames, start, window=config.frames, height=config.height, width=config.width)
        top, left = corner
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


class LatentFolder(ReadsParts):
    """A folder of precomputed latents and text embeddings, one .safetensors file per example.

    Each file has `latents` [F, h, w, C] and `text` [L, D] of any floating-point dtype. Files are sorted by name; the
    last ones are held out.
    """

    def __init__(self, folder: Path | str, config: DataConfig, *, digests: Path | None = None):
        """Opens a folder; usually only the headers of the files are read.

        Args:
            folder: The folder.
            config: Settings of the data, of which `held_out` is used.
            digests: File with digests of an earlier start; `fingerprint` does not read unchanged files again.

        Raises:
            UserError: If there are fewer than two files, tensors are missing or not floats, shapes differ, or channels
                are not the last axis.
        """
        folder = Path(folder)
        self._digests = FileDigests(digests)
        if not folder.is_dir():
            raise UserError(f"latents {folder} is not a folder; give one with .safetensors files")
        files = [path for path in listed(folder) if path.suffix.lower() == ".safetensors"]
        if len(files) < 2:
            raise UserError(f"latents {folder} has {len(files)} .safetensors files; at least 2 are needed")
        shapes = {path: _latent_shapes(path) for path in files}
        first = shapes[files[0]]
        for path, shape in shapes.items():
            if shape != first:
                raise UserError(f"latents {path} has shapes {shape}, but {files[0]} has {first}; all must agree")
        _check_channels_last(files[0], first[0])
        self._latents, self._text = first
        n_held_out = held_out_count(len(files), config.held_out)
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
        """SHA-256 of the names and contents of all files.

        Raises:
            UserError: If a number in a file is NaN or infinite.
        """
        digest, files = hashlib.sha256(), self.train_files + self.held_out_files
        # every file that is new or changed since an earlier start is read here, before the first step
        for path, content in zip(files, self._digests.of(files, check=_check_finite), strict=True):
            digest.update(path.name.encode())
            digest.update(content)
        return digest.hexdigest()

    @property
    def listing(self) -> str:
        """SHA-256 of the names of the files, their sizes and samples of their contents (`alike.samples`).

        Raises:
            OSError: If a file cannot be read.
        """
        return listing(self.train_files + self.held_out_files)

    def keep_digests(self) -> None:
        """Writes the digests of `fingerprint` to the file of digests, if there is one."""
        self._digests.keep()

    def train_part(self, step: int, batch: int, seed: int, rows: range) -> Batch:
        """The examples at `rows` of a step's batch; files of others are not read."""
        order = example_order(step, batch, seed, len(self.train_files), rows)
        return self._load(self.train_files[index] for index, _ in order)

    def held_out_batch(self, indices: Sequence[int]) -> Batch:
        """Held-out examples."""
        return self._load(self.held_out_files[index] for index in indices)

    def _load(self, paths: Iterable[Path]) -> Batch:
        latents, text = zip(*map(self.read, paths), strict=True)
        return Batch(np.stack(latents), np.stack(text))

    @staticmethod
    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Reads an example: latents [F, h, w, C] and text [L, D], float32."""
        return _read(path)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads latents and text of a file as float32; the safetensors library cannot read BF16 into NumPy."""
    with user_input():
        file = SafetensorsFile(path, only=_NAMES)
        latents, text = (file.read(name).astype(np.float32) for name in _NAMES)
    return latents, text


def _check_finite(path: Path) -> None:
    for name, array in zip(_NAMES, _read(path), strict=True):
        if not np.isfinite(array).all():
            raise UserError(f"latents {path} has {name} that are NaN or infinite; make the file again")


def _check_channels_last(path: Path, shape: tuple[int, ...]) -> None:
    """Raises UserError for latents in PyTorch's order, [C, F, h, w] or [F, C, h, w], whose last axis is the width.

    Wan's latents have 16 channels, 48 in version 2.2. If the shape is ambiguous, the values decide: neighbors along the
    width are correlated, neighboring channels are not.
    """
    axes = [axis for axis in (0, 1) if shape[axis] in _WAN_CHANNELS]
    if shape[3] in (*_WAN_CHANNELS, *(3 * patch**2 for patch in range(1, 17))):  # the latter of a patch transform
        latents = _read(path)[0] if axes else np.zeros(())
        axes = [axis for axis in axes if likeness(latents, 3) > 0.5 > 2 * abs(likeness(latents, axis))]
    if not axes:
        return
    first = axes[0]
    order = "C, F, h, w" if first == 0 else "F, C, h, w"
    moved = "1, 2, 3, 0" if first == 0 else "0, 2, 3, 1"
    raise UserError(
        f"latents {path} has latents {shape}, which look like [{order}], PyTorch's order; they must be [F, h, w, C]: "
        f"write latents.permute({moved}).contiguous()"
    )


def likeness(array: np.ndarray, axis: int) -> float:
    """Correlation of neighboring values along an axis; 0 if it is not defined.

    Examples:
        >>> likeness(np.arange(6.0).reshape(2, 3), 1)
        1.0
    """
    array = np.moveaxis(array, axis, 0).astype(np.float64)
    if len(array) < 2:
        return 0.0
    one, other = array[:-1] - array[:-1].mean(), array[1:] - array[1:].mean()
    scale = np.sqrt(np.square(one).mean() * np.square(other).mean())
    return float((one * other).mean() / scale) if np.isfinite(scale) and scale > 0 else 0.0


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
    except OSError as error:  # for example a folder, or a broken link
        raise UserError(f"latents {path} cannot be read: {error.strerror or error}") from error
    if len(latents) != 4 or len(text) != 2:
        raise UserError(f"latents {path} has latents {latents} and text {text}; they must be [F, h, w, C] and [L, D]")
    if not set(kinds) <= {"F64", "F32", "F16", "BF16"}:
        raise UserError(f"latents {path} has dtypes {' and '.join(kinds)}; they must be floats, for example F32")
    return latents, text
