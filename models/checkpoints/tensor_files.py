"""Reading and writing of safetensors files one tensor at a time, without mapping them into memory."""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from monarchrt.models.checkpoints.json_files import MAX_BYTES, parse_json, read_json
from monarchrt.models.errors import UserError, printable
from monarchrt.models.files import growing

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPES = FLOATS | {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX_SUFFIX = ".safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class TensorFile(Protocol):
    """Named tensors that are read one at a time."""

    path: Path
    infos: dict[str, TensorInfo]
    metadata: dict[str, str]

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor."""
        ...


class SafetensorsFile:
    """One safetensors file. The header is checked against the file's size when opened.

    Args:
        path: The file.
        only: Names of the tensors to use; None: all.
        quantized: Whether to accept integers and 8-bit floats, which are useless without their scales.

    Attributes:
        infos: Shape and dtype by name.
        metadata: The header's text entries.

    Raises:
        ValueError: If the file is not safetensors, its size does not match its header, tensors overlap or leave gaps,
            or a tensor has an unsupported dtype.
    """

    def __init__(self, path: Path, *, only: Collection[str] | None = None, quantized: bool = False):
        self.path = Path(path)
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 0 < length <= MAX_BYTES:
                raise ValueError(f"{self.path} is not a safetensors file ({size} bytes).")
            if 8 + length > size:
                raise ValueError(f"{self.path} is truncated: {size} bytes, its header alone needs {8 + length}.")
            header = file.read(length)
        try:
            self.metadata, entries = _parse_header(header)
        except ValueError as error:
            raise ValueError(
                f"{self.path} is not a safetensors file: its header cannot be read: {printable(str(error))}"
            ) from error
        self._data = 8 + length
        self._offsets: dict[str, int] = {}
        self.infos: dict[str, TensorInfo] = {}
        reached, readable = 0, DTYPES if quantized else FLOATS
        for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: entry[3:]):
            shown = f"{self.path}: {printable(name)}"
            if begin != reached or end < begin:
                raise ValueError(f"{shown} claims bytes {begin} to {end}; those before end at {reached}.")
            reached = end
            if only is not None and name not in only:
                continue
            if dtype not in readable:
                raise ValueError(f"{shown} has dtype {printable(dtype, 20)}; these can be read: {', '.join(readable)}.")
            info = TensorInfo(shape, DTYPES[dtype])
            if end - begin != info.nbytes:
                raise ValueError(f"{shown} has {end - begin} bytes, its shape {shape} needs {info.nbytes}.")
            self.infos[name], self._offsets[name] = info, begin
        needed = self._data + reached
        if size < needed:
            raise ValueError(f"{self.path} is truncated: {size} bytes of {needed}; copy or download it again.")
        if size > needed:
            raise ValueError(f"{self.path} has {size} bytes, its header describes {needed}; download it again.")

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor."""
        info = self.infos[name]
        with self.path.open("rb") as file:
            file.seek(self._data + self._offsets[name])
            array = np.fromfile(file, info.dtype, math.prod(info.shape))
        if array.size != math.prod(info.shape):
            raise ValueError(f"{self.path} is truncated in {name}; copy or download it again.")
        return array.reshape(info.shape)


type _Row = tuple[str, str, tuple[int, ...], int, int]


def _parse_header(text: bytes) -> tuple[dict[str, str], list[_Row]]:
    """Metadata, and for each tensor its name, dtype, shape, first byte, and the byte after its last."""
    header = parse_json(text.decode("utf-8"), "it")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is not an object of strings")
    rows: list[_Row] = []
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its entry {name!r} lacks dtype, shape or data_offsets") from error
        if not isinstance(dtype, str) or not all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            raise ValueError(f"its entry {name!r} has an invalid number")
        check_shape(shape, np.dtype(np.float64))
        rows.append((name, dtype, shape, begin, end))
    return metadata, rows


def check_shape(shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raises ValueError for shapes that no array can have: more than 8 axes, or more than 2^60 bytes.

    Examples:
        >>> check_shape((1536, 16, 1, 2, 2), np.dtype("float32"))
    """
    if len(shape) > 8 or math.prod(max(n, 1) for n in shape) * dtype.itemsize > 2**60:
        raise ValueError(f"a shape of {len(shape)} axes is too large")


class ShardedSafetensors:
    """The shards listed in an index file, as one file.

    Raises:
        ValueError: If the index cannot be read, or a shard or a tensor that it lists is missing.
    """

    def __init__(self, index: Path):
        self.path = index
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError(f"{index} is not an index of safetensors shards.")
        shards = {shard: index.parent / shard for shard in weight_map.values()}
        for shard in shards:
            if shard in ("", ".", "..") or "\0" in shard or "/" in shard or "\\" in shard:
                raise ValueError(f"{index} names {printable(shard)!r}, which is not a file in the same folder.")
        self.metadata: dict[str, str] = {}
        self._shards: dict[str, SafetensorsFile] = {}
        self.infos: dict[str, TensorInfo] = {}
        owned: dict[str, list[str]] = {shard: [] for shard in shards}
        for name, shard in weight_map.items():
            owned[shard].append(name)
        for shard, path in shards.items():
            if not path.is_file():
                raise ValueError(f"{index.parent} lacks the shard {printable(shard)} that {index.name} lists.")
            file = SafetensorsFile(path, quantized=True)
            self.metadata |= file.metadata
            for name in owned[shard]:
                if name not in file.infos:
                    raise ValueError(f"{path} lacks the tensor {printable(name)} that {index.name} lists.")
                self._shards[name], self.infos[name] = file, file.infos[name]

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor."""
        return self._shards[name].read(name)


def write_safetensors(
    path: Path,
    infos: dict[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    *,
    metadata: dict[str, str] | None = None,
) -> Iterator[tuple[str, int]]:
    """Writes tensors one at a time, in the order of the safetensors library: larger dtypes first, then by name.

    Args:
        path: The file.
        infos: Shape and dtype of each tensor by name.
        read: Returns a tensor by name; called once for each, in order.
        metadata: Text entries of the header.

    Yields:
        Name and bytes of each tensor after it is written.

    Raises:
        ValueError: If `read` returns another shape or dtype than in `infos`.
    """
    order = sorted(infos, key=lambda name: (-infos[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name in order:
        info = infos[name]
        end = offset + info.nbytes
        header[name] = {"dtype": NAMES[info.dtype], "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            array, info = np.asarray(read(name), order="C"), infos[name]
            if (array.shape, array.dtype) != (info.shape, info.dtype):
                raise ValueError(f"{name}: {array.dtype}{array.shape} is not the announced {info.dtype}{info.shape}.")
            file.write(array.reshape(-1).view(np.uint8).data)
            yield name, info.nbytes


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], *, metadata: dict[str, str]) -> None:
    """Writes a small safetensors file, which appears complete or not at all; parent folders are created.

    Args:
        path: The file, which is replaced if it exists.
        arrays: The arrays by name.
        metadata: Text entries of the header.

    Raises:
        UserError: If it cannot be written.
    """
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with growing(path) as part:
            for _ in write_safetensors(part, infos, arrays.__getitem__, metadata=metadata):
                pass
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def split_shards(infos: dict[str, TensorInfo], max_bytes: int | None) -> list[list[str]]:
    """Names of tensors by shard, in order; shards have at most `max_bytes` unless one tensor is larger; None: one."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in infos.items():
        if max_bytes is not None and shards[-1] and filled + info.nbytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    return shards


def write_sharded(
    folder: Path,
    stem: str,
    infos: dict[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    *,
    max_bytes: int | None,
    metadata: dict[str, str],
) -> Iterator[tuple[str, int]]:
    """Writes `stem`.safetensors, or numbered shards with an index if the tensors exceed `max_bytes`.

    Arguments are as in `write_safetensors`.

    Yields:
        Name and bytes of each tensor after it is written.
    """
    shards = split_shards(infos, max_bytes)
    if len(shards) == 1:
        yield from write_safetensors(folder / f"{stem}.safetensors", infos, read, metadata=metadata)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards, start=1):
        file = f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        yield from write_safetensors(folder / file, {name: infos[name] for name in names}, read, metadata=metadata)
    index = {"metadata": {"total_size": total_bytes(infos.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")


def total_bytes(infos: Iterable[TensorInfo]) -> int:
    """Bytes of all tensors."""
    return sum(info.nbytes for info in infos)
