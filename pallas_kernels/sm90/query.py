"""dq on Hopper: what comes through L plus s dZ K, summed over the key tiles, with wgmma and TMA.

For one head and row k this is, for every query tile a, a product of dZ[a], [j, (c, l)], with the key rows K[c, k].
A persistent block works on as many blocks of 64 columns j at a time as it has computing warpgroups, which share the
key rows, and runs through c.
"""

import jax
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels.sm90 import shared
from monarchrt.pallas_kernels.sm90.config import ROWS, SLAB, QueryConfig, column_blocks
from monarchrt.pallas_kernels.sm90.shared import Role


def query_role(
    q: jax.ShapeDtypeStruct,
    k: jax.ShapeDtypeStruct,
    *,
    heads: int,
    tiles: int,
    masked: bool,
    left_width: int,
    config: QueryConfig,
) -> Role:
    """Finishes dq for a chunk of query tiles and heads.

    Inputs of the role: k; s dZ [B * heads, items, C*b1, W, 64 or less] as `right_backward_role` leaves it; the part of
    dq through L in q's dtype, [B * heads, items, b1 or more, 64 or less, D/64, 64], with 64 rows for every `left_width`
    of b1; limits, int32 [A], the pairs that a query tile sees, read when `masked`; start, int32, the chunk's first head
    and query tile first.

    Output: dq [B, tiles, b1, b2, heads, D/64, 64] in q's dtype.

    Args:
        q: [B, A, b1, b2, H, D/64, 64].
        k: [B, C*b1, b2, H, D/64, 64].
        heads: Heads of the chunk.
        tiles: Query tiles of the chunk.
        masked: Whether limits may be below C*b1.
        left_width: Rows of b1 in a block of 64.
        config: Sizes.

    Returns:
        The role.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    batch, _, rows, cols, _, slabs, _ = q.shape
    key_tiles = k.shape[1] // rows
    groups, stages, width, depth = config.warpgroups, config.stages, config.width(cols), config.depth(cols)
    split = column_blocks(cols, tiles, masked)
    full, tail_rows, packed, items = split.full, split.tail_rows, split.packed, split.items
    tail = items > split.whole
    item_groups = -(-items // groups)
    some_miss = masked or items % groups > 0  # whether a warpgroup may have no item or see fewer keys than another
    units = batch * heads * rows * item_groups
    blocks = min(config.blocks, units)
    dtype = q.dtype
    layout = plgpu.Layout.WGMMA

    def run(block, inputs, outputs, scratch):
        k, dz, dq_left, limits, start = inputs
        (dq,) = outputs
        smem, keys_full, dz_full, free, left_full, left_free = scratch
        views = shared.tile_views(smem)
        key_mma, dz_mma, out_reg = views[0]  # dq through L comes where dq leaves
        key_in, dz_in, out_in = views[1]
        out_packs = views[-1][2]
        group = lax.axis_index("group")
        head0, tile0 = start[0], start[1]
        turns = lax.div(units - block + blocks - 1, blocks)

        def place(t):
            """Lane, batch entry, head of the chunk, row k and first item of a turn."""
            unit = units - 1 - (block + t * blocks)  # what was made last comes first: it may still be in the L2 cache
            lane = lax.div(unit, rows * item_groups)
            where = lax.div(lane, heads), lax.rem(lane, heads)
            return lane, *where, lax.rem(lax.div(unit, item_groups), rows), lax.rem(unit, item_groups) * groups

        def key_steps(item):
            """Key tiles that an item's query tile sees; none if there is no such item."""
            if not masked:
                return jnp.where(item < items, key_tiles, 0)
            tile = jnp.minimum(lax.div(item, full), tiles - 1)
            return jnp.where(item < items, lax.div(limits[tile0 + tile], rows), 0)

        def steps_of(first):
            """Key tiles that any of the items sees."""
            if not masked:
                return jnp.int32(key_tiles)
            steps = key_steps(first)
            for g in range(1, groups):
                steps = jnp.maximum(steps, key_steps(first + g))
            return steps

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(config.registers[0], action="increase")
            if depth != width:  # rows that no copy writes
                zero = plgpu.layout_cast(jnp.zeros((depth, ROWS), dtype), layout)
                for s in range(stages):
                    dz_mma[s, group] = zero
                plgpu.commit_smem()
            for s in range(stages):
                plgpu.barrier_arrive(free.at[s])

            def unit(t, done):
                _lane, entry, head, row, first = place(t)
                item = first + group
                steps, mine = steps_of(first), key_steps(item)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                pl.when(item < items)(lambda: plgpu.barrier_arrive(left_free.at[group]))
                acc = [plgpu.layout_cast(jnp.zeros((ROWS, SLAB), jnp.float32), layout) for _ in range(slabs)]

                def step(c, acc):
                    slot = lax.rem(done + c, stages)
                    plgpu.barrier_wait(keys_full.at[slot])

                    def add(_, acc):
                        plgpu.barrier_wait(dz_full.at[slot * groups + group])

                        def products(accs):
                            for n in range(slabs):
                                plgpu.wgmma(accs[n], dz_mma.at[slot, group].transpose((1, 0)), key_mma.at[slot, n])

                        return pl.run_state(products)([plgpu.WGMMAAccumulatorRef.init(x) for x in acc])

                    acc = lax.fori_loop(0, (c < mine).astype(jnp.int32), add, acc) if some_miss else add(0, acc)
                    plgpu.barrier_arrive(free.at[slot])
                    return acc

                acc = lax.fori_loop(0, steps, step, acc)

                def store_whole(tile, column):
                    target = dq.at[entry, tile, row, pl.ds(column, ROWS), head]
                    plgpu.copy_smem_to_gmem(out_in.at[group].transpose((1, 0, 2)), target)

                def store_packs(tile):
                    window = pl.ds(full * ROWS + tile * 0, tail_rows)
                    target = dq.at[entry, pl.ds(tile, packed), row, window, head]
                    plgpu.copy_smem_to_gmem(out_packs.at[group].transpose((1, 2, 0, 3)), target)

                @pl.when(item < items)
                def _():
                    plgpu.barrier_wait(left_full.at[group])
                    sums = [x + plgpu.load(out_reg.at[group, n], layout=layout) for n, x in enumerate(acc)]
                    plgpu.commit_smem()  # every warp has read
                    for n, x in enumerate(sums):
                        out_reg[group, n] = x.astype(dtype)
                    plgpu.commit_smem()
                    shared.part(split, item, store_whole, store_packs)

                return done + steps

            lax.fori_loop(0, turns, unit, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(config.registers[1], action="decrease")

            def unit(t, done):
                lane, entry, head, row, first = place(t)
                steps = steps_of(first)
                columns = pl.ds(row * 0, ROWS)  # past their end, so not static

                def load(c, _):
                    slot, pair = lax.rem(done + c, stages), c * rows + row
                    window = pl.ds(c * 0, depth)  # past the end of b2 columns, so the start must not be static
                    plgpu.barrier_wait(free.at[slot])
                    box = k.at[entry, pair, window, head0 + head]
                    plgpu.copy_gmem_to_smem(box, key_in.at[slot].transpose((1, 0, 2)), keys_full.at[slot])
                    for g in range(groups):

                        def load_dz(g=g):
                            target = dz_in.at[slot, g] if depth == width else dz_in.at[slot, g, pl.ds(0, width)]
                            box = dz.at[lane, first + g, pair, :, columns]
                            plgpu.copy_gmem_to_smem(box, target, dz_full.at[slot * groups + g])

                        pl.when(c < key_steps(first + g))(load_dz) if some_miss else load_dz()
                    return ()

                lax.fori_loop(0, steps, load, ())
                left_row = lax.div(row, left_width) * ROWS + lax.rem(row, left_width)
                for g in range(groups):

                    def load_left(g=g):  # last, as it is needed last: key rows need not wait for it
                        plgpu.barrier_wait(left_free.at[g])
                        box = dq_left.at[lane, first + g, left_row, columns]
                        plgpu.copy_gmem_to_smem(box, out_in.at[g].transpose((1, 0, 2)), left_full.at[g])

                    pl.when(first + g < items)(load_left)
                return done + steps

            lax.fori_loop(0, turns, unit, jnp.int32(0))
            for s in range(stages):
                plgpu.barrier_wait(free.at[s])

    shapes = (
        (stages, slabs, depth, SLAB),
        (stages, groups, depth, ROWS),
        (groups, slabs, ROWS, SLAB),
    )
    return Role(
        run,
        name="monarch_query_backward",
        outputs=(jax.ShapeDtypeStruct((batch, tiles, rows, cols, heads, slabs, SLAB), dtype),),
        scratch=(
            shared.tile_scratch(shapes, dtype, SLAB, (packed, tail_rows) if tail else None),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages * groups),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=groups),
            plgpu.Barrier(num_arrivals=1, num_barriers=groups),
        ),
        groups=groups,
        blocks=blocks,
    )
