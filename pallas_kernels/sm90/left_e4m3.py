"""Stage 2 from alpha and Y in 8 bits: `left.py`, with one more warpgroup that turns them into 16 before the products.

The tensor cores multiply 8 bits with 8 bits only, and would want Y transposed. So blocks of alpha and of Y come into
one ring in turns as e4m3 ("raw"); a warpgroup leaves them in a second ring ("cells"), tiled for products, as float16,
which holds them exactly and takes one instruction for two. Half step 2n is step n's alpha, half step 2n + 1 its Y.

Their scales are in what meets them. A score <Q, alpha> is multiplied by alpha's. L's weight p of a pair times Y's scale
y is 2^(score + log2 y), with a running maximum of its own, so that float16 has room for it, and the softmax's total is
the sum of these weights over y.
"""

from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from monarchrt.pallas_kernels.sm90 import e4m3_cells, shared
from monarchrt.pallas_kernels.sm90.config import ROWS, SLAB, LeftE4M3Config
from monarchrt.pallas_kernels.sm90.left import Block, Items, Tile
from monarchrt.pallas_kernels.sm90.right_e4m3 import E4M3, LARGEST, UPPER
from monarchrt.pallas_kernels.sm90.roles import Role
from monarchrt.pallas_kernels.sm90.shared import LOG2E
from monarchrt.pallas_kernels.sm90.types import Index, Ref

FACTORS = jnp.float16  # what the products are of
ALPHA, BIAS, TOTAL = range(3)  # of a pair: its score times one, less another; its weight times a third


def left_e4m3_role(
    q: jax.ShapeDtypeStruct,
    pairs: int,
    *,
    scale: float,
    heads: int,
    tiles: int,
    masked: bool,
    config: LeftE4M3Config,
) -> Role:
    """Attends from the rows of a chunk of query tiles and heads.

    Inputs of the role: as `left_role`'s, with alpha and Y [X, C*b1, b2, 1, D] in e4m3, and after c_L the words of the
    scales, int32, laid out like it. Outputs, arguments and result are those of `left_role`.
    """
    items = Items(q=q, pairs=pairs, heads=heads, tiles=tiles, masked=masked, config=config)
    batch, _, rows, cols, _, dim = q.shape
    slabs, wide, depth, columns = dim // SLAB, config.wide, config.key_block, config.columns

    def run(given):
        work = LeftE4M3(items, scale, given)
        pl.when(work.group < wide)(work.compute)
        pl.when(work.group == wide)(work.convert)
        pl.when(work.group == wide + 1)(work.load)

    struct, padded_rows = jax.ShapeDtypeStruct, items.row_groups * config.row_blocks * ROWS
    queries = [(config.query_stages, wide, slabs, ROWS, SLAB)]
    return Role(
        run,
        name="monarch_left_e4m3",
        outputs=(
            struct((batch, tiles, rows, cols * heads, slabs, SLAB), q.dtype),
            struct((batch * heads * tiles, cols, padded_rows), jnp.float32),
        ),
        scratch=dict(
            queries=shared.tile_scratch(queries, q.dtype, SLAB, also=() if q.dtype == FACTORS else (FACTORS,)),
            cells=shared.tile_scratch([(config.cells, columns, slabs, depth, SLAB)], FACTORS, SLAB),
            raw=shared.tile_scratch([(config.raw, columns, 1, depth, dim)], E4M3, dim),
            c_raw=plgpu.SMEM((config.raw_steps, columns, depth), jnp.float32),
            words=plgpu.SMEM((config.raw_steps, columns, depth), jnp.int32),
            numbers=plgpu.SMEM((config.steps, 3, columns, depth), jnp.float32),
            lse=plgpu.SMEM((wide, ROWS), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=wide, num_barriers=config.query_stages),
            q_free=plgpu.Barrier(num_arrivals=wide, num_barriers=config.query_stages),
            raw_full=plgpu.Barrier(num_barriers=config.raw),
            raw_free=plgpu.Barrier(num_barriers=config.raw),
            c_full=plgpu.Barrier(num_arrivals=2 * columns, num_barriers=config.raw_steps),
            cell_full=plgpu.Barrier(num_barriers=config.cells),
            cell_free=plgpu.Barrier(num_arrivals=wide, num_barriers=config.cells),
            turn=plgpu.Barrier(num_arrivals=wide),
        ),
        groups=wide + 1,
        blocks=min(config.blocks, items.count),
    )


