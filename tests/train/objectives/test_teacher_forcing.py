"""Teacher forcing: loss and gradient against the mask over [clean; noisy] in float64 PyTorch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.errors import UserError
from monarchrt.models.wan.causal import cached_forward, init_cache
from monarchrt.models.wan.teacher_forced import teacher_forced
from monarchrt.train.data import Batch
from monarchrt.train.objectives.settings import TeacherForcingConfig
from monarchrt.train.objectives.teacher_forcing import TeacherForcingObjective

from .networks import assert_same, batch, gradient, published_mask, wan
from .plain_wan import PlainWan, mixed, tensor, torch

SHAPE = (2, 4, 4, 4, 2)


def bell(sigma, shift=5.0):
    grid = np.arange(1, 1001) / 1000
    grid = shift * grid / (1 + (shift - 1) * grid)
    y = np.exp(-2 * (grid - 0.5) ** 2)
    return (np.exp(-2 * (sigma - 0.5) ** 2) - y.min()) / (y - y.min()).mean()


@pytest.mark.parametrize(
    ("attention", "blocks", "layers", "augmentation"),
    [
        ("monarch(tile=(1,1,2))", [1, 3], 1, 0.3),  # tiles of one row are exact
        pytest.param("dense", [2, 2], 2, 0.0, marks=pytest.mark.slow),
        pytest.param("dense", [1, 3], 2, 0.3, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient_are_those_of_the_published_mask(attention, blocks, layers, augmentation):
    first = blocks[0] != blocks[1]
    config = TeacherForcingConfig(frames_per_level=blocks[1], context_sigma=augmentation, independent_first_frame=first)
    objective, examples = TeacherForcingObjective(config), batch(SHAPE)
    student = wan(0, attention, num_layers=layers, causal_block=blocks[1], independent_first_frame=first)
    draws = objective.draws(jax.random.key(1), examples)["student"]
    ours, grads = gradient(lambda model: objective.loss("student", {"student": model}, examples, draws)[0], student)()

    plain = PlainWan(student)
    x, noise, context, context_noise = (
        tensor(a) for a in (examples.latents, draws.noise, draws.context, draws.context_noise)
    )
    u = (tensor(draws.level) + 1) / 1000
    sigma = 5 * u / (1 + 4 * u)
    both = torch.cat([mixed(x, context_noise, context), mixed(x, noise, sigma)], 1)
    told = 1000 * torch.cat([context, sigma], 1)
    mask, places = published_mask(blocks), np.tile(np.arange(4), 2)
    flow, _ = plain(both, told, tensor(examples.text), positions=places, mask=mask)
    errors = ((flow[:, 4:] - (noise - x)) ** 2).mean((2, 3, 4))
    loss = (tensor(bell(sigma.numpy())) * errors).mean()
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-5)
    assert_same(jax.tree.leaves(grads), plain.gradients(loss), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "attention",
    [
        "monarch(tile=(1,2,2))",
        "first_blocks(1, dense, monarch(tile=(2,1,2)))",
        "vsa(keep=0.5, cube=(1,2,2))",
        "sla(keep=0.5, block=4)",
        "top_k(keep=0.5)",
    ],
)
def test_a_block_sees_what_the_cache_has_in_generation(attention):
    """Each block after the clean ones in a cache; and its gradient reaches the clean clip."""
    model, examples = wan(0, attention, causal_block=2), batch(SHAPE)
    clean, text = jnp.asarray(examples.latents), jnp.asarray(examples.text)
    noisy = clean[::-1]
    times = jnp.repeat(jnp.array([[900.0, 300.0]]), 2, axis=1).repeat(2, axis=0)

    @jax.jit
    def by_blocks(model):
        alone = model.with_config(causal_block=None)
        cache = init_cache(alone, text, frames=4, height=4, width=4)
        flows = []
        for number, start in enumerate((0, 2)):
            where: Any = dict(frame=start, block=number)
            flow, _ = cached_forward(alone, noisy[:, start : start + 2], times[:, start : start + 2], cache, **where)
            _, cache = cached_forward(alone, clean[:, start : start + 2], jnp.zeros((2, 2)), cache, **where)
            flows.append(flow)
        return jnp.concatenate(flows, axis=1)

    def squared(clean):
        flow = teacher_forced(model, noisy, times, clean, text)
        return jnp.sum(flow[:, 2:] ** 2), flow

    grads, flow = jax.jit(jax.grad(squared, has_aux=True))(clean)
    np.testing.assert_allclose(flow, by_blocks(model), atol=1e-5)
    assert np.abs(grads[:, :2]).max() > 1e-4
    assert not np.any(grads[:, 2:]), "the last block is seen by none"


def test_draws_are_one_for_a_block():
    config = TeacherForcingConfig(frames_per_level=3, context_sigma=0.2, independent_first_frame=True)
    shape = jax.ShapeDtypeStruct((64, 7, 2, 2, 1), jnp.float32)
    draws = TeacherForcingObjective(config).draws(jax.random.key(0), Batch(shape, shape))["student"]  # type: ignore
    for level in (draws.level, draws.context):
        assert (level[:, 1:4] == level[:, 1:2]).all()
        assert (level[:, 4:] == level[:, 4:5]).all()
        assert len(np.unique(level[:, [0, 1, 4]])) > 100
    assert 0.15 < draws.context.max() < 0.2
    assert abs(np.corrcoef(np.ravel(draws.noise), np.ravel(draws.context_noise))[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("changes", "network", "frames", "word"),
    [
        ({}, {}, 6, "causal_block is None; give --overrides causal_block=3"),
        ({"frames_per_level": 2}, {"causal_block": 3}, 6, "frames_per_level is 2, but the network's causal_block is 3"),
        ({}, {"causal_block": 3}, 4, "frames_per_level is 3, which does not divide the 4 frames"),
        ({"independent_first_frame": True}, {"causal_block": 3}, 7, "independent_first_frame=true"),
        ({"independent_first_frame": True}, {"causal_block": 3, "independent_first_frame": True}, 6, "4 or 7"),
    ],
)
def test_blocks_that_do_not_fit(changes, network, frames, word):
    objective = TeacherForcingObjective(TeacherForcingConfig(**changes))
    examples = batch((1, frames, *SHAPE[2:]))
    with pytest.raises(UserError, match=word):
        jax.eval_shape(
            lambda model: objective.loss(
                "student", {"student": model}, examples, objective.draws(jax.random.key(0), examples)["student"]
            )[0],
            nnx.eval_shape(lambda: wan(0, **network)),
        )


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"context_sigma": 1.0}, "context_sigma is 1.0"), ({"frames_per_level": None}, "frames_per_level is None")],
)
def test_bad_settings(settings, word):
    with pytest.raises(UserError, match=word):
        TeacherForcingConfig(**settings)
