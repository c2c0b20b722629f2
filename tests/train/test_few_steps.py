"""A student is generated in the steps that it was distilled at, also where these are uneven."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.load import wan_defaults
from monarchrt.models.generate.plan import make_plan
from monarchrt.models.generate.runs import read_run
from monarchrt.models.media.writer import read_settings
from monarchrt.models.sampling import Rollout, Windows
from monarchrt.models.wan.checkpoints import open_source
from monarchrt.train.cli import main
from monarchrt.train.objectives.settings import DMDConfig
from monarchrt.train.run_folder import read_config, write_config

STEPS = (1000, 757, 522)
CAT = ["--prompt", "a cat on a wall", "--quiet"]


@pytest.fixture
def student(baseline, tmp_path):
    """A run of that objective, as far as its folder is concerned; its weights are another's."""
    folder = tmp_path / "run"
    shutil.copytree(baseline, folder)
    config = read_config(folder)
    assert config is not None
    objective = DMDConfig(student_steps=STEPS, shift=5.0)
    run = dataclasses.replace(config.run, folder=folder)
    write_config(dataclasses.replace(config, objective=objective, run=run), latents=(3, 4, 8))
    return folder


def generate(*arguments):
    return main(["generate", *map(str, arguments)])


def test_a_run_is_sampled_at_its_students_steps(student, tmp_path, capsys):
    quick = ["--checkpoint", student, "--zoom", "1", "--quiet"]
    given = {"own": [], "list": ["--steps", *STEPS], "number": ["--steps", "3"]}
    made = {}
    for name, steps in given.items():
        latents = tmp_path / f"{name}.safetensors"
        assert generate(*quick, *steps, "--out", tmp_path / f"{name}.mp4", "--save-latents", latents) == 0
        made[name] = safetensors.numpy.load_file(latents)["latents"]
    assert "sampler few-step: 3 steps (1000 757 522), shift 5" in capsys.readouterr().err
    np.testing.assert_array_equal(made["own"], made["list"])
    assert np.abs(made["own"] - made["number"]).max() > 1e-3
    assert read_settings(tmp_path / "own.mp4")["steps"] == list(STEPS)


def test_a_folder_that_says_only_how_many(student):
    """As they were written before: the list is that of its objective; of another objective there is only the number."""
    path = student / "config.json"
    values = json.loads(path.read_text())
    assert values["generation"]["steps"] == list(STEPS)
    values["generation"]["steps"] = 3
    path.write_text(json.dumps(values))
    assert read_run(student).generation.steps == STEPS
    del values["objective"]["student_steps"]
    path.write_text(json.dumps(values))
    assert read_run(student).generation.steps == 3


@pytest.mark.parametrize(
    ("network", "settings"),
    [((), Windows(sampler="few-step", steps=STEPS)), (("causal_block=1",), Rollout(steps=STEPS, block=1, window=3))],
)
@pytest.mark.parametrize("format", ["official", pytest.param("orbax", marks=pytest.mark.slow)])
def test_a_model_made_of_it_is_too(student, tmp_path, capsys, network, settings, format):
    """Block by block only if it is causal."""
    config = read_config(student)
    assert config is not None
    model = dataclasses.replace(config.model, overrides=(*config.model.overrides, *network))
    write_config(dataclasses.replace(config, model=model), latents=(3, 4, 8))
    assert main(["convert", str(student), str(tmp_path / "made"), "--to", format]) == 0
    capsys.readouterr()
    source = open_source(tmp_path / "made")
    plan = make_plan(GenerateConfig(), defaults=wan_defaults(source), model=source.config)
    assert plan.settings == dataclasses.replace(settings, window=plan.settings.window)
    assert "note" not in "".join(plan.notes)
    assert main(["inspect", str(tmp_path / "made")]) == 0
    assert "few-step, 1000 757 522" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dmd", "self-forcing"])
def test_a_student_is_distilled_converted_and_generated(wan_folder, tmp_path, objective):
    """Its steps are in the video, which is that of the list given, and not that of as many even steps."""
    rng = np.random.default_rng(0)
    for number in range(2):
        arrays = {"latents": rng.standard_normal((2, 4, 8, 16), np.float32), "text": np.zeros((4, 32), np.float32)}
        write_arrays(tmp_path / "latents" / f"{number}.safetensors", arrays, metadata={})
    causal = objective == "self-forcing"
    arguments = [
        "train",
        "--objective",
        objective,
        "--latents",
        str(tmp_path / "latents"),
        "--steps",
        "1",
        "--batch",
        "1",
    ]
    arguments += ["--held-out", "0.5", "--folder", str(tmp_path / "run"), "--student-steps", *map(str, STEPS)]
    arguments += ["--teacher.init-from", str(wan_folder / "transformer"), "--student.attention", "dense"]
    for role in ("student", "critic", "teacher"):
        blocks = ["causal_block=1"] if causal and role == "student" else []
        arguments += [f"--{role}.overrides", "num_layers=1", "text_len=16", *blocks]
    assert main(arguments + ["--block", "1"] * causal) == 0
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "made")]) == 0
    made = {}
    for name, steps in {"own": [], "list": ["--steps", *STEPS], "number": ["--steps", "3"]}.items():
        options = ["--checkpoint", tmp_path / "made", "--components", wan_folder, *CAT, *steps]
        latents = tmp_path / f"{name}.safetensors"
        assert generate(*options, "--out", tmp_path / f"{name}.mp4", "--save-latents", latents) == 0
        made[name] = safetensors.numpy.load_file(latents)["latents"]
        settings = read_settings(tmp_path / f"{name}.mp4")
        assert settings["mode"] == ("autoregressive" if causal else "bidirectional")
    assert read_settings(tmp_path / "own.mp4")["steps"] == list(STEPS)
    np.testing.assert_array_equal(made["own"], made["list"])
    assert np.abs(made["own"] - made["number"]).max() > 1e-3
