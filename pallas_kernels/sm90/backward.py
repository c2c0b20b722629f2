"""The backward pass on Hopper: for one chunk of heads and query tiles after another, four kernels.

alpha, c_L and Y are made again (`right`), the output's gradient goes back through L (`left_backward`) and
through R to keys and values (`right_backward`) and to queries (`query`). Every gradient is summed in one
place in one order: no atomics, the same bits in every run. Memory beyond inputs and outputs is bounded.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels.sm90.config import ROWS, SLAB, BackwardConfig, ForwardConfig, LeftConfig
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
    return sum_chunks(
        call, d_out, lambda head, tile: _chunk(call, d_out, stats, wanted, config, kept, head, tile), dk_dtype=k.dtype
    )


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


def _chunk(
    call: Call,
    d_out: jax.Array,
    stats: jax.Array,
    wanted: jax.Array,
    config: BackwardConfig,
    kept: Arrays | None,
    head: Index,
    tile: Index,
) -> Gradients:
    """dq [B, tiles, b1, b2, heads, D] of a chunk and its share of dk and dv [B, C, b1, b2, heads, D]."""
    batch, _, rows, cols, heads, dim = call.q.shape
    slabs, pairs = dim // SLAB, call.pairs
    sizes: dict[str, Any] = dict(heads=call.heads, tiles=call.tiles, masked=call.masked)
    alpha, y, c = kept or launch(*call.right(head, tile))
    mid = (batch * call.heads, call.tiles, pairs, cols, slabs, SLAB)
    flat = (-1, *mid[2:])
    columns = (batch, -1, rows, cols * heads, slabs, SLAB)
    inputs = (
        call.q.reshape(columns),
        d_out.reshape(columns),
        alpha.reshape(flat),
        y.reshape(flat),
        c,
        stats,
        call.limits,
        call.start(head, tile),
    )
    role = left_backward_role(
        like(call.q), pairs, scale=call.scale, config=config.left, whole=kept is not None, **sizes
    )
    d_alpha, d_y, d_c, dq = launch(role, inputs)

    q, k, v = (x.reshape(batch, -1, *x.shape[2:5], slabs, SLAB) for x in (call.q, call.k, call.v))
    k, v = (x.reshape(batch, pairs, *x.shape[3:]) for x in (k, v))
    start = jnp.stack([jnp.int32(head), jnp.int32(tile), call.limits.max(), *wanted])
    role = right_backward_role(like(q), like(k), scale=call.scale, config=config.keys, **sizes)
    dk, dv, dz = launch(role, (q, k, v, d_alpha.reshape(mid), d_y.reshape(mid), d_c, call.limits, start))
    dk, dv = (x.reshape(batch, -1, rows, cols, call.heads, dim) for x in (dk, dv))
    role = query_role(like(q), like(k), left_width=config.left.width(rows), config=config.query, **sizes)
    dq = dq.reshape(*dq.shape[:-1], slabs, SLAB)
    (dq,) = launch(role, (k, dz, dq, call.limits, start))
    return dq.reshape(batch, call.tiles, rows, cols, call.heads, dim), dk, dv


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
