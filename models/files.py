"""Names of files: those that grow before they get their own, and those that nobody meant to be there."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from monarchrt.models.errors import UserError, report_full_disk

_PART = re.compile(r"(?P<name>.+)\.(?P<process>[1-9]\d{0,8})\.part", re.DOTALL)
_PARTIAL = re.compile(r"(?P<name>.+)\.partial-(?P<process>[1-9]\d{0,8})", re.DOTALL)
# of systems and programs; compared in lower case
_LITTER_NAMES = (
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
    "icon\r",
    "__macosx",
    "$recycle.bin",
    "@eadir",
    "lost+found",
)
_LITTER_ENDINGS = (
    ".part",
    ".partial",
    ".crdownload",
    ".download",
    ".opdownload",
    ".aria2",
    ".ytdl",
    ".tmp",
    "~",
    ":zone.identifier",
)


def unfinished(path: Path) -> Path:
    """Where this process writes a file until it is complete; what a killed process left behind ends in .part, too.

    Examples:
        >>> unfinished(Path("cat.mp4")).name == f"cat.mp4.{os.getpid()}.part"
        True
    """
    # with the process's number: two that write the same file would spoil each other's
    return path.with_name(f"{path.name}.{os.getpid()}.part")


@contextlib.contextmanager
def growing(path: Path) -> Iterator[Path]:
    """Makes `unfinished(path)` and keeps it locked inside the block, so that nobody takes it for an abandoned one.

    What is left of it at the end is removed; move it to its name before. Parts of the same file that killed processes
    left behind are removed first.

    Args:
        path: The file to be; its folder must exist.

    Yields:
        The file to write to.

    Raises:
        OSError: If it cannot be made.
    """
    remove_abandoned(path.parent, name=path.name)
    part = unfinished(path)
    descriptor = os.open(part, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield part
    finally:
        os.close(descriptor)
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, *, name: str) -> Iterator[None]:
    """Keeps a folder to one process inside the block; the lock ends with the process, too.

    Args:
        folder: An existing folder.
        name: What the error calls it.

    Raises:
        UserError: If another process has it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{name} {folder} is being written to by another process; wait for it, or give another --{name}"
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def remove_abandoned(folder: Path, *, name: str | None = None) -> list[Path]:
    """Removes what a killed process left behind: files that grew, `NAME.PROCESS.part`, folders `NAME.partial-PROCESS`.

    One is abandoned if no process of this machine has its number and nobody holds a lock on it: who writes one holds
    it, also from another machine or container. A number that another process has by now keeps the file, and so does
    a file system without locks.

    Args:
        folder: Where to look; one that is not there has none.
        name: The name of the finished file or folder; None looks at all.

    Returns:
        What was removed.
    """
    removed = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            match = _PART.fullmatch(path.name) or _PARTIAL.fullmatch(path.name)
            if match is None or name not in (None, match["name"]) or path.is_symlink():
                continue
            if path.is_dir() != (match.re is _PARTIAL) or not (path.is_dir() or path.is_file()):
                continue
            if not _runs(int(match["process"])) and _remove_unlocked(path):
                removed.append(path)
    return removed


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _remove_unlocked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def is_litter(path: Path) -> bool:
    """Whether a file is none that a person put there: hidden, of the system, or an unfinished download.

    macOS writes `._cat.mp4` beside cat.mp4 on disks that are not its own, and .DS_Store; Windows writes Thumbs.db and
    desktop.ini, its editors ~$notes; browsers write cat.mp4.crdownload and cat.mp4.part.

    Examples:
        >>> [is_litter(Path(name)) for name in ("clips/._cat.mp4", "cat.mp4.part", "Thumbs.db", "cat.mp4")]
        [True, True, True, False]
    """
    name = path.name.lower()
    own = _PARTIAL.fullmatch(name) is not None
    return own or name.startswith((".", "~$")) or name in _LITTER_NAMES or name.endswith(_LITTER_ENDINGS)


def listed(folder: Path) -> list[Path]:
    """What is in a folder, by name, without litter.

    Args:
        folder: An existing folder.

    Returns:
        Files and folders.

    Raises:
        OSError: If it cannot be listed.
    """
    return sorted(path for path in folder.iterdir() if not is_litter(path))


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill, which takes its name only when the block ends well and is removed otherwise.

    What killed processes left of the same folder is removed first; this one is locked while it is filled, so that
    nobody takes it for abandoned.

    Raises:
        ValueError: If `path` is a file or a folder with something in it, or no folder can be made there.
        DiskFullError: If there was no room for what the block writes.
    """
    path = Path(path).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"path={str(path)!r} exists and is not an empty folder; name a new one.")
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    remove_abandoned(path.parent, name=path.name)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        descriptor = os.open(partial, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"path={str(path)!r} cannot be made: {error.strerror or error}.") from error
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with report_full_disk(path, then="free some space and try again"):
            yield partial
            if path.exists():
                path.rmdir()
            partial.rename(path)
    finally:
        os.close(descriptor)
        shutil.rmtree(partial, ignore_errors=True)
