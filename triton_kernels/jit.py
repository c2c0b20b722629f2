"""The decorator of every kernel and the constants they share; importing this needs Triton."""

import inspect
from collections.abc import Callable

# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# Kernel bodies are Triton's language, not Python's: its types are not the ones they run with.
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e30)  # stands for minus infinity where a difference of two of them must not be NaN


def kernel(fn: Callable[..., object]) -> triton.JITFunction:
    """`triton.jit` of the plain function, also where a runtime type checker has wrapped it."""
    return triton.jit(inspect.unwrap(fn))


@kernel
def tile_offset(
    b: tl.tensor, tile: tl.tensor, h: tl.tensor, TILES: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Element offset of [b, tile, 0, 0, h, 0] in an array [B, TILES, B1, B2, H, D]."""
    return ((b * TILES + tile).to(tl.int64) * (B1 * B2 * H) + h) * D


@kernel
def wide(x: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """`x` for indexing an array of SIZE elements: int64 only where needed, since offsets fill registers."""
    if SIZE < 2**31:
        return x
    else:
        return x.to(tl.int64)


@kernel
def load_rows(pointer: tl.tensor, offsets: tl.tensor, live: tl.tensor, d: tl.tensor, D: tl.constexpr) -> tl.tensor:
    """Rows [n, D] that start at `offsets` [n]; zeros where not `live` [n] and beyond D."""
    mask = live[:, None] & (d < D)[None, :]
    return tl.load(pointer + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@kernel
def store_rows(
    pointer: tl.tensor, offsets: tl.tensor, live: tl.tensor, d: tl.tensor, x: tl.tensor, D: tl.constexpr,
) -> None:  # fmt: skip
    """Inverse of `load_rows`, in the pointer's dtype."""
    mask = live[:, None] & (d < D)[None, :]
    tl.store(pointer + offsets[:, None] + d[None, :], x.to(pointer.dtype.element_ty), mask=mask)


@kernel
def row_range(
    visible: tl.tensor, a0: tl.tensor, c: tl.tensor, A: tl.constexpr, AC: tl.constexpr, B2: tl.constexpr,
    M: tl.constexpr, AP: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """First and one past the last block of M rows (a, j) with a query tile that sees key tile c."""
    a = tl.arange(0, AP)
    inside = (a < AC) & (a0 + a < A)
    sees = tl.load(visible + a0 + a, mask=inside, other=0) > c
    first = tl.min(tl.where(sees, a, AP), 0)
    last = tl.max(tl.where(sees, a + 1, 0), 0)
    return first * B2 // M, (last * B2 + M - 1) // M


@kernel
def wait_for(counter: tl.tensor, count: tl.tensor) -> None:
    """Returns once `count` programs have called `arrive`; what they wrote before can be read then."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < count:
        pass
    tl.debug_barrier()


@kernel
def arrive(counter: tl.tensor) -> None:
    """Says that everything this program has written so far can be read."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1, sem="release", scope="gpu")
