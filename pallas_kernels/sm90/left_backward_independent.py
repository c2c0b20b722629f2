"""Back through L on Hopper, as `left_backward`, where one warpgroup's registers hold dQ of all rows i (b1 to 96).

The two computing warpgroups take the steps of a column in turns and share nothing in them but Q and dO, so that one's
softmax and the other's products overlap. Each has a dQ of its own, [D, i]; the one that ends first leaves it, rounded,
where its last alpha and Y lay, and the one with the last step adds and stores.
"""

from collections.abc import Iterator

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from monarchrt.pallas_kernels.sm90 import shared
from monarchrt.pallas_kernels.sm90.config import ROWS, SLAB, LeftBackwardConfig
from monarchrt.pallas_kernels.sm90.left_backward_items import (
    Items,
    load_in_order,
    padded,
    probabilities,
    scores_gradient,
    seen_bias,
)
from monarchrt.pallas_kernels.sm90.roles import Given, PersistentBlock, Role, specialised
from monarchrt.pallas_kernels.sm90.types import Flag, Index, Place, Ref, Slabs, Tile


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
    slabs, width, depth = q.shape[5] // SLAB, config.width(q.shape[2]), config.depth(q.shape[2])
    groups, stages = config.warpgroups, config.stages
    items = Items(q=q, pairs=pairs, heads=heads, tiles=tiles, masked=masked, whole=whole, columns=1)
    shapes = (
        (2, slabs, depth, SLAB),  # dO and q
        (stages, 2, slabs, ROWS, SLAB),  # Y and alpha, then their gradients
    )
    return Role(
        specialised(lambda given: Block(items, config, scale, given), groups),
        name="monarch_left_backward_independent",
        outputs=items.outputs(width),
        scratch=dict(
            tiles=shared.tile_scratch(shapes, q.dtype, SLAB),
            p=shared.tile_scratch(((groups, width, ROWS),), q.dtype, SLAB),
            c=plgpu.SMEM((stages, ROWS), jnp.float32),
            stats=plgpu.SMEM((2, width), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=3),
            q_free=plgpu.Barrier(num_arrivals=groups),
            full=plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            left_there=plgpu.Barrier(num_arrivals=1, num_barriers=groups),
        ),
        groups=groups,
        blocks=min(config.blocks, items.count),
    )


