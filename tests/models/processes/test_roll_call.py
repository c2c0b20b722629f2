"""Who has come and agrees, over real sockets in one process; what the coordinator tells those who wait."""

import json
import socket
import threading

import pytest

from monarchrt.models.errors import UserError
from monarchrt.models.processes import service
from monarchrt.models.processes.joining import join_all
from monarchrt.models.processes.place import Place


class Roll:
    """A coordinator in a thread, as far as the roll call."""

    def __init__(self, processes: int, seconds: float):
        self._listener = service.listen(0)
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._run, args=(processes, seconds), daemon=True)
        self._thread.start()

    def _run(self, processes: int, seconds: float) -> None:
        there, wrong = service.call_roll(self._listener, processes, seconds)
        service.answer(there, wrong)
        if wrong is not None:
            service.refuse(self._listener, wrong, count=processes - len(there))
        self._listener.close()

    def place(self, process: int, processes: int) -> Place:
        return Place(coordinator=f"localhost:{self.port}", processes=processes, process=process)


def come(places: list[Place], identities: list[dict], *, seconds: float = 20.0) -> list[str | None]:
    """What each of several processes that come at once is told."""
    found: list[str | None] = ["nothing"] * len(places)

    def run(number: int) -> None:
        try:
            join_all(places[number], identities[number], seconds, lambda line: None)
            found[number] = None
        except UserError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_all_begin_together():
    roll = Roll(3, 20.0)
    assert come([roll.place(n, 3) for n in (2, 0, 1)], [{"batch": 4}] * 3) == [None] * 3


@pytest.mark.parametrize(
    ("numbers", "counts", "values", "message"),
    [
        (
            (0, 1),
            (2, 2),
            (4, 8),
            "batch is 4 in process 0 and 8 in process 1; start all processes with the same",
        ),
        ((0, 1), (2, 2), (4, None), "batch is 4 in process 0 and None in process 1"),
        ((0, 1), (2, 2), (None, 4), "batch is None in process 0 and 4 in process 1"),
        ((0, 1), (2, 3), (4, 4), "processes is 2 in process 0 and 3 in process 1"),
        ((1, 1), (2, 2), (4, 4), "process is 1 in two processes; give each a number of its own, 0...1"),
    ],
)
def test_all_are_told_what_is_wrong(numbers, counts, values, message):
    roll = Roll(2, 20.0)
    places = [roll.place(number, count) for number, count in zip(numbers, counts, strict=True)]
    told = come(places, [{} if value is None else {"batch": value} for value in values])
    assert all(text is not None and message in text and "\n" not in text for text in told), told


def test_one_that_does_not_come_is_named():
    roll = Roll(3, 0.6)
    told = come([roll.place(0, 3), roll.place(2, 3)], [{}] * 2)
    advice = "start all of them, with the same coordinator"
    assert set(told) == {f"processes is 3, and in 1 s process 1 did not come; {advice}"}


def test_one_that_goes_before_all_have_come():
    roll = Roll(3, 20.0)
    with socket.create_connection(("localhost", roll.port)) as gone:
        gone.sendall(json.dumps({"process": 1, "processes": 3, "identity": {}}).encode() + b"\n")
    assert come([roll.place(0, 3)], [{}]) == ["process 1 has ended before all had come"]


def test_strangers_do_not_count():
    roll = Roll(1, 20.0)
    for text in (b"GET / HTTP/1.1\r\n\r\n", b"\x00\xff\n", b'{"process": "x"}\n', b"[" * 9999 + b"\n", b""):
        with socket.create_connection(("localhost", roll.port)) as stranger:
            stranger.sendall(text)
    assert come([roll.place(0, 1)], [{}]) == [None]


def test_a_stranger_who_never_ends_is_let_go():
    roll = Roll(1, 20.0)
    with socket.create_connection(("localhost", roll.port), timeout=20) as stranger:
        stranger.sendall(b"x" * service.MESSAGE)
        assert stranger.recv(1) == b""
        assert come([roll.place(0, 1)], [{}]) == [None]


def test_nobody_answers():
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
    [told] = come([Place(coordinator=f"localhost:{port}", processes=2, process=1)], [{}], seconds=0.2)
    assert told is not None
    assert f"coordinator is localhost:{port}, where process 0 did not answer in 0 s (Connection refused)" in told


def test_a_name_that_is_not_known():
    place = Place(coordinator="no.such.host.invalid:99", processes=2, process=1)
    [told] = come([place], [{}], seconds=0.2)
    assert told is not None
    assert "(the name is not known" in told


def test_another_program_answers():
    with socket.create_server(("localhost", 0)) as other:

        def serve() -> None:
            connection = other.accept()[0]
            connection.recv(100)
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        place = Place(coordinator=f"localhost:{other.getsockname()[1]}", processes=2, process=1)
        [told] = come([place], [{}])
        thread.join()
    assert told is not None
    assert "where something answers that waits for no processes" in told


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken, pytest.raises(OSError, match="Address already in use"):
        service.listen(taken.getsockname()[1])
