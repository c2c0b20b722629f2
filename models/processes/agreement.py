"""Values that the processes of a run exchange through the key-value store of `jax.distributed`'s coordinator.

Every function also works in a run of one process, where it needs no coordinator.
"""

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

AHEAD = 2  # steps from a signal to the stop; each process waits for the previous step, so none is more than one ahead
SETTLES = 15.0  # seconds until a file must be visible on the other machines
_HOUR = 3600.0
_TOKEN = "shared"  # name of the file that tests whether a folder is shared
_PREFIX = "monarchrt/"


def client() -> Any:
    """The client of the coordinator's key-value store; None in a run of one process."""
    from jax._src import distributed  # JAX's own modules take it from there

    return distributed.global_state.client if jax.process_count() > 1 else None


def is_first_process() -> bool:
    """Whether this is process 0, which writes what must be written once: logs, samples, settings."""
    return jax.process_index() == 0


def get(key: str, *, seconds: float = _HOUR) -> str:
    """The value of a key; waits until a process has set it, a second at a time, so that signals are handled.

    Raises:
        TimeoutError: If no process sets it in time.
    """
    caller = client()
    for _ in range(max(1, round(seconds))):
        try:
            return caller.blocking_key_value_get(_PREFIX + key, 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
    raise TimeoutError(f"no process set {key} in {seconds:.0f} s")


def put(key: str, value: str, *, again: bool = False) -> None:
    """Sets the value of a key, for all processes.

    Args:
        key: The key.
        value: Its value.
        again: Whether the key may have a value already, which is replaced.

    Raises:
        jax.errors.JaxRuntimeError: If it has one, and `again` is False.
    """
    client().key_value_set(_PREFIX + key, value, allow_overwrite=again)


def get_all(prefix: str) -> dict[str, str]:
    """The values that are set now of all keys with a prefix, by the rest of the key."""
    entries = client().key_value_dir_get(_PREFIX + prefix)
    return {key.removeprefix(_PREFIX + prefix): value for key, value in entries}


def broadcast_value[T](name: str, value: Callable[[], T], *, seconds: float = _HOUR) -> T:
    """Computes a value in process 0 and returns it in all processes.

    Args:
        name: Names the value. All processes must call this equally often with the same name.
        value: Called in process 0 only; its result must be serializable as JSON.
        seconds: How long the other processes wait, at most.

    Returns:
        The value, as read from JSON in processes other than 0: tuples are lists.

    Raises:
        UserError: In all processes, if `value` raised one.
        TimeoutError: In the others, if process 0 has no value in time.

    Examples:
        >>> broadcast_value("devices", lambda: 3)
        3
    """
    if client() is None:
        return value()
    if not is_first_process():
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


def run_in_first(name: str, act: Callable[[], None], *, seconds: float = _HOUR) -> None:
    """Calls `act` in process 0 alone; all processes wait for it. Other arguments and errors as in `broadcast_value`.

    Examples:
        >>> run_in_first("clean", lambda: None)
    """
    broadcast_value(name, act, seconds=seconds)


def first_problem(name: str, wrong: str | None) -> str | None:
    """The problem of the first process that reports one, in all processes; waits for all of them.

    Args:
        name: Names the check. All processes must call this equally often with the same name.
        wrong: What is wrong in this process; None if nothing is.

    Returns:
        `wrong` of the lowest process that has a problem, after "process N: "; None if none has.

    Examples:
        >>> first_problem("restored", None) is None
        True
    """
    if client() is None:
        return wrong
    answers = _answers(name, wrong)
    return next((f"process {n}: {answer}" for n, answer in enumerate(answers) if answer is not None), None)


def wait_for_all(name: str) -> None:
    """Waits until all processes have called this equally often with the same name.

    Examples:
        >>> wait_for_all("compiled")
    """
    first_problem(name, None)


def smallest(name: str, value: int) -> int:
    """The smallest of the processes' values, in all processes; waits for all of them.

    Examples:
        >>> smallest("memory", 80)
        80
    """
    return value if client() is None else min(_answers(name, value))


def check_shared(folder: Path, *, option: str) -> None:
    """Checks that all processes see the same folder and may write to it.

    Process 0 creates a file in it, which the others look for, and removes it at the end. A folder with equal content
    on another file system does not pass.

    Args:
        folder: The folder.
        option: The command's option that names it, for errors.

    Raises:
        UserError: In all processes, if one of them does not see the file or may not write.
    """
    if client() is None:
        return
    with growing(folder / _TOKEN) if is_first_process() else contextlib.nullcontext(folder) as part:

        def write() -> list[str]:
            part.write_text(token := uuid.uuid4().hex)
            return [part.name, token]

        (name, token), wrong = broadcast_value(f"written/{folder.name}", write), None
        limit = time.monotonic() + SETTLES
        while _text(folder / name) != token:
            if time.monotonic() > limit:
                wrong = f"{option} {folder} is not that of process 0"
                break
            time.sleep(0.5)
        if wrong is None and not os.access(folder, os.W_OK):
            wrong = f"{option} {folder} may not be written to"
        difference = first_problem(f"shared/{folder.name}", wrong)
    if difference is not None:
        raise UserError(f"{difference}; give a --{option} on a file system that all machines share and may write to")


def check_seen[T](what: str, look: Callable[[], T], *, option: str, path: Path) -> None:
    """Checks that all processes find the same content in a shared folder, before they act on it.

    Args:
        what: The content, in the plural, for errors.
        look: Returns what this process finds, serializable as JSON.
        option: The command's option that names the folder, for errors.
        path: The folder.

    Raises:
        UserError: In all processes, if one of them still finds something else than process 0 after 15 seconds.
    """
    right, wrong = broadcast_value(f"seen/{what}", look), None
    limit = time.monotonic() + SETTLES
    while (own := look()) != right:
        if time.monotonic() > limit:
            wrong = (
                f"{option} {path} is not that of process 0: {what} are {own or 'none'} here and {right or 'none'} there"
            )
            break
        time.sleep(0.5)
    if (difference := first_problem(f"seen alike/{what}", wrong)) is not None:
        raise UserError(f"{difference}; give a --{option} on a file system that all machines share")


def _text(path: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8")
    return None


def _answers(name: str, value: Any) -> list[Any]:
    """The values of all processes, ordered by process."""
    question = _answer(name, json.dumps(value))
    return [json.loads(get(f"{question}/{process}")) for process in range(jax.process_count())]


def _answer(name: str, value: str) -> str:
    """Stores this process's value under a name; returns the name with the number of earlier calls, for reading it."""
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
    """Makes all processes stop after the same training step once one of them has received a signal."""

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None

    def due(self, step: int, signal: int | None) -> int | None:
        """The signal to stop for, if the run stops after this step.

        Args:
            step: The step just completed.
            signal: Number of the signal that this process received; None if it received none.

        Returns:
            The number of the signal that any process received; None to continue.

        Examples:
            >>> AgreedStop().due(3, 15)
            15
        """
        caller = client()
        if caller is None:
            return signal
        if self._last is None:
            if signal is not None:
                with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was first
                    put("stop/at", json.dumps([step + AHEAD, signal]))
            if (agreed := get_all("stop/").get("at")) is not None:
                self._last = tuple(json.loads(agreed))
        return self._last[1] if self._last is not None and step >= self._last[0] else None
