"""What every kind refuses, before anything is computed: the call is checked once, for all of them."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from monarchrt.models.attention.base import NOWHERE, Attention, Context
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


def test_a_kind_without_its_own_part_says_so():
    class Unfinished(DenseAttention):
        attend_clip = Attention.attend_clip

    with pytest.raises(NotImplementedError, match="Unfinished has no attend_clip"):
        Unfinished()(*[jnp.zeros((1, 96, 2, 8))] * 3, grid=GRID, context=NOWHERE)
