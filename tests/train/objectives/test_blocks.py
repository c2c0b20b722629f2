"""Clips whose first frame is a block of its own: trained, stored and generated alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.plan import Defaults, make_plan
from monarchrt.models.sampling.rollout import Rollout
from monarchrt.models.wan.causal import cached_forward, init_cache
from monarchrt.models.wan.checkpoints import load_checkpoint, save_checkpoint
from monarchrt.models.wan.checkpoints.settings import describe_attention, same_attention
from monarchrt.train.data import Batch
from monarchrt.train.objectives.flow import FlowObjective, evaluation_indices
from monarchrt.train.objectives.settings import FlowConfig

from .networks import assert_same, batch, gradient, wan
from .plain_wan import PlainWan, mixed, tensor

FIRST = {"causal_block": 3, "independent_first_frame": True}
SHAPE = (1, 4, 4, 4, 2)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [[1, 3], [2, 2]])
def test_diffusion_forcing_is_that_of_a_mask(blocks):
    """Loss and gradient in float64 PyTorch; each block of noisy frames sees the noisy frames before it."""
    first = blocks[0] == 1
    config = FlowConfig(frames_per_level=blocks[1], independent_first_frame=first)
    objective, examples = FlowObjective(config), batch(SHAPE)
    student = wan(0, num_layers=2, causal_block=blocks[1], independent_first_frame=first)
    draws = objective.draws(jax.random.key(1), examples)["student"]
    ours, grads = gradient(lambda model: objective.loss("student", {"student": model}, examples, draws)[0], student)()
    plain, number = PlainWan(student), np.repeat([0, 1], blocks)
    x, noise, level = tensor(examples.latents), tensor(draws.noise), np.asarray(draws.level)
    grid = np.arange(1, 1001) / 1000
    grid = 5 * grid / (1 + 4 * grid)
    bell = np.exp(-2 * (grid - 0.5) ** 2)
    weight = (bell - bell.min()) / (bell - bell.min()).mean()
    sigma, text = tensor(grid[level]), tensor(examples.text)
    flow, _ = plain(mixed(x, noise, sigma), 1000 * sigma, text, mask=number[None] <= number[:, None])
    loss = (tensor(weight[level]) * ((flow - (noise - x)) ** 2).mean((2, 3, 4))).mean()
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    assert_same(jax.tree.leaves(grads), plain.gradients(loss), 1e-5)


@pytest.mark.slow
def test_a_whole_clip_is_what_is_generated_block_by_block():
    model, examples = wan(0, "monarch(tile=(1,1,2))", **FIRST), batch(SHAPE)
    latents, text = jnp.asarray(examples.latents), jnp.asarray(examples.text)
    times = jnp.array([[900.0, 300.0, 300.0, 300.0]])
    alone = model.with_config(causal_block=None)

    def by_blocks(alone):
        cache = init_cache(alone, text, frames=4, height=4, width=4)
        flows, start = [], 0
        for number, size in enumerate(Rollout(independent_first_frame=True).blocks(4)):
            part = slice(start, start + size)
            flow, cache = cached_forward(alone, latents[:, part], times[:, part], cache, frame=start, block=number)
            flows, start = [*flows, flow], start + size
        return jnp.concatenate(flows, axis=1)

    whole = jax.jit(lambda model: model(latents, times, text))(model)
    np.testing.assert_allclose(whole, jax.jit(by_blocks)(alone), atol=1e-5)


def test_levels_follow_the_blocks():
    config = FlowConfig(frames_per_level=3, independent_first_frame=True)
    shape = jax.ShapeDtypeStruct((64, 7, 2, 2, 1), jnp.float32)
    level = FlowObjective(config).draws(jax.random.key(0), Batch(shape, shape))["student"].level  # type: ignore
    assert (level[:, 1:4] == level[:, 1:2]).all()
    assert (level[:, 4:] == level[:, 4:5]).all()
    assert (level[:, 0] != level[:, 1]).mean() > 0.9
    assert evaluation_indices(config, 0, 8, 7).tolist() == [0, 5, 5, 5, 2, 2, 2]


def test_it_is_stored_with_the_weights(tmp_path):
    model = wan(0, **FIRST)
    folder = save_checkpoint(model, tmp_path / "causal")
    config = load_checkpoint(folder).config
    assert (config.causal_block, config.independent_first_frame) == (3, True)
    assert "causal_block=3 after the first frame" in describe_attention(config)
    assert not same_attention(config, dataclasses.replace(config, independent_first_frame=False))
    with pytest.raises(ValueError, match="after the first frame"):
        load_checkpoint(folder, config=dataclasses.replace(config, independent_first_frame=False))


def test_generation_cuts_blocks_as_the_network_was_trained():
    config = dataclasses.replace(wan(0, **FIRST).config, in_channels=16, out_channels=16)
    defaults = Defaults(mode="autoregressive", height=32, width=32, frames=81, distilled=True, causal=True)
    settings = GenerateConfig(prompt="a cat", checkpoint="x", height=32, width=32)
    plan = make_plan(settings, defaults=defaults, model=config)
    assert plan.parts == [1, 3, 3, 3, 3, 3, 3]  # the nearest below 81 frames
    with pytest.raises(UserError, match="after the first one"):
        make_plan(dataclasses.replace(settings, frames=81), defaults=defaults, model=config)


def test_a_network_that_cuts_otherwise():
    config = FlowConfig(frames_per_level=3, independent_first_frame=True)
    with pytest.raises(UserError, match="independent_first_frame=true"):
        FlowObjective(config).velocity(wan(0, causal_block=3), jnp.zeros(SHAPE), None)
    with pytest.raises(UserError, match="give frames_per_level"):
        FlowConfig(independent_first_frame=True)
