"""Back through L on Hopper: gradients of alpha, c_L and Y, and the part of dq through L, with wgmma and TMA.

For one query tile, head and column j, with x = s <Q[i], alpha[n]> - c_L[n] over the pairs n = (c, k),
P = exp(x - lse[i]) and dX = P * (<dO[i], Y[n]> - delta[i]), these are dY = P^T dO, d_alpha = s dX^T Q,
d_c = -sum_i dX and dQ = s dX alpha.
A persistent block streams alpha and Y past the rows of one or more columns, dQ stays in registers, and dY and d_alpha
leave from the shared memory that Y and alpha came in. Rows of products are the 64 pairs of a block, columns are i.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels.sm90 import shared
from monarchrt.pallas_kernels.sm90.config import ROWS, SLAB, LeftBackwardConfig
from monarchrt.pallas_kernels.sm90.left_backward_independent import independent_role
from monarchrt.pallas_kernels.sm90.left_backward_items import (
    Items,
    load_in_order,
    padded,
    probabilities,
    scores_gradient,
    seen_bias,
)
from monarchrt.pallas_kernels.sm90.roles import Given, PersistentBlock, Role, specialised
from monarchrt.pallas_kernels.sm90.types import Index, Place, Rows, Slabs, Tile


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
    slabs = q.shape[5] // SLAB
    groups, stages, columns, row_blocks = config.warpgroups, config.stages, config.columns, config.row_blocks
    items = Items(q=q, pairs=pairs, heads=heads, tiles=tiles, masked=masked, whole=whole, columns=columns)
    kinds = 2 if row_blocks > 1 else 1

    shapes = (
        (groups, 2, slabs, ROWS, SLAB),  # dO and q
        (stages, 2, columns, slabs, ROWS, SLAB),  # Y and alpha, then their gradients
        (groups, kinds, ROWS, ROWS),  # P, kept in registers where no other warpgroup needs it, and dX
    )
    return Role(
        specialised(lambda given: _Block(items, config, scale, given), groups),
        name="monarch_left_backward",
        outputs=items.outputs(row_blocks * ROWS),
        scratch=dict(
            tiles=shared.tile_scratch(shapes, q.dtype, SLAB),
            c=plgpu.SMEM((stages, columns, ROWS), jnp.float32),
            stats=plgpu.SMEM((groups, 2, ROWS), jnp.float32),
            sums=plgpu.SMEM((groups, ROWS), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=3 * groups),
            q_free=plgpu.Barrier(num_arrivals=groups),
            full=plgpu.Barrier(num_arrivals=3, num_barriers=columns * stages),
            free=plgpu.Barrier(num_arrivals=row_blocks, num_barriers=columns * stages),
            made=plgpu.Barrier(num_arrivals=groups),
            used=plgpu.Barrier(num_arrivals=groups),
        ),
        groups=groups,
        blocks=min(config.blocks, items.count),
    )


class _Block(PersistentBlock):
    """A persistent block: the arrays, its shared memory, and its turns, one item each, past all pairs that it sees."""

    def __init__(self, items: Items, config: LeftBackwardConfig, scale: float, given: Given) -> None:
        super().__init__(given)
        scratch = given.scratch
        self.items, self.scale = items, scale
        self.config, self.stages, self.row_blocks = config, config.stages, config.row_blocks
        self.width = config.width(items.q.shape[2])
        self.slabs = items.q.shape[5] // SLAB
        self.early, self.late = shared.gradient_scales(items.q.dtype, scale)
        self.q, self.g, self.alpha, self.y, self.c, self.stats, self.limits, start = given.inputs
        self.d_alpha, self.d_y, self.d_c, self.dq = given.outputs
        self.c_in, self.stats_in, self.sums = scratch.c, scratch.stats, scratch.sums
        self.q_full, self.q_free, self.full, self.free = scratch.q_full, scratch.q_free, scratch.full, scratch.free
        self.made, self.used = scratch.made, scratch.used
        (self.rows_mma, self.mid_mma, self.p_mma), (self.rows_in, self.mid_in, _) = shared.tile_views(scratch.tiles)
        self.head0, self.tile0 = start[0], start[1]
        self.turns = self.share(items.count)

    def place(self, t: Index) -> tuple[Index, Place, Index, Index]:
        """Index x, batch entry, head and tile of the chunk, first column, pairs seen."""
        return self.items.place(self.number(t), self.limits, self.tile0)

    def compute(self) -> None:
        """What a computing warpgroup does."""
        group, row_blocks = self.group, self.row_blocks
        plgpu.set_max_registers(self.config.registers[0], action="increase")
        plgpu.barrier_arrive(self.q_free)
        my_column, my_rows = lax.div(group, row_blocks), lax.rem(group, row_blocks)
        for s in range(self.stages):
            plgpu.barrier_arrive(self.free.at[my_column * self.stages + s])
        if row_blocks > 1:
            plgpu.barrier_arrive(self.used)

        def turn(t, done):
            x, _where, column, limit = self.place(t)
            j = column + my_column
            steps = lax.div(limit + ROWS - 1, ROWS)
            plgpu.barrier_wait(self.q_full)
            layout = plgpu.Layout.WGMMA
            acc = [plgpu.layout_cast(jnp.zeros((ROWS, SLAB), jnp.float32), layout) for _ in range(self.slabs)]
            acc = lax.fori_loop(0, steps, lambda i, acc: self.step(i, acc, t, done, my_rows), acc)
            pl.when(steps > 0)(lambda: self.leave(done, steps - 1))
            plgpu.barrier_arrive(self.q_free)
            pl.when(j < self.items.q.shape[3])(lambda: self.store_query(x, j, my_rows, acc))
            return done + steps

        lax.fori_loop(0, self.turns, turn, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
        if row_blocks > 1:
            plgpu.barrier_wait(self.used)

    def leave(self, done: Index, i: Index) -> None:
        """Gives back what step i of an item, with `done` before it, came in, once its gradients have been read."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        place = lax.div(self.group, self.row_blocks) * self.stages + lax.rem(done + i, self.stages)
        plgpu.barrier_arrive(self.free.at[place])

    def step(self, i: Index, acc: Slabs, t: Index, done: Index, my_rows: Index) -> Slabs:
        """The pairs from 64 i on: their gradients leave, and their part of dQ is added to `acc`, [64 i, 64 d] each."""
        row_blocks, dtype = self.row_blocks, self.items.q.dtype
        here = shared.unhoisted(self.group, done + i)
        my_column = lax.div(here, row_blocks)
        x, _where, column, limit = self.place(shared.unhoisted(t, done + i))
        j = column + my_column
        slot = lax.rem(done + i, self.stages)
        plgpu.barrier_wait(self.full.at[my_column * self.stages + slot])

        def scores(*kinds):
            """Products of Y with dO (kind 0) and of alpha with q (kind 1), [64 pairs, 64 i]."""

            def multiply(*accs):
                for acc, kind in zip(accs, kinds, strict=True):
                    for n in range(self.slabs):
                        b = self.rows_mma.at[here, kind, n, pl.ds(0, self.width)].transpose((1, 0))
                        plgpu.wgmma(acc, self.mid_mma.at[slot, kind, my_column, n], b)
                return tuple(acc[...] for acc in accs)

            types = [plgpu.WGMMAAccumulatorRef((ROWS, self.width), jnp.float32) for _ in kinds]
            return pl.run_scoped(multiply, *types)

        if row_blocks > 1:
            (x_s,) = scores(1)
        else:
            x_s, d_p = scores(1, 0)
        pl.when(i > 0)(lambda: self.leave(done, i - 1))  # the products hid the wait
        bias = seen_bias(self.c_in.at[slot, my_column], i, limit)
        p = probabilities(x_s, bias, self.stats_in.at[here, 0, pl.ds(0, self.width)], self.scale)
        low_p = p.astype(dtype)
        if row_blocks > 1:  # several warpgroups have fewer registers: the rounded P waits for dP
            (d_p,) = scores(0)
            p = low_p.astype(jnp.float32)
        d_x = scores_gradient(p, d_p, self.stats_in.at[here, 1, pl.ds(0, self.width)], self.early, dtype)
        # fits the rounded d_alpha: in dR their errors cancel
        total = d_x.astype(jnp.float32).sum(axis=1) * (-1 / self.early)
        low_p, d_x = padded(low_p, ROWS), padded(d_x, ROWS)
        if row_blocks > 1:
            plgpu.barrier_wait(self.used)
            self.p_mma[here, 0] = low_p
            self.sums[here] = total
        self.p_mma[here, int(row_blocks > 1)] = d_x
        plgpu.commit_smem()

        def query(accs):
            for n in range(self.slabs):
                left = self.p_mma.at[here, int(row_blocks > 1)].transpose((1, 0))
                plgpu.wgmma(accs[n], left, self.mid_mma.at[slot, 1, my_column, n])

        acc = shared.accumulate(query, acc)
        if row_blocks > 1:  # every warpgroup has read alpha and Y and written its P and dX
            plgpu.barrier_arrive(self.made)
            plgpu.barrier_wait(self.made)
            row = plgpu.Layout.WGMMA.reduce(1)
            of_column = [my_column * row_blocks + r for r in range(row_blocks)]
            parts = [plgpu.load(self.sums.at[r], layout=row, optimized=False) for r in of_column]
            total = sum(parts[1:], start=parts[0])
        self.leave_gradients(i, (low_p, d_x), total, slot, here, (x, j, my_column, my_rows))
        return acc

    def leave_gradients(
        self,
        i: Index,
        factors: tuple[Tile, Tile],
        total: Rows,
        slot: Index,
        here: Index,
        where: tuple[Index, Index, Index, Index],
    ) -> None:
        """dY and d_alpha of a step replace Y and alpha and leave, and d_c, `total`; from `factors`, P and dX."""
        x, j, my_column, my_rows = where
        row_blocks, dtype, cols = self.row_blocks, self.items.q.dtype, self.items.q.shape[3]
        slabs_out = [(kind, n) for kind in range(2) for n in range(self.slabs)]  # of dY and of d_alpha

        def output(kind, n):
            """A slab of dY (kind 0) or d_alpha (kind 1) replaces that of Y or alpha and leaves."""

            def multiply(acc):
                if row_blocks > 1:
                    for r in range(row_blocks):
                        other = my_column * row_blocks + r
                        plgpu.wgmma(acc, self.p_mma.at[other, kind], self.rows_mma.at[other, kind, n])
                else:
                    plgpu.wgmma(acc, factors[kind], self.rows_mma.at[here, kind, n])
                return acc[...]

            value = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, SLAB), jnp.float32))
            value = value * self.late if kind and self.late != 1 else value
            self.mid_mma[slot, kind, my_column, n] = value.astype(dtype)

        def send(kind, n):
            @pl.when(j < cols)
            def _():
                target = (self.d_y, self.d_alpha)[kind].at[x, pl.ds(i * ROWS, ROWS), j, n]
                plgpu.copy_smem_to_gmem(self.mid_in.at[slot, kind, my_column, n], target)

        def mine(do):
            for index, (kind, n) in enumerate(slabs_out):
                if row_blocks == 1:
                    do(kind, n)
                else:
                    own = my_rows == index * row_blocks // len(slabs_out)
                    pl.when(own)(lambda kind=kind, n=n: do(kind, n))

        if row_blocks == 1:
            plgpu.commit_smem()  # every warp has read its alpha, which d_alpha replaces
        mine(output)
        if row_blocks > 1:
            plgpu.barrier_arrive(self.used)
        plgpu.commit_smem()
        mine(send)
        # after the fence, which would wait for it
        pl.when(my_rows == row_blocks - 1)(lambda: self.store_d_c(x, i, j, total))

    def store_d_c(self, x: Index, i: Index, j: Index, value: Rows) -> None:
        """The gradient of c_L for the pairs of step i, where `right_backward` finds it with one copy per pair."""
        tiles = self.items.tiles

        @pl.when(j < self.items.q.shape[3])
        def _():
            block_of, row = self.items.split.place(lax.rem(x, tiles), j)
            shared.store_parts(self.d_c.at[lax.div(x, tiles), block_of, pl.ds(i * ROWS, ROWS), row], value)

    def store_query(self, x: Index, j: Index, my_rows: Index, acc: Slabs) -> None:
        """The part of dQ through L."""
        tiles, dtype = self.items.tiles, self.items.q.dtype
        block_of, row = self.items.split.place(lax.rem(x, tiles), j)
        span = pl.ds(my_rows * ROWS, ROWS)
        for n in range(self.slabs):
            share = (acc[n] * self.late).astype(dtype)
            target = self.dq.at[lax.div(x, tiles), block_of, span, row, pl.ds(n * SLAB, SLAB)]
            shared.store_parts(target, share)

    def load(self) -> None:
        """What the loading warpgroup does: Y, alpha and c_L of each step, dO, q and the statistics of an item."""
        columns, stages = self.config.columns, self.stages
        plgpu.set_max_registers(self.config.registers[1], action="decrease")

        def turn(t, done):
            x, where, column, limit = self.place(t)
            steps = lax.div(limit + ROWS - 1, ROWS)
            x_in, bias_in = self.items.source(x, where, self.head0, self.tile0)

            def load(i):
                slot, span = lax.rem(done + i, stages), pl.ds(i * ROWS, ROWS)
                for n in range(columns):
                    arrived = self.full.at[n * stages + slot]
                    plgpu.barrier_wait(self.free.at[n * stages + slot])
                    for kind, source in enumerate((self.y, self.alpha)):
                        box = source.at[x_in, span, pl.ds(column + n, 1)]
                        target = self.mid_in.at[slot, kind, pl.ds(n, 1)]
                        plgpu.copy_gmem_to_smem(box, target.transpose((2, 0, 1, 3)), arrived)
                    plgpu.copy_gmem_to_smem(self.c.at[*bias_in(column + n), span], self.c_in.at[slot, n], arrived)

            load_in_order(steps, stages - 1, load, lambda: self.load_query(x, where, column))
            return done + steps

        lax.fori_loop(0, self.turns, turn, jnp.int32(0))
        plgpu.barrier_wait(self.q_free)
        for n in range(columns):
            for s in range(stages):
                plgpu.barrier_wait(self.free.at[n * stages + s])

    def load_query(self, x: Index, where: Place, column: Index) -> None:
        """Starts the copies of an item's dO, q and statistics, for each warpgroup its rows."""
        entry, head, tile = where
        plgpu.barrier_wait(self.q_free)
        for n in range(self.config.warpgroups):
            j = column + n // self.row_blocks
            span = pl.ds(n % self.row_blocks * self.width + x * 0, ROWS)  # past the end of b1 rows, so not static
            for kind, source in enumerate((self.g, self.q)):
                box = source.at[entry, self.tile0 + tile, span, j * self.items.q.shape[4] + self.head0 + head]
                plgpu.copy_gmem_to_smem(box, self.rows_in.at[n, kind].transpose((1, 0, 2)), self.q_full)
            box = self.stats.at[entry, self.head0 + head, self.tile0 + tile, j, :, span]
            plgpu.copy_gmem_to_smem(box, self.stats_in.at[n], self.q_full)
