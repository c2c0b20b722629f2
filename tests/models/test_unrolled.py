"""Layers with arrays of their own: the numbers of stacked ones, for generation alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.attention.base import NO_CONTEXT
from monarchrt.models.attention.dense import DenseAttention
from monarchrt.models.attention.notation import parse
from monarchrt.models.sampling import LiveRollout, Rollout
from monarchrt.models.wan import WanModel, cached, count_parameters, wan_config
from monarchrt.models.wan.causal import cached_forward, init_cache, turn_cache
from monarchrt.models.wan.fused import fuses
from monarchrt.models.wan.unrolled import unroll_layers


@pytest.fixture(scope="module")
def text():
    return jax.random.normal(jax.random.key(2), (1, 8, 32))


@pytest.fixture(scope="module")
def model():
    settings = tuple(map(parse, ("dense", "monarch(tile=(3,2,4))", "monarch(tile=(3,2,4))")))
    model = WanModel(wan_config("tiny", num_layers=3, attention=settings), rngs=nnx.Rngs(0))
    kernel = model.head.proj.kernel  # zero at the start, which would make everything equal
    kernel[...] = jax.random.normal(jax.random.key(1), kernel.shape)
    return model


def test_a_rolling_stream_is_the_same(model, text):
    def blocks(model):
        video = LiveRollout(model, text, height=4, width=8, key=jax.random.key(0), rollout=Rollout(window=6, steps=2))
        made = [video.generate() for _ in range(2)]
        video.set_text(-text)
        return np.concatenate([*made, video.generate()], axis=1)

    expected = blocks(model)
    np.testing.assert_allclose(blocks(unroll_layers(model)), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("window", [6, None])
def test_passes_change_nothing(model, text, window):
    """Norms, rotations and writes into the cache in few passes, query, key and value as one product."""
    norms = [model.blocks.self_attn.norm_q, model.blocks.self_attn.norm_k, model.blocks.norm3]
    for number, norm in enumerate(norms):  # ones at the start, which would hide what they weight
        norm.scale[...] += jax.random.normal(jax.random.key(number), norm.scale.shape) / 4

    def blocks(model):
        rollout = Rollout(window=window, steps=2)
        video = LiveRollout(
            model, text, height=4, width=8, key=jax.random.key(0), rollout=rollout, frames=None if window else 9
        )
        return np.concatenate([video.generate() for _ in range(3)], axis=1)

    expected = blocks(unroll_layers(model))
    found = blocks(unroll_layers(model, passes="plain"))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_passes_are_of_caches_in_the_order_of_tokens(model, text, monkeypatch):
    """Others are written as ever."""
    asked = []
    monkeypatch.setattr(cached, "fuses", lambda *given: asked.append(fuses(*given)) or asked[-1])
    settings = tuple(map(parse, ("monarch(tile=(3,1,4))", "monarch(blocks='w,fh')", "monarch(tile=(3,2,4))")))
    model = model.with_attention(settings)

    def flow(layers, unrolled):
        cache = init_cache(unrolled.model, text, frames=3, height=4, width=8, layers=layers)
        latents = jax.random.normal(jax.random.key(3), (1, 3, 4, 8, 16))
        return cached_forward(unrolled.model, latents, jnp.ones(1), cache, in_place=True, layers=layers)[0]

    plain, passes = (unroll_layers(model, passes=name) for name in (None, "plain"))
    found = flow(passes.params.each(), passes)
    assert asked == [False, False, True]
    np.testing.assert_allclose(found, flow(plain.params.each(), plain), atol=1e-5)


def test_layers_are_copies_and_the_rest_is_shared(model):
    unrolled = unroll_layers(model)
    assert len(model.blocks.ffn.fc1.kernel) == len(unrolled.params.arrays) == 3  # the model itself is as it was
    for number, layer in enumerate(unrolled.params.each()):
        assert jnp.array_equal(layer["ffn"]["fc1"]["kernel"][...], model.blocks.ffn.fc1.kernel[number])
    assert unrolled.model.head.proj.kernel[...] is model.head.proj.kernel[...]
    assert sum(leaf.size for leaf in jax.tree.leaves(unrolled.params)) == count_parameters(model)


@pytest.mark.parametrize("passes", [None, "plain"])
def test_models_that_share_arrays_share_what_is_cut(model, passes):
    cut = {}
    networks = model, model.with_attention(parse("dense"))
    first, second = (unroll_layers(network, cut=cut, passes=passes) for network in networks)
    assert second.config.attention == parse("dense")
    pairs = zip(jax.tree.leaves(first.params.arrays), jax.tree.leaves(second.params.arrays), strict=True)
    assert all(one is other for one, other in pairs)


def test_keys_and_values_of_the_text_are_apart_too(model, text):
    """Or each call would cut every layer's out of a stack."""
    unrolled = unroll_layers(model)
    size: Any = dict(frames=3, height=4, width=8)
    stacked = init_cache(model, text, **size).cross[0][0]
    apart = init_cache(unrolled.model, text, **size, layers=unrolled.params.each()).cross
    for keys, layer in zip(stacked, apart, strict=True):
        np.testing.assert_allclose(layer[0][0], keys, atol=1e-6)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Numbered(DenseAttention):
    """Dense, and tells which layer it is in."""

    name = "numbered"

    def attend_cache(self, cache, query, *, layer=None, context=NO_CONTEXT):
        """Times 1, 2, ..."""
        assert context.layer is not None
        return super().attend_cache(cache, query, layer=layer, context=context) * (context.layer + 1)


