"""The definition of the operation in einsums, against which every other implementation is tested.

It supports all arguments but is neither fast nor economical with memory. Indices follow the paper (Sections 2.1, 4.2,
A): a and c index query and key tiles, i and j the row and column of a query, k and l those of a key. In the paper's
tiled updates (A.2) the names are:

    here    a           c           i    j    k    l    d    alpha    c_l    Y    z            scores
    paper   (l1, j1)    (k1, i1)    l2   j2   k2   i2   v    alpha_L  c_L    Y    Z_R = beta_R / c_R    Z_L
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from monarch_jax._typing import Array, Float, Int
from monarch_jax.contract import Problem, accumulator_dtype, visibility
from monarch_jax.intermediates import stored

EPSILON, MAX_FACTOR = 1e-6, 1e4  # 1/c_R is bounded from the second step on, since c_R can underflow


def factors(
    problem: Problem,
    q: Float[Array, "B A b1 b2 H D"],
    k: Float[Array, "B C b1 b2 H D"],
    visible: Int[Array, " A"],
) -> tuple[Float[Array, "B H A b2 b1 C b1"], Float[Array, "B H A C b1 b2 b2"]]:
    """The factors L and R after T refinement steps (paper, Algorithm in A); an entry of the map is L * R.

    Args:
        problem: Scale and number of steps.
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        visible: int32 [A], number of leading key tiles that each query tile sees.

    Returns:
        L [b,h,a,j,i,c,k] and R [b,h,a,c,k,j,l] in float32 or wider.
    """
    acc = accumulator_dtype(q.dtype)
    q, k = q.astype(acc), k.astype(acc)
    seen = visibility(visible, k.shape[1])
    k, letters = _as_seen(problem, k, visible)
    alpha_r = jnp.broadcast_to(jnp.einsum("bakjhd->bhakjd", q)[:, :, :, None], _alpha_shape(q, seen))
    factor = jnp.ones((), acc)
    for step in range(problem.num_iters):
        if step:
            alpha_r = _einsum("bhajick,baijhd->bhackjd", left, q)
            c_r = left.sum(4).transpose(0, 1, 2, 4, 5, 3)  # [b,h,a,c,k,j]
            factor = jnp.minimum(1 / (c_r + EPSILON), MAX_FACTOR)[..., None]
        z = problem.scale * _einsum(f"bhackjd,{letters}->bhackjl", alpha_r, k) * factor
        # the update of R (paper, A.2)
        right, log_right = jax.nn.softmax(z, -1), jax.nn.log_softmax(z, -1)
        alpha = stored(_einsum(f"bhackjl,{letters}->bhacjkd", right, k), problem.intermediates)
        c_l = (right * log_right).sum(-1)  # negative entropy, [b,h,a,c,k,j]
        scores = problem.scale * _einsum("baijhd,bhacjkd->bhajick", q, alpha)
        scores = scores - c_l.transpose(0, 1, 2, 5, 3, 4)[:, :, :, :, None]
        scores = jnp.where(seen[None, None, :, None, None, :, None], scores, -jnp.inf)
        flat = scores.reshape(*scores.shape[:-2], -1)
        # the update of L (paper, A.2)
        left = jax.nn.softmax(flat, -1).reshape(scores.shape)
    return left, right


def attend(
    problem: Problem,
    q: Float[Array, "B A b1 b2 H D"],
    k: Float[Array, "B C b1 b2 H D"],
    v: Float[Array, "B C b1 b2 H D"],
    visible: Int[Array, " A"],
) -> Float[Array, "B A b1 b2 H D"]:
    """The output O[a,i,j] = sum over c, k of L Y, where Y = sum over l of R V; implements `contract.Attend`.

    Args:
        problem: The static part of the call.
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        v: As k.
        visible: int32 [A], number of leading key tiles that each query tile sees.

    Returns:
        [B, A, b1, b2, H, D] in the dtype of `q`.
    """
    left, right = factors(problem, q, k, visible)
    v, letters = _as_seen(problem, v.astype(right.dtype), visible)
    y = stored(_einsum(f"bhackjl,{letters}->bhacjkd", right, v), problem.intermediates)
    return _einsum("bhajick,bhacjkd->baijhd", left, y).astype(q.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MonarchFactors:
    """The factors of a tiled Monarch attention map, for analysis and tests on small inputs (paper, Section 2.1).

    Attributes:
        left: L [B, H, A, b2, b1, C, b1], indexed by query tile a, column j, row i, key tile c, row k; sums to 1 over
            (c, k).
        right: R [B, H, A, C, b1, b2, b2], indexed by query tile a, key tile c, row k, column j, column l; sums to 1
            over l.
        attention: The implied map [B, H, N_q, N_k] in token order; its rows sum to 1.
    """

    left: jax.Array
    right: jax.Array
    attention: jax.Array


def _alpha_shape(q: jax.Array, seen: jax.Array) -> tuple[Any, ...]:
    """The shape [B, H, A, C, b1, b2, D]; B may be symbolic in an export."""
    batch, tiles, rows, cols, heads, dim = q.shape
    return (batch, heads, tiles, seen.shape[1], rows, cols, dim)


def _as_seen(problem: Problem, x: jax.Array, visible: jax.Array) -> tuple[jax.Array, str]:
    """Keys or values and their einsum indices, with an axis of query tiles and zeros for unseen tiles if masked.

    Zeros rather than a mask on the scores alone, because 0 * NaN is NaN and unseen tiles may hold NaN.
    """
    if not problem.masked:
        return x, "bcklhd"
    seen = visibility(visible, x.shape[1])[None, :, :, None, None, None, None]
    return jnp.where(seen, x[:, None], 0), "backlhd"


def _einsum(formula: str, *operands: jax.Array) -> jax.Array:
    return jnp.einsum(formula, *operands, precision=lax.Precision.HIGHEST)
