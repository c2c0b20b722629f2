"""A kind of attention that nothing else knows: dense, and a gate times the mean of all values seen, pooled by frame.

It has parameters of its own, reads the block's input, keeps more than keys and values in its cache, and has fields.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from monarch_jax import MonarchKVCache
from monarchrt.models.attention.base import NO_CONTEXT, Attention, Density, visible_share
from monarchrt.models.attention.registry import register
from monarchrt.models.attention.softmax import softmax_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PooledCache:
    inner: Any
    pooled: Any  # [B, frames, n, d], or of all layers
    length: Any

    key = property(lambda self: self.inner.key)
    value = property(lambda self: self.inner.value)

    def append(self, key, value, *, frame=None, layer=None):
        start = self.length if frame is None else frame
        inner = dataclasses.replace(self.inner, length=self.length).append(key, value, frame=start, layer=layer)
        batch, _, heads, width = value.shape
        means = value.reshape(batch, -1, inner.spec.grid[1] * inner.spec.grid[2], heads, width).mean(2)
        zero = jnp.int32(0)
        at = (zero, jnp.asarray(start, jnp.int32), zero, zero)
        if layer is not None:
            means, at = means[None], (layer, *at)
        pooled = jax.lax.dynamic_update_slice(self.pooled, means, at)
        return PooledCache(dataclasses.replace(inner, length=None), pooled, inner.length)

    def map_keys(self, function):
        inner = dataclasses.replace(self.inner, key=function(self.inner.key))
        return dataclasses.replace(self, inner=inner)


class Gate(nnx.Module):
    def __init__(self, sizes, rngs):
        self.linear = nnx.Linear(sizes.dim, sizes.num_heads, rngs=rngs)
        self.scale = nnx.Param(jnp.zeros((sizes.num_heads,)))

    def __call__(self, x):
        return (1 + self.linear(x)) * self.scale[...].reshape(1, 1, -1)


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gated(Attention):
    name = "gated"
    strength: float = 1.0

    def init(self, sizes, *, rngs):
        return Gate(sizes, rngs)

    def _out(self, dense, mean, context):
        gate = context.own(self)(context.inputs())
        return dense + (self.strength * gate[..., None] * mean).astype(dense.dtype)

    def attend_clip(self, query, key, value, clip):
        (frames, height, width), block = clip.grid, clip.causal_block
        tokens = height * width
        ends = [frames if block is None else (i // block + 1) * block for i in range(frames)]
        dense, means = [], []
        for frame, end in enumerate(ends):
            rows = slice(frame * tokens, (frame + 1) * tokens)
            dense.append(softmax_attention(query[:, rows], key[:, : end * tokens], value[:, : end * tokens]))
            means.append(jnp.broadcast_to(value[:, : end * tokens].mean(1, keepdims=True), dense[-1].shape))
        return self._out(jnp.concatenate(dense, 1), jnp.concatenate(means, 1), clip.context)

    def init_cache(self, shape):
        inner = MonarchKVCache.init(**shape.fields())
        pooled = jnp.zeros((shape.batch, shape.frames, shape.heads, shape.head_dim), shape.dtype)
        if shape.layers is not None:
            pooled = jnp.broadcast_to(pooled, (shape.layers, *pooled.shape))
        return PooledCache(dataclasses.replace(inner, length=None), pooled, inner.length)

    def reads(self, cache):
        return isinstance(cache, PooledCache)

    def attend_cache(self, cache, query, *, layer=None, context=NO_CONTEXT):
        inner = dataclasses.replace(cache.inner, length=cache.length)
        valid = inner.valid_frames
        tokens = valid * (inner.spec.grid[1] * inner.spec.grid[2])
        dense = softmax_attention(query, *inner.tokens(layer=layer), valid_keys=tokens)
        pooled = cache.pooled if layer is None else cache.pooled[layer]
        there = jnp.arange(pooled.shape[1]) < valid
        mean = jnp.where(there.reshape(1, -1, 1, 1), pooled, 0).sum(1, keepdims=True) / valid
        return self._out(dense, mean, context)

    def density(self, grid, *, causal_block=None, steps=None):
        return Density(1.0, visible_share(grid, causal_block), 1.0)
