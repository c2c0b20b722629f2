"""Writing of torch's `.pt` files without torch: a zip archive of tensor bytes, and a pickle that names them.

As in archives of `torch.save`, entries are not compressed and are aligned to 64 bytes, so that `torch.load` reads the
file also with `mmap=True` and `weights_only=True`.
"""

import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from monarchrt.models.checkpoints.tensor_files import TensorInfo
from monarchrt.models.checkpoints.torch_pickle import STORAGES
from monarchrt.models.errors import report_full_disk
from monarchrt.models.files import growing

_STORAGE = {dtype: name for name, dtype in STORAGES.items()}
_ALIGNED = 64
_HEADER, _FIELD = 30, 4  # bytes of a local header without its name, and of an extra field without its content


def write_torch(
    path: Path, key: str, infos: Mapping[str, TensorInfo], read: Callable[[str], np.ndarray]
) -> Iterator[tuple[str, int]]:
    """Writes {key: {name: tensor}}, one tensor at a time; the file appears complete or not at all.

    Args:
        path: The file; an existing one is replaced.
        key: Key of the dictionary of tensors, such as generator_ema.
        infos: Shape and dtype by name.
        read: Returns a tensor by name, with this shape and dtype.

    Yields:
        Name and bytes of each tensor after it is written.

    Raises:
        ValueError: If a dtype has no name in torch.
        DiskFullError: If the disk is full.
    """
    for name, info in infos.items():
        if info.dtype not in _STORAGE:
            raise ValueError(f"{name} is {info.dtype}, which a .pt file cannot hold; give --dtype, such as float32.")
    with report_full_disk(path), growing(path) as part:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            _put(archive, "data.pkl", _pickle(key, infos))
            _put(archive, "byteorder", b"little")
            for number, (name, info) in enumerate(infos.items()):
                array = np.ascontiguousarray(read(name).reshape(info.shape), info.dtype)
                _put(archive, f"data/{number}", array.reshape(-1).view(np.uint8).data)
                yield name, array.nbytes
            _put(archive, "version", b"3\n")
        os.replace(part, path)


def _put(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    """Adds an entry whose content is aligned to 64 bytes."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    entry.file_size = len(content)
    begins = archive.fp.tell() + _HEADER + len(entry.filename) + _FIELD  # type: ignore[union-attr]
    if entry.file_size * 1.05 > zipfile.ZIP64_LIMIT:  # zipfile then inserts a field of its own
        begins += _FIELD + 16
    padding = -begins % _ALIGNED
    entry.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(entry, "w") as file:
        file.write(content)


def _pickle(key: str, infos: Mapping[str, TensorInfo]) -> bytes:
    """The pickle of {key: {name: tensor}}, in protocol 2."""
    tensors = b"".join(_text(name) + _tensor(str(n), info) for n, (name, info) in enumerate(infos.items()))
    inner = b"}(" + tensors + b"u"
    return b"\x80\x02}(" + _text(key) + inner + b"u."


def _tensor(storage: str, info: TensorInfo) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""
    count = int(np.prod(info.shape, dtype=np.int64))
    strides = [int(np.prod(info.shape[axis + 1 :], dtype=np.int64)) for axis in range(len(info.shape))]
    typed = b"ctorch\n" + _STORAGE[info.dtype].encode() + b"\n"
    persistent = b"(" + _text("storage") + typed + _text(storage) + _text("cpu") + _whole(count) + b"tQ"
    arguments = persistent + _whole(0) + _tuple(info.shape) + _tuple(strides) + b"\x89ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _whole(value: int) -> bytes:
    """An integer as BININT if it fits, else LONG1."""
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(8, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(values: tuple[int, ...] | list[int]) -> bytes:
    return b"(" + b"".join(map(_whole, values)) + b"t"
