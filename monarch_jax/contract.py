"""The interface of backends: the arguments of a call, its result, and the residuals between its two passes.

Backends and kernels import this module and nothing else of the library; `backends` registers them. Arrays are in tiles,
[B, A or C, b1, b2, H, D]: batch, query or key tiles, rows and columns of a tile, heads, head size.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from monarch_jax._typing import Array, Bool, Float, Int

SAVED = "monarch_attention"  # name of the output and its log-sum-exp for `jax.checkpoint` policies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The static part of one call: everything besides shapes and dtypes that a backend may specialise on.

    Attributes:
        scale: Softmax scale s.
        num_iters: Refinement steps T.
        masked: Whether `visible` may hide any key tile; if False, every query tile sees all key tiles.
        grad_tiles: Number of last visible key tiles that need gradients of k and v (a cache's newest block). The
            gradients of the other tiles are not used and may be zero. None: all tiles need them.
        keep: Whether the forward pass of a differentiated call may keep alpha, c_L and Y for the backward pass.
        intermediates: Rounding of alpha and Y between the two stages, as defined by `intermediates.stored`; None: the
            inputs' dtype or wider. Gradients are computed at the rounded alpha and Y.
    """

    scale: float
    num_iters: int = 1
    masked: bool = False
    grad_tiles: int | None = None
    keep: bool = False
    intermediates: str | None = None


@runtime_checkable
class Attend(Protocol):
    """Attention over tiles, differentiable in q, k and v."""

    def __call__(
        self,
        problem: Problem,
        q: Float[Array, "B A b1 b2 H D"],
        k: Float[Array, "B C b1 b2 H D"],
        v: Float[Array, "B C b1 b2 H D"],
        visible: Int[Array, " A"],
    ) -> Float[Array, "B A b1 b2 H D"]:
        """Returns the output tiles; query tile a sees the key tiles c < visible[a]."""
        ...


@runtime_checkable
class Supports(Protocol):
    """The reason why a backend does not support a call, as a sentence, or None if it does."""

    def __call__(self, problem: Problem, q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct) -> str | None:
        """Takes shapes and dtypes of the arguments of `Attend`."""
        ...


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: its name, the calls that it supports, and the differentiable computation."""

    name: str
    supports: Supports
    attend: Attend


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseProblem:
    """The static part of a call of block-sparse attention.

    Attributes:
        scale: Softmax scale.
        rows: Largest number of queries in a block.
        columns: Largest number of keys in a block.
        width: Half-width of a band: in blocks that are not whole, a query sees the keys whose places are at most this
            far from its own. None: no band, it sees all keys of the block.
        sink: With a band, keys at places below this one are seen too.
        even: Whether every listed block is whole, so that no mask is needed.
    """

    scale: float
    rows: int
    columns: int
    width: int | None = None
    sink: int = 0
    even: bool = False


class Side(NamedTuple):
    """The blocks of one side, queries or keys, each with a list of the blocks of the other side that it meets.

    Whole blocks come first in a list: they have the largest size and need no mask. The others follow, longest first.

    Attributes:
        starts: int32 [B, H, blocks + 1], the first token of each block, which is one past the last of the one before.
        first: int32 [B, H, blocks, L], the first token of each listed block, on the other side.
        last: int32 [B, H, blocks, L], one past the last token of each listed block.
        whole: int32 [B, H, blocks], number of whole blocks in the list.
        count: int32 [B, H, blocks], length of the list.
        places: int32 [B, H, tokens], place of each token in the order in which the band is defined; [B, H, 1] without a
            band.
    """

    starts: jax.Array
    first: jax.Array
    last: jax.Array
    whole: jax.Array
    count: jax.Array
    places: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseResiduals:
    """The residuals of block-sparse attention: values that the forward pass keeps for the backward pass.

    Attributes:
        q: [B, Nq, H, D].
        k: [B, Nk, H, D].
        v: [B, Nk, H, D].
        out: [B, Nq, H, D].
        lse: float32 [B, H, Nq], base-2 log-sum-exp of each query's scores; infinite for a query that sees no key.
        queries: Blocks of queries, with lists of blocks of keys.
        keys: Blocks of keys, with lists of blocks of queries.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    out: jax.Array
    lse: jax.Array
    queries: Side
    keys: Side


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """The residuals: values that the forward pass keeps for the backward pass; R and L are recomputed.

    Attributes:
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        v: [B, C, b1, b2, H, D].
        visible: int32 [A].
        out: [B, A, b1, b2, H, D].
        lse: [B, A, b1, b2, H], log-sum-exp of the last step's scores of L over all (c, k), in float32 or wider.
        kept: alpha, Y and c_L in the backend's layout; None if they are recomputed.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    visible: jax.Array
    out: jax.Array
    lse: jax.Array
    kept: tuple[jax.Array, ...] | None = None


Forward = Callable[..., tuple[jax.Array, jax.Array]]
Vjp = Callable[[Problem, Residuals, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def differentiable(forward: Forward, vjp: Vjp, keeping: Callable[..., tuple] | None = None) -> Attend:
    """Joins a forward pass (problem, q, k, v, visible) -> (out, lse) and its vjp into an `Attend`.

    Args:
        forward: Returns out [B, A, b1, b2, H, D] and lse [B, A, b1, b2, H].
        vjp: (problem, residuals, d_out) -> (dq, dk, dv).
        keeping: The forward pass if `problem.keep`; returns out, lse and `Residuals.kept`. None: always `forward`.

    Returns:
        The differentiable function.
    """

    def attend(problem, q, k, v, visible):
        return forward(problem, q, k, v, visible)[0]

    def fwd(problem, q, k, v, visible):
        out, lse, *kept = (keeping if problem.keep and keeping else forward)(problem, q, k, v, visible)
        out, lse = checkpoint_name(out, SAVED), checkpoint_name(lse, SAVED)
        return out, Residuals(q, k, v, visible, out, lse, *kept)

    def bwd(problem, residuals, d_out):
        return *vjp(problem, residuals, d_out), None

    op = jax.custom_vjp(attend, nondiff_argnums=(0,))
    op.defvjp(fwd, bwd)

    def aligned(problem, q, k, v, visible):
        return op(problem, *vary_alike(q, k, v, visible))

    return aligned


def vary_alike(*operands: jax.Array) -> list[jax.Array]:
    """Under `shard_map`, makes all operands vary over every mesh axis that any of them varies over.

    Operands that were the same along such an axis then get gradients summed over it.
    """
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    missing = [tuple(frozenset().union(*varying) - axes) for axes in varying]
    return [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(operands, missing, strict=True)]


def accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of softmaxes and sums: float32, or wider if the inputs are."""
    return jnp.promote_types(dtype, jnp.float32)


def visibility(visible: Int[Array, " A"], tiles: int) -> Bool[Array, "A C"]:
    """The mask of key tiles that each query tile sees.

    Examples:
        >>> visibility(jnp.array([1, 3]), 3).astype(int).tolist()
        [[1, 0, 0], [1, 1, 1]]

    Args:
        visible: int32 [A], number of leading key tiles that each query tile sees.
        tiles: Number of key tiles C.

    Returns:
        bool [A, C].
    """
    return jnp.arange(tiles)[None, :] < visible[:, None]
