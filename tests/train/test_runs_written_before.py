"""Run folders whose checkpoints hold one network, without roles."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.wan.checkpoints import load_checkpoint
from monarchrt.train.checkpointing import Checkpoints
from monarchrt.train.cli import main
from monarchrt.train.export import find_run, run_model

from .conftest import history

# made by commit 021ad92: `run` stopped after 2 of the 4 steps of `whole.jsonl`
WRITTEN = Path(__file__).parent / "written_before"


@pytest.fixture
def old(tmp_path) -> Path:
    """A copy, with the latents where they are now."""
    shutil.copytree(WRITTEN, tmp_path / "old")
    return tmp_path / "old"


def test_it_is_in_the_old_form():
    arrays = json.loads((WRITTEN / "run/checkpoints/2/about/metadata").read_text())["arrays"]
    assert {name.split(".")[0] for name in arrays} == {"step", "params", "optimizer", "ema", "rng"}
    config = json.loads((WRITTEN / "run/config.json").read_text())
    assert "name" not in config["objective"]
    assert "trainable" not in config["optimizer"]


def test_it_resumes(old):
    """What follows is what that version's own run had; another CPU may round otherwise."""
    options = ["--latents", str(old / "latents"), "--steps", "4"]
    assert main(["train", "--folder", str(old / "run"), "--resume", *options]) == 0
    expected = [json.loads(line) for line in (WRITTEN / "whole.jsonl").read_text().splitlines()]
    for record, wanted in zip(history(old / "run"), expected, strict=True):
        wanted.pop("seconds", None)
        later = {name for name in record if name.startswith("grad_norm_")}  # by groups, which it had not
        assert {name: value for name, value in record.items() if name not in later} == pytest.approx(wanted, rel=1e-5)
    # and from here on it is in today's form
    names = json.loads((old / "run/checkpoints/4/about/metadata").read_text())["arrays"]
    assert "roles.student.average.head.proj.kernel" in names
    assert main(["train", "--folder", str(old / "run"), "--resume", "--steps", "5"]) == 0


def test_every_array_is_taken_as_it_is(old):
    """Parameters, averages, moments, step and key; the number of updates is that of steps."""
    from monarchrt.models.checkpoints.checksums import checksums
    from monarchrt.train.config import TrainConfig
    from monarchrt.train.networks import Networks
    from monarchrt.train.objectives.registry import make_objective
    from monarchrt.train.sharding import Placement
    from monarchrt.train.state import to_arrays

    config = find_run(old / "run")
    assert isinstance(config, TrainConfig)
    placement = Placement(batch=2, accumulation=2)
    networks = Networks(config, make_objective(config.objective), channels=4, placement=placement, models={})
    with Checkpoints(old / "run", read_only=True) as checkpoints:
        state = checkpoints.restore(networks.template, check=lambda *_: None, note=pytest.fail)
    assert state is not None
    found = {name: int(value) for name, value in checksums(to_arrays(state)).items()}
    written = json.loads((WRITTEN / "run/checkpoints/2/about/metadata").read_text())["arrays"]
    today = {"params": "params", "ema": "average", "optimizer": "optimizer"}
    for name, value in written.items():
        part, dot, rest = name.partition(".")
        assert found.pop(f"roles.student.{today[part]}{dot}{rest}" if dot else name) == value["checksum"], name
    assert found.keys() == {"roles.student.updates"}
    assert int(state.roles["student"].updates) == 2


@pytest.mark.slow
def test_it_is_exported_and_finetuned_from(old, capsys):
    run = find_run(old / "run")
    assert run is not None
    model = run_model(old / "run", run)
    assert main(["convert", str(old / "run"), str(old / "made")]) == 0
    for one, other in zip(
        jax.tree.leaves(nnx.state(load_checkpoint(old / "made"))), jax.tree.leaves(nnx.state(model)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert main(["inspect", str(old / "made")]) == 0
    overrides = json.loads((WRITTEN / "run/config.json").read_text())["model"]["overrides"]
    options = ["--init-from", str(old / "run"), "--latents", str(old / "latents"), "--overrides", *overrides]
    sizes = ["--tile", "1", "2", "2", "--batch", "2", "--eval-windows", "1", "--eval-timesteps", "2", "--steps", "1"]
    level = ["--frames-per-level", "1", "--folder", str(old / "finetuned")]
    assert main(["train", *options, *sizes, *level]) == 0
    before = [json.loads(line) for line in (WRITTEN / "whole.jsonl").read_text().splitlines()]
    measured = next(record["held_out_loss"] for record in before if "held_out_loss" in record)
    assert history(old / "finetuned")[0] == {"step": 0, "held_out_loss": pytest.approx(measured, rel=1e-5)}
