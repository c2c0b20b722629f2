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
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector
from jaxtyping import Array, Float, Float32

from monarchrt.pallas_kernels.sm90.config import CLUSTER_VECTORS, ROWS, FusedConfig
from monarchrt.pallas_kernels.sm90.types import Index, Ref

wgmma = importlib.import_module("jax.experimental.mosaic.gpu.wgmma")  # the package has a function of this name

LAYOUT = plgpu.Layout.WGMMA
REF, INT = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())
LINE = 128  # bytes of a row of a slab
SLAB_BYTES = CLUSTER_VECTORS * LINE  # alpha or Y of the key rows of a warpgroup's columns, 64 of D
PART_BYTES = 2 * SLAB_BYTES  # all of D
STAGE_BYTES = 2 * PART_BYTES
TILE_SLAB = ROWS * LINE  # 64 rows of a slab


def _inline(*types: Any, returns: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turns a function that writes MLIR into one that Pallas can call, on arguments of these types."""

    def decorate(function):
        return plgpu.inline_mgpu(arg_types=types, return_type=returns)(lambda _, *values: function(*values))

    return decorate


# --- words of MLIR --------------------------------------------------------------------------------------------------


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _constant(x: int) -> ir.Value:
    return arith.constant(_i32(), ir.IntegerAttr.get(_i32(), x))


def _ptx(
    text: str, *operands: ir.Value, constraints: str, result: ir.Type | None = None, pure: bool = False
) -> ir.Value:
    return llvm.inline_asm(
        result or ir.Type.parse("!llvm.void"), list(operands), text, constraints, has_side_effects=not pure
    )


def _four(kind: ir.Type | None = None) -> ir.Type:
    return llvm.StructType.get_literal([kind or _i32()] * 4)


def _unpack(struct: ir.Value, count: int, kind: ir.Type | None = None) -> list[ir.Value]:
    return [llvm.extractvalue(kind or _i32(), struct, [n]) for n in range(count)]


def _add(*terms: ir.Value) -> ir.Value:
    return functools.reduce(arith.addi, terms)


def _times(x: ir.Value, n: int) -> ir.Value:
    return arith.muli(x, _constant(n))


def _part(x: ir.Value, first: int, bits: int) -> ir.Value:
    """`bits` bits of x from bit `first` on."""
    shifted = arith.shrui(x, _constant(first)) if first else x
    return arith.andi(shifted, _constant(2**bits - 1))


def _flag(x: ir.Value) -> ir.Value:
    return arith.extui(_i32(), x)


def _below(x: ir.Value, n: int) -> ir.Value:
    return arith.cmpi(arith.CmpIPredicate.slt, x, _constant(n))


def _address(ref: ir.Value) -> ir.Value:
    return llvm.ptrtoint(_i32(), utils.memref_ptr(ref))


def _scalar(array: fa.FragmentedArray) -> ir.Value:
    [x] = array.registers.flat
    return x


def _thread() -> ir.Value:
    """Number of the thread in its block."""
    return _ptx("mov.u32 $0, %tid.x;", constraints="=r", result=_i32(), pure=True)


def _peer(address: ir.Value, block: ir.Value) -> ir.Value:
    """Where `block` of the cluster has what this block has at a shared address."""
    return _ptx("mapa.shared::cluster.u32 $0, $1, $2;", address, block, constraints="=r,r,r", result=_i32(), pure=True)


def _swizzled(chunk: ir.Value, row: ir.Value) -> ir.Value:
    """Offset of a 16-byte chunk of a row in 128-byte swizzled rows."""
    return arith.shli(arith.xori(chunk, _part(row, 0, 3)), _constant(4))


def _registers(values: fa.FragmentedArray, numbers: Iterable[int]) -> list[ir.Value]:
    """Some of an array's registers, two 16-bit elements each, as int32."""
    return [utils.bitcast(values.registers.flat[n], _i32()) for n in numbers]


def _array(
    registers: Iterable[ir.Value], like: fa.FragmentedArray, shape: tuple[int, ...] | None = None
) -> fa.FragmentedArray:
    made = np.array(list(registers), dtype=object).reshape(shape or like.registers.shape)
    return fa.FragmentedArray(_registers=made, _layout=like.layout, _is_signed=None)


def _float(x: float) -> ir.Value:
    return arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), x))


