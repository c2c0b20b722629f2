"""Both stages on Hopper in one kernel: blocks of a cluster hand alpha, c_L and Y on through each other's shared memory.

A cluster works on one query tile and head at a time. In a step each of its 16 blocks makes alpha, c_L and Y for all
columns j from one key row (c, k), as in stage 1, and sends the vectors of columns 4r to 4r + 3 to block r, which sums
their output as in stage 2. Nothing in between goes to device memory; K and V are read once per query tile.

Five warpgroups: 0 and 1 sum two columns each, whose rows i share the 64 of a product, 32 each; 2 and 3 make key rows in
turn; 4 loads. What a sum reads has two buffers; the blocks that write there wait until it has been given back.

Tiles of up to 16 rows can have clusters of 8 blocks, of which each sums 7 or 8 columns, four in a warpgroup, 16 rows
each: fewer blocks to send to, and more of a card's multiprocessors in clusters.

With `spread`, what is left over when the clusters have had equally many items is cut along the keys, a part for each;
outputs and log-sum-exps of the parts are put together afterwards (`fused_sizes`).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from monarchrt.pallas_kernels.sm90 import cluster, cluster_store, shared
from monarchrt.pallas_kernels.sm90.config import CLUSTER_VECTORS, ROWS, SLAB, FusedConfig
from monarchrt.pallas_kernels.sm90.fused_sizes import Sizes, put_together
from monarchrt.pallas_kernels.sm90.types import Flag, Index, Ref, Refs

LOG2E = math.log2(math.e)
STAGES = 2  # buffers of alpha, c_L and Y
KEY_SLOTS = 3  # pairs of a key row and its value row

Sums = tuple[Float32[Array, "64"], Float32[Array, "64 8"], Float32[Array, "64 128"]]
"""Of some columns' rows: what is subtracted from scores, sums of weights, weighted sums of Y."""


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
    batch, tiles, rows, cols, heads, dim = q.shape
    slabs = dim // SLAB
    thin = (slabs, SLAB)
    count = batch * tiles
    pairs = k.shape[1] * rows
    inputs = (
        q.reshape(count, rows, cols, heads, *thin),
        q.reshape(count, rows, cols * heads, *thin),
        *(x.reshape(batch * pairs, cols, heads, *thin) for x in (k, v)),
        limits,
    )
    sizes = Sizes(
        tiles=tiles,
        rows=rows,
        cols=cols,
        heads=heads,
        pairs=pairs,
        items=count * heads,
        form=dataclasses.replace(config, spread=config.spread and not masked),
        scale=scale,
        masked=masked,
        dtype=q.dtype,
    )
    left, parts = sizes.left
    if not left:
        sizes = dataclasses.replace(
            sizes, form=dataclasses.replace(config, clusters=min(config.clusters, sizes.items), spread=False)
        )

    results = [
        jax.ShapeDtypeStruct((count, rows, cols * heads, *thin), q.dtype),
        jax.ShapeDtypeStruct((count, heads, cols, config.rows), jnp.float32),
    ]
    if left:
        results.append(jax.ShapeDtypeStruct((parts, left, rows, cols, dim), jnp.float32))
        results.append(jax.ShapeDtypeStruct((parts, left, cols, config.rows), jnp.float32))

    def monarch_fused(*refs):
        _run(sizes, refs[: 5 + len(results)], refs[5 + len(results) :])

    out, lse, *split = plgpu.kernel(
        monarch_fused,
        out_type=tuple(results),
        scratch_types=_scratch(q.dtype, config),
        grid=(sizes.form.clusters,),
        grid_names=("unit",),
        cluster=(config.blocks,),
        cluster_names=("block",),
        num_threads=5,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )(*inputs)
    if split:
        out, lse = put_together(sizes, out, lse, *split)
    lse = lse.reshape(batch, tiles, heads, cols, config.rows)[..., :rows].transpose(0, 1, 4, 3, 2)
    return shared.varying(out.reshape(q.shape), q, k), shared.varying(lse, q, k)


