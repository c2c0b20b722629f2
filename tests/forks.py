"""Processes that begin with all imports done: a server imports once, and forks for each program it is asked to run.

Importing JAX, Flax and Orbax takes a process more time than what most tests do in it. A forked process is one of its
own in every other way: its environment, folder, signals, limits and exit are its own, and JAX has not begun in it.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

COMMANDS = (
    "monarchrt.train.loop",
    "monarchrt.train.export",
    "monarchrt.models.generate.pipeline",
    "monarchrt.train.cli",
)


def start(
    program: str,
    arguments: Sequence[str] = (),
    *,
    environment: Mapping[str, str],
    folder: str | os.PathLike = ".",
    imports: tuple[str, ...] = COMMANDS,
) -> "Process":
    """`python -c program arguments` where `imports` are there, with stdout and stderr in pipes."""
    server = _server(imports, _imported_with(environment))
    return server.start(program, list(arguments), environment=dict(environment), folder=os.path.abspath(folder))


def _imported_with(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """What is read while importing: for each set of it there is a server."""
    names = [x for x in environment if x.startswith(("JAX_", "PYTHON")) and x != "JAX_COMPILATION_CACHE_DIR"]
    return tuple((name, environment[name]) for name in sorted(names))


@functools.cache
def _server(imports: tuple[str, ...], imported_with: tuple[tuple[str, str], ...]) -> "Server":
    return Server(imports, dict(imported_with))


class Server:
    """The process that forks, seen from the tests."""

    def __init__(self, imports: tuple[str, ...], imported_with: dict[str, str]):
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        names = [name for name in os.environ if not name.startswith(("JAX_", "PYTEST"))]
        environment = {name: os.environ[name] for name in names} | imported_with
        command = [sys.executable, "-c", "from tests.forks import serve; serve()", str(theirs.fileno()), *imports]
        self.process = subprocess.Popen(
            command, env=environment, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        theirs.close()
        self.ended: dict[int, int] = {}

    def start(self, program: str, arguments: list[str], *, environment: dict[str, str], folder: str) -> "Process":
        pipes = [os.pipe() for _ in range(2)]
        request = {"program": program, "arguments": arguments, "environment": environment, "folder": folder}
        socket.send_fds(self.socket, [json.dumps(request).encode()], [write for _, write in pipes])
        for _, write in pipes:
            os.close(write)
        while (message := self.receive()) and "started" not in message:
            pass
        return Process(self, message["started"], *(os.fdopen(read, "r", encoding="utf-8") for read, _ in pipes))

    def receive(self, timeout: float | None = None) -> dict[str, int]:
        """The next message; empty after the timeout."""
        if not select.select([self.socket], [], [], timeout)[0]:
            return {}
        received = self.socket.recv(1 << 16)
        if not received:
            raise RuntimeError(f"the server of forks ended with {self.process.wait()}")
        message = json.loads(received)
        if "ended" in message:
            self.ended[message["ended"]] = message["code"]
        return message


class Process:
    """What `subprocess.Popen` is, as far as tests use it."""

    def __init__(self, server: Server, pid: int, stdout: IO[str], stderr: IO[str]):
        self.server, self.pid, self.stdout, self.stderr = server, pid, stdout, stderr

    @property
    def returncode(self) -> int | None:
        return self.server.ended.get(self.pid)

    def poll(self) -> int | None:
        while self.returncode is None and self.server.receive(0):
            pass
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            self.server.receive(left)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it writes to its end."""
        parts: dict[IO[str], list[bytes]] = {self.stdout: [], self.stderr: []}
        open_ones, end = list(parts), None if timeout is None else time.monotonic() + timeout
        while open_ones:
            left = None if end is None else max(end - time.monotonic(), 0)
            ready = select.select(open_ones, [], [], left)[0]
            if not ready:
                raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
            for stream in ready:
                chunk = os.read(stream.fileno(), 1 << 16)
                parts[stream].append(chunk)
                if not chunk:
                    open_ones.remove(stream)
        self.wait(timeout)
        out, err = (b"".join(parts[stream]).decode(errors="replace") for stream in parts)
        self.stdout.close()
        self.stderr.close()
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def serve() -> None:
    """What the server does: returns in each forked process, after its program; never in the server itself."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    wake, waker = socket.socketpair()
    for end in (wake, waker):
        end.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the tests decide what becomes of their processes
    while True:
        ready = select.select([connection, wake], [], [])[0]
        if wake in ready:
            wake.recv(1 << 12)
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                _send(connection, {"ended": ended[0], "code": os.waitstatus_to_exitcode(ended[1])})
        if connection in ready:
            message, files, _, _ = socket.recv_fds(connection, 1 << 18, 2)
            if not message:
                os._exit(0)  # the tests are over
            pid = _fork()
            if not pid:
                for own in (connection, wake, waker):
                    own.close()
                return _become(json.loads(message), files)
            for file in files:
                os.close(file)
            _send(connection, {"started": pid})


def _send(connection: socket.socket, message: dict[str, int]) -> None:
    with contextlib.suppress(BrokenPipeError):
        connection.send(json.dumps(message).encode())


def _fork() -> int:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's threads do not run yet
        return os.fork()


def _become(request: dict[str, Any], files: list[int]) -> None:
    """The process that was asked for."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, (file, name) in enumerate(zip(files, ("stdout", "stderr"), strict=True), 1):
        os.dup2(file, number)
        os.close(file)
        old = getattr(sys, name)
        buffering = 1 if name == "stderr" else -1  # line by line
        new = os.fdopen(number, "w", buffering, old.encoding, old.errors, None, False)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)
    import jax  # which the imports have brought

    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    jax.config.update("jax_compilation_cache_dir", request["environment"].get("JAX_COMPILATION_CACHE_DIR"))
    sys.argv[1:] = request["arguments"]
    sys.modules["__main__"].__dict__.pop("serve", None)
    exec(compile(request["program"], "<string>", "exec"), sys.modules["__main__"].__dict__)
