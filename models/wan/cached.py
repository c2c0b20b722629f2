"""The layers of a call with a cache, one run of equal attention at a time.

There are three ways: a scan whose layers read copies of their caches, for training; a scan in which every layer writes
to and reads from the cache of all layers, for generation; and the latter with unrolled layers.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from monarchrt.models.attention.base import Context
from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.dit import AttentionRun, rematerialized, whole_layer
from monarchrt.models.wan.fused import Pending, fused_block, fuses, settled, write_products
from monarchrt.models.wan.kept import BY_GROUPS
from monarchrt.models.wan.kinds import modules_of
from monarchrt.models.wan.layers import WanBlock
from monarchrt.models.wan.tokens import split_tokens


def each_cache(run: Any) -> tuple[Any, ...]:
    """The caches of a run of layers."""
    return run if isinstance(run, tuple) else (run,)


def map_caches(change: Callable[[Any], Any], run: Any) -> Any:
    """Applies a function to the cache or caches of a run of layers."""
    return tuple(map(change, run)) if isinstance(run, tuple) else change(run)


class _ReadsCopy:
    """The self-attention of one layer, which reads a copy of its cache and keeps its block for the cache of all."""

    def __init__(self, cache: Any, number: Array, *, run: AttentionRun, start: int | Int[Array, ""]):
        self._cache, self._number, self._run, self._start = cache, number, run, start
        self.block: tuple[Array, ...] = ()

    def __call__(self, query: Array, key: Array, value: Array, context: Context) -> Array:
        self.block = key, value
        cache = self._cache.append(key, value, frame=self._start)
        return self._run.setting.attend_cache(cache, query, context=dataclasses.replace(context, layer=self._number))


class _InPlace:
    """The self-attention of one layer, which writes to and reads from the cache of all layers in place."""

    def __init__(self, cache: Any, at: Array, number: Array, *, run: AttentionRun, start: int | Int[Array, ""]):
        self.cache, self._at, self._number, self._run, self._start = cache, at, number, run, start

    def __call__(self, query: Array, key: Array, value: Array, context: Context) -> Array:
        return self.write(lambda cache, **where: (cache.append(key, value, **where), query), context)

    def write(self, write: Callable[..., tuple[Any, Array]], context: Context) -> Array:
        """Attends with the queries returned by `write`, which also writes the block into the cache."""
        self.cache, query = write(self.cache, frame=self._start, layer=self._at)
        where = dataclasses.replace(context, layer=self._run.start + self._number)
        return self._run.setting.attend_cache(self.cache, query, layer=self._at, context=where)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CachedCall:
    """What the layers of one call have in common, and the three ways through a run of layers.

    Each way takes the run, the residual stream [B, F, S, D], (state, keys and values of the cross-attention) of the
    run's layers, and its cache with a length; it returns the residual stream and the cache with the block.

    Attributes:
        graph: Graph of a layer, from `nnx.split`.
        config: Configuration of the model.
        time: Projected timestep embedding.
        rope: Cosines and sines of the tokens, padded.
        tokens: Tokens in a row of the residual stream, without padding.
        start: Absolute index of the block's first frame.
        context: Step and block of the call.
    """

    graph: nnx.GraphDef
    config: WanConfig
    time: Float[Array, "B T 6 D"]
    rope: tuple[Array, Array]
    tokens: int
    start: int | Int[Array, ""]
    context: Context

    def apart(self, run: AttentionRun, x: Array, layers: tuple[Any, Any], past: Any) -> tuple[Array, Any]:
        """Runs a scan over layers that read a copy of their own cache; all blocks are written to the cache at the end.

        The scan returns only the new block; the caches of all layers are then written at once, in place if donated.
        """
        stacked, length = dataclasses.replace(past, length=None), past.length

        def body(x: Array, xs: Any) -> tuple[Array, tuple[Array, ...]]:
            (layer, cross), own, number = xs
            cache = dataclasses.replace(own, length=length)
            attention = _ReadsCopy(cache, number, run=run, start=self.start)
            x = self._layer(self._block(layer), x, cross, attention)
            return x, attention.block

        def write(own: Any, key: Array, value: Array) -> Any:
            cache = dataclasses.replace(own, length=length).append(key, value, frame=self.start)
            return dataclasses.replace(cache, length=None)

        numbers = jnp.arange(run.start, run.stop)
        x, new = jax.lax.scan(rematerialized(body, self.config), x, (layers, stacked, numbers))
        return x, jax.vmap(write)(stacked, *new)

    def in_place(self, run: AttentionRun, x: Array, layers: tuple[Any, Any], past: Any) -> tuple[Array, Any]:
        """Runs a scan over layers that write to and read from the cache of all layers in place.

        The index is the loop's own counter, not an element of an array: XLA can then pass a slice of the cache to a
        kernel without a copy.
        """

        def body(carry: tuple[Array, Any, Array], own: tuple[Any, Any]) -> tuple[tuple[Array, Any, Array], None]:
            x, past, number = carry
            layer, cross = own
            attention = _InPlace(past, number, number, run=run, start=self.start)
            x = self._layer(self._block(layer), x, cross, attention)
            return (x, dataclasses.replace(attention.cache, length=past.length), number + 1), None

        (x, past, _), _ = jax.lax.scan(rematerialized(body, self.config), (x, past, jnp.int32(0)), layers)
        return x, past

    def unrolled(self, run: AttentionRun, x: Pending, layers: tuple[Any, Any], past: Any) -> tuple[Pending, Any]:
        """Runs unrolled layers one after the other, in place; a layer is traced and lowered once."""
        through = jax.jit(partial(self._through_unrolled, run))
        caches = list(each_cache(past))
        for number, layer in enumerate(zip(*layers, strict=True)):
            at = 0 if isinstance(past, tuple) else number
            x, caches[number - at] = through(x, caches[number - at], jnp.int32(at), jnp.int32(number), *layer)
        return x, tuple(caches) if isinstance(past, tuple) else caches[0]

    def _through_unrolled(
        self, run: AttentionRun, x: Pending, past: Any, at: Array, number: Array, layer: Any, cross: Any
    ) -> tuple[Pending, Any]:
        """Runs layer `number` of a run, which is layer `at` of the cache."""
        attention = _InPlace(past, at, number, run=run, start=self.start)
        x = self._pending_layer(self._block(layer), x, cross, attention)
        return x, dataclasses.replace(attention.cache, length=past.length)

    def _block(self, layer: Any) -> WanBlock:
        return nnx.merge(self.graph, whole_layer(layer, self.config))

    def _layer(self, block: WanBlock, x: Array, cross: Any, attention: Callable[..., Array]) -> Array:
        """Computes a layer of the network."""

        def attend(query: Array, key: Array, value: Array) -> Array:
            return attention(query, key, value, self._context(block, x))

        recompute = self.config.remat in BY_GROUPS
        return split_tokens(block(x, self.time, self.rope, cross, attend, tokens=self.tokens, recompute=recompute))

    def _pending_layer(self, block: WanBlock, x: Pending, cross: Any, attention: _InPlace) -> Pending:
        """Computes a layer with fused passes, if it supports them, and leaves its last branch to the next."""
        if not fuses(block, attention.cache):
            return Pending(self._layer(block, settled(x, self.time), cross, attention))

        def attend(x: Array, normed: Array) -> Array:
            return attention.write(partial(write_products, block, normed, self.rope), self._context(block, x))

        return fused_block(block, x, self.time, cross, attend)

    def _context(self, block: WanBlock, x: Array) -> Context:
        """The context of a layer's attention; the layer's index is added where it is known."""
        inputs = partial(block.attention_inputs, x[:, :, : self.tokens], self.time)
        return dataclasses.replace(self.context, inputs=inputs, modules=modules_of(block))
