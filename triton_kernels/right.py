"""Kernels of the factor R (paper, A.2): softmax over a key tile's columns l, per key row (c, k) and query row (a, j).

Rows r = (a, j) of a chunk of query tiles are one flat axis, so that blocks of M rows waste nothing; so are key rows
ck = (c, k). Between kernels, `mid` [z, r, ck, 2, D] holds alpha and Y (later their gradients), `stats` float32
[3, z, r, ck] holds the log-sum-exp of R's scores (base 2), c_L (natural; later the gradient of c_L) and the term e that
`left.backward` describes. z counts the (batch, head) pairs of a chunk.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Kernel bodies are Triton's language, not Python's: its types are not the ones they run with.
import triton.language as tl

from monarchrt.triton_kernels.jit import (
    LN_2,
    LOG2_E,
    LOWEST,
    kernel,
    load_rows,
    row_range,
    store_rows,
    tile_offset,
    wide,
)


@kernel
def right_softmax(
    q_r: tl.tensor, k_0: tl.tensor, live_0: tl.tensor, k_1: tl.tensor, live_1: tl.tensor, scale: tl.tensor,
    L2: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """R of rows [M, D] over all columns of a key row, in parts of L and L2: R of both, top, total, entropy.

    Base 2: total = sum_l exp2(x_l - top); entropy = sum_l p_l (x_l - top). R is in the dtype of q.
    """
    x = tl.dot(q_r, k_0.T, input_precision=PRECISION) * (scale * LOG2_E)
    x = tl.where(live_0[None, :], x, LOWEST)
    top = tl.max(x, 1)
    if L2:
        x_1 = tl.dot(q_r, k_1.T, input_precision=PRECISION) * (scale * LOG2_E)
        x_1 = tl.where(live_1[None, :], x_1, LOWEST)
        top = tl.maximum(top, tl.max(x_1, 1))
    x -= top[:, None]
    p = tl.exp2(x)  # the update of R (paper, A.2): softmax over l
    total = tl.sum(p, 1)
    if L2:
        x_1 -= top[:, None]
        p_1 = tl.exp2(x_1)
        total += tl.sum(p_1, 1)
    inverse = 1.0 / total
    p *= inverse[:, None]
    entropy = tl.sum(p * x, 1)
    low_p = p.to(q_r.dtype)
    low_p_1 = low_p
    if L2:
        p_1 *= inverse[:, None]
        entropy += tl.sum(p_1 * x_1, 1)
        low_p_1 = p_1.to(q_r.dtype)
    return low_p, low_p_1, top, total, entropy


@kernel
def right_sum(
    p: tl.tensor, p_1: tl.tensor, x_0: tl.tensor, x_1: tl.tensor, L2: tl.constexpr, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """alpha or Y [M, D]: R times keys or values, in parts of L and L2."""
    vectors = tl.dot(p, x_0, input_precision=PRECISION)
    if L2:
        vectors = tl.dot(p_1, x_1, vectors, input_precision=PRECISION)
    return vectors


@kernel
def right_block(
    q_r: tl.tensor, k_0: tl.tensor, v_0: tl.tensor, live_0: tl.tensor, k_1: tl.tensor, v_1: tl.tensor,
    live_1: tl.tensor, scale: tl.tensor, L2: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """`right_softmax` with alpha and Y in place of R."""
    p, p_1, top, total, entropy = right_softmax(q_r, k_0, live_0, k_1, live_1, scale, L2, PRECISION)
    alpha = right_sum(p, p_1, k_0, k_1, L2, PRECISION)
    y = right_sum(p, p_1, v_0, v_1, L2, PRECISION)
    return alpha, y, top, total, entropy


@kernel
def right_online(
    q_r: tl.tensor, k: tl.tensor, v: tl.tensor, l: tl.tensor, d: tl.tensor, scale: tl.tensor, B2: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """`right_block` in blocks of L columns, from pointers to a key row's: alpha and Y times total, entropy too."""
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    entropy = tl.zeros([M], tl.float32)
    alpha = tl.zeros([M, DP], tl.float32)
    y = tl.zeros([M, DP], tl.float32)
    for n in range((B2 + L - 1) // L):
        l_n = n * L + l
        k_l = load_rows(k, l_n * (H * D), l_n < B2, d, D)
        v_l = load_rows(v, l_n * (H * D), l_n < B2, d, D)
        x = tl.dot(q_r, k_l.T, input_precision=PRECISION) * (scale * LOG2_E)
        x = tl.where((l_n < B2)[None, :], x, LOWEST)
        new_top = tl.maximum(top, tl.max(x, 1))
        shrink = tl.exp2(top - new_top)
        x -= new_top[:, None]
        p = tl.exp2(x)  # the update of R (paper, A.2): softmax over l
        entropy = (entropy + total * (top - new_top)) * shrink + tl.sum(p * x, 1)
        total = total * shrink + tl.sum(p, 1)
        low_p = p.to(q_r.dtype)
        alpha = tl.dot(low_p, k_l, alpha * shrink[:, None], input_precision=PRECISION)
        y = tl.dot(low_p, v_l, y * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return alpha, y, top, total, entropy


@kernel
def right_rows(
    item: tl.tensor, part: tl.tensor, z: tl.tensor, first_pair: tl.tensor, a0: tl.tensor, visible: tl.tensor,
    q: tl.tensor, k: tl.tensor, v: tl.tensor, mid: tl.tensor, stats: tl.tensor, scale: tl.tensor, A: tl.constexpr,
    C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ZC: tl.constexpr,
    AC: tl.constexpr, Z: tl.constexpr, AP: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, L: tl.constexpr,
    L2: tl.constexpr, SPLIT: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    AGAIN: tl.constexpr = False, VALUES: tl.constexpr = True, KEPT: tl.constexpr = False,
) -> None:  # fmt: skip
    """alpha, Y and c_L of one key row, looping over share `part` of SPLIT of the rows (a, j).

    AGAIN, in a refinement step after the first, queries are alpha_R in `mid`, where alpha replaces them. KEPT, they are
    in the second place of `q`, which is the `mid` of the step before. Without VALUES there is no Y.
    """
    ck = item
    c = ck // B1
    zh = first_pair + z
    b, h = zh // H, zh % H
    R: tl.constexpr = AC * B2
    CK: tl.constexpr = C * B1
    NL: tl.constexpr = (B2 + L + L2 - 1) // (L + L2)
    d = tl.arange(0, DP)
    l = tl.arange(0, L)
    low, high = row_range(visible, a0, c, A, AC, B2, M, AP)
    high = tl.where(zh < Z, high, 0)
    share = (high - low + SPLIT - 1) // SPLIT
    first = low + part * share
    last = tl.minimum(first + share, high)
    key_row = tile_offset(b, c, h, C, B1, B2, H, D) + (ck % B1) * (B2 * H * D)
    query = tile_offset(b, a0, h, A, B1, B2, H, D) + (ck % B1) * (B2 * H * D)
    mid += (z.to(tl.int64) * R * CK + ck) * (2 * D)
    stats += z.to(tl.int64) * R * CK + ck
    if first < last:
        live_0 = l < B2
        k_0 = load_rows(k + key_row, l * (H * D), live_0, d, D)
        v_0 = load_rows(v + key_row, l * (H * D), live_0, d, D)
        if L2:
            l_1 = L + tl.arange(0, L2)
            live_1 = l_1 < B2
            k_1 = load_rows(k + key_row, l_1 * (H * D), live_1, d, D)
            v_1 = load_rows(v + key_row, l_1 * (H * D), live_1, d, D)
        else:
            k_1, v_1, live_1 = k_0, v_0, live_0
        for block in tl.range(first, last, num_stages=STAGES):
            r = block * M + tl.arange(0, M)
            a, j = r // B2, r % B2
            live = (r < R) & (a0 + a < A)
            out = wide(r, R * CK * 2 * D) * (CK * 2 * D)
            if AGAIN:
                live = live & (tl.load(visible + a0 + a, mask=live, other=0) > c)
                q_r = load_rows(mid, out, live, d, D)
            elif KEPT:
                live = live & (tl.load(visible + a0 + a, mask=live, other=0) > c)
                q_r = load_rows(q + (z.to(tl.int64) * R * CK + ck) * (2 * D) + D, out, live, d, D)
            else:
                q_r = load_rows(q + query, wide(a, A * B1 * B2 * H * D) * (B1 * B2 * H * D) + j * (H * D), live, d, D)
            if NL == 1:
                p, p_1, top, total, entropy = right_softmax(q_r, k_0, live_0, k_1, live_1, scale, L2, PRECISION)
                # alpha is stored before Y is made: both at once take too many registers
                store_rows(mid, out, live, d, right_sum(p, p_1, k_0, k_1, L2, PRECISION), D)
                if VALUES:
                    store_rows(mid + D, out, live, d, right_sum(p, p_1, v_0, v_1, L2, PRECISION), D)
            else:
                alpha, y, top, total, entropy = right_online(
                    q_r, k + key_row, v + key_row, l, d, scale, B2, H, D, DP, M, L, PRECISION
                )  # fmt: skip
                inverse = 1.0 / total
                entropy *= inverse
                store_rows(mid, out, live, d, alpha * inverse[:, None], D)
                if VALUES:
                    store_rows(mid + D, out, live, d, y * inverse[:, None], D)
            log_total = tl.log2(total)
            row = wide(r, R * CK * 2 * D) * CK
            tl.store(stats + ZC * R * CK + row, (entropy - log_total) * LN_2, mask=live)
            if SAVE:
                tl.store(stats + row, top + log_total, mask=live)


@kernel
def right_keys(
    k_row: tl.tensor, first_c: tl.tensor, zh: tl.tensor, r0: tl.tensor, block: tl.tensor, visible: tl.tensor,
    q: tl.tensor, k: tl.tensor, v: tl.tensor, mid: tl.tensor, c_l: tl.tensor, scale: tl.tensor, A: tl.constexpr,
    C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, RC: tl.constexpr,
    TILES: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, L: tl.constexpr, L2: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """alpha, Y and c_L of M rows r0 + block*M + m in row k, looping over TILES key tiles from `first_c`.

    Rows r = a*B2 + j count all query tiles; `mid` [RC, C*B1, 2, D] and `c_l` [RC, C*B1] are those of RC rows from r0.
    """
    b, h = zh // H, zh % H
    CK: tl.constexpr = C * B1
    d = tl.arange(0, DP)
    at = block * M + tl.arange(0, M)
    r = r0 + at
    live = (at < RC) & (r < A * B2)
    a, j = r // B2, r % B2
    tiles = tl.load(visible + a, mask=live, other=0)
    query = tile_offset(b, 0, h, A, B1, B2, H, D) + k_row * (B2 * H * D)
    keys = tile_offset(b, 0, h, C, B1, B2, H, D) + k_row * (B2 * H * D)
    q_r = load_rows(q + query, wide(a, A * B1 * B2 * H * D) * (B1 * B2 * H * D) + j * (H * D), live, d, D)
    last_c = tl.minimum(first_c + TILES, tl.max(tiles, 0))  # the warps wait for each other after q's loads are sent
    l = tl.arange(0, L)
    live_0 = l < B2
    for c in tl.range(first_c, last_c, num_stages=STAGES):
        key_row = keys + wide(c, C * B1 * B2 * H * D) * (B1 * B2 * H * D)
        k_0 = load_rows(k + key_row, l * (H * D), live_0, d, D)
        v_0 = load_rows(v + key_row, l * (H * D), live_0, d, D)
        if L2:
            l_1 = L + tl.arange(0, L2)
            live_1 = l_1 < B2
            k_1 = load_rows(k + key_row, l_1 * (H * D), live_1, d, D)
            v_1 = load_rows(v + key_row, l_1 * (H * D), live_1, d, D)
        else:
            k_1, v_1, live_1 = k_0, v_0, live_0
        alpha, y, _, total, entropy = right_block(q_r, k_0, v_0, live_0, k_1, v_1, live_1, scale, L2, PRECISION)
        row = wide(at, RC * CK * 2 * D) * CK + (c * B1 + k_row)
        store_rows(mid, row * (2 * D), live, d, alpha, D)
        store_rows(mid + D, row * (2 * D), live, d, y, D)
        tl.store(c_l + row, (entropy - tl.log2(total)) * LN_2, mask=live)


@kernel
def right_forward(
    step: tl.tensor, visible: tl.tensor, q: tl.tensor, k: tl.tensor, v: tl.tensor, mid: tl.tensor, stats: tl.tensor,
    scale: tl.tensor, A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr, Z: tl.constexpr, AP: tl.constexpr, DP: tl.constexpr,
    M: tl.constexpr, L: tl.constexpr, L2: tl.constexpr, SPLIT: tl.constexpr, SAVE: tl.constexpr, AGAIN: tl.constexpr,
    VALUES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """`right_rows` for one step. Grid (C*B1, SPLIT, ZC)."""
    right_rows(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.load(step), tl.load(step + 1),
        visible, q, k, v, mid, stats, scale,
        A, C, B1, B2, H, D, ZC, AC, Z, AP, DP, M, L, L2, SPLIT, SAVE, PRECISION, STAGES, AGAIN, VALUES,
    )  # fmt: skip


@kernel
def right_gradients(
    k_l: tl.tensor, v_l: tl.tensor, q_r: tl.tensor, d_alpha: tl.tensor, d_y: tl.tensor, lse: tl.tensor,
    d_cl: tl.tensor, e: tl.tensor, live: tl.tensor, dk_l: tl.tensor, dv_l: tl.tensor, scale: tl.tensor,
    PRECISION: tl.constexpr, VALUES: tl.constexpr = True,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Adds the rows' share to dk and dv [L, D]; the gradient of R's scores [L, M] in q's dtype.

    Without VALUES there was no Y: dv stays as it is.
    """
    log_p = tl.dot(k_l, q_r.T, input_precision=PRECISION) * (scale * LOG2_E) - lse[None, :]
    d_p = tl.dot(k_l, d_alpha.T, input_precision=PRECISION)
    if VALUES:
        d_p = tl.dot(v_l, d_y.T, d_p, input_precision=PRECISION)
    p = tl.exp2(log_p)  # R again (paper, A.2)
    # a row that is not live has p = 0 and log_p = -inf: keep 0 * inf out of its gradient
    d_p += tl.where(live, d_cl * LN_2, 0.0)[None, :] * tl.maximum(log_p, LOWEST) - e[None, :]
    d_z = (p * d_p * scale).to(q_r.dtype)
    p = p.to(q_r.dtype)
    if VALUES:
        dv_l = tl.dot(p, d_y, dv_l, input_precision=PRECISION)
    dk_l = tl.dot(p, d_alpha, dk_l, input_precision=PRECISION)
    dk_l = tl.dot(d_z, q_r, dk_l, input_precision=PRECISION)
    return dk_l, dv_l, d_z


@kernel
def store_sum(
    pointer: tl.tensor, offsets: tl.tensor, live: tl.tensor, d: tl.tensor, x: tl.tensor, D: tl.constexpr,
    ACCUMULATE: tl.constexpr,
) -> None:  # fmt: skip
    """Stores rows, with ACCUMULATE added to what is there."""
    if ACCUMULATE:
        x += load_rows(pointer, offsets, live, d, D)
    store_rows(pointer, offsets, live, d, x, D)


@kernel
def right_columns(
    step: tl.tensor, visible: tl.tensor, first_tile: tl.tensor, q: tl.tensor, k: tl.tensor, v: tl.tensor,
    mid: tl.tensor, stats: tl.tensor, dk: tl.tensor, dv: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr,
    Z: tl.constexpr, AP: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, L: tl.constexpr, L2: tl.constexpr,
    ACCUMULATE: tl.constexpr, SAVE_DZ: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, KEPT: tl.constexpr = False,
) -> None:  # fmt: skip
    """dk and dv of L + L2 columns of one key row; arguments as in `right_backward`, KEPT as in `right_rows`."""
    ck = tl.program_id(0) + tl.load(first_tile) * B1
    c = ck // B1
    z = tl.program_id(2)
    zh = tl.load(step) + z
    a0 = tl.load(step + 1)
    b, h = zh // H, zh % H
    R: tl.constexpr = AC * B2
    CK: tl.constexpr = C * B1
    d = tl.arange(0, DP)
    l = tl.program_id(1) * (L + L2) + tl.arange(0, L)
    live_l = l < B2
    low, high = row_range(visible, a0, c, A, AC, B2, M, AP)
    if (zh < Z) & (c >= 0) & (c < C):
        key_row = tile_offset(b, c, h, C, B1, B2, H, D) + (ck % B1) * (B2 * H * D)
        query = tile_offset(b, a0, h, A, B1, B2, H, D) + (ck % B1) * (B2 * H * D)
        mid += (z.to(tl.int64) * R * CK + ck) * (2 * D)
        stats += z.to(tl.int64) * R * CK + ck
        seen = tl.where(low < high, B2, 0)  # keys that nobody sees may hold anything
        k_l = load_rows(k + key_row, l * (H * D), l < seen, d, D)
        v_l = load_rows(v + key_row, l * (H * D), l < seen, d, D)
        dk_l = tl.zeros([L, DP], tl.float32)
        dv_l = tl.zeros([L, DP], tl.float32)
        if L2:
            l_1 = tl.program_id(1) * (L + L2) + L + tl.arange(0, L2)
            live_1 = l_1 < B2
            k_1 = load_rows(k + key_row, l_1 * (H * D), l_1 < seen, d, D)
            v_1 = load_rows(v + key_row, l_1 * (H * D), l_1 < seen, d, D)
            dk_1 = tl.zeros([L2, DP], tl.float32)
            dv_1 = tl.zeros([L2, DP], tl.float32)
        for block in tl.range(low, high, num_stages=STAGES):
            r = block * M + tl.arange(0, M)
            a, j = r // B2, r % B2
            live = (r < R) & (a0 + a < A)
            live = live & (tl.load(visible + a0 + a, mask=live, other=0) > c)
            if KEPT:
                kept = wide(r, R * CK * 2 * D) * (CK * 2 * D)
                q_r = load_rows(q + (z.to(tl.int64) * R * CK + ck) * (2 * D) + D, kept, live, d, D)
            else:
                q_r = load_rows(q + query, wide(a, A * B1 * B2 * H * D) * (B1 * B2 * H * D) + j * (H * D), live, d, D)
            row = wide(r, R * CK * 2 * D) * CK
            d_alpha = load_rows(mid, row * (2 * D), live, d, D)
            d_y = d_alpha
            if VALUES:
                d_y = load_rows(mid + D, row * (2 * D), live, d, D)
            lse = tl.load(stats + row, mask=live, other=float("inf"))
            d_cl = tl.load(stats + ZC * R * CK + row, mask=live, other=0.0)
            e = tl.load(stats + 2 * ZC * R * CK + row, mask=live, other=0.0)
            dk_l, dv_l, d_z = right_gradients(
                k_l, v_l, q_r, d_alpha, d_y, lse, d_cl, e, live, dk_l, dv_l, scale, PRECISION, VALUES
            )  # fmt: skip
            if L2:
                dk_1, dv_1, d_z_1 = right_gradients(
                    k_1, v_1, q_r, d_alpha, d_y, lse, d_cl, e, live, dk_1, dv_1, scale, PRECISION, VALUES
                )  # fmt: skip
            if SAVE_DZ:
                place = mid + (row * (2 * D))[None, :]
                tl.store(place + l[:, None], d_z, mask=live[None, :] & live_l[:, None])
                if L2:
                    tl.store(place + l_1[:, None], d_z_1, mask=live[None, :] & live_1[:, None])
        store_sum(dk + key_row, l * (H * D), live_l, d, dk_l, D, ACCUMULATE)
        if VALUES:
            store_sum(dv + key_row, l * (H * D), live_l, d, dv_l, D, ACCUMULATE)
        if L2:
            store_sum(dk + key_row, l_1 * (H * D), live_1, d, dk_1, D, ACCUMULATE)
            if VALUES:
                store_sum(dv + key_row, l_1 * (H * D), live_1, d, dv_1, D, ACCUMULATE)


@kernel
def right_backward(
    step: tl.tensor, visible: tl.tensor, first_tile: tl.tensor, q: tl.tensor, k: tl.tensor, v: tl.tensor,
    mid: tl.tensor, stats: tl.tensor, dk: tl.tensor, dv: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr,
    Z: tl.constexpr, AP: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, L: tl.constexpr, L2: tl.constexpr,
    ACCUMULATE: tl.constexpr, SAVE_DZ: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """dk and dv of L + L2 columns of one key row, summed over all rows (a, j). Grid (tiles*B1, column blocks, ZC).

    Key tiles start at `first_tile`. With SAVE_DZ the gradient of R's scores overwrites the gradients of alpha and Y in
    `mid`, for `right_query`. With ACCUMULATE the sums are added to dk and dv. Without VALUES, in a refinement
    step before the last, there was no Y: dv stays as it is.
    """
    right_columns(
        step, visible, first_tile, q, k, v, mid, stats, dk, dv, scale,
        A, C, B1, B2, H, D, ZC, AC, Z, AP, DP, M, L, L2, ACCUMULATE, SAVE_DZ, VALUES, PRECISION, STAGES,
    )  # fmt: skip


@kernel
def query_gradients(
    q_r: tl.tensor, k_l: tl.tensor, v_l: tl.tensor, live_l: tl.tensor, d_alpha: tl.tensor, d_y: tl.tensor,
    lse: tl.tensor, d_cl: tl.tensor, e: tl.tensor, dq_r: tl.tensor, scale: tl.tensor, PRECISION: tl.constexpr,
    VALUES: tl.constexpr = True,
) -> tl.tensor:  # fmt: skip
    """Adds to dq [M, D] the part through R of L columns, the gradient of R's scores computed again."""
    log_p = tl.dot(q_r, k_l.T, input_precision=PRECISION) * (scale * LOG2_E) - lse[:, None]
    log_p = tl.where(live_l[None, :], tl.maximum(log_p, LOWEST), LOWEST)
    d_p = tl.dot(d_alpha, k_l.T, input_precision=PRECISION)
    if VALUES:
        d_p = tl.dot(d_y, v_l.T, d_p, input_precision=PRECISION)
    d_p += (d_cl * LN_2)[:, None] * log_p - e[:, None]
    d_z = (tl.exp2(log_p) * d_p * scale).to(q_r.dtype)  # R again (paper, A.2)
    return tl.dot(d_z, k_l, dq_r, input_precision=PRECISION)


@kernel
def right_query(
    step: tl.tensor, visible: tl.tensor, q: tl.tensor, k: tl.tensor, v: tl.tensor, mid: tl.tensor, stats: tl.tensor,
    dq_left: tl.tensor, dq: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr,
    B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr, Z: tl.constexpr,
    AP: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, L: tl.constexpr, L2: tl.constexpr, SAVED_DZ: tl.constexpr,
    VALUES: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """dq of M rows (a, j) in row k: the part through R, summed over key tiles, plus `dq_left`. Grid (blocks, B1, ZC).

    With SAVED_DZ the gradient of R's scores is read from `mid`; otherwise it is computed again, VALUES as in
    `right_backward`.
    """
    k_row = tl.program_id(1)
    z = tl.program_id(2)
    zh = tl.load(step) + z
    a0 = tl.load(step + 1)
    b, h = zh // H, zh % H
    R: tl.constexpr = AC * B2
    CK: tl.constexpr = C * B1
    NL: tl.constexpr = (B2 + L + L2 - 1) // (L + L2)
    d = tl.arange(0, DP)
    l = tl.arange(0, L)
    if zh < Z:
        r = tl.program_id(0) * M + tl.arange(0, M)
        a, j = r // B2, r % B2
        live = (r < R) & (a0 + a < A)
        limit = tl.load(visible + a0 + a, mask=live, other=0)
        place = wide(a, A * B1 * B2 * H * D) * (B1 * B2 * H * D) + j * (H * D)
        query = tile_offset(b, a0, h, A, B1, B2, H, D) + k_row * (B2 * H * D)
        key_row = tile_offset(b, 0, h, C, B1, B2, H, D) + k_row * (B2 * H * D)
        mid += (z.to(tl.int64) * R * CK + k_row) * (2 * D)
        stats += z.to(tl.int64) * R * CK + k_row
        row = wide(r, R * CK * 2 * D) * CK
        dq_left += (z.to(tl.int64) * R * B1 + k_row) * D
        dq_r = load_rows(dq_left, wide(r, R * B1 * D) * (B1 * D), live, d, D)
        if SAVED_DZ:
            for c in tl.range(0, tl.max(limit, 0), num_stages=STAGES):
                key = key_row + wide(c, C * B1 * B2 * H * D) * (B1 * B2 * H * D)
                sees = limit > c
                d_z_row = ((row + c * B1) * (2 * D))[:, None]
                k_l = load_rows(k + key, l * (H * D), l < B2, d, D)
                d_z = tl.load(mid + (d_z_row + l[None, :]), mask=sees[:, None] & (l < B2)[None, :], other=0.0)
                dq_r = tl.dot(d_z, k_l, dq_r, input_precision=PRECISION)
                if L2:
                    l_1 = L + tl.arange(0, L2)
                    k_1 = load_rows(k + key, l_1 * (H * D), l_1 < B2, d, D)
                    d_z_1 = tl.load(mid + (d_z_row + l_1[None, :]), mask=sees[:, None] & (l_1 < B2)[None, :], other=0.0)
                    dq_r = tl.dot(d_z_1, k_1, dq_r, input_precision=PRECISION)
        else:
            q_r = load_rows(q + query, place, live, d, D)
            for c in tl.range(0, tl.max(limit, 0), num_stages=STAGES):
                sees = limit > c
                at = row + c * B1
                d_alpha = load_rows(mid, at * (2 * D), sees, d, D)
                d_y = d_alpha
                if VALUES:
                    d_y = load_rows(mid + D, at * (2 * D), sees, d, D)
                lse = tl.load(stats + at, mask=sees, other=float("inf"))
                d_cl = tl.load(stats + ZC * R * CK + at, mask=sees, other=0.0)
                e = tl.load(stats + 2 * ZC * R * CK + at, mask=sees, other=0.0)
                key = key_row + wide(c, C * B1 * B2 * H * D) * (B1 * B2 * H * D)
                for part in range(NL):
                    l_n = part * (L + L2) + l
                    k_l = load_rows(k + key, l_n * (H * D), l_n < B2, d, D)
                    v_l = load_rows(v + key, l_n * (H * D), l_n < B2, d, D)
                    dq_r = query_gradients(
                        q_r, k_l, v_l, l_n < B2, d_alpha, d_y, lse, d_cl, e, dq_r, scale, PRECISION, VALUES
                    )  # fmt: skip
                    if L2:
                        l_1 = part * (L + L2) + L + tl.arange(0, L2)
                        k_1 = load_rows(k + key, l_1 * (H * D), l_1 < B2, d, D)
                        v_1 = load_rows(v + key, l_1 * (H * D), l_1 < B2, d, D)
                        dq_r = query_gradients(
                            q_r, k_1, v_1, l_1 < B2, d_alpha, d_y, lse, d_cl, e, dq_r, scale, PRECISION, VALUES
                        )  # fmt: skip
        store_rows(dq + query, place, live, d, dq_r, D)
