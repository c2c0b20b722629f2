"""`train()` called from Python, with a network and data of one's own."""

import json
import signal
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.errors import DiskFullError, NonFiniteError, UserError
from monarchrt.models.media.video import read_clip
from monarchrt.train import loop, networks
from monarchrt.train.checkpointing import Checkpoints
from monarchrt.train.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from monarchrt.train.data import ClipWindows
from monarchrt.train.evaluate import held_out_loss
from monarchrt.train.interrupt import Interrupted
from monarchrt.train.loop import train
from monarchrt.train.objectives import base, flow
from monarchrt.train.objectives.flow import draw_noise, flow_loss
from monarchrt.train.objectives.settings import FlowConfig
from monarchrt.train.state import create_role
from tests.untyped import there

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
    defaults: dict[str, Any] = {"steps": 4, "batch": 2, "eval_every": 2, "checkpoint_every": 2, "eval_timesteps": 2}
    return TrainConfig(run=RunConfig(folder=folder, **defaults | run), optimizer=OptimizerConfig(ema_decay=0.5))


def test_a_step_is_traced_once(source, tmp_path, monkeypatch):
    """What is traced before anything is written is the program that runs."""
    traced = []

    class Counted(flow.FlowObjective):
        def loss(self, *given):
            traced.append(given[0])
            return super().loss(*given)

    monkeypatch.setattr(loop, "make_objective", lambda settings: Counted(settings))
    train(settings(tmp_path / "run"), source=source, model=Network())
    assert traced == ["student"]


def test_the_model_that_is_given_stays_as_it_is(source, tmp_path):
    model = Network()
    before = np.array(model.proj.kernel[...])
    seen = []
    result = train(settings(tmp_path / "run"), source=source, model=model, after_step=lambda n, state: seen.append(n))
    np.testing.assert_array_equal(model.proj.kernel[...], before)
    assert seen == [1, 2, 3, 4]
    assert not np.array_equal(result.state.roles["student"].params["proj"]["kernel"][...], before)
    # the result's model is the moving average
    average = result.state.roles["student"].average
    np.testing.assert_array_equal(result.model.proj.kernel[...], average["proj"]["kernel"][...])
    again = held_out_loss(result.model, source, objective=settings(tmp_path).objective, timesteps=2)
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


def test_each_step_reads_its_batch(source, tmp_path):
    """Step n, counted from 1, trains on batch n - 1, also after a resume: no example is left out or seen twice."""
    asked, first = [], []

    class Spied:
        latent_shape, held_out, fingerprint = source.latent_shape, source.held_out, source.fingerprint
        held_out_batch = staticmethod(source.held_out_batch)

        def train_batch(self, step, batch, seed):
            asked.append(step)
            return source.train_batch(step, batch, seed)

    def read(step, state):
        first.append(sorted(set(asked)))

    train(settings(tmp_path / "run", steps=2, prefetch=0), source=Spied(), model=Network(), after_step=read)
    assert first == [[0], [0, 1]]
    asked.clear()
    train(settings(tmp_path / "run", steps=4, resume=True), source=Spied(), model=Network())
    assert asked[-2:] == [2, 3]
    # by its number: the loss of the first step, from the objective's definition
    level, noise = draw_noise(jax.random.fold_in(jax.random.key(0), 0), (2, *source.latent_shape), FlowConfig())
    latents, text = map(jnp.asarray, source.train_batch(0, 2, 0))
    loss = flow_loss(Network(), latents, text, level=level, noise=noise, config=FlowConfig())
    assert history(tmp_path / "run")[0]["loss"] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize(
    ("where", "resume", "message"),
    [
        ("open_source", False, "already holds a run; continue it with --resume"),  # the folder is there: soon locked
        ("make_step", False, "already holds a run; continue it with --resume"),
        ("make_step", True, "was used by another run meanwhile; try again with --resume"),
    ],
)
def test_a_run_that_came_and_went_while_another_started(source, tmp_path, monkeypatch, where, resume, message):
    """The slower one finds the folder free at first; what the other has left by then stays as it is."""
    folder = tmp_path / "run"
    if where == "open_source":
        folder.mkdir()
    module = base if where == "open_source" else loop
    real, left = getattr(module, where), []

    def after_the_other(*args, **kwargs):
        monkeypatch.undo()
        train(settings(folder, steps=2), source=source, model=Network())
        left.append(((folder / "config.json").read_text(), history(folder)))
        return source if where == "open_source" else real(*args, **kwargs)

    monkeypatch.setattr(module, where, after_the_other)
    with pytest.raises(UserError, match=message):
        train(settings(folder, resume=resume), source=None if where == "open_source" else source, model=Network())
    assert left == [((folder / "config.json").read_text(), history(folder))]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["0", "2"]


