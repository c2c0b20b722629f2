"""What several processes read by themselves, compared before anything is computed with it."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from monarchrt.models.checkpoints.json_files import read_json
from monarchrt.models.errors import UserError
from monarchrt.models.processes.agreement import all_agree, from_first

_THREADS = 8
_WHOLE = 4 * 2**20  # bytes up to which a file is looked at as a whole
_BLOCK = 2**18  # bytes of each block that is looked at of a larger one
_BLOCKS = 5


def same(what: str, read: Callable[[], str]) -> None:
    """Looks whether what each process has is that of the first, by a digest of its own; one process has nobody to ask.

    Args:
        what: In the plural, for the message.
        read: Makes the digest.

    Raises:
        UserError: In all processes, if it is not, or a digest could not be made.
    """
    if jax.process_count() == 1:
        return
    own, wrong = "", None
    try:
        own = read()
    except (OSError, UserError) as reason:  # the others are told, they would wait for an answer
        wrong = str(reason)
    right = from_first(what, lambda: own)
    if wrong is None and own != right:
        wrong = f"its {what} are not those of process 0 ({own[:12]} and {right[:12]})"
    if (difference := all_agree(f"same {what}", wrong)) is not None:
        raise UserError(f"{difference}; give all processes the same {what}")


def listing(files: Iterable[Path], *, whole: int = _WHOLE, block: int = _BLOCK) -> str:
    """SHA-256 over the names of files and `samples` of them, with the same arguments.

    Raises:
        OSError: If a file cannot be read.
    """
    files, digest = list(files), hashlib.sha256()
    for path, sample in zip(files, samples(files, whole=whole, block=block), strict=True):
        digest.update(path.name.encode())
        digest.update(sample)
    return digest.hexdigest()


def weight_files(path: Path) -> list[Path]:
    """The files of tensors that a path is: one, those that an index lists with it, or all of a folder."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.suffix != ".json":
        return [path]
    shards = set(read_json(path)["weight_map"].values())
    return [path, *(path.parent / shard for shard in sorted(shards))]


def digest_of(*values: Any) -> str:
    """SHA-256 of what values are written as.

    Examples:
        >>> digest_of({"steps": 4}) == digest_of({"steps": 5})
        False
    """
    return hashlib.sha256(repr(values).encode()).hexdigest()


def samples(files: Iterable[Path], *, whole: int = _WHOLE, block: int = _BLOCK) -> list[bytes]:
    """A digest of each file that is quick however large the file is.

    It is of the whole content up to 4 MiB; of more, of the size and of five blocks of 256 KiB, the first and the last
    bytes among them, at even distances.

    Args:
        files: The files.
        whole: Bytes up to which a file is looked at as a whole.
        block: Bytes of each block of a larger one.

    Returns:
        Digests.

    Raises:
        OSError: If a file cannot be read.
    """

    def sample(path: Path) -> bytes:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.sha256(str(size).encode())
            if size <= whole:
                digest.update(file.read())
                return digest.digest()
            for number in range(_BLOCKS):
                file.seek((size - block) * number // (_BLOCKS - 1))
                digest.update(file.read(block))
        return digest.digest()

    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(sample, files))
