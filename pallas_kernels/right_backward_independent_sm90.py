"""Back through R on Hopper, as `right_backward_sm90`, where one warpgroup's registers hold all of dK and dV (small b2).

The two computing warpgroups share nothing but the loader, so that one's softmax and the other's products overlap.
"""

import jax
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels import shared
from monarchrt.pallas_kernels.config import (
    COMPUTE_REGISTERS,
    LOAD_REGISTERS,
    ROWS,
    SLAB,
    RightBackwardConfig,
    column_blocks,
)
from monarchrt.pallas_kernels.right_backward_items import NOWHERE, part, real_columns, softmax, through_softmax
from monarchrt.pallas_kernels.shared import Role


def independent_role(
    q: jax.ShapeDtypeStruct,
    k: jax.ShapeDtypeStruct,
    *,
    scale: float,
    heads: int,
    tiles: int,
    masked: bool,
    config: RightBackwardConfig,
) -> Role:
    """The role of `right_backward_role`, each warpgroup with a key row, its K, V, dK and dV, of its own.

    q, d_alpha and dY of an item, for either warpgroup, take the next three cells of a ring of `config.ring`; once an
    item, just before the first cell that may still be in use, the loader waits for the item that used it last.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    batch, _, rows, cols, _, slabs, _ = q.shape
    pairs = k.shape[1]
    groups, ring, width = config.warpgroups, config.ring, config.width(cols)
    ahead, late = divmod(ring, 3)  # before cell `late` of item n, item n - ahead must be done with
    split = column_blocks(cols, tiles, masked)
    full, tail_rows, packed, items = split.full, split.tail_rows, split.packed, split.items
    tail = items > split.whole
    units = batch * heads * pairs
    shares = -(-units // groups)
    blocks = min(config.blocks, shares)
    dtype, f32 = q.dtype, jnp.float32
    layout = plgpu.Layout.WGMMA

    def run(block, inputs, outputs, scratch):
        q, k, v, d_alpha, d_y, d_c, limits, start = inputs
        dk, dv, dz = outputs
        smem, c_in, nowhere, key_full, key_free, first_full, last_full, free = scratch
        views = shared.tile_views(smem)
        rows_mma, key_mma, p_mma = views[0]
        rows_in, key_in, p_out = views[1]
        rows_packs = views[-1][0]
        group = lax.axis_index("group")
        tile0, bound = start[1], start[2]

        def turns():
            return lax.div(shares - block + blocks - 1, blocks)

        def place(t, g):
            """Batch entry, head of the chunk and key row of a warpgroup's turn."""
            unit = (block + t * blocks) * groups + g
            return lax.div(unit, heads * pairs), lax.rem(lax.div(unit, pairs), heads), lax.rem(unit, pairs)

        def exists(t, g):
            return (block + t * blocks) * groups + g < units

        def live(t, g):
            """Whether the key row exists and a query tile sees it."""
            return exists(t, g) & (place(t, g)[2] < bound) if masked else exists(t, g)

        def seen(t, g, item):
            """Whether the key row exists and the item's query tile sees it."""
            if not masked:
                return exists(t, g)
            return exists(t, g) & (place(t, g)[2] < limits[tile0 + lax.div(item, full)])

        def seen_counts(t, item):
            return [seen(t, g, item).astype(jnp.int32) for g in range(groups)]

        def cells(n):
            """Places of the q, d_alpha and dY of item number n."""
            first = lax.rem(3 * n, ring)
            return [jnp.where(first + kind < ring, first + kind, first + kind - ring) for kind in range(3)]

        def make(item, n, mine, key):
            """R and s dZ of item number n, [64 j, W], in the inputs' dtype; `key` is the place of K and V."""
            cell, turn = cells(n), group * (ahead + 1) + lax.rem(mine, ahead + 1)
            plgpu.barrier_wait(first_full.at[turn])

            def multiply(acc, kind, keys):
                for m in range(slabs):
                    plgpu.wgmma(acc, rows_mma.at[cell[kind], m], key_mma.at[key, keys, m].transpose((1, 0)))

            def early(accs):  # S and one part of dR
                multiply(accs[0], 0, 0)
                multiply(accs[1], 1, 0)

            zeros = plgpu.layout_cast(jnp.zeros((ROWS, width), f32), layout)
            z = zeros
            if width != cols:  # read anew each time: registers do not suffice to keep which columns are keys
                z = plgpu.load(nowhere.at[group], layout=layout.reduce(0), optimized=False)
                z = lax.broadcast_in_dim(z, (ROWS, width), [1])
            z, d_r = pl.run_state(early)([plgpu.WGMMAAccumulatorRef.init(x) for x in (z, zeros)])
            probabilities = softmax(z, scale)
            plgpu.barrier_wait(last_full.at[turn])  # dY, loaded last, was on its way
            d_r = pl.run_state(lambda acc: multiply(acc, 2, 1))(plgpu.WGMMAAccumulatorRef.init(d_r))
            d_log = plgpu.load(c_in.at[lax.rem(n, ahead)], layout=layout.reduce(1), optimized=False)
            d_log = jnp.where(real_columns(split, cols, tiles, item), d_log, 0.0)  # other rows hold anything
            return through_softmax(*probabilities, d_r, d_log, scale, dtype)

        def add(acc, n, g):
            """Adds an item's share to all slabs of dk and dv, [64 d, W] each."""
            cell = cells(n)

            def products(accs):
                for kind, p, first in ((0, 0, 0), (1, 1, 0), (2, 1, slabs)):
                    for m in range(slabs):
                        left, right = rows_mma.at[cell[kind], m], p_mma.at[g, p]
                        plgpu.wgmma(accs[first + m], left.transpose((1, 0)), right.transpose((1, 0)))

            return pl.run_state(products)([plgpu.WGMMAAccumulatorRef.init(x) for x in acc])

        def put(value, place):
            turned = plgpu.layout_cast(value.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            p_mma.at[place].transpose((1, 0))[...] = turned

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS[groups], action="increase")
            plgpu.barrier_arrive(key_free.at[group])
            column = plgpu.broadcasted_iota(jnp.int32, (width,), 0, layout=layout.reduce(0))
            nowhere[group] = jnp.where(column < cols, 0.0, NOWHERE)
            plgpu.commit_smem()

            @pl.when(group == 0)
            def _():
                for n in range(ahead):
                    plgpu.barrier_arrive(free.at[n])

            def unit(t, carry):
                entry, head, pair = place(t, group)
                lane = entry * heads + head
                is_wanted = ((pair >= start[3]) & (pair < start[4])).astype(jnp.int32)
                pl.when(live(t, group))(lambda: plgpu.barrier_wait(key_full.at[group]))

                def item(i, n, mine, acc):
                    """Item i, number n of all and `mine` of this warpgroup's."""
                    own = shared.unhoisted(group, n)
                    r, d_z = make(i, n, mine, own)
                    if not masked:
                        pl.when(i == items - 1)(lambda: plgpu.barrier_arrive(key_free.at[group]))
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    put(d_z, (own, 0))
                    put(r, (own, 1))
                    plgpu.commit_smem()
                    columns = pl.ds(pair * 0, ROWS)  # past the end of the columns, so not static
                    plgpu.copy_smem_to_gmem(p_out.at[group, 0], dz.at[lane, i, pair, :, columns])
                    acc = lax.fori_loop(0, is_wanted, lambda _, acc: add(acc, n, own), acc)
                    plgpu.barrier_arrive(free.at[lax.rem(n, ahead)])
                    return acc

                def step(i, carry):
                    n, mine, acc = carry
                    counts = seen_counts(t, i)
                    now, before = jnp.where(group == 0, counts[0], counts[1]), jnp.where(group == 0, 0, counts[0])
                    acc = lax.fori_loop(0, now, lambda _, acc: item(i, n + before, mine, acc), acc)
                    return n + sum(counts), mine + now, acc

                def each(i, acc):
                    return item(i, t * (groups * items) + i * together + group, t * items + i, acc)

                acc = [plgpu.layout_cast(jnp.zeros((SLAB, width), f32), layout) for _ in range(2 * slabs)]
                if masked:
                    *carry, acc = lax.fori_loop(0, items, step, (*carry, acc))
                else:  # all of a turn's key rows exist, unless it is the last
                    together = (
                        groups if units % groups == 0 else sum(exists(t, g).astype(jnp.int32) for g in range(groups))
                    )
                    acc = lax.fori_loop(0, items * exists(t, group).astype(jnp.int32), each, acc)
                if masked:
                    pl.when(live(t, group))(lambda: plgpu.barrier_arrive(key_free.at[group]))

                @pl.when(exists(t, group))
                def _():
                    own = shared.unhoisted(group, t)
                    window = pl.ds(pair * 0, width)  # past the end of b2 columns, so the start must not be static
                    for m, value in enumerate(acc):
                        plgpu.wait_smem_to_gmem(min(m, 1), wait_read_only=True)
                        put(value, (own, m % 2))
                        plgpu.commit_smem()
                        target = (dk, dv)[m // slabs].at[entry, pair, window, head, m % slabs]
                        plgpu.copy_smem_to_gmem(p_out.at[group, m % 2], target)

                return carry

            lax.fori_loop(0, turns(), unit, [jnp.int32(0)] * 2 if masked else [])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(LOAD_REGISTERS[groups], action="decrease")

            head0 = start[0]

            def load_keys(t, g):
                entry, head, pair = place(t, g)
                plgpu.barrier_wait(key_free.at[g])
                window = pl.ds(pair * 0, width)
                for kind, source in enumerate((k, v)):
                    box = source.at[entry, pair, window, head0 + head]
                    plgpu.copy_gmem_to_smem(box, key_in.at[g, kind].transpose((1, 0, 2)), key_full.at[g])

            def load_item(t, g, i, n, mine):
                entry, head, pair = place(t, g)
                lane, row = entry * heads + head, lax.rem(pair, rows)
                turn = g * (ahead + 1) + lax.rem(mine, ahead + 1)

                def load(kind, box, views, axes):
                    if kind == late:
                        plgpu.barrier_wait(free.at[lax.rem(n, ahead)])
                    target = views.at[lax.rem(3 * n + kind, ring)].transpose(axes)
                    plgpu.copy_gmem_to_smem(box, target, (last_full if kind == 2 else first_full).at[turn])

                def whole(tile, column):
                    window = pl.ds(column, ROWS)
                    load(0, q.at[entry, tile0 + tile, row, window, head0 + head], rows_in, (1, 0, 2))
                    load(1, d_alpha.at[lane, tile, pair, window], rows_in, (1, 0, 2))
                    load(2, d_y.at[lane, tile, pair, window], rows_in, (1, 0, 2))

                def packs(tile):
                    window, some = pl.ds(full * ROWS + tile * 0, tail_rows), pl.ds(tile, packed)
                    box = q.at[entry, pl.ds(tile0 + tile, packed), row, window, head0 + head]
                    load(0, box, rows_packs, (1, 2, 0, 3))
                    load(1, d_alpha.at[lane, some, pair, window], rows_packs, (1, 2, 0, 3))
                    load(2, d_y.at[lane, some, pair, window], rows_packs, (1, 2, 0, 3))

                part(split, i, whole, packs)
                plgpu.copy_gmem_to_smem(d_c.at[lane, i, pair], c_in.at[lax.rem(n, ahead)], last_full.at[turn])

            def unit(t, carry):
                def item(i, carry):
                    n, mine = carry[0], list(carry[1:])
                    for g, count in enumerate(seen_counts(t, i)):
                        pl.when((i == 0) & live(t, g))(lambda g=g: load_keys(t, g))
                        pl.when(count > 0)(lambda g=g, n=n, mine=mine[g]: load_item(t, g, i, n, mine))
                        n, mine[g] = n + count, mine[g] + count
                    return n, *mine

                return lax.fori_loop(0, items, item, carry)

            lax.fori_loop(0, turns(), unit, (jnp.int32(0),) * (1 + groups))
            for g in range(groups):
                plgpu.barrier_wait(key_free.at[g])
            for n in range(ahead):
                plgpu.barrier_wait(free.at[n])

    shapes = (
        (ring, slabs, ROWS, SLAB),  # q, d_alpha, dY
        (groups, 2, slabs, width, SLAB),  # K, V
        (groups, 2, width, ROWS),  # s dZ and R, keys before queries; dk and dv when they leave
    )
    struct = jax.ShapeDtypeStruct
    gradient = struct((batch, pairs, cols, heads, slabs, SLAB), dtype)
    return Role(
        run,
        name="monarch_right_backward_independent",
        outputs=(gradient, gradient, struct((batch * heads, items, pairs, width, split.used), dtype)),
        scratch=(
            shared.tile_scratch(shapes, dtype, SLAB, (packed, tail_rows) if tail else None),
            plgpu.SMEM((ahead, ROWS), f32),
            plgpu.SMEM((groups, width), f32),
            plgpu.Barrier(num_arrivals=2, num_barriers=groups),
            plgpu.Barrier(num_arrivals=1, num_barriers=groups),
            plgpu.Barrier(num_arrivals=2, num_barriers=groups * (ahead + 1)),
            plgpu.Barrier(num_arrivals=2, num_barriers=groups * (ahead + 1)),
            plgpu.Barrier(num_arrivals=1, num_barriers=ahead),
        ),
        groups=groups,
        blocks=blocks,
    )
