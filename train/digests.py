"""SHA-256 digests of files, stored between starts of a run so that only changed files are read again."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SETTLED = 2 * 10**9  # nanoseconds after which another change of a file surely changes its timestamps
_THREADS = 8


class FileDigests:
    """Digests by file name, valid while a file's size and timestamps are unchanged.

    The timestamps include that of the inode's last change, which, unlike that of the content, programs cannot set.

    Args:
        path: JSON file that stores the digests; None to keep them in memory only. An unreadable file counts as empty.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._known: dict[str, list[object]] = {}
        if path is not None:
            with contextlib.suppress(OSError, ValueError, RecursionError):
                known = json.loads(path.read_text(encoding="utf-8"))
                self._known = known if isinstance(known, dict) else {}

    def of(self, files: Iterable[Path], *, check: Callable[[Path], None]) -> list[bytes]:
        """The SHA-256 digest of each file's content, in order.

        Args:
            files: Files with distinct names.
            check: Called with each file that has to be read; no digest is stored if it raises.

        Returns:
            The digests.
        """

        def digest(path: Path) -> bytes:
            begun, status = time.time_ns(), path.stat()
            state = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            match self._known.get(path.name):
                case [*same, str(stored)] if same == state and len(stored) == 64:
                    return bytes.fromhex(stored)
            with path.open("rb") as file:
                made = hashlib.file_digest(file, "sha256")
            check(path)
            if begun - status.st_ctime_ns > _SETTLED:
                self._known[path.name] = [*state, made.hexdigest()]
            return made.digest()

        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(digest, files))

    def keep(self) -> None:
        """Writes the digests to the file, atomically; if that fails, without an error, since they only save time."""
        if self._path is None:
            return
        unfinished = self._path.with_name(self._path.name + ".part")
        try:
            unfinished.write_text(json.dumps(self._known), encoding="utf-8")
            os.replace(unfinished, self._path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
