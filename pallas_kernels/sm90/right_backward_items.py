"""Back through R, what both its kernels share: items and where they lie, R and its scores' gradient in registers."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32

from monarchrt.pallas_kernels.sm90.config import ROWS
from monarchrt.pallas_kernels.sm90.roles import KeyRowItems
from monarchrt.pallas_kernels.sm90.shared import LOG2E
from monarchrt.pallas_kernels.sm90.types import Index, Ref, Rows, Tile

NOWHERE = -1e20  # a score below all, whose products with gradients are finite


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items(KeyRowItems):
    """The work of a kernel.

    Attributes:
        width: Keys of a key row in a product, b2 or more.
    """

    width: int

    def real_columns(self, item: Index) -> Bool[Array, "64"]:
        """Which of an item's 64 rows are columns of the chunk's query tiles [64]."""
        import jax.experimental.pallas.mosaic_gpu as plgpu

        split, cols = self.split, self.q.shape[3]
        row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
        in_whole = row < cols - lax.rem(item, max(split.full, 1)) * ROWS
        if split.items == split.whole:
            return in_whole
        tile = (item - split.whole) * split.packed + lax.div(row, split.tail_rows)
        in_packs = (lax.rem(row, split.tail_rows) < cols - split.full * ROWS) & (tile < self.tiles)
        if not split.full:
            return in_packs
        return jnp.where(lax.broadcast(item < split.whole, (ROWS,)), in_whole, in_packs)

    def entropy_gradient(self, ref: Ref, item: Index) -> Float32[Array, "64"]:
        """The gradient of c_L for an item's 64 rows [64]; 0 for those that are no columns, which hold anything."""
        import jax.experimental.pallas.mosaic_gpu as plgpu

        d_c = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
        return jnp.where(self.real_columns(item), d_c, 0.0)

    def outputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Types of dk, dv and s dZ."""
        batch, _, _, cols, _, slabs, slab = self.q.shape
        struct, split = jax.ShapeDtypeStruct, self.split
        gradient = struct((batch, self.pairs, cols, self.heads, slabs, slab), self.q.dtype)
        d_scores = struct((batch * self.heads, split.items, self.pairs, self.width, split.used), self.q.dtype)
        return gradient, gradient, d_scores


def put(value: Float[Array, "64 w"], ref: Ref) -> None:
    """Stores [64, W] turned, as [W, 64] in the tile's dtype."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    turned = plgpu.layout_cast(value.astype(ref.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    ref.transpose((1, 0))[...] = turned


def softmax(z: Float32[Array, "64 w"], scale: float) -> tuple[Float32[Array, "64 w"], Float32[Array, "64 w"]]:
    """R and its logarithm in units of log 2, [64 j, W], from Q K^T, `NOWHERE` where no key is."""
    factor = scale * LOG2E
    top = z.max(axis=1) * factor
    # R again (paper, A.2)
    r = jnp.exp2(z * factor - _wide(top, z))
    total = r.sum(axis=1)
    return r * _wide(1.0 / total, z), z * factor - _wide(top + jnp.log2(total), z)


def through_softmax(
    r: Float32[Array, "64 w"],
    log_r: Float32[Array, "64 w"],
    d_r: Float32[Array, "64 w"],
    d_log: Float32[Array, "64"],
    scale: float,
    dtype: DTypeLike,
) -> tuple[Float[Array, "64 w"], Float[Array, "64 w"]]:
    """R and s dZ, [64 j, W], in `dtype`, from what `softmax` gave, d_alpha K^T + dY V^T and d_c [64]."""
    d_r = d_r + _wide(d_log * (1 / LOG2E), r) * log_r
    mean = (r * d_r).sum(axis=1) * scale
    d_z = r * (d_r * scale - _wide(mean, r))
    return r.astype(dtype), d_z.astype(dtype)


def _wide(x: Rows, like: Tile) -> Tile:
    return lax.broadcast_in_dim(x, like.shape, [0])
