"""Kernels of the refinement steps before the last (paper, A.2): from L of one step to the queries of R in the next.

The next step's queries are alpha_R[ck] = sum_i L[i, ck] Q_i times min(1 / (c_R + 1e-6), 1e4) with c_R = sum_i L[i, ck],
one for every row (a, j) and key row ck. They take the place of alpha in `mid`; other scratch as in `right`. Nothing is
quadratic in memory: L is made twice from alpha, once for its log-sum-exp, once for the sums over i.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Kernel bodies are Triton's language, not Python's: its types are not the ones they run with.
import triton.language as tl

from monarchrt.triton_kernels.jit import LN_2, LOG2_E, LOWEST, kernel, load_rows, store_rows, tile_offset
from monarchrt.triton_kernels.left import left_rows

EPSILON = tl.constexpr(1e-6)  # guard on 1/c_R, which can underflow
MAX_FACTOR = tl.constexpr(1e4)


@kernel
def weights(
    alpha: tl.tensor, c_l: tl.tensor, q_i: tl.tensor, lse_i: tl.tensor, scale: tl.tensor, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """L of rows i for key rows [N, I] from lse_i (base 2), float32."""
    x = tl.dot(alpha, q_i.T, input_precision=PRECISION) * (scale * LOG2_E) - (c_l * LOG2_E)[:, None]
    return tl.exp2(x - lse_i[None, :])  # L again (paper, A.2)


@kernel
def add_scores(
    q_i: tl.tensor, alpha: tl.tensor, c_l: tl.tensor, top: tl.tensor, total: tl.tensor, scale: tl.tensor,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """One step of the log-sum-exp over key rows for rows i: the largest score (base 2) and the sum."""
    x = tl.dot(q_i, alpha.T, input_precision=PRECISION) * (scale * LOG2_E) - (c_l * LOG2_E)[None, :]
    new_top = tl.maximum(top, tl.max(x, 1))
    return new_top, total * tl.exp2(top - new_top) + tl.sum(tl.exp2(x - new_top[:, None]), 1)


@kernel
def part_weights(
    alpha: tl.tensor, c_l: tl.tensor, q: tl.tensor, lse: tl.tensor, query: tl.tensor, place: tl.tensor,
    part: tl.tensor, scale: tl.tensor, B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, I: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """`weights` of the block `part` of I rows of a query column, and its rows of q."""
    i = part * I + tl.arange(0, I)
    q_i = load_rows(q + query, i * (B2 * H * D), i < B1, tl.arange(0, DP), D)
    lse_i = tl.load(lse + place + i * (B2 * H), mask=i < B1, other=float("inf")) * LOG2_E
    return weights(alpha, c_l, q_i, lse_i, scale, PRECISION), q_i


@kernel
def store_lse(
    q: tl.tensor, mid: tl.tensor, c_l: tl.tensor, lse: tl.tensor, query: tl.tensor, place: tl.tensor, end: tl.tensor,
    d: tl.tensor, scale: tl.tensor, B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    I: tl.constexpr, I2: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """The log-sum-exp of a query column's scores of L over key rows below `end`; its offsets are `query`, `place`."""
    for part in tl.static_range((B1 + I + I2 - 1) // (I + I2)):
        i = part * I + tl.arange(0, I)
        q_i = load_rows(q + query, i * (B2 * H * D), i < B1, d, D)
        top = tl.full([I], LOWEST, tl.float32)
        total = tl.zeros([I], tl.float32)
        if I2:
            i_1 = I + tl.arange(0, I2)
            q_1 = load_rows(q + query, i_1 * (B2 * H * D), i_1 < B1, d, D)
            top_1 = tl.full([I2], LOWEST, tl.float32)
            total_1 = tl.zeros([I2], tl.float32)
        for start in tl.range(0, end, N, num_stages=STAGES):
            n = start + tl.arange(0, N)
            seen = n < end
            alpha = load_rows(mid, n * (2 * D), seen, d, D)
            c_n = tl.load(c_l + n, mask=seen, other=float("inf"))
            top, total = add_scores(q_i, alpha, c_n, top, total, scale, PRECISION)
            if I2:
                top_1, total_1 = add_scores(q_1, alpha, c_n, top_1, total_1, scale, PRECISION)
        tl.store(lse + place + i * (B2 * H), (top + tl.log2(total)) * LN_2, mask=i < B1)
        if I2:
            tl.store(lse + place + i_1 * (B2 * H), (top_1 + tl.log2(total_1)) * LN_2, mask=i_1 < B1)


@kernel
def left_refine(
    step: tl.tensor, visible: tl.tensor, q: tl.tensor, mid: tl.tensor, stats: tl.tensor, lse: tl.tensor,
    scale: tl.tensor, A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr, Z: tl.constexpr, DP: tl.constexpr, I: tl.constexpr,
    I2: tl.constexpr, N: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Replaces alpha of one query column (a, j) in `mid` by the next step's queries. Grid (AC*B2, 1, ZC).

    `lse`, as the last step's [B, A, b1, b2, H], is this step's meanwhile. With I2, for B1 <= I + I2, rows are one block
    in two parts. KEEP, for the gradient: queries go to the second place in `mid`, beside alpha, and their factors
    min(1 / (c_R + 1e-6), 1e4) to the third of `stats`.
    """
    r = tl.program_id(0)
    z = tl.program_id(2)
    zh = tl.load(step) + z
    a = tl.load(step + 1) + r // B2
    j = r % B2
    b, h = zh // H, zh % H
    R: tl.constexpr = AC * B2
    CK: tl.constexpr = C * B1
    NI: tl.constexpr = (B1 + I + I2 - 1) // (I + I2)
    EARLY: tl.constexpr = (NI == 1) | (q.dtype.element_ty == tl.float16)
    if (zh < Z) & (a < A):
        d = tl.arange(0, DP)
        query = tile_offset(b, a, h, A, B1, B2, H, D) + j * (H * D)
        place = (b * A + a).to(tl.int64) * (B1 * B2 * H) + j * H + h  # of [b, a, 0, j, h] in lse
        row = (z.to(tl.int64) * R + r) * CK
        mid += row * (2 * D)
        stats += row + ZC * R * CK
        end = tl.load(visible + a) * B1
        store_lse(
            q, mid, stats, lse, query, place, end, d, scale, B1, B2, H, D, I, I2, N, PRECISION, STAGES
        )  # fmt: skip
        tl.debug_barrier()
        i = tl.arange(0, I)
        q_i = load_rows(q + query, i * (B2 * H * D), i < B1, d, D)
        lse_i = tl.load(lse + place + i * (B2 * H), mask=i < B1, other=float("inf")) * LOG2_E
        if I2:
            i_1 = I + tl.arange(0, I2)
            q_1 = load_rows(q + query, i_1 * (B2 * H * D), i_1 < B1, d, D)
            lse_1 = tl.load(lse + place + i_1 * (B2 * H), mask=i_1 < B1, other=float("inf")) * LOG2_E
        blocks = (end + N - 1) // N
        for block in tl.range(0, blocks, num_stages=STAGES):  # the last first: they are in the cache still
            n = (blocks - 1 - block) * N + tl.arange(0, N)
            seen = n < end
            alpha = load_rows(mid, n * (2 * D), seen, d, D)
            c_l = tl.load(stats + n, mask=seen, other=float("inf"))
            p = weights(alpha, c_l, q_i, lse_i, scale, PRECISION)
            c_r = tl.sum(p, 1)
            if I2:
                p_1 = weights(alpha, c_l, q_1, lse_1, scale, PRECISION)
                c_r += tl.sum(p_1, 1)
            if EARLY:  # the factor goes to the weights: in float16 small ones would lose their bits
                for part in tl.static_range(1, NI):
                    p_n, _ = part_weights(alpha, c_l, q, lse, query, place, part, scale, B1, B2, H, D, DP, I, PRECISION)
                    c_r += tl.sum(p_n, 1)
                factor = tl.minimum(1.0 / (c_r + EPSILON), MAX_FACTOR)
                vectors = tl.dot((p * factor[:, None]).to(q_i.dtype), q_i, input_precision=PRECISION)
                if I2:
                    vectors = tl.dot((p_1 * factor[:, None]).to(q_1.dtype), q_1, vectors, input_precision=PRECISION)
                for part in tl.static_range(1, NI):
                    p_n, q_n = part_weights(
                        alpha, c_l, q, lse, query, place, part, scale, B1, B2, H, D, DP, I, PRECISION
                    )  # fmt: skip
                    vectors = tl.dot((p_n * factor[:, None]).to(q_n.dtype), q_n, vectors, input_precision=PRECISION)
            else:
                vectors = tl.dot(p.to(q_i.dtype), q_i, input_precision=PRECISION)
                for part in tl.static_range(1, NI):
                    p_n, q_n = part_weights(
                        alpha, c_l, q, lse, query, place, part, scale, B1, B2, H, D, DP, I, PRECISION
                    )  # fmt: skip
                    c_r += tl.sum(p_n, 1)
                    vectors = tl.dot(p_n.to(q_n.dtype), q_n, vectors, input_precision=PRECISION)
                factor = tl.minimum(1.0 / (c_r + EPSILON), MAX_FACTOR)
                vectors *= factor[:, None]
            if KEEP:
                store_rows(mid + D, n * (2 * D), seen, d, vectors, D)
                tl.store(stats + ZC * R * CK + n, factor, mask=seen)
            else:
                store_rows(mid, n * (2 * D), seen, d, vectors, D)


@kernel
def left_last(
    step: tl.tensor, visible: tl.tensor, q: tl.tensor, mid: tl.tensor, stats: tl.tensor, lse: tl.tensor,
    out: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr, Z: tl.constexpr, DP: tl.constexpr,
    I: tl.constexpr, I2: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """`left_rows` of one query column (a, j): output and log-sum-exp. Grid (AC*B2, blocks of rows i, ZC).

    `lse` comes before `out`, since it is there before: of a kernel's arrays those that it creates must be the last.
    """
    R: tl.constexpr = AC * B2
    r = tl.program_id(0)
    z = tl.program_id(2)
    zh = tl.load(step) + z
    a = tl.load(step + 1) + r // B2
    if (zh < Z) & (a < A):
        left_rows(
            z.to(tl.int64) * R + r, a, r % B2, zh, tl.program_id(1),
            visible, q, mid, stats + ZC * R * (C * B1), out, lse, scale,
            A, C, B1, B2, H, D, DP, I, I2, N, PRECISION, STAGES,
        )  # fmt: skip
