"""Block-sparse attention on Hopper, forward, where all blocks are of one size, with wgmma and TMA.

A block of up to 64 queries is an item: its scores with each block of up to 64 keys that its list names, a running
softmax, the products with the values. Persistent blocks of three computing warpgroups, each with items and tiles in
shared memory of its own, so that its softmax is beside the others' products, and with a warpgroup that loads for it.
Copies are of a block's rows and no more, so that what is beyond is never read; the rows up to 64 stay zeros.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32

from monarch_jax.contract import Side, SparseProblem
from monarchrt.pallas_kernels.sm90 import shared
from monarchrt.pallas_kernels.sm90.config import REDUCTIONS, ROWS, SLAB, block_bytes
from monarchrt.pallas_kernels.sm90.roles import Given, PersistentBlock, Role, launch
from monarchrt.pallas_kernels.sm90.shared import LOG2E
from monarchrt.pallas_kernels.sm90.types import Index, Ref

LOWEST = -1e30  # below every score, and finite
GROUPS = 3  # computing warpgroups of a block; as many load
REGISTERS = (136, 24)  # for a thread of a computing and of a loading warpgroup; a launch has 80 for each of 768

Sums = tuple[Float32[Array, "64 ..."], ...]
"""Of 64 queries: greatest score, sum of weights, slabs of the output [64, 64]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseForwardConfig:
    """Sizes of the kernel.

    Attributes:
        tiles: Tiles of keys or values in flight for each computing warpgroup, 2 or more.
        blocks: Persistent blocks; one per multiprocessor.
    """

    tiles: int = 3
    blocks: int = 132

    def __post_init__(self) -> None:
        if self.tiles < 2:
            raise ValueError(f"tiles={self.tiles} is below 2: the keys and the values of a block.")

    def shared_memory(self, dim: int) -> int:
        """Bytes a block uses; an output leaves from where its queries were."""
        tiles = GROUPS * (1 + self.tiles)
        return block_bytes(tiles * ROWS * dim * 2, GROUPS * ROWS * 4, barriers=2 * tiles, reductions=REDUCTIONS)


def sparse_forward_role(
    problem: SparseProblem, q: jax.ShapeDtypeStruct, blocks: int, listed: int, config: SparseForwardConfig
) -> Role:
    """Attends from all queries.

    Inputs of the role: q [B, Nq, H, D/64, 64]; k [B, Nk, H, D/64, 64]; v as k; and of the queries' `Side` starts, first
    and count, each as one axis.

    Outputs: the output as q; the log-sum-exp to the base 2, float32 [B*H*Nq].

    Args:
        problem: Even blocks of up to 64 queries and 64 keys.
        q: [B, Nq, H, D/64, 64].
        blocks: Blocks of queries.
        listed: Entries that a list has room for.
        config: Sizes.

    Returns:
        The role.
    """
    batch, tokens, heads, slabs, _ = q.shape
    tiles = GROUPS * config.tiles
    items = Items(problem=problem, q=q, blocks=blocks, listed=listed, config=config)

    def run(given):
        work = Block(items, given)
        pl.when(work.warpgroup < GROUPS)(work.compute)
        pl.when(work.warpgroup >= GROUPS)(work.load)

    shapes = [(n, slabs, ROWS, SLAB) for n in (GROUPS, tiles)]
    return Role(
        run,
        name="sparse_forward",
        outputs=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch * heads * tokens,), jnp.float32),
        ),
        scratch=dict(
            tiles=shared.tile_scratch(shapes, q.dtype, SLAB),
            lse=plgpu.SMEM((GROUPS, ROWS), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=items.copies(problem.rows), num_barriers=GROUPS),
            q_free=plgpu.Barrier(num_barriers=GROUPS),
            full=plgpu.Barrier(num_arrivals=items.copies(problem.columns), num_barriers=tiles),
            free=plgpu.Barrier(num_barriers=tiles),
        ),
        groups=2 * GROUPS - 1,
        blocks=items.persistent,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Items:
    """The work of the kernel: a block of queries of a head is an item."""

    problem: SparseProblem
    q: jax.ShapeDtypeStruct
    blocks: int
    listed: int
    config: SparseForwardConfig

    @property
    def count(self) -> int:
        """Of all heads and batch entries."""
        return self.q.shape[0] * self.q.shape[2] * self.blocks

    @property
    def persistent(self) -> int:
        """Persistent blocks."""
        return min(self.config.blocks, self.count)

    @property
    def stride(self) -> int:
        """From an item of a warpgroup to its next: blocks are at one head at a time, whose keys L2 holds."""
        return self.persistent * GROUPS

    def copies(self, size: int) -> int:
        """How many copies a tile of so many rows comes in: one if it fills what it is copied to."""
        return 1 if size == ROWS else self.q.shape[3]


