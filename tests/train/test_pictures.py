"""What a run on latents shows: its held-out clips and what it makes of them, through the VAE that is named."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.errors import UserError
from monarchrt.models.generate.decoders import WanDecoder
from monarchrt.models.media.video import read_clip
from monarchrt.models.vae import load_vae
from monarchrt.train.config import DataConfig, RunConfig, TrainConfig
from monarchrt.train.data import LatentFolder
from monarchrt.train.loop import plan, train
from monarchrt.train.objectives.ode import ODEObjective
from monarchrt.train.objectives.settings import ODEConfig
from monarchrt.train.pictures import pictures
from monarchrt.train.sample import write_held_out_sample


class Network(nnx.Module):
    def __init__(self, channels: int = 16):
        self.proj = nnx.Linear(channels, channels, rngs=nnx.Rngs(0))

    def __call__(self, latents, timesteps, text):
        return self.proj(latents)


def written_to(folder: Path, *, channels: int) -> Path:
    """Three examples of 4 x 2 x 4."""
    folder.mkdir()
    for number in range(3):
        x = np.random.default_rng(number).standard_normal((4, 2, 4, channels), np.float32)
        arrays = {"latents": x, "text": np.zeros((2, 32), np.float32)}
        write_arrays(folder / f"{number}.safetensors", arrays, metadata={})
    return folder


@pytest.fixture
def latents(tmp_path):
    return written_to(tmp_path / "latents", channels=16)


def settings(folder, latents, **data) -> TrainConfig:
    run = RunConfig(folder=folder, steps=2, batch=1, eval_every=2, eval_timesteps=1, eval_windows=1, sample_every=2)
    return TrainConfig(run=run, data=DataConfig(latents=latents, **data))


def held_out(folder) -> np.ndarray:
    return LatentFolder(folder, DataConfig(latents=folder)).held_out_batch([0]).latents[0]


def test_latents_are_shown_by_their_vae(latents, wan_folder):
    """The clip in parts is the clip whole, of the newest frames of what is held out."""
    source = LatentFolder(latents, DataConfig(latents=latents))
    shown = pictures(source, wan_folder, every=1)
    assert shown is not None
    assert shown.clip is not None
    decoder = WanDecoder(load_vae(wan_folder / "vae"))
    whole, _ = decoder.decode(jnp.asarray(held_out(latents)[None]), decoder.start(1, 2, 4))
    assert whole.shape == (1, 13, 16, 32, 3)
    for frames in (shown.decode(held_out(latents)), shown.clip(0, held_out(latents))):
        assert np.abs(frames.astype(int) - np.asarray(whole[0], int)).max() <= 1
    assert pictures(source, wan_folder, every=1, load=False) is None


def test_a_sample_of_latents(latents, wan_folder, tmp_path):
    """Of pairs, whose states lie one after the other, the end is shown, and as many frames are made."""
    source, x = LatentFolder(latents, DataConfig(latents=latents)), held_out(latents)

    seen: list[Any] = []

    def sampler(network, states, text, noise):
        seen.append((states, noise))
        return states[:, -2:]

    shown = pictures(source, wan_folder, every=1)
    assert shown is not None

    def written(name, **changes):
        of = dataclasses.replace(shown, **changes)
        write_held_out_sample(tmp_path / name, {"a": sampler_of}, {}, {}, source, pictures=of)
        return tmp_path / name

    sampler_of = lambda params, frozen, *arrays: sampler(None, *arrays)  # noqa: E731
    both = read_clip(written("a.mp4"), height=16 + 18, width=64 + 4)
    assert both.shape[0] == 5  # 1 + 4
    end = shown.decode(x[-2:])
    for begin in (0, 36):
        assert np.abs(both[:, 18:, begin : begin + 32].astype(int) - end).mean() < 25
    alone = read_clip(written("b.mp4", clip=None), height=16 + 18, width=32)
    assert np.abs(alone[:, 18:].astype(int) - end).mean() < 25
    states, noise = seen[0]
    assert states.shape == noise.shape == (1, 4, 2, 4, 16)


def test_a_run_on_latents_writes_videos(latents, wan_folder, tmp_path):
    config = settings(tmp_path / "run", latents, components=wan_folder)
    train(config, model=Network())
    (path,) = (tmp_path / "run/samples").iterdir()
    assert path.name == "step_000002.mp4"
    assert read_clip(path, height=16 + 18, width=5 * 32 + 4 * 4).shape[0] == 13  # clip, two ways, two networks


def test_a_student_of_pairs_is_sampled_as_one_clip():
    """Not as all of its states one after the other, of which its noise would be."""
    objective = ODEObjective(ODEConfig(student_steps=(1000, 500)))
    (sampler,) = objective.samplers().values()
    states = jnp.zeros((1, 3 * 2, 2, 2, 4))
    made = sampler(Network(4), states, jnp.zeros((1, 1, 4)), jax.random.normal(jax.random.key(0), states.shape))
    assert made.shape == (1, 2, 2, 2, 4)


def test_what_cannot_be_shown(latents, wan_folder, tmp_path):
    """Before anything is computed or written, with `plan` too."""
    source = LatentFolder(latents, DataConfig(latents=latents))
    with pytest.raises(UserError, match=r"sample_every is 3, but latents are shown .* give its folder with components"):
        pictures(source, None, every=3)
    with pytest.raises(UserError, match="lacks: VAE"):
        pictures(source, tmp_path, every=3, load=False)

    other = LatentFolder(folder := written_to(tmp_path / "other", channels=48), DataConfig(latents=folder))
    with pytest.raises(UserError, match=r"components .* decodes latents of 16 channels, and these have 48"):
        pictures(other, wan_folder, every=3)
    config = settings(tmp_path / "run", latents)
    for begin in (train, plan):
        with pytest.raises(UserError, match="sample_every is 2, but latents are shown"):
            begin(config, source=source)
    assert not config.run.folder.exists()
