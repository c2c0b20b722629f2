"""Kernels of the factor L (paper, A.2): for a query column (a, j), softmax over all key rows ck = (c, k).

Scratch as in `right`.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Kernel bodies are Triton's language, not Python's: its types are not the ones they run with.
import triton.language as tl

from monarchrt.triton_kernels.jit import LN_2, LOG2_E, LOWEST, kernel, load_rows, store_rows, tile_offset, wait_for


@kernel
def left_block(
    q_i: tl.tensor, alpha: tl.tensor, y: tl.tensor, c_l: tl.tensor, top: tl.tensor, total: tl.tensor, acc: tl.tensor,
    scale: tl.tensor, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """One step of the softmax over key rows for rows i: its largest score (base 2), sum and weighted sum of Y."""
    x = tl.dot(q_i, alpha.T, input_precision=PRECISION) * (scale * LOG2_E) - (c_l * LOG2_E)[None, :]
    new_top = tl.maximum(top, tl.max(x, 1))
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(x - new_top[:, None])  # the update of L (paper, A.2): softmax over (c, k)
    total = total * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(q_i.dtype), y, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total, acc


@kernel
def left_rows(
    row: tl.tensor, a: tl.tensor, j: tl.tensor, zh: tl.tensor, block: tl.tensor, visible: tl.tensor, q: tl.tensor,
    mid: tl.tensor, c_l: tl.tensor, out: tl.tensor, lse: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, I: tl.constexpr,
    I2: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, made: tl.tensor = None,
    COUNT: tl.constexpr = 0,
) -> None:  # fmt: skip
    """Output and log-sum-exp of block `block` of I + I2 rows i of one query column (a, j).

    Its alpha and Y are `mid[row]` of [rows, C*B1, 2, D], its c_L is `c_l[row]` of [rows, C*B1]. With COUNT they are
    there once so many programs have arrived at the counter `made`; rows of q are loaded meanwhile.
    """
    b, h = zh // H, zh % H
    CK: tl.constexpr = C * B1
    d = tl.arange(0, DP)
    i = block * (I + I2) + tl.arange(0, I)
    live = i < B1
    query = tile_offset(b, a, h, A, B1, B2, H, D) + j * (H * D)
    q_i = load_rows(q + query, i * (B2 * H * D), live, d, D)
    mid += row * (CK * 2 * D)
    c_l += row * CK
    end = tl.load(visible + a) * B1
    if COUNT:
        wait_for(made, COUNT)
    top = tl.full([I], LOWEST, tl.float32)
    total = tl.zeros([I], tl.float32)
    acc = tl.zeros([I, DP], tl.float32)
    if I2:
        i_1 = block * (I + I2) + I + tl.arange(0, I2)
        live_1 = i_1 < B1
        q_1 = load_rows(q + query, i_1 * (B2 * H * D), live_1, d, D)
        top_1 = tl.full([I2], LOWEST, tl.float32)
        total_1 = tl.zeros([I2], tl.float32)
        acc_1 = tl.zeros([I2, DP], tl.float32)
    for start in tl.range(0, end, N, num_stages=STAGES):
        n = start + tl.arange(0, N)
        seen = n < end
        alpha = load_rows(mid, n * (2 * D), seen, d, D)
        y = load_rows(mid + D, n * (2 * D), seen, d, D)
        c_n = tl.load(c_l + n, mask=seen, other=float("inf"))
        top, total, acc = left_block(q_i, alpha, y, c_n, top, total, acc, scale, PRECISION)
        if I2:
            top_1, total_1, acc_1 = left_block(q_1, alpha, y, c_n, top_1, total_1, acc_1, scale, PRECISION)
    place = (b * A + a).to(tl.int64) * (B1 * B2 * H) + j * H + h  # of [b, a, 0, j, h] in lse
    store_rows(out + query, i * (B2 * H * D), live, d, acc * (1.0 / total)[:, None], D)
    tl.store(lse + place + i * (B2 * H), (top + tl.log2(total)) * LN_2, mask=live)
    if I2:
        store_rows(out + query, i_1 * (B2 * H * D), live_1, d, acc_1 * (1.0 / total_1)[:, None], D)
        tl.store(lse + place + i_1 * (B2 * H), (top_1 + tl.log2(total_1)) * LN_2, mask=live_1)


@kernel
def left_gradients(
    q_i: tl.tensor, g_i: tl.tensor, lse_i: tl.tensor, delta_i: tl.tensor, alpha: tl.tensor, y: tl.tensor,
    c_l: tl.tensor, scale: tl.tensor, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """L and the gradient of its scores times `scale`, both [N, I] in q's dtype; shares of d_cl and e, float32 [N]."""
    if TRANSPOSED:  # scores [N, I]: few rows i
        x = tl.dot(alpha, q_i.T, input_precision=PRECISION) * (scale * LOG2_E) - (c_l * LOG2_E)[:, None]
        p = tl.exp2(x - lse_i[None, :])  # L again (paper, A.2)
        d_p = tl.dot(y, g_i.T, input_precision=PRECISION)
        d_x = p * (d_p - delta_i[None, :])
        low_p, low_d_x = p.to(q_i.dtype), (d_x * scale).to(q_i.dtype)
        d_x = low_d_x.to(tl.float32) / scale  # d_cl and e must fit the rounded d_alpha and d_y
        d_cl = -tl.sum(d_x, 1)
        e = tl.sum(low_p.to(tl.float32) * d_p + d_x * x * LN_2, 1)
        return low_p, low_d_x, d_cl, e
    else:  # scores [I, N]
        x = tl.dot(q_i, alpha.T, input_precision=PRECISION) * (scale * LOG2_E) - (c_l * LOG2_E)[None, :]
        p = tl.exp2(x - lse_i[:, None])  # L again (paper, A.2)
        d_p = tl.dot(g_i, y.T, input_precision=PRECISION)
        d_x = p * (d_p - delta_i[:, None])
        low_p, low_d_x = p.to(q_i.dtype), (d_x * scale).to(q_i.dtype)
        d_x = low_d_x.to(tl.float32) / scale
        d_cl = -tl.sum(d_x, 0)
        e = tl.sum(low_p.to(tl.float32) * d_p + d_x * x * LN_2, 0)
        return low_p.T, low_d_x.T, d_cl, e


