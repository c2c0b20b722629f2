"""Back through L of a refinement step before the last, on Hopper, where one warpgroup holds dQ of all rows (b1 to 96).

What leaves such a step are not sums of Y but the next step's queries u[n] = f[n] sum_i P[n, i] Q[i], n = (c, k). From
their gradients du, with g[n] = <du[n], u[n]> (zero where f is at its limit),

    dP = f (<du, Q> - g),    dX = P (dP - delta),    d_alpha = s dX^T Q,    d_c = -sum_i dX,
    dQ = s dX alpha + f P du,

delta[i] = sum_n P dP being known. So this is `left_backward_independent` with du in Y's place and Q in that of dO,
without dY and with one product more for dQ.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels.sm90 import shared
from monarchrt.pallas_kernels.sm90.config import ROWS, SLAB, LeftBackwardConfig
from monarchrt.pallas_kernels.sm90.left_backward_independent import Block
from monarchrt.pallas_kernels.sm90.left_backward_items import (
    Items,
    load_in_order,
    padded,
    probabilities,
    scores_gradient,
    seen_bias,
)
from monarchrt.pallas_kernels.sm90.roles import Given, Role, specialised
from monarchrt.pallas_kernels.sm90.types import Flag, Index, Place, Ref, Rows, Slabs, Tile


def left_refine_backward_role(
    q: jax.ShapeDtypeStruct,
    pairs: int,
    *,
    scale: float,
    heads: int,
    tiles: int,
    masked: bool,
    config: LeftBackwardConfig,
) -> Role:
    """Takes gradients of the next step's queries back through L, for a chunk of query tiles and heads.

    Inputs of the role: q [B, A, b1, b2*H, D/64, 64]; alpha and du [X, C*b1, b2, D/64, 64], X = B * heads * tiles, du
    finite up to the next multiple of 64 pairs; c_L, f and g, each as `right_role` leaves c_L; stats float32
    [B * heads, tiles, b2, 2, `config.width`], the log-sum-exp in units of log 2, infinite beyond b1, and delta times
    the scale; limits, int32 [A], the pairs that a query tile sees, read when `masked`; start, int32 [3], the chunk's
    first head and query tile.

    Outputs: the gradients of alpha and of c_L and the part of dq, each as `left_backward_role` with `independent`.

    Args:
        q: [B, A, b1, b2, H, D], before its last axes are split.
        pairs: C*b1.
        scale: Softmax scale, not 0.
        heads: Heads of the chunk.
        tiles: Query tiles of the chunk.
        masked: Whether limits may be below C*b1.
        config: Sizes; `independent`.

    Returns:
        The role.
    """
    slabs, width, depth = q.shape[5] // SLAB, config.width(q.shape[2]), config.depth(q.shape[2])
    groups, stages = config.warpgroups, config.stages
    items = Items(q=q, pairs=pairs, heads=heads, tiles=tiles, masked=masked, whole=False, columns=1)
    shapes = (
        (slabs, depth, SLAB),  # q
        (stages, 2, slabs, ROWS, SLAB),  # du and alpha, whose place its gradient takes
    )
    d_alpha, _, d_c, dq = items.outputs(width)
    return Role(
        specialised(lambda given: _Block(items, config, scale, given), groups),
        name="monarch_left_refine_backward",
        outputs=(d_alpha, d_c, dq),
        scratch=dict(
            tiles=shared.tile_scratch(shapes, q.dtype, SLAB),
            p=shared.tile_scratch(((groups, 2, width, ROWS),), q.dtype, SLAB),
            c=plgpu.SMEM((stages, 3, ROWS), jnp.float32),
            stats=plgpu.SMEM((2, width), jnp.float32),
            q_full=plgpu.Barrier(num_arrivals=2),
            q_free=plgpu.Barrier(num_arrivals=groups),
            full=plgpu.Barrier(num_arrivals=5, num_barriers=stages),
            free=plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            left_there=plgpu.Barrier(num_arrivals=1, num_barriers=groups),
        ),
        groups=groups,
        blocks=min(config.blocks, items.count),
    )


class _Block(Block):
    """A persistent block: the arrays, its shared memory, and its turns, a column each, past all pairs that it sees."""

    def __init__(self, items: Items, config: LeftBackwardConfig, scale: float, given: Given) -> None:
        super().__init__(items, config, scale, given)
        self.early, self.late = scale, 1.0  # of what is rounded: f P must fit beside it

    def name_arrays(self, given: Given) -> Ref:
        """See `Block`; here du is in Y's place, c_L, f and g are `numbers`, and there is no dY."""
        self.q, self.alpha, self.y, *self.numbers, self.stats, self.limits, start = given.inputs
        self.d_alpha, self.d_c, self.dq = given.outputs
        return start

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
            """Products of alpha and of du with q, [64 pairs, W]."""
            for acc, kind in ((x_acc, 1), (d_p_acc, 0)):
                for m in range(self.slabs):
                    right = self.rows_mma.at[m + zero, pl.ds(0, width)].transpose((1, 0))
                    plgpu.wgmma(acc, self.mid_mma.at[slot, kind, m], right)
            return x_acc[...], d_p_acc[...]

        x_s, d_p = pl.run_scoped(scores, *[plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32)] * 2)
        bias, factor, product = (self.c_in.at[slot, m] for m in range(3))
        p = probabilities(x_s, seen_bias(bias, i, limit), self.stats_in.at[zero], self.scale)
        factor, product = seen_number(factor, i, limit), seen_number(product, i, limit)
        wide = lax.broadcast_in_dim(factor, p.shape, [0])
        d_p = (d_p - lax.broadcast_in_dim(product, p.shape, [0])) * wide
        d_x = scores_gradient(p, d_p, self.stats_in.at[1 + zero], self.early, dtype)
        d_x = lax.optimization_barrier(d_x)  # rounded in pairs, not one by one because each is wanted alone too
        # fits the rounded d_alpha: in dR their errors cancel
        total = d_x.astype(jnp.float32).sum(axis=1) * (-1 / self.early)
        for kind, value in enumerate(((p * wide).astype(dtype), d_x)):
            turned = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
            self.p_mma.at[here, kind].transpose((1, 0))[...] = turned
        plgpu.commit_smem()

        def query(accs):
            for kind in range(2):
                for m in range(self.slabs):
                    left = self.mid_mma.at[slot, kind, m].transpose((1, 0))
                    plgpu.wgmma(accs[m], left, self.p_mma.at[here, kind].transpose((1, 0)))

        acc = shared.accumulate(query, acc)
        # by now without a wait
        pl.when((n >= self.groups) & jnp.logical_not(given))(lambda: self.leave(n - self.groups))
        self.leave_gradient(i, d_x, slot, zero, x, j)
        block_of, row = self.items.split.place(lax.rem(x, self.items.tiles), j)
        # where `right_backward` finds it with one copy per pair; after the fence, which would wait for it
        d_c = self.d_c.at[lax.div(x, self.items.tiles), block_of, pl.ds(i * ROWS, ROWS), row]
        shared.store_parts(d_c, total)
        return acc

    def leave_gradient(self, i: Index, d_x: Tile, slot: Index, zero: Index, x: Index, j: Index) -> None:
        """d_alpha of a step replaces alpha, slab by slab, and leaves."""
        plgpu.commit_smem()  # every warp has read its alpha
        factor = padded(d_x, self.depth)
        for m in range(self.slabs):

            def multiply(acc, m=m):
                plgpu.wgmma(acc, factor, self.rows_mma.at[m + zero])
                return acc[...]

            value = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, SLAB), jnp.float32))
            self.mid_mma[slot, 1, m] = value.astype(self.items.q.dtype)
        plgpu.commit_smem()
        for m in range(self.slabs):
            plgpu.copy_smem_to_gmem(self.mid_in.at[slot, 1, m], self.d_alpha.at[x, pl.ds(i * ROWS, ROWS), j, m])

    def load(self) -> None:
        """What the loading warpgroup does: du, alpha and the numbers of each step, q and the statistics of a column."""
        plgpu.set_max_registers(self.config.registers[1], action="decrease")

        def turn(t, done):
            x, where, j, limit = self.place(t)
            steps = lax.div(limit + ROWS - 1, ROWS)
            x_in, place_in = self.items.source(x, where, self.head0, self.tile0)

            def load(i):
                slot, span = lax.rem(done + i, self.stages), pl.ds(i * ROWS, ROWS)
                plgpu.barrier_wait(self.free.at[slot])
                for kind, source in enumerate((self.y, self.alpha)):
                    box = source.at[x_in, span, j]
                    plgpu.copy_gmem_to_smem(box, self.mid_in.at[slot, kind].transpose((1, 0, 2)), self.full.at[slot])
                for m, source in enumerate(self.numbers):
                    plgpu.copy_gmem_to_smem(source.at[*place_in(j), span], self.c_in.at[slot, m], self.full.at[slot])

            # a third step's place may be that of the last step before, given back in a step of this item
            load_in_order(steps, 2, load, lambda: self.load_query(x, where, j))
            return done + steps

        lax.fori_loop(0, self.turns, turn, jnp.int32(0))
        plgpu.barrier_wait(self.q_free)
        for s in range(self.stages):
            plgpu.barrier_wait(self.free.at[s])

    def load_query(self, x: Index, where: Place, j: Index) -> None:
        """Starts the copies of a column's q and statistics."""
        entry, head, tile = where
        plgpu.barrier_wait(self.q_free)
        span = pl.ds(x * 0, self.depth)  # past the end of b1 rows, so not static
        box = self.q.at[entry, self.tile0 + tile, span, j * self.items.q.shape[4] + self.head0 + head]
        plgpu.copy_gmem_to_smem(box, self.rows_in.transpose((1, 0, 2)), self.q_full)
        box = self.stats.at[entry * self.items.heads + head, tile, j, :, pl.ds(0, self.width)]
        plgpu.copy_gmem_to_smem(box, self.stats_in, self.q_full)


def seen_number(ref: Ref, step: Index, limit: Index) -> Rows:
    """The 64 numbers of a step's pairs, zero for pairs that are not seen [64]."""
    row = plgpu.Layout.WGMMA.reduce(1)
    pair = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=row) + step * ROWS
    return jnp.where(pair < limit, plgpu.load(ref, layout=row, optimized=False), 0.0)
