"""`--times-every`: programs that end where a part of an update ends, and what the log gets of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.train import part_times
from monarchrt.train.config import OptimizerConfig
from monarchrt.train.data import Batch
from monarchrt.train.logs import RunLog
from monarchrt.train.objectives.base import Objective
from monarchrt.train.objectives.dmd import DMDObjective
from monarchrt.train.objectives.settings import DMDConfig, FlowConfig
from monarchrt.train.part_times import PartTimes, part_programs
from monarchrt.train.state import create_role, create_state, make_training, split_model


class Line(nnx.Module):
    def __init__(self):
        self.slope = nnx.Param(jnp.float32(3.0))


class Squares(Objective):
    """The loss is the mean of (slope x)^2, with x as a part of its own."""

    def draws(self, key, shapes):
        return {"student": jnp.ones((shapes.latents.shape[0], 1, 1, 1, 1))}

    def parts(self, role):
        return {"product": lambda networks, batch, draws: networks[role].slope[...] * batch.latents, "squares": None}

    def loss(self, role, networks, batch, draws):
        return jnp.mean(jnp.square(networks[role].slope[...] * batch.latents) * draws), {"metric": jnp.float32(0)}


class Log(RunLog):
    def __init__(self):
        self.written: list[tuple[int, dict[str, float]]] = []

    def write(self, step, scalars):
        self.written.append((step, dict(scalars)))


def begun(**optimizer):
    training = make_training(OptimizerConfig(learning_rate=0.1, **optimizer), updates=4)
    graph, params, frozen = split_model(Line())
    state = create_state({"student": create_role(params, frozen, training)}, seed=0)
    return {"student": graph}, {"student": training}, state


BATCH = Batch(np.arange(4, dtype=np.float32).reshape(4, 1, 1, 1, 1), np.zeros((4, 1, 1), np.float32))


def test_what_there_is_after_each_part():
    """Of an accumulation in two parts, the first: examples 0 and 2."""
    graphs, trainings, state = begun(accumulation=2)
    programs = part_programs(Squares(FlowConfig()), graphs, trainings["student"], "student")
    assert list(programs) == ["product", "squares", "backward", "optimizer"]
    found: dict[str, Any] = {name: program(state, BATCH, state.rng) for name, program in programs.items()}
    np.testing.assert_allclose(found["product"].ravel(), [0.0, 6.0])
    np.testing.assert_allclose(found["squares"][0], 18.0)
    np.testing.assert_allclose(found["backward"][0]["slope"][...], 12.0)
    params, moments, average = found["optimizer"]
    assert jax.tree.structure(moments) == jax.tree.structure(state.roles["student"].optimizer)
    assert params["slope"].shape == average["slope"].shape == ()


def test_what_is_logged(monkeypatch):
    """Each part as what it takes longer than the one before; compiling is not counted."""
    graphs, trainings, state = begun()
    ends = iter([1.0, 0.5, 1.5, 0.25, *(0.001, 0.003, 0.007, 0.002), *(0.001, 0.003, 0.002, 0.002)])
    now = 0.0

    def clock():
        nonlocal now, pending
        pending = not pending
        now += 0.0 if pending else next(ends)
        return now

    pending = False
    monkeypatch.setattr(part_times.time, "perf_counter", clock)
    log = Log()
    times = PartTimes(
        Squares(FlowConfig()), graphs, trainings, batches=lambda step, roles: {"student": BATCH}, log=log, every=3,
        prefix=True,
    )  # fmt: skip
    assert [step for step in range(1, 8) if times.due(step)] == [1, 3, 6]
    times(1, state)
    times(3, state)
    parts = [f"student/seconds_{part}" for part in ("product", "squares", "backward", "optimizer")]
    assert log.written == [
        (1, dict(zip(parts, [0.001, 0.002, 0.004, 0.002], strict=True))),
        (3, dict(zip(parts, [0.001, 0.002, 0.0, 0.002], strict=True))),
    ]


def test_parts_of_a_distillation():
    objective = DMDObjective(DMDConfig())
    assert list(objective.parts("student")) == ["roll_out", "scores"]
    assert list(objective.parts("critic")) == ["roll_out", "forward"]


@pytest.mark.slow
def test_in_a_run(tmp_path, clip):
    """A Self-Forcing run logs them, and is bit for bit the run without."""
    from monarchrt.train.cli import main

    from .conftest import history

    network = ["num_layers=1", "dim=24", "num_heads=2", "ffn_dim=16", "text_dim=4", "text_len=2", "freq_dim=16"]
    common = ["--video", str(clip), "--frames", "3", "--height", "16", "--width", "32", "--patch", "4", "--gap", "1",
              "--held-out", "0.3", "--batch", "2"]  # fmt: skip
    teacher = tmp_path / "teacher"
    assert main(["train", *common, "--folder", str(teacher), "--steps", "1", "--overrides", *network, "--attention",
                 "dense"]) == 0  # fmt: skip
    roles = [word for role in ("student", "critic", "teacher") for word in (f"--{role}.overrides", *network)]
    records = {}
    for name, options in (("with", ["--times-every", "2"]), ("without", [])):
        folder = tmp_path / name
        arguments = ["train", "--objective", "self-forcing", *common, "--block", "1", "--steps", "3", "--folder",
                     str(folder), "--teacher.init-from", str(teacher), *roles, *options]  # fmt: skip
        arguments.insert(arguments.index("--student.overrides") + 1, "causal_block=1")
        assert main(arguments) == 0
        records[name] = history(folder)
    timed = [record for record in records["with"] if "student/seconds_roll_out" in record]
    assert [record["step"] for record in timed] == [1, 2]
    assert {name.rpartition("seconds_")[2] for name in timed[0]} >= {"roll_out", "scores", "backward", "optimizer"}
    assert [record for record in records["with"] if record not in timed] == records["without"]
