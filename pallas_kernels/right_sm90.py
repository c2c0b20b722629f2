"""Stage 1 on Hopper: alpha, c_L and Y of every (query tile, key tile, key row), with wgmma and TMA.

For one head and one key row (c, k), K[c,k] and V[c,k] are small matrices [b2, D]. A persistent block holds one pair of
them in shared memory and runs through the query tiles a: scores [j, l] = Q[a,k] K^T, a softmax over l, then the
products with K and V. One warpgroup loads, the others compute, each on 64 columns j of one query tile.

Shared tiles are kept as slabs of [rows, 64] elements: a TMA box of rows may then start at any row of a tile and run
past its end (b2 = 52 or 45): rows outside are read as zeros and never written.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import shared
from pallas_kernels.config import ROWS, RightConfig

LOG2E = math.log2(math.e)


@functools.partial(jax.jit, static_argnames=("scale", "heads", "tiles", "rows", "key_block", "masked", "config"))
def right(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    limits: jax.Array,
    start: jax.Array,
    *,
    scale: float,
    heads: int,
    tiles: int,
    rows: int,
    key_block: int,
    masked: bool,
    config: RightConfig,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes the intermediates of a chunk of `tiles` query tiles and `heads` heads.

    Args:
        q: [B, A*b1, b2, H, D/slab, slab], slab = config.slab.
        k: [B, C*b1, b2, H, D/slab, slab].
        v: As k.
        limits: int32 [A], (c, k) pairs that a query tile sees; read when `masked`.
        start: int32 [3], the chunk's first head and query tile, and the largest of `limits`, rounded up to `key_block`.
        scale: Softmax scale.
        heads: Heads of the chunk, X = B * heads * tiles.
        tiles: Query tiles of the chunk.
        rows: b1.
        key_block: Pairs beyond a limit, up to the next multiple of this, are written as zeros; the others are not.
        masked: Whether limits may be below C*b1.
        config: Sizes.

    Returns:
        alpha [X, C*b1, b2, D/slab, slab] and Y alike, in q's dtype; c_L [X, C*b1, b2 rounded up to 64] in float32, in
        units of log 2.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    batch, _, cols, _, slabs, slab = q.shape
    pairs = k.shape[1]
    groups, stages, key_stages = config.warpgroups, config.query_stages, config.key_stages
    depth = config.depth(cols)
    row_blocks = -(-cols // ROWS)
    items = tiles * row_blocks  # per key row
    units = batch * heads * pairs
    blocks = min(config.blocks, units)
    dtype, f32 = q.dtype, jnp.float32
    row_layout = plgpu.Layout.WGMMA

    def body(q, k, v, limits, start, alpha, y, c, smem, c_out, key_full, key_free, q_full, q_free):
        (q_in, k_in, v_in, alpha_out, y_out), (q_mma, k_mma, v_mma, alpha_reg, y_reg) = shared.tile_views(smem)
        group, block = lax.axis_index("group"), lax.axis_index("block")
        head0, tile0, bound = start[0], start[1], start[2]

        if masked:  # key rows strided over the blocks: their work differs
            turns = lax.div(units - block + blocks - 1, blocks)

            def span(t):
                return block + t * blocks, jnp.int32(0), jnp.int32(items)

        else:  # an equal share of the items for each block, so key rows may be split between two
            share, more = divmod(units * items, blocks)
            first = block * share + jnp.minimum(block, more)
            last = first + share + (block < more).astype(jnp.int32)
            unit0 = lax.div(first, items)
            turns = lax.div(last + items - 1, items) - unit0

            def span(t):
                base = (unit0 + t) * items
                return unit0 + t, jnp.maximum(first - base, 0), jnp.minimum(last - base, items)

        def place(unit):
            """Batch entry, head of the chunk and key row of a unit."""
            return lax.div(unit, heads * pairs), lax.rem(lax.div(unit, pairs), heads), lax.rem(unit, pairs)

        def when_seen(pair, tile, do):
            """Runs `do` unless the query tile neither sees the pair nor reads it as padding."""
            if masked:
                limit = limits[tile0 + tile]
                pl.when(pair < lax.div(limit + key_block - 1, key_block) * key_block)(do)
            else:
                do()

        def when_live(pair, do):
            """Runs `do` unless no query tile needs the pair."""
            if masked:
                pl.when(pair < bound)(do)
            else:
                do()

        def compute(item, pair, head_tile0, slot, key_slot):
            tile, row_block = lax.div(item, row_blocks), lax.rem(item, row_blocks)
            plgpu.barrier_wait(q_full.at[slot])

            def scores(acc):
                for n in range(slabs):
                    plgpu.wgmma(acc, q_mma.at[slot, n], k_mma.at[key_slot, n].transpose((1, 0)))
                return acc[...]

            s = pl.run_scoped(scores, plgpu.ACC((ROWS, depth), f32)) * (scale * LOG2E)
            plgpu.barrier_arrive(q_free.at[slot])
            if depth != cols:
                column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=row_layout)
                s = jnp.where(column < cols, s, -1e30)
            top = s.max(axis=1)
            p = jnp.exp2(s - lax.broadcast_in_dim(top, s.shape, [0]))
            total = p.sum(axis=1)
            inverse = 1.0 / total
            entropy = (p * s).sum(axis=1) * inverse - top - jnp.log2(total)
            p = (p * lax.broadcast_in_dim(inverse, p.shape, [0])).astype(dtype)

            def product(rhs):
                def multiply(*accs):
                    for n in range(slabs):
                        plgpu.wgmma(accs[n], p, rhs.at[key_slot, n])
                    return tuple(acc[...] for acc in accs)

                results = pl.run_scoped(multiply, *[plgpu.ACC((ROWS, slab), f32) for _ in range(slabs)])
                if masked:  # keys that are not seen may hold anything; what is read as padding must be finite
                    seen = pair < limits[tile0 + tile]
                    results = tuple(lax.select(lax.broadcast(seen, x.shape), x, jnp.zeros_like(x)) for x in results)
                return [x.astype(dtype) for x in results]

            alpha_tile, y_tile = product(k_mma), product(v_mma)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for n in range(slabs):
                alpha_reg[group, n] = alpha_tile[n]
                y_reg[group, n] = y_tile[n]
            c_out[group] = entropy
            plgpu.commit_smem()
            x, window = head_tile0 + tile, pl.ds(row_block * ROWS, ROWS)
            plgpu.copy_smem_to_gmem(alpha_out.at[group].transpose((1, 0, 2)), alpha.at[x, pair, window])
            plgpu.copy_smem_to_gmem(y_out.at[group].transpose((1, 0, 2)), y.at[x, pair, window])
            plgpu.copy_smem_to_gmem(c_out.at[group], c.at[x, pair, window])

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(232 if groups == 2 else 160, action="increase")
            for s in range(key_stages):
                plgpu.barrier_arrive(key_free.at[s])
            for s in range(stages // groups):
                plgpu.barrier_arrive(q_free.at[s * groups + group])

            def unit(t, done):
                unit, low, high = span(t)
                entry, head, pair = place(unit)
                key_slot = lax.rem(t, key_stages)
                mine = low + lax.rem(group + groups - lax.rem(done, groups), groups)

                def live():
                    plgpu.barrier_wait(key_full.at[key_slot])

                    def item(s, _):
                        i = mine + s * groups
                        slot = lax.rem(done + i - low, stages)
                        work = functools.partial(compute, i, pair, (entry * heads + head) * tiles, slot, key_slot)
                        when_seen(pair, lax.div(i, row_blocks), work)
                        return ()

                    lax.fori_loop(0, lax.div(high - mine + groups - 1, groups), item, ())
                    plgpu.barrier_arrive(key_free.at[key_slot])

                when_live(pair, live)
                return done + high - low

            lax.fori_loop(0, turns, unit, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(40, action="decrease")

            def unit(t, done):
                unit, low, high = span(t)
                entry, head, pair = place(unit)
                key_slot, lane = lax.rem(t, key_stages), head0 + head

                def live():
                    plgpu.barrier_wait(key_free.at[key_slot])
                    window = pl.ds(key_slot * 0, depth)  # past the end of b2 columns, so the start must not be static
                    for source, target in ((k, k_in), (v, v_in)):
                        box = source.at[entry, pair, window, lane]
                        plgpu.copy_gmem_to_smem(box, target.at[key_slot].transpose((1, 0, 2)), key_full.at[key_slot])

                    def item(i, _):
                        tile, row_block = lax.div(i, row_blocks), lax.rem(i, row_blocks)
                        slot = lax.rem(done + i - low, stages)

                        def load():
                            plgpu.barrier_wait(q_free.at[slot])
                            query_row = (tile0 + tile) * rows + lax.rem(pair, rows)
                            box = q.at[entry, query_row, pl.ds(row_block * ROWS, ROWS), lane]
                            plgpu.copy_gmem_to_smem(box, q_in.at[slot].transpose((1, 0, 2)), q_full.at[slot])

                        when_seen(pair, tile, load)
                        return ()

                    lax.fori_loop(low, high, item, ())

                when_live(pair, live)
                return done + high - low

            lax.fori_loop(0, turns, unit, jnp.int32(0))
            for s in range(key_stages):
                plgpu.barrier_wait(key_free.at[s])
            for s in range(stages):
                plgpu.barrier_wait(q_free.at[s])

    shapes = (
        (stages, slabs, ROWS, slab),
        (key_stages, slabs, depth, slab),
        (key_stages, slabs, depth, slab),
        (groups, slabs, ROWS, slab),
        (groups, slabs, ROWS, slab),
    )
    count = batch * heads * tiles
    struct = jax.ShapeDtypeStruct
    shape = (count, pairs, cols, slabs, slab)
    return plgpu.kernel(
        body,
        out_type=(struct(shape, dtype), struct(shape, dtype), struct((count, pairs, row_blocks * ROWS), f32)),
        grid=(blocks,),
        grid_names=("block",),
        num_threads=groups + 1,
        thread_name="group",
        scratch_types=[
            shared.tile_scratch(shapes, dtype, slab),
            plgpu.SMEM((groups, ROWS), f32),
            plgpu.Barrier(num_arrivals=2, num_barriers=key_stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=key_stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ],
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(q, k, v, limits, start)
