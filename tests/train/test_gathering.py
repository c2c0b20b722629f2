"""Weights that are gathered a layer ahead, where that fits. The program itself: test_compiled_step.py."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.train import programs, step
from monarchrt.train.cli import main
from monarchrt.train.config import OptimizerConfig
from monarchrt.train.gathering import fitting
from monarchrt.train.logs import read_log
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.objectives.settings import DMDConfig, FlowConfig, SelfForcingConfig
from monarchrt.train.state import make_training
from monarchrt.train.step import may_gather_ahead

NETWORK = ["num_layers=1", "dim=24", "num_heads=2", "ffn_dim=16", "text_dim=4", "text_len=2", "freq_dim=16"]


@pytest.mark.parametrize(
    ("taken", "there", "ahead"), [(90, True, True), (91, True, False), (90, False, False), (None, True, True)]
)
def test_ahead_where_it_leaves_a_tenth(taken, there, ahead):
    """Of what every process has; where no compiler says what a program takes, nothing speaks against it."""
    asked = []
    made, choice = fitting(
        lambda ahead: asked.append(ahead) or ahead,
        lambda made: taken if made else 80,
        available=100,
        agreed=lambda fits: fits and there,
    )
    assert (made, choice.ahead, asked) == (ahead, ahead, [True] if ahead else [True, False])
    assert ("91 B of 100 B" in str(choice)) == (taken == 91)


def test_only_loops_over_layers_are_changed(monkeypatch):
    """Not with parts of a batch or blocks of a roll-out around them, whose turns would be put together as well."""
    monkeypatch.setattr(step, "gathers_ahead", lambda devices, fsdp: fsdp == 2)
    devices = np.array(2 * jax.devices()[:1])
    mesh = Mesh(devices, ("fsdp",))

    def may(objective: type[Any] = FlowConfig, accumulation=1, shared=mesh):
        settings = OptimizerConfig(accumulation=accumulation)
        trainings = {"student": make_training(settings, updates=1)}
        return may_gather_ahead(make_objective(objective()), trainings, shared)

    assert may()
    assert may(DMDConfig)
    assert not any((may(SelfForcingConfig), may(accumulation=2)))
    assert not may(shared=Mesh(devices, ("data",)))


@pytest.fixture
def command(tmp_path):
    arrays = {"latents": np.ones((3, 4, 4, 16), np.float32), "text": np.zeros((2, 4), np.float32)}
    for number in range(3):
        write_arrays(tmp_path / f"latents/{number}.safetensors", arrays, metadata={})
    arguments = ["train", "--latents", tmp_path / "latents", "--overrides", *NETWORK, "--attention", "dense"]
    arguments += ["--batch", 1, "--held-out", 0.4, "--steps", 2, "--folder", tmp_path / "run"]
    return list(map(str, arguments))


@pytest.fixture
def made(monkeypatch):
    """Whether the weights of each step that is made are gathered ahead, as on GPUs; there is 1 GiB of memory."""
    found, whole = [], programs.make_train_step

    def make_train_step(*arguments, ahead, **options):
        found.append(ahead)
        return whole(*arguments, ahead=ahead, **options)

    monkeypatch.setattr(programs, "make_train_step", make_train_step)
    monkeypatch.setattr(programs, "may_gather_ahead", lambda objective, trainings, mesh: True)
    monkeypatch.setattr(programs, "device_memory", lambda device: 2**30)
    return found


def test_a_plan_says_it(command, made, monkeypatch, capsys):
    assert main([*command, "--plan"]) == 0
    assert "a layer's weights are gathered while the layer before it computes" in capsys.readouterr().out
    assert made[-1]
    monkeypatch.setattr(programs, "device_memory", lambda device: 2**17)
    assert main([*command, "--plan", "--json"]) == 0
    assert not json.loads(capsys.readouterr().out)["gathered_ahead"]
    assert not made[-1]


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "auto"])
def test_what_does_not_fit_is_left_off_and_said(command, made, tmp_path, monkeypatch, capsys, remat):
    """The program that was looked at is the one that is run: no step is compiled again for it."""
    compiled = []

    def count(event: str, duration_secs: float, **of: str | int) -> None:
        if event.endswith("backend_compile_duration") and "step_fn" in str(of.get("fun_name")):
            compiled.append(of["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        assert main([*command, "--remat", remat]) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(compiled) == 1
    assert made[-1]
    assert "gathered" not in capsys.readouterr().err
    assert [row["step"] for row in read_log(tmp_path / "run") if "loss" in row] == [1, 2]

    monkeypatch.setattr(programs, "device_memory", lambda device: 2**17)
    command[command.index("--folder") + 1] = str(tmp_path / "small")
    assert main([*command, "--remat", remat]) == 0
    assert not made[-1]
    said = capsys.readouterr().err
    assert "note: a layer's weights are gathered when it computes: gathered while the layer before" in said
    assert "KiB of 128 KiB on each device" in said
