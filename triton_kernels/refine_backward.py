"""Kernels of the gradient of several refinement steps (paper, A.2): further steps of R, and back through `left_refine`.

Each step t has its own `mid`, alpha and beside it the queries u of R in step t + 1 (in the last step Y), and `stats`:
log-sum-exp of R's scores, c_L and, where e will be, factors f = min(1 / (c_R + 1e-6), 1e4): u = f sum_i L[i, ck] Q_i.
Back from the last step to the first, gradients take the places of what they are for. With du, the gradient of u,

    dL[i, ck] = f (<du, Q_i> - <du, u>),    dQ_i = sum_ck f L[i, ck] du + what comes through the scores of L,

but without <du, u> where f is at its limit and does not depend on c_R. L is made again from alpha and its log-sum-exp,
twice: first for sum_ck L dL, which the gradient of a softmax subtracts, then for the rest.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Kernel bodies are Triton's language, not Python's: its types are not the ones they run with.
import triton.language as tl

from monarchrt.triton_kernels.jit import LN_2, LOG2_E, kernel, load_rows, row_range, store_rows, tile_offset, wide
from monarchrt.triton_kernels.left import add_dot
from monarchrt.triton_kernels.refine import MAX_FACTOR
from monarchrt.triton_kernels.right import query_gradients, right_columns, right_rows


@kernel
def right_further(
    step: tl.tensor, visible: tl.tensor, queries: tl.tensor, k: tl.tensor, v: tl.tensor, mid: tl.tensor,
    stats: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr, Z: tl.constexpr, AP: tl.constexpr,
    DP: tl.constexpr, M: tl.constexpr, L: tl.constexpr, L2: tl.constexpr, SPLIT: tl.constexpr, VALUES: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """`right_rows` of a step after the first; `queries` is the `mid` of the step before. Grid (C*B1, SPLIT, ZC)."""
    right_rows(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.load(step), tl.load(step + 1),
        visible, queries, k, v, mid, stats, scale,
        A, C, B1, B2, H, D, ZC, AC, Z, AP, DP, M, L, L2, SPLIT, True, PRECISION, STAGES, False, VALUES, True,
    )  # fmt: skip


@kernel
def right_further_backward(
    step: tl.tensor, visible: tl.tensor, first_tile: tl.tensor, queries: tl.tensor, k: tl.tensor, v: tl.tensor,
    mid: tl.tensor, stats: tl.tensor, dk: tl.tensor, dv: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr,
    Z: tl.constexpr, AP: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, L: tl.constexpr, L2: tl.constexpr,
    ACCUMULATE: tl.constexpr, SAVE_DZ: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """`right_backward` of a step after the first. Grid (tiles*B1, column blocks, ZC)."""
    right_columns(
        step, visible, first_tile, queries, k, v, mid, stats, dk, dv, scale,
        A, C, B1, B2, H, D, ZC, AC, Z, AP, DP, M, L, L2, ACCUMULATE, SAVE_DZ, VALUES, PRECISION, STAGES, True,
    )  # fmt: skip


@kernel
def right_further_query(
    step: tl.tensor, visible: tl.tensor, queries: tl.tensor, k: tl.tensor, v: tl.tensor, mid: tl.tensor,
    stats: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr, Z: tl.constexpr, AP: tl.constexpr,
    DP: tl.constexpr, M: tl.constexpr, L: tl.constexpr, SPLIT: tl.constexpr, SAVED_DZ: tl.constexpr,
    VALUES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """du of a share of the rows (a, j), for one key row: to the first place in `mid`. Grid (C*B1, SPLIT, ZC).

    <du, u> takes the place of e in `stats`. With SAVED_DZ, where L are all columns, the gradient of R's scores is read
    from `mid`; otherwise it is computed again, with VALUES as in `right_backward`.
    """
    ck = tl.program_id(0)
    c = ck // B1
    z = tl.program_id(2)
    zh = tl.load(step) + z
    a0 = tl.load(step + 1)
    b, h = zh // H, zh % H
    R: tl.constexpr = AC * B2
    CK: tl.constexpr = C * B1
    d = tl.arange(0, DP)
    l = tl.arange(0, L)
    low, high = row_range(visible, a0, c, A, AC, B2, M, AP)
    high = tl.where(zh < Z, high, 0)
    share = (high - low + SPLIT - 1) // SPLIT
    first = low + tl.program_id(1) * share
    last = tl.minimum(first + share, high)
    key_row = tile_offset(b, c, h, C, B1, B2, H, D) + (ck % B1) * (B2 * H * D)
    place = z.to(tl.int64) * R * CK + ck
    queries += place * (2 * D) + D
    mid += place * (2 * D)
    stats += place
    if first < last:
        k_l = load_rows(k + key_row, l * (H * D), l < B2, d, D)
        for block in tl.range(first, last, num_stages=STAGES):
            r = block * M + tl.arange(0, M)
            a = r // B2
            live = (r < R) & (a0 + a < A)
            live = live & (tl.load(visible + a0 + a, mask=live, other=0) > c)
            row = wide(r, R * CK * 2 * D) * CK
            u = load_rows(queries, row * (2 * D), live, d, D)
            if SAVED_DZ:
                d_z = load_rows(mid, row * (2 * D), live, l, B2)
                du = tl.dot(d_z, k_l, input_precision=PRECISION)
            else:
                d_alpha = load_rows(mid, row * (2 * D), live, d, D)
                d_y = d_alpha
                if VALUES:
                    d_y = load_rows(mid + D, row * (2 * D), live, d, D)
                lse = tl.load(stats + row, mask=live, other=float("inf"))
                d_cl = tl.load(stats + ZC * R * CK + row, mask=live, other=0.0)
                e = tl.load(stats + 2 * ZC * R * CK + row, mask=live, other=0.0)
                du = tl.zeros([M, DP], tl.float32)
                for part in range((B2 + L - 1) // L):
                    l_n = part * L + l
                    k_n = load_rows(k + key_row, l_n * (H * D), l_n < B2, d, D)
                    v_n = k_n
                    if VALUES:
                        v_n = load_rows(v + key_row, l_n * (H * D), l_n < B2, d, D)
                    du = query_gradients(
                        u, k_n, v_n, l_n < B2, d_alpha, d_y, lse, d_cl, e, du, scale, PRECISION, VALUES
                    )  # fmt: skip
            du = du.to(u.dtype)
            store_rows(mid, row * (2 * D), live, d, du, D)
            product = tl.sum(du.to(tl.float32) * u.to(tl.float32), 1)
            tl.store(stats + 2 * ZC * R * CK + row, product, mask=live)


@kernel
def load_further(
    mid: tl.tensor, stats: tl.tensor, further_mid: tl.tensor, further_stats: tl.tensor, n: tl.tensor, end: tl.tensor,
    d: tl.tensor, D: tl.constexpr, SIZE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of key rows n below `end`: alpha, c_L, f, du and <du, u>, which is zero where f is at its limit."""
    seen = n < end
    alpha = load_rows(mid, n * (2 * D), seen, d, D)
    du = load_rows(further_mid, n * (2 * D), seen, d, D)
    c_l = tl.load(stats + SIZE + n, mask=seen, other=float("inf"))
    factor = tl.load(stats + 2 * SIZE + n, mask=seen, other=0.0)
    product = tl.load(further_stats + 2 * SIZE + n, mask=seen, other=0.0)
    return alpha, c_l, factor, du, tl.where(factor < MAX_FACTOR, product, 0.0)


