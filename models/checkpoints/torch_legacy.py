"""torch's files from before 1.6, and of `_use_new_zipfile_serialization=False`: pickles in a row, then storages."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monarchrt.models.checkpoints.plain_pickle import read_pickle

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # what such a file begins with, a pickle of torch's magic number
PROTOCOL = 1001


class LegacyFile:
    """Its object, and where the bytes of its storages are.

    Attributes:
        content: The object.
        places: Of each storage by name, where its bytes begin in the file, and how many there are.

    Args:
        path: A file that begins with `MAGIC`.
        build: As `read_pickle`.
        storage: As `read_pickle`; called with what a storage of a newer file has, without views.
        itemsize: Bytes of a number of each storage that `storage` has made, by name.
        most: Bytes of pickles that are read at most.

    Raises:
        UnsafePickleError: As `read_pickle`.
        ValueError: If it is damaged, of another protocol, or of a big-endian machine.
    """

    def __init__(
        self, path: Path, *, build: dict[tuple[str, str], Any], storage: Callable[..., Any],
        itemsize: Callable[[Any], int], most: int,
    ):  # fmt: skip
        self.path, sizes = path, {}

        def named(pid: Any) -> Any:
            if not isinstance(pid, tuple) or len(pid) != 6 or pid[5] is not None:
                raise ValueError("a storage in it is a view of another, or has no size")
            made = storage(pid[:5])
            if sizes.setdefault(pid[2], itemsize(made)) != itemsize(made):
                raise ValueError("a storage in it is of two dtypes")
            return made

        with path.open("rb") as file:
            data = io.BytesIO(file.read(most))
            total = file.seek(0, io.SEEK_END)

            def following() -> Any:
                return read_pickle(data, build=build, storage=named)

            following()  # the magic number
            if (protocol := following()) != PROTOCOL:
                raise ValueError(f"it is of protocol {protocol!r}, and {PROTOCOL} is known")
            system = following()
            if not isinstance(system, dict) or system.get("little_endian") is not True:
                raise ValueError("it was written on a big-endian machine, which is not supported")
            self.content, keys = following(), following()
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != {*sizes}:
                raise ValueError("its storages are not those that its tensors are of")
            self.places: dict[str, tuple[int, int]] = {}
            at = data.tell()
            for key in keys:
                file.seek(at)
                count = int.from_bytes(file.read(8), "little", signed=True)
                if count < 0 or at + 8 + count * sizes[key] > total:
                    raise ValueError("it is truncated")
                self.places[key] = (at + 8, count * sizes[key])
                at += 8 + count * sizes[key]

    def read(self, key: str) -> memoryview:
        """The bytes of a storage, freshly read."""
        at, count = self.places[key]
        data = bytearray(count)
        with self.path.open("rb") as file:
            file.seek(at)
            if file.readinto(data) != count:
                raise ValueError("it is truncated")
        return memoryview(data)
