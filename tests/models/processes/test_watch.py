"""When a process counts as lost, and what one process alone does with questions to all."""

import jax
import pytest

from monarchrt.models.errors import UserError
from monarchrt.models.processes import agreement
from monarchrt.models.processes.agreement import (
    AgreedStop,
    broadcast_value,
    check_shared,
    first_problem,
    is_first_process,
    run_in_first,
    smallest,
)
from monarchrt.models.processes.joining import exit_words, joined
from monarchrt.models.processes.watch import PATIENCE, Silence


def test_one_that_gives_no_sign_is_lost_in_time():
    silence = Silence([1, 2, 3], now=0.0)
    for second in range(1, 30):
        silence.heard({1: str(second), 2: "5", 3: "done"}, now=float(second))
    assert silence.lost() == []
    for second in range(30, 40):
        silence.heard({1: str(second), 2: "5", 3: "done"}, now=float(second))
    assert silence.lost() == [2]  # one that is done is not


def test_one_that_was_held_up_itself_blames_nobody():
    silence = Silence([1], now=0.0)
    silence.heard({1: "1"}, now=1.0)
    silence.heard({1: "1"}, now=1.0 + 10 * PATIENCE)
    assert silence.lost() == []


def test_one_that_never_began_is_lost():
    silence = Silence([1], now=0.0)
    for second in range(1, 40):
        silence.heard({}, now=float(second))
    assert silence.lost() == [1]


def test_alone(tmp_path):
    def refuse() -> None:
        raise UserError("no")

    with joined(None):
        assert is_first_process()
        assert broadcast_value("question", lambda: {"a": 1}) == {"a": 1}
        assert first_problem("question", "wrong") == "wrong"
        check_shared(tmp_path, option="folder")
        with pytest.raises(UserError, match="no"):
            run_in_first("question", refuse)
    stop = AgreedStop()
    assert (stop.due(1, None), stop.due(2, 15)) == (None, 15)


def test_all_stop_after_the_same_step(monkeypatch):
    """Two processes, the one that was not asked a step behind; what they say is kept in a dictionary."""
    kept: dict[str, str] = {}

    class Coordinator:
        def key_value_set(self, key: str, value: str, *, allow_overwrite: bool) -> None:
            if kept.setdefault(key, value) != value:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")

        def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
            return [(key, value) for key, value in kept.items() if key.startswith(prefix)]

    monkeypatch.setattr(agreement, "client", Coordinator)
    one, other = AgreedStop(), AgreedStop()
    assert (other.due(5, None), one.due(6, 15), other.due(6, 2)) == (None, None, None)
    assert (one.due(7, None), other.due(7, None)) == (None, None)
    assert (one.due(8, None), other.due(8, None)) == (15, 15)


def test_the_least_of_what_all_have(monkeypatch):
    """Devices of one process may have less memory than those of the first."""
    kept = {"monarchrt/memory/0/1": "40"}

    class Coordinator:
        def key_value_set(self, key: str, value: str, *, allow_overwrite: bool) -> None:
            kept[key] = value

        def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
            return kept[key]

    monkeypatch.setattr(agreement, "client", Coordinator)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert smallest("memory", 80) == 40
    assert kept["monarchrt/memory/0/0"] == "80"


def test_what_is_said_of_an_error_and_how_the_process_ends():
    """As the command line does in one process."""
    stopped = KeyboardInterrupt()
    stopped.code = 143  # type: ignore[attr-defined]
    said = {
        UserError("a\n b"): ("error: a b", 2),
        KeyboardInterrupt("kept"): ("kept", 130),
        stopped: ("stopped", 143),
        SystemExit(3): ("3", 3),
        SystemExit("why"): ("why", 1),
        FileNotFoundError(2, "No such file", "a/b"): ("error: a/b: No such file", 2),
        ValueError("a\nbug"): ("error: ValueError: a bug", 1),
    }
    for error, expected in said.items():
        assert exit_words(error) == expected
