"""Stage 1 on Hopper: alpha, c_L and Y of every (query tile, key tile, key row), with wgmma and TMA.

For one head and one key row (c, k), K[c,k] and V[c,k] are small matrices [b2, D]. A persistent block holds one pair of
them in shared memory and runs through the query tiles a: scores [j, l] = Q[a,k] K^T, a softmax over l, then the
products with K and V. One warpgroup loads, the others compute, each on 64 columns j of one query tile.

Shared tiles are kept as slabs of [rows, 64] elements: a TMA box of rows may then start at any row of a tile and run
past its end (b2 = 52 or 45): rows outside are read as zeros and never written.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels import shared
from monarchrt.pallas_kernels.config import COMPUTE_REGISTERS, LOAD_REGISTERS, ROWS, RightConfig, column_blocks
from monarchrt.pallas_kernels.shared import LOG2E, Role


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

    Returns:
        The role.
    """
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    batch, _, rows, cols, _, slabs, slab = q.shape
    pairs = k.shape[1]
    groups, stages, key_stages = config.warpgroups, config.query_stages, config.key_stages
    depth, width = config.depth(cols), config.width(cols)
    split = column_blocks(cols, tiles, masked)
    full, tail_rows, packed, items = split.full, split.tail_rows, split.packed, split.items
    tail = items > split.whole
    units = batch * heads * pairs
    blocks = min(config.blocks, units)
    dtype, f32 = q.dtype, jnp.float32
    row_layout = plgpu.Layout.WGMMA

    def run(block, inputs, outputs, scratch):
        q, k, v, limits, start = inputs
        alpha, y, c = outputs
        smem, key_full, key_free, q_full, q_free = scratch
        views = shared.tile_views(smem)
        q_mma, k_mma, v_mma, alpha_reg, y_reg = views[0]
        q_in, k_in, v_in, alpha_out, y_out = views[1]
        q_packs, _, _, alpha_packs, y_packs = views[-1]
        group = lax.axis_index("group")
        head0, tile0, bound = start[0], start[1], start[2]

        # whole key rows are strided over the blocks, so that blocks share a head's queries in L2; those left over are
        # split evenly, or go to the first blocks where masks make items differ anyway
        turns, over = divmod(units, blocks)
        share, more = divmod(over * items, blocks)
        if masked:
            more_turns = jnp.int32(block < over)
        else:
            first = block * share + jnp.minimum(block, more)
            last = first + share + jnp.int32(block < more)
            over_unit = lax.div(first, items)
            more_turns = lax.div(last + items - 1, items) - over_unit

        def span(t):
            """Key row of a turn and the items of it that are this block's."""
            if masked:
                return block + t * blocks, jnp.int32(0), jnp.int32(items)
            base = (over_unit + t - turns) * items
            rest = t >= turns
            low, high = jnp.maximum(first - base, 0), jnp.minimum(last - base, items)
            unit = jnp.where(rest, turns * blocks + over_unit + t - turns, block + t * blocks)
            return unit, jnp.where(rest, low, 0), jnp.where(rest, high, items)

        def part(item, whole, packs):
            """Calls `whole(tile, first column)` or `packs(first tile)`, whichever kind the item is."""
            if full and tail:
                pl.when(item < split.whole)(lambda: whole(lax.div(item, full), lax.rem(item, full) * ROWS))
                pl.when(item >= split.whole)(lambda: packs((item - split.whole) * packed))
            elif full:
                whole(lax.div(item, full), lax.rem(item, full) * ROWS)
            else:
                packs(item * packed)

        def place(unit):
            """Batch entry, head of the chunk and key row of a unit."""
            return lax.div(unit, heads * pairs), lax.rem(lax.div(unit, pairs), heads), lax.rem(unit, pairs)

        def when_seen(pair, item, do):
            """Runs `do` unless the query tile neither sees the pair nor reads it as padding."""
            if masked:
                limit = limits[tile0 + lax.div(item, full)]
                pl.when(pair < lax.div(limit + key_block - 1, key_block) * key_block)(do)
            else:
                do()

        def when_live(pair, do):
            """Runs `do` unless no query tile needs the pair."""
            if masked:
                pl.when(pair < bound)(do)
            else:
                do()

        def compute(item, pair, lane, slot, key_slot):
            plgpu.barrier_wait(q_full.at[slot])

            def scores(acc):
                for n in range(slabs):
                    b = k_mma.at[key_slot, n, pl.ds(0, width)].transpose((1, 0))
                    plgpu.wgmma(acc, q_mma.at[slot, n], b)
                return acc[...]

            s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((ROWS, width), f32)) * (scale * LOG2E)
            plgpu.barrier_arrive(q_free.at[slot])
            if width != cols:
                column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=row_layout)
                s = jnp.where(column < cols, s, -1e30)
            top = s.max(axis=1)
            # the update of R (paper, A.2): softmax over l of s <Q, K>
            p = jnp.exp2(s - lax.broadcast_in_dim(top, s.shape, [0]))
            total = p.sum(axis=1)
            inverse = 1.0 / total
            entropy = (p * s).sum(axis=1) * inverse - top - jnp.log2(total)
            p = (p * lax.broadcast_in_dim(inverse, p.shape, [0])).astype(dtype)
            if width != depth:  # the products' depth; K and V are zeros there
                p = lax.concatenate([p, plgpu.layout_cast(jnp.zeros((ROWS, depth - width), dtype), row_layout)], 1)

            def product(*factors):
                def multiply(*accs):
                    for n, acc in enumerate(accs):
                        plgpu.wgmma(acc, p, factors[n // slabs].at[key_slot, n % slabs])
                    return tuple(acc[...] for acc in accs)

                count = slabs * len(factors)
                results = pl.run_scoped(multiply, *[plgpu.WGMMAAccumulatorRef((ROWS, slab), f32) for _ in range(count)])
                if masked:  # keys that are not seen may hold anything; what is read as padding must be finite
                    seen = pair < limits[tile0 + lax.div(item, full)]
                    results = tuple(lax.select(lax.broadcast(seen, x.shape), x, jnp.zeros_like(x)) for x in results)
                return [x.astype(dtype) for x in results]

            tiles_out = product(k_mma, v_mma) if config.together else product(k_mma) + product(v_mma)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            mine = shared.unhoisted(group, item)
            for n in range(slabs):
                alpha_reg[mine, n] = tiles_out[n]
                y_reg[mine, n] = tiles_out[slabs + n]
            plgpu.commit_smem()
            c[lane, item, :, pair] = entropy  # after the fence, which would wait for it

            def store_whole(tile, column):
                window = pl.ds(column, ROWS)
                plgpu.copy_smem_to_gmem(alpha_out.at[group].transpose((1, 0, 2)), alpha.at[lane, tile, pair, window])
                plgpu.copy_smem_to_gmem(y_out.at[group].transpose((1, 0, 2)), y.at[lane, tile, pair, window])

            def store_packs(tile):
                some, window = pl.ds(tile, packed), pl.ds(full * ROWS + tile * 0, tail_rows)
                to_rows = (1, 2, 0, 3)
                plgpu.copy_smem_to_gmem(alpha_packs.at[group].transpose(to_rows), alpha.at[lane, some, pair, window])
                plgpu.copy_smem_to_gmem(y_packs.at[group].transpose(to_rows), y.at[lane, some, pair, window])

            part(item, store_whole, store_packs)

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS[groups], action="increase")
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
                        work = functools.partial(
                            compute, i, pair, entry * heads + head, slot, shared.unhoisted(key_slot, i)
                        )
                        when_seen(pair, i, work)
                        return ()

                    lax.fori_loop(0, lax.div(high - mine + groups - 1, groups), item, ())
                    plgpu.barrier_arrive(key_free.at[key_slot])

                when_live(pair, live)
                return done + high - low

            lax.fori_loop(0, turns + more_turns, unit, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(LOAD_REGISTERS[groups], action="decrease")

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
                        slot, row = lax.rem(done + i - low, stages), lax.rem(pair, rows)

                        def load_whole(tile, column):
                            box = q.at[entry, tile0 + tile, row, pl.ds(column, ROWS), lane]
                            plgpu.copy_gmem_to_smem(box, q_in.at[slot].transpose((1, 0, 2)), q_full.at[slot])

                        def load_packs(tile):
                            some, window = pl.ds(tile0 + tile, packed), pl.ds(full * ROWS + tile * 0, tail_rows)
                            box = q.at[entry, some, row, window, lane]
                            plgpu.copy_gmem_to_smem(box, q_packs.at[slot].transpose((1, 2, 0, 3)), q_full.at[slot])

                        def load():
                            plgpu.barrier_wait(q_free.at[slot])
                            part(i, load_whole, load_packs)

                        when_seen(pair, i, load)
                        return ()

                    lax.fori_loop(low, high, item, ())

                when_live(pair, live)
                return done + high - low

            lax.fori_loop(0, turns + more_turns, unit, jnp.int32(0))
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
    struct = jax.ShapeDtypeStruct
    shape = (batch * heads, tiles, pairs, cols, slabs, slab)
    return Role(
        run,
        name="monarch_right",
        outputs=(
            struct(shape, dtype),
            struct(shape, dtype),
            struct((batch * heads, items, ROWS, -(-pairs // key_block) * key_block), f32),
        ),
        scratch=(
            shared.tile_scratch(shapes, dtype, slab, (packed, tail_rows) if tail else None),
            plgpu.Barrier(num_arrivals=2, num_barriers=key_stages),
            plgpu.Barrier(num_arrivals=groups, num_barriers=key_stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
        ),
        groups=groups,
        blocks=blocks,
    )
