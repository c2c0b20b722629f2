"""What every kind refuses, before anything is computed: the call is checked once, for all of them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarchrt.models.attention.base import NO_CONTEXT, Attention, CacheShape, Context
from monarchrt.models.attention.dense import DenseAttention
from monarchrt.models.attention.notation import parse

GRID = (4, 4, 6)
KINDS = (
    "dense",
    "monarch(tile=(1,4,6))",
    "top_k(keep=0.5)",
    "sla(block=8)",
    "vsa(cube=(1,2,2),gate=False)",
    "first_steps(1, dense, top_k(keep=0.5))",
    "first_blocks(1, dense, top_k(keep=0.5))",
    "first_layers(1, dense, top_k(keep=0.5))",
)
LAYER = Context(layer=0, step=0)


def called(kind, tokens, *, context=LAYER, **options):
    """The output's shape for queries, keys and values of these numbers of tokens; nothing runs.

    As users call it, without the check of annotations that tests have, which is first to see unequal numbers.
    """
    call = inspect.unwrap(Attention.__call__)
    arrays = [jax.ShapeDtypeStruct((1, count, 2, 8), jnp.float32) for count in tokens]
    return jax.eval_shape(lambda *qkv: call(parse(kind), *qkv, grid=GRID, context=context, **options), *arrays).shape


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        ((72, 96, 96), r"query has 72 tokens; grid=\(4, 4, 6\) has 96"),
        ((96, 97, 96), r"key has 97 tokens; grid=\(4, 4, 6\) has 96"),
        ((96, 96, 95), r"value has 95 tokens; grid=\(4, 4, 6\) has 96"),
    ],
)
def test_tokens_that_are_not_those_of_the_grid(kind, tokens, said):
    with pytest.raises(ValueError, match=said):
        called(kind, tokens)
    with pytest.raises(ValueError, match=said):
        called(kind, tokens, causal_block=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [0, -3])
def test_a_causal_block_without_a_frame(kind, block):
    with pytest.raises(ValueError, match=f"causal_block={block} must be at least 1, or None"):
        called(kind, (96, 96, 96), causal_block=block)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("key", "dtype", "said"),
    [
        ((1, 96, 2, 4), "float32", r"key has shape \(1, 96, 2, 4\), dtype float32; query has \(1, 96, 2, 8\), float32"),
        ((2, 96, 2, 8), "float32", r"key has shape \(2, 96, 2, 8\)"),
        ((1, 96, 2, 8), "bfloat16", r"key has shape \(1, 96, 2, 8\), dtype bfloat16; query has .*, float32"),
        ((96, 2, 8), "float32", r"key has shape \(96, 2, 8\); it should be \[B, 96, heads, head_dim\]"),
        ((1, 96, 0, 8), "float32", r"key has shape \(1, 96, 0, 8\); .* each at least 1"),
        ((1, 96, 2, 8), "int32", r"key has dtype int32; it should be one of bfloat16"),
    ],
)
def test_arrays_that_do_not_fit_each_other(kind, key, dtype, said):
    call, query = inspect.unwrap(Attention.__call__), jax.ShapeDtypeStruct((1, 96, 2, 8), jnp.float32)
    given = query, jax.ShapeDtypeStruct(key, dtype), query
    with pytest.raises(ValueError, match=said):
        jax.eval_shape(lambda *qkv: call(parse(kind), *qkv, grid=GRID, context=LAYER), *given)


CACHED = [kind for kind in KINDS if not any(word in kind for word in ("_layers", "_blocks", "sla("))]
ORDERED = "sliding_tile(tile=(1,2,2), window=(3,1,3), implementation=xla)"  # tokens are gathered


@pytest.mark.parametrize("kind", [*CACHED, ORDERED])
def test_arrays_of_numpy(kind):
    setting, x = parse(kind), np.random.default_rng(0).standard_normal((3, 1, 96, 2, 8)).astype(np.float32)
    right = setting(*jnp.asarray(x), grid=GRID, context=LAYER)
    found = inspect.unwrap(Attention.__call__)(setting, *x, grid=GRID, context=LAYER)
    np.testing.assert_allclose(found, right, atol=1e-6)
    shape = CacheShape(batch=1, frames=4, height=4, width=6, heads=2, head_dim=8, dtype="float32")
    cache = setting.init_cache(shape).append(jnp.asarray(x[1]), jnp.asarray(x[2]), frame=0)
    np.testing.assert_allclose(setting.attend_cache(cache, x[0], context=LAYER), right, atol=1e-5)


@pytest.mark.parametrize("kind", [*CACHED, ORDERED])
def test_queries_that_do_not_fit_a_cache(kind):
    """Whatever the kind, and whether it would have found out or not."""
    setting, block = parse(kind), jnp.zeros((1, 48, 2, 8))
    empty = setting.init_cache(CacheShape(batch=1, frames=4, height=4, width=6, heads=2, head_dim=8, dtype="float32"))
    filled = empty.append(block, block, frame=0)
    for cache, query, said in (
        (filled, jnp.zeros((1, 48, 3, 8)), r"query has shape \(1, 48, 3, 8\); the cache holds batch 1, heads 2"),
        (filled, jnp.zeros((1, 47, 2, 8)), r"query has shape \(1, 47, 2, 8\); it should be \[1, n\*"),
        (filled, block.astype(jnp.bfloat16), "query has dtype bfloat16, the cache has float32"),
        (filled, jnp.zeros((1, 96, 2, 8)), "query: the cache holds 2 of the 4 frames that it has"),
        (empty, block, "query: the cache holds none of the 2 frames that it has"),
    ):
        with pytest.raises(ValueError, match=said):
            setting.attend_cache(cache, query, context=LAYER)


def test_a_kind_without_its_own_part_says_so():
    class Unfinished(DenseAttention):
        attend_clip = Attention.attend_clip

    with pytest.raises(NotImplementedError, match="Unfinished does not define attend_clip"):
        Unfinished()(*[jnp.zeros((1, 96, 2, 8))] * 3, grid=GRID, context=NO_CONTEXT)