def _power(x: ir.Value) -> ir.Value:
    """2^x."""
    return _ptx("ex2.approx.ftz.f32 $0, $1;", x, constraints="=f,f", result=ir.F32Type.get(), pure=True)


def _any(x: ir.Value) -> ir.Value:
    """Whether it holds in any lane."""
    vote = "{ .reg .pred p, q; setp.ne.b32 p, $1, 0; vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }"
    voted = _ptx(vote, _flag(x), constraints="=r,r", result=_i32())
    return arith.cmpi(arith.CmpIPredicate.ne, voted, _constant(0))


def _of_four(x: ir.Value) -> ir.Value:
    """The largest x of four lanes, which have parts of the same rows."""
    for lanes in (1, 2):
        swap = "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        x = arith.maximumf(x, _ptx(swap, x, _constant(lanes), constraints="=f,f,n", result=ir.F32Type.get()))
    return x


# --- barriers -------------------------------------------------------------------------------------------------------


def synchronise() -> None:
    """Waits until all threads of the cluster are here."""

    @_inline()
    def run():
        _ptx("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", constraints="~{memory}")

    run()


def initialise(barriers: Ref, counts: Sequence[int]) -> None:
    """Sets barrier n to complete at counts[n] arrivals; for the whole block, before `synchronise`."""

    @_inline(REF)
    def run(barriers):
        first = _flag(arith.cmpi(arith.CmpIPredicate.eq, _thread(), _constant(0)))
        for n, count in enumerate(counts):
            _ptx(
                "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p mbarrier.init.shared.b64 [$0], $1; }",
                _add(_address(barriers), _constant(8 * n)),
                _constant(count),
                first,
                constraints="r,r,r,~{memory}",
            )
        _ptx("fence.mbarrier_init.release.cluster;", constraints="~{memory}")

    run(barriers)


def wait(barriers: Ref, n: Index, parity: Index) -> None:
    """Waits for the completion of barrier n's phase of this parity."""

    @_inline(REF, INT, INT)
    def run(barriers, n, parity):
        _ptx(
            "{ .reg .pred p; again${:uid}: "
            "mbarrier.try_wait.parity.shared::cta.b64 p, [$0], $1; @!p bra again${:uid}; }",
            _add(_address(barriers), _times(_scalar(n), 8)),
            _scalar(parity),
            constraints="r,r,~{memory}",
        )

    run(barriers, jnp.int32(n), jnp.int32(parity))


def expect(barriers: Ref, n: Index, size: int) -> None:
    """One thread arrives at barrier n, whose phase then also waits for `size` bytes from other blocks."""

    @_inline(REF, INT)
    def run(barriers, n):
        first = _flag(arith.cmpi(arith.CmpIPredicate.eq, _part(_thread(), 0, 7), _constant(0)))
        _ptx(
            "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p mbarrier.arrive.expect_tx.shared.b64 _, [$0], $1; }",
            _add(_address(barriers), _times(_scalar(n), 8)),
            _constant(size),
            first,
            constraints="r,r,r,~{memory}",
        )

    run(barriers, jnp.int32(n))


def give_back(barriers: Ref, n: Index, blocks: int) -> None:
    """Arrives once at barrier n of each of the cluster's blocks, when the warpgroup has read what they will write over.

    Nothing was written that others must see, so the arrivals are relaxed: releasing costs 1,300 cycles on an H200.
    """

    @_inline(REF, INT)
    def run(barriers, n):
        utils.warpgroup_barrier()
        lane = _part(_thread(), 0, 7)
        to = _peer(_add(_address(barriers), _times(_scalar(n), 8)), _part(lane, 0, blocks.bit_length() - 1))
        _ptx(
            "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [$0]; }",
            to,
            _flag(_below(lane, blocks)),
            constraints="r,r,~{memory}",
        )

    run(barriers, jnp.int32(n))


# --- stores into other blocks ---------------------------------------------------------------------------------------

_STORE = "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p st.async.weak.shared::cluster.mbarrier::complete_tx::bytes"


