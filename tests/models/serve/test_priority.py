"""The priority of a server's threads."""

import os
import subprocess
import sys
import threading

import jax
import pytest

from monarchrt.models.media import reading
from monarchrt.models.serve import priority
from monarchrt.models.serve.priority import RAISED, raise_threads, set_priority


@pytest.fixture
def raised(monkeypatch):
    """Priorities that were asked for, by thread; none is set."""
    asked = {}
    monkeypatch.setattr(os, "getpriority", lambda *_: 0)
    monkeypatch.setattr(os, "setpriority", lambda _, thread, nice: asked.__setitem__(thread, nice))
    return asked


def test_all_threads_are_raised_with_an_accelerator(raised, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    done, started, said, seen = threading.Event(), threading.Event(), [], []
    other = threading.Thread(target=lambda: (seen.append(threading.get_native_id()), started.set(), done.wait()))
    other.start()
    started.wait()
    set_priority("auto", said.append)
    done.set()
    other.join()
    assert {threading.get_native_id(), *seen} <= set(raised)
    assert set(raised.values()) == {RAISED}
    assert said == [
        "CPU priority raised to nice -10, so that blocks stay even on a busy host (--priority normal: as it was)"
    ]


@pytest.mark.parametrize(("asked", "backend"), [("normal", "gpu"), ("auto", "cpu")])
def test_it_stays_where_that_is_asked_for_or_of_no_use(raised, monkeypatch, asked, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    set_priority(asked, pytest.fail)
    assert not raised


def test_without_permission_nothing_is_said(raised, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "setpriority", refused)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    set_priority("auto", pytest.fail)


def test_a_thread_that_has_ended_is_passed_over(raised, tmp_path, monkeypatch):
    for thread in (1, 2):
        (tmp_path / str(thread)).mkdir()

    def set_(_, thread, nice):
        if thread == 1:
            raise ProcessLookupError
        raised[thread] = nice

    monkeypatch.setattr(os, "setpriority", set_)
    assert raise_threads(process=tmp_path)
    assert raised == {2: RAISED}


@pytest.mark.parametrize(("given", "then"), [(0, 10), (RAISED, 10), (5, 15)])
def test_uploads_are_not_read_at_the_servers_priority(monkeypatch, tmp_path, given, then):
    now = [given]

    def nice(more):
        now[0] += more
        return now[0]

    monkeypatch.setattr(os, "nice", nice)
    monkeypatch.setattr(reading, "_limit", lambda *_: None)
    asked = {
        "seconds": 1,
        "memory": 1,
        "name": str(tmp_path / "none.mp4"),
        "clip": {"height": 8, "width": 8},
        "out": "",
    }
    assert reading._main(asked) == 2
    assert now == [then]


def test_on_other_systems(raised, tmp_path):
    assert not raise_threads(process=tmp_path / "none")
    assert not raised


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux")
def test_what_nice_gave_stays():
    program = "from monarchrt.models.serve.priority import raise_threads as r; import os; print(r(3), os.nice(0))"
    given = os.nice(0) + 2
    done = subprocess.run(["nice", "-n", "2", sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["False", str(given)]


@pytest.mark.skipif(os.nice(0) != 0 or not os.path.isdir("/proc/self/task"), reason="needs Linux, and normal priority")
def test_a_process_of_its_own():
    program = (
        "import threading, os; from monarchrt.models.serve.priority import raise_threads\n"
        "seen = []; go = threading.Event()\n"
        "other = threading.Thread(target=lambda: (go.wait(), seen.append(os.getpriority(os.PRIO_PROCESS, 0))))\n"
        "other.start(); done = raise_threads(5); go.set(); other.join()\n"
        "later = threading.Thread(target=lambda: seen.append(os.getpriority(os.PRIO_PROCESS, 0)))\n"
        "later.start(); later.join(); print(done, *seen)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (["True", "5", "5"], "")


def test_the_priority_is_above_normal():
    assert -20 <= priority.RAISED < 0
