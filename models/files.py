"""Unfinished and temporary files and folders, and files of the operating system that should be ignored."""

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from monarchrt.models.errors import UserError, report_full_disk

_PART = re.compile(r"(?P<name>.+)\.(?P<process>[1-9]\d{0,8})\.part", re.DOTALL)
_PARTIAL = re.compile(r"(?P<name>.+)\.partial-(?P<process>[1-9]\d{0,8})", re.DOTALL)
_TEMPORARY = re.compile(r"monarchrt-\w{8}\.(?P<process>[1-9]\d{0,8})")
_MARKS = {
    b"\xef\xbb\xbf": "utf-8",
    b"\xff\xfe\0\0": "utf-32-le",  # begins as UTF-16 does
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
}
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
    """The path at which this process writes a file until it is complete, `NAME.PROCESS.part`.

    Examples:
        >>> unfinished(Path("cat.mp4")).name == f"cat.mp4.{os.getpid()}.part"
        True
    """
    # includes the process id, so that two processes can write the same file
    return path.with_name(f"{path.name}.{os.getpid()}.part")


@contextlib.contextmanager
def growing(path: Path) -> Iterator[Path]:
    """Creates `unfinished(path)`, locked inside the block so that it is not taken for an abandoned file.

    Rename it before the block ends: it is removed then. Parts of the same file that killed processes left behind are
    removed first.

    Args:
        path: The final path; its folder must exist.

    Yields:
        The path to write to.

    Raises:
        OSError: If it cannot be created.
    """
    remove_abandoned(path.parent, name=path.name)
    part = unfinished(path)
    descriptor = os.open(part, os.O_CREAT | os.O_RDWR, 0o666)
    try:
        _lock(descriptor)
        yield part
    finally:
        os.close(descriptor)
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, *, name: str) -> Iterator[None]:
    """Locks a folder for this process inside the block; the lock is also released if the process dies.

    Args:
        folder: An existing folder.
        name: Name of the option that gives it, for the error.

    Raises:
        UserError: If another process holds the lock.
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
    """Removes the files `NAME.PROCESS.part` and folders `NAME.partial-PROCESS` that killed processes left behind.

    They are abandoned if no process of this machine has that id and nobody holds a lock on them; their writers do, also
    from another machine or container. They are kept if the id has been reused or the file system has no locks.

    Args:
        folder: The folder to search; it need not exist.
        name: Name of the finished file or folder; None for all names.

    Returns:
        The removed paths.
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


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder in the system's directory for temporary files, removed at the end of the block.

    Folders that killed processes of this user left behind are removed first, under the conditions of
    `remove_abandoned`: the process no longer runs, and nobody holds the lock.

    Yields:
        The folder.

    Raises:
        OSError: If it cannot be created.
    """
    with contextlib.suppress(OSError):
        for path in Path(tempfile.gettempdir()).glob("monarchrt-*"):
            match, found = _TEMPORARY.fullmatch(path.name), path.lstat()
            if match is None or not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
                continue
            if not _runs(int(match["process"])):
                _remove_unlocked(path)
    folder = Path(tempfile.mkdtemp(prefix="monarchrt-", suffix=f".{os.getpid()}"))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        yield folder
    finally:
        os.close(descriptor)
        shutil.rmtree(folder, ignore_errors=True)


def _lock(descriptor: int) -> None:
    """Locks an open file or folder until it is closed; does nothing on a file system without locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


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


def decoded(content: bytes, *, name: str) -> str:
    """Decodes a text file: UTF-8, or UTF-16 or UTF-32 with a byte order mark, as Windows editors write them.

    Examples:
        >>> decoded("a cat".encode("utf-16"), name="caption cat.txt")
        'a cat'
        >>> decoded("a café".encode("cp1252"), name="caption cat.txt")
        Traceback (most recent call last):
        ...
        monarchrt.models.errors.UserError: caption cat.txt is not UTF-8 (byte 6 is 0xe9), probably cp1252; save it as \
UTF-8, for example with iconv -f CP1252 -t UTF-8

    Args:
        content: Content of the file.
        name: Description of the file, for errors.

    Returns:
        The text, without a byte order mark.

    Raises:
        UserError: If it is in another encoding; the message names the likely one.
    """
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    wrong = "ends within a character"
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        if encoding == "utf-8":
            wrong = f"byte {error.start + 1} is 0x{content[error.start]:02x}"
    else:
        if "\0" not in text:
            return text
        wrong = "it has bytes of 0"
    likely = _likely_encoding(content) if encoding == "utf-8" else ()
    raise UserError(
        f"{name} is not {encoding.upper()} ({wrong})"
        + (f", probably {' or '.join(likely)}" if likely else "")
        + "; save it as UTF-8"
        + (f", for example with iconv -f {likely[0].upper().replace('16-', '16')} -t UTF-8" if likely else "")
    )


def _likely_encoding(content: bytes) -> tuple[str, ...]:
    """Likely encodings of text that is not UTF-8 and has no byte order mark; empty if none is likely."""
    even, odd = content[::2].count(0), content[1::2].count(0)
    if 0 in content:
        utf16 = "utf-16-be" if even > odd else "utf-16-le"
        return (utf16,) if min(even, odd) == 0 and len(content) % 2 == 0 and _is_text(content, utf16) else ()
    beyond = sum(byte >= 0x80 for byte in content)
    likely = ("cp1252",) if 4 * beyond <= len(content) else ("gb18030", "shift_jis", "euc_kr", "cp1251")
    return tuple(encoding for encoding in likely if _is_text(content, encoding))


def _is_text(content: bytes, encoding: str) -> bool:
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter in "\n\r\t" for letter in text)


def is_litter(path: Path) -> bool:
    """Whether a file was not put there by a person: a hidden file, one of the system, or an unfinished download.

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
    """The contents of a folder sorted by name, without litter (`is_litter`).

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
    """A folder to write to, which gets its final name if the block succeeds and is removed otherwise.

    What killed processes left of the same folder is removed first. The folder is locked inside the block so that it is
    not taken for abandoned.

    Args:
        path: The final path; it must not exist, or be an empty folder.

    Yields:
        The folder to write to.

    Raises:
        ValueError: If `path` is a file or a folder that is not empty, or cannot be created.
        DiskFullError: If the disk is full.
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
        _lock(descriptor)
        with report_full_disk(path, then="free some space and try again"):
            yield partial
            if path.exists():
                path.rmdir()
            partial.rename(path)
    finally:
        os.close(descriptor)
        shutil.rmtree(partial, ignore_errors=True)