def _owners(form: FusedConfig, warp: ir.Value, lane: ir.Value) -> list[tuple[ir.Value, ir.Value]]:
    """The blocks that own columns j = 16 * warp + lane / 4 and 8 more, and which of their columns these are."""
    if form.columns & (form.columns - 1) == 0:
        bits = form.columns.bit_length() - 1
        column = _part(lane, 2, bits)
        first = _add(_times(warp, 16 // form.columns), _part(lane, 2 + bits, 3 - bits))
        return [(_add(first, _constant(half * (8 // form.columns))), column) for half in range(2)]
    found = []
    for half in range(2):
        j = _add(_times(warp, 16), _part(lane, 2, 3), _constant(8 * half))
        owner = arith.shrui(_times(j, -(-256 // form.columns)), _constant(8))  # j / 7 below 64
        found.append((owner, arith.subi(j, _times(owner, form.columns))))
    return found


def _vector(form: FusedConfig, column: ir.Value, block: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Which warpgroup sums a column of its owner's, and where the key row of `block` is among its vectors."""
    bits = form.together.bit_length() - 1
    return arith.shrui(column, _constant(bits)), _add(_times(_part(column, 0, bits), form.blocks), block)


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

    @_inline(REF, REF, INT, INT, INT, LAYOUT)
    def run(barriers, target, n, block, stage, values):
        block, thread = _scalar(block), _thread()
        warp, lane = _part(thread, 5, 2), _part(thread, 0, 5)
        part = _part(lane, 0, 2)  # of four chunks
        for half, (owner, column) in enumerate(_owners(form, warp, lane)):
            group, row = _vector(form, column, block)
            offset = _add(_times(_scalar(stage), STAGE_BYTES), _times(group, PART_BYTES), _times(row, LINE))
            barrier = _add(_peer(_address(barriers), owner), _times(_scalar(n), 8))
            to = _add(_peer(_address(target), owner), offset, _constant(slab * SLAB_BYTES))
            for g in range(2):
                _ptx(
                    _STORE + ".v4.b32 [$0], {$3, $4, $5, $6}, [$2]; }",
                    _add(to, _swizzled(_add(part, _constant(4 * g)), block)),
                    _flag(_below(owner, owners)),
                    barrier,
                    *_registers(values, (2 * (4 * g + m) + half for m in range(4))),
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

    @_inline(REF, REF, INT, INT, INT, LAYOUT.reduce(1))
    def run(barriers, target, n, block, stage, values):
        thread = _thread()
        warp, lane = _part(thread, 5, 2), _part(thread, 0, 5)
        base = _add(_address(target), _times(_scalar(stage), 2 * 4 * CLUSTER_VECTORS))
        for half, (owner, column) in enumerate(_owners(form, warp, lane)):
            group, row = _vector(form, column, _scalar(block))
            to = _add(base, _times(group, 4 * CLUSTER_VECTORS), _times(row, 4))
            first = arith.cmpi(arith.CmpIPredicate.eq, _part(lane, 0, 2), _constant(0))
            _ptx(
                _STORE + ".b32 [$0], $3, [$2]; }",
                _peer(to, owner),
                _flag(arith.andi(_below(owner, owners), first)),
                _add(_peer(_address(barriers), owner), _times(_scalar(n), 8)),
                utils.bitcast(values.registers.flat[half], _i32()),
                constraints="r,r,r,r,~{memory}",
            )

    run(barriers, target, jnp.int32(n), jnp.int32(block), jnp.int32(stage), values)


# --- products in flight ---------------------------------------------------------------------------------------------


def start_product(p: Float[Array, "64 64"], keys: Ref, at: Index) -> Float32[Array, "64 64"]:
    """Starts p [64, 64] @ a slab [64 l, 64 d] of K or V, from byte `at` of `keys` on; `finish_product` gives it.

    Pallas waits for every product before it hands out one. Between the two nothing may touch what comes back.
    """

    @_inline(LAYOUT, REF, INT, returns=plgpu.ShapeDtypeStruct((ROWS, 64), jnp.float32, LAYOUT))
    def run(p, keys, at):
        i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
        start = arith.shrui(arith.andi(_add(_address(keys), _scalar(at)), _constant(0x3FFFF)), _constant(4))
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
        factors, result = [*_registers(p, range(4 * steps)), descriptor], llvm.StructType.get_literal([f32] * count)
        made = _unpack(_ptx(text, *factors, constraints=constraints, result=result), count, f32)
        pairs = [vector.from_elements(ir.VectorType.get((2,), f32), made[n : n + 2]) for n in range(0, count, 2)]
        lead, _, *rest = p.registers.shape
        return _array(pairs, p, (lead, 8, *rest))

    return run(p, keys, jnp.int32(at))


def finish_product(made: Float32[Array, "64 64"], pending: int) -> Float32[Array, "64 64"]:
    """What a product gave, when at most `pending` later ones are still under way."""

    @_inline(LAYOUT, returns=plgpu.ShapeDtypeStruct(made.shape, jnp.float32, LAYOUT))
    def run(made):
        _ptx(f"wgmma.wait_group.sync.aligned {pending};", constraints="~{memory}")
        return fa.optimization_barrier(made)

    return run(made)


# --- steps on registers ---------------------------------------------------------------------------------------------

_LOAD = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
_PUT = "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"


def exchange(tile: Ref, at: Index) -> None:
    """Puts the columns of Q, [2 slabs, 64 rows, 64] from byte `at` of `tile` on, in the order of alpha's."""

    @_inline(REF, INT)
    def run(tile, at):
        thread = _part(_thread(), 0, 7)
        row = _part(thread, 0, 6)
        base = _add(_address(tile), _scalar(at), _times(_part(thread, 6, 1), TILE_SLAB), _times(row, LINE))
        for g in range(2):
            places = [_add(base, _swizzled(_constant(4 * g + n), row)) for n in range(4)]
            loaded = [_unpack(_ptx(_LOAD, x, constraints="=r,=r,=r,=r,r,~{memory}", result=_four()), 4) for x in places]
            for p, place in enumerate(places):
                _ptx(_PUT, place, *(loaded[n][p] for n in range(4)), constraints="r,r,r,r,r,~{memory}")

    run(tile, jnp.int32(at))


def put(tile: Ref, at: Index, values: Float[Array, "64 128"]) -> None:
    """Writes O [64, 128] in 16 bits, whose columns are as Y's, in their right order to where Q was."""

    @_inline(REF, INT, LAYOUT)
    def run(tile, at, values):
        thread = _part(_thread(), 0, 7)
        lane = _part(thread, 0, 5)
        for half in range(2):
            row = _add(_times(_part(thread, 5, 2), 16), _part(lane, 2, 3), _constant(8 * half))
            base = _add(_address(tile), _scalar(at), _times(row, LINE))
            for g in range(4):
                chunk = _add(_part(lane, 0, 2), _constant(4 * (g % 2)))
                place = _add(base, _swizzled(chunk, row), _constant(TILE_SLAB * (g // 2)))
                registers = _registers(values, (2 * (4 * g + m) + half for m in range(4)))
                _ptx(_PUT, place, *registers, constraints="r,r,r,r,r,~{memory}")

    run(tile, jnp.int32(at), values)


def _column(together: int) -> ir.Value:
    """Which of a warpgroup's columns this thread's rows are of."""
    bits = together.bit_length() - 1
    return _part(_thread(), 7 - bits, bits)


def _chosen(among: Sequence[ir.Value], n: ir.Value) -> ir.Value:
    """The n-th, by selects."""
    found = among[0]
    for m, x in enumerate(among[1:], 1):
        found = arith.select(arith.cmpi(arith.CmpIPredicate.eq, n, _constant(m)), x, found)
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

    @_inline(LAYOUT, REF, INT, returns=plgpu.ShapeDtypeStruct((ROWS, depth), jnp.float32, LAYOUT))
    def run(products, entropies, at):
        column = _column(together)
        base = _add(_address(entropies), _scalar(at), _times(column, 4 * depth), _times(_part(_thread(), 0, 2), 8))
        f32 = ir.F32Type.get()
        two = ir.VectorType.get((2,), f32)
        pair = llvm.StructType.get_literal([f32] * 2)
        factor = vector.broadcast(two, _float(scale))
        x, made = products.registers.flat, []
        for n in range(depth // 8):
            place, load = _add(base, _constant(32 * n)), "ld.shared.v2.f32 {$0, $1}, [$2];"
            c = _ptx(load, place, constraints="=f,=f,r,~{memory}", result=pair)
            c = vector.from_elements(two, _unpack(c, 2, f32))
            for half in range(2):
                mine = _chosen([x[2 * (m * depth // 8 + n) + half] for m in range(together)], column)
                made.append(arith.subf(arith.mulf(mine, factor), c))
        lead, _, *rest = products.registers.shape
        return _array(made, products, (lead, depth // 8, *rest))

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

    @_inline(LAYOUT, LAYOUT.reduce(1), LAYOUT, LAYOUT, returns=returned)
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
        limits = (arith.addf(t, _float(8.0)) for t in tops)
        above = (arith.cmpf(arith.CmpFPredicate.OGT, *pair) for pair in zip(most, limits, strict=True))
        state = [*tops, *total.registers.flat, *sums.registers.flat]
        branch = scf.IfOp(_any(arith.ori(*above)), [s.type for s in state], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            new = [arith.maximumf(_of_four(m), t) for m, t in zip(most, tops, strict=True)]
            by = [vector.broadcast(two, _power(arith.subf(t, n))) for t, n in zip(tops, new, strict=True)]
            scf.yield_([*new, *(arith.mulf(s, by[n % 2]) for n, s in enumerate(state[2:]))])
        with ir.InsertionPoint(branch.else_block):  # pyright: ignore[reportArgumentType, reportCallIssue]
            scf.yield_(state)
        tops, totals, scaled = branch.results[:2], list(branch.results[2:4]), branch.results[4:]
        narrow = ir.VectorType.get((2,), utils.dtype_to_ir_type(low))
        nothing = vector.broadcast(two, _float(0.0))
        weights: list = [None] * 8
        mine = [arith.cmpi(arith.CmpIPredicate.eq, column, _constant(m)) for m in range(together)]
        for half in range(2):
            for n in range(blocks):
                pair = [_power(arith.subf(s, tops[half])) for s in rows[half][2 * n : 2 * n + 2]]
                p = vector.from_elements(two, pair)
                totals[half] = arith.addf(totals[half], p)
                for m in range(together):
                    weights[2 * (m * blocks + n) + half] = arith.truncf(narrow, arith.select(mine[m], p, nothing))
        kinds = (x.type for x in top.registers.flat)
        tops = [t if kind == f32 else vector.broadcast(kind, t) for kind, t in zip(kinds, tops, strict=True)]
        lead, _, *rest = scores.registers.shape
        shape = (lead, 4, *rest)
        return _array(weights, scores, shape), _array(tops, top), _array(totals, total), _array(scaled, sums)

    return run(scores, top, total, sums)


def add_products(
    sums: Float32[Array, "64 128"], weights: Float[Array, "64 32"], y: Ref, at: Index
) -> Float32[Array, "64 128"]:
    """sums [64, 128] + weights [64, 32] @ Y [32, 128], its two slabs [32, 64] from byte `at` of y on.

    Pallas would have a product of depth 32 take 64-byte swizzled rows of Y, which alpha's are not.
    """

    @_inline(LAYOUT, LAYOUT, REF, INT, returns=plgpu.ShapeDtypeStruct(sums.shape, jnp.float32, LAYOUT))
    def run(sums, weights, y, at):
        i64 = ir.IntegerType.get_signless(64)
        sums = wgmma.WGMMAAccumulator.from_registers(sums)
        weights = wgmma.wgmma_fence(weights)
        start = arith.shrui(arith.andi(_add(_address(y), _scalar(at)), _constant(0x3FFFF)), _constant(4))
        # matrix descriptor: bytes / 16 to the next 64 columns and to the next 8 rows; 128-byte swizzle
        fields = (SLAB_BYTES >> 4) << 16 | (8 * LINE >> 4) << 32 | 1 << 62
        descriptor = arith.ori(arith.extui(i64, start), arith.constant(i64, ir.IntegerAttr.get(i64, fields)))
        kind, depth, instruction = weights.mlir_dtype, CLUSTER_VECTORS, 16 * LINE
        registers = wgmma.wgmma_m64(
            sums._value.registers, weights, descriptor, None, True, None, instruction, 128, 2 * depth, kind, kind
        )
        _ptx("wgmma.commit_group.sync.aligned;", constraints="")
        _ptx("wgmma.wait_group.sync.aligned 0;", constraints="")
        made = _array(registers.flat, sums._value)
        return fa.optimization_barrier(made).to_layout(sums._original_layout)

    return run(sums, weights, y, jnp.int32(at))
