from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarchrt.models.media.video import read_clip
from monarchrt.train.config import DataConfig
from monarchrt.train.data import ClipWindows
from monarchrt.train.objectives.settings import FlowConfig
from monarchrt.train.pictures import pictures
from monarchrt.train.sample import euler_sample, flow_sampler, make_sampler, sampling_levels, write_held_out_sample
from monarchrt.train.state import split_model

from .test_state import Linear

SHAPE = (2, 2, 3, 3, 5)


@pytest.mark.parametrize("start", [1.0, 0.6])
def test_levels_fall_from_start_to_zero(start):
    levels = sampling_levels(FlowConfig(), steps=7, start=start)
    assert levels.shape == (8,)
    assert levels[0] == pytest.approx(start, rel=1e-6)
    assert levels[-1] == 0
    assert (np.diff(levels) < 0).all()


@pytest.mark.parametrize("start", [1.0, 0.6])
def test_the_true_flow_leads_back_to_the_data(start):
    clean, noise = (jax.random.normal(jax.random.key(seed), SHAPE) for seed in (0, 1))
    levels = sampling_levels(FlowConfig(), steps=5, start=start)
    noised = (1 - start) * clean + start * noise
    sampled = euler_sample(lambda *_: noise - clean, noised, jnp.zeros((2, 1, 1)), levels=levels)
    np.testing.assert_allclose(sampled, clean, atol=1e-5)


def test_more_steps_come_closer_to_the_exact_solution():
    # for data that is always zero, v = x / sigma in x_t = sigma eps; for N(0, 1) data the flow is known too:
    # v = E[eps - x0 | x_t] = (2 sigma - 1) x / (sigma^2 + (1 - sigma)^2), and x_0 has the norm of x_1
    def velocity(latents, timesteps, text):
        sigma = timesteps[:, None, None, None, None] / 1000
        return (2 * sigma - 1) * latents / (sigma**2 + (1 - sigma) ** 2)

    noise = jax.random.normal(jax.random.key(0), SHAPE)
    errors = []
    for steps in (10, 40, 160):
        levels = sampling_levels(FlowConfig(shift=1.0), steps=steps)
        errors.append(float(jnp.abs(euler_sample(velocity, noise, jnp.zeros((2, 1, 1)), levels=levels) - noise).max()))
    assert errors[2] < errors[1] < errors[0]
    assert errors[2] < 0.05


def test_the_network_is_told_the_level():
    seen = []

    def velocity(latents, timesteps, text):
        jax.debug.callback(lambda t: seen.append(float(t[0])), timesteps, ordered=True)
        return latents

    levels = sampling_levels(FlowConfig(), steps=3)
    jax.block_until_ready(euler_sample(velocity, jnp.ones(SHAPE), jnp.zeros((2, 1, 1)), levels=levels))
    jax.effects_barrier()
    np.testing.assert_allclose(seen, 1000 * levels[:-1], rtol=1e-5)


def test_sample_of_a_held_out_window(tmp_path, clip):
    from flax import nnx

    config = DataConfig(frames=3, height=16, width=32, patch=4, gap=1, held_out=0.3)
    source = ClipWindows(read_clip(clip, height=16, width=32), config)

    class Network(Linear):
        def __init__(self, rngs):
            self.proj = nnx.Linear(48, 48, rngs=rngs)

    how: dict[str, Any] = {"pictures": pictures(source, None, every=1), "zoom": 2}
    graph, params, fixed = split_model(Network(nnx.Rngs(0)))
    samplers = {"a": make_sampler(graph, flow_sampler(FlowConfig(), steps=2, start=0.5))}
    path = write_held_out_sample(tmp_path / "samples" / "a.mp4", samplers, params, fixed, source, **how)
    frames = read_clip(path, height=18 + 32, width=64 + 4 + 64)
    assert frames.shape == (3, 50, 132, 3)
    shown = frames[:, 18:, :64].astype(int)
    wanted = source.held_out_window(0).repeat(2, 1).repeat(2, 2)
    assert np.abs(shown - wanted).mean() < 8
    # what the average is of, beside it: another network, of the same noise
    latest = jax.tree.map(jnp.zeros_like, params)
    both = write_held_out_sample(tmp_path / "b.mp4", samplers, params, fixed, source, **how, latest=latest)
    three = read_clip(both, height=18 + 32, width=64 + 2 * (4 + 64))
    assert np.abs(three[:, 18:, :132].astype(int) - frames[:, 18:].astype(int)).mean() < 8
    assert np.abs(three[:, 18:, 136:].astype(int) - frames[:, 18:, 68:].astype(int)).mean() > 8
