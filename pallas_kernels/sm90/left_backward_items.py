"""Back through L, what both its kernels share: items, where they and their intermediates lie, L in registers."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from monarchrt.pallas_kernels.sm90.config import ROWS, SLAB, column_blocks
from monarchrt.pallas_kernels.sm90.roles import QueryTileItems
from monarchrt.pallas_kernels.sm90.shared import LOG2E
from monarchrt.pallas_kernels.sm90.types import Index, Place, Ref


def load_in_order(steps: Index, ahead: int, load: Callable[[Index], None], load_query: Callable[[], None]) -> None:
    """Calls `load(i)` for every step of an item, and `load_query()`, which waits for the item before to end.

    Args:
        steps: Steps of the item.
        ahead: Steps whose place is free before the item before has ended: what they need comes first, so that it is on
            its way while the item ends.
        load: Loads what a step needs.
        load_query: Loads q and dO.
    """
    import jax.experimental.pallas as pl

    def turn(i, _):
        pl.when(i == jnp.minimum(steps, ahead))(load_query)
        pl.when(i < steps)(lambda: load(i))
        return ()

    lax.fori_loop(0, steps + 1, turn, ())


def seen_bias(ref: Ref, step: Index, limit: Index) -> Float32[Array, "64"]:
    """c_L of the 64 pairs of a step, infinite for pairs that are not seen [64]."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    row = plgpu.Layout.WGMMA.reduce(1)
    bias = plgpu.load(ref, layout=row, optimized=False)
    pair = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row) + step * ROWS
    return jnp.where(pair < limit, bias, jnp.inf)


def probabilities(
    x: Float32[Array, "n w"], bias: Float32[Array, " n"], lse: Ref, scale: float
) -> Float32[Array, "n w"]:
    """P = exp(x - lse), [64 pairs, W], of the products of alpha with q, c_L [64] and the reference of lse [W]."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    lse = plgpu.load(lse, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    x = x * (scale * LOG2E) - lax.broadcast_in_dim(bias, x.shape, [0])
    # L again (paper, A.2)
    return jnp.exp2(x - lax.broadcast_in_dim(lse, x.shape, [1]))


def scores_gradient(
    p: Float32[Array, "n w"], d_p: Float32[Array, "n w"], delta: Ref, early: float, dtype: DTypeLike
) -> Float[Array, "n w"]:
    """P * (dP - delta), [64 pairs, W], with the first of `gradient_scales`, from the reference of delta [W]."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    delta = plgpu.load(delta, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return (p * (d_p * early - lax.broadcast_in_dim(delta, d_p.shape, [1]))).astype(dtype)


def padded(x: Float[Array, "n _"], depth: int) -> Float[Array, "n {depth}"]:
    """[64 pairs, W] with zeros up to the depth of the next products."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    if x.shape[1] == depth:
        return x
    zeros = jnp.zeros((ROWS, depth - x.shape[1]), x.dtype)
    return lax.concatenate([x, plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)], 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items(QueryTileItems):
    """The work of a kernel: `columns` columns of a query tile and head are an item.

    Attributes:
        whole: Whether alpha, Y and c_L are those of all heads and query tiles, not of the chunk.
        columns: Columns of an item.
    """

    whole: bool
    columns: int

    @property
    def groups(self) -> int:
        """Items of a query tile and head."""
        return -(-self.q.shape[3] // self.columns)

    @property
    def count(self) -> int:
        """All items."""
        return self.q.shape[0] * self.heads * self.tiles * self.groups

    def place(self, number: Index, limits: Ref, tile0: Index) -> tuple[Index, Place, Index, Index]:
        """Index x, batch entry, head and tile of the chunk, first column, pairs seen."""
        item = self.count - 1 - number  # what was made last comes first: it may still be in the L2 cache
        x = lax.div(item, self.groups)
        where, limit = self.seen_at(x, limits, tile0)
        return x, where, lax.rem(item, self.groups) * self.columns, limit

    def source(
        self, x: Index, where: Place, head0: Index, tile0: Index
    ) -> tuple[Index, Callable[[Index], tuple[Index, Index, Index]]]:
        """Index of alpha and Y; function from a column to the place of c_L, before its pairs."""
        entry, head, tile = where
        _, all_tiles, _, cols, all_heads, _ = self.q.shape
        split = column_blocks(cols, all_tiles if self.whole else self.tiles, self.masked)
        lane = lax.div(x, self.tiles)
        if self.whole:
            lane, tile = entry * all_heads + head0 + head, tile0 + tile
            x = lane * all_tiles + tile
        return x, lambda column: (lane, *split.place(tile, column))

    def outputs(self, rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Types of d_alpha, dY, d_c and the part of dq through L, of `rows` rows."""
        batch, _, _, cols, _, dim = self.q.shape
        struct, dtype, lanes = jax.ShapeDtypeStruct, self.q.dtype, batch * self.heads
        split = self.split
        gradient = struct((lanes * self.tiles, self.pairs, cols, dim // SLAB, SLAB), dtype)
        return (
            gradient,
            gradient,
            struct((lanes, split.items, -(-self.pairs // ROWS) * ROWS, ROWS), jnp.float32),
            struct((lanes, split.items, rows, split.used, dim), dtype),
        )
