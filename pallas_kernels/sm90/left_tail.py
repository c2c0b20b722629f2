"""Stage 2 on Hopper for a few rows i, with the pairs as the rows of its products.

A warpgroup's product has 64 rows or a multiple, but any multiple of 8 columns. So the 7 rows of 135 that are left after
two blocks of 64 are columns here: scores [pairs, rows], sums [D, rows].
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from monarchrt.pallas_kernels.sm90.config import ROWS, SLAB
from monarchrt.pallas_kernels.sm90.shared import LOG2E, accumulate
from monarchrt.pallas_kernels.sm90.types import Index, Ref

Sums = tuple[Float32[Array, "..."], ...]
"""Greatest score of a row [rows], weights [pairs of a step, rows], slabs of the output [64 d, rows]."""


def start(rows: int, pairs: int, slabs: int) -> Sums:
    """What `step` adds to, for blocks of `pairs`."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    layout = plgpu.Layout.WGMMA
    top = plgpu.layout_cast(jnp.full((rows,), -jnp.inf, jnp.float32), layout.reduce(0))
    shapes = (pairs, rows), *[(SLAB, rows)] * slabs
    return top, *(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), layout) for shape in shapes)


def step(
    sums: Sums,
    *,
    q: Callable[[int], Ref],
    alpha: Callable[[int], Ref],
    y: Callable[[int], Ref],
    weights: Ref,
    bias: Ref,
    seen: Index,
    scale: float,
    read_alpha: Callable[[], None],
    await_y: Callable[[], None],
) -> Sums:
    """Adds a block of pairs.

    Args:
        sums: So far.
        q: Called with n, the reference [rows, 64] of slab n.
        alpha: Called with n, the reference [pairs, 64] of slab n.
        y: As alpha.
        weights: Reference [pairs/64, rows, 64], scratch.
        bias: Reference to c_L, [pairs] in float32.
        seen: Pairs from the block's first on that are seen, int32; may be more than there are in it.
        scale: Softmax scale.
        read_alpha: Called when alpha and the bias have been read.
        await_y: Called before Y is read.

    Returns:
        The sums.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    top, total, *acc = sums
    pairs, rows = total.shape
    slabs, layout, turned = len(acc), plgpu.Layout.WGMMA, plgpu.Layout.WGMMA_TRANSPOSED

    def scores(acc):
        for n in range(slabs):
            plgpu.wgmma(acc, alpha(n), q(n).transpose((1, 0)))
        return acc[...]

    s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((pairs, rows), jnp.float32)) * (scale * LOG2E)
    c = plgpu.load(bias, layout=layout.reduce(1), optimized=False)
    pair = plgpu.broadcasted_iota(jnp.int32, (pairs,), 0, layout=layout.reduce(1))
    c = jnp.where(pair < seen, c, jnp.inf)  # pairs that are not seen
    read_alpha()
    s = s - lax.broadcast_in_dim(c, s.shape, [0])
    new_top = jnp.maximum(top, s.max(axis=0))  # its barrier: every warp's products with the weights before are done
    factor = jnp.exp2(top - new_top)
    # the update of L (paper, A.2): softmax over (c, k) of s <Q, alpha> - c_L
    p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [1]))
    total = total * lax.broadcast_in_dim(factor, total.shape, [1]) + p
    acc = [x * lax.broadcast_in_dim(factor, x.shape, [1]) for x in acc]
    for m in range(pairs // ROWS):
        part = lax.slice(p, (m * ROWS, 0), ((m + 1) * ROWS, rows)).astype(weights.dtype)
        weights.at[m].transpose((1, 0))[...] = plgpu.layout_cast(part, turned)
    plgpu.commit_smem()
    await_y()

    def products(accs):
        for n in range(slabs):
            for m in range(pairs // ROWS):
                values = y(n).at[pl.ds(m * ROWS, ROWS)].transpose((1, 0))
                plgpu.wgmma(accs[n], values, weights.at[m].transpose((1, 0)))

    acc = accumulate(products, acc)
    return new_top, total, *acc


def finish(sums: Sums, out: Ref, lse: Ref) -> None:
    """Writes the output to a reference [D/64, rows, 64], the log-sum-exp to one [rows] in float32."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    top, total, *acc = sums
    weight = total.sum(axis=0)
    inverse = 1.0 / weight
    for n, x in enumerate(acc):
        value = (x * lax.broadcast_in_dim(inverse, x.shape, [1])).astype(out.dtype)
        out.at[n].transpose((1, 0))[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
    lse[...] = (top + jnp.log2(weight)) * (1 / LOG2E)
