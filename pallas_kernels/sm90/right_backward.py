"""Back through R on Hopper: dk and dv, and the gradient of R's scores for `query`, with wgmma and TMA.

For one head and key row (c, k): with R = softmax(Z), Z = s Q[a,k] K^T, dR = d_alpha K^T + dY V^T + d_c log R and
dZ = R * (dR - <R, dR>), these are dK = s dZ^T Q + R^T d_alpha and dV = R^T dY, summed over all query tiles a. A
persistent block keeps K, V, dK and dV and runs through the query tiles, two blocks of 64 columns j at a time: each
computing warpgroup makes R and dZ of one, stores them transposed, and adds both to its 64 elements of D of dK and dV,
held as [D, l], where b2 need only be a multiple of 8. Small b2: `right_backward_independent`.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels.sm90 import shared
from monarchrt.pallas_kernels.sm90.config import COMPUTE_REGISTERS, LOAD_REGISTERS, ROWS, SLAB, RightBackwardConfig
from monarchrt.pallas_kernels.sm90.right_backward_independent import independent_role
from monarchrt.pallas_kernels.sm90.right_backward_items import NOWHERE, Items, put, softmax, through_softmax
from monarchrt.pallas_kernels.sm90.roles import Given, PersistentBlock, Role, specialised
from monarchrt.pallas_kernels.sm90.types import Flag, Index, Number, Place, Slabs, Tile


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
    if config.independent:
        return independent_role(q, k, scale=scale, heads=heads, tiles=tiles, masked=masked, config=config)
    groups, stages, width = config.warpgroups, config.stages, config.width(q.shape[3])
    items = Items(q=q, pairs=k.shape[1], heads=heads, tiles=tiles, masked=masked, width=width)
    slabs = q.shape[5]
    shapes = (
        (stages, 3, slabs, ROWS, SLAB),  # q, d_alpha, dY
        (2, slabs, width, SLAB),  # K, V
        (groups, 2, width, ROWS),  # s dZ and R, keys before queries; dk and dv when they leave
    )
    return Role(
        specialised(lambda given: _Block(items, config, scale, given), groups),
        name="monarch_right_backward",
        outputs=items.outputs(),
        scratch=dict(
            tiles=shared.tile_scratch(shapes, q.dtype, SLAB, items.packs),
            c=plgpu.SMEM((stages, ROWS), jnp.float32),
            key_full=plgpu.Barrier(num_arrivals=2),
            key_free=plgpu.Barrier(num_arrivals=groups),
            full=plgpu.Barrier(num_arrivals=4, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            made=plgpu.Barrier(num_arrivals=groups),
            used=plgpu.Barrier(num_arrivals=groups),
        ),
        groups=groups,
        blocks=min(config.blocks, items.units),
    )


class _Block(PersistentBlock):
    """A persistent block: the arrays, its shared memory, and its turns, one key row of a head each."""

    def __init__(self, items: Items, config: RightBackwardConfig, scale: float, given: Given) -> None:
        super().__init__(given)
        scratch = given.scratch
        self.items, self.scale = items, scale
        self.groups, self.stages = config.warpgroups, config.stages
        self.steps = -(-items.split.items // self.groups)
        self.slabs = items.q.shape[5]
        self.results = 2 * self.slabs // self.groups  # slabs of dk and dv per warpgroup: with D = 64 one has dk, one dv
        self.q, self.k, self.v, self.d_alpha, self.d_y, self.d_c, self.limits, start = given.inputs
        self.dk, self.dv, self.dz = given.outputs
        self.c_in, self.key_full, self.key_free = scratch.c, scratch.key_full, scratch.key_free
        self.full, self.free, self.made, self.used = scratch.full, scratch.free, scratch.made, scratch.used
        views = shared.tile_views(scratch.tiles)
        self.rows_mma, self.key_mma, self.p_mma = views[0]
        self.rows_in, self.key_in, self.p_out = views[1]
        self.rows_packs = views[-1][0]
        self.head0, self.tile0, self.bound, self.wanted, self.wanted_end = (start[n] for n in range(5))
        self.turns = self.share(items.units)

    def place(self, t: Index) -> Place:
        """Batch entry, head of the chunk and key row of a turn."""
        return self.items.place(self.number(t))

    def seen(self, pair: Number, item: Number) -> Flag:
        """Whether the item exists and its query tile sees the pair."""
        exists = item < self.items.split.items
        if not self.items.masked:
            return exists
        tile = jnp.minimum(lax.div(item, self.items.split.full), self.items.tiles - 1)
        return exists & (pair < self.limits[self.tile0 + tile])

    def compute(self) -> None:
        """What a computing warpgroup does."""
        groups = self.groups
        plgpu.set_max_registers(COMPUTE_REGISTERS[groups], action="increase")
        plgpu.barrier_arrive(self.key_free)
        plgpu.barrier_arrive(self.used)
        for s in range(self.stages):
            plgpu.barrier_arrive(self.free.at[s])

        def turn(t, done):
            where = entry, head, pair = self.place(t)
            lane = entry * self.items.heads + head

            def live(done):
                plgpu.barrier_wait(self.key_full)
                acc = lax.fori_loop(0, self.steps, lambda s, acc: self.step(s, acc, done, lane, pair), self.zeros())
                plgpu.barrier_arrive(self.key_free)
                self.store(acc, where)

            if self.items.masked:
                pl.when(pair < self.bound)(lambda: live(done))
                pl.when(pair >= self.bound)(lambda: self.store(self.zeros(), where))
            else:
                live(done)
            return done + self.steps * groups

        lax.fori_loop(0, self.turns, turn, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_wait(self.used)

    def zeros(self) -> Slabs:
        """This warpgroup's slabs of dk and dv, [64 d, W] each."""
        shape = (SLAB, self.items.width)
        return [plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA) for _ in range(self.results)]

    def step(self, s: Number, acc: Slabs, done: Number, lane: Index, pair: Number) -> Slabs:
        """An item for each warpgroup: makes its own R and s dZ, and adds the products with all of them to `acc`."""
        groups, group, stages = self.groups, self.group, self.stages
        mine = s * groups + group
        slots = [lax.rem(done + s * groups + g, stages) for g in range(groups)]
        exist = [self.seen(pair, s * groups + g) for g in range(groups)]
        my_slot = lax.rem(done + mine, stages)

        @pl.when(self.seen(pair, mine))
        def _():
            plgpu.barrier_wait(self.full.at[my_slot])
            r, d_z = self.make(mine, my_slot, shared.unhoisted(0, done + s))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_wait(self.used)
            for kind, value in enumerate((d_z, r)):
                turned = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
                self.p_mma.at[shared.unhoisted(group, done + s), kind].transpose((1, 0))[...] = turned
            plgpu.commit_smem()
            window = pl.ds(pair * 0, ROWS)  # past the end of the columns, so not static
            plgpu.copy_smem_to_gmem(self.p_out.at[group, 0], self.dz.at[lane, mine, pair, :, window])

        @pl.when(jnp.logical_not(self.seen(pair, mine)))
        def _():
            plgpu.barrier_wait(self.used)

        plgpu.barrier_arrive(self.made)
        plgpu.barrier_wait(self.made)
        for g in range(groups):

            @pl.when(exist[g] & (group != g))
            def _(g=g):
                plgpu.barrier_wait(self.full.at[slots[g]])

            acc = lax.fori_loop(
                0,
                (exist[g] & (pair >= self.wanted) & (pair < self.wanted_end)).astype(jnp.int32),
                lambda _, acc, g=g: self.add(acc, slots[g], shared.unhoisted(g, done + s)),
                acc,
            )
        plgpu.barrier_arrive(self.used)
        for g in range(groups):
            pl.when(exist[g])(lambda g=g: plgpu.barrier_arrive(self.free.at[slots[g]]))
        return acc

    def make(self, item: Index, slot: Index, first: Index) -> tuple[Tile, Tile]:
        """R and s dZ of an item, [64 j, W], in the inputs' dtype; `first` is 0, the place of K."""
        width, cols = self.items.width, self.items.q.shape[3]
        rows, keys = self.rows_mma, self.key_mma

        def scores(z_acc, d_r_acc):
            for n in range(self.slabs):
                plgpu.wgmma(z_acc, rows.at[slot, 0, n], keys.at[first, n].transpose((1, 0)))
            for kind in range(2):
                for n in range(self.slabs):
                    plgpu.wgmma(d_r_acc, rows.at[slot, 1 + kind, n], keys.at[first + kind, n].transpose((1, 0)))
            return z_acc[...], d_r_acc[...]

        z, d_r = pl.run_scoped(scores, *[plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32)] * 2)
        d_log = self.items.entropy_gradient(self.c_in.at[slot], item)
        if width != cols:
            column = plgpu.broadcasted_iota(jnp.int32, z.shape, 1, layout=plgpu.Layout.WGMMA)
            z = jnp.where(column < cols, z, NOWHERE)
        return through_softmax(*softmax(z, self.scale), d_r, d_log, self.scale, self.items.q.dtype)

    def add(self, acc: Slabs, slot: Index, g: Index) -> Slabs:
        """Adds the share of warpgroup g's item to this warpgroup's slabs of dk and dv, [64 d, W] each."""

        def product(acc, source, n, kind):
            left, right = self.rows_mma.at[slot, source, n], self.p_mma.at[g, kind]
            plgpu.wgmma(acc, left.transpose((1, 0)), right.transpose((1, 0)))

        def both(accs):
            product(accs[0], 0, self.group, 0)
            product(accs[0], 1, self.group, 1)
            product(accs[1], 2, self.group, 1)

        def one(source, acc):
            def run(accs):
                product(accs[0], source, 0, jnp.minimum(source, 1))

            return shared.accumulate(run, acc)

        if self.results == 2:
            return shared.accumulate(both, acc)
        return lax.fori_loop(2 * self.group, 2 + self.group, one, acc)

    def store(self, acc: Slabs, where: Place) -> None:
        """Slabs of dk and dv leave from where R and s dZ lay."""
        entry, head, pair = where
        group = self.group
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_wait(self.used)
        for n, value in enumerate(acc):
            put(value, self.p_mma.at[group, n])
        plgpu.commit_smem()
        window = pl.ds(pair * 0, self.items.width)  # past the end of b2 columns, so the start must not be static
        if self.results == 2:
            for n, target in enumerate((self.dk, self.dv)):
                plgpu.copy_smem_to_gmem(self.p_out.at[group, n], target.at[entry, pair, window, head, group])
        else:
            for g, target in enumerate((self.dk, self.dv)):

                @pl.when(group == g)
                def _(g=g, target=target):
                    plgpu.copy_smem_to_gmem(self.p_out.at[g, 0], target.at[entry, pair, window, head, 0])

        plgpu.barrier_arrive(self.used)

    def load(self) -> None:
        """What the loading warpgroup does: K and V of a turn, then q, d_alpha, dY and d_c of each item."""
        groups, stages = self.groups, self.stages
        plgpu.set_max_registers(LOAD_REGISTERS[groups], action="decrease")

        def turn(t, done):
            entry, head, pair = self.place(t)
            lane = entry * self.items.heads + head

            def live():
                plgpu.barrier_wait(self.key_free)
                window = pl.ds(pair * 0, self.items.width)
                for kind, source in enumerate((self.k, self.v)):
                    box = source.at[entry, pair, window, self.head0 + head]
                    plgpu.copy_gmem_to_smem(box, self.key_in.at[kind].transpose((1, 0, 2)), self.key_full)

                def item(i, _):
                    slot, row = lax.rem(done + i, stages), lax.rem(pair, self.items.q.shape[2])

                    @pl.when(self.seen(pair, i))
                    def _():
                        plgpu.barrier_wait(self.free.at[slot])
                        self.load_item(i, slot, row, lane, (entry, head, pair))
                        d_c = self.d_c.at[lane, i, pair]
                        plgpu.copy_gmem_to_smem(d_c, self.c_in.at[slot], self.full.at[slot])

                    return ()

                lax.fori_loop(0, self.items.split.items, item, ())

            if self.items.masked:
                pl.when(pair < self.bound)(live)
            else:
                live()
            return done + self.steps * groups

        lax.fori_loop(0, self.turns, turn, jnp.int32(0))
        plgpu.barrier_wait(self.key_free)
        for s in range(stages):
            plgpu.barrier_wait(self.free.at[s])

    def load_item(self, item: Index, slot: Index, row: Index, lane: Index, where: Place) -> None:
        """Starts the copies of an item's q, d_alpha and dY."""
        entry, head, pair = where
        split = self.items.split

        def whole(tile, column):
            window = pl.ds(column, ROWS)
            boxes = (
                self.q.at[entry, self.tile0 + tile, row, window, self.head0 + head],
                self.d_alpha.at[lane, tile, pair, window],
                self.d_y.at[lane, tile, pair, window],
            )
            for n, box in enumerate(boxes):
                target = self.rows_in.at[slot, n].transpose((1, 0, 2))
                plgpu.copy_gmem_to_smem(box, target, self.full.at[slot])

        def packs(tile):
            window = pl.ds(split.full * ROWS + tile * 0, split.tail_rows)
            boxes = (
                self.q.at[entry, pl.ds(self.tile0 + tile, split.packed), row, window, self.head0 + head],
                self.d_alpha.at[lane, pl.ds(tile, split.packed), pair, window],
                self.d_y.at[lane, pl.ds(tile, split.packed), pair, window],
            )
            for n, box in enumerate(boxes):
                target = self.rows_packs.at[slot, n].transpose((1, 2, 0, 3))
                plgpu.copy_gmem_to_smem(box, target, self.full.at[slot])

        shared.part(split, item, whole, packs)
