"""Tiled Monarch attention in plain XLA, one chunk of query tiles at a time: memory is linear in the number of frames.

Query tiles are independent for every T, so a chunk of them is the unit of work in both directions. With one refinement
step the backward pass is written out (residuals q, k, v, out, lse); with more, a chunk is recomputed and differentiated
by JAX. Each function is jitted, because a scan outside of `jax.jit` is compiled in every call. Indices are those of
`reference`, with n, a tile of the chunk, in place of a.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from monarch_jax import reference
from monarch_jax._typing import Array, Float, Int
from monarch_jax.contract import Problem, Residuals, accumulator_dtype, differentiable, visibility
from monarch_jax.intermediates import stored

CHUNK_BYTES = 128 * 2**20  # limit on the intermediates of a chunk, unless a single query tile needs more


def forward(
    problem: Problem,
    q: Float[Array, "B A b1 b2 H D"],
    k: Float[Array, "B C b1 b2 H D"],
    v: Float[Array, "B C b1 b2 H D"],
    visible: Int[Array, " A"],
) -> tuple[Float[Array, "B A b1 b2 H D"], Float[Array, "B A b1 b2 H"]]:
    """The forward pass with one refinement step (T = 1).

    Args:
        problem: The static part of the call.
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        v: As k.
        visible: int32 [A], number of leading key tiles that each query tile sees.

    Returns:
        The output [B, A, b1, b2, H, D] in the dtype of `q`, and the log-sum-exp of L's scores [B, A, b1, b2, H] in
        float32 or wider.
    """
    return _forward(problem, _chunk_tiles(q, k), q, k, v, visible)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _forward(problem: Problem, chunk_tiles: int, q, k, v, visible):
    k, v = _without_unseen(problem, visible, k, v)

    def body(chunk):
        q, visible = chunk
        _, _, alpha, c_l, y = _right(problem, q, k, v)
        scores = _left_scores(problem, q, alpha, c_l, visible)
        lse = jax.nn.logsumexp(scores, axis=(-2, -1))  # [b,h,n,j,i]
        left = jnp.exp(scores - lse[..., None, None]).astype(q.dtype)
        if problem.masked:  # 0 * NaN is NaN, and an unseen tile may hold NaN
            y = jnp.where(visibility(visible, y.shape[3])[None, None, :, :, None, None, None], y, 0)
        out = _einsum("bhnjick,bhncjkd->bnijhd", left, y).astype(q.dtype)
        return out, lse.transpose(0, 2, 4, 3, 1)

    return _map_chunks(body, (q, visible), chunk_tiles)


def vjp(
    problem: Problem, residuals: Residuals, d_out: Float[Array, "B A b1 b2 H D"]
) -> tuple[Float[Array, "B A b1 b2 H D"], Float[Array, "B C b1 b2 H D"], Float[Array, "B C b1 b2 H D"]]:
    """Gradients of q, k and v; R, alpha, c_L and Y are recomputed chunk by chunk.

    With T = 1, the gradients of k and v accumulate in float32.
    """
    if problem.num_iters > 1:
        r = residuals
        return jax.vjp(lambda q, k, v: attend(problem, q, k, v, r.visible), r.q, r.k, r.v)[1](d_out)
    return _vjp(problem, _chunk_tiles(residuals.q, residuals.k), residuals, d_out)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _vjp(problem: Problem, chunk_tiles: int, residuals: Residuals, d_out):
    dtype, s = residuals.q.dtype, problem.scale
    # finite values only: NaN that a query tile sees is in its lse and delta already and must not spread to other tiles
    k, v = _without_unseen(problem, residuals.visible, residuals.k, residuals.v, finite=True)
    acc = accumulator_dtype(dtype)
    # delta = <dO, O>, which every softmax gradient of L subtracts
    delta = jnp.einsum("baijhd,baijhd->baijh", d_out, residuals.out, preferred_element_type=acc)

    def body(carry, chunk):
        dk, dv = carry
        q, d_out, delta, lse, visible = chunk
        right, log_right, alpha, c_l, y = _right(problem, q, k, v)
        scores = _left_scores(problem, q, alpha, c_l, visible)
        left = jnp.exp(scores - lse.transpose(0, 4, 1, 3, 2)[..., None, None])
        d_left = _einsum("bnijhd,bhncjkd->bhnjick", d_out, y)
        d_scores = left * (d_left - delta.transpose(0, 4, 1, 3, 2)[..., None, None])
        d_y = _einsum("bhnjick,bnijhd->bhncjkd", left.astype(dtype), d_out).astype(dtype)
        d_cl = -d_scores.sum(4).transpose(0, 1, 2, 4, 5, 3)  # [b,h,n,c,k,j]
        d_scores = d_scores.astype(dtype)
        d_alpha = (s * _einsum("bhnjick,bnijhd->bhncjkd", d_scores, q)).astype(dtype)
        dq = s * _einsum("bhnjick,bhncjkd->bnijhd", d_scores, alpha)
        # back through R = softmax(z), z = s <Q, K>: alpha, Y and c_L = sum R log R all depend on it
        d_right = _einsum("bhncjkd,bcklhd->bhnckjl", d_alpha, k) + _einsum("bhncjkd,bcklhd->bhnckjl", d_y, v)
        d_right = d_right + d_cl[..., None] * log_right
        d_z = right * (d_right - (right * d_right).sum(-1, keepdims=True))
        right, d_z = right.astype(dtype), d_z.astype(dtype)
        dq = dq + s * _einsum("bhnckjl,bcklhd->bnkjhd", d_z, k)
        dk = dk + s * _einsum("bhnckjl,bnkjhd->bcklhd", d_z, q) + _einsum("bhnckjl,bhncjkd->bcklhd", right, d_alpha)
        dv = dv + _einsum("bhnckjl,bhncjkd->bcklhd", right, d_y)
        return (dk, dv), dq.astype(dtype)

    zeros = (jnp.zeros_like(k, acc), jnp.zeros_like(v, acc))  # zeros_like also keeps the sharding of k and v
    per_tile = (residuals.q, d_out, delta, residuals.lse, residuals.visible)
    (dk, dv), dq = _scan_chunks(body, zeros, per_tile, chunk_tiles)
    return dq, dk.astype(dtype), dv.astype(dtype)


_attend_once = differentiable(forward, vjp)


def attend(
    problem: Problem,
    q: Float[Array, "B A b1 b2 H D"],
    k: Float[Array, "B C b1 b2 H D"],
    v: Float[Array, "B C b1 b2 H D"],
    visible: Int[Array, " A"],
) -> Float[Array, "B A b1 b2 H D"]:
    """The attention for any T; implements `contract.Attend`.

    Args:
        problem: The static part of the call.
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        v: As k.
        visible: int32 [A], number of leading key tiles that each query tile sees.

    Returns:
        [B, A, b1, b2, H, D] in the dtype of `q`.
    """
    if problem.num_iters == 1:
        return _attend_once(problem, q, k, v, visible)
    return _attend_more(problem, _chunk_tiles(q, k), q, k, v, visible)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _attend_more(problem: Problem, chunk_tiles: int, q, k, v, visible):
    k, v = _without_unseen(problem, visible, k, v)
    body = jax.checkpoint(lambda chunk: reference.attend(problem, chunk[0], k, v, chunk[1]))
    return _map_chunks(body, (q, visible), chunk_tiles)


def _right(problem: Problem, q: jax.Array, k: jax.Array, v: jax.Array):
    """R and log R [b,h,n,c,k,j,l], alpha and Y [b,h,n,c,j,k,d] in the inputs' dtype, c_L [b,h,n,c,k,j]."""
    z = problem.scale * _einsum("bnkjhd,bcklhd->bhnckjl", q, k)
    log_right = jax.nn.log_softmax(z, axis=-1)
    right = jnp.exp(log_right)
    c_l = (right * log_right).sum(-1)
    low = right.astype(q.dtype)
    alpha, y = (
        stored(_einsum("bhnckjl,bcklhd->bhncjkd", low, x), problem.intermediates).astype(q.dtype) for x in (k, v)
    )
    return right, log_right, alpha, c_l, y


