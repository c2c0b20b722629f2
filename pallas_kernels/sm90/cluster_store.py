"""Stores from registers to device memory, of a warpgroup that sums columns in `fused`, in PTX as `cluster`'s."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array, Float, Float32

from monarchrt.pallas_kernels.sm90 import ptx
from monarchrt.pallas_kernels.sm90.cluster import LAYOUT
from monarchrt.pallas_kernels.sm90.config import ROWS
from monarchrt.pallas_kernels.sm90.types import Index, Ref


def _place(together: int, half: int) -> tuple[ir.Value, ir.Value]:
    """Which of a warpgroup's columns, and which of its rows, one of the two rows of this thread is of."""
    row = ptx.add(ptx.times(ptx.part(ptx.thread(), 5, 2), 16), ptx.part(ptx.thread(), 2, 3), ptx.constant(8 * half))
    bits = (ROWS // together).bit_length() - 1
    return arith.shrui(row, ptx.constant(bits)), ptx.part(row, 0, bits)


def _global(array: ir.Value, units: ir.Value, size: int) -> ir.Value:
    """Address of a number of units of `size` bytes from the start of an array in device memory."""
    i64 = ir.IntegerType.get_signless(64)
    offset = arith.muli(arith.extui(i64, units), arith.constant(i64, ir.IntegerAttr.get(i64, size)))
    return arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(array)), offset)


def _words(values: fa.FragmentedArray, numbers: Sequence[int]) -> list[ir.Value]:
    """Some of an array's registers, two elements each, as int32."""
    if utils.bytewidth(values.mlir_dtype) == 2:
        return ptx.registers(values, numbers)
    pairs = (values.registers.flat[n] for n in numbers)
    return [utils.bitcast(vector.extract(pair, [], [m]), ptx.i32()) for pair in pairs for m in range(2)]


_KEEP = "{ .reg .pred p; setp.ne.b32 p, $1, 0; @p st.global"


def output(
    out: Ref,
    place: Index,
    count: Index,
    values: Float[Array, "64 128"],
    *,
    rows: int,
    steps: tuple[int, int],
    together: int,
) -> None:
    """Writes O [64, 128] in 16 bits or float32, whose columns are as Y's, in their right order to device memory.

    Args:
        out: The whole output, vectors of 128.
        place: Which of them is row 0 of the warpgroup's first column.
        count: Columns that there are, of `together`.
        values: Rows i of one column after another.
        rows: Rows of a column that there are.
        steps: Vectors from a row to the next, and from a column to the next.
        together: Columns.
    """

    @ptx.inline(ptx.REF, ptx.INT, ptx.INT, LAYOUT)
    def run(out, place, count, values):
        for half in range(2):
            column, row = _place(together, half)
            number = ptx.add(ptx.scalar(place), ptx.times(row, steps[0]), ptx.times(column, steps[1]))
            there = arith.cmpi(arith.CmpIPredicate.slt, column, ptx.scalar(count))
            there = ptx.flag(arith.andi(there, ptx.below(row, rows)))
            size = 8 * utils.bytewidth(values.mlir_dtype)  # of what a thread has together
            base = _global(out, ptx.add(ptx.times(number, 16), ptx.part(ptx.thread(), 0, 2)), size)
            for g in range(4):
                words = _words(values, [2 * (4 * g + m) + half for m in range(4)])
                for n in range(0, len(words), 4):
                    text = _KEEP + f".v4.b32 [$0+{4 * size * g + 4 * n}], {{$2, $3, $4, $5}}; }}"
                    ptx.asm(text, base, there, *words[n : n + 4], constraints="l,r,r,r,r,r,~{memory}")

    run(out, jnp.int32(place), jnp.int32(count), values)


def numbers(array: Ref, place: Index, count: Index, values: Float32[Array, "64"], *, together: int) -> None:
    """Writes a number for each row of the columns, one after another, from number `place` of an array on."""

    @ptx.inline(ptx.REF, ptx.INT, ptx.INT, LAYOUT.reduce(1))
    def run(array, place, count, values):
        lane = ptx.part(ptx.thread(), 0, 2)
        for half in range(2):
            column, row = _place(together, half)
            there = arith.cmpi(arith.CmpIPredicate.slt, column, ptx.scalar(count))
            there = ptx.flag(arith.andi(there, ptx.below(lane, 1)))
            at = _global(array, ptx.add(ptx.scalar(place), ptx.times(column, ROWS // together), row), 4)
            x = utils.bitcast(values.registers.flat[half], ptx.i32())
            ptx.asm(_KEEP + ".b32 [$0], $2; }", at, there, x, constraints="l,r,r,~{memory}")

    run(array, jnp.int32(place), jnp.int32(count), values)
