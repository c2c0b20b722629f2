"""`monarchrt train --plan`: bytes by role and device against counts by hand, and nothing is begun or written."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.memory import Memory, memory, reported
from monarchrt.train.cli import main
from monarchrt.train.config import ModelConfig, TrainConfig
from monarchrt.train.objectives.settings import DMDConfig
from monarchrt.train.plan import Plan, RolePlan, StepPlan, mean_seconds, memory_advice, plan_lines, plan_table

from .conftest import contents

NETWORK = ["num_layers=1", "dim=24", "num_heads=2", "ffn_dim=16", "text_dim=4", "text_len=2", "freq_dim=16"]
LATENTS = (3, 4, 4, 16)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    for number in range(3):
        arrays = {"latents": np.ones(LATENTS, np.float32), "text": np.zeros((2, 4), np.float32)}
        write_arrays(folder / f"{number}.safetensors", arrays, metadata={})
    return folder


def train(*arguments):
    return ["train", *map(str, arguments), "--batch", "2", "--held-out", "0.4", "--steps", "6"]


def test_a_plan_as_json(latents, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = contents(latents)
    arguments = train("--latents", latents, "--folder", "run", "--overrides", *NETWORK, "--attention", "dense")
    assert main([*arguments, "--accumulation", "2", "--remat", "auto", "--plan", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (list(tmp_path.iterdir()), contents(latents)) == ([], before)
    (student,) = found["networks"]
    # one layer: q, k, v, o twice with biases and norms of q and k; a norm of weight and bias; ffn; modulation
    layer = 2 * (4 * (24 * 24 + 24) + 2 * 24) + 2 * 24 + (24 * 16 + 16 + 16 * 24 + 24) + 6 * 24
    patch, text = 4 * 16 * 24 + 24, (4 * 24 + 24) + (24 * 24 + 24)
    time, head = (16 * 24 + 24) + (24 * 24 + 24) + (24 * 144 + 144), 2 * 24 + 24 * 64 + 64
    numbers = layer + patch + text + time + head
    assert student["parameters"] == student["gradient"] == student["average"] == 4 * numbers
    assert student["moments"] - 8 * numbers in (4, 8)  # and counters
    assert student["fixed"] == student["cache"] == 0
    hidden = 4 * 12 * 24  # float32, a clip of 12 tokens: of two, one after the other
    assert 35 * hidden < student["activations"] < 70 * hidden
    (step,) = found["steps"]
    held = step["memory"]
    assert step["roles"] == ["student"]
    assert held["total"] == sum(held[name] for name in ("arguments", "results", "temporary", "code")) == found["most"]
    assert found["estimate"]["rates"]["high"] is None
    (update,) = found["estimate"]["updates"]
    assert (update["role"], update["updates"], list(update["parts"])) == (
        "student", 6, ["forward", "backward", "optimizer"]
    )  # fmt: skip
    assert 0 < update["of_attention"] < update["tflop"]
    assert found["estimate"]["seconds"] == pytest.approx(6 * update["seconds"], rel=1e-3)
    chosen = found["remat"]
    assert (chosen["kind"], chosen["tried"][0]["taken"]) == ("none", held["total"])
    batch = 4 * 2 * (math.prod(LATENTS) + 2 * 4)
    state = 4 * numbers * 4
    assert state + batch < held["arguments"] < state + batch + 200
    assert held["temporary"] > 4 * numbers


@pytest.mark.slow
def test_several_roles_on_a_mesh(latents, tmp_path, capsys, environment):
    """The cache of a roll-out, a frozen teacher of another type, a step of each kind; fsdp halves it."""
    from flax import nnx

    from monarchrt.models.wan import WanModel, wan_config
    from monarchrt.models.wan.checkpoints import save_checkpoint

    config = wan_config("tiny", num_layers=1, dim=96, num_heads=2, ffn_dim=128, text_dim=4, text_len=2, freq_dim=16)
    save_checkpoint(WanModel(config, rngs=nnx.Rngs(0)), tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na bird\n")
    network = [NETWORK[0], "dim=96", NETWORK[2], "ffn_dim=128", *NETWORK[4:]]  # wide enough to be split
    arguments = train(
        "--objective", "self-forcing", "--prompts", tmp_path / "prompts.txt", "--frames", 9, "--height", 32, "--width",
        32, "--rows", 2, "--block", 1, "--folder", tmp_path / "run", "--student.overrides", *network, "causal_block=1",
        "--critic.overrides", *network, "--teacher.overrides", *network, "--teacher.precision", "bf16",
        "--teacher.init-from", tmp_path / "teacher", "--plan", "--json",
    )  # fmt: skip
    files = contents(tmp_path)
    found = {}
    for devices in (1, 2):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        program = "import sys; from monarchrt.train.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, *arguments, *["--mesh", "fsdp=2"] * (devices > 1)]
        process = subprocess.run(command, env=environment | {"XLA_FLAGS": flags}, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        found[devices] = json.loads(process.stdout)
    assert contents(tmp_path) == files
    one, two = ({network["role"]: network for network in found[n]["networks"]} for n in (1, 2))
    assert [step["roles"] for step in found[1]["steps"]] == [["student", "critic"], ["critic"]]
    cache = 4 * 2 * 2 * 3 * 4 * 96  # k and v of two clips of three frames of four tokens
    assert cache < one["student"]["cache"] == one["critic"]["cache"] < 2 * cache
    assert one["teacher"]["parameters"] == 0 < one["teacher"]["fixed"]
    assert one["student"]["average"] > 0 == one["critic"]["average"]
    assert two["student"]["cache"] == one["student"]["cache"] // 2
    assert 0.5 * one["teacher"]["fixed"] < two["teacher"]["fixed"] < 0.7 * one["teacher"]["fixed"]
    assert two["critic"]["moments"] < 0.7 * one["critic"]["moments"]
    assert found[2]["mesh"] == "fsdp=2"


GIB = 2**30
PLAN = Plan(
    devices="2 x card",
    mesh="data=2",
    available=100 * GIB,
    networks=(RolePlan(role="student", parameters=3 * GIB, fixed=0, gradient=3 * GIB, moments=6 * GIB),),
    steps=(StepPlan(roles=("student", "critic"), memory=Memory(12 * GIB, 0, 3 * GIB // 2, 1024), seconds=2.0),),
    advice=("--remat full", "a smaller --batch"),
)


def test_advice_names_the_options_of_the_roles():
    full = ModelConfig(remat="full")
    assert memory_advice(TrainConfig())[0] == "--remat full"
    assert memory_advice(TrainConfig(model=full)) == ("a smaller --batch", "a larger --accumulation", "--mesh fsdp=N")
    several = memory_advice(TrainConfig(model=full, objective=DMDConfig()))
    assert several[0] == "--critic.remat full"
    assert several[2:4] == ("a larger --student.accumulation", "a larger --critic.accumulation")


def test_a_plan_in_words():
    titles, rows = plan_table(PLAN)
    assert titles == ["", "student"]
    assert rows[:4] == [["parameters", "3 GiB"], ["not trained", "-"], ["gradient", "3 GiB"], ["moments", "6 GiB"]]
    assert ["activations (estimate)", "-"] in rows
    step, verdict = plan_lines(PLAN)
    assert "a step that updates student and critic: 13.5 GiB at most" in step
    assert "arguments 12 GiB" in step
    assert verdict == "at most 13.5 GiB on each device, of 100 GiB: it fits"


def test_what_does_not_fit_or_is_not_known():
    small = dataclasses.replace(PLAN, available=9 * GIB)
    assert (PLAN.fits, small.fits) == (True, False)
    assert plan_lines(small)[-1].endswith("of 9 GiB: it does not fit; try --remat full, or a smaller --batch")
    silent = dataclasses.replace(PLAN, steps=(dataclasses.replace(PLAN.steps[0], memory=None),))
    assert plan_lines(silent) == [
        "a step that updates student and critic: this backend's compiler does not report the memory of its program"
    ]
    assert silent.to_dict()["most"] is silent.to_dict()["steps"][0]["memory"] is silent.fits is None


def test_how_long_it_takes_is_said_of_a_run_that_has_begun():
    """By its log, without the steps that compiled: the first, and later ones that took many times as long."""
    log = [{"step": n, "seconds": 2.0 if n % 5 else 6.0} for n in range(2, 102)]
    log[50]["seconds"] = 400.0
    slow = mean_seconds([{"step": 1, "seconds": 90.0}, *log, {"step": 101, "held_out_loss": 1.0}])
    assert slow == pytest.approx((80 * 2.0 + 20 * 6.0 - 2.0) / 99)
    assert mean_seconds([{"step": 1, "seconds": 90.0}]) is None
    begun = dataclasses.replace(PLAN, left=1200, seconds=3.0)
    assert "1200 steps are left; steps took 3 s in the run so far" in plan_lines(begun)[-1]
    assert plan_lines(begun)[-1].endswith(": 1 h 00 min")
    assert begun.to_dict()["seconds_per_step"] == 3.0
    assert PLAN.to_dict()["seconds_per_step"] is None


def test_compilers_that_say_nothing():
    class Silent:
        def memory_analysis(self) -> Any:
            return None

    class Unable:
        def memory_analysis(self) -> Any:
            raise NotImplementedError

    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((4,), "float32")).compile()
    assert reported(program) == memory(program)
    assert reported(Silent()) is reported(Unable()) is None


def test_options(latents, tmp_path, capsys):
    assert main(train("--latents", latents, "--folder", tmp_path / "run", "--json")) == 2
    assert "error: json is for --plan, which was not given" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run/a").touch()
    assert main(train("--latents", latents, "--folder", tmp_path / "run", "--plan")) == 2
    assert "holds other files" in capsys.readouterr().err
