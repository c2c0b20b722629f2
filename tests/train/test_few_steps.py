"""A student is generated in the steps that it was distilled at, also where these are uneven."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.generate.config import GenerateConfig, from_stored
from monarchrt.models.generate.load import wan_defaults
from monarchrt.models.generate.plan import make_plan
from monarchrt.models.generate.run_checkpoint import distilled_generation, run_defaults
from monarchrt.models.generate.runs import read_run
from monarchrt.models.media.writer import read_settings
from monarchrt.models.sampling import Rollout, Windows
from monarchrt.models.wan.checkpoints import open_source
from monarchrt.models.wan.checkpoints.settings import trained_from_json
from monarchrt.train.cli import main
from monarchrt.train.model import model_settings
from monarchrt.train.objectives.registry import ObjectiveSettings
from monarchrt.train.objectives.settings import DMDConfig, SelfForcingConfig
from monarchrt.train.run_folder import read_config, write_config

from .conftest import generate

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
    [
        ((), Windows(sampler="few-step", steps=STEPS)),
        (("causal_block=1",), Rollout(steps=STEPS, block=1, window=3, sink_frames=2)),
    ],
)
@pytest.mark.parametrize("format", ["official", pytest.param("orbax", marks=pytest.mark.slow)])
def test_a_model_made_of_it_is_too(student, tmp_path, capsys, network, settings, format):
    """Block by block only if it is causal."""
    config = read_config(student)
    assert config is not None
    model = dataclasses.replace(config.model, overrides=(*config.model.overrides, *network))
    objective: ObjectiveSettings = config.objective
    if network:
        objective = SelfForcingConfig(student_steps=STEPS, shift=5.0, block=1, window=3, sink_frames=2)
    write_config(dataclasses.replace(config, model=model, objective=objective), latents=(3, 4, 8))
    assert main(["convert", str(student), str(tmp_path / "made"), "--to", format]) == 0
    capsys.readouterr()
    source = open_source(tmp_path / "made")
    plan = make_plan(GenerateConfig(), defaults=wan_defaults(source), model=source.config)
    assert plan.settings == settings
    assert plan_of_run(student).settings == settings
    assert "note" not in "".join(plan.notes)
    assert main(["inspect", str(tmp_path / "made")]) == 0
    rolling = ", window 3 with 2 sink frames" if network else ""
    assert f"few-step, 1000 757 522{rolling}\n" in capsys.readouterr().out


def plan_of_run(folder, **given):
    """What `generate` and `serve` make of a run."""
    run, config = read_run(folder), read_config(folder)
    assert config is not None
    sizes = model_settings(config.model)
    return make_plan(GenerateConfig(**given), defaults=run_defaults(run, sizes), model=sizes, spatial=8, temporal=1)


def test_a_run_that_rolled(student):
    """Its window and sinks are the default, also in folders from before these were said beside its steps; what is given
    wins, with a word."""
    config = read_config(student)
    assert config is not None
    model = dataclasses.replace(config.model, overrides=(*config.model.overrides, "causal_block=1"))
    objective = SelfForcingConfig(student_steps=STEPS, shift=5.0, block=1, window=3, sink_frames=2)
    write_config(dataclasses.replace(config, model=model, objective=objective), latents=(9, 4, 8))
    as_trained = Rollout(steps=STEPS, block=1, window=3, sink_frames=2)
    made = plan_of_run(student)
    assert made.settings == as_trained
    assert not [note for note in made.notes if note.startswith("note")]
    again = from_stored(made.config.stored(), source=student)
    assert (again.window, again.sink_frames) == (3, 2)
    made = plan_of_run(student, window=4, sink_frames=0, shift=8.0, steps=3, independent_first_frame=True)
    settings = {"steps": 3, "shift": 8.0, "window": 4, "sink_frames": 0, "independent_first_frame": True}
    assert made.settings == dataclasses.replace(as_trained, **settings)
    assert list(made.notes[1:]) == [
        f"note: {name} is {value}, but this checkpoint was trained with {was}"
        for name, value, was in (
            ("shift", "8", "5"),
            ("steps", "3", "1000 757 522"),
            ("window", "4", "3"),
            ("sink_frames", "0", "2"),
            ("independent_first_frame", "true", "whole blocks of 1 frames"),
        )
    ]
    said = {"few_step": True, "trained": {"steps": list(STEPS), "window": 4}}  # by a LoRA that was trained on it
    sampled = distilled_generation(read_run(student), said)
    assert (sampled.window, sampled.sink_frames, sampled.shift) == (4, 0, 5.0)
    path = student / "config.json"
    values = json.loads(path.read_text())
    assert (values["generation"].pop("window"), values["generation"].pop("sink_frames")) == (3, 2)
    path.write_text(json.dumps(values))
    assert plan_of_run(student).settings == as_trained
    del values["objective"]["window"], values["objective"]["sink_frames"]
    path.write_text(json.dumps(values))
    assert plan_of_run(student).settings == Rollout(steps=STEPS, block=1)
    made = plan_of_run(student, window=4)
    assert made.notes[1:] == (
        "note: window is 4, but this checkpoint was trained with all of the 9 frames of its clips",
    )


@pytest.mark.parametrize(
    "stored", [{"window": 0}, {"window": True}, {"window": 3, "sink_frames": 3}, {"sink_frames": 1}, {"window": "3"}]
)
def test_a_stored_window_that_cannot_be(stored):
    with pytest.raises(ValueError, match="the entry 'trained' of 'monarch' cannot be read"):
        trained_from_json({"trained": stored}, where="config.json")


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
