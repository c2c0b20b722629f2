"""Both stages on Hopper in one kernel: blocks of a cluster hand alpha, c_L and Y on through each other's shared memory.

A cluster works on one query tile and head at a time. In a step each of its 16 blocks makes alpha, c_L and Y for all
columns j from one key row (c, k), as in stage 1, and sends the vectors of columns 4r to 4r + 3 to block r, which sums
their output as in stage 2. Nothing in between goes to device memory; K and V are read once per query tile.

Five warpgroups: 0 and 1 sum two columns each, whose rows i share the 64 of a product, 32 each; 2 and 3 make key rows in
turn; 4 loads. What a sum reads has two buffers; the blocks that write there wait until it has been given back.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels import shared
from monarchrt.pallas_kernels.config import CLUSTER, CLUSTER_COLUMNS, CLUSTER_DEPTH, ROWS, SLAB, FusedConfig

LOG2E = math.log2(math.e)
# registers for a thread of each kind; a launch has 96 for each of 640, and a block that asks for more waits for ever
SUM_REGISTERS, MAKE_REGISTERS, LOAD_REGISTERS = 128, 96, 32
STAGES = 2  # buffers of alpha, c_L and Y
KEY_SLOTS = 3  # pairs of a key row and its value row


def fused(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    limits: jax.Array,
    *,
    scale: float,
    masked: bool,
    config: FusedConfig,
) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp.

    Args:
        q: [B, A, b1, b2, H, 128], of a shape that `FusedConfig.serves`.
        k: [B, C, b1, b2, H, 128].
        v: As k.
        limits: int32 [A], pairs (c, k) that a query tile sees, read when `masked`.
        scale: Softmax scale.
        masked: Whether limits may be below C*b1.
        config: Sizes.

    Returns:
        out [B, A, b1, b2, H, 128] and lse [B, A, b1, b2, H] in float32.
    """
    import jax.experimental.pallas.mosaic_gpu as plgpu

    batch, tiles, rows, cols, heads, dim = q.shape
    slabs, half = dim // SLAB, ROWS // 2
    thin = (slabs, SLAB)
    count = batch * tiles
    pairs = k.shape[1] * rows
    clusters = min(config.clusters, count * heads)
    inputs = (
        q.reshape(count, rows, cols, heads, *thin),
        q.reshape(count, rows, cols * heads, *thin),
        *(x.reshape(batch * pairs, cols, heads, *thin) for x in (k, v)),
        limits,
    )
    swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    tiled = plgpu.TilingTransform((8, SLAB))  # pyright: ignore[reportAbstractUsage]
    shapes = (
        (2, slabs, ROWS, SLAB),  # Q of two columns, for each warpgroup that sums; then their output
        (2, slabs, ROWS, SLAB),  # a row of Q for each warpgroup that makes key rows
        (KEY_SLOTS, 2, slabs, ROWS, SLAB),  # key and value rows; rows beyond b2 are zero
    )
    between = (STAGES, CLUSTER_COLUMNS // 2, slabs, 2 * CLUSTER_DEPTH, SLAB)  # alpha and Y

    def plain(shape):
        return plgpu.SMEM((math.prod(shape) // 2,), jnp.int32)

    def monarch_fused(*refs):
        _run(
            *refs,
            tiles=tiles,
            rows=rows,
            cols=cols,
            heads=heads,
            pairs=pairs,
            items=count * heads,
            clusters=clusters,
            scale=scale,
            masked=masked,
            dtype=q.dtype,
        )

    out, lse = plgpu.kernel(
        monarch_fused,
        out_type=(
            jax.ShapeDtypeStruct((count, rows, cols * heads, *thin), q.dtype),
            jax.ShapeDtypeStruct((count, heads, cols, half), jnp.float32),
        ),
        scratch_types=(
            plgpu.RefUnion(
                tuple(plgpu.SMEM(s, q.dtype, transforms=(tiled, swizzle)) for s in shapes),
                tuple(plgpu.SMEM(s, q.dtype, transforms=(swizzle,)) for s in shapes),
                tuple(plain(s) for s in shapes),
            ),
            plgpu.RefUnion(plgpu.SMEM(between, q.dtype, transforms=(tiled, swizzle)), plain(between)),
            plain(between),
            plgpu.SMEM((STAGES * CLUSTER_COLUMNS * CLUSTER_DEPTH + 2 * ROWS,), jnp.float32),  # c_L; log-sum-exp
            plgpu.SMEM((4 * STAGES * 2,), jnp.int32),  # barriers of the cluster: alpha full, Y full, alpha free, Y free
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_arrivals=2 * slabs, num_barriers=KEY_SLOTS),
            plgpu.Barrier(num_barriers=KEY_SLOTS),
            plgpu.Barrier(num_arrivals=CLUSTER_COLUMNS * slabs),
            plgpu.Barrier(num_arrivals=2),
        ),
        grid=(clusters,),
        grid_names=("unit",),
        cluster=(CLUSTER,),
        cluster_names=("block",),
        num_threads=5,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(*inputs)
    lse = lse.reshape(batch, tiles, heads, cols, half)[..., :rows].transpose(0, 1, 4, 3, 2)
    return shared.varying(out.reshape(q.shape), q, k), shared.varying(lse, q, k)


def _run(
    q_rows,
    q_columns,
    k,
    v,
    limits,
    out,
    lse,
    smem,
    alpha,
    y_bytes,
    small,
    passed,
    q_full,
    q_free,
    key_full,
    key_free,
    columns_full,
    columns_free,
    *,
    tiles,
    rows,
    cols,
    heads,
    pairs,
    items,
    clusters,
    scale,
    masked,
    dtype,
):
    """What each warpgroup of each block does."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    from monarchrt.pallas_kernels import cluster

    (columns_mma, q_mma, key_mma), (columns_in, q_in, key_in), (columns_bytes, _, key_words) = smem
    alpha_mma, alpha_bytes = alpha
    f32, layout = jnp.float32, plgpu.Layout.WGMMA
    row_layout = layout.reduce(1)
    group, block, unit = lax.axis_index("group"), lax.axis_index("block"), lax.axis_index("unit")
    slabs, dim, half = 2, 2 * SLAB, ROWS // 2
    owners = -(-cols // CLUSTER_COLUMNS)
    width = -(-cols // 8) * 8
    exponent = scale * LOG2E
    rounds = lax.div(items - unit + clusters - 1, clusters)
    alpha_bytes_per_step = CLUSTER * CLUSTER_COLUMNS * (2 * dim + 4)
    y_bytes_per_step = CLUSTER * CLUSTER_COLUMNS * 2 * dim

    def place(r):
        """Query tile of the whole batch, its batch entry, head, pairs seen and steps of the cluster's r-th item."""
        item = unit + r * clusters  # clusters side by side read the same keys
        entry, tile, head = lax.div(item, tiles * heads), lax.rem(item, tiles), lax.rem(lax.div(item, tiles), heads)
        limit = limits[tile] if masked else jnp.int32(pairs)
        return entry * tiles + tile, entry, head, limit, lax.div(limit + CLUSTER_DEPTH - 1, CLUSTER_DEPTH)

    def full(t):
        """Stage of step t, counted over all items, and the parity of its being full."""
        return lax.rem(t, STAGES), lax.rem(lax.div(t, STAGES), 2)

    cluster.initialise(passed, [1] * (2 * STAGES) + [2 * owners] * (2 * STAGES))

    @pl.when(group == 0)
    def _():  # what lies behind b2 columns is multiplied with zeros and must be finite; copies never reach it
        zeros = plgpu.layout_cast(jnp.zeros((512,), jnp.int32), plgpu.Layout.WG_STRIDED((512,), 4))
        for n in range(key_words.shape[0] // 512):
            key_words[pl.ds(512 * n, 512)] = zeros
        plgpu.commit_smem()

    cluster.synchronise()

    @pl.when(group < 2)
    def _():
        plgpu.set_max_registers(SUM_REGISTERS, action="increase")

        @pl.when(block < owners)
        def _():
            my_bytes = group * cluster.TILE_SLAB * slabs
            my_lse = STAGES * CLUSTER_COLUMNS * CLUSTER_DEPTH + group * ROWS
            plgpu.barrier_arrive(columns_free)

            def item(r, done):
                tile, _entry, head, _limit, steps = place(r)
                plgpu.barrier_wait(columns_full)
                cluster.exchange(columns_bytes, my_bytes)
                plgpu.commit_smem()
                top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, f32), row_layout)
                total = plgpu.layout_cast(jnp.zeros((ROWS, 8), f32), layout)
                sums = plgpu.layout_cast(jnp.zeros((ROWS, dim), f32), layout)

                def step(i, carry):
                    top, total, sums = carry
                    stage, parity = full(done + i)

                    @pl.when(group == 0)
                    def _():
                        cluster.expect(passed, stage, alpha_bytes_per_step)
                        cluster.expect(passed, STAGES + stage, y_bytes_per_step)

                    cluster.wait(passed, stage, parity)

                    def products(acc):
                        for n in range(slabs):
                            plgpu.wgmma(acc, columns_mma.at[group, n], alpha_mma.at[stage, group, n].transpose((1, 0)))
                        return acc[...]

                    s = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((ROWS, 2 * CLUSTER_DEPTH), f32))
                    entropies = (stage * CLUSTER_COLUMNS + 2 * group) * cluster.COLUMN_BYTES
                    s = cluster.logits(s, small, entropies, exponent)
                    cluster.give_back(passed, 2 * STAGES + stage)
                    weights, top, total, sums = cluster.softmax_step(s, top, total, sums, dtype)
                    cluster.wait(passed, STAGES + stage, parity)
                    at = stage * cluster.STAGE_BYTES + group * cluster.PAIR_BYTES
                    sums = cluster.add_products(sums, weights, y_bytes, at)
                    cluster.give_back(passed, 3 * STAGES + stage)
                    return top, total, sums

                top, total, sums = lax.fori_loop(0, steps, step, (top, total, sums))
                total = total.sum(axis=1)
                found = sums * lax.broadcast_in_dim(1.0 / total, sums.shape, [0])
                plgpu.commit_smem()  # every warp has read its rows of the query tile, which the output replaces
                cluster.put(columns_bytes, my_bytes, found.astype(dtype))
                small[pl.ds(my_lse, ROWS)] = (top + jnp.log2(total)) * (1 / LOG2E)
                plgpu.commit_smem()
                for n in range(2):
                    j, part = block * CLUSTER_COLUMNS + 2 * group + n, pl.ds(half * n, half)

                    @pl.when(j < cols)
                    def _(j=j, part=part, n=n):
                        for m in range(slabs):
                            target = out.at[tile, pl.ds(tile * 0, half), j * heads + head, m]
                            plgpu.copy_smem_to_gmem(columns_in.at[group, m, part], target)
                        plgpu.copy_smem_to_gmem(small.at[pl.ds(my_lse + half * n, half)], lse.at[tile, head, j])

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(columns_free)
                return done + steps

            lax.fori_loop(0, rounds, item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    @pl.when((group == 2) | (group == 3))
    def _():
        mine = group - 2
        last = lax.fori_loop(0, rounds, lambda r, n: n + place(r)[-1], jnp.int32(0)) - 1
        plgpu.barrier_arrive(q_free.at[mine])

        # waiting for a barrier's phase is remembered by its parity: each of the two sees every filling of every slot
        @pl.when(mine == 0)
        def _():
            plgpu.barrier_arrive(key_free.at[0])
            plgpu.barrier_arrive(key_free.at[1])

        @pl.when(mine == 1)
        def _():
            pl.when(last >= 0)(lambda: plgpu.barrier_wait(key_full.at[0]))
            plgpu.barrier_arrive(key_free.at[2])

        def item(r, done):
            *_, limit, steps = place(r)
            first = lax.rem(done + mine, 2)

            def make(n, _):
                i = first + 2 * n
                t = done + i
                stage, parity = full(t)
                slot = lax.rem(t, KEY_SLOTS)
                plgpu.barrier_wait(q_full.at[mine])
                plgpu.barrier_wait(key_full.at[slot])

                def products(acc):
                    for n in range(slabs):
                        keys = key_mma.at[slot, 0, n, pl.ds(0, width)]
                        plgpu.wgmma(acc, q_mma.at[mine, n], keys.transpose((1, 0)))
                    return acc[...]

                s = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((ROWS, width), f32))
                plgpu.barrier_arrive(q_free.at[mine])
                if width != cols:
                    columns = plgpu.broadcasted_iota(jnp.int32, (ROWS, 8), 1, layout=layout) + (width - 8)
                    end = jnp.where(columns < cols, s[:, width - 8 :], -1e30)
                    s = lax.concatenate([s[:, : width - 8], end], 1) if width > 8 else end
                top = s.max(axis=1) * exponent
                # the update of R (paper, A.2): softmax over l of s <Q, K>
                p = jnp.exp2(s * exponent - lax.broadcast_in_dim(top, s.shape, [0]))
                total = p.sum(axis=1)
                inverse = 1.0 / total
                entropies = (p * s).sum(axis=1) * (inverse * exponent) - top - jnp.log2(total)
                p = (p * lax.broadcast_in_dim(inverse, p.shape, [0])).astype(dtype)
                if width != ROWS:
                    p = lax.concatenate([p, plgpu.layout_cast(jnp.zeros((ROWS, ROWS - width), dtype), layout)], 1)

                def vectors(factor, n):
                    def run(acc):
                        plgpu.wgmma(acc, p, key_mma.at[slot, factor, n])
                        return acc[...]

                    return pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((ROWS, SLAB), f32)).astype(dtype)

                def wait_free(which):
                    pl.when(t >= STAGES)(lambda: cluster.wait(passed, which * STAGES + stage, 1 - parity))

                hidden = jnp.where(i * CLUSTER_DEPTH + block < limit, f32(0), f32(jnp.inf))
                for n in range(slabs):
                    made = vectors(0, n)
                    if n == 0:
                        wait_free(2)
                        cluster.send_entropies(passed, stage, small, block, owners, entropies + hidden, stage=stage)
                    cluster.send(passed, stage, alpha_bytes, block, owners, made, stage=stage, slab=n)
                for n in range(slabs):
                    made = vectors(1, n)
                    if n == 0:
                        wait_free(3)
                    else:  # before the slot can be filled twice more
                        pl.when(t < last)(lambda: plgpu.barrier_wait(key_full.at[lax.rem(t + 1, KEY_SLOTS)]))
                        plgpu.barrier_arrive(key_free.at[slot])
                    cluster.send(passed, STAGES + stage, y_bytes, block, owners, made, stage=stage, slab=n)
                return ()

            lax.fori_loop(0, lax.div(steps - first + 1, 2), make, ())
            return done + steps

        lax.fori_loop(0, rounds, item, jnp.int32(0))

    @pl.when(group == 4)
    def _():
        plgpu.set_max_registers(LOAD_REGISTERS, action="decrease")

        def item(r, done):
            tile, entry, head, limit, steps = place(r)
            window = pl.ds(tile * 0, width)

            def load_columns():
                plgpu.barrier_wait(columns_free)
                for n in range(CLUSTER_COLUMNS):
                    j, part = block * CLUSTER_COLUMNS + n, pl.ds(half * (n % 2), half)
                    for m in range(slabs):
                        box = q_columns.at[tile, pl.ds(tile * 0, half), j * heads + head, m]
                        plgpu.copy_gmem_to_smem(box, columns_in.at[n // 2, m, part], columns_full)

            def load(i, _):
                t = done + i
                slot, maker = lax.rem(t, KEY_SLOTS), lax.rem(t, 2)
                pair = jnp.minimum(i * CLUSTER_DEPTH + block, limit - 1)
                plgpu.barrier_wait(key_free.at[slot])
                for n, source in enumerate((k, v)):
                    for m in range(slabs):
                        box = source.at[entry * pairs + pair, window, head, m]
                        plgpu.copy_gmem_to_smem(box, key_in.at[slot, n, m, pl.ds(0, width)], key_full.at[slot])
                plgpu.barrier_wait(q_free.at[maker])
                box = q_rows.at[tile, lax.rem(pair, rows), pl.ds(tile * 0, ROWS), head]
                plgpu.copy_gmem_to_smem(box, q_in.at[maker].transpose((1, 0, 2)), q_full.at[maker])
                pl.when((i == 1) & (block < owners))(load_columns)  # first what makers wait for
                return ()

            lax.fori_loop(0, steps, load, ())
            pl.when((steps < 2) & (block < owners))(load_columns)
            return done + steps

        lax.fori_loop(0, rounds, item, jnp.int32(0))
        for n in range(KEY_SLOTS):
            plgpu.barrier_wait(key_free.at[n])
        for n in range(2):
            plgpu.barrier_wait(q_free.at[n])
        pl.when(block < owners)(lambda: plgpu.barrier_wait(columns_free))

    cluster.synchronise()