def test_layers_of_dense_attention_have_caches_of_their_own(model, text):
    """cuDNN reads whole arrays: of a stack every call would copy each layer's keys and values."""
    settings: Any = (Numbered(), Numbered(), parse("monarch(tile=(3,2,4))"))
    model = model.with_attention(settings)
    blocks = jax.random.normal(jax.random.key(3), (3, 1, 3, 4, 8, 16))

    def video(network, layers):
        cache = init_cache(network, text, frames=6, height=4, width=8, rolling=True, layers=layers)
        flows = []
        for latents in blocks:
            how: Any = dict(in_place=True, layers=layers)
            flow, cache = cached_forward(network, latents, jnp.ones(1), cache, **how)
            flows.append(flow)
        return jnp.concatenate(flows, axis=1), turn_cache(cache, frames=3, head_dim=model.config.head_dim)

    unrolled = unroll_layers(model, passes="plain")
    expected, stacked = jax.jit(lambda: video(model, None))()
    found, apart = jax.jit(lambda layers: video(unrolled.model, layers))(unrolled.params.each())
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    for name in ("keys", "values"):
        of_stack, each = getattr(stacked, name), getattr(apart, name)
        assert [x.shape[0] for x in each] == [1, 1, 1]  # two of dense layers, and a stack of one
        own = [x.reshape(x.shape[0], -1) for x in (*of_stack, np.concatenate(each[:2]), each[2])]
        for one, other in zip(own[:2], own[2:], strict=True):
            np.testing.assert_allclose(other, one, atol=1e-5)


def test_a_video_begins_before_the_network_is_put_together(model, text, monkeypatch):
    """Tracing it, for what the cache will take, is a tenth of the wait for the first frames."""
    unrolled = unroll_layers(model)

    def begin():
        return LiveRollout(unrolled, text, height=4, width=8, key=jax.random.key(0), rollout=Rollout(window=6))

    monkeypatch.setattr(nnx, "merge", lambda *halves: pytest.fail("the network was put together"))
    begin()
    monkeypatch.undo()
    assert begin().held == 2 * 3 * (6 * 8 + 8) * 96 * 4 + 4  # keys and values of frames and text; a length


def test_layers_are_read_in_place_only(model, text):
    unrolled = unroll_layers(model)
    layers, latents, times = unrolled.params.each(), jnp.zeros((1, 3, 4, 8, 16)), jnp.zeros(1)
    cache = init_cache(unrolled.model, text, frames=3, height=4, width=8, layers=layers)
    with pytest.raises(ValueError, match="layers need in_place=True"):
        cached_forward(unrolled.model, latents, times, cache, layers=layers)


@pytest.mark.parametrize("attention", ["dense", "monarch(tile=(3,2,4))"])
def test_a_cache_is_of_layers_that_are_apart_or_not(model, text, attention):
    """One made for the others says so, whether the kind keeps each layer's keys by themselves or not."""
    model = model.with_attention(parse(attention))
    unrolled, latents = unroll_layers(model), jnp.zeros((1, 3, 4, 8, 16))
    ways: Any = (dict(model=model), dict(model=unrolled.model, layers=unrolled.params.each()))
    for made, read in (ways, ways[::-1]):
        cache = init_cache(**made, text=text, frames=3, height=4, width=8)
        with pytest.raises(ValueError, match="layers are given to one of init_cache and cached_forward; give them to"):
            cached_forward(**read, latents=latents, timesteps=jnp.zeros(1), cache=cache, in_place=True)


def test_a_model_without_its_layers_says_so(model, text):
    """Or else it would make videos of none."""
    rest, latents, times = unroll_layers(model).model, jnp.zeros((1, 3, 4, 8, 16)), jnp.zeros(1)
    with pytest.raises(ValueError, match="no layers: they are in the UnrolledWan"):
        rest(latents, times, text)
    with pytest.raises(ValueError, match="no layers: they are in the UnrolledWan"):
        init_cache(rest, text, frames=3, height=4, width=8)