def _scratch(dtype: jnp.dtype, form: FusedConfig) -> tuple[Any, ...]:
    """Types of a block's shared memory, as `_Block` takes it apart."""
    slabs = _Block.slabs
    swizzle = plgpu.SwizzleTransform(128)  # pyright: ignore[reportAbstractUsage]
    tiled = plgpu.TilingTransform((8, SLAB))  # pyright: ignore[reportAbstractUsage]
    shapes = (
        (2, slabs, ROWS, SLAB),  # Q of the columns of each warpgroup that sums; then their output
        (2, slabs, ROWS, SLAB),  # a row of Q for each warpgroup that makes key rows
        (KEY_SLOTS, 2, slabs, ROWS, SLAB),  # key and value rows; rows beyond b2 are zero
    )
    between = (STAGES, 2, slabs, CLUSTER_VECTORS, SLAB)  # alpha and Y

    def plain(shape):
        return plgpu.SMEM((math.prod(shape) // 2,), jnp.int32)

    return (
        plgpu.RefUnion(
            tuple(plgpu.SMEM(s, dtype, transforms=(tiled, swizzle)) for s in shapes),
            tuple(plgpu.SMEM(s, dtype, transforms=(swizzle,)) for s in shapes),
            tuple(plain(s) for s in shapes),
        ),
        plgpu.RefUnion(plgpu.SMEM(between, dtype, transforms=(tiled, swizzle)), plain(between)),
        plain(between),
        plgpu.SMEM((STAGES * 2 * CLUSTER_VECTORS + 2 * ROWS,), jnp.float32),  # c_L; log-sum-exp
        plgpu.SMEM((4 * STAGES * 2,), jnp.int32),  # barriers of the cluster: alpha full, Y full, alpha free, Y free
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_arrivals=2 * slabs, num_barriers=KEY_SLOTS),
        plgpu.Barrier(num_barriers=KEY_SLOTS),
        plgpu.Barrier(num_arrivals=form.columns * slabs),
        plgpu.Barrier(num_arrivals=2),
    )


def _run(sizes: Sizes, arrays: Refs, scratch: Refs) -> None:
    """What each warpgroup of each block does."""
    work = _Block(sizes, arrays, scratch)
    cluster.initialise(work.passed, [1] * (2 * STAGES) + [2 * sizes.owners] * (2 * STAGES))
    pl.when(work.group == 0)(lambda: _clear(work.key_words))
    if sizes.form.columns % sizes.form.together:
        pl.when(work.group == 1)(lambda: _clear(work.y_bytes))
    cluster.synchronise()
    pl.when(work.group < 2)(work.sum_up)
    pl.when((work.group == 2) | (work.group == 3))(work.make)
    pl.when(work.group == 4)(work.load)
    cluster.synchronise()


def _clear(words: Ref) -> None:
    """What no copy reaches is multiplied with zeros and must be finite: behind b2 columns, or of a column too many."""
    zeros = plgpu.layout_cast(jnp.zeros((512,), jnp.int32), plgpu.Layout.WG_STRIDED((512,), 4))
    for n in range(words.shape[0] // 512):
        words[pl.ds(512 * n, 512)] = zeros
    plgpu.commit_smem()


class _Block:
    """A block of a cluster: the arrays, its shared memory, and the cluster's turns, a query tile of a head each."""

    slabs, dim = 2, 2 * SLAB

    def __init__(self, sizes: Sizes, arrays: Refs, scratch: Refs) -> None:
        self.sizes, self.form = sizes, sizes.form
        self.q_rows, self.q_columns, self.k, self.v, self.limits, self.out, self.lse, *parts = arrays
        smem, alpha, self.y_bytes, self.small, self.passed, *barriers = scratch
        self.q_full, self.q_free, self.key_full, self.key_free, self.columns_full, self.columns_free = barriers
        multiply, copy, plain = smem
        self.columns_mma, self.q_mma, self.key_mma = multiply
        self.columns_in, self.q_in, self.key_in = copy
        self.columns_bytes, _, self.key_words = plain
        self.alpha_mma, self.alpha_bytes = alpha
        self.group, self.block, self.unit = (lax.axis_index(name) for name in ("group", "block", "unit"))
        self.exponent = sizes.scale * LOG2E
        self.count_turns()
        if self.left:
            self.parts_out, self.parts_lse = parts

    def count_turns(self) -> None:
        """Turns of the cluster, and which of them are parts of items."""
        items, clusters = self.sizes.items, self.form.clusters
        self.left, self.parts = self.sizes.left
        self.full = items // clusters
        if self.left:
            self.rounds = jnp.int32(self.full + self.left * self.parts // clusters)
        else:
            self.rounds = lax.div(items - self.unit + clusters - 1, clusters)

    def piece(self, r: Index) -> tuple[Index, Index]:
        """Which of the items that are left over, and which part of its keys, the cluster's r-th turn is."""
        n = self.unit + (r - self.full) * self.form.clusters
        return lax.rem(n, self.left), lax.div(n, self.left)

    def span(self, r: Index, whole: Index) -> tuple[Index, Index]:
        """First step of the cluster's r-th turn in its item, which has `whole` steps, and how many it has."""
        if not self.left:
            return jnp.int32(0), whole
        _, part = self.piece(r)
        first, end = lax.div(part * whole, self.parts), lax.div((part + 1) * whole, self.parts)
        return jnp.where(r < self.full, 0, first), jnp.where(r < self.full, whole, end - first)

    def place(self, r: Index) -> tuple[Index, Index, Index, Index, Index]:
        """Query tile of the whole batch, its batch entry, head, pairs seen and steps of the cluster's r-th item."""
        tiles, heads = self.sizes.tiles, self.sizes.heads
        item = self.unit + r * self.form.clusters  # clusters side by side read the same keys
        if self.left:
            item = jnp.where(r < self.full, item, self.full * self.form.clusters + self.piece(r)[0])
        entry, tile, head = lax.div(item, tiles * heads), lax.rem(item, tiles), lax.rem(lax.div(item, tiles), heads)
        limit = self.limits[tile] if self.sizes.masked else jnp.int32(self.sizes.pairs)
        return entry * tiles + tile, entry, head, limit, lax.div(limit + self.form.blocks - 1, self.form.blocks)

    def pair(self, i: Index, limit: Index, steps: Index) -> tuple[Index, Index, jax.Array]:
        """The block's pair in step i of an item, its k, and whether there is one; else it is the last."""
        if not self.form.resident:
            n = i * self.form.blocks + self.block
            pair = jnp.minimum(n, limit - 1)
            return pair, lax.rem(pair, self.sizes.rows), n < limit
        n, rows = self.block * steps + i, self.sizes.rows  # of pairs in the order of k, then c
        k, c = self.turn(n, limit)
        return c * rows + k, k, n < limit

    def turn(self, n: Index, limit: Index) -> tuple[Index, Index]:
        """k and c of the n-th pair in the order of k, then c."""
        n, seen = jnp.minimum(n, limit - 1), lax.div(limit, self.sizes.rows)
        k = lax.div(n, seen)
        return k, n - k * seen

    def anew(
        self, i: Index, before: int, limit: Index, steps: Index, span: tuple[Index, Index] | None = None
    ) -> "jax.Array | bool":
        """Whether step i of an item has another query row than the step two before or after, of the same warpgroup."""
        if not self.form.resident:
            return True
        low, count = span or (0, steps)
        j = i + before
        first = self.block * steps
        other = self.turn(first + j, limit)[0] != self.turn(first + i, limit)[0]
        return (j < low) | (j >= low + count) | other

    def stage_of(self, t: Index) -> tuple[Index, Index]:
        """Stage of step t, counted over all items, and the parity of its being full."""
        return lax.rem(t, STAGES), lax.rem(lax.div(t, STAGES), 2)

    def sum_up(self) -> None:
        """What the two warpgroups of the second stage do, in blocks that have columns: half of them each."""
        plgpu.set_max_registers(self.form.registers[0], action="increase")

        @pl.when(self.block < self.sizes.owners)
        def _():
            my_bytes = self.group * cluster.TILE_SLAB * self.slabs
            my_lse = STAGES * 2 * CLUSTER_VECTORS + self.group * ROWS
            plgpu.barrier_arrive(self.columns_free)

            def item(r, done):
                tile, _entry, head, _limit, whole = self.place(r)
                steps = self.span(r, whole)[1]
                plgpu.barrier_wait(self.columns_full)
                cluster.exchange(self.columns_bytes, my_bytes)
                plgpu.commit_smem()
                layout, f32 = plgpu.Layout.WGMMA, jnp.float32
                top = plgpu.layout_cast(jnp.full((ROWS,), -jnp.inf, f32), layout.reduce(1))
                total = plgpu.layout_cast(jnp.zeros((ROWS, 8), f32), layout)
                sums = plgpu.layout_cast(jnp.zeros((ROWS, self.dim), f32), layout)
                top, total, sums = lax.fori_loop(
                    0, steps, lambda i, carry: self.sum_step(done + i, i == steps - 1, carry), (top, total, sums)
                )
                total = total.sum(axis=1)
                means = sums * lax.broadcast_in_dim(1.0 / total, sums.shape, [0])
                if self.form.direct:
                    if self.sizes.masked:  # no step gave the queries' room back
                        pl.when(steps == 0)(lambda: plgpu.barrier_arrive(self.columns_free))
                    numbers = (top + jnp.log2(total)) * (1 / LOG2E)
                    self.store_columns(r, tile, head, means, numbers)
                    return done + steps
                plgpu.commit_smem()  # every warp has read its rows of the query tile, which the output replaces
                cluster.put(self.columns_bytes, my_bytes, means.astype(self.sizes.dtype))
                self.small[pl.ds(my_lse, ROWS)] = (top + jnp.log2(total)) * (1 / LOG2E)
                plgpu.commit_smem()
                self.send_columns(tile, head, my_lse)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(self.columns_free)
                return done + steps

            lax.fori_loop(0, self.rounds, item, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    def sum_step(self, t: Index, last: Flag, carry: Sums) -> Sums:
        """Adds the pairs of step t, the last of an item or not, to the running softmax of the columns."""
        sizes, group, passed = self.sizes, self.group, self.passed
        top, total, sums = carry
        stage, parity = self.stage_of(t)

        @pl.when(group == 0)
        def _():
            vectors = self.form.blocks * self.form.columns
            cluster.expect(passed, stage, vectors * (2 * self.dim + 4))
            cluster.expect(passed, STAGES + stage, vectors * 2 * self.dim)

        cluster.wait(passed, stage, parity)

        def products(acc):
            for n in range(self.slabs):
                alpha = self.alpha_mma.at[stage, group, n].transpose((1, 0))
                plgpu.wgmma(acc, self.columns_mma.at[group, n], alpha)
            return acc[...]

        s = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((ROWS, CLUSTER_VECTORS), jnp.float32))
        if self.form.direct:
            pl.when(last)(lambda: plgpu.barrier_arrive(self.columns_free))
        entropies = (stage * 2 + group) * (4 * CLUSTER_VECTORS)
        s = cluster.logits(s, self.small, entropies, self.exponent, self.form.together)
        cluster.give_back(passed, 2 * STAGES + stage, self.form.blocks)
        weights, top, total, sums = cluster.softmax_step(s, top, total, sums, sizes.dtype)
        cluster.wait(passed, STAGES + stage, parity)
        at = stage * cluster.STAGE_BYTES + group * cluster.PART_BYTES
        sums = cluster.add_products(sums, weights, self.y_bytes, at)
        cluster.give_back(passed, 3 * STAGES + stage, self.form.blocks)
        return top, total, sums

    def store_columns(
        self, r: Index, tile: Index, head: Index, means: Float32[Array, "64 128"], numbers: Float32[Array, "64"]
    ) -> None:
        """Stores the columns' output and log-sum-exp from registers: nothing waits in the room of their queries."""
        sizes, form, together = self.sizes, self.form, self.form.together
        first = self.block * form.columns + together * self.group
        count = jnp.minimum(sizes.cols - first, form.columns - together * self.group)

        def whole():
            place = (tile * sizes.rows * sizes.cols + first) * sizes.heads + head
            sizes_of = {"rows": sizes.rows, "steps": (sizes.cols * sizes.heads, sizes.heads), "together": together}
            cluster_store.output(self.out, place, count, means.astype(sizes.dtype), **sizes_of)
            place = ((tile * sizes.heads + head) * sizes.cols + first) * form.rows
            cluster_store.numbers(self.lse, place, count, numbers, together=together)

        def part():
            item, n = self.piece(r)
            at = (n * self.left + item) * sizes.cols
            sizes_of = {"rows": sizes.rows, "steps": (sizes.cols, 1), "together": together}
            cluster_store.output(self.parts_out, at * sizes.rows + first, count, means, **sizes_of)
            cluster_store.numbers(self.parts_lse, (at + first) * form.rows, count, numbers, together=together)

        if not self.left:
            return whole()
        pl.when(r < self.full)(whole)
        pl.when(r >= self.full)(part)

    def send_columns(self, tile: Index, head: Index, my_lse: Index) -> None:
        """Starts the copies of the columns' output and log-sum-exp."""
        height, together = self.form.rows, self.form.together
        for n in range(together):
            mine = together * self.group + n
            j, part = self.block * self.form.columns + mine, pl.ds(height * n, height)

            @pl.when((j < self.sizes.cols) & (mine < self.form.columns))
            def _(j=j, part=part, n=n):
                for m in range(self.slabs):
                    target = self.out.at[tile, pl.ds(tile * 0, height), j * self.sizes.heads + head, m]
                    plgpu.copy_smem_to_gmem(self.columns_in.at[self.group, m, part], target)
                numbers = self.small.at[pl.ds(my_lse + height * n, height)]
                plgpu.copy_smem_to_gmem(numbers, self.lse.at[tile, head, j])

    def make(self) -> None:
        """What the two warpgroups of the first stage do: alpha, c_L and Y of every other key row, to all blocks."""
        mine = self.group - 2
        if self.form.overlap:
            plgpu.set_max_registers(self.form.registers[1], action="increase")
        last = lax.fori_loop(0, self.rounds, lambda r, n: n + self.span(r, self.place(r)[-1])[1], jnp.int32(0)) - 1
        plgpu.barrier_arrive(self.q_free.at[mine])

        # waiting for a barrier's phase is remembered by its parity: each of the two sees every filling of every slot
        @pl.when(mine == 0)
        def _():
            plgpu.barrier_arrive(self.key_free.at[0])
            plgpu.barrier_arrive(self.key_free.at[1])

        @pl.when(mine == 1)
        def _():
            pl.when(last >= 0)(lambda: plgpu.barrier_wait(self.key_full.at[0]))
            plgpu.barrier_arrive(self.key_free.at[2])

        def item(r, done):
            *_, limit, whole = self.place(r)
            span = self.span(r, whole)
            steps = span[1]
            first = lax.rem(done + mine, 2)

            def step(n, _):
                i = first + 2 * n
                self.make_step(span[0] + i, done + i, mine, limit, whole, span, last)
                return ()

            lax.fori_loop(0, lax.div(steps - first + 1, 2), step, ())
            return done + steps

        lax.fori_loop(0, self.rounds, item, jnp.int32(0))

    def make_step(
        self, i: Index, t: Index, mine: Index, limit: Index, steps: Index, span: tuple[Index, Index], last: Index
    ) -> None:
        """The block's key row of an item's step i, step t of all, with its query rows."""
        passed, block, owners = self.passed, self.block, self.sizes.owners
        stage, parity = self.stage_of(t)
        to = {"stage": stage, "form": self.form}
        slot = lax.rem(t, KEY_SLOTS)
        pl.when(self.anew(i, -2, limit, steps, span))(lambda: plgpu.barrier_wait(self.q_full.at[mine]))
        plgpu.barrier_wait(self.key_full.at[slot])
        p, entropies = self.probabilities(mine, slot, self.anew(i, 2, limit, steps, span))

        def vectors(factor, n):
            def run(acc):
                plgpu.wgmma(acc, p, self.key_mma.at[slot, factor, n])
                return acc[...]

            made = pl.run_scoped(run, plgpu.WGMMAAccumulatorRef((ROWS, SLAB), jnp.float32))
            return made.astype(self.sizes.dtype)

        under_way = []

        def start(factor, n):
            at = (slot * 2 + factor) * self.slabs + n
            under_way.append(cluster.start_product(p, self.key_words, at * cluster.TILE_SLAB))

        def next_vectors(factor, n):
            """The oldest product, and the one after the next started."""
            follows = 2 * factor + n + 1
            made = cluster.finish_product(under_way.pop(0), int(follows < 4))
            return made.astype(self.sizes.dtype)

        if self.form.overlap:
            vectors = next_vectors
            start(0, 0)
            start(0, 1)

        def wait_free(which):
            pl.when(t >= STAGES)(lambda: cluster.wait(passed, which * STAGES + stage, 1 - parity))

        hidden = jnp.where(self.pair(i, limit, steps)[2], jnp.float32(0), jnp.float32(jnp.inf))
        for n in range(self.slabs):
            made = vectors(0, n)
            if n == 0:
                wait_free(2)
                cluster.send_entropies(passed, stage, self.small, block, owners, entropies + hidden, **to)
            cluster.send(passed, stage, self.alpha_bytes, block, owners, made, slab=n, **to)
            if self.form.overlap:
                start(1, n)
        for n in range(self.slabs):
            made = vectors(1, n)
            if n == 0:
                wait_free(3)
            else:  # before the slot can be filled twice more
                pl.when(t < last)(lambda: plgpu.barrier_wait(self.key_full.at[lax.rem(t + 1, KEY_SLOTS)]))
                self.finished(self.key_free.at[slot])
            cluster.send(passed, STAGES + stage, self.y_bytes, block, owners, made, slab=n, **to)

    def finished(self, free: Ref) -> None:
        """Gives back what products have read. A product's wait ends per warp, and one may be far behind the first."""
        if self.form.overlap:
            plgpu.commit_smem()  # waits for all warps
        plgpu.barrier_arrive(free)

    def probabilities(
        self, mine: Index, slot: Index, done: "jax.Array | bool"
    ) -> tuple[Float[Array, "64 64"], Float32[Array, "64"]]:
        """R, [64 j, 64 l] in the inputs' dtype, and its sum of R log R over l in units of log 2 [64].

        Args:
            mine: Which of the two warpgroups this is.
            slot: Of the key row.
            done: Whether the query row is not needed any more.
        """
        width, cols, dtype, exponent = self.sizes.width, self.sizes.cols, self.sizes.dtype, self.exponent
        layout = plgpu.Layout.WGMMA

        def products(acc):
            for n in range(self.slabs):
                keys = self.key_mma.at[slot, 0, n, pl.ds(0, width)]
                plgpu.wgmma(acc, self.q_mma.at[mine, n], keys.transpose((1, 0)))
            return acc[...]

        s = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32))
        pl.when(done)(lambda: self.finished(self.q_free.at[mine]))
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
        return p, entropies

    def load(self) -> None:
        """What the loading warpgroup does: K, V and q of each step, and the columns' queries of an item."""
        plgpu.set_max_registers(self.form.registers[2], action="decrease")

        def item(r, done):
            tile, entry, head, limit, whole = self.place(r)
            span = self.span(r, whole)
            steps = span[1]
            window = pl.ds(tile * 0, self.sizes.width)

            def load(i, _):
                t = done + i
                slot, maker = lax.rem(t, KEY_SLOTS), lax.rem(t, 2)
                pair, row, _ = self.pair(span[0] + i, limit, whole)
                plgpu.barrier_wait(self.key_free.at[slot])
                for n, source in enumerate((self.k, self.v)):
                    for m in range(self.slabs):
                        box = source.at[entry * self.sizes.pairs + pair, window, head, m]
                        target = self.key_in.at[slot, n, m, pl.ds(0, self.sizes.width)]
                        plgpu.copy_gmem_to_smem(box, target, self.key_full.at[slot])
                pl.when(self.anew(span[0] + i, -2, limit, whole, span))(lambda: self.load_row(tile, row, head, maker))
                # first what makers wait for
                pl.when((i == 1) & (self.block < self.sizes.owners))(lambda: self.load_columns(tile, head))
                return ()

            lax.fori_loop(0, steps, load, ())
            pl.when((steps < 2) & (self.block < self.sizes.owners))(lambda: self.load_columns(tile, head))
            return done + steps

        lax.fori_loop(0, self.rounds, item, jnp.int32(0))
        for n in range(KEY_SLOTS):
            plgpu.barrier_wait(self.key_free.at[n])
        for n in range(2):
            plgpu.barrier_wait(self.q_free.at[n])
        pl.when(self.block < self.sizes.owners)(lambda: plgpu.barrier_wait(self.columns_free))

    def load_row(self, tile: Index, row: Index, head: Index, maker: Index) -> None:
        """Starts the copy of a row of queries."""
        plgpu.barrier_wait(self.q_free.at[maker])
        box = self.q_rows.at[tile, row, pl.ds(tile * 0, ROWS), head]
        plgpu.copy_gmem_to_smem(box, self.q_in.at[maker].transpose((1, 0, 2)), self.q_full.at[maker])

    def load_columns(self, tile: Index, head: Index) -> None:
        """Starts the copies of the queries of the block's columns."""
        height, together = self.form.rows, self.form.together
        plgpu.barrier_wait(self.columns_free)
        for n in range(self.form.columns):
            j, part = self.block * self.form.columns + n, pl.ds(height * (n % together), height)
            for m in range(self.slabs):
                box = self.q_columns.at[tile, pl.ds(tile * 0, height), j * self.sizes.heads + head, m]
                plgpu.copy_gmem_to_smem(box, self.columns_in.at[n // together, m, part], self.columns_full)
