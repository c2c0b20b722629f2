"""`train()` called from Python, with a network and data of one's own."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from models.errors import UserError
from models.media.video import read_clip
from train import loop
from train.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig
from train.data import ClipWindows
from train.evaluate import held_out_loss
from train.loop import train
from train.state import create_state
from train.step import make_error_fn

from .conftest import history


class Network(nnx.Module):
    def __init__(self):
        self.proj = nnx.Linear(48, 48, rngs=nnx.Rngs(0))

    def __call__(self, latents, timesteps, text):
        return self.proj(latents)


@pytest.fixture(scope="module")
def source(clip):
    config = DataConfig(frames=3, height=16, width=32, patch=4, gap=1, held_out=0.3)
    return ClipWindows(read_clip(clip, height=16, width=32), config)


def settings(folder, **run) -> TrainConfig:
    defaults = {"steps": 4, "batch": 2, "eval_every": 2, "checkpoint_every": 2, "eval_timesteps": 2}
    return TrainConfig(run=RunConfig(folder=folder, **defaults | run), optimizer=OptimizerConfig(ema_decay=0.5))


def test_the_model_that_is_given_stays_as_it_is(source, tmp_path):
    model = Network()
    before = np.array(model.proj.kernel[...])
    seen = []
    result = train(settings(tmp_path / "run"), source=source, model=model, after_step=lambda n, state: seen.append(n))
    np.testing.assert_array_equal(model.proj.kernel[...], before)
    assert seen == [1, 2, 3, 4]
    assert not np.array_equal(result.state.params["proj"]["kernel"][...], before)
    # the result's model is the moving average
    np.testing.assert_array_equal(result.model.proj.kernel[...], result.state.ema["proj"]["kernel"][...])
    errors = make_error_fn(result.graph, objective=settings(tmp_path).objective)
    again = held_out_loss(
        errors, result.state.ema, result.state.fixed, source, objective=settings(tmp_path).objective, timesteps=2
    )
    assert again == pytest.approx(result.held_out_loss, rel=1e-6)


def test_a_second_run_from_python_repeats_the_first_and_resumes(source, tmp_path):
    train(settings(tmp_path / "one"), source=source, model=Network())
    train(settings(tmp_path / "two", steps=2), source=source, model=Network())
    # a lost config.json does not make a run start over
    (tmp_path / "two" / "config.json").unlink()
    result = train(settings(tmp_path / "two", resume=True), source=source, model=Network())
    assert history(tmp_path / "two") == history(tmp_path / "one")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["run"]["steps"] == 4
    # a finished run has nothing left to do, and says how it ended
    finished = train(settings(tmp_path / "two", resume=True), source=source, model=Network())
    assert finished.held_out_loss == result.held_out_loss
    assert history(tmp_path / "two") == history(tmp_path / "one")


def test_the_state_is_made_where_it_lives(source, tmp_path, monkeypatch):
    """Traced only: of a state that several devices share, none may have to hold the whole, nor twice on a resume."""

    def traced_only(params, fixed, *args, **kwargs):
        assert all(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params))
        made.append(1)
        return create_state(params, fixed, *args, **kwargs)

    made = []
    monkeypatch.setattr(loop, "create_state", traced_only)
    train(settings(tmp_path / "run", steps=2), source=source, model=Network())
    assert len(made) == 2  # its shapes, and the state
    train(settings(tmp_path / "run", resume=True), source=source, model=Network())
    assert len(made) == 3


def test_log_every_thins_the_log(source, tmp_path):
    train(settings(tmp_path / "run", log_every=3), source=source, model=Network())
    assert [record["step"] for record in history(tmp_path / "run") if "loss" in record] == [3, 4]


def test_samples_are_written_for_clips_and_refused_for_latents(source, tmp_path):
    train(settings(tmp_path / "run", sample_every=4), source=source, model=Network())
    assert [path.name for path in (tmp_path / "run/samples").iterdir()] == ["step_000004.mp4"]

    class Latents:
        latent_shape, held_out, fingerprint = source.latent_shape, source.held_out, "x"
        train_batch, held_out_batch = source.train_batch, source.held_out_batch

    with pytest.raises(UserError, match="sample_every is 4"):
        train(settings(tmp_path / "other", sample_every=4), source=Latents(), model=Network())
    assert not (tmp_path / "other").exists()
