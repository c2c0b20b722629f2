"""Run folders are read without what trains them, and say to the models made of them what they were trained on."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.load import open_wan, wan_defaults
from monarchrt.models.generate.plan import make_plan
from monarchrt.models.generate.run_checkpoint import held_out_window
from monarchrt.models.generate.runs import find_run, read_run
from monarchrt.models.wan.checkpoints import inspect_checkpoint
from monarchrt.train.cli import main
from monarchrt.train.config import DataConfig
from monarchrt.train.data import ClipWindows
from monarchrt.train.export import run_model
from monarchrt.train.run_folder import read_config
from monarchrt.train.sources import open_source

from .test_runs_written_before import WRITTEN

WITHOUT_TRAIN = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("train", "tyro") or name.startswith("monarchrt.train"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.load import load_material
material = load_material(GenerateConfig(checkpoint=sys.argv[1], mode="windows", frames=3, steps=1))
parts = list(material.pipeline(material.text, **material.options()))
print(sum(map(len, parts)), parts[0][0].mean())
from monarchrt.models.generate.run_arrays import run_network
from monarchrt.models.generate.runs import find_run
from pathlib import Path
print(run_network(find_run(Path(sys.argv[2]))).config.dim)
"""


def test_generation_does_not_import_train(baseline, environment):
    """A run of today with its own clip, and one from before there were roles."""
    command = [sys.executable, "-c", WITHOUT_TRAIN, str(baseline), str(WRITTEN / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shape, old = done.stdout.splitlines()
    assert shape.startswith("3 ")
    first = held_out_window(read_run(baseline))[0]
    assert float(shape.rpartition(" ")[2]) == pytest.approx(first.mean(), abs=0.5)  # the video begins with it
    assert old == "12"


def test_it_reads_what_training_wrote(baseline):
    """The settings and the held-out window of the training side."""
    run, config = find_run(baseline), read_config(baseline)
    assert run is not None
    assert config is not None
    for name in vars(run.data):
        assert getattr(run.data, name) == getattr(config.data, name), name
    assert run.attention == config.model.attention_text()
    assert run.overrides == config.model.override_values()
    assert run.generation.latents == (3, 4, 8)
    assert run.generation.shift == config.objective.generation.shift
    source = open_source(config.data)
    assert isinstance(source, ClipWindows)
    np.testing.assert_array_equal(held_out_window(run), source.held_out_window(0))


def test_settings_that_are_there_no_longer(baseline, tmp_path):
    """Files written before say less; what they leave out is what it was then."""
    run = tmp_path / "run"
    shutil.copytree(baseline, run)
    values = json.loads((run / "config.json").read_text())
    del values["generation"], values["data"]["fps"]
    values["objective"] = {"shift": 3.0, "frames_per_level": 1}
    values["model"] |= {"attention": "monarch", "tile": [1, 2, 2], "num_iters": 1}
    (run / "config.json").write_text(json.dumps(values))
    found = find_run(run)
    assert found is not None
    assert (found.generation.shift, found.generation.level_per_frame, found.generation.latents) == (3.0, True, None)
    assert found.attention == "monarch(tile=(1,2,2))"
    assert found.data.fps == 0.0
    assert main(["train", "--folder", str(tmp_path / "new"), "--config", str(run / "config.json"), "--steps", "0"]) == 2


def test_the_export_is_the_same_network(baseline):
    import jax
    from flax import nnx

    ours, theirs = run_model(baseline, read_config(baseline)), run_model(baseline)
    for a, b in zip(jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(theirs)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def trained_on_latents(tmp_path_factory):
    """A run on latents [3, 4, 6, 16], whose folder is gone, with a shift of its own."""
    folder = tmp_path_factory.mktemp("latents")
    for n in range(3):
        example = {"latents": np.full((3, 4, 6, 16), n, np.float32), "text": np.zeros((4, 32), np.float32)}
        safetensors.numpy.save_file(example, folder / f"{n}.safetensors")
    run = folder.parent / "run on latents"
    options = ["--batch", "1", "--steps", "1", "--eval-windows", "1", "--eval-timesteps", "1", "--shift", "3"]
    sizes = [
        "--overrides",
        "num_layers=1",
        "dim=24",
        "num_heads=2",
        "ffn_dim=48",
        "text_len=4",
        "--tile",
        "3",
        "2",
        "3",
    ]
    assert main(["train", "--latents", str(folder), "--folder", str(run), *options, *sizes]) == 0
    shutil.rmtree(folder)
    return run


@pytest.mark.parametrize("to", ["official", "diffusers", "orbax"])
def test_a_converted_run_knows_its_size(trained_on_latents, tmp_path, to):
    """Plain `generate` then fits the tile; and a conversion of the conversion keeps it."""
    made, again = tmp_path / "made", tmp_path / "again"
    assert main(["convert", str(trained_on_latents), str(made), "--to", to]) == 0
    assert main(["convert", str(made), str(again), "--to", "official"]) == 0
    for path in (made, again):
        source = open_wan(GenerateConfig(checkpoint=str(path))).source
        plan = make_plan(GenerateConfig(), defaults=wan_defaults(source), model=source.config)
        config = plan.config
        assert (config.frames, config.height, config.width, config.shift) == (9, 32, 48, 3.0)
        assert "shift 3 (of the run that it was trained in)" in plan.notes[0]
        assert "trained on  3 x 4 x 6 latents" in inspect_checkpoint(path).lines()


def test_what_is_stored_is_checked(trained_on_latents, tmp_path):
    made = tmp_path / "made"
    assert main(["convert", str(trained_on_latents), str(made)]) == 0
    values = json.loads((made / "config.json").read_text())
    sizes = ({"latents": [1, 2]}, {"latents": [0, 2, 3]})
    for wrong in (3, *sizes, {"shift": -1}, {"shift": "5"}, {"steps": [1, 2]}, {"steps": 10**9}):
        values["monarch"]["trained"] = wrong
        (made / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=r"config.json: the entry 'trained' of 'monarch' cannot be read"):
            inspect_checkpoint(made)


def test_data_config_has_what_the_reader_asks_for():
    from monarchrt.models.generate.runs import RunData

    theirs = {name: field.default for name, field in DataConfig.__dataclass_fields__.items()}
    for name, field in RunData.__dataclass_fields__.items():
        assert theirs[name] == field.default, name
