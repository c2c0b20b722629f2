"""A run on several processes, each with its own devices: how they find each other, agree, and notice that one is gone.

`jax.distributed` joins them; what they say to each other here goes through its coordinator, process 0.
"""

import contextlib
import importlib.metadata
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from monarchrt.models.errors import UserError
from monarchrt.train.run_settings import RunConfig

JOINING = 120  # seconds in which all processes must have begun
BEAT = 1.0  # seconds between two signs of life
PATIENCE = 20.0  # seconds without one
AHEAD = 4  # steps that processes may be apart when one is asked to stop
_DONE, _FAILED = "done", "failed"
# a process of a job of several: its number of processes
_CLUSTERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def wanted(run: RunConfig, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a run is one of several processes: it says so, or a job manager that started it does.

    Examples:
        >>> wanted(RunConfig(), {"SLURM_STEP_NUM_TASKS": "4"}), wanted(RunConfig(), {"SLURM_STEP_NUM_TASKS": "1"})
        (True, False)
    """
    if run.coordinator is not None:
        return True
    return any(environment.get(name, "").isdigit() and int(environment[name]) > 1 for name in _CLUSTERS)


@contextlib.contextmanager
def joined(run: RunConfig, *, identity: Mapping[str, Any] = {}, seconds: int = JOINING) -> Iterator[None]:
    """Joins the other processes of a run, if there are any, before JAX looks for its devices.

    While it is active, a process that dies ends the others, in `PATIENCE` seconds and with one line.

    Args:
        run: Its `coordinator`, `processes` and `process`; where they are None, a job manager says it.
        identity: What must be the same in all processes.
        seconds: To wait for the others.

    Raises:
        UserError: If they cannot be found in time, or differ in settings or versions.
    """
    if not wanted(run):
        yield
        return
    import jax

    where = run.coordinator or "the one that the job manager names"
    try:
        jax.distributed.initialize(
            run.coordinator,
            run.processes,
            run.process,
            initialization_timeout=seconds,
            heartbeat_timeout_seconds=int(10 * PATIENCE),  # the watch below is quicker, and says what happened
            shutdown_timeout_seconds=int(PATIENCE),
        )
    except Exception as error:  # of the RPC library
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"coordinator is {where}, and the processes did not find each other there in {seconds} s ({reason}); start "
            f"all of them, and give the address and a free port of process 0"
        ) from error
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), name="processes", daemon=True)
    try:
        _compare(identity, seconds)
        watch.start()
        yield
    except KeyboardInterrupt as stop:
        if getattr(stop, "step", None) is not None:  # all stop at the same step
            ended.set()
            watch.join()
            raise
        _leave(str(stop) or "stopped", getattr(stop, "code", 130))
    except UserError as error:
        _leave(f"error: {' '.join(str(error).split())}", 2)
    except Exception as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(PATIENCE + 4 * BEAT)  # most likely a process is gone: the watch says which, in time
        traceback.print_exc()
        _leave(f"error: {type(error).__name__}", 1)
    else:
        ended.set()
        watch.join()


def first() -> bool:
    """Whether this process writes what is written once: logs, samples, settings."""
    import jax

    return jax.process_index() == 0


def by_first(name: str, check: Callable[[], None]) -> None:
    """Calls `check` in the first process; its UserError is raised in all of them.

    Args:
        name: Of this check, once in a run.
        check: What only one process may do.
    """
    client, (process, count) = _client(), _numbers()
    if client is None or count == 1:
        return check()
    key = f"monarchrt/{name}"
    if process:
        if said := json.loads(client.blocking_key_value_get(key, 3_600_000)):
            raise UserError(said)
        return None
    said = None
    try:
        check()
    except UserError as error:
        said = str(error)
        raise
    finally:
        client.key_value_set(key, json.dumps(said))
    return None


class AgreedStop:
    """Makes all processes stop after the same step when one of them is asked to."""

    def __init__(self) -> None:
        self._client, self._last = _client(), None

    def due(self, step: int, signal: int | None) -> int | None:
        """The signal, once it is time to stop for it.

        Args:
            step: The step that is done.
            signal: What this process was sent; None: nothing.
        """
        if self._client is None:
            return signal
        if self._last is None:
            if signal is not None:
                with contextlib.suppress(Exception):  # another was quicker
                    self._client.key_value_set("monarchrt/stop", json.dumps([step + AHEAD, signal]))
            with contextlib.suppress(Exception):  # there is none
                self._last = json.loads(self._client.key_value_try_get("monarchrt/stop"))
        return self._last[1] if self._last is not None and step >= self._last[0] else None


def _client() -> Any:
    """What reaches the coordinator; None in a run of one process."""
    from jax._src import distributed  # JAX's own modules take it from there

    return distributed.global_state.client


def _numbers() -> tuple[int, int]:
    import jax

    return jax.process_index(), jax.process_count()


def _compare(identity: Mapping[str, Any], seconds: int) -> None:
    """Raises UserError unless all processes have the settings and the versions of the first."""
    client, (process, _) = _client(), _numbers()
    versions = {f"version of {name}": importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    own = json.loads(json.dumps({**versions, **identity}, default=str))
    if process == 0:
        client.key_value_set("monarchrt/identity", json.dumps(own))
        return
    right = json.loads(client.blocking_key_value_get("monarchrt/identity", seconds * 1000))
    for name in dict.fromkeys((*right, *own)):
        if right.get(name) != own.get(name):
            raise UserError(
                f"{name} is {own.get(name)} in process {process}, and {right.get(name)} in process 0; start all "
                f"processes with the same settings and versions"
            )


def _watch(ended: threading.Event) -> None:
    """Gives signs of life until the run has ended, and ends this process if another gives none."""
    client, (own, count) = _client(), _numbers()
    seen = dict.fromkeys((process for process in range(count) if process != own), "")
    since = dict.fromkeys(seen, time.monotonic())
    last, beat = time.monotonic(), 0
    while not (over := ended.wait(BEAT)):
        beat += 1
        now = time.monotonic()
        try:
            client.key_value_set(f"monarchrt/alive/{own}", str(beat), allow_overwrite=True)
            last = now
        except Exception:
            if now - last > PATIENCE:
                _end("process 0, the coordinator, cannot be reached")
            continue
        for process in seen:
            with contextlib.suppress(Exception):  # it has not begun
                said = client.key_value_try_get(f"monarchrt/alive/{process}")
                if said != seen[process] or said == _DONE:
                    seen[process], since[process] = said, now
                if said == _FAILED:
                    _end(f"process {process} of {count} has ended with an error")
            if now - since[process] > PATIENCE:
                _end(f"process {process} of {count} has given no sign of life for {PATIENCE:.0f} s")
    if over:
        with contextlib.suppress(Exception):
            client.key_value_set(f"monarchrt/alive/{own}", _DONE, allow_overwrite=True)


def _leave(line: str, code: int) -> None:
    """Ends this process without waiting for the others, as they may wait for it; they are told."""
    client, (own, count) = _client(), _numbers()
    print(line, file=sys.stderr, flush=True)
    with contextlib.suppress(Exception):
        client.key_value_set(f"monarchrt/alive/{own}", _FAILED, allow_overwrite=True)
        if own == 0 and count > 1:  # the coordinator goes last
            time.sleep(4 * BEAT)
    os._exit(code)


def _end(reason: str) -> None:
    """Ends this process at once: what waits for the other one cannot be told to stop."""
    print(f"error: {reason}; this one ends too, go on with --resume", file=sys.stderr, flush=True)
    os._exit(1)
