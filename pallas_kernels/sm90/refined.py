"""Several refinement steps on Hopper, forward and backward, for one chunk of heads and query tiles after another.

Each step but the last hands queries of its own for every key row on to the next (paper, A.2). R and its way back are
those of one step, with these queries and, before the last step, without Y. From L to the next queries, and what their
gradients need beside `left_refine_backward`, are kernels of another package, which it gives as a `PairKernels`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from monarchrt.pallas_kernels.sm90.backward import Chunk, Gradients, output_stats, sum_chunks
from monarchrt.pallas_kernels.sm90.config import SLAB, BackwardConfig, ForwardConfig, LeftConfig, column_blocks
from monarchrt.pallas_kernels.sm90.forward import Arrays, Call, Pair, chunk_sizes, fill_chunks, like, tiles_seen
from monarchrt.pallas_kernels.sm90.left_refine_backward import left_refine_backward_role
from monarchrt.pallas_kernels.sm90.right_backward_independent import independent_role
from monarchrt.pallas_kernels.sm90.roles import launch
from monarchrt.pallas_kernels.sm90.types import Index

PairKernels = Callable[..., Any]
"""`monarchrt.triton_kernels.pairs.Pairs` or what stands for it."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What a refinement step before the last leaves for its gradient: arrays as `Pairs.refine` takes and gives them."""

    alpha: jax.Array
    c: jax.Array
    queries: jax.Array  # of the next step
    factors: jax.Array
    stats: jax.Array


@dataclasses.dataclass(frozen=True)
class _Work:
    """A call, its key tiles that are seen, and what makes kernels of pairs for a chunk of it."""

    call: Call
    visible: jax.Array  # int32 [A]
    num_iters: int
    kernels: PairKernels

    def pairs(self, head: Index, tile: Index) -> Any:
        """The other package's kernels for a chunk."""
        call = self.call
        split = column_blocks(call.q.shape[3], call.tiles, call.masked)
        return self.kernels(
            q=call.q,
            k=call.k,
            visible=self.visible,
            start=call.start(head, tile),
            scale=call.scale,
            heads=call.heads,
            tiles=call.tiles,
            split=(split.items, split.full, split.tail_rows, split.packed),
        )

    def steps(self, head: Index, tile: Index, width: int) -> tuple[list[Step], Arrays]:
        """The steps of a chunk before the last; alpha, Y and c_L of the last. `width` as `Pairs.refine` has it."""
        before, queries = [], None
        for _ in range(self.num_iters - 1):
            alpha, c = launch(*self.call.right(head, tile, values=False, queries=queries))
            queries, factors, stats = self.pairs(head, tile).refine(alpha, c, width=width)
            before.append(Step(alpha, c, queries, factors, stats))
        return before, launch(*self.call.right(head, tile, queries=queries))


