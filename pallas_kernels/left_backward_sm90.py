"""Back through L on Hopper: gradients of alpha, c_L and Y, and the part of dq through L, with wgmma and TMA.

For one query tile, head and column j, with x = s <Q[i], alpha[n]> - c_L[n] over the pairs n = (c, k),
P = exp(x - lse[i]) and dX = P * (<dO[i], Y[n]> - delta[i]), these are dY = P^T dO, d_alpha = s dX^T Q,
d_c = -sum_i dX and dQ = s dX alpha.
A persistent block streams alpha and Y past the rows of one or more columns, dQ stays in registers, and dY and d_alpha
leave from the shared memory that Y and alpha came in. Rows of products are the 64 pairs of a block, columns are i.
"""

import jax
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels import shared
from monarchrt.pallas_kernels.config import ROWS, SLAB, LeftBackwardConfig, column_blocks
from monarchrt.pallas_kernels.left_backward_independent_sm90 import independent_role
from monarchrt.pallas_kernels.left_backward_items import Items, load_in_order
from monarchrt.pallas_kernels.shared import LOG2E, Role


def left_backward_role(
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
    """Takes gradients of a chunk of query tiles and heads back through L.

    Inputs of the role: q [B, A, b1, b2*H, D/64, 64]; the output's gradient, alike; alpha [X, C*b1, b2, D/64, 64],
    X = B * heads * tiles, or with `whole` B * H * A; Y as alpha; c_L [B * heads (H), items, 64, P] as `right_role`
    leaves it for as many query tiles; stats float32 [B, H, A, b2 or more, 2, b1 or more], the log-sum-exp in units of
    log 2, infinite beyond b1, and <dO, O> times the first of `shared.gradient_scales`; limits, int32 [A], the
    pairs that a query tile sees, read when `masked`; start, int32 [3], the chunk's first head and query tile.

    Outputs: the gradients of the chunk's alpha and Y, as alpha; that of c_L float32 [B * heads, items, P, 64], its
    columns where `column_blocks` places them; the part of dq through L in q's dtype, [B * heads, items, 64*row_blocks,
    64 or less, D], likewise, 64 rows for every `config.width` rows i. What belongs to pairs that are not seen is not
    written.

    Args:
        q: [B, A, b1, b2, H, D], before its last axes are split.
        pairs: C*b1.
        scale: Softmax scale.
        heads: Heads of the chunk.
        tiles: Query tiles of the chunk.
        masked: Whether limits may be below C*b1.
        config: Sizes.
        whole: Whether alpha, Y and c_L are those of all heads and query tiles, not of the chunk.

    Returns:
        The role.
    """
    if config.independent:
        return independent_role(
            q, pairs, scale=scale, heads=heads, tiles=tiles, masked=masked, config=config, whole=whole
        )
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    _, _, rows, cols, all_heads, dim = q.shape
    slabs, depth, width = dim // SLAB, ROWS, config.width(rows)
    groups, stages, columns, row_blocks = config.warpgroups, config.stages, config.columns, config.row_blocks
    split = column_blocks(cols, tiles, masked)
    items = Items(q=q, pairs=pairs, heads=heads, tiles=tiles, masked=masked, whole=whole, columns=columns)
    blocks = min(config.blocks, items.count)
    dtype, f32 = q.dtype, jnp.float32
    layout = plgpu.Layout.WGMMA
    kinds = 2 if row_blocks > 1 else 1
    early, late = shared.gradient_scales(dtype, scale)
    outputs_of = [(kind, n) for kind in range(2) for n in range(slabs)]  # slabs of dY and of d_alpha

    def run(block, inputs, outputs, scratch):
        q, g, alpha, y, c, stats, limits, start = inputs
        d_alpha, d_y, d_c, dq = outputs
        smem, c_in, stats_in, sums, q_full, q_free, full, free, made, used = scratch
        (rows_mma, mid_mma, p_mma), (rows_in, mid_in, _) = shared.tile_views(smem)
        group = lax.axis_index("group")
        head0, tile0 = start[0], start[1]
        turns = lax.div(items.count - block + blocks - 1, blocks)

        def place(t):
            return items.place(block + t * blocks, limits, tile0)

        def store_d_c(x, i, j, value):
            """The gradient of c_L for the pairs of step i, where `right_backward` finds it with one copy per pair."""

            @pl.when(j < cols)
            def _():
                block_of, row = split.place(lax.rem(x, tiles), j)
                d_c[lax.div(x, tiles), block_of, pl.ds(i * depth, depth), row] = value

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(config.registers[0], action="increase")
            plgpu.barrier_arrive(q_free)
            my_column, my_rows = lax.div(group, row_blocks), lax.rem(group, row_blocks)
            for s in range(stages):
                plgpu.barrier_arrive(free.at[my_column * stages + s])
            if row_blocks > 1:
                plgpu.barrier_arrive(used)

            def full_rows(x):
                """[64 pairs, width] padded with zeros to 64 rows i, the depth of the next products."""
                if width == ROWS:
                    return x
                return lax.concatenate([x, plgpu.layout_cast(jnp.zeros((depth, ROWS - width), dtype), layout)], 1)

            def item(t, done):
                x, _where, column, limit = place(t)
                j = column + my_column
                steps = lax.div(limit + depth - 1, depth)
                plgpu.barrier_wait(q_full)
                acc = [plgpu.layout_cast(jnp.zeros((ROWS, SLAB), f32), layout) for _ in range(slabs)]

                def leave(i):
                    """Gives back what step i came in, once its gradients have been read."""
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(free.at[lax.div(group, row_blocks) * stages + lax.rem(done + i, stages)])

                def step(i, acc):
                    here = shared.unhoisted(group, done + i)
                    my_column = lax.div(here, row_blocks)
                    x, _where, column, limit = place(shared.unhoisted(t, done + i))
                    j = column + my_column
                    slot = lax.rem(done + i, stages)
                    plgpu.barrier_wait(full.at[my_column * stages + slot])

                    def mine_of(kind, n):
                        return mid_mma.at[slot, kind, my_column, n]

                    def scores(kinds):
                        """Products of Y with dO (kind 0) and of alpha with q (kind 1), [64 pairs, 64 i]."""

                        def multiply(*accs):
                            for acc, kind in zip(accs, kinds, strict=True):
                                for n in range(slabs):
                                    b = rows_mma.at[here, kind, n, pl.ds(0, width)].transpose((1, 0))
                                    plgpu.wgmma(acc, mine_of(kind, n), b)
                            return tuple(acc[...] for acc in accs)

                        return pl.run_scoped(multiply, *[plgpu.WGMMAAccumulatorRef((depth, width), f32) for _ in kinds])

                    if row_blocks > 1:
                        (x_s,) = scores((1,))
                    else:
                        x_s, d_p = scores((1, 0))
                    pl.when(i > 0)(lambda: leave(i - 1))  # the products hid the wait
                    bias = plgpu.load(c_in.at[slot, my_column], layout=layout.reduce(1), optimized=False)
                    pair = plgpu.broadcasted_iota(jnp.int32, (depth,), 0, layout=layout.reduce(1)) + i * depth
                    bias = jnp.where(pair < limit, bias, jnp.inf)  # pairs that are not seen
                    lse = plgpu.load(stats_in.at[here, 0, pl.ds(0, width)], layout=layout.reduce(0), optimized=False)
                    x_s = x_s * (scale * LOG2E) - lax.broadcast_in_dim(bias, x_s.shape, [0])
                    # L again (paper, A.2)
                    p = jnp.exp2(x_s - lax.broadcast_in_dim(lse, x_s.shape, [1]))
                    low_p = p.astype(dtype)
                    if row_blocks > 1:  # several warpgroups have fewer registers: the rounded P waits for dP
                        (d_p,) = scores((0,))
                        p = low_p.astype(f32)
                    delta = plgpu.load(stats_in.at[here, 1, pl.ds(0, width)], layout=layout.reduce(0), optimized=False)
                    d_x = (p * (d_p * early - lax.broadcast_in_dim(delta, d_p.shape, [1]))).astype(dtype)
                    # fits the rounded d_alpha: in dR their errors cancel
                    total = d_x.astype(f32).sum(axis=1) * (-1 / early)
                    low_p, d_x = full_rows(low_p), full_rows(d_x)

                    if row_blocks > 1:
                        plgpu.barrier_wait(used)
                        p_mma[here, 0] = low_p
                        sums[here] = total
                    p_mma[here, kinds - 1] = d_x
                    plgpu.commit_smem()

                    def query(accs):
                        for n in range(slabs):
                            plgpu.wgmma(accs[n], p_mma.at[here, kinds - 1].transpose((1, 0)), mine_of(1, n))

                    acc = pl.run_state(query)([plgpu.WGMMAAccumulatorRef.init(a) for a in acc])
                    if row_blocks > 1:  # every warpgroup has read alpha and Y and written its P and dX
                        plgpu.barrier_arrive(made)
                        plgpu.barrier_wait(made)

                        of_column = [my_column * row_blocks + r for r in range(row_blocks)]
                        parts = [plgpu.load(sums.at[r], layout=layout.reduce(1), optimized=False) for r in of_column]
                        total = sum(parts[1:], start=parts[0])

                    def output(kind, n):
                        """A slab of dY (kind 0) or d_alpha (kind 1) replaces that of Y or alpha and leaves."""

                        def multiply(acc):
                            if row_blocks > 1:
                                for r in range(row_blocks):
                                    other = my_column * row_blocks + r
                                    plgpu.wgmma(acc, p_mma.at[other, kind], rows_mma.at[other, kind, n])
                            else:
                                plgpu.wgmma(acc, (low_p, d_x)[kind], rows_mma.at[here, kind, n])
                            return acc[...]

                        value = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((depth, SLAB), f32))
                        value = value * late if kind and late != 1 else value
                        mid_mma[slot, kind, my_column, n] = value.astype(dtype)

                    def send(kind, n):
                        @pl.when(j < cols)
                        def _():
                            target = (d_y, d_alpha)[kind].at[x, pl.ds(i * depth, depth), j, n]
                            plgpu.copy_smem_to_gmem(mid_in.at[slot, kind, my_column, n], target)

                    def mine(do):
                        for index, (kind, n) in enumerate(outputs_of):
                            if row_blocks == 1:
                                do(kind, n)
                            else:
                                pl.when(my_rows == index * row_blocks // len(outputs_of))(
                                    lambda kind=kind, n=n: do(kind, n)
                                )

                    if row_blocks == 1:
                        plgpu.commit_smem()  # every warp has read its alpha, which d_alpha replaces
                    mine(output)
                    if row_blocks > 1:
                        plgpu.barrier_arrive(used)
                    plgpu.commit_smem()
                    mine(send)
                    # after the fence, which would wait for it
                    pl.when(my_rows == row_blocks - 1)(lambda: store_d_c(x, i, j, total))
                    return acc

                acc = lax.fori_loop(0, steps, step, acc)
                pl.when(steps > 0)(lambda: leave(steps - 1))
                plgpu.barrier_arrive(q_free)

                @pl.when(j < cols)
                def _():
                    block_of, row = split.place(lax.rem(x, tiles), j)
                    span = pl.ds(my_rows * ROWS, ROWS)
                    for n in range(slabs):
                        share = (acc[n] * late).astype(dtype)
                        dq[lax.div(x, tiles), block_of, span, row, pl.ds(n * SLAB, SLAB)] = share

                return done + steps

            lax.fori_loop(0, turns, item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)
            if row_blocks > 1:
                plgpu.barrier_wait(used)

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(config.registers[1], action="decrease")

            def item(t, done):
                x, (entry, head, tile), column, limit = place(t)
                steps = lax.div(limit + depth - 1, depth)
                x_in, bias_in = items.source(x, (entry, head, tile), head0, tile0)

                def load_query():
                    plgpu.barrier_wait(q_free)
                    for n in range(groups):
                        j = column + n // row_blocks
                        span = pl.ds(n % row_blocks * width + x * 0, ROWS)  # past the end of b1 rows, so not static
                        for kind, source in enumerate((g, q)):
                            box = source.at[entry, tile0 + tile, span, j * all_heads + head0 + head]
                            plgpu.copy_gmem_to_smem(box, rows_in.at[n, kind].transpose((1, 0, 2)), q_full)
                        box = stats.at[entry, head0 + head, tile0 + tile, j, :, span]
                        plgpu.copy_gmem_to_smem(box, stats_in.at[n], q_full)

                def load(i):
                    slot, span = lax.rem(done + i, stages), pl.ds(i * depth, depth)
                    for n in range(columns):
                        arrived = full.at[n * stages + slot]
                        plgpu.barrier_wait(free.at[n * stages + slot])
                        for kind, source in enumerate((y, alpha)):
                            box = source.at[x_in, span, pl.ds(column + n, 1)]
                            target = mid_in.at[slot, kind, pl.ds(n, 1)]
                            plgpu.copy_gmem_to_smem(box, target.transpose((2, 0, 1, 3)), arrived)
                        plgpu.copy_gmem_to_smem(c.at[*bias_in(column + n), span], c_in.at[slot, n], arrived)

                load_in_order(steps, stages - 1, load, load_query)
                return done + steps

            lax.fori_loop(0, turns, item, jnp.int32(0))
            plgpu.barrier_wait(q_free)
            for n in range(columns):
                for s in range(stages):
                    plgpu.barrier_wait(free.at[n * stages + s])

    shapes = (
        (groups, 2, slabs, ROWS, SLAB),  # dO and q
        (stages, 2, columns, slabs, depth, SLAB),  # Y and alpha, then their gradients
        (groups, kinds, depth, ROWS),  # P, kept in registers where no other warpgroup needs it, and dX
    )
    return Role(
        run,
        name="monarch_left_backward",
        outputs=items.outputs(row_blocks * ROWS),
        scratch=(
            shared.tile_scratch(shapes, dtype, SLAB),
            plgpu.SMEM((stages, columns, depth), f32),
            plgpu.SMEM((groups, 2, ROWS), f32),
            plgpu.SMEM((groups, depth), f32),
            plgpu.Barrier(num_arrivals=3 * groups),
            plgpu.Barrier(num_arrivals=groups),
            plgpu.Barrier(num_arrivals=3, num_barriers=columns * stages),
            plgpu.Barrier(num_arrivals=row_blocks, num_barriers=columns * stages),
            plgpu.Barrier(num_arrivals=groups),
            plgpu.Barrier(num_arrivals=groups),
        ),
        groups=groups,
        blocks=blocks,
    )