@kernel
def add_dot(
    a: tl.tensor, b: tl.tensor, acc: tl.tensor, nothing: tl.tensor, APART: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """acc + a b, where `acc` is a product too.

    Of products by warpgroups in a chain the compiler lays all warps along the rows of the first. With more warps than
    blocks of 16 rows that one does its work twice and goes through shared memory in float32: then APART, which adds
    afterwards; `nothing` are zeros that the compiler cannot see, or it would make a chain of them again.
    """
    if APART:
        return acc + tl.dot(a, b, nothing, input_precision=PRECISION)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@kernel
def rows_back(
    q: tl.tensor, d_out: tl.tensor, lse: tl.tensor, delta: tl.tensor, query: tl.tensor, place: tl.tensor, i: tl.tensor,
    d: tl.tensor, B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Rows i of a query column, whose offsets are `query` and `place`: q and dO, log-sum-exp (base 2) and delta."""
    q_i = load_rows(q + query, i * (B2 * H * D), i < B1, d, D)
    g_i = load_rows(d_out + query, i * (B2 * H * D), i < B1, d, D)
    lse_i = tl.load(lse + place + i * (B2 * H), mask=i < B1, other=float("inf")) * LOG2_E
    delta_i = tl.load(delta + place + i * (B2 * H), mask=i < B1, other=0.0)
    return q_i, g_i, lse_i, delta_i


@kernel
def left_sums(
    q: tl.tensor, d_out: tl.tensor, lse: tl.tensor, delta: tl.tensor, query: tl.tensor, place: tl.tensor,
    alpha: tl.tensor, y: tl.tensor, c_l: tl.tensor, scale: tl.tensor, d: tl.tensor, B1: tl.constexpr, B2: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, I: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of N key rows d_y and d_alpha [N, D], d_cl and e [N], summed over all blocks of I rows of a query column."""
    d_y = tl.zeros([N, DP], tl.float32)
    d_alpha = tl.zeros([N, DP], tl.float32)
    d_cl = tl.zeros([N], tl.float32)
    e = tl.zeros([N], tl.float32)
    for part in range((B1 + I - 1) // I):
        i_n = part * I + tl.arange(0, I)
        q_n, g_n, lse_n, delta_n = rows_back(q, d_out, lse, delta, query, place, i_n, d, B1, B2, H, D)
        low_p, low_d_x, d_cl_n, e_n = left_gradients(
            q_n, g_n, lse_n, delta_n, alpha, y, c_l, scale, True, PRECISION
        )  # fmt: skip
        d_y = tl.dot(low_p, g_n, d_y, input_precision=PRECISION)
        d_alpha = tl.dot(low_d_x, q_n, d_alpha, input_precision=PRECISION)
        d_cl += d_cl_n
        e += e_n
    return d_y, d_alpha, d_cl, e


@kernel
def left_backward(
    step: tl.tensor, visible: tl.tensor, q: tl.tensor, d_out: tl.tensor, lse: tl.tensor, delta: tl.tensor,
    mid: tl.tensor, stats: tl.tensor, dq_left: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr,
    Z: tl.constexpr, DP: tl.constexpr, I: tl.constexpr, I2: tl.constexpr, N: tl.constexpr, FUSED: tl.constexpr,
    QUERY: tl.constexpr, TRANSPOSED: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Back through L for one query column (a, j). Grid (AC*B2, blocks of i if QUERY, ZC).

    Replaces alpha and Y in `mid` by their gradients, c_L in `stats` by its gradient and writes there
    e = sum_l R dR = <d_alpha, alpha> + <d_y, Y> + d_cl c_l, what the softmax gradient of R subtracts; written out, it
    is sum_i L dL + dS S over the scores S of L. The part of dq through L goes to `dq_left` float32 [z, r, i, D].
    FUSED does both, for B1 <= I + I2; otherwise (I2 = 0) one launch with QUERY does dq_left only and then one without
    does the rest.
    """
    r = tl.program_id(0)
    z = tl.program_id(2)
    zh = tl.load(step) + z
    a = tl.load(step + 1) + r // B2
    j = r % B2
    b, h = zh // H, zh % H
    R: tl.constexpr = AC * B2
    CK: tl.constexpr = C * B1
    if (zh < Z) & (a < A):
        d = tl.arange(0, DP)
        query = tile_offset(b, a, h, A, B1, B2, H, D) + j * (H * D)
        place = (b * A + a).to(tl.int64) * (B1 * B2 * H) + j * H + h  # of [b, a, 0, j, h] in lse and delta
        row = (z.to(tl.int64) * R + r) * CK
        mid += row * (2 * D)
        stats += row
        end = tl.load(visible + a) * B1
        i = tl.program_id(1) * I + tl.arange(0, I)
        q_i, g_i, lse_i, delta_i = rows_back(q, d_out, lse, delta, query, place, i, d, B1, B2, H, D)
        dq_i = tl.zeros([I, DP], tl.float32)
        if I2:
            i_1 = I + tl.arange(0, I2)
            q_1, g_1, lse_1, delta_1 = rows_back(q, d_out, lse, delta, query, place, i_1, d, B1, B2, H, D)
            dq_1 = tl.zeros([I2, DP], tl.float32)
            nothing = tl.full([N, DP], scale * 0.0, tl.float32)
        for start in tl.range(0, end, N, num_stages=STAGES):
            n = start + tl.arange(0, N)
            seen = n < end
            alpha = load_rows(mid, n * (2 * D), seen, d, D)
            y = load_rows(mid + D, n * (2 * D), seen, d, D)
            c_l = tl.load(stats + ZC * R * CK + n, mask=seen, other=float("inf"))
            if FUSED | QUERY:
                low_p, low_d_x, d_cl, e = left_gradients(
                    q_i, g_i, lse_i, delta_i, alpha, y, c_l, scale, TRANSPOSED, PRECISION
                )  # fmt: skip
                if I2:
                    low_p_1, low_d_x_1, d_cl_1, e_1 = left_gradients(
                        q_1, g_1, lse_1, delta_1, alpha, y, c_l, scale, TRANSPOSED, PRECISION
                    )  # fmt: skip
                    d_cl += d_cl_1
                    e += e_1
                if FUSED:
                    d_y = tl.dot(low_p, g_i, input_precision=PRECISION)
                    if I2:
                        d_y = add_dot(low_p_1, g_1, d_y, nothing, APART, PRECISION)
                    store_rows(mid + D, n * (2 * D), seen, d, d_y, D)
                    d_alpha = tl.dot(low_d_x, q_i, input_precision=PRECISION)
                    if I2:
                        d_alpha = add_dot(low_d_x_1, q_1, d_alpha, nothing, APART, PRECISION)
                    store_rows(mid, n * (2 * D), seen, d, d_alpha, D)
                dq_i = tl.dot(low_d_x.T, alpha, dq_i, input_precision=PRECISION)
                if I2:
                    dq_1 = tl.dot(low_d_x_1.T, alpha, dq_1, input_precision=PRECISION)
            else:
                d_y, d_alpha, d_cl, e = left_sums(
                    q, d_out, lse, delta, query, place, alpha, y, c_l, scale, d, B1, B2, H, D, DP, I, N, PRECISION
                )  # fmt: skip
                store_rows(mid + D, n * (2 * D), seen, d, d_y, D)
                store_rows(mid, n * (2 * D), seen, d, d_alpha, D)
            if FUSED | (not QUERY):
                tl.store(stats + ZC * R * CK + n, d_cl, mask=seen)
                tl.store(stats + 2 * ZC * R * CK + n, e, mask=seen)
        if FUSED | QUERY:
            dq_left += (z.to(tl.int64) * R + r) * (B1 * D)
            store_rows(dq_left, i * D, i < B1, d, dq_i, D)
            if I2:
                store_rows(dq_left, i_1 * D, i_1 < B1, d, dq_1, D)
