"""The coordinator of a run of several processes, a separate process: `service.py PORT PROCESSES SECONDS`.

First it calls the roll: every process registers its index, settings and versions, and none continues until all have
registered and agree. Then it runs the service of `jax.distributed`. JAX would run the service inside process 0, whose
death would kill the others at once, with a dump of the C++ library. Here it outlives process 0 until the others have
ended, so that they can report what happened. It ends when its stdin closes, a pipe held by process 0.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Iterable
from typing import Any

LINGER = 60.0  # seconds that it stays, at most, for the other processes after process 0 has ended
LATE = 8.0  # seconds that it stays, at most, to refuse processes that come after the roll call failed
MESSAGE = 2**20  # bytes of a registration, at most
_ADVICE = "start all processes with the same settings and versions"
_ESTABLISHED = "01"
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


class RollCall:
    """Which processes have registered, and whether their values agree.

    Args:
        processes: Number of processes of the run.

    Examples:
        >>> roll = RollCall(2)
        >>> roll.take({"process": 0, "processes": 2, "identity": {"batch": 4}}), roll.complete
        (None, False)
        >>> roll.take({"process": 1, "processes": 2, "identity": {"batch": 8}})
        'batch is 4 in process 0 and 8 in process 1; start all processes with the same settings and versions'
    """

    def __init__(self, processes: int):
        self._count = processes
        self._here: dict[int, dict[str, Any]] = {}

    @property
    def complete(self) -> bool:
        """Whether all processes have registered."""
        return len(self._here) == self._count

    @property
    def missing(self) -> list[int]:
        """Indices of the processes that have not registered."""
        return [process for process in range(self._count) if process not in self._here]

    def take(self, message: dict[str, Any]) -> str | None:
        """Registers a process.

        Args:
            message: Its "process" (index), "processes" (their number) and "identity" (values that must be equal).

        Returns:
            The reason why the run cannot start, for all processes; None if there is none so far.
        """
        process, count, identity = message["process"], message["processes"], message["identity"]
        if count != self._count:
            return f"processes is {self._count} in process 0 and {count} in process {process}; {_ADVICE}"
        if process in self._here:
            return f"process is {process} in two processes; give each a number of its own, 0...{self._count - 1}"
        self._here[process] = identity
        if 0 not in self._here:
            return None
        for other, values in sorted(self._here.items()):
            if (wrong := difference(self._here[0], values, process=other)) is not None:
                return f"{wrong}; {_ADVICE}"
        return None


def difference(right: dict[str, Any], values: dict[str, Any], *, process: int) -> str | None:
    """The first value that a process does not share with process 0, as text for an error; None if all are equal."""
    for name in dict.fromkeys((*right, *values)):
        if right.get(name) != values.get(name):
            return f"{name} is {right.get(name)} in process 0 and {values.get(name)} in process {process}"
    return None


def call_roll(listener: socket.socket, processes: int, seconds: float) -> tuple[list[socket.socket], str | None]:
    """Waits until all processes have registered and agree, process 0 has ended, or the time is over.

    Args:
        listener: The socket that they connect to.
        processes: Number of processes of the run.
        seconds: How long to wait.

    Returns:
        The open connections, which wait for `answer`, and the reason why the run cannot start; None if it can. With a
        reason, connections that have not registered yet are among them.
    """
    roll, limit = RollCall(processes), time.monotonic() + seconds
    texts: dict[socket.socket, bytes] = {}  # received so far of those that have not registered
    there: dict[socket.socket, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        with contextlib.suppress(OSError, ValueError):  # stdin is a file
            selector.register(sys.stdin, selectors.EVENT_READ)
        while not roll.complete:
            if time.monotonic() > limit:
                which = ", ".join(map(str, roll.missing[:8])) + ", ..." * (len(roll.missing) > 8)
                return [*there, *texts], (
                    f"processes is {processes}, and in {seconds:.0f} s process {which} did not come; start all of "
                    f"them, with the same coordinator"
                )
            for key, _ in selector.select(timeout=0.5):
                file = key.fileobj
                if file is listener:
                    connection = listener.accept()[0]
                    connection.setblocking(False)
                    texts[connection] = b""
                    selector.register(connection, selectors.EVENT_READ)
                elif not isinstance(file, socket.socket):
                    return [*there, *texts], "process 0 has ended"
                else:
                    try:
                        data = file.recv(MESSAGE)
                    except OSError:
                        data = b""
                    if file in there:
                        if not data:
                            return [*there, *texts], f"process {there[file]} has ended before all had come"
                        continue
                    texts[file] += data
                    if data and not texts[file].endswith(b"\n") and len(texts[file]) < MESSAGE:
                        continue
                    message = _read(texts.pop(file))
                    if message is None:  # not one of our processes
                        selector.unregister(file)
                        file.close()
                        continue
                    there[file] = message["process"]
                    if (wrong := roll.take(message)) is not None:
                        return [*there, *texts], wrong
    return list(there), None


def _read(text: bytes) -> dict[str, Any] | None:
    """A registration; None if the text is not one."""
    try:
        message = json.loads(text)
        whole = isinstance(message["process"], int) and isinstance(message["identity"], dict)
        return message if whole and isinstance(message["processes"], int) else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def answer(connections: Iterable[socket.socket], wrong: str | None) -> None:
    """Tells the connected processes whether they may start, and closes the connections; `wrong` is None if they may."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.settimeout(1.0)
            connection.sendall(json.dumps({"error": wrong}).encode() + b"\n")
            connection.shutdown(socket.SHUT_WR)
            for _ in range(100):  # unread input would reset the connection, and lose the answer
                if not connection.recv(MESSAGE):
                    break
        connection.close()


