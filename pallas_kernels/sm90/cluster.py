"""What blocks of a cluster need in order to work together and Pallas has no words for, in PTX.

Barriers that blocks share, stores into another block's memory, and steps of `fused` on registers. A barrier is 8
bytes of an int32 reference. All but `initialise` and `synchronise` are called by whole warpgroups. Arrays in registers
are laid out as `plgpu.Layout.WGMMA`: of every 8 x 8 block of its warp's rows a thread has columns 2p and 2p + 1 of row
lane / 4, where p = lane % 4.

alpha and Y travel with the columns of D in another order. In every 32 of them, what a thread has of a row, columns
8n + 2p and 8n + 2p + 1 for n = 0..3, is put together at 8p: 16 bytes to send at once. Exchanging n and p twice is
nothing: `put` finds the columns of O in order, and `exchange` does the same to Q.
"""

import functools
import importlib
from collections.abc import Sequence

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector
from jaxtyping import Array, Float, Float32

from monarchrt.pallas_kernels.sm90 import ptx
from monarchrt.pallas_kernels.sm90.config import CLUSTER_VECTORS, ROWS, FusedConfig
from monarchrt.pallas_kernels.sm90.types import Index, Ref

wgmma = importlib.import_module("jax.experimental.mosaic.gpu.wgmma")  # the package has a function of this name

LAYOUT = plgpu.Layout.WGMMA
LINE = 128  # bytes of a row of a slab
SLAB_BYTES = CLUSTER_VECTORS * LINE  # alpha or Y of the key rows of a warpgroup's columns, 64 of D
PART_BYTES = 2 * SLAB_BYTES  # all of D
STAGE_BYTES = 2 * PART_BYTES
TILE_SLAB = ROWS * LINE  # 64 rows of a slab


# --- barriers -------------------------------------------------------------------------------------------------------


def synchronise() -> None:
    """Waits until all threads of the cluster are here."""

    @ptx.inline()
    def run():
        ptx.asm("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", constraints="~{memory}")

    run()


def initialise(barriers: Ref, counts: Sequence[int]) -> None:
    """Sets barrier n to complete at counts[n] arrivals; for the whole block, before `synchronise`."""

    @ptx.inline(ptx.REF)
    def run(barriers):
        first = ptx.flag(arith.cmpi(arith.CmpIPredicate.eq, ptx.thread(), ptx.constant(0)))
        for n, count in enumerate(counts):
            ptx.asm(
                "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p mbarrier.init.shared.b64 [$0], $1; }",
                ptx.add(ptx.address(barriers), ptx.constant(8 * n)),
                ptx.constant(count),
                first,
                constraints="r,r,r,~{memory}",
            )
        ptx.asm("fence.mbarrier_init.release.cluster;", constraints="~{memory}")

    run(barriers)


def wait(barriers: Ref, n: Index, parity: Index) -> None:
    """Waits for the completion of barrier n's phase of this parity."""

    @ptx.inline(ptx.REF, ptx.INT, ptx.INT)
    def run(barriers, n, parity):
        ptx.asm(
            "{ .reg .pred p; again${:uid}: "
            "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra again${:uid}; }",
            ptx.add(ptx.address(barriers), ptx.times(ptx.scalar(n), 8)),
            ptx.scalar(parity),
            constraints="r,r,~{memory}",
        )

    run(barriers, jnp.int32(n), jnp.int32(parity))


def expect(barriers: Ref, n: Index, size: int) -> None:
    """One thread arrives at barrier n, whose phase then also waits for `size` bytes from other blocks."""

    @ptx.inline(ptx.REF, ptx.INT)
    def run(barriers, n):
        first = ptx.flag(arith.cmpi(arith.CmpIPredicate.eq, ptx.part(ptx.thread(), 0, 7), ptx.constant(0)))
        ptx.asm(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1; }",
            ptx.add(ptx.address(barriers), ptx.times(ptx.scalar(n), 8)),
            ptx.constant(size),
            first,
            constraints="r,r,r,~{memory}",
        )

    run(barriers, jnp.int32(n))