class Block(PersistentBlock):
    """A persistent block: the arrays, its shared memory, and the items of its warpgroups."""

    def __init__(self, items: Items, given: Given) -> None:
        super().__init__(given)
        scratch = given.scratch
        self.items, self.config, self.problem = items, items.config, items.problem
        self.slabs, self.dtype = items.q.shape[3], items.q.dtype
        self.factor = items.problem.scale * LOG2E
        self.q, self.k, self.v, self.starts, self.first, self.count = given.inputs
        self.out, self.lse = given.outputs
        self.lse_out, self.q_full, self.q_free = scratch.lse, scratch.q_full, scratch.q_free
        self.full, self.free = scratch.full, scratch.free
        (self.q_mma, self.tile_mma), (self.q_in, self.tile_in) = shared.tile_views(scratch.tiles)
        self.warpgroup = self.group
        self.group = lax.rem(self.warpgroup, GROUPS)  # whose items these are
        self.begin = self.group * items.persistent + self.block
        self.turns = lax.div(items.count - self.begin + items.stride - 1, items.stride)

    def steps(self, item: Index) -> Index:
        """How many blocks of keys an item's list has."""
        return self.count[jnp.minimum(item, self.items.count - 1)]

    def place(self, item: Index) -> tuple[Index, Index, Index]:
        """Head and batch entry as one number, the item's first query and one past its last."""
        x = lax.div(item, self.items.blocks)
        return x, self.starts[item + x], self.starts[item + x + 1]  # a head has one start more than blocks

    def slot(self, position: Index) -> Index:
        """Where this warpgroup's tile of a position is: keys and values in turn, of all its items."""
        return self.group * self.config.tiles + lax.rem(position, self.config.tiles)

    def compute(self) -> None:
        """What a computing warpgroup does."""
        plgpu.set_max_registers(REGISTERS[0], action="increase")
        self.clear()
        plgpu.barrier_arrive(self.q_free.at[self.group])
        for n in range(self.config.tiles):
            plgpu.barrier_arrive(self.free.at[self.slot(n)])

        def item(t, carry):
            done, steps = carry
            i = self.begin + t * self.items.stride
            following, place = self.steps(i + self.items.stride), self.place(i)
            plgpu.barrier_wait(self.q_full.at[self.group])

            def step(n, sums):
                return self.step(n, 2 * (done + n), sums)

            self.store(lax.fori_loop(0, steps, step, self.none()))
            self.send(place)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(self.q_free.at[self.group])
            return done + steps, following

        lax.fori_loop(0, self.turns, item, (jnp.int32(0), self.steps(self.begin)))
        plgpu.wait_smem_to_gmem(0)

    def clear(self) -> None:
        """Zeros for the rows that no copy fills."""
        zeros = plgpu.layout_cast(jnp.zeros((ROWS, SLAB), self.dtype), plgpu.Layout.WGMMA)
        for m in range(self.slabs):
            if self.problem.rows < ROWS:
                self.q_mma[self.group, m] = zeros
            for n in range(self.config.tiles if self.problem.columns < ROWS else 0):
                self.tile_mma[self.slot(n), m] = zeros
        plgpu.commit_smem()

    def none(self) -> Sums:
        """Sums of nothing."""
        layout = plgpu.Layout.WGMMA
        top = plgpu.layout_cast(jnp.full((ROWS,), LOWEST, jnp.float32), layout.reduce(1))
        total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))
        out = [plgpu.layout_cast(jnp.zeros((ROWS, SLAB), jnp.float32), layout) for _ in range(self.slabs)]
        return top, total, *out

    def step(self, n: Index, position: Index, sums: Sums) -> Sums:
        """Adds a block of keys, whose tile is at a position and whose values' is at the next one."""
        k_slot, v_slot = self.slot(position), self.slot(position + 1)
        group = shared.unhoisted(self.group, n)
        top, total, *out = sums
        plgpu.barrier_wait(self.full.at[k_slot])

        def scores(acc):
            for m in range(self.slabs):
                plgpu.wgmma(acc, self.q_mma.at[group, m], self.tile_mma.at[k_slot, m].transpose((1, 0)))
            return acc[...]

        s = pl.run_scoped(scores, plgpu.WGMMAAccumulatorRef((ROWS, ROWS), jnp.float32))
        plgpu.barrier_arrive(self.free.at[k_slot])
        if self.problem.columns < ROWS:
            column = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
            s = jnp.where(column < self.problem.columns, s, LOWEST)
        new_top = jnp.maximum(top, s.max(axis=1))
        shrink = jnp.exp2((top - new_top) * self.factor)
        p = jnp.exp2(s * self.factor - lax.broadcast_in_dim(new_top * self.factor, s.shape, [0]))
        total = total * shrink + p.sum(axis=1)
        out = [x * lax.broadcast_in_dim(shrink, x.shape, [0]) for x in out]
        p = p.astype(self.dtype)
        plgpu.barrier_wait(self.full.at[v_slot])

        def products(accs):
            for m in range(self.slabs):
                plgpu.wgmma(accs[m], p, self.tile_mma.at[v_slot, m])

        out = shared.accumulate(products, out)
        plgpu.barrier_arrive(self.free.at[v_slot])
        return new_top, total, *out

    def store(self, sums: Sums) -> None:
        """The output replaces the item's queries; and the log-sum-exp."""
        top, total, *out = sums
        none = total == 0.0
        inverse = jnp.where(none, 0.0, 1.0 / jnp.where(none, 1.0, total))
        plgpu.commit_smem()  # every warp has read its rows of the queries
        for m in range(self.slabs):
            value = out[m] * lax.broadcast_in_dim(inverse, out[m].shape, [0])
            self.q_mma[self.group, m] = value.astype(self.dtype)
        lse = top * self.factor + jnp.log2(jnp.where(none, 1.0, total))
        self.lse_out[self.group] = jnp.where(none, jnp.inf, lse)
        plgpu.commit_smem()

    def send(self, place: tuple[Index, Index, Index]) -> None:
        """Starts the copies of what `store` left, unless the block is empty."""
        _, tokens, heads, _, _ = self.items.q.shape
        x, start, end = place
        rows = self.problem.rows

        @pl.when(end > start)
        def _():
            entry, head, span = lax.div(x, heads), lax.rem(x, heads), pl.ds(start, rows)
            if rows == ROWS:
                source = self.q_in.at[self.group].transpose((1, 0, 2))
                plgpu.copy_smem_to_gmem(source, self.out.at[entry, span, head])
            for m in range(self.slabs if rows < ROWS else 0):
                source = self.q_in.at[self.group, m, pl.ds(0, rows)]
                plgpu.copy_smem_to_gmem(source, self.out.at[entry, span, head, m])
            source = self.lse_out.at[self.group, pl.ds(0, rows)]
            plgpu.copy_smem_to_gmem(source, self.lse.at[pl.ds(x * tokens + start, rows)])

    def load(self) -> None:
        """What a loading warpgroup does: an item's queries, then keys and values of each block of its list."""
        problem, heads, listed = self.problem, self.items.q.shape[2], self.items.listed
        plgpu.set_max_registers(REGISTERS[1], action="decrease")

        def item(t, done):
            i = self.begin + t * self.items.stride
            (x, start, _), steps, first = self.place(i), self.steps(i), self.first[i * listed]
            entry, head = lax.div(x, heads), lax.rem(x, heads)
            start = jnp.minimum(start, self.items.q.shape[1] - problem.rows)  # of an empty block at the end
            plgpu.barrier_wait(self.q_free.at[self.group])
            target, arrived = self.q_in.at[self.group], self.q_full.at[self.group]
            self.copy(self.q, (entry, start, head), problem.rows, target, arrived)

            def step(n, first):
                following = self.first[i * listed + jnp.minimum(n + 1, listed - 1)]
                for part, source in enumerate((self.k, self.v)):
                    slot = self.slot(2 * (done + n) + part)
                    plgpu.barrier_wait(self.free.at[slot])
                    target, arrived = self.tile_in.at[slot], self.full.at[slot]
                    self.copy(source, (entry, first, head), problem.columns, target, arrived)
                return following

            lax.fori_loop(0, steps, step, first)
            return done + steps

        lax.fori_loop(0, self.turns, item, jnp.int32(0))
        plgpu.barrier_wait(self.q_free.at[self.group])
        for n in range(self.config.tiles):
            plgpu.barrier_wait(self.free.at[self.slot(n)])

    def copy(self, source: Ref, place: Sequence[Index], size: int, target: Ref, arrived: Ref) -> None:
        """Starts the copies of so many tokens of a head, from a batch entry and token on, to slabs of 64 rows."""
        entry, start, head = place
        box = source.at[entry, pl.ds(start, size), head]  # [size, D/64, 64]
        if size == ROWS:
            plgpu.copy_gmem_to_smem(box, target.transpose((1, 0, 2)), arrived)
            return
        for m in range(self.slabs):
            plgpu.copy_gmem_to_smem(box.at[:, m], target.at[m, pl.ds(0, size)], arrived)


def forward(
    problem: SparseProblem,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: Side,
    *,
    config: SparseForwardConfig = SparseForwardConfig(),
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp.

    Args:
        problem: Even blocks of up to 64 queries and 64 keys.
        q: [B, Nq, H, D], D a multiple of 64.
        k: [B, Nk, H, D].
        v: [B, Nk, H, D].
        queries: Blocks of queries and their lists.
        config: Sizes.

    Returns:
        out [B, Nq, H, D] in q's dtype and lse float32 [B, H, Nq], to the base 2, infinite where no key is seen.
    """
    batch, tokens, heads, _ = q.shape
    arrays = [x.reshape(*x.shape[:3], -1, SLAB) for x in (q, k, v)]
    struct = jax.ShapeDtypeStruct(arrays[0].shape, q.dtype)
    _, _, blocks, listed = queries.first.shape
    role = sparse_forward_role(problem, struct, blocks, listed, config)
    lists = [x.reshape(-1) for x in (queries.starts, queries.first, queries.count)]
    out, lse = launch(role, [*arrays, *lists])
    return out.reshape(q.shape), lse.reshape(batch, heads, tokens)
