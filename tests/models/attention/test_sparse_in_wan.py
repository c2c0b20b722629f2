"""Each kind that leaves keys out, in a small Wan model: a step of training, then blocks over a cache."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from monarchrt.models.attention.notation import parse
from monarchrt.models.attention.registry import names
from monarchrt.models.sampling.rollout import LiveRollout, Rollout
from monarchrt.models.wan.causal import cached_forward, init_cache
from tests.models import conftest as wan

H, W = 4, 6  # tokens of a frame
KINDS = (
    "top_k(keep=0.3)",
    "svg(keep=0.2, block=4, rows=6)",
    "svg2(query_clusters=5, key_clusters=9, top_p=0.6, min_keep=0.2, iterations=2)",
    "radial(decay=0.5, block=5)",
    "sliding_tile(tile=(1,2,2), window=(3,1,3))",
    "vsa(keep=0.3, cube=(3,2,4))",
    "sla(keep=0.6, block=16)",
    "first_steps(1, dense, vsa(keep=0.3, cube=(1,2,2), gate=False))",
)


def test_none_was_forgotten():
    apart = {"dense", "monarch", "first_layers", "first_steps", "first_blocks", "per_layer", "gated"}
    assert set(names()) - apart == {text.partition("(")[0] for text in KINDS} - {"first_steps"}


QUICK = ("vsa(", "first_steps(")


@pytest.mark.parametrize(
    "text", [pytest.param(text, marks=() if text.startswith(QUICK) else pytest.mark.slow) for text in KINDS]
)
def test_a_step_and_blocks_over_a_cache(text):
    """The trained model gives for the whole clip, block-causal, what it gives block by block."""
    config = dataclasses.replace(wan.SMALL, num_layers=1, attention=parse(text), causal_block=3)
    model = wan.random_model(config)
    rng = np.random.default_rng(0)
    latents = jnp.asarray(rng.standard_normal((2, 6, 2 * H, 2 * W, 5)), jnp.float32)
    times, words = jnp.full((2, 6), 300.0), jnp.asarray(rng.standard_normal((2, 7, 20)), jnp.float32)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            out = model(latents, times, words)
            return jnp.square(out - 1.0).mean(), out

        (value, out), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
        optimizer.update(model, gradients)
        return value, out, gradients

    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    before, _, gradients = step(model, optimizer)
    for path, leaf in nnx.to_flat_state(gradients):
        values = np.asarray(leaf[...])
        assert np.isfinite(values).all(), path
        if path[:2] == ("blocks", "self_attn"):  # the gate's too; keys have no use for a bias
            assert np.abs(values).max() > (0 if "bias" in path and "k" in path else 1e-7), path
    after, whole, _ = step(model, optimizer)
    assert after < before
    whole = nnx.jit(lambda model: model(latents, times, words))(model)
    cache = init_cache(model, words, frames=6, height=2 * H, width=2 * W)
    forward = nnx.jit(partial(cached_forward, in_place=True))
    for number in range(2):
        rows = slice(3 * number, 3 * number + 3)
        where = {"frame": jnp.int32(3 * number), "block": jnp.int32(number), "step": jnp.int32(1)}
        out, cache = forward(model, latents[:, rows], times[:, rows], cache, **where)
        np.testing.assert_allclose(out, whole[:, rows], atol=2e-5)


@pytest.mark.parametrize("text", ["radial(keep=0.4, block=6)", "first_steps(1, dense, svg(keep=0.25, block=24))"])
def test_a_block_may_be_too_small_for_what_the_clip_keeps(text):
    """The mask is the clip's: 3 of its 6 frames alone could not keep so little."""
    model = wan.random_model(dataclasses.replace(wan.SMALL, num_layers=1, out_channels=5, attention=parse(text)))
    size: dict[str, Any] = {"frames": 6, "height": 2 * H, "width": 2 * W}
    with pytest.raises(ValueError, match="is out of reach o"):
        parse(text).check((3, H, W))
    latents, words = jnp.zeros((1, 3, 2 * H, 2 * W, 5)), jnp.zeros((1, 7, 20))

    @jax.eval_shape
    def out():
        return cached_forward(model, latents, jnp.zeros((1, 3)), init_cache(model, words, **size))[0]

    assert out.shape == latents.shape
    rollout = Rollout(block=3, sampler="euler", steps=2)
    LiveRollout(model, words, rollout=rollout, key=jax.random.key(0), **size)
