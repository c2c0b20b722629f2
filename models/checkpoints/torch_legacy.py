"""Files of torch before 1.6, or with `_use_new_zipfile_serialization=False`: several pickles, then storages."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from monarchrt.models.checkpoints.plain_pickle import read_pickle

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first bytes of such a file, a pickle of torch's magic number
PROTOCOL = 1001


class LegacyFile:
    """The object in a legacy file, and the positions of its storages.

    Attributes:
        content: The object.
        places: Position in the file and number of bytes of each storage, by name.

    Args:
        path: A file that begins with `MAGIC`.
        build: As in `read_pickle`.
        storage: As in `read_pickle`; called with the persistent id in the form of newer files, without views.
        itemsize: Returns the bytes of a number of a storage that `storage` created.
        most: Limit on the bytes of pickles.

    Raises:
        UnsafePickleError: As in `read_pickle`.
        ValueError: If it is damaged, has another protocol, or was written on a big-endian machine.
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
                raise ValueError("a storage in it has two dtypes")
            return made

        with path.open("rb") as file:
            data = io.BytesIO(file.read(most))
            total = file.seek(0, io.SEEK_END)

            def following() -> Any:
                return read_pickle(data, build=build, storage=named)

            following()  # the magic number
            if (protocol := following()) != PROTOCOL:
                raise ValueError(f"it has protocol {protocol!r}; only {PROTOCOL} is supported")
            system = following()
            if not isinstance(system, dict) or system.get("little_endian") is not True:
                raise ValueError("it was written on a big-endian machine, which is not supported")
            self.content, keys = following(), following()
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or {*keys} != {*sizes}:
                raise ValueError("its storages do not match its tensors")
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
        """Reads the bytes of a storage."""
        at, count = self.places[key]
        data = bytearray(count)
        with self.path.open("rb") as file:
            file.seek(at)
            if file.readinto(data) != count:
                raise ValueError("it is truncated")
        return memoryview(data)
