"""Back through R, for one item: where its 64 rows lie, R and its scores' gradient in registers."""

import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels.config import ROWS, ColumnBlocks
from monarchrt.pallas_kernels.shared import LOG2E

NOWHERE = -1e20  # a score below all, whose products with gradients are finite


def part(split: ColumnBlocks, item, whole, packs):
    """Calls `whole(tile, first column)` or `packs(first tile)`, whichever kind the item is."""
    import jax.experimental.pallas as pl

    if split.full and split.items > split.whole:
        pl.when(item < split.whole)(lambda: whole(lax.div(item, split.full), lax.rem(item, split.full) * ROWS))
        pl.when(item >= split.whole)(lambda: packs((item - split.whole) * split.packed))
    elif split.full:
        whole(lax.div(item, split.full), lax.rem(item, split.full) * ROWS)
    else:
        packs(item * split.packed)


def real_columns(split: ColumnBlocks, cols: int, tiles: int, item):
    """Which of an item's 64 rows are columns of the chunk's query tiles [64]."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    row = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plgpu.Layout.WGMMA.reduce(1))
    in_whole = row < cols - lax.rem(item, max(split.full, 1)) * ROWS
    if split.items == split.whole:
        return in_whole
    tile = (item - split.whole) * split.packed + lax.div(row, split.tail_rows)
    in_packs = (lax.rem(row, split.tail_rows) < cols - split.full * ROWS) & (tile < tiles)
    if not split.full:
        return in_packs
    return jnp.where(lax.broadcast(item < split.whole, (ROWS,)), in_whole, in_packs)


def softmax(z, scale: float):
    """R and its logarithm in units of log 2, [64 j, W], from Q K^T, `NOWHERE` where no key is."""
    factor = scale * LOG2E
    top = z.max(axis=1) * factor
    # R again (paper, A.2)
    r = jnp.exp2(z * factor - _wide(top, z))
    total = r.sum(axis=1)
    return r * _wide(1.0 / total, z), z * factor - _wide(top + jnp.log2(total), z)


def through_softmax(r, log_r, d_r, d_log, scale: float, dtype):
    """R and s dZ, [64 j, W], in `dtype`, from what `softmax` gave, d_alpha K^T + dY V^T and d_c [64]."""
    d_r = d_r + _wide(d_log * (1 / LOG2E), r) * log_r
    mean = (r * d_r).sum(axis=1) * scale
    d_z = r * (d_r * scale - _wide(mean, r))
    return r.astype(dtype), d_z.astype(dtype)


def _wide(x, like):
    return lax.broadcast_in_dim(x, like.shape, [0])
