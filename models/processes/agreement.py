"""What processes say to each other, through the coordinator of `jax.distributed`; one process says it to itself."""

import contextlib
import itertools
import json
import os
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from monarchrt.models.errors import UserError
from monarchrt.models.files import growing

AHEAD = 2  # steps; no process is further than one ahead of another, as each waits for the numbers of the step before
SETTLES = 15.0  # seconds that a file may take to be seen on another machine
_HOUR = 3600.0
_TOKEN = "shared"  # name of a file that is made to look whether a folder is one
_PREFIX = "monarchrt/"


def client() -> Any:
    """What reaches the coordinator; None in a run of one process."""
    from jax._src import distributed  # JAX's own modules take it from there

    return distributed.global_state.client if jax.process_count() > 1 else None


def first() -> bool:
    """Whether this process writes what is written once: logs, samples, settings."""
    return jax.process_index() == 0


def get(key: str, *, seconds: float = _HOUR) -> str:
    """What a process says under a key, once it does; a signal does not wait for it.

    Raises:
        TimeoutError: If it does not in time.
    """
    caller = client()
    for _ in range(max(1, round(seconds))):
        try:
            return caller.blocking_key_value_get(_PREFIX + key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    raise TimeoutError(f"no process said {key} in {seconds:.0f} s")


def put(key: str, value: str, *, again: bool = False) -> None:
    """Says something under a key; `again`: it may have been said before."""
    client().key_value_set(_PREFIX + key, value, allow_overwrite=again)


def said(prefix: str) -> dict[str, str]:
    """What has been said under keys that begin so, by the rest of the key."""
    entries = client().key_value_dir_get(_PREFIX + prefix)
    return {key.removeprefix(_PREFIX + prefix): value for key, value in entries}


def from_first[T](name: str, value: Callable[[], T], *, seconds: float = _HOUR) -> T:
    """What the first process finds, in all of them; a UserError of it is raised in all of them.

    Args:
        name: Of the question, which all processes ask equally often.
        value: Called in the first process; returns what JSON can hold.
        seconds: How long the others wait for it, at most.

    Examples:
        >>> from_first("devices", lambda: 3)
        3
    """
    if client() is None:
        return value()
    if not first():
        error, answered = json.loads(get(f"{_answer(name, '')}/0", seconds=seconds))
        if error is not None:
            raise UserError(error)
        return answered
    try:
        answered = value()
    except UserError as wrong:
        _answer(name, json.dumps([str(wrong), None]))
        raise
    _answer(name, json.dumps([None, answered]))
    return answered


def by_first(name: str, act: Callable[[], None], *, seconds: float = _HOUR) -> None:
    """Does in the first process what only one may do, before any goes on. Arguments and errors are as in `from_first`.

    Examples:
        >>> by_first("clean", lambda: None)
    """
    from_first(name, act, seconds=seconds)


def all_agree(name: str, wrong: str | None) -> str | None:
    """What is wrong in any of the processes, in the first of them that has something; waits for all.

    Args:
        name: Of the question, which all processes ask equally often.
        wrong: What is wrong in this one; None: nothing.

    Examples:
        >>> all_agree("restored", None) is None
        True
    """
    if client() is None:
        return wrong
    answers = _answers(name, wrong)
    return next((f"process {n}: {answer}" for n, answer in enumerate(answers) if answer is not None), None)


def least(name: str, value: int) -> int:
    """The smallest of a number that each process has; waits for all.

    Examples:
        >>> least("memory", 80)
        80
    """
    return value if client() is None else min(_answers(name, value))


def check_shared(folder: Path, *, option: str) -> None:
    """Checks that all processes see one folder, and may write there: the first makes a file in it, and removes it.

    Args:
        folder: The folder; another one of the same content is not it.
        option: That names it.

    Raises:
        UserError: In all of them, if one sees another folder, as its machine does not share the file system, or one
            that it may only read.
    """
    if client() is None:
        return
    with growing(folder / _TOKEN) if first() else contextlib.nullcontext(folder) as part:

        def write() -> list[str]:
            part.write_text(token := uuid.uuid4().hex)
            return [part.name, token]

        (name, token), wrong = from_first(f"written/{folder.name}", write), None
        limit = time.monotonic() + SETTLES
        while _text(folder / name) != token:
            if time.monotonic() > limit:
                wrong = f"{option} {folder} is not that of process 0"
                break
            time.sleep(0.5)
        if wrong is None and not os.access(folder, os.W_OK):
            wrong = f"{option} {folder} may not be written to"
        difference = all_agree(f"shared/{folder.name}", wrong)
    if difference is not None:
        raise UserError(f"{difference}; give a --{option} on a file system that all machines share and may write to")


def check_seen[T](what: str, look: Callable[[], T], *, option: str, path: Path) -> None:
    """Checks that all processes find the same in a folder that all are to share, before they go by it.

    Args:
        what: Of it is looked at, for the message.
        look: Says what this process finds, as JSON.
        option: That names the folder.
        path: The folder.

    Raises:
        UserError: In all of them, if one does not, also after some seconds.
    """
    right, wrong = from_first(f"seen/{what}", look), None
    limit = time.monotonic() + SETTLES
    while (own := look()) != right:
        if time.monotonic() > limit:
            wrong = (
                f"{option} {path} is not that of process 0: {what} are {own or 'none'} here and {right or 'none'} there"
            )
            break
        time.sleep(0.5)
    if (difference := all_agree(f"seen alike/{what}", wrong)) is not None:
        raise UserError(f"{difference}; give a --{option} on a file system that all machines share")


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8")
    return None


def _answers(name: str, value: Any) -> list[Any]:
    """What all processes answer to a question, in their order."""
    question = _answer(name, json.dumps(value))
    return [json.loads(get(f"{question}/{process}")) for process in range(jax.process_count())]


def _answer(name: str, value: str) -> str:
    """Says something in answer to a question; returns the question, numbered by how often this process answered."""
    for count in itertools.count():
        try:
            put(f"{name}/{count}/{jax.process_index()}", value)
        except jax.errors.JaxRuntimeError as error:
            if "ALREADY_EXISTS" not in str(error):
                raise
        else:
            return f"{name}/{count}"
    return name


class AgreedStop:
    """Makes all processes stop after the same step when one of them is asked to."""

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None

    def due(self, step: int, signal: int | None) -> int | None:
        """The signal, once it is time to stop for it.

        Args:
            step: The step that is done.
            signal: What this process was sent; None: nothing.

        Examples:
            >>> AgreedStop().due(3, 15)
            15
        """
        caller = client()
        if caller is None:
            return signal
        if self._last is None:
            if signal is not None:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was quicker
                    put("stop/at", json.dumps([step + AHEAD, signal]))
            if (agreed := said("stop/").get("at")) is not None:
                self._last = tuple(json.loads(agreed))
        return self._last[1] if self._last is not None and step >= self._last[0] else None
