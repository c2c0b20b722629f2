"""Stage 2 on Hopper: the output and its log-sum-exp from alpha, c_L and Y, with wgmma and TMA.

For one query tile, head and column j this is attention from b1 rows i to the C*b1 pairs (c, k), one long axis with keys
alpha[:, j], values Y[:, j] and the bias -c_L[:, j]. A persistent block streams them past the rows of one or more
columns; every vector of alpha and Y is read once as long as its rows fit the block's warpgroups. A few rows more than
a multiple of 64 are `left_tail_sm90.py`'s.
"""

import jax
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels import left_tail_sm90, shared
from monarchrt.pallas_kernels.config import ROWS, SLAB, LeftConfig, column_blocks
from monarchrt.pallas_kernels.shared import LOG2E, Role


def left_role(
    q: jax.ShapeDtypeStruct,
    pairs: int,
    *,
    scale: float,
    heads: int,
    tiles: int,
    masked: bool,
    config: LeftConfig,
) -> Role:
    """Attends from the rows of a chunk of query tiles and heads.

    Inputs of the role: q [B, A, b1, b2*H, D/64, 64]; alpha [X, C*b1, b2, D/64, 64], X = B * heads * tiles; Y as alpha;
    c_L [B * heads, items, 64, P] as `right_role` leaves it, P a multiple of `key_block`; limits, int32 [A], the pairs
    that a query tile sees, read when `masked`; start, int32 [3], the chunk's first head and query tile.

    Outputs: the output [B, tiles, b1, b2*heads, D/64, 64] in q's dtype; the log-sum-exp [X, b2, b1 or more] in float32.

    Args:
        q: [B, A, b1, b2, H, D], before its last axes are split.
        pairs: C*b1.
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

    batch, _, rows, cols, all_heads, dim = q.shape
    slabs = dim // SLAB
    groups, stages, depth, query_stages = config.warpgroups, config.stages, config.key_block, config.query_stages
    columns, row_blocks, wide = config.columns, config.row_blocks, config.wide
    split = column_blocks(cols, tiles, masked)
    column_groups = -(-cols // columns)
    row_groups = -(-(rows - config.tail) // (ROWS * row_blocks))
    if config.tail and row_groups != 1:
        raise ValueError(
            f"tail={config.tail} with row_blocks={row_blocks} is for {config.tail + 1} to "
            f"{row_blocks * ROWS + config.tail} rows, not {rows}."
        )
    count = batch * heads * tiles
    items = count * column_groups * row_groups
    blocks = min(config.blocks, items)
    dtype, f32 = q.dtype, jnp.float32
    layout = plgpu.Layout.WGMMA

    def run(block, inputs, outputs, scratch):
        q, alpha, y, c, limits, start = inputs
        out, lse = outputs
        smem, c_in, lse_out, q_full, q_free, alpha_full, alpha_free, y_full, y_free, turn = scratch
        (q_mma, alpha_mma, y_mma, *tail_mma), (q_in, alpha_in, y_in, *tail_in) = shared.tile_views(smem)
        group = lax.axis_index("group")
        head0, tile0 = start[0], start[1]
        turns = lax.div(items - block + blocks - 1, blocks)

        def place(t):
            """Batch entry, head, tile (of the chunk), first column first block of rows, pairs seen."""
            item = block + t * blocks
            if config.newest_first:
                item = items - 1 - item
            x = lax.div(item, column_groups * row_groups)
            column = lax.rem(lax.div(item, row_groups), column_groups) * columns
            tile = lax.rem(x, tiles)
            limit = limits[tile0 + tile] if masked else jnp.int32(pairs)
            where = (lax.div(x, heads * tiles), lax.rem(lax.div(x, tiles), heads), tile)
            return x, where, column, lax.rem(item, row_groups) * row_blocks, limit

        def free_all():
            for s in range(query_stages):
                plgpu.barrier_arrive(q_free.at[s])
            for s in range(stages):
                plgpu.barrier_arrive(alpha_free.at[s])
                plgpu.barrier_arrive(y_free.at[s])

        @pl.when(group < wide)
        def _():
            plgpu.set_max_registers(config.registers[0], action="increase")
            free_all()
            my_column, my_rows = lax.div(group, row_blocks), lax.rem(group, row_blocks)

            def take_turns(times=1):
                """With `alternate`, waits for the other warpgroups, of which each is one wait behind the one before."""
                if config.alternate:
                    for _ in range(times):
                        plgpu.barrier_arrive(turn)
                        plgpu.barrier_wait(turn)

            for n in range(1, wide):
                pl.when(group == n)(lambda n=n: take_turns(n))

            def item(t, done):
                x, (entry, head, tile), column, row_block, limit = place(t)
                steps = lax.div(limit + depth - 1, depth)
                q_slot = lax.rem(t, query_stages)
                plgpu.barrier_wait(q_full.at[q_slot])
                row = layout.reduce(1)
                top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, f32), row)
                total = plgpu.layout_cast(jnp.zeros((ROWS,), f32), row)
                acc = [plgpu.layout_cast(jnp.zeros((ROWS, SLAB), f32), layout) for _ in range(slabs)]

                def step(i, carry):
                    top, total, *acc = carry
                    slot = lax.rem(done + i, stages)
                    plgpu.barrier_wait(alpha_full.at[slot])

                    def scores(acc):
                        for n in range(slabs):
                            b = alpha_mma.at[slot, my_column, n].transpose((1, 0))
                            plgpu.wgmma(acc, q_mma.at[q_slot, group, n], b)
                        take_turns()  # its products with Y and these are sent: the next warpgroup's may follow
                        return acc[...]

                    s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((ROWS, depth), f32)) * (scale * LOG2E)
                    bias = plgpu.load(c_in.at[slot, my_column], layout=layout.reduce(0), optimized=False)
                    pair = plgpu.broadcasted_iota(jnp.int32, (depth,), 0, layout=layout.reduce(0)) + i * depth
                    bias = jnp.where(pair < limit, bias, jnp.inf)  # pairs that are not seen
                    plgpu.barrier_arrive(alpha_free.at[slot])
                    s = s - lax.broadcast_in_dim(bias, s.shape, [1])
                    new_top = jnp.maximum(top, s.max(axis=1))
                    factor = jnp.exp2(top - new_top)
                    # the update of L (paper, A.2): softmax over (c, k) of s <Q, alpha> - c_L
                    p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [0]))
                    total = total * factor + p.sum(axis=1)
                    acc = [x * lax.broadcast_in_dim(factor, x.shape, [0]) for x in acc]
                    p = p.astype(dtype)
                    if config.alternate:
                        total, p, *acc = lax.optimization_barrier((total, p, *acc))
                        take_turns()  # the softmax is done
                    plgpu.barrier_wait(y_full.at[slot])

                    def products(accs):
                        for n in range(slabs):
                            plgpu.wgmma(accs[n], p, y_mma.at[slot, my_column, n])

                    acc = pl.run_state(products)([plgpu.WGMMAAccumulatorRef.init(x) for x in acc])
                    plgpu.barrier_arrive(y_free.at[slot])
                    return new_top, total, *acc

                top, total, *acc = lax.fori_loop(0, steps, step, (top, total, *acc))
                pl.when(steps == 0)(lambda: take_turns(2))  # or one warpgroup would be further behind
                inverse = 1.0 / total
                plgpu.commit_smem()  # every warp has read its rows of the query tile, which the output replaces
                for n in range(slabs):
                    q_mma[q_slot, group, n] = (acc[n] * lax.broadcast_in_dim(inverse, acc[n].shape, [0])).astype(dtype)
                lse_out[group] = (top + jnp.log2(total)) * (1 / LOG2E)
                plgpu.commit_smem()
                j, span = column + my_column, pl.ds((row_block + my_rows) * ROWS, ROWS)

                @pl.when(j < cols)
                def _():
                    target = out.at[entry, tile, span, j * heads + head]
                    plgpu.copy_smem_to_gmem(q_in.at[q_slot, group].transpose((1, 0, 2)), target)
                    plgpu.copy_smem_to_gmem(lse_out.at[group], lse.at[x, j, span])

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(q_free.at[q_slot])
                return done + steps

            lax.fori_loop(0, turns, item, jnp.int32(0))
            for n in range(wide - 1):
                pl.when(group == n)(lambda n=n: take_turns(wide - 1 - n))
            plgpu.wait_smem_to_gmem(0)

        if config.tail:

            @pl.when(group == wide)
            def _():
                few = config.registers[1] < 65536 // (128 * (groups + 1))
                plgpu.set_max_registers(config.registers[1], action="decrease" if few else "increase")
                free_all()
                (q_tail, weights), (q_tail_in, _weights) = tail_mma, tail_in

                def item(t, done):
                    x, (entry, head, tile), j, _row_block, limit = place(t)
                    steps = lax.div(limit + depth - 1, depth)
                    q_slot = lax.rem(t, query_stages)
                    plgpu.barrier_wait(q_full.at[q_slot])

                    def step(i, sums):
                        slot = lax.rem(done + i, stages)
                        plgpu.barrier_wait(alpha_full.at[slot])
                        sums = left_tail_sm90.step(
                            sums,
                            lambda n: q_tail.at[q_slot, n],
                            lambda n: alpha_mma.at[slot, 0, n],
                            lambda n: y_mma.at[slot, 0, n],
                            weights,
                            c_in.at[slot, 0],
                            limit - i * depth,
                            scale,
                            lambda: plgpu.barrier_arrive(alpha_free.at[slot]),
                            lambda: plgpu.barrier_wait(y_full.at[slot]),
                        )
                        plgpu.barrier_arrive(y_free.at[slot])
                        return sums

                    sums = lax.fori_loop(0, steps, step, left_tail_sm90.start(config.tail, depth, slabs))
                    plgpu.commit_smem()  # every warp has read the query rows, which the output replaces
                    left_tail_sm90.finish(sums, q_tail.at[q_slot], lse_out.at[wide, pl.ds(0, config.tail)])
                    plgpu.commit_smem()
                    span = pl.ds(t * 0 + wide * ROWS, config.tail)  # past the end of b1 rows, so not static
                    target = out.at[entry, tile, span, j * heads + head]
                    plgpu.copy_smem_to_gmem(q_tail_in.at[q_slot].transpose((1, 0, 2)), target)
                    plgpu.copy_smem_to_gmem(lse_out.at[wide, pl.ds(0, config.tail)], lse.at[x, j, span])
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(q_free.at[q_slot])
                    return done + steps

                lax.fori_loop(0, turns, item, jnp.int32(0))
                plgpu.wait_smem_to_gmem(0)

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(config.registers[2], action="decrease")

            def item(t, done):
                x, (entry, head, tile), column, row_block, limit = place(t)
                steps = lax.div(limit + depth - 1, depth)
                q_slot = lax.rem(t, query_stages)
                plgpu.barrier_wait(q_free.at[q_slot])
                if config.tail:
                    span = pl.ds(t * 0 + wide * ROWS, config.tail)
                    box = q.at[entry, tile0 + tile, span, column * all_heads + head0 + head]
                    plgpu.copy_gmem_to_smem(box, tail_in[0].at[q_slot].transpose((1, 0, 2)), q_full.at[q_slot])
                for g in range(wide):
                    span = pl.ds((row_block + g % row_blocks) * ROWS, ROWS)
                    box = q.at[entry, tile0 + tile, span, (column + g // row_blocks) * all_heads + head0 + head]
                    plgpu.copy_gmem_to_smem(box, q_in.at[q_slot, g].transpose((1, 0, 2)), q_full.at[q_slot])

                def load(i, _):
                    slot, span = lax.rem(done + i, stages), pl.ds(i * depth, depth)
                    window = pl.ds(column, columns)
                    plgpu.barrier_wait(alpha_free.at[slot])
                    to_alpha, to_y = (ref.at[slot].transpose((2, 0, 1, 3)) for ref in (alpha_in, y_in))
                    plgpu.copy_gmem_to_smem(alpha.at[x, span, window], to_alpha, alpha_full.at[slot])
                    for n in range(columns):
                        block_of, row = split.place(tile, column + n)
                        box = c.at[lax.div(x, tiles), block_of, row, span]
                        plgpu.copy_gmem_to_smem(box, c_in.at[slot, n], alpha_full.at[slot])
                    plgpu.barrier_wait(y_free.at[slot])
                    plgpu.copy_gmem_to_smem(y.at[x, span, window], to_y, y_full.at[slot])
                    return ()

                lax.fori_loop(0, steps, load, ())
                return done + steps

            lax.fori_loop(0, turns, item, jnp.int32(0))
            for s in range(query_stages):
                plgpu.barrier_wait(q_free.at[s])
            for s in range(stages):
                plgpu.barrier_wait(alpha_free.at[s])
                plgpu.barrier_wait(y_free.at[s])

    shapes = [(query_stages, wide, slabs, ROWS, SLAB), *[(stages, columns, slabs, depth, SLAB)] * 2]
    if config.tail:
        shapes += [(query_stages, slabs, config.tail, SLAB), (depth // SLAB, config.tail, SLAB)]
    struct = jax.ShapeDtypeStruct
    return Role(
        run,
        name="monarch_left",
        outputs=(
            struct((batch, tiles, rows, cols * heads, slabs, SLAB), dtype),
            struct((count, cols, row_groups * row_blocks * ROWS + config.tail), f32),
        ),
        scratch=(
            shared.tile_scratch(shapes, dtype, SLAB),
            plgpu.SMEM((stages, columns, depth), f32),
            plgpu.SMEM((groups, ROWS), f32),
            plgpu.Barrier(num_arrivals=groups, num_barriers=query_stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=query_stages),
            plgpu.Barrier(num_arrivals=1 + columns, num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            plgpu.Barrier(num_arrivals=wide),
        ),
        groups=groups,
        blocks=blocks,
        reduction_bytes=config.reduction_bytes,
    )
