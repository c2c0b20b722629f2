"""Joins the processes of a run; a process that dies or fails ends the others."""

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

JOINING = 300.0  # seconds in which all processes must join
_SAY_AFTER = 10.0  # seconds of waiting after which a line says so


@contextlib.contextmanager
def joined(
    place: Place | None,
    *,
    identity: Mapping[str, Any] | None = None,
    advice: str = "",
    seconds: float = JOINING,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Iterator[None]:
    """Joins the other processes of a run, once in a program, before JAX initializes its devices.

    Inside the context, a process that dies or fails ends the others within a minute, each with one line. A process
    that fails ends at once with `os._exit`, because threads that wait in a collective cannot be interrupted.

    Args:
        place: From `find_place`; None for a run of one process, in which nothing happens.
        identity: Values that must be equal in all processes, besides versions and compilation settings.
        advice: Added to the line of a process that ends because of another one.
        seconds: How long to wait for the others to join.
        say: Called with progress lines; prints to stderr by default.

    Raises:
        UserError: If not all processes join in time, or their values differ.
        ValueError: If JAX has initialized its devices already.

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
        join_all(place, whole, seconds, say)
        _connect(place, seconds)
        lock = threading.Lock()

        def end(line: str, code: int) -> None:
            with lock:  # one line, from the first thread to get here
                leave(f"error: {line}; this one ends too{advice and f', {advice}'}", code)

        watch = Watch(place.process, place.processes, end=end)
        watch.start()
        try:
            yield
        except BaseException as error:
            if getattr(error, "step", None) is not None and isinstance(error, KeyboardInterrupt):
                _part(watch)  # all processes have stopped after the same step
                jax.distributed.shutdown()
                raise
            if not isinstance(error, UserError | KeyboardInterrupt | SystemExit):
                _await_verdict(watch)  # most likely another process died: the watch says which
                traceback.print_exc()
            line, code = exit_words(error)
            with lock:
                watch.failed(line.removeprefix("error: "))
                leave(line, code)
        _part(watch)
        jax.distributed.shutdown()


def _part(watch: Any) -> None:
    """Waits until all processes are done, then stops the watch; a process that dies before is still noticed."""
    from monarchrt.models.processes.agreement import wait_for_all

    wait_for_all("end")
    watch.stop()


def _await_verdict(watch: Any) -> None:
    """Waits until the watch has decided whether another process is lost; if one is, it ends this process."""
    from monarchrt.models.processes.watch import BEAT, PATIENCE

    time.sleep(5 * BEAT)
    if watch.suspects():
        time.sleep(PATIENCE + 5 * BEAT)


def exit_words(error: BaseException) -> tuple[str, int]:
    """The line that reports an error, and the exit code."""
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
    """Runs the coordinator beside process 0; does nothing in other processes.

    Raises:
        UserError: If its port is in use.
    """
    if place.process:
        yield
        return
    wait = time.monotonic() + min(seconds, service.LATE + 2)  # the coordinator of an earlier run may be about to end
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
    # outside of the process group that a terminal sends Ctrl-C to
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )


def join_all(place: Place, identity: Mapping[str, Any], seconds: float, say: Callable[[str], None]) -> None:
    """Registers this process with the coordinator and waits until all have registered.

    Raises:
        UserError: If the coordinator does not answer in time, a process is missing, or their values differ.
    """
    message = {"process": place.process, "processes": place.processes, "identity": dict(identity)}
    limit = time.monotonic() + seconds + _SAY_AFTER  # the coordinator started later, and reports a time-out itself
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
    """Connects to the coordinator; tries again until it listens, for `seconds`.

    Raises:
        UserError: If it does not answer in time.
    """
    began = time.monotonic()
    while True:
        try:
            return socket.create_connection((place.host, place.port), timeout=5)
        except socket.gaierror as error:  # a host name may become known when its machine has started
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
    """Connects `jax.distributed`'s client, which waits for all other processes.

    Raises:
        ValueError: If JAX has initialized its devices already.
    """
    import jax
    from jax._src import distributed, xla_bridge  # jax.distributed.initialize would run the service in process 0
    from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

    if xla_bridge.backends_are_initialized():
        raise ValueError("processes must be joined before JAX looks for its devices; join them first")
    if place.devices is not None:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, place.devices)))
    client = _jax.get_distributed_runtime_client(
        place.coordinator,
        place.process,
        init_timeout=max(60, round(seconds)),  # all have registered already
        heartbeat_timeout=600,
        shutdown_timeout=5,
        use_compression=True,
    )
    client.connect()
    state = distributed.global_state
    state.coordinator_address, state.client = place.coordinator, client
    state.process_id, state.num_processes = place.process, place.processes