def refuse(listener: socket.socket, wrong: str, *, count: int, seconds: float = LATE) -> None:
    """Refuses the processes that connect after the roll call has failed.

    Args:
        listener: The socket that they connect to.
        wrong: The reason, which they are told.
        count: How many are expected.
        seconds: How long to wait for them.
    """
    limit = time.monotonic() + seconds
    while count > 0 and (left := limit - time.monotonic()) > 0:
        listener.settimeout(left)
        try:
            connection = listener.accept()[0]
        except OSError:
            continue
        answer([connection], wrong)
        count -= 1


def connections_to(port: int) -> int:
    """Number of established connections to a local TCP port; 0 where the system has no /proc/net/tcp."""
    total = 0
    for table in _TABLES:
        try:
            with open(table, encoding="ascii") as file:
                rows = [line.split() for line in file][1:]
        except OSError:
            continue
        total += sum(row[3] == _ESTABLISHED and int(row[1].rpartition(":")[2], 16) == port for row in rows)
    return total


def listen(port: int) -> socket.socket:
    """A socket that listens at a port, for IPv6 and IPv4 where the system has both.

    Raises:
        OSError: If the port is in use.
    """
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
    return socket.create_server(("", port), backlog=512)


def main(port: int, processes: int, seconds: float) -> None:
    """Runs the coordinator until stdin is closed and no process is connected any more."""
    for number in (signal.SIGINT, signal.SIGTERM):  # job managers signal all processes; process 0 decides
        signal.signal(number, signal.SIG_IGN)
    try:
        listener = listen(port)
    except OSError as error:
        print(os.strerror(error.errno) if error.errno else error, flush=True)
        return
    print("ready", flush=True)
    there, wrong = call_roll(listener, processes, seconds)
    if wrong is not None:
        answer(there, wrong)
        refuse(listener, wrong, count=processes - len(there))
        return
    listener.close()
    # takes a third of a second to import; all of jax takes several
    from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

    service = _jax.get_distributed_runtime_service(
        f"[::]:{port}",
        processes,
        heartbeat_timeout=600,  # `watch.py` is quicker, and reports what happened
        shutdown_timeout=1,
        recoverable=True,  # the watch ends the other processes, not an error of the library
    )
    answer(there, None)
    sys.stdin.buffer.read()
    limit = time.monotonic() + LINGER
    time.sleep(0.5)
    while connections_to(port) and time.monotonic() < limit:
        time.sleep(0.2)
    del service
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