def _left_scores(problem: Problem, q: jax.Array, alpha: jax.Array, c_l: jax.Array, visible: jax.Array):
    """Scores of L [b,h,n,j,i,c,k]; minus infinity where a query tile does not see a key tile."""
    scores = problem.scale * _einsum("bnijhd,bhncjkd->bhnjick", q, alpha)
    scores = scores - c_l.transpose(0, 1, 2, 5, 3, 4)[:, :, :, :, None]
    if not problem.masked:
        return scores
    return jnp.where(visibility(visible, alpha.shape[3])[None, None, :, None, None, :, None], scores, -jnp.inf)


def _without_unseen(
    problem: Problem, visible: jax.Array, *arrays: jax.Array, finite: bool = False
) -> tuple[jax.Array, ...]:
    """Replaces key tiles that no query tile sees by zeros: the unfilled part of a buffer may hold NaN.

    Args:
        problem: Whether anything is masked.
        visible: int32 [A], number of leading key tiles that each query tile sees.
        arrays: [B, C, b1, b2, H, D] each, keys or values.
        finite: Whether to replace values that are not finite in the other tiles, too.
    """
    if not problem.masked:
        return arrays
    seen = (jnp.arange(arrays[0].shape[1]) < visible.max())[None, :, None, None, None, None]
    return tuple(jnp.where(seen & jnp.isfinite(x) if finite else seen, x, 0) for x in arrays)


def _chunk_tiles(q: jax.Array, k: jax.Array) -> int:
    """Query tiles per chunk: the largest divisor of A whose intermediates fit in `CHUNK_BYTES`, or 1."""
    batch, tiles, rows, cols, heads, dim = q.shape
    per_pair = rows * cols * (2 * dim + 2 * cols + 2 * rows) * accumulator_dtype(q.dtype).itemsize
    pairs = batch * heads * k.shape[1]
    if not isinstance(pairs, int):  # a symbolic batch of `jax.export` may have any size
        return 1
    limit = max(1, CHUNK_BYTES // (pairs * per_pair))
    return max(n for n in range(1, tiles + 1) if tiles % n == 0 and n <= limit)


def _split(x: jax.Array, n: int) -> jax.Array:
    """Splits the axis of query tiles (axis 1, or 0 for `visible`) into chunks of n, along a new leading axis."""
    if x.ndim == 1:
        return x.reshape(-1, n)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, n, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _scan_chunks(body, carry, per_tile, n: int):
    carry, out = lax.scan(body, carry, jax.tree.map(lambda x: _split(x, n), per_tile))
    return carry, jax.tree.map(_join, out)


def _map_chunks(body, per_tile, n: int):
    return _scan_chunks(lambda carry, chunk: (carry, body(chunk)), None, per_tile, n)[1]


def _einsum(formula: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(formula, *operands, preferred_element_type=accumulator_dtype(operands[0].dtype))
