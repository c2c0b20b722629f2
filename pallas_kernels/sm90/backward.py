"""The backward pass on Hopper: for one chunk of heads and query tiles after another, four kernels.

alpha, c_L and Y are made again (`right`), the output's gradient goes back through L (`left_backward`) and
through R to keys and values (`right_backward`) and to queries (`query`). Every gradient is summed in one
place in one order: no atomics, the same bits in every run. Memory beyond inputs and outputs is bounded.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels.sm90.config import (
    ROWS,
    SLAB,
    BackwardConfig,
    ForwardConfig,
    LeftBackwardConfig,
    LeftConfig,
)
from monarchrt.pallas_kernels.sm90.forward import Arrays, Call, chunk_sizes, like, tiles_seen
from monarchrt.pallas_kernels.sm90.left_backward import left_backward_role
from monarchrt.pallas_kernels.sm90.query import query_role
from monarchrt.pallas_kernels.sm90.right_backward import right_backward_role
from monarchrt.pallas_kernels.sm90.roles import launch
from monarchrt.pallas_kernels.sm90.shared import LOG2E, gradient_scales, varying
from monarchrt.pallas_kernels.sm90.types import Index

Gradients = tuple[jax.Array, jax.Array, jax.Array]


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    scale: float,
    masked: bool,
    grad_tiles: int | None,
    config: BackwardConfig,
    kept: Arrays | None = None,
) -> Gradients:
    """The gradients of q, k and v.

    Args:
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        v: As k.
        visible: int32 [A].
        out: The forward pass's output, as q.
        lse: Its log-sum-exp [B, A, b1, b2, H].
        d_out: The output's gradient, as q.
        scale: Softmax scale.
        masked: Whether `visible` may hide a key tile.
        grad_tiles: dk and dv are wanted for so many of the last visible key tiles and zero elsewhere; None: for all.
        config: Sizes.
        kept: alpha, Y and c_L from the forward pass; None: they are made again.

    Returns:
        dq, as q, dk and dv, as k.
    """
    batch, tiles, rows, cols, heads, dim = q.shape
    limit = config.chunk_bytes * (1 if kept is None else 2)  # kept alpha and Y leave the memory to their gradients
    chunk_heads, chunk_tiles = chunk_sizes(batch, heads, tiles, 4 * k.shape[1] * rows * cols * dim, limit)
    seen = tiles_seen(visible, k.shape[1], masked)
    forward = ForwardConfig(right=config.right, left=LeftConfig(key_block=ROWS))
    call = Call(q, k, v, seen * rows, chunk_heads, chunk_tiles, scale, masked, forward)
    stats = output_stats(out, lse, d_out, scale, config)
    first = jnp.int32(0) if grad_tiles is None else (seen.max() - grad_tiles) * rows
    wanted = jnp.stack([first, seen.max() * rows])

    def gradients(head: Index, tile: Index) -> Gradients:
        return _gradients(Chunk(call, head, tile, wanted), d_out, stats, config, kept)

    return sum_chunks(call, d_out, gradients, dk_dtype=k.dtype)


def output_stats(out: jax.Array, lse: jax.Array, d_out: jax.Array, scale: float, config: BackwardConfig) -> jax.Array:
    """lse in units of log 2 and <dO, O>, scaled, float32 [B, H, A, b2 or more, 2, b1 or more]; see `left_backward`."""
    rows, cols = out.shape[2:4]
    # flat and apart from what makes and takes it: the same kernel, so the same bits, in every program; within the
    # transposition the sums take 7 times as long
    flat = lax.optimization_barrier(tuple(x.reshape(-1, x.shape[-1]) for x in (d_out, out)))
    delta = jnp.einsum("nd,nd->n", *flat, preferred_element_type=jnp.float32)
    delta = lax.optimization_barrier(delta).reshape(out.shape[:-1])
    more_rows = config.left.depth(rows) - rows
    more_cols = -cols % config.left.columns

    def padded(x, value):
        x = x.astype(jnp.float32).transpose(0, 4, 1, 3, 2)
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more_cols), (0, more_rows)), constant_values=value)

    delta = delta * gradient_scales(out.dtype, scale)[0]
    return jnp.stack([padded(lse * LOG2E, jnp.inf), padded(delta, 0.0)], axis=4)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What the backward kernels of a chunk are told, and the shapes in which they take arrays.

    Attributes:
        call: The call.
        head: The chunk's first head.
        tile: Its first query tile.
        wanted: int32 [2], the first and the end of the pairs whose dk and dv are wanted.
    """

    call: Call
    head: Index
    tile: Index
    wanted: jax.Array

    @property
    def sizes(self) -> dict[str, Any]:
        """Options that all roles have."""
        return dict(heads=self.call.heads, tiles=self.call.tiles, masked=self.call.masked)

    @property
    def mid(self) -> tuple[int, ...]:
        """Shape of the chunk's alpha and Y."""
        batch, _, _, cols, _, dim = self.call.q.shape
        return (batch * self.call.heads, self.call.tiles, self.call.pairs, cols, dim // SLAB, SLAB)

    @property
    def flat(self) -> tuple[int, ...]:
        """The same with one axis of heads and query tiles, of the chunk or of all."""
        return (-1, *self.mid[2:])

    @property
    def columns(self) -> tuple[int, ...]:
        """Shape of queries, by rows of a tile and then columns of all heads."""
        batch, _, rows, cols, heads, dim = self.call.q.shape
        return (batch, -1, rows, cols * heads, dim // SLAB, SLAB)

    def arrays(self) -> Arrays:
        """q [B, A, b1, b2, H, D/64, 64], k and v [B, C*b1, b2, H, D/64, 64]."""
        batch, pairs = self.call.q.shape[0], self.call.pairs
        q, k, v = (x.reshape(batch, -1, *x.shape[2:5], *self.mid[4:]) for x in (self.call.q, self.call.k, self.call.v))
        return q, *(x.reshape(batch, pairs, *x.shape[3:]) for x in (k, v))

    def key_start(self) -> jax.Array:
        """int32 [5], `start` of the roles for R."""
        return jnp.stack([jnp.int32(self.head), jnp.int32(self.tile), self.call.limits.max(), *self.wanted])

    def through_left(
        self,
        made: Sequence[jax.Array],
        d_out: jax.Array,
        stats: jax.Array,
        config: LeftBackwardConfig,
        *,
        whole: bool = False,
    ) -> tuple[jax.Array, ...]:
        """Gradients of alpha, Y and c_L, which are the chunk's or the `whole` call's, and the part of dq through L."""
        call, (alpha, y, c) = self.call, made
        inputs = (
            call.q.reshape(self.columns),
            d_out.reshape(self.columns),
            alpha.reshape(self.flat),
            y.reshape(self.flat),
            c,
            stats,
            call.limits,
            call.start(self.head, self.tile),
        )
        role = left_backward_role(like(call.q), call.pairs, scale=call.scale, config=config, whole=whole, **self.sizes)
        return launch(role, inputs)

    def finish(
        self, q: jax.Array, k: jax.Array, dz: jax.Array, dq: jax.Array, start: jax.Array, config: BackwardConfig
    ) -> jax.Array:
        """All of dq [B, tiles, b1, b2, heads, D], from s dZ of the first step and what came through L."""
        call = self.call
        batch, _, rows, cols, _, dim = call.q.shape
        role = query_role(like(q), like(k), left_width=config.left.width(rows), config=config.query, **self.sizes)
        (dq,) = launch(role, (k, dz, dq.reshape(*dq.shape[:-1], *self.mid[4:]), call.limits, start))
        return dq.reshape(batch, call.tiles, rows, cols, call.heads, dim)

    def of_keys(self, x: jax.Array) -> jax.Array:
        """dk or dv as [B, C, b1, b2, heads, D]."""
        batch, _, rows, cols, _, dim = self.call.q.shape
        return x.reshape(batch, -1, rows, cols, self.call.heads, dim)


def _gradients(
    chunk: Chunk, d_out: jax.Array, stats: jax.Array, config: BackwardConfig, kept: Arrays | None
) -> Gradients:
    """dq [B, tiles, b1, b2, heads, D] of a chunk and its share of dk and dv [B, C, b1, b2, heads, D]."""
    call = chunk.call
    made = kept or launch(*call.right(chunk.head, chunk.tile))
    d_alpha, d_y, d_c, dq = chunk.through_left(made, d_out, stats, config.left, whole=kept is not None)

    q, k, v = chunk.arrays()
    start = chunk.key_start()
    role = right_backward_role(like(q), like(k), scale=call.scale, config=config.keys, **chunk.sizes)
    through = (d_alpha.reshape(chunk.mid), d_y.reshape(chunk.mid), d_c)
    dk, dv, dz = launch(role, (q, k, v, *through, call.limits, start))
    dk, dv = chunk.of_keys(dk), chunk.of_keys(dv)
    return chunk.finish(q, k, dz, dq, start, config), dk, dv


def sum_chunks(
    call: Call, d_out: jax.Array, chunk: Callable[[Index, Index], Gradients], *, dk_dtype: jax.typing.DTypeLike
) -> Gradients:
    """All gradients in the inputs' dtypes, from those of one chunk after another.

    Args:
        call: The call.
        d_out: The output's gradient.
        chunk: dq of the chunk that starts at (head, tile), and its share of dk and dv.
        dk_dtype: Dtype of that share of dk.

    Returns:
        dq, dk and dv.
    """
    q, k, v, places = call.q, call.k, call.v, call.places
    if len(places) == 1:
        dq, dk, dv = chunk(0, 0)
        return dq, dk.astype(k.dtype), dv
    summed = call.tiles < q.shape[1]  # several chunks have a share in a head's dk and dv

    def body(n, whole):
        head, tile = jnp.array(places, jnp.int32)[n]
        return _add_chunk(whole, chunk(head, tile), head, tile, summed)

    dtypes = (q.dtype, *(jnp.float32 if summed else dtype for dtype in (dk_dtype, v.dtype)))
    zeros = zip((q.shape, k.shape, v.shape), dtypes, strict=True)
    start = tuple(varying((jnp.zeros if summed else lax.empty)(*x), q, k, d_out) for x in zeros)
    dq, dk, dv = lax.fori_loop(0, len(places), body, start)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype)


def _add_chunk(whole: Gradients, parts: Gradients, head: Index, tile: Index, summed: bool) -> Gradients:
    """A chunk's dq into the whole one, and its dk and dv added to those of its heads."""
    zero, head, tile = jnp.int32(0), jnp.int32(head), jnp.int32(tile)
    dq = lax.dynamic_update_slice(whole[0], parts[0], (zero, tile, zero, zero, head, zero))
    at = (zero, zero, zero, zero, head, zero)
    totals = [dq]
    for sums, part in zip(whole[1:], parts[1:], strict=True):
        if summed:
            part = lax.dynamic_slice(sums, at, part.shape) + part.astype(sums.dtype)
        totals.append(lax.dynamic_update_slice(sums, part, at))
    return totals[0], totals[1], totals[2]
