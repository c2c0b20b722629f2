"""Back through R on Hopper: dk and dv, and the gradient of R's scores for `query_sm90`, with wgmma and TMA.

For one head and key row (c, k): with R = softmax(Z), Z = s Q[a,k] K^T, dR = d_alpha K^T + dY V^T + d_c log R and
dZ = R * (dR - <R, dR>), these are dK = s dZ^T Q + R^T d_alpha and dV = R^T dY, summed over all query tiles a. A
persistent block keeps K, V, dK and dV and runs through the query tiles, two blocks of 64 columns j at a time: each
computing warpgroup makes R and dZ of one, stores them transposed, and adds both to its 64 elements of D of dK and dV,
held as [D, l], where b2 need only be a multiple of 8. Small b2: `right_backward_independent_sm90`.
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
from monarchrt.pallas_kernels.right_backward_independent_sm90 import independent_role
from monarchrt.pallas_kernels.right_backward_items import NOWHERE, part, real_columns, softmax, through_softmax
from monarchrt.pallas_kernels.shared import Role


def right_backward_role(
    q: jax.ShapeDtypeStruct,
    k: jax.ShapeDtypeStruct,
    *,
    scale: float,
    heads: int,
    tiles: int,
    masked: bool,
    config: RightBackwardConfig,
) -> Role:
    """Takes gradients of a chunk of query tiles and heads back through R.

    Inputs of the role: q; k; v as k; the gradients of alpha [B * heads, tiles, C*b1, b2, D/64, 64], of Y, alike, and
    of c_L, float32 [B * heads, items, P, 64]; limits, int32 [A], the pairs that a query tile sees, read when `masked`;
    start, int32 [5], the chunk's first head and query tile, the largest limit, and the first and the end of the pairs
    whose dk and dv are wanted.

    Outputs: dk and dv of the chunk's query tiles [B, C*b1, b2, heads, D/64, 64], zero where not wanted; s dZ
    [B * heads, items, C*b1, W, 64 or less], keys before queries, W as `config.width`. All in q's dtype.

    Args:
        q: [B, A, b1, b2, H, D/64, 64].
        k: [B, C*b1, b2, H, D/64, 64].
        scale: Softmax scale.
        heads: Heads of the chunk.
        tiles: Query tiles of the chunk.
        masked: Whether limits may be below C*b1.
        config: Sizes.

    Returns:
        The role.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    if config.independent:
        return independent_role(q, k, scale=scale, heads=heads, tiles=tiles, masked=masked, config=config)
    batch, _, rows, cols, _, slabs, _ = q.shape
    pairs = k.shape[1]
    groups, stages, width = config.warpgroups, config.stages, config.width(cols)
    split = column_blocks(cols, tiles, masked)
    full, tail_rows, packed, items = split.full, split.tail_rows, split.packed, split.items
    tail = items > split.whole
    units = batch * heads * pairs
    blocks = min(config.blocks, units)
    steps = -(-items // groups)
    dtype, f32 = q.dtype, jnp.float32
    layout = plgpu.Layout.WGMMA
    results = 2 * slabs // groups  # slabs of dk and dv per warpgroup: with D = 64 one has dk, the other dv

    def run(block, inputs, outputs, scratch):
        q, k, v, d_alpha, d_y, d_c, limits, start = inputs
        dk, dv, dz = outputs
        smem, c_in, key_full, key_free, full_barrier, free, made, used = scratch
        views = shared.tile_views(smem)
        rows_mma, key_mma, p_mma = views[0]
        rows_in, key_in, p_out = views[1]
        rows_packs = views[-1][0]
        group = lax.axis_index("group")
        head0, tile0, bound, wanted, wanted_end = (start[n] for n in range(5))
        turns = lax.div(units - block + blocks - 1, blocks)

        def place(t):
            """Batch entry, head of the chunk and key row of a turn."""
            unit = block + t * blocks
            return lax.div(unit, heads * pairs), lax.rem(lax.div(unit, pairs), heads), lax.rem(unit, pairs)

        def seen(pair, item):
            """Whether the item exists and its query tile sees the pair."""
            exists = item < items
            if not masked:
                return exists
            tile = jnp.minimum(lax.div(item, full), tiles - 1)
            return exists & (pair < limits[tile0 + tile])

        def make(item, slot, first):
            """R and s dZ of an item, [64 j, W], in the inputs' dtype; `first` is 0, the place of K."""

            def scores(z_acc, d_r_acc):
                for n in range(slabs):
                    plgpu.wgmma(z_acc, rows_mma.at[slot, 0, n], key_mma.at[first, n].transpose((1, 0)))
                for kind in range(2):
                    for n in range(slabs):
                        plgpu.wgmma(
                            d_r_acc, rows_mma.at[slot, 1 + kind, n], key_mma.at[first + kind, n].transpose((1, 0))
                        )
                return z_acc[...], d_r_acc[...]

            z, d_r = pl.run_scoped(scores, *[plgpu.WGMMAAccumulatorRef((ROWS, width), f32)] * 2)
            d_log = plgpu.load(c_in.at[slot], layout=layout.reduce(1), optimized=False)
            d_log = jnp.where(real_columns(split, cols, tiles, item), d_log, 0.0)  # other rows hold anything
            if width != cols:
                column = plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=layout)
                z = jnp.where(column < cols, z, NOWHERE)
            return through_softmax(*softmax(z, scale), d_r, d_log, scale, dtype)

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS[groups], action="increase")
            plgpu.barrier_arrive(key_free)
            plgpu.barrier_arrive(used)
            for s in range(stages):
                plgpu.barrier_arrive(free.at[s])

            def unit(t, done):
                entry, head, pair = place(t)
                lane = entry * heads + head

                def live(done):
                    plgpu.barrier_wait(key_full)
                    acc = [plgpu.layout_cast(jnp.zeros((SLAB, width), f32), layout) for _ in range(results)]

                    def step(s, acc):
                        mine = s * groups + group
                        slots = [lax.rem(done + s * groups + g, stages) for g in range(groups)]
                        exist = [seen(pair, s * groups + g) for g in range(groups)]
                        my_slot = lax.rem(done + mine, stages)

                        @pl.when(seen(pair, mine))
                        def _():
                            plgpu.barrier_wait(full_barrier.at[my_slot])
                            r, d_z = make(mine, my_slot, shared.unhoisted(0, done + s))
                            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                            plgpu.barrier_wait(used)
                            for kind, value in enumerate((d_z, r)):
                                turned = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
                                p_mma.at[shared.unhoisted(group, done + s), kind].transpose((1, 0))[...] = turned
                            plgpu.commit_smem()
                            window = pl.ds(pair * 0, ROWS)  # past the end of the columns, so not static
                            plgpu.copy_smem_to_gmem(p_out.at[group, 0], dz.at[lane, mine, pair, :, window])

                        @pl.when(jnp.logical_not(seen(pair, mine)))
                        def _():
                            plgpu.barrier_wait(used)

                        plgpu.barrier_arrive(made)
                        plgpu.barrier_wait(made)
                        for g in range(groups):

                            @pl.when(exist[g] & (group != g))
                            def _(g=g):
                                plgpu.barrier_wait(full_barrier.at[slots[g]])

                            acc = lax.fori_loop(
                                0,
                                (exist[g] & (pair >= wanted) & (pair < wanted_end)).astype(jnp.int32),
                                lambda _, acc, g=g: add(acc, slots[g], shared.unhoisted(g, done + s)),
                                acc,
                            )
                        plgpu.barrier_arrive(used)
                        for g in range(groups):
                            pl.when(exist[g])(lambda g=g: plgpu.barrier_arrive(free.at[slots[g]]))
                        return acc

                    acc = lax.fori_loop(0, steps, step, acc)
                    plgpu.barrier_arrive(key_free)
                    store(acc)

                def store(acc):
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_wait(used)
                    for n, value in enumerate(acc):
                        turned = plgpu.layout_cast(value.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                        p_mma.at[group, n].transpose((1, 0))[...] = turned
                    plgpu.commit_smem()
                    window = pl.ds(pair * 0, width)  # past the end of b2 columns, so the start must not be static
                    if results == 2:
                        for n, target in enumerate((dk, dv)):
                            plgpu.copy_smem_to_gmem(p_out.at[group, n], target.at[entry, pair, window, head, group])
                    else:
                        for g, target in enumerate((dk, dv)):

                            @pl.when(group == g)
                            def _(g=g, target=target):
                                plgpu.copy_smem_to_gmem(p_out.at[g, 0], target.at[entry, pair, window, head, 0])

                    plgpu.barrier_arrive(used)

                def dead():
                    store([plgpu.layout_cast(jnp.zeros((SLAB, width), f32), layout) for _ in range(results)])

                if masked:
                    pl.when(pair < bound)(lambda: live(done))
                    pl.when(pair >= bound)(dead)
                else:
                    live(done)
                return done + steps * groups

            def add(acc, slot, g):
                """Adds an item's share to this warpgroup's slabs of dk and dv, [64 d, W] each."""

                def product(acc, source, n, kind):
                    left, right = rows_mma.at[slot, source, n], p_mma.at[g, kind]
                    plgpu.wgmma(acc, left.transpose((1, 0)), right.transpose((1, 0)))

                def both(accs):
                    product(accs[0], 0, group, 0)
                    product(accs[0], 1, group, 1)
                    product(accs[1], 2, group, 1)

                def one(source, acc):
                    def run(accs):
                        product(accs[0], source, 0, jnp.minimum(source, 1))

                    return pl.run_state(run)([plgpu.WGMMAAccumulatorRef.init(x) for x in acc])

                if results == 2:
                    return pl.run_state(both)([plgpu.WGMMAAccumulatorRef.init(x) for x in acc])
                return lax.fori_loop(2 * group, 2 + group, one, acc)

            lax.fori_loop(0, turns, unit, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_wait(used)

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(LOAD_REGISTERS[groups], action="decrease")

            def unit(t, done):
                entry, head, pair = place(t)
                lane = entry * heads + head

                def live():
                    plgpu.barrier_wait(key_free)
                    window = pl.ds(pair * 0, width)
                    for kind, source in enumerate((k, v)):
                        box = source.at[entry, pair, window, head0 + head]
                        plgpu.copy_gmem_to_smem(box, key_in.at[kind].transpose((1, 0, 2)), key_full)

                    def item(i, _):
                        slot, row = lax.rem(done + i, stages), lax.rem(pair, rows)

                        def load_whole(tile, column):
                            window = pl.ds(column, ROWS)
                            boxes = (
                                q.at[entry, tile0 + tile, row, window, head0 + head],
                                d_alpha.at[lane, tile, pair, window],
                                d_y.at[lane, tile, pair, window],
                            )
                            for n, box in enumerate(boxes):
                                target = rows_in.at[slot, n].transpose((1, 0, 2))
                                plgpu.copy_gmem_to_smem(box, target, full_barrier.at[slot])

                        def load_packs(tile):
                            window = pl.ds(full * ROWS + tile * 0, tail_rows)
                            boxes = (
                                q.at[entry, pl.ds(tile0 + tile, packed), row, window, head0 + head],
                                d_alpha.at[lane, pl.ds(tile, packed), pair, window],
                                d_y.at[lane, pl.ds(tile, packed), pair, window],
                            )
                            for n, box in enumerate(boxes):
                                target = rows_packs.at[slot, n].transpose((1, 2, 0, 3))
                                plgpu.copy_gmem_to_smem(box, target, full_barrier.at[slot])

                        @pl.when(seen(pair, i))
                        def _():
                            plgpu.barrier_wait(free.at[slot])
                            part(split, i, load_whole, load_packs)
                            plgpu.copy_gmem_to_smem(d_c.at[lane, i, pair], c_in.at[slot], full_barrier.at[slot])

                        return ()

                    lax.fori_loop(0, items, item, ())

                if masked:
                    pl.when(pair < bound)(live)
                else:
                    live()
                return done + steps * groups

            lax.fori_loop(0, turns, unit, jnp.int32(0))
            plgpu.barrier_wait(key_free)
            for s in range(stages):
                plgpu.barrier_wait(free.at[s])

    shapes = (
        (stages, 3, slabs, ROWS, SLAB),  # q, d_alpha, dY
        (2, slabs, width, SLAB),  # K, V
        (groups, 2, width, ROWS),  # s dZ and R, keys before queries; dk and dv when they leave
    )
    struct = jax.ShapeDtypeStruct
    gradient = struct((batch, pairs, cols, heads, slabs, SLAB), dtype)
    return Role(
        run,
        name="monarch_right_backward",
        outputs=(gradient, gradient, struct((batch * heads, items, pairs, width, split.used), dtype)),
        scratch=(
            shared.tile_scratch(shapes, dtype, SLAB, (packed, tail_rows) if tail else None),
            plgpu.SMEM((stages, ROWS), f32),
            plgpu.Barrier(num_arrivals=2),
            plgpu.Barrier(num_arrivals=groups),
            plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups),
            plgpu.Barrier(num_arrivals=groups),
        ),
        groups=groups,
        blocks=blocks,
    )
