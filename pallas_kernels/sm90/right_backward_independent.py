"""Back through R on Hopper, as `right_backward`, where one warpgroup's registers hold all of dK and dV (small b2).

The two computing warpgroups share nothing but the loader, so that one's softmax and the other's products overlap.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from monarchrt.pallas_kernels.sm90 import shared
from monarchrt.pallas_kernels.sm90.config import COMPUTE_REGISTERS, LOAD_REGISTERS, ROWS, SLAB, RightBackwardConfig
from monarchrt.pallas_kernels.sm90.right_backward_items import NOWHERE, Items, put, softmax, through_softmax
from monarchrt.pallas_kernels.sm90.roles import Given, PersistentBlock, Role, specialised
from monarchrt.pallas_kernels.sm90.types import Flag, Index, Number, Place, Slabs, Tile


def independent_role(
    q: jax.ShapeDtypeStruct,
    k: jax.ShapeDtypeStruct,
    *,
    scale: float,
    heads: int,
    tiles: int,
    masked: bool,
    config: RightBackwardConfig,
    values: bool = True,
    further: bool = False,
) -> Role:
    """The role of `right_backward_role`, each warpgroup with a key row, its K, V, dK and dV, of its own.

    q, d_alpha and dY of an item, for either warpgroup, take the next three cells of a ring of `config.ring`; once an
    item, just before the first cell that may still be in use, the loader waits for the item that used it last. Without
    `values`, as in a refinement step before the last, there was no Y: an item has two cells, v and dY are not read and
    dv is not written. With `further` the first input is an array like d_alpha, the step's own queries.
    """
    groups, ring, width = config.warpgroups, config.ring, config.width(q.shape[3])
    ahead = ring // (2 + values)
    items = Items(q=q, pairs=k.shape[1], heads=heads, tiles=tiles, masked=masked, width=width)
    slabs = q.shape[5]

    def block(given):
        return _Block(items, config, scale, given, values=values, further=further)

    shapes = (
        (ring, slabs, ROWS, SLAB),  # q, d_alpha, dY
        (groups, 2, slabs, width, SLAB),  # K, V
        (groups, 2, width, ROWS),  # s dZ and R, keys before queries; dk and dv when they leave
    )
    return Role(
        specialised(block, groups),
        name="monarch_right_backward_independent",
        outputs=items.outputs(),
        scratch=dict(
            tiles=shared.tile_scratch(shapes, q.dtype, SLAB, items.packs),
            c=plgpu.SMEM((ahead, ROWS), jnp.float32),
            nowhere=plgpu.SMEM((groups, width), jnp.float32),
            key_full=plgpu.Barrier(num_arrivals=1 + values, num_barriers=groups),
            key_free=plgpu.Barrier(num_arrivals=1, num_barriers=groups),
            first_full=plgpu.Barrier(num_arrivals=2, num_barriers=groups * (ahead + 1)),
            last_full=plgpu.Barrier(num_arrivals=1 + values, num_barriers=groups * (ahead + 1)),
            free=plgpu.Barrier(num_arrivals=1, num_barriers=ahead),
        ),
        groups=groups,
        blocks=min(config.blocks, -(-items.units // groups)),
    )


class _Block(PersistentBlock):
    """A persistent block: the arrays, its shared memory, and its turns, a key row of a head for each warpgroup."""

    def __init__(
        self, items: Items, config: RightBackwardConfig, scale: float, given: Given, *, values: bool, further: bool
    ) -> None:
        super().__init__(given)
        scratch = given.scratch
        self.items, self.scale = items, scale
        self.groups, self.ring = config.warpgroups, config.ring
        self.values, self.further = values, further
        self.kinds = 2 + self.values  # cells of an item
        # before cell `late` of item n, item n - ahead must be done with
        self.ahead, self.late = divmod(self.ring, self.kinds)
        self.slabs = items.q.shape[5]
        self.q, self.k, self.v, self.d_alpha, self.d_y, self.d_c, self.limits, self.start = given.inputs
        self.dk, self.dv, self.dz = given.outputs
        self.c_in, self.nowhere, self.free = scratch.c, scratch.nowhere, scratch.free
        self.key_full, self.key_free = scratch.key_full, scratch.key_free
        self.first_full, self.last_full = scratch.first_full, scratch.last_full
        views = shared.tile_views(scratch.tiles)
        self.rows_mma, self.key_mma, self.p_mma = views[0]
        self.rows_in, self.key_in, self.p_out = views[1]
        self.rows_packs = views[-1][0]
        self.tile0, self.bound = self.start[1], self.start[2]

    def turns(self) -> Index:
        """How many this block has."""
        return self.share(-(-self.items.units // self.groups))

    def place(self, t: Index, g: Index) -> Place:
        """Batch entry, head of the chunk and key row of a warpgroup's turn."""
        return self.items.place(self.number(t) * self.groups + g)

    def exists(self, t: Number, g: Index) -> Flag:
        """Whether a warpgroup's turn has a key row."""
        return self.number(t) * self.groups + g < self.items.units

    def live(self, t: Number, g: Index) -> Flag:
        """Whether the key row exists and a query tile sees it."""
        return self.exists(t, g) & (self.place(t, g)[2] < self.bound) if self.items.masked else self.exists(t, g)

    def seen(self, t: Number, g: Index, item: Index) -> Flag:
        """Whether the key row exists and the item's query tile sees it."""
        if not self.items.masked:
            return self.exists(t, g)
        full = self.items.split.full
        return self.exists(t, g) & (self.place(t, g)[2] < self.limits[self.tile0 + lax.div(item, full)])

    def seen_counts(self, t: Number, item: Index) -> list[Index]:
        """For each warpgroup 1 if its key row is seen, else 0."""
        return [self.seen(t, g, item).astype(jnp.int32) for g in range(self.groups)]

    def cells(self, n: Index) -> list[Index]:
        """Places of the q, d_alpha and dY of item number n."""
        ring = self.ring
        first = lax.rem(self.kinds * n, ring)
        return [jnp.where(first + kind < ring, first + kind, first + kind - ring) for kind in range(self.kinds)]

    def zeros(self, rows: int) -> Float32[Array, "{rows} w"]:
        """Of `rows` x W."""
        return plgpu.layout_cast(jnp.zeros((rows, self.items.width), jnp.float32), plgpu.Layout.WGMMA)

    def compute(self) -> None:
        """What a computing warpgroup does."""
        group, masked = self.group, self.items.masked
        plgpu.set_max_registers(COMPUTE_REGISTERS[self.groups], action="increase")
        plgpu.barrier_arrive(self.key_free.at[group])
        column = plgpu.broadcasted_iota(jnp.int32, (self.items.width,), 0, layout=plgpu.Layout.WGMMA.reduce(0))
        self.nowhere[group] = jnp.where(column < self.items.q.shape[3], 0.0, NOWHERE)
        plgpu.commit_smem()

        @pl.when(group == 0)
        def _():
            for n in range(self.ahead):
                plgpu.barrier_arrive(self.free.at[n])

        lax.fori_loop(0, self.turns(), self.turn, [jnp.int32(0)] * 2 if masked else [])
        plgpu.wait_smem_to_gmem(0)

    def turn(self, t: Number, carry: list[Index]) -> list[Index]:
        """A key row of this warpgroup's, past all items. Carries, if masked, the items so far and this warpgroup's."""
        group, groups, units, count = self.group, self.groups, self.items.units, self.items.split.items
        where = entry, head, pair = self.place(t, group)
        lane = entry * self.items.heads + head
        is_wanted = ((pair >= self.start[3]) & (pair < self.start[4])).astype(jnp.int32)
        pl.when(self.live(t, group))(lambda: plgpu.barrier_wait(self.key_full.at[group]))

        def item(i, n, mine, acc):
            return self.item(i, n, mine, acc, lane, pair, is_wanted)

        def step(i, carry):
            n, mine, acc = carry
            counts = self.seen_counts(t, i)
            now, before = jnp.where(group == 0, counts[0], counts[1]), jnp.where(group == 0, 0, counts[0])
            acc = lax.fori_loop(0, now, lambda _, acc: item(i, n + before, mine, acc), acc)
            return n + sum(counts), mine + now, acc

        def each(i, acc):
            return item(i, t * (groups * count) + i * together + group, t * count + i, acc)

        acc = [self.zeros(SLAB) for _ in range((1 + self.values) * self.slabs)]
        if self.items.masked:
            *carry, acc = lax.fori_loop(0, count, step, (*carry, acc))
        else:  # all of a turn's key rows exist, unless it is the last
            exist = (self.exists(t, g).astype(jnp.int32) for g in range(groups))
            together = groups if units % groups == 0 else sum(exist)
            acc = lax.fori_loop(0, count * self.exists(t, group).astype(jnp.int32), each, acc)
        if self.items.masked:
            pl.when(self.live(t, group))(lambda: plgpu.barrier_arrive(self.key_free.at[group]))
        pl.when(self.exists(t, group))(lambda: self.store(acc, t, where))
        return carry

    def item(self, i: Index, n: Index, mine: Index, acc: Slabs, lane: Index, pair: Index, is_wanted: Index) -> Slabs:
        """Item i, number n of all and `mine` of this warpgroup's."""
        group = self.group
        own = shared.unhoisted(group, n)
        r, d_z = self.make(i, n, mine, own)
        if not self.items.masked:
            last = self.items.split.items - 1
            pl.when(i == last)(lambda: plgpu.barrier_arrive(self.key_free.at[group]))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        put(d_z, self.p_mma.at[own, 0])
        put(r, self.p_mma.at[own, 1])
        plgpu.commit_smem()
        columns = pl.ds(pair * 0, ROWS)  # past the end of the columns, so not static
        plgpu.copy_smem_to_gmem(self.p_out.at[group, 0], self.dz.at[lane, i, pair, :, columns])
        acc = lax.fori_loop(0, is_wanted, lambda _, acc: self.add(acc, n, own), acc)
        plgpu.barrier_arrive(self.free.at[lax.rem(n, self.ahead)])
        return acc

    def make(self, item: Index, n: Index, mine: Index, key: Index) -> tuple[Tile, Tile]:
        """R and s dZ of item number n, [64 j, W], in the inputs' dtype; `key` is the place of K and V."""
        width, ahead = self.items.width, self.ahead
        cell, turn = self.cells(n), self.group * (ahead + 1) + lax.rem(mine, ahead + 1)
        plgpu.barrier_wait(self.first_full.at[turn])

        def multiply(acc, kind, keys):
            for m in range(self.slabs):
                plgpu.wgmma(acc, self.rows_mma.at[cell[kind], m], self.key_mma.at[key, keys, m].transpose((1, 0)))

        def early(accs):  # S and one part of dR
            multiply(accs[0], 0, 0)
            multiply(accs[1], 1, 0)

        zeros = self.zeros(ROWS)
        z = zeros
        if width != self.items.q.shape[3]:  # which columns are keys is read anew: registers do not suffice to keep it
            z = plgpu.load(self.nowhere.at[self.group], layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
            z = lax.broadcast_in_dim(z, (ROWS, width), [1])
        z, d_r = shared.accumulate(early, [z, zeros])
        probabilities = softmax(z, self.scale)
        plgpu.barrier_wait(self.last_full.at[turn])  # dY, loaded last, was on its way
        if self.values:
            d_r = shared.accumulate(lambda acc: multiply(acc, 2, 1), d_r)
        d_log = self.items.entropy_gradient(self.c_in.at[lax.rem(n, ahead)], item)
        return through_softmax(*probabilities, d_r, d_log, self.scale, self.items.q.dtype)

    def add(self, acc: Slabs, n: Index, g: Index) -> Slabs:
        """Adds an item's share to all slabs of dk and dv, [64 d, W] each."""
        cell = self.cells(n)

        def products(accs):
            for kind, p, first in ((0, 0, 0), (1, 1, 0), (2, 1, self.slabs))[: self.kinds]:
                for m in range(self.slabs):
                    left, right = self.rows_mma.at[cell[kind], m], self.p_mma.at[g, p]
                    plgpu.wgmma(accs[first + m], left.transpose((1, 0)), right.transpose((1, 0)))

        return shared.accumulate(products, acc)

    def store(self, acc: Slabs, t: Index, where: Place) -> None:
        """Slabs of dk and dv leave, one after the other, from where R and s dZ lay."""
        entry, head, pair = where
        own = shared.unhoisted(self.group, t)
        window = pl.ds(pair * 0, self.items.width)  # past the end of b2 columns, so the start must not be static
        for m, value in enumerate(acc):
            plgpu.wait_smem_to_gmem(min(m, 1), wait_read_only=True)
            put(value, self.p_mma.at[own, m % 2])
            plgpu.commit_smem()
            target = (self.dk, self.dv)[m // self.slabs].at[entry, pair, window, head, m % self.slabs]
            plgpu.copy_smem_to_gmem(self.p_out.at[self.group, m % 2], target)

    def load(self) -> None:
        """What the loading warpgroup does: K and V of a turn, then q, d_alpha, dY and d_c of each item."""
        groups = self.groups
        plgpu.set_max_registers(LOAD_REGISTERS[groups], action="decrease")
        head0 = self.start[0]

        def turn(t, carry):
            def item(i, carry):
                n, mine = carry[0], list(carry[1:])
                for g, count in enumerate(self.seen_counts(t, i)):
                    pl.when((i == 0) & self.live(t, g))(lambda g=g: self.load_keys(t, g, head0))
                    pl.when(count > 0)(lambda g=g, n=n, mine=mine[g]: self.load_item(t, g, i, n, mine, head0))
                    n, mine[g] = n + count, mine[g] + count
                return n, *mine

            return lax.fori_loop(0, self.items.split.items, item, carry)

        lax.fori_loop(0, self.turns(), turn, (jnp.int32(0),) * (1 + groups))
        for g in range(groups):
            plgpu.barrier_wait(self.key_free.at[g])
        for n in range(self.ahead):
            plgpu.barrier_wait(self.free.at[n])

    def load_keys(self, t: Index, g: int, head0: Index) -> None:
        """Starts the copies of a key row's K and V."""
        entry, head, pair = self.place(t, g)
        plgpu.barrier_wait(self.key_free.at[g])
        window = pl.ds(pair * 0, self.items.width)
        for kind, source in enumerate((self.k, self.v)[: 1 + self.values]):
            box = source.at[entry, pair, window, head0 + head]
            plgpu.copy_gmem_to_smem(box, self.key_in.at[g, kind].transpose((1, 0, 2)), self.key_full.at[g])

    def load_item(self, t: Index, g: int, i: Index, n: Index, mine: Index, head0: Index) -> None:
        """Starts the copies of item i, number n of all and `mine` of warpgroup g's."""
        entry, head, pair = self.place(t, g)
        lane, row = entry * self.items.heads + head, lax.rem(pair, self.items.q.shape[2])
        turn = g * (self.ahead + 1) + lax.rem(mine, self.ahead + 1)
        split, tile0 = self.items.split, self.tile0

        def load(kind, box, views, axes):
            if kind == self.kinds:
                return
            if kind == self.late:
                plgpu.barrier_wait(self.free.at[lax.rem(n, self.ahead)])
            target = views.at[lax.rem(self.kinds * n + kind, self.ring)].transpose(axes)
            plgpu.copy_gmem_to_smem(box, target, (self.last_full if kind == 2 else self.first_full).at[turn])

        def whole(tile, column):
            window = pl.ds(column, ROWS)
            own = (lane, tile, pair, window) if self.further else (entry, tile0 + tile, row, window, head0 + head)
            load(0, self.q.at[own], self.rows_in, (1, 0, 2))
            load(1, self.d_alpha.at[lane, tile, pair, window], self.rows_in, (1, 0, 2))
            load(2, self.d_y.at[lane, tile, pair, window], self.rows_in, (1, 0, 2))

        def packs(tile):
            window, some = pl.ds(split.full * ROWS + tile * 0, split.tail_rows), pl.ds(tile, split.packed)
            own = (lane, some, pair, window)
            if not self.further:
                own = (entry, pl.ds(tile0 + tile, split.packed), row, window, head0 + head)
            load(0, self.q.at[own], self.rows_packs, (1, 2, 0, 3))
            load(1, self.d_alpha.at[lane, some, pair, window], self.rows_packs, (1, 2, 0, 3))
            load(2, self.d_y.at[lane, some, pair, window], self.rows_packs, (1, 2, 0, 3))

        shared.part(split, i, whole, packs)
        d_c = self.c_in.at[lax.rem(n, self.ahead)]
        plgpu.copy_gmem_to_smem(self.d_c.at[lane, i, pair], d_c, self.last_full.at[turn])