def give_back(barriers: Ref, n: Index, blocks: int) -> None:
    """Arrives once at barrier n of each of the cluster's blocks, when the warpgroup has read what they will write over.

    Nothing was written that others must see, so the arrivals are relaxed: releasing costs 1,300 cycles on an H200.
    """

    @ptx.inline(ptx.REF, ptx.INT)
    def run(barriers, n):
        utils.warpgroup_barrier()
        lane = ptx.part(ptx.thread(), 0, 7)
        to = ptx.peer(
            ptx.add(ptx.address(barriers), ptx.times(ptx.scalar(n), 8)), ptx.part(lane, 0, blocks.bit_length() - 1)
        )
        ptx.asm(
            "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [$0]; }",
            to,
            ptx.flag(ptx.below(lane, blocks)),
            constraints="r,r,~{memory}",
        )

    run(barriers, jnp.int32(n))


# --- stores into other blocks ---------------------------------------------------------------------------------------

_STORE = "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"


def _owners(form: FusedConfig, warp: ir.Value, lane: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """The blocks that own columns j = 16 * warp + lane / 4 and 8 more, and which of their columns these are."""
    if form.columns & (form.columns - 1) == 0:
        bits = form.columns.bit_length() - 1
        column = ptx.part(lane, 2, bits)
        first = ptx.add(ptx.times(warp, 16 // form.columns), ptx.part(lane, 2 + bits, 3 - bits))
        return [(ptx.add(first, ptx.constant(half * (8 // form.columns))), column) for half in range(2)]
    found = []
    for half in range(2):
        j = ptx.add(ptx.times(warp, 16), ptx.part(lane, 2, 3), ptx.constant(8 * half))
        owner = arith.shrui(ptx.times(j, -(-256 // form.columns)), ptx.constant(8))  # j / 7 below 64
        found.append((owner, arith.subi(j, ptx.times(owner, form.columns))))
    return found


def _vector(form: FusedConfig, column: ir.Value, block: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Which warpgroup sums a column of its owner's, and where the key row of `block` is among its vectors."""
    bits = form.together.bit_length() - 1
    return arith.shrui(column, ptx.constant(bits)), ptx.add(ptx.times(ptx.part(column, 0, bits), form.blocks), block)


def send(
    barriers: Ref,
    n: Index,
    target: Ref,
    block: Index,
    owners: int,
    values: Float[Array, "64 64"],
    *,
    stage: Index,
    slab: int,
    form: FusedConfig,
) -> None:
    """Sends rows j of alpha or Y, for key row `block` of a step, to the blocks that own the columns.

    Args:
        barriers: Barrier n of the owner waits for the bytes.
        n: See above.
        target: int32 view of [stages, 2 warpgroups, 2 slabs, 32 vectors, 64], swizzled; a warpgroup's vectors are its
            columns' key rows.
        block: This block's rank.
        owners: Blocks that own columns.
        values: [64, 64] in 16 bits, rows j.
        stage: Which of the stages.
        slab: Which of the slabs.
        form: Of the cluster.
    """

    @ptx.inline(ptx.REF, ptx.REF, ptx.INT, ptx.INT, ptx.INT, LAYOUT)
    def run(barriers, target, n, block, stage, values):
        block, thread = ptx.scalar(block), ptx.thread()
        warp, lane = ptx.part(thread, 5, 2), ptx.part(thread, 0, 5)
        part = ptx.part(lane, 0, 2)  # of four chunks
        for half, (owner, column) in enumerate(_owners(form, warp, lane)):
            group, row = _vector(form, column, block)
            offset = ptx.add(
                ptx.times(ptx.scalar(stage), STAGE_BYTES), ptx.times(group, PART_BYTES), ptx.times(row, LINE)
            )
            barrier = ptx.add(ptx.peer(ptx.address(barriers), owner), ptx.times(ptx.scalar(n), 8))
            to = ptx.add(ptx.peer(ptx.address(target), owner), offset, ptx.constant(slab * SLAB_BYTES))
            for g in range(2):
                ptx.asm(
                    _STORE + ".v4.b32 [$0], {$3, $4, $5, $6}, [$2]; }",
                    ptx.add(to, ptx.swizzled(ptx.add(part, ptx.constant(4 * g)), block)),
                    ptx.flag(ptx.below(owner, owners)),
                    barrier,
                    *ptx.registers(values, (2 * (4 * g + m) + half for m in range(4))),
                    constraints="r,r,r,r,r,r,r,~{memory}",
                )

    run(barriers, target, jnp.int32(n), jnp.int32(block), jnp.int32(stage), values)


def send_entropies(
    barriers: Ref,
    n: Index,
    target: Ref,
    block: Index,
    owners: int,
    values: Float32[Array, "64"],
    *,
    stage: Index,
    form: FusedConfig,
) -> None:
    """Sends c_L [64] of rows j, as `send`, to [stages, 2 warpgroups, 32 vectors] in float32."""

    @ptx.inline(ptx.REF, ptx.REF, ptx.INT, ptx.INT, ptx.INT, LAYOUT.reduce(1))
    def run(barriers, target, n, block, stage, values):
        thread = ptx.thread()
        warp, lane = ptx.part(thread, 5, 2), ptx.part(thread, 0, 5)
        base = ptx.add(ptx.address(target), ptx.times(ptx.scalar(stage), 2 * 4 * CLUSTER_VECTORS))
        for half, (owner, column) in enumerate(_owners(form, warp, lane)):
            group, row = _vector(form, column, ptx.scalar(block))
            to = ptx.add(base, ptx.times(group, 4 * CLUSTER_VECTORS), ptx.times(row, 4))
            first = arith.cmpi(arith.CmpIPredicate.eq, ptx.part(lane, 0, 2), ptx.constant(0))
            ptx.asm(
                _STORE + ".b32 [$0], $3, [$2]; }",
                ptx.peer(to, owner),
                ptx.flag(arith.andi(ptx.below(owner, owners), first)),
                ptx.add(ptx.peer(ptx.address(barriers), owner), ptx.times(ptx.scalar(n), 8)),
                utils.bitcast(values.registers.flat[half], ptx.i32()),
                constraints="r,r,r,r,~{memory}",
            )

    run(barriers, target, jnp.int32(n), jnp.int32(block), jnp.int32(stage), values)


# --- products in flight ---------------------------------------------------------------------------------------------


def start_product(p: Float[Array, "64 64"], keys: Ref, at: Index) -> Float32[Array, "64 64"]:
    """Starts p [64, 64] @ a slab [64 l, 64 d] of K or V, from byte `at` of `keys` on; `finish_product` gives it.

    Pallas waits for every product before it hands out one. Between the two nothing may touch what comes back.
    """

    @ptx.inline(LAYOUT, ptx.REF, ptx.INT, returns=plgpu.ShapeDtypeStruct((ROWS, 64), jnp.float32, LAYOUT))
    def run(p, keys, at):
        i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
        start = arith.shrui(
            arith.andi(ptx.add(ptx.address(keys), ptx.scalar(at)), ptx.constant(0x3FFFF)), ptx.constant(4)
        )
        fields = (8 * LINE >> 4) << 16 | (8 * LINE >> 4) << 32 | 1 << 62  # matrix descriptor, as in `add_products`
        descriptor = arith.ori(arith.extui(i64, start), arith.constant(i64, ir.IntegerAttr.get(i64, fields)))
        count, steps = 32, 4
        kind = "f16" if isinstance(p.mlir_dtype, ir.F16Type) else "bf16"
        results = ",".join(f"${n}" for n in range(count))
        text = (
            "{ .reg .pred no, yes; .reg .b64 d; setp.ne.b32 no, 0, 0; setp.eq.b32 yes, 0, 0; wgmma.fence.sync.aligned; "
        )
        for n in range(steps):
            factors = ",".join(f"${count + 4 * n + m}" for m in range(4))
            text += f"add.s64 d, ${count + 4 * steps}, {n * (16 * LINE >> 4)}; "
            text += f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{kind}.{kind} {{{results}}}, {{{factors}}}, d, "
            text += f"{'yes' if n else 'no'}, 1, 1, 1; "
        text += "wgmma.commit_group.sync.aligned; }"
        constraints = ",".join(["=&f"] * count + ["r"] * (4 * steps) + ["l"])
        factors, result = [*ptx.registers(p, range(4 * steps)), descriptor], llvm.StructType.get_literal([f32] * count)
        made = ptx.unpack(ptx.asm(text, *factors, constraints=constraints, result=result), count, f32)
        pairs = [vector.from_elements(ir.VectorType.get((2,), f32), made[n : n + 2]) for n in range(0, count, 2)]
        lead, _, *rest = p.registers.shape
        return ptx.array(pairs, p, (lead, 8, *rest))

    return run(p, keys, jnp.int32(at))


def finish_product(made: Float32[Array, "64 64"], pending: int) -> Float32[Array, "64 64"]:
    """What a product gave, when at most `pending` later ones are still under way."""

    @ptx.inline(LAYOUT, returns=plgpu.ShapeDtypeStruct(made.shape, jnp.float32, LAYOUT))
    def run(made):
        ptx.asm(f"wgmma.wait_group.sync.aligned {pending};", constraints="~{memory}")
        return fa.optimization_barrier(made)

    return run(made)


# --- steps on registers ---------------------------------------------------------------------------------------------

_LOAD = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
_PUT = "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"


def exchange(tile: Ref, at: Index) -> None:
    """Puts the columns of Q, [2 slabs, 64 rows, 64] from byte `at` of `tile` on, in the order of alpha's."""

    @ptx.inline(ptx.REF, ptx.INT)
    def run(tile, at):
        thread = ptx.part(ptx.thread(), 0, 7)
        row = ptx.part(thread, 0, 6)
        base = ptx.add(
            ptx.address(tile), ptx.scalar(at), ptx.times(ptx.part(thread, 6, 1), TILE_SLAB), ptx.times(row, LINE)
        )
        for g in range(2):
            places = [ptx.add(base, ptx.swizzled(ptx.constant(4 * g + n), row)) for n in range(4)]
            loaded = [
                ptx.unpack(ptx.asm(_LOAD, x, constraints="=r,=r,=r,=r,r,~{memory}", result=ptx.four()), 4)
                for x in places
            ]
            for p, place in enumerate(places):
                ptx.asm(_PUT, place, *(loaded[n][p] for n in range(4)), constraints="r,r,r,r,r,~{memory}")

    run(tile, jnp.int32(at))


def put(tile: Ref, at: Index, values: Float[Array, "64 128"]) -> None:
    """Writes O [64, 128] in 16 bits, whose columns are as Y's, in their right order to where Q was."""

    @ptx.inline(ptx.REF, ptx.INT, LAYOUT)
    def run(tile, at, values):
        thread = ptx.part(ptx.thread(), 0, 7)
        lane = ptx.part(thread, 0, 5)
        for half in range(2):
            row = ptx.add(ptx.times(ptx.part(thread, 5, 2), 16), ptx.part(lane, 2, 3), ptx.constant(8 * half))
            base = ptx.add(ptx.address(tile), ptx.scalar(at), ptx.times(row, LINE))
            for g in range(4):
                chunk = ptx.add(ptx.part(lane, 0, 2), ptx.constant(4 * (g % 2)))
                place = ptx.add(base, ptx.swizzled(chunk, row), ptx.constant(TILE_SLAB * (g // 2)))
                registers = ptx.registers(values, (2 * (4 * g + m) + half for m in range(4)))
                ptx.asm(_PUT, place, *registers, constraints="r,r,r,r,r,~{memory}")

    run(tile, jnp.int32(at), values)


def _column(together: int) -> ir.Value:
    """Which of a warpgroup's columns this thread's rows are of."""
    bits = together.bit_length() - 1
    return ptx.part(ptx.thread(), 7 - bits, bits)


def _chosen(among: Sequence[ir.Value], n: ir.Value) -> ir.Value:
    """The n-th, by selects."""
    found = among[0]
    for m, x in enumerate(among[1:], 1):
        found = arith.select(arith.cmpi(arith.CmpIPredicate.eq, n, ptx.constant(m)), x, found)
    return found


def logits(
    products: Float32[Array, "64 32"], entropies: Ref, at: Index, scale: float, together: int
) -> Float32[Array, "64 ..."]:
    """The scores of L of the columns: of each row the part of the products that is its column's, scaled, less c_L.

    Args:
        products: [64, 32] float32: rows i of one column after another; key rows of one column after another.
        entropies: c_L, in float32; the columns' are at byte `at`, 32 of them.
        at: See above.
        scale: Multiplies the products.
        together: Columns.

    Returns:
        [64, 32 / together] float32.
    """
    depth = CLUSTER_VECTORS // together

    @ptx.inline(LAYOUT, ptx.REF, ptx.INT, returns=plgpu.ShapeDtypeStruct((ROWS, depth), jnp.float32, LAYOUT))
    def run(products, entropies, at):
        column = _column(together)
        base = ptx.add(
            ptx.address(entropies),
            ptx.scalar(at),
            ptx.times(column, 4 * depth),
            ptx.times(ptx.part(ptx.thread(), 0, 2), 8),
        )
        f32 = ir.F32Type.get()
        two = ir.VectorType.get((2,), f32)
        pair = llvm.StructType.get_literal([f32] * 2)
        factor = vector.broadcast(two, ptx.float32(scale))
        x, made = products.registers.flat, []
        for n in range(depth // 8):
            place, load = ptx.add(base, ptx.constant(32 * n)), "ld.shared.v2.f32 {$0, $1}, [$2];"
            c = ptx.asm(load, place, constraints="=f,=f,r,~{memory}", result=pair)
            c = vector.from_elements(two, ptx.unpack(c, 2, f32))
            for half in range(2):
                mine = _chosen([x[2 * (m * depth // 8 + n) + half] for m in range(together)], column)
                made.append(arith.subf(arith.mulf(mine, factor), c))
        lead, _, *rest = products.registers.shape
        return ptx.array(made, products, (lead, depth // 8, *rest))

    return run(products, entropies, jnp.int32(at))


def softmax_step(
    scores: Float32[Array, "64 ..."],
    top: Float32[Array, "64"],
    total: Float32[Array, "64 8"],
    sums: Float32[Array, "64 128"],
    dtype: DTypeLike,
) -> tuple[Float[Array, "64 32"], Float32[Array, "64"], Float32[Array, "64 8"], Float32[Array, "64 128"]]:
    """One step of a softmax over key rows.

    A row's `top` follows its largest score only where that is more than 2^8 larger, so that most steps neither compare
    across lanes nor rescale; weights are then at most 2^8 as large, and the sums of them too.

    Args:
        scores: [64, 16] or [64, 8] float32, of powers of 2: rows i of two or four columns.
        top: [64] float32, what is subtracted from scores.
        total: [64, 8] float32, sums of weights so far, to be added up at the end.
        sums: [64, 128] float32, weighted sums of Y so far.
        dtype: Of the weights.

    Returns:
        Weights [64, 32] for the key rows of one column after another, zero for the other columns'; then what top,
        total and sums have become.
    """
    low, wide = jnp.dtype(dtype), jnp.dtype(jnp.float32)
    blocks = scores.shape[1] // 8  # of 8 key rows
    together = CLUSTER_VECTORS // scores.shape[1]
    returned = (
        plgpu.ShapeDtypeStruct((ROWS, CLUSTER_VECTORS), low, LAYOUT),
        plgpu.ShapeDtypeStruct((ROWS,), wide, LAYOUT.reduce(1)),
        plgpu.ShapeDtypeStruct((ROWS, 8), wide, LAYOUT),
        plgpu.ShapeDtypeStruct(sums.shape, wide, LAYOUT),
    )

    @ptx.inline(LAYOUT, LAYOUT.reduce(1), LAYOUT, LAYOUT, returns=returned)
    def run(scores, top, total, sums):
        f32 = ir.F32Type.get()
        two = ir.VectorType.get((2,), f32)
        column = _column(together)
        x = scores.registers.flat
        rows = [
            [vector.extract(x[2 * n + half], [], [m]) for n in range(blocks) for m in range(2)] for half in range(2)
        ]
        tops = [t if t.type == f32 else vector.extract(t, [], [0]) for t in top.registers.flat]
        most = [functools.reduce(arith.maximumf, row) for row in rows]
        limits = (arith.addf(t, ptx.float32(8.0)) for t in tops)
        above = (arith.cmpf(arith.CmpFPredicate.OGT, *pair) for pair in zip(most, limits, strict=True))
        state = [*tops, *total.registers.flat, *sums.registers.flat]
        branch = scf.IfOp(ptx.any_lane(arith.ori(*above)), [s.type for s in state], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            new = [arith.maximumf(ptx.of_four(m), t) for m, t in zip(most, tops, strict=True)]
            by = [vector.broadcast(two, ptx.power(arith.subf(t, n))) for t, n in zip(tops, new, strict=True)]
            scf.yield_([*new, *(arith.mulf(s, by[n % 2]) for n, s in enumerate(state[2:]))])
        with ir.InsertionPoint(branch.else_block):  # pyright: ignore[reportArgumentType, reportCallIssue]
            scf.yield_(state)
        tops, totals, scaled = branch.results[:2], list(branch.results[2:4]), branch.results[4:]
        narrow = ir.VectorType.get((2,), utils.dtype_to_ir_type(low))
        nothing = vector.broadcast(two, ptx.float32(0.0))
        weights: list = [None] * 8
        mine = [arith.cmpi(arith.CmpIPredicate.eq, column, ptx.constant(m)) for m in range(together)]
        for half in range(2):
            for n in range(blocks):
                pair = [ptx.power(arith.subf(s, tops[half])) for s in rows[half][2 * n : 2 * n + 2]]
                p = vector.from_elements(two, pair)
                totals[half] = arith.addf(totals[half], p)
                for m in range(together):
                    weights[2 * (m * blocks + n) + half] = arith.truncf(narrow, arith.select(mine[m], p, nothing))
        kinds = (x.type for x in top.registers.flat)
        tops = [t if kind == f32 else vector.broadcast(kind, t) for kind, t in zip(kinds, tops, strict=True)]
        lead, _, *rest = scores.registers.shape
        shape = (lead, 4, *rest)
        return (
            ptx.array(weights, scores, shape),
            ptx.array(tops, top),
            ptx.array(totals, total),
            ptx.array(scaled, sums),
        )

    return run(scores, top, total, sums)


def add_products(
    sums: Float32[Array, "64 128"], weights: Float[Array, "64 32"], y: Ref, at: Index
) -> Float32[Array, "64 128"]:
    """sums [64, 128] + weights [64, 32] @ Y [32, 128], its two slabs [32, 64] from byte `at` of y on.

    Pallas would have a product of depth 32 take 64-byte swizzled rows of Y, which alpha's are not.
    """

    @ptx.inline(LAYOUT, LAYOUT, ptx.REF, ptx.INT, returns=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, LAYOUT))
    def run(sums, weights, y, at):
        i64 = ir.IntegerType.get_signless(64)
        sums = wgmma.WGMMAAccumulator.from_registers(sums)
        weights = wgmma.wgmma_fence(weights)
        start = arith.shrui(arith.andi(ptx.add(ptx.address(y), ptx.scalar(at)), ptx.constant(0x3FFFF)), ptx.constant(4))
        # matrix descriptor: bytes / 16 to the next 64 columns and to the next 8 rows; 128-byte swizzle
        fields = (SLAB_BYTES >> 4) << 16 | (8 * LINE >> 4) << 32 | 1 << 62
        descriptor = arith.ori(arith.extui(i64, start), arith.constant(i64, ir.IntegerAttr.get(i64, fields)))
        kind, depth, instruction = weights.mlir_dtype, CLUSTER_VECTORS, 16 * LINE
        registers = wgmma.wgmma_m64(
            sums._value.registers, weights, descriptor, None, True, None, instruction, 128, 2 * depth, kind, kind
        )
        ptx.asm("wgmma.commit_group.sync.aligned;", constraints="")
        ptx.asm("wgmma.wait_group.sync.aligned 0;", constraints="")
        made = ptx.array(registers.flat, sums._value)
        return fa.optimization_barrier(made).to_layout(sums._original_layout)

    return run(sums, weights, y, jnp.int32(at))
