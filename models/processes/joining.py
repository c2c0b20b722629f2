"""Joins several processes, and makes one that dies, or fails, end the others."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from monarchrt.models.errors import UserError
from monarchrt.models.processes import service
from monarchrt.models.processes.identity import compilation, versions
from monarchrt.models.processes.place import Place

JOINING = 300.0  # seconds in which all processes must have begun
_SAY_AFTER = 10.0  # seconds of waiting


@contextlib.contextmanager
def joined(
    place: Place | None,
    *,
    identity: Mapping[str, Any] | None = None,
    advice: str = "",
    seconds: float = JOINING,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Iterator[None]:
    """Joins the other processes, if there are any, before JAX looks for its devices; a program does so once.

    While it is active, a process that dies, or fails, ends the others within a minute and with one line, and one that
    fails itself ends at once, as what waits for others cannot be stopped in another way.

    Args:
        place: From `find_place`; None: this process is alone.
        identity: What must be the same in all processes, besides versions.
        advice: Said in a process that another one has ended.
        seconds: To wait for the others.
        say: Takes lines for people.

    Raises:
        UserError: If they cannot be found in time, or differ.

    Examples:
        >>> with joined(None):
        ...     pass
    """
    if place is None:
        yield
        return
    import jax

    from monarchrt.models.processes.watch import Watch, leave

    whole = {**versions(), **compilation(), **(identity or {})}
    with _service(place, seconds):
        _join(place, whole, seconds, say)
        _connect(place, seconds)
        lock = threading.Lock()

        def end(line: str, code: int) -> None:
            with lock:  # one line, whoever comes first
                leave(f"error: {line}; this one ends too{advice and f', {advice}'}", code)

        watch = Watch(place.process, place.processes, end=end)
        watch.start()
        try:
            yield
        except BaseException as error:
            if getattr(error, "step", None) is not None and isinstance(error, KeyboardInterrupt):
                _part(watch)  # all have stopped at the same step
                jax.distributed.shutdown()
                raise
            if not isinstance(error, UserError | KeyboardInterrupt | SystemExit):
                _await_verdict(watch)  # most likely another process is gone: the watch says which
                traceback.print_exc()
            line, code = _words(error)
            with lock:
                watch.failed(line.removeprefix("error: "))
                leave(line, code)
        _part(watch)
        jax.distributed.shutdown()


def _part(watch: Any) -> None:
    """Waits until all have come to the end; one that dies on the way is still noticed."""
    from monarchrt.models.processes.agreement import all_agree

    all_agree("end", None)
    watch.stop()


def _await_verdict(watch: Any) -> None:
    from monarchrt.models.processes.watch import BEAT, PATIENCE

    time.sleep(5 * BEAT)
    if watch.suspects():
        time.sleep(PATIENCE + 5 * BEAT)  # it ends this process


def _words(error: BaseException) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    text = " ".join(str(error).split())
    match error:
        case UserError():
            return f"error: {text}", 2
        case KeyboardInterrupt():
            return text or "stopped", getattr(error, "code", 130)
        case SystemExit():
            return text, error.code if isinstance(error.code, int) else 1
        case OSError(filename=str(name)):
            return f"error: {name}: {error.strerror}", 2
    return f"error: {type(error).__name__}: {text}", 1


@contextlib.contextmanager
def _service(place: Place, seconds: float) -> Iterator[None]:
    """In process 0, the coordinator, which ends after it.

    Raises:
        UserError: If its port is taken.
    """
    if place.process:
        yield
        return
    wait = time.monotonic() + min(seconds, service.LATE + 2)  # what served a run that has just ended may be about to go
    while True:
        process = _serve(place, seconds)
        said = process.stdout.readline().decode().strip()  # type: ignore[union-attr]
        if said == "ready":
            break
        process.kill()
        if time.monotonic() > wait:
            raise UserError(
                f"coordinator is {place.coordinator}, and process 0 cannot listen at port {place.port} of its machine "
                f"({said or 'the coordinator did not start'}); give all processes another port"
            )
        time.sleep(0.5)
    try:
        yield
    finally:
        process.stdin.close()  # type: ignore[union-attr]


def _serve(place: Place, seconds: float) -> subprocess.Popen:
    server = Path(__file__).with_name("service.py")
    command = [sys.executable, "-P", str(server), str(place.port), str(place.processes), str(seconds)]
    # out of the group that a terminal sends Ctrl-C to
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _join(place: Place, identity: Mapping[str, Any], seconds: float, say: Callable[[str], None]) -> None:
    """Says who this is, and waits until all have come.

    Raises:
        UserError: If the coordinator does not answer in time, not all come, or they differ.
    """
    message = {"process": place.process, "processes": place.processes, "identity": dict(identity)}
    limit = time.monotonic() + seconds + _SAY_AFTER  # the coordinator, which began later, says what is wrong
    with _reach(place, seconds) as connection:
        connection.sendall(json.dumps(message, default=str).encode() + b"\n")
        connection.settimeout(1.0)
        text, noted, began = b"", False, time.monotonic()
        while not text.endswith(b"\n") and time.monotonic() < limit:
            try:
                if not (data := connection.recv(service.MESSAGE)):
                    break
                text += data
            except TimeoutError:
                if not noted and time.monotonic() - began > _SAY_AFTER:
                    say(f"waiting for all {place.processes} processes at {place.coordinator}, up to {seconds:.0f} s")
                    noted = True
            except OSError:
                break
    try:
        wrong = json.loads(text)["error"]
    except (ValueError, TypeError, LookupError):
        raise UserError(
            f"coordinator is {place.coordinator}, where something answers that waits for no processes; give the "
            f"address of process 0 and a free port, and start all processes together"
        ) from None
    if wrong is not None:
        raise UserError(wrong)


def _reach(place: Place, seconds: float) -> socket.socket:
    """A connection to the coordinator, as soon as there is one."""
    began = time.monotonic()
    while True:
        try:
            return socket.create_connection((place.host, place.port), timeout=5)
        except socket.gaierror as error:  # a name may come up with its machine
            reason = f"the name is not known: {error.strerror}"
        except OSError as error:
            reason = error.strerror or "it does not answer"
        if time.monotonic() - began > seconds:
            raise UserError(
                f"coordinator is {place.coordinator}, where process 0 did not answer in {seconds:.0f} s ({reason}); "
                f"start process 0 too, and give its address and a port that others may reach"
            )
        time.sleep(min(1.0, seconds / 4))


def _connect(place: Place, seconds: float) -> None:
    """Makes this process known to JAX, which waits for all others."""
    import jax
    from jax._src import distributed, xla_bridge  # the public function would run the service in process 0
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

    if xla_bridge.backends_are_initialized():
        raise ValueError("processes must be joined before JAX looks for its devices; join them first")
    if place.devices is not None:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, place.devices)))
    client = _jax.get_distributed_runtime_client(
        place.coordinator,
        place.process,
        init_timeout=max(60, round(seconds)),  # all are there
        heartbeat_timeout=600,
        shutdown_timeout=5,
        use_compression=True,
    )
    client.connect()
    state = distributed.global_state
    state.coordinator_address, state.client = place.coordinator, client
    state.process_id, state.num_processes = place.process, place.processes
