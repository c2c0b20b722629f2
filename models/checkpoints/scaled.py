"""Weights in 8-bit floats, with their scales.

ComfyUI, its forks and trainers store a matrix in float8 and scales to multiply it by: one number, one per row, or one
per row and block of columns. Files without scales have plain casts.
"""

from pathlib import Path

import ml_dtypes
import numpy as np

from monarchrt.models.checkpoints.tensor_files import TensorFile, TensorInfo
from monarchrt.models.errors import printable

FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
SCALES = ("scale_weight", "weight_scale")  # beside `weight`
UNUSED = ("scale_input", "input_scale", "comfy_quant")  # for products in float8, which are not computed here
MARKS = ("scaled_fp8", "spiece_model")  # the first marks files with scales; the second is ComfyUI's tokenizer


class Float8File:
    """A file with float8 weights that reads as wider floats: bfloat16 without a scale, float32 with one, exactly.

    Attributes:
        path: The file.
        infos: Shape and dtype of the tensors as read, by name; without scales.
        metadata: Metadata of the file.
        sets: Sets of weights in a `.pt` file.
        weights: The set that is read; "" if there is only one.
        scaled: Number of weights with scales.
        plain: Number of float8 weights without scales.

    Raises:
        ValueError: If a scale belongs to no float8 weight, or has an unsupported shape.
    """

    def __init__(self, file: TensorFile):
        self._file, self.path = file, file.path
        self.metadata = file.metadata
        self.sets, self.weights = getattr(file, "sets", ("",)), getattr(file, "weights", "")
        self.infos: dict[str, TensorInfo] = {}
        self._scales: dict[str, str] = {}
        for name in file.infos:
            stem, _, leaf = name.rpartition(".")
            if leaf in SCALES:
                self._add_scale(f"{stem}.weight" if stem else "weight", name)
        for name, info in file.infos.items():
            leaf = name.rpartition(".")[2]
            if leaf in SCALES + UNUSED + MARKS:
                continue
            wide = np.float32 if name in self._scales else ml_dtypes.bfloat16
            self.infos[name] = TensorInfo(info.shape, np.dtype(wide)) if info.dtype in FLOAT8 else info
        self.scaled = len(self._scales)
        self.plain = sum(info.dtype in FLOAT8 for info in file.infos.values()) - self.scaled
        self.plain -= sum(name.rpartition(".")[2] in MARKS and i.dtype in FLOAT8 for name, i in file.infos.items())

    def _add_scale(self, weight: str, name: str) -> None:
        scale, shown = self._file.infos[name], f"{self.path}: {printable(name)}"
        if weight not in self._file.infos or self._file.infos[weight].dtype not in FLOAT8:
            raise ValueError(f"{shown} is a scale, but {printable(weight)} is not a float8 tensor in the file.")
        if weight in self._scales:
            raise ValueError(f"{shown} is a second scale of {printable(weight)}; leave one of them in the file.")
        if scale.dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
            raise ValueError(f"{shown} is a scale with dtype {scale.dtype}; it should be a float.")
        _scaled_shape(self._file.infos[weight].shape, scale.shape, shown)
        self._scales[weight] = name

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor and multiplies it by its scale."""
        array = self._file.read(name)
        if name not in self._scales:
            return array.astype(self.infos[name].dtype, copy=False)
        scale = self._file.read(self._scales[name]).astype(np.float32)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ValueError(f"{self.path}: {printable(self._scales[name])} is not positive and finite.")
        shape = _scaled_shape(array.shape, scale.shape, name)
        return (array.astype(np.float32).reshape(shape) * scale.reshape(_rank(scale.shape, shape))).reshape(array.shape)


def _scaled_shape(weight: tuple[int, ...], scale: tuple[int, ...], shown: str) -> tuple[int, ...]:
    """Shape to which a weight is reshaped for its scale: split into blocks of columns if each has a scale."""
    rows = weight[0] if weight else 0
    if scale in ((), (1,), (1, 1), (rows,), (rows, 1)):
        return weight
    blocks = scale[1] if len(scale) in (2, 3) and scale[0] == rows and scale[2:] in ((), (1,)) else 0
    if len(weight) == 2 and blocks and weight[1] % blocks == 0:
        return rows, blocks, weight[1] // blocks
    raise ValueError(
        f"{shown} has shape {scale} for a weight of {weight}; supported are one number, one per row, or one per row "
        f"and block of columns."
    )


def _rank(scale: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...]:
    """The scale's shape with as many axes as the weight's."""
    kept = scale if len(scale) <= len(weight) else scale[: len(weight)]
    return tuple(kept) + (1,) * (len(weight) - len(kept))


def widened(file: TensorFile) -> TensorFile:
    """Wraps a file in `Float8File` if it has tensors in 8-bit floats, or scales."""
    leaves = {name.rpartition(".")[2] for name in file.infos}
    if leaves & {*SCALES, *UNUSED, *MARKS} or any(info.dtype in FLOAT8 for info in file.infos.values()):
        return Float8File(file)
    return file


def finite(array: np.ndarray) -> bool:
    """Whether all numbers are finite; takes a few tenths of a nanosecond per number in the cache.

    Examples:
        >>> finite(np.ones(3, np.float16)), finite(np.array([1, np.inf], ml_dtypes.bfloat16))
        (True, False)
    """
    masks = {np.dtype(np.float16): 0x7C00, np.dtype(ml_dtypes.bfloat16): 0x7F80, np.dtype(np.float32): 0x7F800000}
    if array.dtype not in masks:
        return bool(np.isfinite(array).all())
    kind = np.dtype(f"u{array.dtype.itemsize}")
    mask, bits = kind.type(masks[array.dtype]), np.ravel(array).view(kind)
    return not any(((bits[at : at + 2**16] & mask) == mask).any() for at in range(0, bits.size, 2**16))


def check_finite(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    """Returns the array; raises ValueError with the names of file and tensor if it has NaN or infinite values."""
    if not finite(array):
        bad = int((~np.isfinite(array.astype(np.float32))).sum())
        raise ValueError(
            f"{path}: {printable(name)} has {bad} numbers of {array.size} that are NaN or infinite; the file is "
            f"damaged, or its training diverged."
        )
    return array
