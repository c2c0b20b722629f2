"""Signals at any moment of a command, and standard streams that are closed or break."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from monarchrt.models.media.video import read_clip
from monarchrt.train.cli import main
from monarchrt.train.interrupt import Interrupted, StopRequest, stoppable

ROOT = Path(__file__).parents[2]


class TestSignals:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_one_inside_a_callback_of_garbage_collection_is_not_lost(self, number, capsys):
        """JAX has such a callback, and what is raised in it only gets a report."""
        armed, seen = [], []

        def callback(phase, info):
            if armed and not seen:
                seen.append(phase)
                signal.raise_signal(number)

        gc.callbacks.append(callback)
        try:
            with pytest.raises(Interrupted) as stopped, stoppable():  # noqa: PT012
                armed.append(True)
                gc.collect()
                time.sleep(5)
        finally:
            gc.callbacks.remove(callback)
        assert stopped.value.code == 128 + number
        assert not capsys.readouterr().err

    def test_one_inside_a_finalizer_is_not_lost(self):
        class Finalized:
            def __del__(self):
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(Interrupted), stoppable():  # noqa: PT012
            Finalized()
            time.sleep(5)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_one_that_an_import_turns_into_an_error_of_its_own(self, number):
        """As extensions do, which are just being initialized."""
        with pytest.raises(Interrupted, match=r"^stopped$") as stopped, stoppable():  # noqa: PT012
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt as error:
                raise ImportError("while initializing") from error
        assert stopped.value.code == 128 + number
        with pytest.raises(ImportError, match="no signal"), stoppable():
            raise ImportError("no signal")

    def test_other_reports_are_made_as_ever(self, monkeypatch):
        reported = []
        monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_value))

        class Broken:
            def __del__(self):
                raise OSError("broken")

        with stoppable():
            Broken()
        assert [str(error) for error in reported] == ["broken"]

    def test_what_was_there_is_put_back(self):
        before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook
        with stoppable():
            pass
        assert before == ([signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)], sys.unraisablehook)

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    @pytest.mark.parametrize("command", ["train", "generate", "inspect"])
    def test_in_start_up_with_a_line(self, start, number, command, tmp_path):
        """While the command is read, its modules are imported, or its options are parsed."""
        before = (
            "import os, signal, threading, time, monarchrt.train.cli as cli; load = cli.load; "
            f"cli.load = lambda name: (os.kill(os.getpid(), {int(number)}), time.sleep(0.1), load(name))[2]"
        )
        process = start([command, "--help"], before=before, imported=False)
        _, stderr = process.communicate(timeout=120)
        assert (process.returncode, stderr) == (128 + number, "stopped\n")

    def test_at_any_moment_of_a_start(self, start, tmp_path):
        """A Ctrl-C ends it, whenever it comes, in one line."""
        for n in range(4):
            process = start(
                ["generate", "--checkpoint", tmp_path / "nothing", "--prompt", "a", "--out", tmp_path / "a.mp4"],
                before="import monarchrt.train.cli; print('here', flush=True)",
                imported=False,
            )
            process.stdout.readline()
            time.sleep(0.1 + 0.15 * n)
            process.send_signal(signal.SIGTERM)
            _, stderr = process.communicate(timeout=120)
            assert process.returncode in (143, 2, -15), stderr  # -15: it had said what was wrong, and was ending
            assert stderr.count("\n") == 1, stderr


class TestStreams:
    """A terminal that is closed, a log whose disk is full, `| head`: the work is done all the same."""

    def command(self, baseline, out):
        return [
            *[sys.executable, "-m", "monarchrt", "generate", "--checkpoint", str(baseline), "--out", str(out)],
            *["--mode", "windows", "--frames", "3", "--steps", "1", "--zoom", "1"],
        ]

    @pytest.mark.parametrize(
        "closed",
        [
            "2>&-",
            "<&- >&- 2>&-",
            ">/dev/full 2>&1",
            *(pytest.param(x, marks=pytest.mark.slow) for x in (">&- 2>&-", "2>/dev/full")),
        ],
    )
    def test_streams_that_cannot_be_written(self, baseline, environment, tmp_path, closed):
        out = tmp_path / "a.mp4"
        shell = ["sh", "-c", f'"$@" {closed}', "sh", *self.command(baseline, out)]
        process = subprocess.run(shell, env=environment, cwd=ROOT, timeout=300, check=False)
        assert process.returncode == 0
        assert len(read_clip(out, height=16, width=32)) == 3

    def test_a_reader_that_is_gone(self, baseline, environment, tmp_path):
        out = tmp_path / "a.mp4"
        reading, writing = os.pipe()
        os.close(reading)
        process = subprocess.run(
            self.command(baseline, out), env=environment, cwd=ROOT, stderr=writing, timeout=300, check=False
        )
        os.close(writing)
        assert process.returncode == 0
        assert len(read_clip(out, height=16, width=32)) == 3

    def test_an_error_without_streams_has_its_exit_code(self, environment, tmp_path):
        shell = ["sh", "-c", f'"{sys.executable}" -m monarchrt inspect nothing >&- 2>&-']
        assert subprocess.run(shell, env=environment, cwd=ROOT, timeout=300, check=False).returncode == 2


@pytest.mark.parametrize("arguments", [["inspect", "caf\udce9"], ["generate", "--out", "caf\udce9.mp4"]])
def test_names_that_are_not_utf8(arguments, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: argument 'caf\\xe9")
    assert error.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_wait_for_the_end_of_the_step(number):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(Interrupted, match="stopped without saving") as raised:
            signal.raise_signal(number)
    assert (raised.value.code, raised.value.step) == (128 + number, None)