def test_the_state_is_made_where_it_lives(source, tmp_path, monkeypatch):
    """Traced only: of a state that several devices share, none may have to hold the whole, nor twice on a resume."""

    def traced_only(params, fixed, *args, **kwargs):
        assert all(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params))
        made.append(1)
        return create_role(params, fixed, *args, **kwargs)

    made = []
    monkeypatch.setattr(networks, "create_role", traced_only)
    train(settings(tmp_path / "run", steps=2), source=source, model=Network())
    assert len(made) == 2  # its shapes, and the state
    train(settings(tmp_path / "run", resume=True), source=source, model=Network())
    assert len(made) == 3


class TestHoweverItEnds:
    """The checkpoints are closed, what was being saved is there, and the error is the one that ended the run."""

    @pytest.fixture
    def closed(self, monkeypatch):
        """Steps on disk at the time of each close, which are all that were saved."""
        found: list[list[int]] = []

        class Spied(Checkpoints):
            def close(self):
                super().close()
                found.append(self.steps())

        monkeypatch.setattr(loop, "Checkpoints", Spied)
        return found

    def stop(self, step, state):
        if step == 2:
            raise KeyError("mine")

    def test_well(self, source, tmp_path, closed):
        train(settings(tmp_path / "run"), source=source, model=Network())
        assert closed == [[0, 2, 4]]

    def test_by_the_callers_error(self, source, tmp_path, closed):
        with pytest.raises(KeyError, match="mine"):
            train(settings(tmp_path / "run"), source=source, model=Network(), after_step=self.stop)
        assert closed == [[0, 2]]
        train(settings(tmp_path / "run", resume=True), source=source, model=Network())
        assert closed == [[0, 2], [0, 2, 4]]

    def test_by_numbers_that_are_not_finite(self, source, tmp_path, closed):
        model = Network()
        there(model.proj.bias)[...] = np.inf
        with pytest.raises(NonFiniteError, match=r"a parameter is not finite at step 0: proj\.bias; give --init-from"):
            train(settings(tmp_path / "run"), source=source, model=model)
        assert not closed
        assert not (tmp_path / "run").exists()

    def test_by_settings_that_do_not_fit(self, source, tmp_path, closed):
        train(settings(tmp_path / "run"), source=source, model=Network())
        for changes, message in ({"steps": 3}, "has 4 already"), ({"seed": 1}, "cannot resume: seed is 1"):
            closed.clear()
            with pytest.raises(UserError, match=message):
                train(settings(tmp_path / "run", resume=True, **changes), source=source, model=Network())
            assert closed == [[0, 2, 4]]

    def test_the_error_is_not_hidden_by_one_of_closing(self, source, tmp_path, monkeypatch):
        def fail(self):
            raise DiskFullError("no room")

        monkeypatch.setattr(loop.Checkpoints, "close", fail)
        with pytest.raises(KeyError, match="mine") as raised:
            train(settings(tmp_path / "run"), source=source, model=Network(), after_step=self.stop)
        (note,) = raised.value.__notes__
        assert note.endswith("could not be closed either: no room")
        with pytest.raises(DiskFullError, match="no room"):
            train(settings(tmp_path / "other"), source=source, model=Network())


def test_advice_can_be_pasted(source, tmp_path):
    config = settings(tmp_path / "my run")
    with pytest.raises(Interrupted, match=r"continue with --folder '.*/my run' --resume") as stopped:
        train(config, source=source, model=Network(), after_step=lambda *_: signal.raise_signal(signal.SIGINT))
    assert (stopped.value.step, stopped.value.code) == (1, 130)


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


def test_frames_that_are_not_whole_tokens_are_refused_by_the_options_name(tmp_path, clip):
    data = DataConfig(video=clip, frames=3, height=16, width=24, patch=8, gap=1, held_out=0.3)
    config = TrainConfig(data=data, run=RunConfig(folder=tmp_path / "run"))
    with pytest.raises(UserError, match=r"width is 24, .* not a multiple of 16, .* nearest that are: 16 and 32"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_training_that_was_not_joined_says_so(tmp_path):
    run = RunConfig(folder=tmp_path, coordinator="localhost:1", processes=2, process=0)
    with pytest.raises(UserError, match=r"processes is 2, but JAX has 1; call train within .*joined"):
        train(TrainConfig(run=run))


def test_a_state_that_no_device_holds_is_refused_before_it_is_made(source, tmp_path):
    model = ModelConfig(overrides=("num_layers=1", "dim=131072", "num_heads=2"))
    config = TrainConfig(model=model, run=RunConfig(folder=tmp_path / "run"))
    with pytest.raises(UserError, match=r"^the state of the run takes [\d.]+ TiB on each device, which has .*smaller"):
        train(config, source=source, quiet=True)
    assert not (tmp_path / "run").exists()
