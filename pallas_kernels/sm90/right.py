"""Stage 1 on Hopper: alpha, c_L and Y of every (query tile, key tile, key row), with wgmma and TMA.

For one head and one key row (c, k), K[c,k] and V[c,k] are small matrices [b2, D]. A persistent block holds one pair of
them in shared memory and runs through the query tiles a: scores [j, l] = Q[a,k] K^T, a softmax over l, then the
products with K and V. One warpgroup loads, the others compute, each on 64 columns j of one query tile.

Shared tiles are kept as slabs of [rows, 64] elements: a TMA box of rows may then start at any row of a tile and run
past its end (b2 = 52 or 45): rows outside are read as zeros and never written.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32

from monarchrt.pallas_kernels.sm90 import shared
from monarchrt.pallas_kernels.sm90.config import (
    COMPUTE_REGISTERS,
    LOAD_REGISTERS,
    ROWS,
    RightConfig,
)
from monarchrt.pallas_kernels.sm90.roles import Given, KeyRowItems, PersistentBlock, Role, specialised
from monarchrt.pallas_kernels.sm90.shared import LOG2E
from monarchrt.pallas_kernels.sm90.types import Index


def right_role(
    q: jax.ShapeDtypeStruct,
    k: jax.ShapeDtypeStruct,
    *,
    scale: float,
    heads: int,
    tiles: int,
    key_block: int,
    masked: bool,
    config: RightConfig,
    kind: "type[Block] | None" = None,
    values: bool = True,
    further: bool = False,
) -> Role:
    """Makes the intermediates of a chunk of `tiles` query tiles and `heads` heads.

    Inputs of the role: q; k; v as k; limits, int32 [A], the (c, k) pairs that a query tile sees, read when `masked`;
    start, int32 [3], the chunk's first head and query tile, and the largest limit rounded up to `key_block`.

    Outputs: alpha [X, tiles, C*b1, b2, D/slab, slab] and Y alike, in q's dtype; c_L [X, items, 64, C*b1 or more] in
    float32, in units of log 2, its columns where `column_blocks` places them. X = B * heads.

    Args:
        q: [B, A, b1, b2, H, D/slab, slab], slab = config.slab.
        k: [B, C*b1, b2, H, D/slab, slab].
        scale: Softmax scale.
        heads: Heads of the chunk.
        tiles: Query tiles of the chunk.
        key_block: Pairs beyond a limit, up to the next multiple of this, are written as zeros; the others are not.
        masked: Whether limits may be below C*b1.
        config: Sizes.
        kind: What a block does with what it made; None: stores it in q's dtype.
        values: Whether Y is made, as of the last refinement step; else there is no such output, and v is not read.
        further: Whether the step has queries of its own: then the first input is not q but an array like alpha.

    Returns:
        The role.
    """
    batch, _, _, cols, _, slabs, slab = q.shape
    kind = kind or Block
    pairs = k.shape[1]
    groups, stages, key_stages = config.warpgroups, config.query_stages, config.key_stages
    depth = config.depth(cols)
    items = Items(
        q=q,
        pairs=pairs,
        scale=scale,
        heads=heads,
        tiles=tiles,
        key_block=key_block,
        masked=masked,
        config=config,
        values=values,
        further=further,
    )
    split = items.split
    shapes = (
        (stages, slabs, ROWS, slab),
        (key_stages, slabs, depth, slab),
        (key_stages, slabs, depth, slab),
    )
    struct = jax.ShapeDtypeStruct
    dtype, *slabs_out = kind.stored(q)
    shape = (batch * heads, tiles, pairs, cols, *slabs_out)
    rows_shape = (batch * heads, split.items, ROWS, -(-pairs // key_block) * key_block)
    outs = [(groups, slabs_out[0], ROWS, slabs_out[1])] * 2
    if dtype == q.dtype:
        tiles_scratch = [shared.tile_scratch([*shapes, *outs], dtype, slab, items.packs)]
    else:
        tiles_scratch = [shared.tile_scratch(shapes, q.dtype, slab, items.packs)]
        tiles_scratch += [shared.tile_scratch(outs, dtype, slabs_out[1], items.packs)]
    return Role(
        specialised(lambda given: kind(items, given), groups),
        name="monarch_right",
        outputs=(*[struct(shape, dtype)] * (1 + values), *(struct(rows_shape, x) for x in kind.numbers)),
        scratch=dict(
            tiles=tuple(tiles_scratch),
            key_full=plgpu.Barrier(num_arrivals=1 + values, num_barriers=key_stages),
            key_free=plgpu.Barrier(num_arrivals=groups, num_barriers=key_stages),
            q_full=plgpu.Barrier(num_barriers=stages),
            q_free=plgpu.Barrier(num_barriers=stages),
        ),
        groups=groups,
        blocks=min(config.blocks, items.units),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items(KeyRowItems):
    """The work of the kernel, as `right_role` has it."""

    scale: float
    key_block: int
    config: RightConfig
    values: bool
    further: bool


class Block(PersistentBlock):
    """A persistent block: the arrays, its shared memory, and its turns, a key row of a head each.

    Whole key rows are strided over the blocks, so that blocks share a head's queries in L2; those left over are split
    evenly, or go to the first blocks where masks make items differ anyway.

    Attributes:
        numbers: Types of what is stored of a vector beside alpha and Y: c_L.
    """

    numbers: ClassVar[tuple[DTypeLike, ...]] = (jnp.float32,)

    @staticmethod
    def stored(q: jax.ShapeDtypeStruct) -> tuple[Any, int, int]:
        """Type, slabs and elements of a slab of vectors of alpha and Y, for queries as `right_role` has them."""
        return q.dtype, q.shape[5], q.shape[6]

    def __init__(self, items: Items, given: Given) -> None:
        super().__init__(given)
        scratch, block, blocks = given.scratch, self.block, self.blocks
        self.items, self.config = items, items.config
        self.groups, self.stages = items.config.warpgroups, items.config.query_stages
        self.slabs = items.q.shape[5]
        cols = items.q.shape[3]
        self.depth, self.width = items.config.depth(cols), items.config.width(cols)
        self.q, self.k, self.v, self.limits, start = given.inputs
        count = 1 + items.values  # of alpha and Y
        self.vectors, (self.c, *self.more_numbers) = given.outputs[:count], given.outputs[count:]
        self.key_full, self.key_free = scratch.key_full, scratch.key_free
        self.q_full, self.q_free = scratch.q_full, scratch.q_free
        by_view = zip(*map(shared.tile_views, scratch.tiles), strict=True)
        views = [[ref for refs in view for ref in refs] for view in by_view]
        self.q_mma, self.k_mma, self.v_mma, self.alpha_reg, self.y_reg = views[0]
        self.q_in, self.k_in, self.v_in, *self.vectors_out = views[1]
        self.q_packs, _, _, *self.vectors_packs = views[-1]
        self.head0, self.tile0, self.bound = start[0], start[1], start[2]

        count = items.split.items
        self.turns, over = divmod(items.units, blocks)
        share, more = divmod(over * count, blocks)
        if items.masked:
            self.more_turns = jnp.int32(block < over)
        else:
            self.first = block * share + jnp.minimum(block, more)
            self.last = self.first + share + jnp.int32(block < more)
            self.over_unit = lax.div(self.first, count)
            self.more_turns = lax.div(self.last + count - 1, count) - self.over_unit

    def span(self, t: Index) -> tuple[Index, Index, Index]:
        """Key row of a turn and the items of it that are this block's."""
        block, blocks, turns, count = self.block, self.blocks, self.turns, self.items.split.items
        if self.items.masked:
            return block + t * blocks, jnp.int32(0), jnp.int32(count)
        base = (self.over_unit + t - turns) * count
        rest = t >= turns
        low, high = jnp.maximum(self.first - base, 0), jnp.minimum(self.last - base, count)
        unit = jnp.where(rest, turns * blocks + self.over_unit + t - turns, block + t * blocks)
        return unit, jnp.where(rest, low, 0), jnp.where(rest, high, count)

    def when_seen(self, pair: Index, item: Index, do: Callable[[], None]) -> None:
        """Runs `do` unless the query tile neither sees the pair nor reads it as padding."""
        if self.items.masked:
            key_block = self.items.key_block
            limit = self.limits[self.tile0 + lax.div(item, self.items.split.full)]
            pl.when(pair < lax.div(limit + key_block - 1, key_block) * key_block)(do)
        else:
            do()

    def when_live(self, pair: Index, do: Callable[[], None]) -> None:
        """Runs `do` unless no query tile needs the pair."""
        if self.items.masked:
            pl.when(pair < self.bound)(do)
        else:
            do()

    def compute(self) -> None:
        """What a computing warpgroup does."""
        group, groups, key_stages = self.group, self.groups, self.config.key_stages
        plgpu.set_max_registers(COMPUTE_REGISTERS[groups], action="increase")
        for s in range(key_stages):
            plgpu.barrier_arrive(self.key_free.at[s])
        for s in range(self.stages // groups):
            plgpu.barrier_arrive(self.q_free.at[s * groups + group])

        def turn(t, done):
            unit, low, high = self.span(t)
            entry, head, pair = self.items.place(unit)
            key_slot = lax.rem(t, key_stages)
            mine = low + lax.rem(group + groups - lax.rem(done, groups), groups)

            def live():
                plgpu.barrier_wait(self.key_full.at[key_slot])

                def item(s, _):
                    i = mine + s * groups
                    slot = lax.rem(done + i - low, self.stages)
                    lane = entry * self.items.heads + head
                    key = shared.unhoisted(key_slot, i)
                    self.when_seen(pair, i, lambda: self.item(i, pair, lane, slot, key))
                    return ()

                lax.fori_loop(0, lax.div(high - mine + groups - 1, groups), item, ())
                plgpu.barrier_arrive(self.key_free.at[key_slot])

            self.when_live(pair, live)
            return done + high - low

        lax.fori_loop(0, self.turns + self.more_turns, turn, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def item(self, item: Index, pair: Index, lane: Index, slot: Index, key_slot: Index) -> None:
        """alpha, Y and c_L of an item: R in registers, two products, and out through shared memory."""
        config, split = self.config, self.items.split
        p, entropy = self.probabilities(slot, key_slot)

        def product(*factors):
            def multiply(*accs):
                for n, acc in enumerate(accs):
                    plgpu.wgmma(acc, p, factors[n // self.slabs].at[key_slot, n % self.slabs])
                return tuple(acc[...] for acc in accs)

            count, slab = self.slabs * len(factors), self.items.q.shape[6]
            types = [plgpu.WGMMAAccumulatorRef((ROWS, slab), jnp.float32) for _ in range(count)]
            results = pl.run_scoped(multiply, *types)
            if self.items.masked:  # keys that are not seen may hold anything; what is read as padding must be finite
                seen = pair < self.limits[self.tile0 + lax.div(item, split.full)]
                results = tuple(lax.select(lax.broadcast(seen, x.shape), x, jnp.zeros_like(x)) for x in results)
            return self.rounded(results)

        k, v = self.k_mma, self.v_mma
        factors = (k, v)[: 1 + self.items.values]
        tiles_out = product(*factors) if config.together else [x for factor in factors for x in product(factor)]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        mine = shared.unhoisted(self.group, item)
        numbers = self.put(mine, tiles_out)
        plgpu.commit_smem()
        for target, x in zip((self.c, *self.more_numbers), (entropy, *numbers), strict=True):
            shared.store_parts(target.at[lane, item, :, pair], x)  # after the fence, which would wait for it
        self.send(item, pair, lane)

    def rounded(self, results: Sequence[jax.Array]) -> list[jax.Array]:
        """Slabs [64 j, slab] of alpha, of Y or of both as `put` takes them."""
        return [x.astype(self.items.q.dtype) for x in results]

    def put(self, mine: Index, made: list[jax.Array]) -> tuple[jax.Array, ...]:
        """Stores what `rounded` gave for alpha and Y in shared memory; returns `numbers` after c_L, [64] each."""
        for n in range(self.slabs):
            self.alpha_reg[mine, n] = made[n]
            if self.items.values:
                self.y_reg[mine, n] = made[self.slabs + n]
        return ()

    def probabilities(self, slot: Index, key_slot: Index) -> tuple[Float[Array, "64 _"], Float32[Array, "64"]]:
        """R, [64 j, depth] in the inputs' dtype, and its sum of R log R over l in units of log 2 [64]."""
        cols, width, depth, dtype = self.items.q.shape[3], self.width, self.depth, self.items.q.dtype
        plgpu.barrier_wait(self.q_full.at[slot])

        def scores(acc):
            for n in range(self.slabs):
                b = self.k_mma.at[key_slot, n, pl.ds(0, width)].transpose((1, 0))
                plgpu.wgmma(acc, self.q_mma.at[slot, n], b)
            return acc[...]

        scale = self.items.scale * LOG2E
        s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32)) * scale
        plgpu.barrier_arrive(self.q_free.at[slot])
        if width != cols:
            column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
            s = jnp.where(column < cols, s, -1e30)
        top = s.max(axis=1)
        # the update of R (paper, A.2): softmax over l of s <Q, K>
        p = jnp.exp2(s - lax.broadcast_in_dim(top, s.shape, [0]))
        total = p.sum(axis=1)
        inverse = 1.0 / total
        entropy = (p * s).sum(axis=1) * inverse - top - jnp.log2(total)
        p = (p * lax.broadcast_in_dim(inverse, p.shape, [0])).astype(dtype)
        if width != depth:  # the products' depth; K and V are zeros there
            zeros = plgpu.layout_cast(jnp.zeros((ROWS, depth - width), dtype), plgpu.Layout.WGMMA)
            p = lax.concatenate([p, zeros], 1)
        return p, entropy

    def send(self, item: Index, pair: Index, lane: Index) -> None:
        """Starts the copies of an item's alpha and Y."""
        group, split = self.group, self.items.split

        def whole(tile, column):
            window = pl.ds(column, ROWS)
            for source, target in zip(self.vectors_out, self.vectors, strict=False):
                plgpu.copy_smem_to_gmem(source.at[group].transpose((1, 0, 2)), target.at[lane, tile, pair, window])

        def packs(tile):
            some, window = pl.ds(tile, split.packed), pl.ds(split.full * ROWS + tile * 0, split.tail_rows)
            for source, target in zip(self.vectors_packs, self.vectors, strict=False):
                plgpu.copy_smem_to_gmem(source.at[group].transpose((1, 2, 0, 3)), target.at[lane, some, pair, window])

        shared.part(split, item, whole, packs)

    def load(self) -> None:
        """What the loading warpgroup does: K and V of a turn, then q of each item."""
        groups, stages, key_stages = self.groups, self.stages, self.config.key_stages
        plgpu.set_max_registers(LOAD_REGISTERS[groups], action="decrease")

        def turn(t, done):
            unit, low, high = self.span(t)
            entry, head, pair = self.items.place(unit)
            key_slot, lane = lax.rem(t, key_stages), self.head0 + head

            def live():
                plgpu.barrier_wait(self.key_free.at[key_slot])
                window = pl.ds(key_slot * 0, self.depth)  # past the end of b2 columns, so the start must not be static
                for source, target in ((self.k, self.k_in), (self.v, self.v_in))[: 1 + self.items.values]:
                    box = source.at[entry, pair, window, lane]
                    plgpu.copy_gmem_to_smem(box, target.at[key_slot].transpose((1, 0, 2)), self.key_full.at[key_slot])

                def item(i, _):
                    slot, row = lax.rem(done + i - low, stages), lax.rem(pair, self.items.q.shape[2])
                    if self.items.further:
                        self.when_seen(
                            pair, i, lambda: self.load_further(i, slot, entry * self.items.heads + head, pair)
                        )
                    else:
                        self.when_seen(pair, i, lambda: self.load_query(i, slot, entry, row, lane))
                    return ()

                lax.fori_loop(low, high, item, ())

            self.when_live(pair, live)
            return done + high - low

        lax.fori_loop(0, self.turns + self.more_turns, turn, jnp.int32(0))
        for s in range(key_stages):
            plgpu.barrier_wait(self.key_free.at[s])
        for s in range(stages):
            plgpu.barrier_wait(self.q_free.at[s])

    def load_query(self, item: Index, slot: Index, entry: Index, row: Index, lane: Index) -> None:
        """Starts the copy of an item's query rows."""
        split, arrived = self.items.split, self.q_full.at[slot]

        def whole(tile, column):
            box = self.q.at[entry, self.tile0 + tile, row, pl.ds(column, ROWS), lane]
            plgpu.copy_gmem_to_smem(box, self.q_in.at[slot].transpose((1, 0, 2)), arrived)

        def packs(tile):
            some = pl.ds(self.tile0 + tile, split.packed)
            window = pl.ds(split.full * ROWS + tile * 0, split.tail_rows)
            box = self.q.at[entry, some, row, window, lane]
            plgpu.copy_gmem_to_smem(box, self.q_packs.at[slot].transpose((1, 2, 0, 3)), arrived)

        plgpu.barrier_wait(self.q_free.at[slot])
        shared.part(split, item, whole, packs)

    def load_further(self, item: Index, slot: Index, lane: Index, pair: Index) -> None:
        """The same where every key row has queries of its own; `lane` counts heads of the chunk."""
        split, arrived = self.items.split, self.q_full.at[slot]

        def whole(tile, column):
            box = self.q.at[lane, tile, pair, pl.ds(column, ROWS)]
            plgpu.copy_gmem_to_smem(box, self.q_in.at[slot].transpose((1, 0, 2)), arrived)

        def packs(tile):
            some, window = pl.ds(tile, split.packed), pl.ds(split.full * ROWS + tile * 0, split.tail_rows)
            box = self.q.at[lane, some, pair, window]
            plgpu.copy_gmem_to_smem(box, self.q_packs.at[slot].transpose((1, 2, 0, 3)), arrived)

        plgpu.barrier_wait(self.q_free.at[slot])
        shared.part(split, item, whole, packs)
