"""Reading of torch's `.pt` files without torch and without running code: an archive of tensor bytes, and a pickle."""

import collections
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from monarchrt.models.checkpoints.plain_pickle import UnsafePickleError, read_pickle
from monarchrt.models.checkpoints.stored_zip import read_directory, read_entry
from monarchrt.models.checkpoints.tensor_files import TensorInfo, check_shape
from monarchrt.models.checkpoints.torch_legacy import MAGIC, LegacyFile
from monarchrt.models.errors import printable

__all__ = ["STORAGES", "TorchFile", "UnsafePickleError"]

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
# torch.DTYPE, which files name with untyped storages for newer dtypes, and in settings
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
MAX_PICKLE = 64 * 2**20  # bytes; the pickle of a model has about 100 to 200 per tensor
MAX_DEPTH = 4  # nesting of dictionaries in which sets of tensors are searched


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


def _storage(pid: Any) -> _Storage:
    kind, storage_type, key, _, size = pid
    if kind != "storage" or not isinstance(storage_type, _StorageType):
        raise UnsafePickleError(f"it refers to a {printable(str(kind)) if isinstance(kind, str) else type(kind)}")
    if not isinstance(key, str) or type(size) is not int or size < 0:
        raise UnsafePickleError("a storage has no name or no size")
    return _Storage(key, storage_type.dtype, size)


def _rebuild_tensor(storage, offset, shape, strides, *_) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or not all(type(number) is int and number >= 0 for number in numbers):
        raise UnsafePickleError("a tensor lies outside its storage")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    count = math.prod(shape)
    # a tensor that repeats its numbers could be much larger in memory than in the file
    if count and (last >= storage.size or count > storage.size):
        raise UnsafePickleError("a tensor lies outside its storage")
    check_shape(tuple(shape), storage.dtype)
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_typed(storage, offset, shape, strides, requires_grad, hooks, dtype, *_) -> _Tensor:
    if not isinstance(storage, _Storage) or not isinstance(dtype, _StorageType) or storage.size % dtype.dtype.itemsize:
        raise UnsafePickleError("a tensor has no dtype, or lies outside its storage")
    typed = _Storage(storage.key, dtype.dtype, storage.size // dtype.dtype.itemsize)
    return _rebuild_tensor(typed, offset, shape, strides)


def _rebuild_parameter(tensor, *_) -> _Tensor:
    return tensor


def _ordered(pairs: Any = ()) -> dict[str, Any]:
    ordered = collections.OrderedDict()
    for key, value in pairs:
        if not isinstance(key, str | int):
            raise UnsafePickleError(f"a dictionary in it has a key that is a {type(key).__name__}")
        ordered[key] = value
    return ordered


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ordered,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_typed,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): _StorageType(np.dtype(np.uint8)),
    **{("torch", name): _StorageType(dtype) for name, dtype in (STORAGES | DTYPES).items()},
}


