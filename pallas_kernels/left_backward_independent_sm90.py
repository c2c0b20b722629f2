"""Back through L on Hopper, as `left_backward_sm90`, where one warpgroup's registers hold dQ of all rows i (b1 to 96).

The two computing warpgroups take the steps of a column in turns and share nothing in them but Q and dO, so that one's
softmax and the other's products overlap. Each has a dQ of its own, [D, i]; the one that ends first leaves it, rounded,
where its last alpha and Y lay, and the one with the last step adds and stores.
"""

import jax
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels import shared
from monarchrt.pallas_kernels.config import ROWS, SLAB, LeftBackwardConfig, column_blocks
from monarchrt.pallas_kernels.left_backward_items import Items, load_in_order
from monarchrt.pallas_kernels.shared import LOG2E, Role


def independent_role(
    q: jax.ShapeDtypeStruct,
    pairs: int,
    *,
    scale: float,
    heads: int,
    tiles: int,
    masked: bool,
    config: LeftBackwardConfig,
    whole: bool = False,
) -> Role:
    """The role of `left_backward_role`, a column at a time and every other step of 64 pairs a warpgroup's.

    The part of dq through L has as many rows as `config.width`.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    _, _, rows, cols, all_heads, dim = q.shape
    slabs, width, depth = dim // SLAB, config.width(rows), config.depth(rows)
    groups, stages = config.warpgroups, config.stages
    split = column_blocks(cols, tiles, masked)
    items = Items(q=q, pairs=pairs, heads=heads, tiles=tiles, masked=masked, whole=whole, columns=1)
    blocks = min(config.blocks, items.count)
    dtype, f32 = q.dtype, jnp.float32
    layout = plgpu.Layout.WGMMA
    early, late = shared.gradient_scales(dtype, scale)

    def run(block, inputs, outputs, scratch):
        q, g, alpha, y, c, stats, limits, start = inputs
        d_alpha, d_y, d_c, dq = outputs
        smem, p_smem, c_in, stats_in, q_full, q_free, full, free, left_there = scratch
        (rows_mma, mid_mma), (rows_in, mid_in) = shared.tile_views(smem)
        (p_mma,), _ = shared.tile_views(p_smem)
        group = lax.axis_index("group")
        head0, tile0 = start[0], start[1]
        turns = lax.div(items.count - block + blocks - 1, blocks)

        def place(t):
            return items.place(block + t * blocks, limits, tile0)

        def step(n, i, t, given, acc):
            """Pairs from 64 i on of turn t's column, step n of both warpgroups'. Adds to slabs of dQ, [64 d, W].

            Gives back the place of this warpgroup's step before, unless that was `given` to the other.
            """
            here, zero = shared.unhoisted(group, n), shared.unhoisted(0, n)
            x, _where, j, limit = place(shared.unhoisted(t, n))
            slot = lax.rem(n, stages)
            plgpu.barrier_wait(full.at[slot])

            def scores(x_acc, d_p_acc):
                """Products of alpha with q and of Y with dO, [64 pairs, W]."""
                for acc, kind in ((x_acc, 1), (d_p_acc, 0)):
                    for m in range(slabs):
                        right = rows_mma.at[kind + zero, m, pl.ds(0, width)].transpose((1, 0))
                        plgpu.wgmma(acc, mid_mma.at[slot, kind, m], right)
                return x_acc[...], d_p_acc[...]

            x_s, d_p = pl.run_scoped(scores, *[plgpu.WGMMAAccumulatorRef((ROWS, width), f32)] * 2)
            bias = plgpu.load(c_in.at[slot], layout=layout.reduce(1), optimized=False)
            pair = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout.reduce(1)) + i * ROWS
            bias = jnp.where(pair < limit, bias, jnp.inf)  # pairs that are not seen
            lse = plgpu.load(stats_in.at[zero], layout=layout.reduce(0), optimized=False)
            x_s = x_s * (scale * LOG2E) - lax.broadcast_in_dim(bias, x_s.shape, [0])
            # L again (paper, A.2)
            p = jnp.exp2(x_s - lax.broadcast_in_dim(lse, x_s.shape, [1]))
            delta = plgpu.load(stats_in.at[1 + zero], layout=layout.reduce(0), optimized=False)
            d_x = (p * (d_p * early - lax.broadcast_in_dim(delta, d_p.shape, [1]))).astype(dtype)
            d_x = lax.optimization_barrier(d_x)  # rounded in pairs, not one by one because each is wanted alone too
            low_p = p.astype(dtype)
            total = d_x.astype(f32).sum(axis=1) * (-1 / early)  # fits the rounded d_alpha: in dR their errors cancel
            p_mma.at[here].transpose((1, 0))[...] = plgpu.layout_cast(d_x, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()

            def query(accs):
                for m in range(slabs):
                    left = mid_mma.at[slot, 1, m].transpose((1, 0))
                    plgpu.wgmma(accs[m], left, p_mma.at[here].transpose((1, 0)))

            acc = pl.run_state(query)([plgpu.WGMMAAccumulatorRef.init(a) for a in acc])

            pl.when((n >= groups) & jnp.logical_not(given))(lambda: leave(n - groups))  # by now without a wait

            def padded(x):
                """[64 pairs, W] with zeros up to the depth of the next products."""
                if width == depth:
                    return x
                return lax.concatenate([x, plgpu.layout_cast(jnp.zeros((ROWS, depth - width), dtype), layout)], 1)

            plgpu.commit_smem()  # every warp has read its alpha, which d_alpha replaces
            for kind, factor in enumerate((padded(low_p), padded(d_x))):
                for m in range(slabs):  # a slab of dY or d_alpha replaces that of Y or alpha and leaves

                    def multiply(acc, kind=kind, factor=factor, m=m):
                        plgpu.wgmma(acc, factor, rows_mma.at[kind + zero, m])
                        return acc[...]

                    value = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, SLAB), f32))
                    mid_mma[slot, kind, m] = (value * late if kind and late != 1 else value).astype(dtype)
            plgpu.commit_smem()
            for kind, target in enumerate((d_y, d_alpha)):
                for m in range(slabs):
                    plgpu.copy_smem_to_gmem(mid_in.at[slot, kind, m], target.at[x, pl.ds(i * ROWS, ROWS), j, m])
            block_of, row = split.place(lax.rem(x, tiles), j)
            # where `right_backward` finds it with one copy per pair; after the fence, which would wait for it
            d_c[lax.div(x, tiles), block_of, pl.ds(i * ROWS, ROWS), row] = total
            return acc

        def tiles_of(value):
            """[64 d, W] in tiles of 64 columns, the last one filled with zeros."""
            for n in range(0, width, ROWS):
                tile = value[:, n : n + ROWS]
                if missing := ROWS - tile.shape[1]:
                    zeros = plgpu.layout_cast(jnp.zeros((SLAB, missing), dtype), layout)
                    tile = lax.concatenate([tile, zeros], 1)
                yield tile

        def load_tiles(slot, m):
            """What `tiles_of` gave for slab m, [64 d, W] in float32."""
            found = []
            for n in range(0, width, ROWS):
                tile = plgpu.load(mid_mma.at[slot, n // ROWS, m], layout=layout).astype(f32)
                found.append(tile[:, : min(ROWS, width - n)])
            return found[0] if len(found) == 1 else lax.concatenate(found, 1)

        def leave(n):
            """Gives back what step n came in, once its gradients have been read."""
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(free.at[lax.rem(n, stages)])

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(config.registers[0], action="increase")
            plgpu.barrier_arrive(q_free)
            for s in range(stages):
                pl.when(group == s % groups)(lambda s=s: plgpu.barrier_arrive(free.at[s]))

            def item(t, carry):
                done, given = carry
                limit = place(t)[-1]
                steps = lax.div(limit + ROWS - 1, ROWS)
                first = lax.rem(done + group, 2)  # steps with an even number of all are the first warpgroup's
                plgpu.barrier_wait(q_full)

                def turn(m, acc):
                    i = first + 2 * m
                    return step(done + i, i, t, (m == 0) & (given > 0), acc)

                acc = [plgpu.layout_cast(jnp.zeros((SLAB, width), f32), layout) for _ in range(slabs)]
                mine = lax.div(steps - first + 1, 2)
                acc = lax.fori_loop(0, mine, turn, acc)
                ends = lax.rem(done + steps + 1, 2) == group  # has the last step
                both = (steps > 1).astype(jnp.int32)  # a column of one step has one dQ
                slot = lax.rem(done + steps - 2, stages)  # the other's last step's

                @pl.when(jnp.logical_not(ends))
                def _():
                    plgpu.barrier_arrive(q_free)

                    @pl.when(both > 0)
                    def _():
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        for m, value in enumerate(acc):
                            for n, tile in enumerate(tiles_of((value * late).astype(dtype))):
                                mid_mma[slot, n, m] = tile
                        plgpu.commit_smem()
                        plgpu.barrier_arrive(left_there.at[1 - group])

                @pl.when(ends)
                def _():
                    pl.when(both > 0)(lambda: plgpu.barrier_wait(left_there.at[group]))
                    plgpu.barrier_arrive(q_free)  # not before: no item further may leave its dQ there

                    def add(_, acc):
                        others = [load_tiles(slot, m) for m in range(slabs)]
                        plgpu.barrier_arrive(free.at[slot])
                        return [x + y for x, y in zip(acc, others, strict=True)]

                    sums = lax.fori_loop(0, both, add, [value * late if late != 1 else value for value in acc])
                    x, _where, j, _limit = place(shared.unhoisted(t, done + steps))
                    block_of, row = split.place(lax.rem(x, tiles), j)
                    for m, value in enumerate(sums):
                        target = dq.at[lax.div(x, tiles), block_of, :, row, pl.ds(m * SLAB, SLAB)]
                        share = plgpu.layout_cast(value.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
                        target.transpose((1, 0))[...] = share

                gives = jnp.where(ends, 0, both)
                return done + steps, jnp.where(mine > 0, gives, given)

            done, given = lax.fori_loop(0, turns, item, (jnp.int32(0), jnp.int32(0)))
            last = done - 1 - lax.rem(done + 1 + group, groups)  # this warpgroup's
            pl.when((last >= 0) & (given == 0))(lambda: leave(last))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(config.registers[1], action="decrease")

            def item(t, done):
                x, (entry, head, tile), j, limit = place(t)
                steps = lax.div(limit + ROWS - 1, ROWS)
                x_in, bias_in = items.source(x, (entry, head, tile), head0, tile0)

                def load_query():
                    plgpu.barrier_wait(q_free)
                    span = pl.ds(x * 0, depth)  # past the end of b1 rows, so not static
                    for kind, source in enumerate((g, q)):
                        box = source.at[entry, tile0 + tile, span, j * all_heads + head0 + head]
                        plgpu.copy_gmem_to_smem(box, rows_in.at[kind].transpose((1, 0, 2)), q_full)
                    box = stats.at[entry, head0 + head, tile0 + tile, j, :, pl.ds(0, width)]
                    plgpu.copy_gmem_to_smem(box, stats_in, q_full)

                def load(i):
                    slot, span = lax.rem(done + i, stages), pl.ds(i * ROWS, ROWS)
                    plgpu.barrier_wait(free.at[slot])
                    for kind, source in enumerate((y, alpha)):
                        box = source.at[x_in, span, j]
                        plgpu.copy_gmem_to_smem(box, mid_in.at[slot, kind].transpose((1, 0, 2)), full.at[slot])
                    plgpu.copy_gmem_to_smem(c.at[*bias_in(j), span], c_in.at[slot], full.at[slot])

                # a third step's place may be that of the last step before, given back in a step of this item
                load_in_order(steps, 2, load, load_query)
                return done + steps

            lax.fori_loop(0, turns, item, jnp.int32(0))
            plgpu.barrier_wait(q_free)
            for s in range(stages):
                plgpu.barrier_wait(free.at[s])

    shapes = (
        (2, slabs, depth, SLAB),  # dO and q
        (stages, 2, slabs, ROWS, SLAB),  # Y and alpha, then their gradients
    )
    return Role(
        run,
        name="monarch_left_backward_independent",
        outputs=items.outputs(width),
        scratch=(
            shared.tile_scratch(shapes, dtype, SLAB),
            shared.tile_scratch(((groups, width, ROWS),), dtype, SLAB),
            plgpu.SMEM((stages, ROWS), f32),
            plgpu.SMEM((2, width), f32),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=groups),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=groups),
        ),
        groups=groups,
        blocks=blocks,
    )