class Block(PersistentBlock):
    """A persistent block: the arrays, its shared memory, and its turns, a column each, past all pairs that it sees."""

    def __init__(self, items: Items, config: LeftBackwardConfig, scale: float, given: Given) -> None:
        super().__init__(given)
        scratch = given.scratch
        rows = items.q.shape[2]
        self.items, self.scale = items, scale
        self.config, self.groups, self.stages = config, config.warpgroups, config.stages
        self.width, self.depth = config.width(rows), config.depth(rows)
        self.slabs = items.q.shape[5] // SLAB
        self.early, self.late = shared.gradient_scales(items.q.dtype, scale)
        start = self.name_arrays(given)
        self.c_in, self.stats_in, self.left_there = scratch.c, scratch.stats, scratch.left_there
        self.q_full, self.q_free, self.full, self.free = scratch.q_full, scratch.q_free, scratch.full, scratch.free
        (self.rows_mma, self.mid_mma), (self.rows_in, self.mid_in) = shared.tile_views(scratch.tiles)
        (self.p_mma,), _ = shared.tile_views(scratch.p)
        self.head0, self.tile0 = start[0], start[1]
        self.turns = self.share(items.count)

    def name_arrays(self, given: Given) -> Ref:
        """The inputs, of which `start` is returned, and the outputs by name."""
        self.q, self.g, self.alpha, self.y, self.c, self.stats, self.limits, start = given.inputs
        self.d_alpha, self.d_y, self.d_c, self.dq = given.outputs
        return start

    def place(self, t: Index) -> tuple[Index, Place, Index, Index]:
        """Index x, batch entry, head and tile of the chunk, column, pairs seen."""
        return self.items.place(self.number(t), self.limits, self.tile0)

    def compute(self) -> None:
        """What a computing warpgroup does."""
        group, groups, stages = self.group, self.groups, self.stages
        plgpu.set_max_registers(self.config.registers[0], action="increase")
        plgpu.barrier_arrive(self.q_free)
        for s in range(stages):
            pl.when(group == s % groups)(lambda s=s: plgpu.barrier_arrive(self.free.at[s]))
        done, given = lax.fori_loop(0, self.turns, self.turn, (jnp.int32(0), jnp.int32(0)))
        last = done - 1 - lax.rem(done + 1 + group, groups)  # this warpgroup's
        pl.when((last >= 0) & (given == 0))(lambda: self.leave(last))
        plgpu.wait_smem_to_gmem(0)

    def turn(self, t: Index, carry: tuple[Index, Index]) -> tuple[Index, Index]:
        """This warpgroup's steps of a column. Carries the steps so far, and whether its last one's place was given."""
        done, given = carry
        limit = self.place(t)[-1]
        steps = lax.div(limit + ROWS - 1, ROWS)
        first = lax.rem(done + self.group, 2)  # steps with an even number of all are the first warpgroup's
        plgpu.barrier_wait(self.q_full)

        def step(m, acc):
            i = first + 2 * m
            return self.step(done + i, i, t, (m == 0) & (given > 0), acc)

        layout = plgpu.Layout.WGMMA
        acc = [plgpu.layout_cast(jnp.zeros((SLAB, self.width), jnp.float32), layout) for _ in range(self.slabs)]
        mine = lax.div(steps - first + 1, 2)
        acc = lax.fori_loop(0, mine, step, acc)
        ends = lax.rem(done + steps + 1, 2) == self.group  # has the last step
        both = (steps > 1).astype(jnp.int32)  # a column of one step has one dQ
        slot = lax.rem(done + steps - 2, self.stages)  # the other's last step's
        pl.when(jnp.logical_not(ends))(lambda: self.give_query(acc, slot, both))
        pl.when(ends)(lambda: self.store_query(acc, slot, both, t, (done, steps)))
        gives = jnp.where(ends, 0, both)
        return done + steps, jnp.where(mine > 0, gives, given)

    def step(self, n: Index, i: Index, t: Index, given: Flag, acc: Slabs) -> Slabs:
        """Pairs from 64 i on of turn t's column, step n of both warpgroups'. Adds to slabs of dQ, [64 d, W].

        Gives back the place of this warpgroup's step before, unless that was `given` to the other.
        """
        dtype, width = self.items.q.dtype, self.width
        here, zero = shared.unhoisted(self.group, n), shared.unhoisted(0, n)
        x, _where, j, limit = self.place(shared.unhoisted(t, n))
        slot = lax.rem(n, self.stages)
        plgpu.barrier_wait(self.full.at[slot])

        def scores(x_acc, d_p_acc):
            """Products of alpha with q and of Y with dO, [64 pairs, W]."""
            for acc, kind in ((x_acc, 1), (d_p_acc, 0)):
                for m in range(self.slabs):
                    right = self.rows_mma.at[kind + zero, m, pl.ds(0, width)].transpose((1, 0))
                    plgpu.wgmma(acc, self.mid_mma.at[slot, kind, m], right)
            return x_acc[...], d_p_acc[...]

        x_s, d_p = pl.run_scoped(scores, *[plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32)] * 2)
        p = probabilities(x_s, seen_bias(self.c_in.at[slot], i, limit), self.stats_in.at[zero], self.scale)
        d_x = scores_gradient(p, d_p, self.stats_in.at[1 + zero], self.early, dtype)
        d_x = lax.optimization_barrier(d_x)  # rounded in pairs, not one by one because each is wanted alone too
        low_p = p.astype(dtype)
        # fits the rounded d_alpha: in dR their errors cancel
        total = d_x.astype(jnp.float32).sum(axis=1) * (-1 / self.early)
        self.p_mma.at[here].transpose((1, 0))[...] = plgpu.layout_cast(d_x, plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()

        def query(accs):
            for m in range(self.slabs):
                left = self.mid_mma.at[slot, 1, m].transpose((1, 0))
                plgpu.wgmma(accs[m], left, self.p_mma.at[here].transpose((1, 0)))

        acc = shared.accumulate(query, acc)
        # by now without a wait
        pl.when((n >= self.groups) & jnp.logical_not(given))(lambda: self.leave(n - self.groups))
        self.leave_gradients(i, (low_p, d_x), slot, zero, x, j)
        block_of, row = self.items.split.place(lax.rem(x, self.items.tiles), j)
        # where `right_backward` finds it with one copy per pair; after the fence, which would wait for it
        d_c = self.d_c.at[lax.div(x, self.items.tiles), block_of, pl.ds(i * ROWS, ROWS), row]
        shared.store_parts(d_c, total)
        return acc

    def leave_gradients(
        self, i: Index, factors: tuple[Tile, Tile], slot: Index, zero: Index, x: Index, j: Index
    ) -> None:
        """dY and d_alpha of a step replace Y and alpha, slab by slab, and leave; from `factors`, P and dX."""
        plgpu.commit_smem()  # every warp has read its alpha, which d_alpha replaces
        for kind, factor in enumerate([padded(factor, self.depth) for factor in factors]):
            for m in range(self.slabs):

                def multiply(acc, kind=kind, factor=factor, m=m):
                    plgpu.wgmma(acc, factor, self.rows_mma.at[kind + zero, m])
                    return acc[...]

                value = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, SLAB), jnp.float32))
                value = value * self.late if kind and self.late != 1 else value
                self.mid_mma[slot, kind, m] = value.astype(self.items.q.dtype)
        plgpu.commit_smem()
        for kind, target in enumerate((self.d_y, self.d_alpha)):
            for m in range(self.slabs):
                box = target.at[x, pl.ds(i * ROWS, ROWS), j, m]
                plgpu.copy_smem_to_gmem(self.mid_in.at[slot, kind, m], box)

    def leave(self, n: Index) -> None:
        """Gives back what step n came in, once its gradients have been read."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(self.free.at[lax.rem(n, self.stages)])

    def give_query(self, acc: Slabs, slot: Index, both: Index) -> None:
        """Ends a column whose last step is the other warpgroup's: leaves it this one's dQ, if there was one."""
        plgpu.barrier_arrive(self.q_free)

        @pl.when(both > 0)
        def _():
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for m, value in enumerate(acc):
                for n, tile in enumerate(self.tiles_of((value * self.late).astype(self.items.q.dtype))):
                    self.mid_mma[slot, n, m] = tile
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.left_there.at[1 - self.group])

    def store_query(self, acc: Slabs, slot: Index, both: Index, t: Index, turns: tuple[Index, Index]) -> None:
        """Ends a column with the last step: adds the other warpgroup's dQ to this one's and stores it."""
        tiles, dtype = self.items.tiles, self.items.q.dtype
        pl.when(both > 0)(lambda: plgpu.barrier_wait(self.left_there.at[self.group]))
        plgpu.barrier_arrive(self.q_free)  # not before: no item further may leave its dQ there

        def add(_, acc):
            others = [self.load_tiles(slot, m) for m in range(self.slabs)]
            plgpu.barrier_arrive(self.free.at[slot])
            return [x + y for x, y in zip(acc, others, strict=True)]

        own = [value * self.late if self.late != 1 else value for value in acc]
        sums = lax.fori_loop(0, both, add, own)
        x, _where, j, _limit = self.place(shared.unhoisted(t, sum(turns)))
        block_of, row = self.items.split.place(lax.rem(x, tiles), j)
        for m, value in enumerate(sums):
            target = self.dq.at[lax.div(x, tiles), block_of, :, row, pl.ds(m * SLAB, SLAB)]
            share = plgpu.layout_cast(value.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            shared.store_parts(target.transpose((1, 0)), share)

    def tiles_of(self, value: Float[Array, "64 w"]) -> Iterator[Float[Array, "64 64"]]:
        """[64 d, W] in tiles of 64 columns, the last one filled with zeros."""
        for n in range(0, self.width, ROWS):
            tile = value[:, n : n + ROWS]
            if missing := ROWS - tile.shape[1]:
                zeros = plgpu.layout_cast(jnp.zeros((SLAB, missing), self.items.q.dtype), plgpu.Layout.WGMMA)
                tile = lax.concatenate([tile, zeros], 1)
            yield tile

    def load_tiles(self, slot: Index, m: int) -> Float32[Array, "64 w"]:
        """What `tiles_of` gave for slab m, [64 d, W] in float32."""
        tiles = []
        for n in range(0, self.width, ROWS):
            tile = plgpu.load(self.mid_mma.at[slot, n // ROWS, m], layout=plgpu.Layout.WGMMA).astype(jnp.float32)
            tiles.append(tile[:, : min(ROWS, self.width - n)])
        return tiles[0] if len(tiles) == 1 else lax.concatenate(tiles, 1)

    def load(self) -> None:
        """What the loading warpgroup does: Y, alpha and c_L of each step, dO, q and the statistics of a column."""
        plgpu.set_max_registers(self.config.registers[1], action="decrease")

        def turn(t, done):
            x, where, j, limit = self.place(t)
            steps = lax.div(limit + ROWS - 1, ROWS)
            x_in, bias_in = self.items.source(x, where, self.head0, self.tile0)

            def load(i):
                slot, span = lax.rem(done + i, self.stages), pl.ds(i * ROWS, ROWS)
                plgpu.barrier_wait(self.free.at[slot])
                for kind, source in enumerate((self.y, self.alpha)):
                    box = source.at[x_in, span, j]
                    plgpu.copy_gmem_to_smem(box, self.mid_in.at[slot, kind].transpose((1, 0, 2)), self.full.at[slot])
                plgpu.copy_gmem_to_smem(self.c.at[*bias_in(j), span], self.c_in.at[slot], self.full.at[slot])

            # a third step's place may be that of the last step before, given back in a step of this item
            load_in_order(steps, 2, load, lambda: self.load_query(x, where, j))
            return done + steps

        lax.fori_loop(0, self.turns, turn, jnp.int32(0))
        plgpu.barrier_wait(self.q_free)
        for s in range(self.stages):
            plgpu.barrier_wait(self.free.at[s])

    def load_query(self, x: Index, where: Place, j: Index) -> None:
        """Starts the copies of a column's dO, q and statistics."""
        entry, head, tile = where
        head0, tile0 = self.head0, self.tile0
        plgpu.barrier_wait(self.q_free)
        span = pl.ds(x * 0, self.depth)  # past the end of b1 rows, so not static
        for kind, source in enumerate((self.g, self.q)):
            box = source.at[entry, tile0 + tile, span, j * self.items.q.shape[4] + head0 + head]
            plgpu.copy_gmem_to_smem(box, self.rows_in.at[kind].transpose((1, 0, 2)), self.q_full)
        box = self.stats.at[entry, head0 + head, tile0 + tile, j, :, pl.ds(0, self.width)]
        plgpu.copy_gmem_to_smem(box, self.stats_in, self.q_full)
