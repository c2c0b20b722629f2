"""What a run says: header, lines or a bar, and sinks besides its folder."""

import json
import sys
import types
from typing import Any

import pytest

from monarchrt.models.errors import UserError
from monarchrt.train import sinks
from monarchrt.train.cli import main
from monarchrt.train.config import RunConfig, TrainConfig
from monarchrt.train.logs import Progress, RunLog
from tests.untyped import untyped

from .conftest import history


class Clock:
    """Stands in for time.monotonic."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("monarchrt.train.logs.time.monotonic", lambda: self.now)


def test_without_a_terminal_a_line_comes_every_so_often(monkeypatch, capsys):
    clock = Clock(monkeypatch)
    with Progress(1000, start=100, every=30.0) as progress:
        progress.header(["network: small"])
        for step in range(101, 131):
            clock.now += 20.0 if step == 101 else 4.0
            progress.update(step, f"loss {step / 100:.2f}")
        progress.measured(130, "held-out loss 0.5000")
    assert capsys.readouterr().err.splitlines() == [
        "network: small",
        "step 101/1000: loss 1.01; the first step took 20.0 s, mostly to compile",
        "step 109/1000: loss 1.09; 4 s/step, 59 min left",
        "step 117/1000: loss 1.17; 4 s/step, 59 min left",
        "step 125/1000: loss 1.25; 4 s/step, 58 min left",
        "step 130/1000: held-out loss 0.5000",
    ]


def test_quiet_means_quiet(capsys):
    with Progress(10, quiet=True) as progress:
        progress.header(["network: small"])
        progress.update(1, "loss 1")
        progress.measured(1, "held-out loss 1")
    assert capsys.readouterr().err == ""


@pytest.fixture
def wandb(monkeypatch):
    """A stub of what is used of wandb; `calls` is what it was told."""
    stub: Any = types.ModuleType("wandb")
    stub.calls = []

    class Run:
        def define_metric(self, name, step_metric):
            stub.calls.append(("define_metric", name, step_metric))

        def log(self, values):
            stub.calls.append(("log", values))

        def finish(self, exit_code):
            stub.calls.append(("finish", exit_code))

    def init(*, project, name, id, resume, dir, config):
        stub.calls.append(("init", project, name, id, resume, dir, config["run"]["steps"]))
        return Run()

    stub.init = init
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_a_run_says_what_it_is_and_sends_its_numbers(arguments, baseline, wandb, tmp_path, capsys):
    """A finetune of a dense start: header, the loss before any training, and everything to wandb under one id."""
    folder = tmp_path / "finetune"
    command = ["train", "--folder", str(folder)]
    options = ["--init-from", str(baseline), "--tile", "3", "2", "2", "--steps", "2", "--eval-every", "2"]
    assert main([*arguments, *command[1:], *options, "--wandb", "films"]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("network: ")
    assert " parameters, computed in fp32; 24 tokens (3 x 2 x 4) a sample; " in said[0]
    assert said[0].endswith("attention monarch(tile=(3,2,2)), 66.7% of the map")  # stored: 1/6 + 1/2
    # tokens of 2 x 2 positions of 48 channels
    assert said.pop(1).startswith("warning: a token holds 192 numbers and the network is 24 wide")
    assert said[1].startswith(f"run: 2 steps of 2 samples from {baseline}, seed 0; AdamW at 0.001, constant")
    assert said[2].startswith("devices: 1 x cpu; the state takes ")
    losses = {record["step"]: record["held_out_loss"] for record in history(folder) if "held_out_loss" in record}
    assert list(losses) == [0, 2]
    assert f"step 0/2: held-out loss {losses[0]:.4f}" in said
    assert any(line.startswith("step 1/2: loss ") for line in said)
    (_, project, name, identifier, resume, place, steps), metric, *logged, end = wandb.calls
    assert (project, name, resume, place, steps) == ("films", "finetune", "allow", str(folder), 2)
    assert metric == ("define_metric", "*", "step")
    sent = [values for _, values in logged]
    assert [values["step"] for values in sent] == [0, 1, 2, 2]
    assert sent[0] == {"step": 0, "held_out_loss": losses[0]}
    assert end == ("finish", 0)
    # settings that are not given, wandb too, come from the folder
    wandb.calls.clear()
    assert main([*command, "--resume", "--steps", "3"]) == 0
    assert wandb.calls[0][3] == identifier
    records = [(record["step"], "loss" in record) for record in history(folder)]
    assert records == [(0, False), (1, True), (2, True), (2, False), (3, True), (3, False)]


def test_wandb_is_asked_for_before_anything_is_done(arguments, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*arguments, "--folder", str(tmp_path / "run"), "--wandb", "films"]) == 2
    assert "wandb is 'films', but the package wandb is not installed; pip install wandb" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))  # a folder of that name
    assert main([*arguments, "--folder", str(tmp_path / "run"), "--wandb", "films"]) == 2
    assert "is not installed (a folder named wandb was" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="wandb is empty"):
        RunConfig(wandb=" ")


def test_a_sink_that_fails_is_told_once_and_the_log_goes_on(wandb, tmp_path, capsys):
    config = TrainConfig(run=RunConfig(folder=tmp_path, wandb="films"))
    (sink,) = sinks.open_sinks(config)

    def fail(values):
        raise ConnectionError("no network")

    untyped(sink)._run.log = fail
    with RunLog(tmp_path, step=-1, sinks=[sink]) as log:
        for step in range(3):
            log.write(step, {"loss": 1.0})
    assert len(history(tmp_path)) == 3
    assert (
        capsys.readouterr().err == "warning: wandb failed (ConnectionError: no network); the run continues without it\n"
    )
    wandb.init = fail
    with pytest.raises(UserError, match=r"wandb cannot start .*; run `wandb login`, or set WANDB_MODE.* with --resume"):
        sinks.open_sinks(config)
    assert json.loads((tmp_path / "wandb.json").read_text())["id"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b'{"id": 3}', b"[" * 100_000])
def test_a_damaged_file_of_the_id_makes_a_new_one(wandb, tmp_path, content):
    (tmp_path / "wandb.json").write_bytes(content)
    sinks.open_sinks(TrainConfig(run=RunConfig(folder=tmp_path, wandb="films")))
    assert wandb.calls[0][3] == json.loads((tmp_path / "wandb.json").read_text())["id"]


def test_a_run_that_fails_is_sent_as_failed(wandb, tmp_path):
    made = sinks.open_sinks(TrainConfig(run=RunConfig(folder=tmp_path, wandb="films")))
    with pytest.raises(KeyError), RunLog(tmp_path, step=-1, sinks=made):
        raise KeyError("mine")
    assert wandb.calls[-1] == ("finish", 1)
