"""What a backend is: the call it is given, what it promises, and what its two passes hand to each other.

Backends and kernels import this module and nothing else of the library; which backends there are is `backends`.
Arrays are tiles, [B, A or C, b1, b2, H, D]: batch, query or key tiles, rows and columns of a tile, heads, head size.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from monarch_jax._typing import Array, Bool, Float, Int

SAVED = "monarch_attention"  # what `jax.checkpoint` policies call the output and its log-sum-exp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The static part of one call, all that a backend may specialise on besides shapes and dtypes.

    Attributes:
        scale: Softmax scale s.
        num_iters: Refinement steps T.
        masked: Whether `visible` may hide any key tile; False promises that every query tile sees all.
        grad_tiles: How many of the last visible key tiles need gradients of k and v (a cache's newest block); the
            gradients of the other tiles are not used and may be left zero. None: all tiles need them.
        keep: Whether the forward pass of a differentiated call may keep alpha, c_L and Y for the backward pass.
        intermediates: What alpha and Y are rounded to between the two stages, as `intermediates.stored` says; None:
            to the inputs' dtype, or less. Gradients are those at the rounded alpha and Y.
    """

    scale: float
    num_iters: int = 1
    masked: bool = False
    grad_tiles: int | None = None
    keep: bool = False
    intermediates: str | None = None


@runtime_checkable
class Attend(Protocol):
    """Computes the attention over tiles; differentiable in q, k and v."""

    def __call__(
        self,
        problem: Problem,
        q: Float[Array, "B A b1 b2 H D"],
        k: Float[Array, "B C b1 b2 H D"],
        v: Float[Array, "B C b1 b2 H D"],
        visible: Int[Array, " A"],
    ) -> Float[Array, "B A b1 b2 H D"]:
        """Query tile a sees the key tiles c < visible[a]."""
        ...


@runtime_checkable
class Supports(Protocol):
    """Says why a backend cannot serve a call, or None when it can."""

    def __call__(self, problem: Problem, q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct) -> str | None:
        """Shapes as in `Attend`, no data."""
        ...


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: its name, what it cannot do, and the differentiable computation."""

    name: str
    supports: Supports
    attend: Attend


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseProblem:
    """The static part of a call of block-sparse attention.

    Attributes:
        scale: Softmax scale.
        rows: Queries that a block holds at most.
        columns: Keys that a block holds at most.
        width: In blocks that are not seen whole, a query sees the keys whose places are at most so far from its own;
            None sees all.
        sink: In those, it also sees the keys whose places are below this one.
        even: Whether every block that is listed is seen whole, queries and keys: there is nothing to mask.
    """

    scale: float
    rows: int
    columns: int
    width: int | None = None
    sink: int = 0
    even: bool = False


class Side(NamedTuple):
    """The blocks of one side, queries or keys, and for each of them the blocks of the other side that it meets.

    Lists hold the blocks that are seen whole first: these hold as many tokens as a block can and need no mask. Of the
    others, longer ones come first.

    Attributes:
        starts: int32 [B, H, blocks + 1], token that a block begins with; it ends where the next one begins.
        first: int32 [B, H, blocks, L], the token that each block of the list begins with, on the other side.
        last: int32 [B, H, blocks, L], one past its last.
        whole: int32 [B, H, blocks], how many of the list are seen whole.
        count: int32 [B, H, blocks], how many there are in the list.
        places: int32 [B, H, tokens], the place of each token in the order that the band is for; [B, H, 1] without one.
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
    """What the forward pass of block-sparse attention keeps.

    Attributes:
        q: [B, Nq, H, D].
        k: [B, Nk, H, D].
        v: [B, Nk, H, D].
        out: [B, Nq, H, D].
        lse: float32 [B, H, Nq], log-sum-exp of a query's scores, to the base 2; infinite where it sees no key.
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
    """What the forward pass keeps for the backward pass; R and L are recomputed.

    Attributes:
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        v: [B, C, b1, b2, H, D].
        visible: int32 [A].
        out: [B, A, b1, b2, H, D].
        lse: [B, A, b1, b2, H], log-sum-exp of the last step's scores of L over all (c, k), in float32 or wider.
        kept: alpha, Y and c_L as the backend lays them out, or None: they are recomputed.
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
        keeping: The forward pass where `problem.keep`, returns out, lse and `Residuals.kept`; None: there is no other.

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
    """Under `shard_map`, what varies over a mesh axis makes all vary: the others' gradients are summed over it."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    missing = [tuple(frozenset().union(*varying) - axes) for axes in varying]
    return [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(operands, missing, strict=True)]


def accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Softmaxes and sums are in float32, or wider when the inputs are."""
    return jnp.promote_types(dtype, jnp.float32)


def visibility(visible: Int[Array, " A"], tiles: int) -> Bool[Array, "A C"]:
    """Which of so many key tiles each query tile sees.

    Examples:
        >>> visibility(jnp.array([1, 3]), 3).astype(int).tolist()
        [[1, 0, 0], [1, 1, 1]]

    Args:
        visible: int32 [A], how many leading key tiles each query tile sees.
        tiles: Key tiles, C.

    Returns:
        bool [A, C].
    """
    return jnp.arange(tiles)[None, :] < visible[:, None]
