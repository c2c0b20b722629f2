"""Words of MLIR and PTX with which `cluster` and `cluster_store` are written: numbers, addresses, registers, lanes."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

REF, INT = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())


def inline(*types: Any, returns: Any = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turns a function that writes MLIR into one that Pallas can call, on arguments of these types."""

    def decorate(function):
        return plgpu.inline_mgpu(arg_types=types, return_type=returns)(lambda _, *values: function(*values))

    return decorate


def i32() -> ir.Type:
    """The type of 32-bit integers."""
    return ir.IntegerType.get_signless(32)


def constant(x: int) -> ir.Value:
    """An int32."""
    return arith.constant(i32(), ir.IntegerAttr.get(i32(), x))


def asm(
    text: str, *operands: ir.Value, constraints: str, result: ir.Type | None = None, pure: bool = False
) -> ir.Value:
    """PTX; `pure` where it may be dropped or moved."""
    return llvm.inline_asm(
        result or ir.Type.parse("!llvm.void"), list(operands), text, constraints, has_side_effects=not pure
    )


def four(kind: ir.Type | None = None) -> ir.Type:
    """A struct of four of a kind, int32 by default."""
    return llvm.StructType.get_literal([kind or i32()] * 4)


def unpack(struct: ir.Value, count: int, kind: ir.Type | None = None) -> list[ir.Value]:
    """The first elements of a struct of a kind, int32 by default."""
    return [llvm.extractvalue(kind or i32(), struct, [n]) for n in range(count)]


def add(*terms: ir.Value) -> ir.Value:
    """The sum."""
    return functools.reduce(arith.addi, terms)


def times(x: ir.Value, n: int) -> ir.Value:
    """x times a number."""
    return arith.muli(x, constant(n))


def part(x: ir.Value, first: int, bits: int) -> ir.Value:
    """`bits` bits of x from bit `first` on."""
    shifted = arith.shrui(x, constant(first)) if first else x
    return arith.andi(shifted, constant(2**bits - 1))


def flag(x: ir.Value) -> ir.Value:
    """A truth value as int32, 0 or 1."""
    return arith.extui(i32(), x)


def below(x: ir.Value, n: int) -> ir.Value:
    """Whether x is below a number."""
    return arith.cmpi(arith.CmpIPredicate.slt, x, constant(n))


def address(ref: ir.Value) -> ir.Value:
    """Where a reference starts in shared memory."""
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def scalar(array: fa.FragmentedArray) -> ir.Value:
    """The one register of an array without axes."""
    [x] = array.registers.flat
    return x


def thread() -> ir.Value:
    """Number of the thread in its block."""
    return asm("mov.u32 $0, %tid.x;", constraints="=r", result=i32(), pure=True)


def peer(address: ir.Value, block: ir.Value) -> ir.Value:
    """Where `block` of the cluster has what this block has at a shared address."""
    return asm("mapa.shared::cluster.u32 $0, $1, $2;", address, block, constraints="=r,r,r", result=i32(), pure=True)


def swizzled(chunk: ir.Value, row: ir.Value) -> ir.Value:
    """Offset of a 16-byte chunk of a row in 128-byte swizzled rows."""
    return arith.shli(arith.xori(chunk, part(row, 0, 3)), constant(4))


def registers(values: fa.FragmentedArray, numbers: Iterable[int]) -> list[ir.Value]:
    """Some of an array's registers, two 16-bit elements each, as int32."""
    return [utils.bitcast(values.registers.flat[n], i32()) for n in numbers]


def array(
    registers: Iterable[ir.Value], like: fa.FragmentedArray, shape: tuple[int, ...] | None = None
) -> fa.FragmentedArray:
    """An array of these registers, laid out as another one is."""
    made = np.array(list(registers), dtype=object).reshape(shape or like.registers.shape)
    return fa.FragmentedArray(_registers=made, _layout=like.layout, _is_signed=None)


def float32(x: float) -> ir.Value:
    """A float32."""
    return arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), x))


def power(x: ir.Value) -> ir.Value:
    """2^x."""
    return asm("ex2.approx.ftz.f32 $0, $1;", x, constraints="=f,f", result=ir.F32Type.get(), pure=True)


def any_lane(x: ir.Value) -> ir.Value:
    """Whether it holds in any lane."""
    vote = "{ .reg .pred p, q; setp.ne.b32 p, $1, 0; vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }"
    voted = asm(vote, flag(x), constraints="=r,r", result=i32())
    return arith.cmpi(arith.CmpIPredicate.ne, voted, constant(0))


def of_four(x: ir.Value) -> ir.Value:
    """The largest x of four lanes, which have parts of the same rows."""
    for lanes in (1, 2):
        swap = "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;"
        x = arith.maximumf(x, asm(swap, x, constant(lanes), constraints="=f,f,n", result=ir.F32Type.get()))
    return x
