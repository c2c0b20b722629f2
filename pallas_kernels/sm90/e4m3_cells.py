"""From e4m3 to float16 within shared memory, by a warpgroup, in PTX: 16 bytes read, 32 written, no two in one bank.

Both tiles are swizzled rows (`shared.tile_scratch`), 16 bytes a chunk: a row of D elements in 8 bits, and slabs of 64
in 16. Chunk c in 8 bits is chunks 2c and 2c + 1, counted through the slabs, in 16. Of eight threads, which the hardware
serves at a time, four take a row and four the next: the chunks of one lie in even banks, of the other in odd.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from monarchrt.pallas_kernels.sm90 import ptx
from monarchrt.pallas_kernels.sm90.config import ROWS, SLAB
from monarchrt.pallas_kernels.sm90.types import Ref

CHUNK = 16  # bytes
AT_A_TIME = 32  # rows that a warpgroup's threads take, in one turn if they have 64 bytes, in two if 128


def convert(raw: Ref, cells: Ref, *, depth: int, dim: int) -> None:
    """Stores a tile in 16 bits.

    Args:
        raw: [depth, dim] in e4m3, rows swizzled.
        cells: [dim/64, depth, 64] in float16, rows swizzled.
        depth: Rows, a multiple of 64.
        dim: 64 or 128.
    """
    types = [plgpu.RefType((plgpu.SwizzleTransform(width),)) for width in (dim, 2 * SLAB)]  # pyright: ignore

    @ptx.inline(*types)
    def run(raw, cells):
        source, target = ptx.address(raw), ptx.address(cells)
        places = [_places(source, target, turn, depth, dim) for turn in range(dim // SLAB)]
        for first in range(0, depth, ROWS):
            loads = []
            for half in range(0, ROWS, AT_A_TIME):
                for place in places:
                    loads.append((place, first + half, _load(place[0], (first + half) * dim)))
            for (_, *to), row, words in loads:
                pairs = [x for word in words for x in _halves(word)]
                for n, where in enumerate(to):
                    _store(where, row * 2 * SLAB, pairs[4 * n : 4 * n + 4])

    run(raw, cells)


def _places(source: ir.Value, target: ir.Value, turn: int, depth: int, dim: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Where a thread reads a chunk of the first rows, and where its two go."""
    lane, warp = ptx.part(ptx.thread(), 0, 5), ptx.part(ptx.thread(), 5, 2)
    eighth, upper = ptx.part(lane, 0, 2), ptx.part(lane, 2, 1)  # of eight threads: which of four, and of which row
    pair = ptx.add(ptx.times(warp, 4), ptx.part(lane, 3, 2))  # of rows
    row = ptx.add(ptx.times(pair, 2), arith.xori(upper, ptx.constant(turn)))
    chunk = ptx.add(eighth, ptx.times(upper, 4)) if dim > SLAB else eighth
    mixed = arith.xori(chunk, ptx.part(row, 0, 3) if dim > SLAB else ptx.part(row, 1, 2))
    read = ptx.add(source, ptx.times(row, dim), ptx.times(mixed, CHUNK))
    slab = ptx.add(target, ptx.times(upper, depth * 2 * SLAB)) if dim > SLAB else target
    base = ptx.add(slab, ptx.times(row, 2 * SLAB))
    first = ptx.times(eighth, 2)
    written = [ptx.add(base, ptx.swizzled(ptx.add(first, ptx.constant(n)), row)) for n in range(2)]
    return read, written[0], written[1]


def _load(address: ir.Value, offset: int) -> list[ir.Value]:
    """Four words, 16 bytes."""
    text = f"ld.shared.v4.b32 {{$0, $1, $2, $3}}, [$4+{offset}];"
    return ptx.unpack(ptx.asm(text, address, constraints="=r,=r,=r,=r,r,~{memory}", result=ptx.four()), 4)


def _halves(word: ir.Value) -> list[ir.Value]:
    """Four numbers in 8 bits as two words of two in 16."""
    convert = "cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b;"
    text = f"{{ .reg .b16 a, b; mov.b32 {{a, b}}, $2; {convert} }}"
    two = llvm.StructType.get_literal([ptx.i32()] * 2)
    return ptx.unpack(ptx.asm(text, word, constraints="=r,=r,r", result=two, pure=True), 2)


def _store(address: ir.Value, offset: int, words: list[ir.Value]) -> None:
    """Four words, 16 bytes."""
    ptx.asm(f"st.shared.v4.b32 [$0+{offset}], {{$1, $2, $3, $4}};", address, *words, constraints="r,r,r,r,r,~{memory}")
