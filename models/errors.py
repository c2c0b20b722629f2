"""Errors that the user can correct, as opposed to bugs.

The command line prints a `UserError` as one line, `error: ...`, and exits with code 2; other exceptions are bugs and
keep their traceback.
"""

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path


class UserError(ValueError):
    """A request that cannot be carried out; the message names the invalid value and a valid one.

    Examples:
        >>> raise UserError("frames is 0; it must be at least 1")
        Traceback (most recent call last):
        ...
        monarchrt.models.errors.UserError: frames is 0; it must be at least 1
    """


def require(condition: bool, message: str) -> None:
    """Raises UserError with the message unless the condition holds.

    Examples:
        >>> require(3 > 0, "frames is 3; it must be positive")
    """
    if not condition:
        raise UserError(message)


def printable(text: str, limit: int = 200) -> str:
    """Makes text from a file safe to print: on one line, without control characters, of limited length.

    Examples:
        >>> printable("blocks.0\\x1b[2J\\n")
        'blocks.0\\\\x1b[2J\\\\n'

    Args:
        text: Any string, including the lone surrogates in file names that are not UTF-8.
        limit: Largest number of characters of `text` to keep.

    Returns:
        The text, with unprintable characters as Python escapes.
    """
    kept = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in kept)


class NonFiniteError(UserError):
    """The loss, the gradient or the parameters became NaN or infinite.

    Attributes:
        finding: The message without the advice.
        step: The optimizer step, counted from 1, at which it happened.
    """

    def __init__(self, finding: str, *, advice: str, step: int):
        super().__init__(f"{finding}; {advice}")
        self.finding = finding
        self.step = step


class DiskFullError(UserError):
    """A file could not be written because the disk, a quota or a file size limit was reached."""


_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file size limit was reached",
}
_FULL_TEXTS = {
    "no space left on device": "the disk is full",
    "disk quota exceeded": "the disk quota is used up",
    "file too large": "a file size limit was reached",
}


def disk_full_reason(error: BaseException) -> str | None:
    """Recognises errors that were caused by a full disk, a quota or a file size limit.

    Storage libraries wrap the system's error in exceptions of their own, so the text of the exception and of its causes
    is searched as well as `OSError.errno`.

    Args:
        error: Any exception.

    Returns:
        The reason in words, or None if the error means something else.

    Examples:
        >>> disk_full_reason(OSError(28, "No space left on device"))
        'the disk is full'
        >>> disk_full_reason(ValueError("unrelated")) is None
        True
    """
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return _FULL[seen.errno]
        text = str(seen).lower()
        for needle, reason in _FULL_TEXTS.items():
            if needle in text:
                return reason
        seen = seen.__cause__ or seen.__context__
    return None


@contextlib.contextmanager
def report_full_disk(
    path: Path | str, *, kept: str | Callable[[], str] = "", then: str = "free some space and use --resume"
) -> Iterator[None]:
    """Turns a full disk inside the block into a `DiskFullError` that names the path and what is kept.

    Args:
        path: The path that is written.
        kept: Text on what was saved, such as "the checkpoint of step 20 is kept", or a function that returns it.
        then: Advice to the user.

    Raises:
        DiskFullError: If writing failed because the disk, a quota or a file size limit was reached.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        reason = disk_full_reason(error)
        if reason is None:
            raise
        safe = kept if isinstance(kept, str) else kept()
        tail = f"; {safe}" if safe else ""
        raise DiskFullError(f"cannot write {path}: {reason}{tail}; {then}") from error


@contextlib.contextmanager
def user_input() -> Iterator[None]:
    """Turns a `ValueError` or `NotImplementedError` from checking the user's settings into a `UserError`.

    Meant for the stage before any compute: building the model and tracing the first step, where the attention
    and the model check shapes, tiles and names.

    Raises:
        UserError: With the same message.
    """
    try:
        yield
    except UserError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise UserError(" ".join(str(error).split())) from error