class _Ring:
    """A reference whose first index is a step, which `place` turns into what there is."""

    def __init__(self, ref: Ref, place: Callable[[Index], Index]) -> None:
        self.ref, self.place = ref, place

    @property
    def at(self) -> "_Ring":
        return self

    def __getitem__(self, key: Index | tuple[Index, ...]) -> Ref:
        n, *rest = key if isinstance(key, tuple) else (key,)
        return self.ref.at[(self.place(n), *rest)]


class LeftE4M3(Block):
    """A persistent block: two warpgroups that compute, one that converts, one that loads."""

    config: LeftE4M3Config

    def name_scratch(self, scratch: SimpleNamespace) -> None:
        """See `Block`; what it knows by slots are cells here."""
        self.c_raw, self.words, self.lse_out, self.turn = scratch.c_raw, scratch.words, scratch.lse, scratch.turn
        self.q_full, self.q_free = scratch.q_full, scratch.q_free
        self.raw_full, self.raw_free, self.c_full = scratch.raw_full, scratch.raw_free, scratch.c_full
        self.cell_full, self.cell_free = scratch.cell_full, scratch.cell_free
        (self.q_mma,), (self.q_in,), *half = shared.tile_views(scratch.queries)
        self.q_factor, self.factors = half[0][0] if half else self.q_mma, FACTORS
        (self.cells,), (self.cells_in,) = shared.tile_views(scratch.cells)
        _, (self.raw_in,) = shared.tile_views(scratch.raw)
        count = self.config.cells
        self.numbers = _Ring(scratch.numbers, lambda n: lax.rem(n, self.config.steps))
        for which, name in enumerate(("alpha", "y")):

            def cell(n, which=which):
                return lax.rem(2 * n + which, count)

            setattr(self, f"{name}_mma", _Ring(self.cells, cell))
            setattr(self, f"{name}_full", _Ring(self.cell_full, cell))
            setattr(self, f"{name}_free", _Ring(self.cell_free, cell))

    def slot(self, n: Index) -> Index:
        """Steps are not turned into slots before it is known of what."""
        return n

    def free_all(self) -> None:
        """Says that nothing is in use yet."""
        for s in range(self.config.query_stages):
            plgpu.barrier_arrive(self.q_free.at[s])
        for s in range(self.config.cells):
            plgpu.barrier_arrive(self.cell_free.at[s])

    def steps_of(self, t: Index, limit: Index) -> Index:
        """Steps of a turn; a number that the compiler knows makes it write them all out, and spill what they share."""
        return shared.unhoisted(lax.div(limit + self.depth - 1, self.depth), self.number(t))

    def ready_query(self, q_slot: Index) -> None:
        """bfloat16 to float16, in place; above 65504 it is infinite."""
        if self.q_factor is self.q_mma:
            return
        for n in range(self.slabs):
            x = plgpu.load(self.q_mma.at[q_slot, self.group, n], layout=plgpu.Layout.WGMMA)
            self.q_factor[q_slot, self.group, n] = x.astype(jnp.float32).astype(FACTORS)
        plgpu.commit_smem()

    def number_of(self, which: int, slot: Index, column: Index) -> Float32[Array, " _"]:
        """One of the numbers of a step's pairs, [depth]."""
        source = self.numbers.at[slot, which, column]
        return plgpu.load(source, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)

    def logits(self, s: Tile, slot: Index, column: Index, seen: Index) -> Tile:
        """L's scores, and the logarithm of Y's scale, in units of log 2."""
        del seen  # in BIAS
        alpha, bias = (self.number_of(n, slot, column) for n in (ALPHA, BIAS))
        return s * lax.broadcast_in_dim(alpha, s.shape, [1]) - lax.broadcast_in_dim(bias, s.shape, [1])

    def weights(self, p: Tile, slot: Index, column: Index) -> Tile:
        """p without Y's scale."""
        return p * lax.broadcast_in_dim(self.number_of(TOTAL, slot, column), p.shape, [1])

    def convert(self) -> None:
        """What the converting warpgroup does."""
        config, depth = self.config, self.depth
        plgpu.set_max_registers(config.converting, action="decrease")
        for s in range(config.raw):
            plgpu.barrier_arrive(self.raw_free.at[s])

        def item(t, done):
            *_, limit = self.place(t)
            steps = self.steps_of(t, limit)

            def step(i, _):
                n = done + i
                words = lax.rem(n, config.raw_steps)
                plgpu.barrier_wait(self.c_full.at[words])
                self.half_step(2 * n, lambda: self.scales(words, self.numbers.place(n), limit - i * depth))
                self.half_step(2 * n + 1)
                return ()

            lax.fori_loop(0, steps, step, ())
            return done + steps

        lax.fori_loop(0, self.turns, item, jnp.int32(0))
        for s in range(config.cells):
            plgpu.barrier_wait(self.cell_free.at[s])

    def scales(self, words: Index, step: Index, seen: Index) -> None:
        """The numbers of a step's pairs, of which `seen` are there, from c_L and the words of their scales."""
        layout = plgpu.Layout.WGMMA_8BIT.reduce(1)
        for column in range(self.config.columns):
            for first in range(0, self.depth, ROWS):
                span = pl.ds(first, ROWS)
                word = plgpu.load(self.words.at[words, column, span], layout=layout, optimized=False)
                c = plgpu.load(self.c_raw.at[words, column, span], layout=layout, optimized=False)
                alpha = lax.bitcast_convert_type(word & UPPER, jnp.float32)
                y = lax.bitcast_convert_type(lax.shift_left(word, jnp.full_like(word, 16)), jnp.float32)
                y = y * (1 / LARGEST)
                pair = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=layout) + first
                there = pair < seen  # beyond all pairs no word was written
                numbers = {
                    ALPHA: jnp.where(there, alpha * (self.scale * LOG2E / LARGEST), 0.0),
                    BIAS: jnp.where(there, c - jnp.log2(y), jnp.inf),
                    TOTAL: jnp.where(there, 1 / y, 0.0),
                }
                for which, x in numbers.items():
                    self.numbers.ref[step, which, column, span] = x

    def half_step(self, half: Index, more: Callable[[], None] = lambda: None) -> None:
        """alpha or Y of a step from its raw place to its cell, and `more` when there is room for it."""
        config = self.config
        raw, cell = lax.rem(half, config.raw), lax.rem(half, config.cells)
        plgpu.barrier_wait(self.raw_full.at[raw])
        plgpu.barrier_wait(self.cell_free.at[cell])
        more()
        for column in range(config.columns):
            source, target = self.raw_in.at[raw, column, 0], self.cells_in.at[cell, column]
            e4m3_cells.convert(source, target, depth=self.depth, dim=self.slabs * SLAB)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.cell_full.at[cell])
        plgpu.barrier_arrive(self.raw_free.at[raw])

    def load(self) -> None:
        """What the loading warpgroup does: q of an item, then alpha, c_L, the words and Y of each step."""
        config, depth, tiles = self.config, self.depth, self.items.tiles
        plgpu.set_max_registers(config.registers[2], action="decrease")
        split = self.items.split
        (all_words,) = self.more_numbers

        def item(t, done):
            x, where, column, row_block, limit = self.place(t)
            steps = self.steps_of(t, limit)
            self.load_query(t, where, column, row_block)

            def load(i, _):
                n, span, window = done + i, pl.ds(i * depth, depth), pl.ds(column, config.columns)
                for which, source in enumerate((self.alpha, self.y)):
                    raw = lax.rem(2 * n + which, config.raw)
                    plgpu.barrier_wait(self.raw_free.at[raw])
                    target = self.raw_in.at[raw].transpose((2, 0, 1, 3))
                    plgpu.copy_gmem_to_smem(source.at[x, span, window], target, self.raw_full.at[raw])
                    if which:
                        continue
                    words = lax.rem(n, config.raw_steps)
                    for m in range(config.columns):
                        block_of, row = split.place(where[2], column + m)
                        at = (lax.div(x, tiles), block_of, row, span)
                        for numbers, into in ((self.c, self.c_raw), (all_words, self.words)):
                            plgpu.copy_gmem_to_smem(numbers.at[at], into.at[words, m], self.c_full.at[words])
                return ()

            lax.fori_loop(0, steps, load, ())
            return done + steps

        lax.fori_loop(0, self.turns, item, jnp.int32(0))
        for s in range(config.query_stages):
            plgpu.barrier_wait(self.q_free.at[s])
        for s in range(config.raw):
            plgpu.barrier_wait(self.raw_free.at[s])
