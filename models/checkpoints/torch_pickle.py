"""torch's `.pt` files without torch, and without running anything: an unpickler that can build tensors only."""

import collections
import dataclasses
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from monarchrt.models.checkpoints.tensor_files import TensorInfo

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class UnsafePickleError(ValueError):
    """The file asks for something other than tensors, which could be any program."""


@dataclasses.dataclass(frozen=True)
class _StorageType:
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Storage:
    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
    shape, strides = tuple(map(int, shape)), tuple(map(int, strides))
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    inside = math.prod(shape) == 0 or (offset >= 0 and min(strides, default=0) >= 0 and last < storage.size)
    if not isinstance(storage, _Storage) or not inside:
        raise UnsafePickleError("a tensor lies outside its storage")
    return _Tensor(storage, int(offset), shape, strides)


def _rebuild_parameter(tensor, *_) -> _Tensor:
    return tensor


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    **{("torch", name): _StorageType(dtype) for name, dtype in STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise UnsafePickleError(f"it asks for {module_name}.{global_name}") from None

    def persistent_load(self, pid: Any, /) -> _Storage:
        kind, storage_type, key, _, size = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise UnsafePickleError(f"it refers to a {kind!r}")
        return _Storage(str(key), storage_type.dtype, int(size))


class TorchFile:
    """A `.pt` file as torch >= 1.6 writes it (a zip archive): dictionaries of tensors, read one tensor at a time.

    Attributes:
        sets: Dictionaries of tensors by their key in the file, such as "generator_ema"; "" if the file is one itself.
        infos: Shape and dtype by name in the chosen set.

    Args:
        path: The file.
        weights: Which set to take; None takes the first of `preference` that is there.
        preference: Order of choice.

    Raises:
        UnsafePickleError: If the file asks for anything but tensors and plain containers.
        ValueError: If the file is not a zip archive, is truncated, or holds no such set.
    """

    def __init__(self, path: Path, *, weights: str | None = None, preference: tuple[str, ...] = ()):
        self.path = Path(path)
        try:
            archive = zipfile.ZipFile(self.path)
        except zipfile.BadZipFile:
            raise ValueError(
                f"{self.path} is not a zip archive: it is truncated, or written by torch before 1.6 (then load it with "
                f"torch and save it again)."
            ) from None
        with archive:
            self._entries = {entry.filename: entry for entry in archive.infolist()}
            pickles = [name for name in self._entries if name == "data.pkl" or name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise ValueError(f"{self.path} is a zip archive, but not one that torch.save wrote.")
            self._root = pickles[0].removesuffix("data.pkl")
            order = self._root + "byteorder"
            if order in self._entries and archive.read(order) != b"little":
                raise ValueError(f"{self.path} was written on a big-endian machine, which is not supported.")
            try:
                with archive.open(pickles[0]) as file:
                    content = _Unpickler(file).load()
            except UnsafePickleError as error:
                raise UnsafePickleError(
                    f"{self.path} is refused: {error}. Only tensors are read from pickles, since anything else could "
                    f"run a program; ask its author for safetensors."
                ) from None
            except Exception as error:
                raise ValueError(f"{self.path} cannot be read: {error}") from error
        self.sets = _tensor_sets(content)
        if not self.sets:
            raise ValueError(f"{self.path} holds no dictionary of tensors.")
        self.weights = _choose(self.path, self.sets, weights, preference)
        self._tensors = self.sets[self.weights]
        self.infos = {name: TensorInfo(t.shape, t.storage.dtype) for name, t in self._tensors.items()}
        self.metadata: dict[str, str] = {}
        for name, tensor in self._tensors.items():
            entry = self._entries.get(f"{self._root}data/{tensor.storage.key}")
            needed = tensor.storage.size * tensor.storage.dtype.itemsize
            if entry is None or entry.file_size != needed:
                found = 0 if entry is None else entry.file_size
                raise ValueError(f"{self.path}: {name} has {found} bytes of {needed}; the file is damaged.")

    def read(self, name: str) -> np.ndarray:
        """The tensor, freshly read; the archive's checksum is verified."""
        tensor = self._tensors[name]
        try:
            with zipfile.ZipFile(self.path) as archive:
                data = archive.read(f"{self._root}data/{tensor.storage.key}")
        except (zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{self.path}: {name} is damaged ({error}).") from error
        flat = np.frombuffer(data, tensor.storage.dtype)[tensor.offset :]
        strides = [step * flat.itemsize for step in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)


def _tensor_sets(content: Any) -> dict[str, dict[str, _Tensor]]:
    """Dictionaries of tensors in a loaded file: itself ("") or its values."""
    if not isinstance(content, dict):
        return {}
    if own := _tensors_in(content):
        return {"": own}
    sets = {str(name): _tensors_in(value) for name, value in content.items()}
    return {name: tensors for name, tensors in sets.items() if tensors}


def _tensors_in(content: Any) -> dict[str, _Tensor]:
    if not isinstance(content, dict):
        return {}
    return {str(name): value for name, value in content.items() if isinstance(value, _Tensor)}


def _choose(path: Path, sets: dict[str, Any], weights: str | None, preference: tuple[str, ...]) -> str:
    if weights is None:
        return next((name for name in (*preference, *sets) if name in sets), "")
    if weights not in sets:
        there = ", ".join(map(repr, sets)) if set(sets) != {""} else "one unnamed set"
        raise ValueError(f"weights={weights!r} is not in {path}; it holds {there}.")
    return weights
