"""Compares what each of several processes has read, by digests, before anything is computed with it."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from monarchrt.models.checkpoints.json_files import read_json
from monarchrt.models.errors import UserError
from monarchrt.models.processes.agreement import broadcast_value, first_problem

_THREADS = 8
_WHOLE = 4 * 2**20  # bytes up to which a whole file is hashed
_BLOCK = 2**18  # bytes of each block that is hashed of a larger file
_BLOCKS = 5


def check_same(what: str, read: Callable[[], str]) -> None:
    """Checks that all processes have the digest of process 0; does nothing in a run of one process.

    Args:
        what: What is compared, in the plural, for errors.
        read: Returns this process's digest; not called in a run of one process.

    Raises:
        UserError: In all processes, if a digest differs or `read` raised UserError or OSError.
    """
    if jax.process_count() == 1:
        return
    own, wrong = "", None
    try:
        own = read()
    except (OSError, UserError) as reason:  # reported below, as the other processes wait for an answer
        wrong = str(reason)
    right = broadcast_value(what, lambda: own)
    if wrong is None and own != right:
        wrong = f"its {what} are not those of process 0 ({own[:12]} and {right[:12]})"
    if (difference := first_problem(f"same {what}", wrong)) is not None:
        raise UserError(f"{difference}; give all processes the same {what}")


def listing(files: Iterable[Path], *, whole: int = _WHOLE, block: int = _BLOCK) -> str:
    """SHA-256 of the names of files and of `samples` of their contents; arguments as in `samples`.

    Returns:
        The digest in hexadecimal.

    Raises:
        OSError: If a file cannot be read.
    """
    files, digest = list(files), hashlib.sha256()
    for path, sample in zip(files, samples(files, whole=whole, block=block), strict=True):
        digest.update(path.name.encode())
        digest.update(sample)
    return digest.hexdigest()


def weight_files(path: Path) -> list[Path]:
    """The files of a checkpoint: the file itself, an index (.json) and the shards that it lists, or all in a folder."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if path.suffix != ".json":
        return [path]
    shards = set(read_json(path)["weight_map"].values())
    return [path, *(path.parent / shard for shard in sorted(shards))]


def digest_of(*values: Any) -> str:
    """SHA-256, in hexadecimal, of the `repr` of values.

    Examples:
        >>> digest_of({"steps": 4}) == digest_of({"steps": 5})
        False
    """
    return hashlib.sha256(repr(values).encode()).hexdigest()


def samples(files: Iterable[Path], *, whole: int = _WHOLE, block: int = _BLOCK) -> list[bytes]:
    """SHA-256 of a sample of each file, which takes no longer for large files.

    A file of up to `whole` bytes is hashed completely. Of a larger one, its size and five blocks are hashed, evenly
    spaced from its first to its last byte.

    Args:
        files: The files.
        whole: Bytes up to which a file is hashed completely; 4 MiB by default.
        block: Bytes of each block of a larger file; 256 KiB by default.

    Returns:
        A digest of 32 bytes for each file.

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
