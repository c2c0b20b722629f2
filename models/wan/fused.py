"""Layers for generation: one product for query, key and value, and fused passes between products (`passes`)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from monarch_jax import MonarchKVCache
from monarchrt.models.sharding import parts
from monarchrt.models.wan.kept import kept
from monarchrt.models.wan.kinds import PLACE
from monarchrt.models.wan.layers import SelfAttention, WanBlock
from monarchrt.models.wan.passes import gated_norm, norm_rotate_write


class JoinedAttention(SelfAttention):
    """Self-attention that computes queries, keys and values in one product, with weights concatenated in advance."""

    def __init__(self, attention: SelfAttention, join: Callable[..., Array] = lambda *x: jnp.concatenate(x, axis=-1)):
        self.num_heads = attention.num_heads
        each = attention.q, attention.k, attention.v
        self.joined = nnx.merge(*nnx.split(attention.q))
        self.joined.out_features = 3 * attention.q.out_features
        self.joined.kernel = nnx.Param(join(*(linear.kernel[...] for linear in each)))
        self.joined.bias = nnx.Param(join(*(linear.bias[...] for linear in each if linear.bias is not None)))
        self.o, self.norm_q, self.norm_k = attention.o, attention.norm_q, attention.norm_k
        if hasattr(attention, PLACE):
            setattr(self, PLACE, getattr(attention, PLACE))

    def products(self, x: Float[Array, "B F T D"]) -> tuple[tuple[Array, int], ...]:
        """See `SelfAttention`."""
        joined, width = kept(self.joined(x)), self.joined.out_features // 3
        return (joined, 0), (joined, width), (joined, 2 * width)


def joined_block(block: WanBlock, join: Callable[..., Array]) -> WanBlock:
    """Joins query, key and value of a block into one product, if they are plain dense layers with biases."""
    attention = block.self_attn
    linears = [getattr(attention, name, None) for name in "qkv"]
    if all(type(linear) is nnx.Linear and linear.bias is not None for linear in linears):
        block.self_attn = JoinedAttention(attention, join)
    return block


class Pending(NamedTuple):
    """A residual stream with a branch that has not been added to it yet."""

    x: Array  # [B, F, S, D]
    y: Array | None = None  # [B, F, S, D], output of the branch
    table: Array | None = None  # [1, 6, D], modulation table of the layer that computed y; its last row is the gate


def settled(pending: Pending, time: Float[Array, "B T 6 D"]) -> Float[Array, "B F S D"]:
    """The residual stream after adding the pending branch."""
    x, y, table = pending
    if y is None or table is None:
        return x
    gate = (time[:, :, 5] + table[:, 5].astype(time.dtype)[None])[:, :, None]
    return (x.astype(time.dtype) + y.astype(time.dtype) * gate).astype(x.dtype)


def fuses(block: WanBlock, cache: Any) -> bool:
    """Whether `fused_block` supports a layer with this cache: stored in token order, on one device.

    Frames are then contiguous groups of rows, so that the row of a token follows from its index.
    """
    if block.passes is None or parts("heads", block.self_attn.num_heads) > 1 or parts("tokens", 0) > 1:
        return False
    return isinstance(cache, MonarchKVCache) and cache.in_token_order and cache.key.dtype == block.dtype


def fused_block(
    block: WanBlock,
    pending: Pending,
    time: Float[Array, "B T 6 D"],
    keys_values: Any,
    attend: Callable[[Array, Array], Array],
) -> Pending:
    """Computes a block as `WanBlock` does, with fused passes between its products.

    Args:
        block: The layer.
        pending: The residual stream.
        time: Projected timestep embedding.
        keys_values: Keys and values of the cross-attention.
        attend: (residual stream, its normalised form) -> the attention's output, [B, N, n, d].

    Returns:
        The residual stream.
    """
    passes, table = block.passes, block.modulation[...]
    shift1, scale1, _, shift2, scale2, _ = block.modulations(time)
    x, y, before = pending
    if y is None or before is None:
        normed = block.modulated(block.norm1, x, shift1, scale1)
    else:
        x, normed = gated_norm(passes, x, y, time, (before, 5), (table, 0), (table, 1), eps=block.norm1.epsilon)
    out = rearrange(attend(x, normed), "b (f s) n d -> b f s (n d)", f=x.shape[1])
    norm: Any = block.norm3
    weights = (norm.bias[...], -1), (norm.scale[...], -1)
    x, normed = gated_norm(passes, x, kept(block.self_attn.o(out)), time, (table, 2), *weights, eps=norm.epsilon)
    x = x + block.cross_attn(normed, keys_values)
    return Pending(x, block.ffn(block.modulated(block.norm2, x, shift2, scale2)), table)


def write_products(
    block: WanBlock,
    normed: Float[Array, "B F S D"],
    rope: tuple[Array, Array],
    cache: MonarchKVCache,
    *,
    frame: Int[Array, ""],
    layer: Int[Array, ""],
) -> tuple[MonarchKVCache, Float[Array, "B N n d"]]:
    """Projects the normalised input to queries, and writes a layer's keys and values into the cache.

    Args:
        block: The layer.
        normed: Input of the projections.
        rope: Cosines and sines, [F, S, d/2] each.
        cache: The cache of all layers.
        frame: Absolute index of the block's first frame.
        layer: Index of the layer in the cache.

    Returns:
        The cache with the block, and the rotated queries.
    """
    attention, batch, tokens = block.self_attn, normed.shape[0], normed.shape[1] * normed.shape[2]
    projections = [(array.reshape(batch, tokens, -1), column) for array, column in attention.products(normed)]
    tables = rope[0].reshape(tokens, -1), rope[1].reshape(tokens, -1)
    scales, eps = (attention.norm_q.scale[...], attention.norm_k.scale[...]), attention.norm_q.eps

    def write(key: Array, value: Array, misplaced: Array, slots: Array) -> tuple[Array, Array, Array]:
        query, *cache = norm_rotate_write(
            block.passes, projections, scales, tables, key, value, layer, misplaced, slots, eps=eps
        )
        return cache[0], cache[1], query

    cache, query = cache.append_by(write, normed.shape[1], frame=frame, layer=layer)
    return cache, query.reshape(batch, tokens, attention.num_heads, -1)
