"""Shared-memory tiles that the copy engine and the tensor cores see differently."""

from collections.abc import Sequence


def tile_scratch(shapes: Sequence[tuple[int, ...]], dtype, slab: int):
    """Scratch for tiles [..., rows, slab] of 16-bit elements, in two views of the same bytes.

    The tensor cores want tiles of 8 rows, swizzled; the copy engine, told of such tiles, can only start at a multiple
    of 8 rows. A row of a slab is exactly as wide as the swizzle, so its tiles lie one after another and plain swizzled
    rows are the same bytes: the view the copy engine gets, free to start at any row.

    Args:
        shapes: Shapes of the tiles, each ending in `slab`.
        dtype: A 16-bit float.
        slab: Elements of a row.

    Returns:
        A scratch type; `tile_views` splits the reference made from it.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    swizzle = plgpu.SwizzleTransform(2 * slab)

    def view(*transforms):
        return tuple(plgpu.SMEM(shape, dtype, transforms=transforms) for shape in shapes)

    return plgpu.RefUnion(view(swizzle), view(plgpu.TilingTransform((8, slab)), swizzle))


def tile_views(scratch):
    """The references of a `tile_scratch`: those to copy from and to, and those to multiply, load and store."""
    copied, computed = scratch
    return copied, computed
