"""Stage 2 on Hopper: the output and its log-sum-exp from alpha, c_L and Y, with wgmma and TMA.

For one query tile, head and column j this is attention from b1 rows i to the C*b1 pairs (c, k), one long axis with keys
alpha[:, j], values Y[:, j] and the bias -c_L[:, j]. A persistent block streams them past the rows of one or more
columns; every vector of alpha and Y is read once as long as its rows fit the block's warpgroups. A few rows more than
a multiple of 64 are `left_tail.py`'s.
"""

import dataclasses
from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from monarchrt.pallas_kernels.sm90 import left_tail, shared
from monarchrt.pallas_kernels.sm90.config import ROWS, SLAB, LeftConfig
from monarchrt.pallas_kernels.sm90.roles import Given, PersistentBlock, QueryTileItems, Role
from monarchrt.pallas_kernels.sm90.shared import LOG2E
from monarchrt.pallas_kernels.sm90.types import Index, Place, Ref

Tile = Float32[Array, "64 _"]
Sums = tuple[Float32[Array, "64 ..."], ...]
"""Of 64 rows: greatest score, sum of weights, slabs of the output [64 i, 64 d]."""


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
    items = Items(q=q, pairs=pairs, heads=heads, tiles=tiles, masked=masked, config=config)
    batch, _, rows, cols, _, dim = q.shape
    slabs = dim // SLAB
    groups, stages, depth, query_stages = config.warpgroups, config.stages, config.key_block, config.query_stages
    columns, row_blocks, wide = config.columns, config.row_blocks, config.wide
    if config.tail and items.row_groups != 1:
        raise ValueError(
            f"tail={config.tail} with row_blocks={row_blocks} is for {config.tail + 1} to "
            f"{row_blocks * ROWS + config.tail} rows, not {rows}."
        )

    def run(given):
        work = Block(items, scale, given)
        pl.when(work.group < wide)(work.compute)
        if config.tail:
            pl.when(work.group == wide)(work.compute_tail)
        pl.when(work.group == groups)(work.load)

    shapes = [(query_stages, wide, slabs, ROWS, SLAB), *[(stages, columns, slabs, depth, SLAB)] * 2]
    if config.tail:
        shapes += [(query_stages, slabs, config.tail, SLAB), (depth // SLAB, config.tail, SLAB)]
    struct, padded_rows = jax.ShapeDtypeStruct, items.row_groups * row_blocks * ROWS + config.tail
    return Role(
        run,
        name="monarch_left",
        outputs=(
            struct((batch, tiles, rows, cols * heads, slabs, SLAB), q.dtype),
            struct((batch * heads * tiles, cols, padded_rows), jnp.float32),
        ),
        scratch=dict(
            tiles=shared.tile_scratch(shapes, q.dtype, SLAB),
            c=plgpu.SMEM((stages, columns, depth), jnp.float32),
            lse=plgpu.SMEM((groups, ROWS), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=groups, num_barriers=query_stages),
            q_free=plgpu.Barrier(num_arrivals=groups, num_barriers=query_stages),
            alpha_full=plgpu.Barrier(num_arrivals=1 + columns, num_barriers=stages),
            alpha_free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            y_full=plgpu.Barrier(num_barriers=stages),
            y_free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            turn=plgpu.Barrier(num_arrivals=wide),
        ),
        groups=groups,
        blocks=min(config.blocks, items.count),
        reduction_bytes=config.reduction_bytes,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items(QueryTileItems):
    """The work of the kernel: some columns of a query tile and head with some of its blocks of 64 rows are an item."""

    config: LeftConfig

    @property
    def column_groups(self) -> int:
        """Groups of columns of a query tile and head."""
        return -(-self.q.shape[3] // self.config.columns)

    @property
    def row_groups(self) -> int:
        """Groups of blocks of rows of a column."""
        return -(-(self.q.shape[2] - self.config.tail) // (ROWS * self.config.row_blocks))

    @property
    def count(self) -> int:
        """All items."""
        return self.q.shape[0] * self.heads * self.tiles * self.column_groups * self.row_groups

    def place(self, item: Index, limits: Ref, tile0: Index) -> tuple[Index, Place, Index, Index, Index]:
        """Index x, batch entry, head and tile of the chunk, first column, first block of rows, pairs seen."""
        if self.config.newest_first:
            item = self.count - 1 - item
        column_groups, row_groups = self.column_groups, self.row_groups
        x = lax.div(item, column_groups * row_groups)
        column = lax.rem(lax.div(item, row_groups), column_groups) * self.config.columns
        where, limit = self.seen_at(x, limits, tile0)
        return x, where, column, lax.rem(item, row_groups) * self.config.row_blocks, limit


class Block(PersistentBlock):
    """A persistent block: the arrays, its shared memory, and its turns, one item each, past all pairs that it sees."""

    def __init__(self, items: Items, scale: float, given: Given) -> None:
        super().__init__(given)
        self.items, self.config, self.scale = items, items.config, scale
        self.slabs, self.depth = items.q.shape[5] // SLAB, items.config.key_block
        self.q, self.alpha, self.y, self.c, *self.more_numbers, self.limits, start = given.inputs
        self.out, self.lse = given.outputs
        self.factors = items.q.dtype  # of the matrix products
        self.name_scratch(given.scratch)
        self.head0, self.tile0 = start[0], start[1]
        self.turns = self.share(items.count)

    def name_scratch(self, scratch: SimpleNamespace) -> None:
        """The block's shared memory by name."""
        self.c_in, self.lse_out, self.turn = scratch.c, scratch.lse, scratch.turn
        self.q_full, self.q_free = scratch.q_full, scratch.q_free
        self.alpha_full, self.alpha_free = scratch.alpha_full, scratch.alpha_free
        self.y_full, self.y_free = scratch.y_full, scratch.y_free
        multiply, copy = shared.tile_views(scratch.tiles)
        self.q_mma, self.alpha_mma, self.y_mma, *self.tail_mma = multiply
        self.q_in, self.alpha_in, self.y_in, *self.tail_in = copy
        self.q_factor = self.q_mma

    def place(self, t: Index) -> tuple[Index, Place, Index, Index, Index]:
        """As `Items.place`, of a turn."""
        return self.items.place(self.number(t), self.limits, self.tile0)

    def slot(self, n: Index) -> Index:
        """Which alpha, Y and c_L in shared memory are step n's."""
        return lax.rem(n, self.config.stages)

    def free_all(self) -> None:
        """Says that nothing is in use yet."""
        for s in range(self.config.query_stages):
            plgpu.barrier_arrive(self.q_free.at[s])
        for s in range(self.config.stages):
            plgpu.barrier_arrive(self.alpha_free.at[s])
            plgpu.barrier_arrive(self.y_free.at[s])

    def take_turns(self, times: int = 1) -> None:
        """With `alternate`, waits for the other warpgroups, of which each is one wait behind the one before."""
        if self.config.alternate:
            for _ in range(times):
                plgpu.barrier_arrive(self.turn)
                plgpu.barrier_wait(self.turn)

    def compute(self) -> None:
        """What a computing warpgroup does."""
        group, wide, row_blocks = self.group, self.config.wide, self.config.row_blocks
        plgpu.set_max_registers(self.config.registers[0], action="increase")
        self.free_all()
        my_column, my_rows = lax.div(group, row_blocks), lax.rem(group, row_blocks)
        for n in range(1, wide):
            pl.when(group == n)(lambda n=n: self.take_turns(n))

        def item(t, done):
            x, where, column, row_block, limit = self.place(t)
            steps = lax.div(limit + self.depth - 1, self.depth)
            q_slot = lax.rem(t, self.config.query_stages)
            plgpu.barrier_wait(self.q_full.at[q_slot])
            self.ready_query(q_slot)
            layout = plgpu.Layout.WGMMA
            top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, jnp.float32), layout.reduce(1))
            total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))
            acc = [plgpu.layout_cast(jnp.zeros((ROWS, SLAB), jnp.float32), layout) for _ in range(self.slabs)]

            def step(i, carry):
                return self.step(i, carry, done, q_slot, my_column, limit)

            top, total, *acc = lax.fori_loop(0, steps, step, (top, total, *acc))
            pl.when(steps == 0)(lambda: self.take_turns(2))  # or one warpgroup would be further behind
            self.store((top, total, *acc), q_slot)
            j, span = column + my_column, pl.ds((row_block + my_rows) * ROWS, ROWS)
            self.send(x, where, j, span, q_slot)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(self.q_free.at[q_slot])
            return done + steps

        lax.fori_loop(0, self.turns, item, jnp.int32(0))
        for n in range(wide - 1):
            pl.when(group == n)(lambda n=n: self.take_turns(wide - 1 - n))
        plgpu.wait_smem_to_gmem(0)

    def step(self, i: Index, carry: Sums, done: Index, q_slot: Index, my_column: Index, limit: Index) -> Sums:
        """Adds the pairs of a step to the running softmax: its top and total, and slabs of the output, [64 i, 64 d]."""
        config, depth = self.config, self.depth
        top, total, *acc = carry
        slot = self.slot(done + i)
        plgpu.barrier_wait(self.alpha_full.at[slot])

        def scores(acc):
            for n in range(self.slabs):
                b = self.alpha_mma.at[slot, my_column, n].transpose((1, 0))
                plgpu.wgmma(acc, self.q_factor.at[q_slot, self.group, n], b)
            self.take_turns()  # its products with Y and these are sent: the next warpgroup's may follow
            return acc[...]

        s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((ROWS, depth), jnp.float32))
        s = self.logits(s, slot, my_column, limit - i * depth)
        plgpu.barrier_arrive(self.alpha_free.at[slot])
        new_top = jnp.maximum(top, s.max(axis=1))
        factor = jnp.exp2(top - new_top)
        # the update of L (paper, A.2): softmax over (c, k) of s <Q, alpha> - c_L
        p = jnp.exp2(s - lax.broadcast_in_dim(new_top, s.shape, [0]))
        total = total * factor + self.weights(p, slot, my_column).sum(axis=1)
        acc = [x * lax.broadcast_in_dim(factor, x.shape, [0]) for x in acc]
        p = p.astype(self.factors)
        if config.alternate:
            total, p, *acc = lax.optimization_barrier((total, p, *acc))
            self.take_turns()  # the softmax is done
        plgpu.barrier_wait(self.y_full.at[slot])

        def products(accs):
            for n in range(self.slabs):
                plgpu.wgmma(accs[n], p, self.y_mma.at[slot, my_column, n])

        acc = shared.accumulate(products, acc)
        plgpu.barrier_arrive(self.y_free.at[slot])
        return new_top, total, *acc

    def ready_query(self, q_slot: Index) -> None:
        """Makes an item's query rows, which have come, factors of matrix products; they are."""

    def logits(self, s: Tile, slot: Index, column: Index, seen: Index) -> Tile:
        """L's scores in units of log 2, [64 i, depth], from <Q, alpha>; `seen` pairs of the step are there."""
        layout = plgpu.Layout.WGMMA.reduce(0)
        bias = plgpu.load(self.c_in.at[slot, column], layout=layout, optimized=False)
        pair = plgpu.broadcasted_iota(jnp.int32, (self.depth,), 0, layout=layout)
        bias = jnp.where(pair < seen, bias, jnp.inf)  # pairs that are not seen
        return s * (self.scale * LOG2E) - lax.broadcast_in_dim(bias, s.shape, [1])

    def weights(self, p: Tile, slot: Index, column: Index) -> Tile:
        """What the softmax's total is the sum of, from what Y is multiplied by."""
        del slot, column
        return p

    def store(self, sums: Sums, q_slot: Index) -> None:
        """The output replaces this warpgroup's query rows; and the log-sum-exp."""
        top, total, *acc = sums
        inverse = 1.0 / total
        plgpu.commit_smem()  # every warp has read its rows of the query tile, which the output replaces
        for n in range(self.slabs):
            value = acc[n] * lax.broadcast_in_dim(inverse, acc[n].shape, [0])
            self.q_mma[q_slot, self.group, n] = value.astype(self.items.q.dtype)
        self.lse_out[self.group] = (top + jnp.log2(total)) * (1 / LOG2E)
        plgpu.commit_smem()

    def send(self, x: Index, where: Place, j: Index, span: pl.Slice, q_slot: Index) -> None:
        """Starts the copies of what `store` left."""
        entry, head, tile = where

        @pl.when(j < self.items.q.shape[3])
        def _():
            target = self.out.at[entry, tile, span, j * self.items.heads + head]
            plgpu.copy_smem_to_gmem(self.q_in.at[q_slot, self.group].transpose((1, 0, 2)), target)
            plgpu.copy_smem_to_gmem(self.lse_out.at[self.group], self.lse.at[x, j, span])

    def compute_tail(self) -> None:
        """What the warpgroup of the last rows does, if they are a few more than a multiple of 64."""
        config, depth, wide = self.config, self.depth, self.config.wide
        few = config.registers[1] < 65536 // (128 * (config.warpgroups + 1))
        plgpu.set_max_registers(config.registers[1], action="decrease" if few else "increase")
        self.free_all()
        (q_tail, weights), (q_tail_in, _weights) = self.tail_mma, self.tail_in

        def item(t, done):
            x, (entry, head, tile), j, _row_block, limit = self.place(t)
            steps = lax.div(limit + depth - 1, depth)
            q_slot = lax.rem(t, config.query_stages)
            plgpu.barrier_wait(self.q_full.at[q_slot])

            def step(i, sums):
                slot = lax.rem(done + i, config.stages)
                plgpu.barrier_wait(self.alpha_full.at[slot])
                sums = left_tail.step(
                    sums,
                    q=lambda n: q_tail.at[q_slot, n],
                    alpha=lambda n: self.alpha_mma.at[slot, 0, n],
                    y=lambda n: self.y_mma.at[slot, 0, n],
                    weights=weights,
                    bias=self.c_in.at[slot, 0],
                    seen=limit - i * depth,
                    scale=self.scale,
                    read_alpha=lambda: plgpu.barrier_arrive(self.alpha_free.at[slot]),
                    await_y=lambda: plgpu.barrier_wait(self.y_full.at[slot]),
                )
                plgpu.barrier_arrive(self.y_free.at[slot])
                return sums

            sums = lax.fori_loop(0, steps, step, left_tail.start(config.tail, depth, self.slabs))
            plgpu.commit_smem()  # every warp has read the query rows, which the output replaces
            left_tail.finish(sums, q_tail.at[q_slot], self.lse_out.at[wide, pl.ds(0, config.tail)])
            plgpu.commit_smem()
            span = pl.ds(t * 0 + wide * ROWS, config.tail)  # past the end of b1 rows, so not static
            target = self.out.at[entry, tile, span, j * self.items.heads + head]
            plgpu.copy_smem_to_gmem(q_tail_in.at[q_slot].transpose((1, 0, 2)), target)
            plgpu.copy_smem_to_gmem(self.lse_out.at[wide, pl.ds(0, config.tail)], self.lse.at[x, j, span])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(self.q_free.at[q_slot])
            return done + steps

        lax.fori_loop(0, self.turns, item, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def load(self) -> None:
        """What the loading warpgroup does: q of an item, then alpha, c_L and Y of each step."""
        config, depth, tiles = self.config, self.depth, self.items.tiles
        plgpu.set_max_registers(config.registers[2], action="decrease")
        split = self.items.split

        def item(t, done):
            x, where, column, row_block, limit = self.place(t)
            steps = lax.div(limit + depth - 1, depth)
            self.load_query(t, where, column, row_block)

            def load(i, _):
                slot, span = lax.rem(done + i, config.stages), pl.ds(i * depth, depth)
                window = pl.ds(column, config.columns)
                plgpu.barrier_wait(self.alpha_free.at[slot])
                to_alpha, to_y = (ref.at[slot].transpose((2, 0, 1, 3)) for ref in (self.alpha_in, self.y_in))
                plgpu.copy_gmem_to_smem(self.alpha.at[x, span, window], to_alpha, self.alpha_full.at[slot])
                for n in range(config.columns):
                    block_of, row = split.place(where[2], column + n)
                    box = self.c.at[lax.div(x, tiles), block_of, row, span]
                    plgpu.copy_gmem_to_smem(box, self.c_in.at[slot, n], self.alpha_full.at[slot])
                plgpu.barrier_wait(self.y_free.at[slot])
                plgpu.copy_gmem_to_smem(self.y.at[x, span, window], to_y, self.y_full.at[slot])
                return ()

            lax.fori_loop(0, steps, load, ())
            return done + steps

        lax.fori_loop(0, self.turns, item, jnp.int32(0))
        for s in range(config.query_stages):
            plgpu.barrier_wait(self.q_free.at[s])
        for s in range(config.stages):
            plgpu.barrier_wait(self.alpha_free.at[s])
            plgpu.barrier_wait(self.y_free.at[s])

    def load_query(self, t: Index, where: Place, column: Index, row_block: Index) -> None:
        """Starts the copies of an item's query rows, for each warpgroup its own."""
        config, all_heads = self.config, self.items.q.shape[4]
        head0, tile0 = self.head0, self.tile0
        entry, head, tile = where
        q_slot = lax.rem(t, config.query_stages)
        plgpu.barrier_wait(self.q_free.at[q_slot])
        if config.tail:
            span = pl.ds(t * 0 + config.wide * ROWS, config.tail)
            box = self.q.at[entry, tile0 + tile, span, column * all_heads + head0 + head]
            plgpu.copy_gmem_to_smem(box, self.tail_in[0].at[q_slot].transpose((1, 0, 2)), self.q_full.at[q_slot])
        for g in range(config.wide):
            span = pl.ds((row_block + g % config.row_blocks) * ROWS, ROWS)
            j = column + g // config.row_blocks
            box = self.q.at[entry, tile0 + tile, span, j * all_heads + head0 + head]
            plgpu.copy_gmem_to_smem(box, self.q_in.at[q_slot, g].transpose((1, 0, 2)), self.q_full.at[q_slot])
