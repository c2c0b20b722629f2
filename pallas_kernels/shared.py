"""Shared-memory tiles that the copy engine and the tensor cores see differently."""

from collections.abc import Sequence


def tile_scratch(shapes: Sequence[tuple[int, ...]], dtype, slab: int, split: tuple[int, int] | None = None):
    """Scratch for tiles [..., rows, slab] of 16-bit elements, in two or three views of the same bytes.

    The tensor cores want tiles of 8 rows, swizzled; the copy engine, told of such tiles, can only start at a multiple
    of 8 rows. A row of a slab is exactly as wide as the swizzle, so its tiles lie one after another and plain swizzled
    rows are the same bytes: the view the copy engine gets, free to start at any row.

    Args:
        shapes: Shapes of the tiles, each ending in `slab`.
        dtype: A 16-bit float.
        slab: Elements of a row.
        split: Two sizes whose product is 64; adds a view for copies in which 64 rows are these two dimensions.

    Returns:
        A scratch type; `tile_views` splits the reference made from it.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    swizzle = plgpu.SwizzleTransform(2 * slab)

    def view(shapes, *transforms):
        return tuple(plgpu.SMEM(shape, dtype, transforms=transforms) for shape in shapes)

    views = [view(shapes, plgpu.TilingTransform((8, slab)), swizzle), view(shapes, swizzle)]
    if split:
        rows = split[0] * split[1]
        views.append(view([(*s[:-2], *(split if s[-2] == rows else s[-2:-1]), slab) for s in shapes], swizzle))
    return plgpu.RefUnion(*views)


def tile_views(scratch):
    """The references of a `tile_scratch`: to multiply, load and store; to copy from and to; and in split rows."""
    return tuple(scratch)