class TorchFile:
    """A `.pt` file of torch (a zip archive; before 1.6, pickles) with dictionaries of tensors, read one at a time.

    Attributes:
        sets: Dictionaries of tensors by their key in the file, such as "generator_ema"; nested keys are joined by dots,
            and the key is "" if the file itself is such a dictionary.
        infos: Shape and dtype by name in the chosen set.

    Args:
        path: The file.
        weights: Name of the set; None: the first of `preference` that exists, at any depth, or else the set with the
            most tensors.
        preference: Names of sets in order of preference.

    Raises:
        UnsafePickleError: If the file refers to anything but tensors and plain containers.
        ValueError: If it is not a file of torch, is truncated, or has no such set.
    """

    def __init__(self, path: Path, *, weights: str | None = None, preference: tuple[str, ...] = ()):
        self.path = Path(path)
        with self.path.open("rb") as file:
            start = file.read(len(MAGIC))
        self._legacy: LegacyFile | None = None
        try:
            self._entries = read_directory(self.path) if start[:4] == b"PK\3\4" else {}
        except ValueError as error:
            raise ValueError(
                f"{self.path} is not a zip archive: {error}; copy or download it again, or save it again with torch."
            ) from error
        if not self._entries and start != MAGIC:
            raise ValueError(f"{self.path} is not a zip archive: it is truncated, or torch did not write it.")
        content = self._checked(self._content if self._entries else self._legacy_content)
        self.sets = _tensor_sets(content)
        if not self.sets:
            raise ValueError(f"{self.path} holds no dictionary of tensors.")
        self.weights = _choose(self.path, self.sets, weights, preference)
        self._tensors = self.sets[self.weights]
        self.infos = {name: TensorInfo(t.shape, t.storage.dtype) for name, t in self._tensors.items()}
        self.metadata: dict[str, str] = {}
        for name, tensor in self._tensors.items():
            needed = tensor.storage.size * tensor.storage.dtype.itemsize
            if (stored := self._stored(tensor.storage)) != needed:
                raise ValueError(f"{self.path}: {printable(name)} has {stored} bytes of {needed}; the file is damaged.")

    def _content(self) -> Any:
        """The object in the pickle of an archive."""
        pickles = [name for name in self._entries if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"{self.path} is a zip archive, but not one that torch.save wrote.")
        self._root = pickles[0].removesuffix("data.pkl")
        if any(name.startswith(f"{self._root}code/") for name in self._entries):
            raise ValueError(f"{self.path} is a TorchScript program, not weights; save its state_dict with torch.")
        order, entry = self._entries.get(f"{self._root}byteorder"), self._entries[pickles[0]]
        if entry.size > MAX_PICKLE:
            raise ValueError(f"{self.path} has a pickle of {entry.size} bytes; at most {MAX_PICKLE} are read.")
        if order is not None and (order.size > 6 or read_entry(self.path, order).tobytes() != b"little"):
            raise ValueError("it was written on a big-endian machine, which is not supported")
        return read_pickle(read_entry(self.path, entry).tobytes(), build=_ALLOWED, storage=_storage)

    def _legacy_content(self) -> Any:
        """The object of a file from before 1.6."""
        size = lambda storage: storage.dtype.itemsize  # noqa: E731
        self._legacy = LegacyFile(self.path, build=_ALLOWED, storage=_storage, itemsize=size, most=MAX_PICKLE)
        return self._legacy.content

    def _checked(self, content: Callable[[], Any]) -> Any:
        """Returns content(); errors name the file."""
        try:
            return content()
        except UnsafePickleError as error:
            raise UnsafePickleError(
                f"{self.path} is refused: {error}. Only tensors are read from pickles, since anything else could "
                f"run a program; ask its author for safetensors."
            ) from None
        except ValueError as error:
            if str(error).startswith(str(self.path)):
                raise
            raise ValueError(f"{self.path} cannot be read: {error}.") from error

    def _stored(self, storage: _Storage) -> int:
        """Bytes of a storage in the file."""
        if self._legacy is not None:
            return self._legacy.places[storage.key][1]
        entry = self._entries.get(f"{self._root}data/{storage.key}")
        return 0 if entry is None else entry.size

    def _bytes(self, storage: _Storage) -> Any:
        if self._legacy is not None:
            return self._legacy.read(storage.key)
        return read_entry(self.path, self._entries[f"{self._root}data/{storage.key}"]).data

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor; in an archive, its checksum is verified."""
        tensor = self._tensors[name]
        try:
            data = self._bytes(tensor.storage)
        except ValueError as error:
            raise ValueError(f"{self.path}: {printable(name)} is damaged ({error}).") from error
        dtype = tensor.storage.dtype
        strides = [step * dtype.itemsize for step in tensor.strides]
        array = np.ndarray(tensor.shape, dtype, data, tensor.offset * dtype.itemsize, strides)
        array.setflags(write=False)
        return array


def _tensor_sets(content: Any) -> dict[str, dict[str, _Tensor]]:
    """Dictionaries of tensors in a loaded file: the file itself ("") or values in it, without states of optimizers."""
    sets: dict[str, dict[str, _Tensor]] = {}
    seen: set[int] = set()

    def look(name: str, value: Any, depth: int) -> None:
        if not isinstance(value, dict) or id(value) in seen:
            return
        seen.add(id(value))
        if tensors := {str(key): tensor for key, tensor in value.items() if isinstance(tensor, _Tensor)}:
            sets[name] = tensors
        if depth < MAX_DEPTH:
            for key, inner in value.items():
                if "optim" not in str(key).lower():
                    look(f"{name}.{key}" if name else str(key), inner, depth + 1)

    look("", content, 0)
    return sets


def _choose(path: Path, sets: dict[str, Any], weights: str | None, preference: tuple[str, ...]) -> str:
    if weights is None:
        for wanted in preference:
            inside = [name for name in sets if wanted == name or wanted in name.split(".")]
            if inside:
                return min(inside, key=lambda name: (name != wanted, -len(sets[name])))
        return max(sets, key=lambda name: len(sets[name]))
    if weights not in sets:
        there = ", ".join(printable(repr(name)) for name in list(sets)[:20])
        raise ValueError(f"weights={weights!r} is not in {path}; it holds {there if set(sets) != {''} else _ONE}.")
    return weights


_ONE = "one unnamed set"
