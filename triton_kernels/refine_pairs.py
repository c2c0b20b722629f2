"""Kernels of refinement steps (paper, A.2) on arrays in Hopper's order, beside kernels that are not Triton's.

Vectors, alpha, queries u and their gradients, are [lanes, tiles, C*B1, B2, D], lanes = batch * heads of a chunk, tiles
its query tiles; numbers of a pair of a query column (a, j) and a key row n = (c, k), c_L in units of log 2, factors f
and g = <du, u>, are float32 [lanes, items, 64, P], P = C*B1 or more, columns j lying as `item_row` says. `stats` are
float32 [lanes, tiles, B2, 2, W], W = B1 or more: L's log-sum-exp in units of log 2, infinite beyond B1, and delta.
u, f, g and delta are what `refine_backward` describes. All rows i of a column are one block.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Kernel bodies are Triton's language, not Python's: its types are not the ones they run with.
import triton.language as tl

from monarchrt.triton_kernels.jit import LOG2_E, LOWEST, kernel, load_rows, store_rows, tile_offset
from monarchrt.triton_kernels.refine import EPSILON, MAX_FACTOR


@kernel
def item_row(
    tile: tl.tensor, j: tl.tensor, FULL: tl.constexpr, TAIL: tl.constexpr, PACKED: tl.constexpr, WHOLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Where column j of a query tile is: FULL items of 64 columns a tile, then one of the TAIL others of PACKED."""
    whole = j < FULL * 64
    item = tl.where(whole, tile * FULL + j // 64, WHOLE + tile // PACKED)
    return item, tl.where(whole, j % 64, tile % PACKED * TAIL + j - FULL * 64)


@kernel
def column(
    start: tl.tensor, q: tl.tensor, A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, HC: tl.constexpr, AC: tl.constexpr, ITEMS: tl.constexpr, FULL: tl.constexpr,
    TAIL: tl.constexpr, PACKED: tl.constexpr, P: tl.constexpr, W: tl.constexpr, DP: tl.constexpr, I: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of a program's query column: query tile, q [I, D], where its vectors begin, its numbers and its statistics."""
    r = tl.program_id(0)
    z = tl.program_id(1)
    tile, j = r // B2, r % B2
    a = tl.load(start + 1) + tile
    b, h = z // HC, tl.load(start) + z % HC
    i = tl.arange(0, I)
    query = tile_offset(b, a, h, A, B1, B2, H, D) + j * (H * D)
    q_i = load_rows(q + query, i * (B2 * H * D), i < B1, tl.arange(0, DP), D)
    item, row = item_row(tile, j, FULL, TAIL, PACKED, AC * FULL)
    vectors = ((z * AC + tile).to(tl.int64) * (C * B1 * B2) + j) * D
    numbers = ((z * ITEMS + item) * 64 + row).to(tl.int64) * P
    return a, q_i, vectors, numbers, (z * (AC * B2) + r) * (2 * W)


@kernel
def refine_pairs(
    start: tl.tensor, visible: tl.tensor, q: tl.tensor, alpha: tl.tensor, c: tl.tensor, u: tl.tensor,
    factors: tl.tensor, stats: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr,
    B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HC: tl.constexpr, AC: tl.constexpr, ITEMS: tl.constexpr,
    FULL: tl.constexpr, TAIL: tl.constexpr, PACKED: tl.constexpr, P: tl.constexpr, W: tl.constexpr, DP: tl.constexpr,
    I: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """The next step's queries u, their factors and the log-sum-exp of a query column. Grid (AC*B2, lanes)."""
    a, q_i, vectors, numbers, place = column(
        start, q, A, C, B1, B2, H, D, HC, AC, ITEMS, FULL, TAIL, PACKED, P, W, DP, I
    )  # fmt: skip
    d, i = tl.arange(0, DP), tl.arange(0, I)
    alpha += vectors
    u += vectors
    c += numbers
    factors += numbers
    end = tl.load(visible + a) * B1
    top = tl.full([I], LOWEST, tl.float32)
    total = tl.zeros([I], tl.float32)
    for first in tl.range(0, end, N, num_stages=STAGES):
        n = first + tl.arange(0, N)
        seen = n < end
        alpha_n = load_rows(alpha, n * (B2 * D), seen, d, D)
        c_n = tl.load(c + n, mask=seen, other=float("inf"))
        x = tl.dot(q_i, alpha_n.T, input_precision=PRECISION) * (scale * LOG2_E) - c_n[None, :]
        new_top = tl.maximum(top, tl.max(x, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top[:, None]), 1)
        top = new_top
    lse = tl.where(i < B1, top + tl.log2(total), float("inf"))
    tl.store(stats + place + i, lse, mask=i < W)
    blocks = (end + N - 1) // N
    for block in tl.range(0, blocks, num_stages=STAGES):  # the last first: they are in the cache still
        n = (blocks - 1 - block) * N + tl.arange(0, N)
        seen = n < end
        alpha_n = load_rows(alpha, n * (B2 * D), seen, d, D)
        c_n = tl.load(c + n, mask=seen, other=float("inf"))
        x = tl.dot(alpha_n, q_i.T, input_precision=PRECISION) * (scale * LOG2_E) - c_n[:, None]
        p = tl.exp2(x - lse[None, :])  # L again (paper, A.2)
        factor = tl.minimum(1.0 / (tl.sum(p, 1) + EPSILON), MAX_FACTOR)
        low = (p * factor[:, None]).to(q_i.dtype)  # the factor first: in float16 small weights would lose bits
        store_rows(u, n * (B2 * D), seen, d, tl.dot(low, q_i, input_precision=PRECISION), D)
        tl.store(factors + n, factor, mask=seen)


@kernel
def delta_pairs(
    start: tl.tensor, visible: tl.tensor, q: tl.tensor, alpha: tl.tensor, du: tl.tensor, c: tl.tensor,
    factors: tl.tensor, products: tl.tensor, stats: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HC: tl.constexpr, AC: tl.constexpr,
    ITEMS: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr, PACKED: tl.constexpr, P: tl.constexpr, W: tl.constexpr,
    DP: tl.constexpr, I: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """delta = sum_n L dL of a query column, times `scale`, beside its log-sum-exp. Grid (AC*B2, lanes)."""
    a, q_i, vectors, numbers, place = column(
        start, q, A, C, B1, B2, H, D, HC, AC, ITEMS, FULL, TAIL, PACKED, P, W, DP, I
    )  # fmt: skip
    d, i = tl.arange(0, DP), tl.arange(0, I)
    alpha += vectors
    du += vectors
    c += numbers
    factors += numbers
    products += numbers
    lse = tl.load(stats + place + i, mask=i < W, other=float("inf"))
    end = tl.load(visible + a) * B1
    delta = tl.zeros([I], tl.float32)
    for first in tl.range(0, end, N, num_stages=STAGES):
        n = first + tl.arange(0, N)
        seen = n < end
        alpha_n = load_rows(alpha, n * (B2 * D), seen, d, D)
        du_n = load_rows(du, n * (B2 * D), seen, d, D)
        c_n = tl.load(c + n, mask=seen, other=float("inf"))
        factor = tl.load(factors + n, mask=seen, other=0.0)
        product = tl.load(products + n, mask=seen, other=0.0)
        x = tl.dot(q_i, alpha_n.T, input_precision=PRECISION) * (scale * LOG2_E) - c_n[None, :]
        d_p = (tl.dot(q_i, du_n.T, input_precision=PRECISION) - product[None, :]) * factor[None, :]
        delta += tl.sum(tl.exp2(x - lse[:, None]) * d_p, 1)
    tl.store(stats + place + W + i, delta * scale, mask=i < W)


@kernel
def query_pairs(
    start: tl.tensor, visible: tl.tensor, k: tl.tensor, u: tl.tensor, dz: tl.tensor, factors: tl.tensor, du: tl.tensor,
    products: tl.tensor, A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, HC: tl.constexpr, AC: tl.constexpr, ITEMS: tl.constexpr, FULL: tl.constexpr, TAIL: tl.constexpr,
    PACKED: tl.constexpr, P: tl.constexpr, DP: tl.constexpr, KEYS: tl.constexpr, ROWS: tl.constexpr, J: tl.constexpr,
    L: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """du = dZ K of a key row's queries, from dZ [lanes, items, C*B1, KEYS, ROWS], and g. Grid (C*B1, lanes).

    What is not seen is zero up to the next multiple of 64 key rows.
    """
    ck = tl.program_id(0)
    z = tl.program_id(1)
    a0 = tl.load(start + 1)
    b, h = z // HC, tl.load(start) + z % HC
    j = tl.arange(0, J)
    l = tl.arange(0, L)
    d = tl.arange(0, DP)
    key_row = tile_offset(b, ck // B1, h, C, B1, B2, H, D) + (ck % B1) * (B2 * H * D)
    k_l = load_rows(k + key_row, l * (H * D), l < B2, d, D)
    for tile in tl.range(0, AC, num_stages=STAGES):
        end = tl.load(visible + a0 + tile) * B1
        seen = (j < B2) & (ck < end)
        written = (j < B2) & (ck < (end + 63) // 64 * 64)
        if FULL == 1 and ITEMS == AC:
            item, row = tile, j
        else:
            item, row = item_row(tile, j, FULL, TAIL, PACKED, AC * FULL)
        d_z = ((z * ITEMS + item).to(tl.int64) * (C * B1) + ck) * (KEYS * ROWS) + row
        d_z = tl.load(dz + (d_z + l[:, None] * ROWS), mask=(l < B2)[:, None] & seen[None, :], other=0.0)
        vectors = ((z * AC + tile).to(tl.int64) * (C * B1) + ck) * (B2 * D)
        u_j = load_rows(u + vectors, j * D, seen, d, D)
        # a key row that nobody sees may hold anything
        du_j = tl.where(seen[:, None], tl.dot(d_z.T, k_l, input_precision=PRECISION), 0.0).to(u_j.dtype)
        store_rows(du + vectors, j * D, written, d, du_j, D)
        numbers = ((z * ITEMS + item) * 64 + row).to(tl.int64) * P + ck
        product = tl.sum(du_j.to(tl.float32) * u_j.to(tl.float32), 1)
        factor = tl.load(factors + numbers, mask=seen, other=MAX_FACTOR)
        tl.store(products + numbers, tl.where(factor < MAX_FACTOR, product, 0.0), mask=written)
