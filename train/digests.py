"""SHA-256 of files, kept between the starts of a run so that only what has changed is read again."""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SETTLED = 2 * 10**9  # nanoseconds; a file may change again within the clock of its file system
_THREADS = 8


class FileDigests:
    """Digests by name, good for as long as a file's size and times are the same.

    The time of the last change of the inode is among them: unlike that of the content, no program sets it.

    Args:
        path: JSON file to keep them in; None keeps them in memory. One that cannot be read counts as empty.
    """

    def __init__(self, path: Path | None = None):
        self._path = path
        self._known: dict[str, list[object]] = {}
        if path is not None:
            with contextlib.suppress(OSError, ValueError, RecursionError):
                known = json.loads(path.read_text(encoding="utf-8"))
                self._known = known if isinstance(known, dict) else {}

    def of(self, files: Iterable[Path], *, check: Callable[[Path], None]) -> list[bytes]:
        """SHA-256 of the content of each file, in order.

        Args:
            files: Files of different names.
            check: Called with each file that has to be read; one that it refuses is not kept.

        Returns:
            Digests.
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
        """Writes them to the file, at once or not at all; without room it is left out, as it only saves time."""
        if self._path is None:
            return
        unfinished = self._path.with_name(self._path.name + ".part")
        try:
            unfinished.write_text(json.dumps(self._known), encoding="utf-8")
            os.replace(unfinished, self._path)
        except OSError:
            with contextlib.suppress(OSError):
                unfinished.unlink(missing_ok=True)