def _work(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    limit: int,
    *,
    num_iters: int,
    scale: float,
    masked: bool,
    config: ForwardConfig,
    kernels: PairKernels,
) -> _Work:
    """The work, in chunks of `limit` bytes of alpha and Y at most."""
    batch, tiles, rows, cols, heads, dim = q.shape
    chunk_heads, chunk_tiles = chunk_sizes(batch, heads, tiles, 4 * k.shape[1] * rows * cols * dim, limit)
    limits = tiles_seen(visible, k.shape[1], masked) * rows
    call = Call(q, k, v, limits, chunk_heads, chunk_tiles, scale, masked, config)
    seen = jnp.minimum(visible, k.shape[1]).astype(jnp.int32) if masked else jnp.full(tiles, k.shape[1], jnp.int32)
    return _Work(call, seen, num_iters, kernels)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    *,
    num_iters: int,
    scale: float,
    masked: bool,
    config: ForwardConfig,
    kernels: PairKernels,
) -> Pair:
    """The output and log-sum-exp of the last of several refinement steps.

    Args:
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        v: As k.
        visible: int32 [A].
        num_iters: T, 2 or more.
        scale: Softmax scale.
        masked: Whether `visible` may hide a key tile.
        config: Sizes.
        kernels: The other package's.

    Returns:
        out [B, A, b1, b2, H, D] and lse [B, A, b1, b2, H] in float32.
    """
    sizes: dict[str, Any] = dict(num_iters=num_iters, scale=scale, masked=masked, config=config, kernels=kernels)
    work = _work(q, k, v, visible, config.chunk_bytes, **sizes)
    width = -(-q.shape[2] // 8) * 8

    def chunk(head, tile):
        return work.call.tiled(*launch(*work.call.left(head, tile, work.steps(head, tile, width)[1])))

    return fill_chunks(work.call, chunk)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    *,
    num_iters: int,
    scale: float,
    masked: bool,
    grad_tiles: int | None,
    config: BackwardConfig,
    kernels: PairKernels,
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
        num_iters: T, 2 or more.
        scale: Softmax scale, not 0.
        masked: Whether `visible` may hide a key tile.
        grad_tiles: dk and dv are wanted for so many of the last visible key tiles and zero elsewhere; None: for all.
        config: Sizes; `left` and `keys` are independent. A chunk of T steps takes what a chunk of one step does.
        kernels: The other package's.

    Returns:
        dq, as q, dk and dv, as k.
    """
    forward = ForwardConfig(right=config.right, left=LeftConfig(key_block=SLAB))
    sizes: dict[str, Any] = dict(num_iters=num_iters, scale=scale, masked=masked, config=forward, kernels=kernels)
    work = _work(q, k, v, visible, 2 * config.chunk_bytes // (num_iters + 1), **sizes)
    seen = tiles_seen(visible, k.shape[1], masked)
    stats = output_stats(out, lse, d_out, scale, config)
    first = jnp.int32(0) if grad_tiles is None else (seen.max() - grad_tiles) * q.shape[2]
    wanted = jnp.stack([first, seen.max() * q.shape[2]])

    def gradients(head: Index, tile: Index) -> Gradients:
        return _gradients(work, Chunk(work.call, head, tile, wanted), d_out, stats, config)

    return sum_chunks(work.call, d_out, gradients, dk_dtype=jnp.float32)


def _gradients(work: _Work, chunk: Chunk, d_out: jax.Array, stats: jax.Array, config: BackwardConfig) -> Gradients:
    """dq and dv of a chunk in the inputs' dtype, dk in float32: [B, tiles or C, b1, b2, heads, D]."""
    call, sizes = work.call, chunk.sizes
    q, k, v = chunk.arrays()
    start, key_start = call.start(chunk.head, chunk.tile), chunk.key_start()
    kernels = work.pairs(chunk.head, chunk.tile)
    before, made = work.steps(chunk.head, chunk.tile, config.left.width(call.q.shape[2]))

    def through_right(n: int, gradients: Arrays, *, values: bool) -> Arrays:
        """dk, dv and s dZ of step n; gradients of alpha, Y and c_L, without `values` of alpha and c_L."""
        own = before[n - 1].queries.reshape(chunk.mid) if n else q
        d_alpha, *_, d_c = gradients
        d_y = gradients[1] if values else d_alpha  # not read
        options: dict[str, Any] = dict(scale=call.scale, config=config.keys, values=values, further=n > 0, **sizes)
        arrays = (own, k, v, d_alpha.reshape(chunk.mid), d_y.reshape(chunk.mid), d_c, call.limits, key_start)
        return launch(independent_role(like(q), like(k), **options), arrays)

    *gradients, dq = chunk.through_left(made, d_out, stats, config.left)
    dk, dv, dz = through_right(len(before), tuple(gradients), values=True)
    dk = dk.astype(jnp.float32)
    for n, step in reversed(list(enumerate(before))):
        du, products = kernels.query(step.queries, dz, step.factors)
        numbers = (step.c, step.factors, products)
        left_stats = kernels.delta(step.alpha, du, *numbers, step.stats)
        role = left_refine_backward_role(like(call.q), call.pairs, scale=call.scale, config=config.left, **sizes)
        vectors = (call.q.reshape(chunk.columns), step.alpha.reshape(chunk.flat), du.reshape(chunk.flat))
        *gradients, part = launch(role, (*vectors, *numbers, left_stats, call.limits, start))
        more, _, dz = through_right(n, tuple(gradients), values=False)
        dk = dk + more.astype(jnp.float32)
        dq = (dq.astype(jnp.float32) + part.astype(jnp.float32)).astype(dq.dtype)
    dq = chunk.finish(q, k, dz, dq, key_start, config)
    return dq, chunk.of_keys(dk), chunk.of_keys(dv)
