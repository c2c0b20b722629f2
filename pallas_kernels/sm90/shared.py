"""What the kernels share: tiles that the copy engine and the tensor cores see differently, sums, stores."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from monarchrt.pallas_kernels.sm90.config import ROWS, ColumnBlocks
from monarchrt.pallas_kernels.sm90.types import Index, Ref, Refs

LOG2E = math.log2(math.e)


def tile_scratch(
    shapes: Sequence[tuple[int, ...]],
    dtype: DTypeLike,
    slab: int,
    split: tuple[int, int] | None = None,
    also: Sequence[DTypeLike] = (),
) -> Any:
    """Scratch for tiles [..., rows, slab], in two or three views of the same bytes.

    The tensor cores want tiles of 8 rows, swizzled; the copy engine, told of such tiles, can only start at a multiple
    of 8 rows. A row of a slab is exactly as wide as the swizzle, so its tiles lie one after another and plain swizzled
    rows are the same bytes: the view the copy engine gets, free to start at any row.

    Args:
        shapes: Shapes of the tiles, each ending in `slab`.
        dtype: A float of 16 or 8 bits.
        slab: Elements of a row, 32, 64 or 128 bytes.
        split: Two sizes whose product is 64; adds a view for copies in which 64 rows are these two dimensions.
        also: Dtypes of the same size; adds a view to multiply, load and store for each.

    Returns:
        A scratch type; `tile_views` splits the reference made from it.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    swizzle = plgpu.SwizzleTransform(slab * jnp.dtype(dtype).itemsize)  # pyright: ignore[reportAbstractUsage]
    tiled = plgpu.TilingTransform((8, slab))  # pyright: ignore[reportAbstractUsage]

    def view(shapes, *transforms, dtype=dtype):
        return tuple(plgpu.SMEM(shape, dtype, transforms=transforms) for shape in shapes)

    views = [view(shapes, tiled, swizzle), view(shapes, swizzle)]
    if split:
        rows = split[0] * split[1]
        views.append(view([(*s[:-2], *(split if s[-2] == rows else s[-2:-1]), slab) for s in shapes], swizzle))
    views += [view(shapes, tiled, swizzle, dtype=x) for x in also]
    return plgpu.RefUnion(*views)


def tile_views(scratch: Ref) -> tuple[Refs, ...]:
    """The references of a `tile_scratch`: to multiply, load and store; to copy from and to; in split rows; and
    of other dtypes."""
    return tuple(scratch)


def gradient_scales(dtype: DTypeLike, scale: float) -> tuple[float, float]:
    """Factors of the scores' gradient before it is rounded to `dtype` and of what is made from it, the scale in all.

    Before, it costs nothing; in float16 small gradients would lose digits. The first is not zero.
    """
    return (scale, 1.0) if dtype == jnp.bfloat16 and scale else (1.0, scale)


def part(
    split: ColumnBlocks, item: Index, whole: Callable[[Index, Index], None], packs: Callable[[Index], None]
) -> None:
    """Calls `whole(tile, first column)` or `packs(first tile)`, whichever kind the item is."""
    from jax import lax
    from jax.experimental import pallas as pl

    if split.full and split.items > split.whole:
        pl.when(item < split.whole)(lambda: whole(lax.div(item, split.full), lax.rem(item, split.full) * ROWS))
        pl.when(item >= split.whole)(lambda: packs((item - split.whole) * split.packed))
    elif split.full:
        whole(lax.div(item, split.full), lax.rem(item, split.full) * ROWS)
    else:
        packs(item * split.packed)


def accumulate(products: Callable[[Any], None], sums: Any) -> Any:
    """Calls `products` with accumulators of the tensor cores that start as `sums`.

    Args:
        products: Gets one accumulator, or a list as long as that of the sums.
        sums: An array in registers, or a list of them.

    Returns:
        What the accumulators hold afterwards, as the sums.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return pl.run_state(products)(jax.tree.map(plgpu.WGMMAAccumulatorRef.init, sums))


def unhoisted(index: Index, turn: Index) -> Index:
    """`index` as the compiler cannot prove it to be: the same in every turn of a loop.

    Addresses made from an index that does not change are computed before the loop, one for each operand of each matrix
    product; they do not fit the registers, and are read back from device memory in every turn.

    Args:
        index: An integer.
        turn: Counts the turns of the loop, int32 below 2^30, that starts at no known number.

    Returns:
        The integer.
    """
    return index + jax.lax.shift_right_logical(turn, 30)


def store_parts(target: Ref, value: jax.Array) -> None:
    """Stores to device memory what fills no whole sectors there, as columns: jax 0.12 wants that said."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    store = getattr(plgpu, "store", None)
    if store is None:  # jax 0.11
        target[...] = value
    else:
        store(target, value, optimized=False)


def varying(x: jax.Array, *sources: jax.Array) -> jax.Array:
    """Marks x as different on every device along the axes of `shard_map` that any of the sources varies on."""
    axes = frozenset().union(*(jax.typeof(y).manual_axis_type.varying for y in sources))
    missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x
