"""The coordinator of several processes, a process of its own, run as a file: `service.py PORT PROCESSES SECONDS`.

First it calls the roll: every process says its number, its settings and versions, and none begins before all have come
and agree. Then it runs the service of `jax.distributed`. JAX would run that inside process 0, whose death then kills
the others at once, with a dump of the C++ library; here it outlives process 0 until the others have gone, so that they
can say what happened. It ends by its stdin: a pipe that process 0 holds, and that closes with it.
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

LINGER = 60.0  # seconds, at most, that it stays for others after process 0
LATE = 8.0  # seconds, at most, that it stays for those who come after something was wrong
MESSAGE = 2**20  # bytes, at most
_ADVICE = "start all processes with the same settings and versions"
_ESTABLISHED = "01"
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


class RollCall:
    """Who has come, and what is wrong with it.

    Args:
        processes: How many there are.

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
        """Whether all are there."""
        return len(self._here) == self._count

    @property
    def missing(self) -> list[int]:
        """Those that are not there."""
        return [process for process in range(self._count) if process not in self._here]

    def take(self, message: dict[str, Any]) -> str | None:
        """Takes what a process says of itself; returns what is wrong for all of them, if something is."""
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
    """The first value in which a process differs from process 0, in words."""
    for name in dict.fromkeys((*right, *values)):
        if right.get(name) != values.get(name):
            return f"{name} is {right.get(name)} in process 0 and {values.get(name)} in process {process}"
    return None


def call_roll(listener: socket.socket, processes: int, seconds: float) -> tuple[list[socket.socket], str | None]:
    """Waits until all have come.

    Args:
        listener: Where they come.
        processes: How many there are.
        seconds: To wait.

    Returns:
        Connections that wait for an answer, and what is wrong, if something is; then, of those too that were about to
        say who they are.
    """
    roll, limit = RollCall(processes), time.monotonic() + seconds
    texts: dict[socket.socket, bytes] = {}  # of those that have not said all
    there: dict[socket.socket, int] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        with contextlib.suppress(OSError, ValueError):  # of a file
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
                    if message is None:  # whoever that was
                        selector.unregister(file)
                        file.close()
                        continue
                    there[file] = message["process"]
                    if (wrong := roll.take(message)) is not None:
                        return [*there, *texts], wrong
    return list(there), None


def _read(text: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(text)
        whole = isinstance(message["process"], int) and isinstance(message["identity"], dict)
        return message if whole and isinstance(message["processes"], int) else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def answer(connections: Iterable[socket.socket], wrong: str | None) -> None:
    """Tells all who have come whether they may begin."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.settimeout(1.0)
            connection.sendall(json.dumps({"error": wrong}).encode() + b"\n")
            connection.shutdown(socket.SHUT_WR)
            for _ in range(100):  # what is not read would tear the answer away
                if not connection.recv(MESSAGE):
                    break
        connection.close()


def refuse(listener: socket.socket, wrong: str, *, count: int, seconds: float = LATE) -> None:
    """Tells those who come later, too.

    Args:
        listener: Where they come.
        wrong: What they are told.
        count: How many are expected.
        seconds: To wait for them.
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
    """How many are open to a port of this machine; 0 where the system does not say."""
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
    """Listens at a port, by IPv6 and IPv4 where there are both.

    Raises:
        OSError: If it is taken.
    """
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
    return socket.create_server(("", port), backlog=512)


def main(port: int, processes: int, seconds: float) -> None:
    """Serves until stdin ends and nobody is connected any more."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole job; process 0 decides
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
    # a third of a second; all of jax takes several
    from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

    service = _jax.get_distributed_runtime_service(
        f"[::]:{port}",
        processes,
        heartbeat_timeout=600,  # the watch is quicker, and says what happened
        shutdown_timeout=1,
        recoverable=True,  # one that is gone ends the others by the watch, not by an error of the library
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
