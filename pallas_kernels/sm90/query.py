"""dq on Hopper: what comes through L plus s dZ K, summed over the key tiles, with wgmma and TMA.

For one head and row k this is, for every query tile a, a product of dZ[a], [j, (c, l)], with the key rows K[c, k].
A persistent block works on as many blocks of 64 columns j at a time as it has computing warpgroups, which share the
key rows, and runs through c.
"""

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels.sm90 import shared
from monarchrt.pallas_kernels.sm90.config import ROWS, SLAB, QueryConfig
from monarchrt.pallas_kernels.sm90.roles import ChunkItems, Given, PersistentBlock, Role, specialised
from monarchrt.pallas_kernels.sm90.types import Index, Number, Place, Slabs


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
    batch, _, rows, cols, _, slabs, _ = q.shape
    items = _Items(
        q=q,
        key_tiles=k.shape[1] // rows,
        heads=heads,
        tiles=tiles,
        masked=masked,
        left_width=left_width,
        config=config,
    )
    groups, stages, depth = config.warpgroups, config.stages, config.depth(cols)
    shapes = (
        (stages, slabs, depth, SLAB),  # key rows
        (stages, groups, depth, ROWS),  # s dZ, keys before queries
        (groups, slabs, ROWS, SLAB),  # dq through L, then all of it
    )
    return Role(
        specialised(lambda given: _Block(items, given), groups),
        name="monarch_query_backward",
        outputs=(jax.ShapeDtypeStruct((batch, tiles, rows, cols, heads, slabs, SLAB), q.dtype),),
        scratch=dict(
            tiles=shared.tile_scratch(shapes, q.dtype, SLAB, items.packs),
            keys_full=plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            dz_full=plgpu.Barrier(num_arrivals=1, num_barriers=stages * groups),
            free=plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
            left_full=plgpu.Barrier(num_arrivals=1, num_barriers=groups),
            left_free=plgpu.Barrier(num_arrivals=1, num_barriers=groups),
        ),
        groups=groups,
        blocks=min(config.blocks, items.units),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Items(ChunkItems):
    """The work of the kernel: 64 columns of a query tile, or the last ones of several, are an item of a row k.

    As many items as there are computing warpgroups, of one row and head, are a unit: they share the key rows.
    """

    key_tiles: int
    left_width: int
    config: QueryConfig

    @property
    def groups(self) -> int:
        """Units of a row and head."""
        return -(-self.split.items // self.config.warpgroups)

    @property
    def units(self) -> int:
        """All units."""
        return self.q.shape[0] * self.heads * self.q.shape[2] * self.groups

    @property
    def some_miss(self) -> bool:
        """Whether a warpgroup may have no item or see fewer keys than another."""
        return self.masked or self.split.items % self.config.warpgroups > 0

    def place(self, number: Index) -> tuple[Number, Number, Number, Number, Number]:
        """Lane, batch entry, head of the chunk, row k and first item of a unit."""
        rows, groups = self.q.shape[2], self.groups
        unit = self.units - 1 - number  # what was made last comes first: it may still be in the L2 cache
        lane = lax.div(unit, rows * groups)
        entry, head = lax.div(lane, self.heads), lax.rem(lane, self.heads)
        row, first = lax.rem(lax.div(unit, groups), rows), lax.rem(unit, groups) * self.config.warpgroups
        return lane, entry, head, row, first


class _Block(PersistentBlock):
    """A persistent block: the arrays, its shared memory, and its turns, one unit each, past all key tiles it sees."""

    def __init__(self, items: _Items, given: Given) -> None:
        super().__init__(given)
        config, scratch = items.config, given.scratch
        self.items, self.config = items, config
        self.groups, self.stages, self.slabs = config.warpgroups, config.stages, items.q.shape[5]
        self.width, self.depth = config.width(items.q.shape[3]), config.depth(items.q.shape[3])
        self.k, self.dz, self.dq_left, self.limits, start = given.inputs
        (self.dq,) = given.outputs
        self.keys_full, self.dz_full, self.free = scratch.keys_full, scratch.dz_full, scratch.free
        self.left_full, self.left_free = scratch.left_full, scratch.left_free
        views = shared.tile_views(scratch.tiles)
        self.key_mma, self.dz_mma, self.out_reg = views[0]  # dq through L comes where dq leaves
        self.key_in, self.dz_in, self.out_in = views[1]
        self.out_packs = views[-1][2]
        self.head0, self.tile0 = start[0], start[1]
        self.turns = self.share(items.units)

    def place(self, t: Index) -> tuple[Number, Number, Number, Number, Number]:
        """As `_Items.place`, of a turn."""
        return self.items.place(self.number(t))

    def key_steps(self, item: Index) -> Index:
        """Key tiles that an item's query tile sees; none if there is no such item."""
        items, split = self.items, self.items.split
        if not items.masked:
            return jnp.where(item < split.items, items.key_tiles, 0)
        tile = jnp.minimum(lax.div(item, split.full), items.tiles - 1)
        return jnp.where(item < split.items, lax.div(self.limits[self.tile0 + tile], items.q.shape[2]), 0)

    def steps_of(self, first: Index) -> Index:
        """Key tiles that any of a unit's items sees."""
        if not self.items.masked:
            return jnp.int32(self.items.key_tiles)
        steps = self.key_steps(first)
        for g in range(1, self.groups):
            steps = jnp.maximum(steps, self.key_steps(first + g))
        return steps

    def compute(self) -> None:
        """What a computing warpgroup does."""
        plgpu.set_max_registers(self.config.registers[0], action="increase")
        if self.depth != self.width:  # rows that no copy writes
            zero = plgpu.layout_cast(jnp.zeros((self.depth, ROWS), self.items.q.dtype), plgpu.Layout.WGMMA)
            for s in range(self.stages):
                self.dz_mma[s, self.group] = zero
            plgpu.commit_smem()
        for s in range(self.stages):
            plgpu.barrier_arrive(self.free.at[s])
        lax.fori_loop(0, self.turns, self.turn, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def turn(self, t: Index, done: Index) -> Index:
        """This warpgroup's item of a unit. Carries the steps so far."""
        _lane, entry, head, row, first = self.place(t)
        item = first + self.group
        steps, mine = self.steps_of(first), self.key_steps(item)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        pl.when(item < self.items.split.items)(lambda: plgpu.barrier_arrive(self.left_free.at[self.group]))
        layout = plgpu.Layout.WGMMA
        acc = [plgpu.layout_cast(jnp.zeros((ROWS, SLAB), jnp.float32), layout) for _ in range(self.slabs)]
        acc = lax.fori_loop(0, steps, lambda c, acc: self.step(c, acc, done, mine), acc)
        pl.when(item < self.items.split.items)(lambda: self.store(acc, item, (entry, head, row)))
        return done + steps

    def step(self, c: Number, acc: Slabs, done: Index, mine: Index) -> Slabs:
        """Adds the products with a key tile's row to slabs of dq, [64 j, 64 d], if it is one of `mine`."""
        group, slot = self.group, lax.rem(done + c, self.stages)
        plgpu.barrier_wait(self.keys_full.at[slot])

        def add(_, acc):
            plgpu.barrier_wait(self.dz_full.at[slot * self.groups + group])

            def products(accs):
                for n in range(self.slabs):
                    plgpu.wgmma(accs[n], self.dz_mma.at[slot, group].transpose((1, 0)), self.key_mma.at[slot, n])

            return shared.accumulate(products, acc)

        acc = lax.fori_loop(0, (c < mine).astype(jnp.int32), add, acc) if self.items.some_miss else add(0, acc)
        plgpu.barrier_arrive(self.free.at[slot])
        return acc

    def store(self, acc: Slabs, item: Index, where: Place) -> None:
        """Adds what came through L to an item's sums, and starts their copies."""
        entry, head, row = where
        group, split, layout = self.group, self.items.split, plgpu.Layout.WGMMA

        def whole(tile, column):
            target = self.dq.at[entry, tile, row, pl.ds(column, ROWS), head]
            plgpu.copy_smem_to_gmem(self.out_in.at[group].transpose((1, 0, 2)), target)

        def packs(tile):
            window = pl.ds(split.full * ROWS + tile * 0, split.tail_rows)
            target = self.dq.at[entry, pl.ds(tile, split.packed), row, window, head]
            plgpu.copy_smem_to_gmem(self.out_packs.at[group].transpose((1, 2, 0, 3)), target)

        plgpu.barrier_wait(self.left_full.at[group])
        sums = [x + plgpu.load(self.out_reg.at[group, n], layout=layout) for n, x in enumerate(acc)]
        plgpu.commit_smem()  # every warp has read
        for n, x in enumerate(sums):
            self.out_reg[group, n] = x.astype(self.items.q.dtype)
        plgpu.commit_smem()
        shared.part(split, item, whole, packs)

    def load(self) -> None:
        """What the loading warpgroup does: key rows and s dZ of each step, and what came through L of each item."""
        plgpu.set_max_registers(self.config.registers[1], action="decrease")
        lax.fori_loop(0, self.turns, self.load_turn, jnp.int32(0))
        for s in range(self.stages):
            plgpu.barrier_wait(self.free.at[s])

    def load_turn(self, t: Index, done: Index) -> Index:
        """A turn's copies. Carries the steps so far."""
        items = self.items
        place = _lane, _entry, _head, row, first = self.place(t)
        steps = self.steps_of(first)
        columns = pl.ds(row * 0, ROWS)  # past their end, so not static

        def load(c, _):
            self.load_keys(c, lax.rem(done + c, self.stages), place, columns)
            return ()

        lax.fori_loop(0, steps, load, ())
        left_row = lax.div(row, items.left_width) * ROWS + lax.rem(row, items.left_width)
        for g in range(self.groups):  # last, as it is needed last: key rows need not wait for it
            there = first + g < items.split.items
            pl.when(there)(lambda g=g: self.load_left(g, place, left_row, columns))
        return done + steps

    def load_keys(self, c: Index, slot: Index, place: tuple[Number, ...], columns: pl.Slice) -> None:
        """Starts the copies of a key tile's row and of each warpgroup's s dZ."""
        lane, entry, head, row, first = place
        depth, width, pair = self.depth, self.width, c * self.items.q.shape[2] + row
        window = pl.ds(c * 0, depth)  # past the end of b2 columns, so the start must not be static
        plgpu.barrier_wait(self.free.at[slot])
        box = self.k.at[entry, pair, window, self.head0 + head]
        plgpu.copy_gmem_to_smem(box, self.key_in.at[slot].transpose((1, 0, 2)), self.keys_full.at[slot])
        for g in range(self.groups):

            def load(g=g):
                target = self.dz_in.at[slot, g] if depth == width else self.dz_in.at[slot, g, pl.ds(0, width)]
                box = self.dz.at[lane, first + g, pair, :, columns]
                plgpu.copy_gmem_to_smem(box, target, self.dz_full.at[slot * self.groups + g])

            pl.when(c < self.key_steps(first + g))(load) if self.items.some_miss else load()

    def load_left(self, g: int, place: tuple[Number, ...], left_row: Index, columns: pl.Slice) -> None:
        """Starts the copy of what came through L of warpgroup g's item."""
        lane, _entry, _head, _row, first = place
        plgpu.barrier_wait(self.left_free.at[g])
        box = self.dq_left.at[lane, first + g, left_row, columns]
        plgpu.copy_gmem_to_smem(box, self.out_in.at[g].transpose((1, 0, 2)), self.left_full.at[g])