@kernel
def direct_sums(
    q_i: tl.tensor, lse_i: tl.tensor, alpha: tl.tensor, c_l: tl.tensor, factor: tl.tensor, du: tl.tensor,
    product: tl.tensor, dq_i: tl.tensor, less_i: tl.tensor, scale: tl.tensor, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Adds sum_ck f L du to dq [I, D] and sum_ck f L <du, u> to `less_i` [I] for rows i; lse_i is to the base 2."""
    x = tl.dot(q_i, alpha.T, input_precision=PRECISION) * (scale * LOG2_E) - (c_l * LOG2_E)[None, :]
    p = tl.exp2(x - lse_i[:, None]) * factor[None, :]  # L again (paper, A.2); with f, or float16 would lose bits
    less_i += tl.sum(p * product[None, :], 1)
    return tl.dot(p.to(q_i.dtype), du, dq_i, input_precision=PRECISION), less_i


@kernel
def score_gradients(
    q_i: tl.tensor, lse_i: tl.tensor, delta_i: tl.tensor, alpha: tl.tensor, c_l: tl.tensor, factor: tl.tensor,
    du: tl.tensor, product: tl.tensor, scale: tl.tensor, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The gradient of L's scores times `scale` [I, N] in q's dtype; the rows' shares of d_cl and e, float32 [N]."""
    x = tl.dot(q_i, alpha.T, input_precision=PRECISION) * (scale * LOG2_E) - (c_l * LOG2_E)[None, :]
    d_p = (tl.dot(q_i, du.T, input_precision=PRECISION) - product[None, :]) * factor[None, :]
    d_x = tl.exp2(x - lse_i[:, None]) * (d_p - delta_i[:, None])
    low = (d_x * scale).to(q_i.dtype)
    d_x = low.to(tl.float32) / scale  # d_cl and e must fit the rounded d_alpha
    return low, -tl.sum(d_x, 0), tl.sum(d_x * x * LN_2, 0)


@kernel
def query_rows(
    q: tl.tensor, lse: tl.tensor, query: tl.tensor, place: tl.tensor, i: tl.tensor, d: tl.tensor, B1: tl.constexpr,
    B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Rows i of a query column, whose offsets are `query` and `place`: q and log-sum-exp (base 2)."""
    q_i = load_rows(q + query, i * (B2 * H * D), i < B1, d, D)
    return q_i, tl.load(lse + place + i * (B2 * H), mask=i < B1, other=float("inf")) * LOG2_E


@kernel
def add_rows(
    dq_left: tl.tensor, dq_i: tl.tensor, i: tl.tensor, d: tl.tensor, B1: tl.constexpr, D: tl.constexpr,
) -> None:  # fmt: skip
    """Adds to rows i of a query column's dq."""
    store_rows(dq_left, i * D, i < B1, d, dq_i + load_rows(dq_left, i * D, i < B1, d, D), D)


@kernel
def store_gradients(
    mid: tl.tensor, stats: tl.tensor, n: tl.tensor, end: tl.tensor, d: tl.tensor, d_alpha: tl.tensor, d_cl: tl.tensor,
    e: tl.tensor, D: tl.constexpr, SIZE: tl.constexpr,
) -> None:  # fmt: skip
    """Writes the gradients of key rows n below `end` in place of alpha, c_L and f."""
    store_rows(mid, n * (2 * D), n < end, d, d_alpha, D)
    tl.store(stats + SIZE + n, d_cl, mask=n < end)
    tl.store(stats + 2 * SIZE + n, e, mask=n < end)


@kernel
def through_rows(
    q: tl.tensor, lse: tl.tensor, mid: tl.tensor, stats: tl.tensor, further_mid: tl.tensor, further_stats: tl.tensor,
    dq_left: tl.tensor, delta: tl.tensor, query: tl.tensor, place: tl.tensor, end: tl.tensor, scale: tl.tensor,
    B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, I: tl.constexpr,
    I2: tl.constexpr, N: tl.constexpr, SIZE: tl.constexpr, FUSED: tl.constexpr, APART: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """dq_left and `delta` of a block of rows; with FUSED, these are all rows, also what `through_keys` computes."""
    d = tl.arange(0, DP)
    i = tl.program_id(1) * I + tl.arange(0, I)
    q_i, lse_i = query_rows(q, lse, query, place, i, d, B1, B2, H, D)
    dq_i = tl.zeros([I, DP], tl.float32)
    less_i = tl.zeros([I], tl.float32)
    if I2:
        i_1 = I + tl.arange(0, I2)
        q_1, lse_1 = query_rows(q, lse, query, place, i_1, d, B1, B2, H, D)
        dq_1 = tl.zeros([I2, DP], tl.float32)
        less_1 = tl.zeros([I2], tl.float32)
        nothing = tl.full([N, DP], scale * 0.0, tl.float32)
    for start in tl.range(0, end, N, num_stages=STAGES):
        alpha, c_l, factor, du, product = load_further(
            mid, stats, further_mid, further_stats, start + tl.arange(0, N), end, d, D, SIZE
        )  # fmt: skip
        dq_i, less_i = direct_sums(q_i, lse_i, alpha, c_l, factor, du, product, dq_i, less_i, scale, PRECISION)
        if I2:
            dq_1, less_1 = direct_sums(q_1, lse_1, alpha, c_l, factor, du, product, dq_1, less_1, scale, PRECISION)
    delta_i = tl.sum(dq_i * q_i.to(tl.float32), 1) - less_i
    tl.store(delta + place + i * (B2 * H), delta_i, mask=i < B1)
    if I2:
        delta_1 = tl.sum(dq_1 * q_1.to(tl.float32), 1) - less_1
        tl.store(delta + place + i_1 * (B2 * H), delta_1, mask=i_1 < B1)
    blocks = (end + N - 1) // N
    for block in tl.range(0, blocks, num_stages=STAGES):  # the last first: they are in the cache still
        n = (blocks - 1 - block) * N + tl.arange(0, N)
        alpha, c_l, factor, du, product = load_further(mid, stats, further_mid, further_stats, n, end, d, D, SIZE)
        low, d_cl, e = score_gradients(q_i, lse_i, delta_i, alpha, c_l, factor, du, product, scale, PRECISION)
        dq_i = tl.dot(low, alpha, dq_i, input_precision=PRECISION)
        if FUSED:
            d_alpha = tl.dot(low.T, q_i, input_precision=PRECISION)
            if I2:
                low_1, d_cl_1, e_1 = score_gradients(
                    q_1, lse_1, delta_1, alpha, c_l, factor, du, product, scale, PRECISION
                )  # fmt: skip
                dq_1 = tl.dot(low_1, alpha, dq_1, input_precision=PRECISION)
                d_alpha = add_dot(low_1.T, q_1, d_alpha, nothing, APART, PRECISION)
                d_cl += d_cl_1
                e += e_1
            store_gradients(mid, stats, n, end, d, d_alpha, d_cl, e, D, SIZE)
    add_rows(dq_left, dq_i, i, d, B1, D)
    if I2:
        add_rows(dq_left, dq_1, i_1, d, B1, D)


@kernel
def through_keys(
    q: tl.tensor, lse: tl.tensor, mid: tl.tensor, stats: tl.tensor, further_mid: tl.tensor, further_stats: tl.tensor,
    delta: tl.tensor, query: tl.tensor, place: tl.tensor, end: tl.tensor, scale: tl.tensor, B1: tl.constexpr,
    B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, I: tl.constexpr, N: tl.constexpr,
    SIZE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """d_alpha, d_cl and e of all key rows, summed over all rows of the query column; `delta` is known."""
    d = tl.arange(0, DP)
    blocks = (end + N - 1) // N
    for block in tl.range(0, blocks, num_stages=STAGES):  # the last first: they are in the cache still
        n = (blocks - 1 - block) * N + tl.arange(0, N)
        alpha, c_l, factor, du, product = load_further(mid, stats, further_mid, further_stats, n, end, d, D, SIZE)
        d_alpha = tl.zeros([N, DP], tl.float32)
        d_cl = tl.zeros([N], tl.float32)
        e = tl.zeros([N], tl.float32)
        for part in range((B1 + I - 1) // I):
            i = part * I + tl.arange(0, I)
            q_i, lse_i = query_rows(q, lse, query, place, i, d, B1, B2, H, D)
            delta_i = tl.load(delta + place + i * (B2 * H), mask=i < B1, other=0.0)
            low, d_cl_i, e_i = score_gradients(q_i, lse_i, delta_i, alpha, c_l, factor, du, product, scale, PRECISION)
            d_alpha = tl.dot(low.T, q_i, d_alpha, input_precision=PRECISION)
            d_cl += d_cl_i
            e += e_i
        store_gradients(mid, stats, n, end, d, d_alpha, d_cl, e, D, SIZE)


@kernel
def left_refine_backward(
    step: tl.tensor, visible: tl.tensor, q: tl.tensor, lse: tl.tensor, mid: tl.tensor, stats: tl.tensor,
    further_mid: tl.tensor, further_stats: tl.tensor, dq_left: tl.tensor, delta: tl.tensor, scale: tl.tensor,
    A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    ZC: tl.constexpr, AC: tl.constexpr, Z: tl.constexpr, DP: tl.constexpr, I: tl.constexpr, I2: tl.constexpr,
    N: tl.constexpr, FUSED: tl.constexpr, QUERY: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Back through `left_refine` for one query column (a, j). Grid (AC*B2, blocks of i if QUERY, ZC).

    Reads du and <du, u> from `mid` and `stats` of the next step. In its own step's alpha, c_L and f give way to their
    gradients d_alpha, d_cl, and e; what comes through the step is added to `dq_left`. FUSED does it all, for
    B1 <= I + I2; otherwise (I2 = 0) one launch with QUERY does dq_left and sum_ck L dL, in `delta` [B, A, b1, b2, H],
    and then one without does the rest.
    """
    r = tl.program_id(0)
    z = tl.program_id(2)
    zh = tl.load(step) + z
    a = tl.load(step + 1) + r // B2
    j = r % B2
    b, h = zh // H, zh % H
    R: tl.constexpr = AC * B2
    CK: tl.constexpr = C * B1
    SIZE: tl.constexpr = ZC * R * CK
    if (zh < Z) & (a < A):
        query = tile_offset(b, a, h, A, B1, B2, H, D) + j * (H * D)
        place = (b * A + a).to(tl.int64) * (B1 * B2 * H) + j * H + h  # of [b, a, 0, j, h] in lse and delta
        row = (z.to(tl.int64) * R + r) * CK
        mid += row * (2 * D)
        further_mid += row * (2 * D)
        stats += row
        further_stats += row
        dq_left += (z.to(tl.int64) * R + r) * (B1 * D)
        end = tl.load(visible + a) * B1
        if FUSED | QUERY:
            through_rows(
                q, lse, mid, stats, further_mid, further_stats, dq_left, delta, query, place, end, scale,
                B1, B2, H, D, DP, I, I2, N, SIZE, FUSED, APART, PRECISION, STAGES,
            )  # fmt: skip
        else:
            through_keys(
                q, lse, mid, stats, further_mid, further_stats, delta, query, place, end, scale,
                B1, B2, H, D, DP, I, N, SIZE, PRECISION, STAGES,
            )  # fmt: skip
