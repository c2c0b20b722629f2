"""Kernels of block-sparse attention: a block of queries attends to the blocks of keys that its list names.

Queries, keys and values are [B, tokens, H, D]; a block is a run of tokens, at most ROWS queries or COLUMNS keys, which
a program goes through in parts of M or N. `monarch_jax.contract.Side` has the lists: `first` and `last` are the tokens
that a listed block begins and ends with. The first `whole` of a list hold as many tokens as a block can, and need no
mask; the others have an end and, with BAND, the predicate of `near`. Where a block begins (`at`) is read a step before
its tokens are, so that the copies of these need not wait for it. Scores are to the base 2, and `lse` is infinite
for a query that sees no key, so that its probabilities come out zero.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Kernel bodies are Triton's language, not Python's: its types are not the ones they run with.
import triton.language as tl

from monarchrt.triton_kernels.jit import LOG2_E, LOWEST, kernel, load_rows, store_rows, wide

SEES_NONE = tl.constexpr(-1.0e20)  # a row's largest score is below this if every key is masked
INFINITY = tl.constexpr(float("inf"))


@kernel
def load_block(
    pointer: tl.tensor, rows: tl.tensor, live: tl.tensor, d: tl.tensor, SIZE: tl.constexpr, ROW: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, FULL: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Tokens [n, DP] of one head, ROW numbers apart in an array of SIZE; zeros where not `live`, unless FULL."""
    offsets = wide(rows, SIZE) * ROW
    if FULL and D == DP:
        return tl.load(pointer + offsets[:, None] + d[None, :])
    else:
        return load_rows(pointer, offsets, live, d, D)


@kernel
def near(
    query_place: tl.tensor, key_place: tl.tensor, WIDTH: tl.constexpr, SINK: tl.constexpr
) -> tl.tensor:  # fmt: skip
    """Which pairs are in the band or in the sink; places are [M, 1] and [1, N], or the other way round."""
    return (tl.abs(query_place - key_place) <= WIDTH) | (key_place < SINK)


@kernel
def clear_rest(
    pointer: tl.tensor, start: tl.tensor, end: tl.tensor, d: tl.tensor, SIZE: tl.constexpr, ROW: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
) -> None:  # fmt: skip
    """Zeros for the tokens of one head that lie in no block."""
    for at in range(start, end, N):
        rows = at + tl.arange(0, N)
        zeros = tl.zeros([N, DP], tl.float32)
        store_rows(pointer, wide(rows, SIZE) * ROW, rows < end, d, zeros, D)


@kernel
def own_tokens(
    starts: tl.tensor, bh: tl.tensor, BLOCKS: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The block of a program, N of its tokens, where it ends, and whether they are the last ones in a block."""
    block, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    start = tl.load(starts + bh * (BLOCKS + 1) + block)
    end = tl.load(starts + bh * (BLOCKS + 1) + block + 1)
    return block, start + part * N + tl.arange(0, N), end, (block == BLOCKS - 1) & (part == PARTS - 1)


@kernel
def following(first: tl.tensor, n: tl.tensor, n_all: tl.tensor, SLICES: tl.constexpr) -> tl.tensor:
    """Where the block of the step after n begins; after the last one, that of the last."""
    return tl.load(first + tl.minimum(n + 1, n_all - 1) // SLICES)


@kernel
def whole_block(
    q_r: tl.tensor, k: tl.tensor, v: tl.tensor, at: tl.tensor, n: tl.tensor, c: tl.tensor, d: tl.tensor,
    SIZE: tl.constexpr, ROW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Scores [M, N] of step n, keys and values, all keys of the block at `at` seen; a column beyond has a zero key."""
    SLICES: tl.constexpr = (COLUMNS + N - 1) // N
    inside = (n % SLICES) * N + c
    column = at + inside
    live_c = inside < COLUMNS
    k_c = load_block(k, column, live_c, d, SIZE, ROW, D, DP, COLUMNS % N == 0)
    v_c = load_block(v, column, live_c, d, SIZE, ROW, D, DP, COLUMNS % N == 0)
    x = tl.dot(q_r, k_c.T, input_precision=PRECISION)
    if COLUMNS % N:
        x = tl.where(live_c[None, :], x, LOWEST)
    return x, k_c, v_c


@kernel
def cut_block(
    q_r: tl.tensor, k: tl.tensor, v: tl.tensor, at: tl.tensor, last: tl.tensor, place: tl.tensor,
    key_places: tl.tensor, n: tl.tensor, c: tl.tensor, d: tl.tensor, SIZE: tl.constexpr, ROW: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr, BAND: tl.constexpr,
    WIDTH: tl.constexpr, SINK: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """The same of a block with fewer keys, or some that are not near; `place` is that of the queries, with BAND."""
    SLICES: tl.constexpr = (COLUMNS + N - 1) // N
    column = at + (n % SLICES) * N + c
    live_c = column < tl.load(last + n // SLICES)
    k_c = load_block(k, column, live_c, d, SIZE, ROW, D, DP, False)
    v_c = load_block(v, column, live_c, d, SIZE, ROW, D, DP, False)
    x = tl.dot(q_r, k_c.T, input_precision=PRECISION)
    sees = live_c[None, :]
    if BAND:
        key_place = tl.load(key_places + column, mask=live_c, other=0)
        sees = sees & near(place[:, None], key_place[None, :], WIDTH, SINK)
    return tl.where(sees, x, LOWEST), k_c, v_c


@kernel
def packed_columns(
    first: tl.tensor, last: tl.tensor, n: tl.tensor, c: tl.tensor, few: tl.tensor, LEVELS: tl.constexpr,
    PACKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Step n of blocks with fewer keys, in parts of PACKED: its keys, and which there are.

    First parts of all blocks come first, then second parts of those that have one, longer blocks being first in the
    list; `few` says how many have a part, for each of the LEVELS.
    """
    part = n * (c.shape[0] // PACKED) + c // PACKED
    n_all = tl.load(few)
    entry, level = part, tl.zeros_like(part)
    for at in tl.static_range(1, LEVELS):
        n_more = tl.load(few + at)
        entry = tl.where(part >= n_all, part - n_all, entry)
        level = tl.where(part >= n_all, at, level)
        n_all += n_more
    live = part < n_all
    column = tl.load(first + entry, mask=live, other=0) + level * PACKED + c % PACKED
    return column, column < tl.load(last + entry, mask=live, other=0)


@kernel
def packed_block(
    q_r: tl.tensor, k: tl.tensor, v: tl.tensor, column: tl.tensor, live_c: tl.tensor, d: tl.tensor,
    SIZE: tl.constexpr, ROW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Scores [M, N] of keys that lie in several blocks, and values."""
    k_c = load_block(k, column, live_c, d, SIZE, ROW, D, DP, False)
    v_c = load_block(v, column, live_c, d, SIZE, ROW, D, DP, False)
    x = tl.dot(q_r, k_c.T, input_precision=PRECISION)
    return tl.where(live_c[None, :], x, LOWEST), v_c


@kernel
def softmax_step(
    x: tl.tensor, v_c: tl.tensor, top: tl.tensor, total: tl.tensor, out: tl.tensor, factor: tl.tensor,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """One more block of scores [M, N], not yet scaled, and of values: largest, sum and output so far."""
    new_top = tl.maximum(top, tl.max(x, 1) * factor)
    p = tl.exp2(x * factor - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(p, 1)
    out = tl.dot(p.to(v_c.dtype), v_c, out * shrink[:, None], input_precision=PRECISION)
    return new_top, total, out


@kernel
def packed_steps(
    q_r: tl.tensor, k: tl.tensor, v: tl.tensor, first: tl.tensor, last: tl.tensor, few: tl.tensor, c: tl.tensor,
    d: tl.tensor, top: tl.tensor, total: tl.tensor, out: tl.tensor, factor: tl.tensor, SIZE: tl.constexpr,
    ROW: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr, LEVELS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """`softmax_step` over all blocks with fewer keys, which the lists begin with here, several in each step."""
    EACH: tl.constexpr = N // PACKED
    n_parts = tl.load(few)
    for level in tl.static_range(1, LEVELS):
        n_parts += tl.load(few + level)
    column, live_c = packed_columns(first, last, 0, c, few, LEVELS, PACKED)
    for n in tl.range(0, (n_parts + EACH - 1) // EACH, num_stages=min(STAGES, 2)):  # places take memory too
        x, v_c = packed_block(q_r, k, v, column, live_c, d, SIZE, ROW, D, DP, PRECISION)
        top, total, out = softmax_step(x, v_c, top, total, out, factor, PRECISION)
        column, live_c = packed_columns(first, last, n + 1, c, few, LEVELS, PACKED)
    return top, total, out


@kernel
def sparse_forward(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, starts: tl.tensor, first: tl.tensor, last: tl.tensor, whole: tl.tensor,
    count: tl.tensor, few: tl.tensor, places: tl.tensor, key_places: tl.tensor, out: tl.tensor, lse: tl.tensor,
    scale: tl.tensor, NQ: tl.constexpr, NK: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCKS: tl.constexpr, LISTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, BAND: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, EVEN: tl.constexpr,
    BATCH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, PACKED: tl.constexpr,
) -> None:  # fmt: skip
    """Output and log-sum-exp of M queries. Grid (parts of blocks of queries, H, B)."""
    PARTS: tl.constexpr = (ROWS + M - 1) // M
    SLICES: tl.constexpr = (COLUMNS + N - 1) // N
    SIZE: tl.constexpr = BATCH * NK * H * D
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh = b * H + h
    d, c = tl.arange(0, DP), tl.arange(0, N)
    block, r, end, is_last = own_tokens(starts, bh, BLOCKS, PARTS, M)
    live_r = r < end
    first += (bh * BLOCKS + block) * LISTED
    last += (bh * BLOCKS + block) * LISTED
    n_whole = tl.load(whole + bh * BLOCKS + block) * SLICES
    n_all = tl.load(count + bh * BLOCKS + block) * SLICES
    at = tl.load(first)
    q += (b * NQ * H + h) * D
    k += (b * NK * H + h) * D
    v += (b * NK * H + h) * D
    q_r = load_block(q, r, live_r, d, BATCH * NQ * H * D, H * D, D, DP, False)
    place = r
    if BAND:
        place = tl.load(places + bh * NQ + r, mask=live_r, other=0)
        key_places += bh * NK
    top = tl.full([M], LOWEST, tl.float32)
    total = tl.zeros([M], tl.float32)
    o_r = tl.zeros([M, DP], tl.float32)
    factor = scale * LOG2_E
    for n in tl.range(0, n_whole, num_stages=STAGES):
        x, _, v_c = whole_block(q_r, k, v, at, n, c, d, SIZE, H * D, D, DP, COLUMNS, N, PRECISION)
        top, total, o_r = softmax_step(x, v_c, top, total, o_r, factor, PRECISION)
        at = following(first, n, n_all, SLICES)
    if PACKED:
        LEVELS: tl.constexpr = (COLUMNS + PACKED - 1) // PACKED
        top, total, o_r = packed_steps(
            q_r, k, v, first + n_whole // SLICES, last + n_whole // SLICES, few + (bh * BLOCKS + block) * LEVELS, c, d,
            top, total, o_r, factor, SIZE, H * D, D, DP, N, PACKED, LEVELS, PRECISION, STAGES,
        )  # fmt: skip
    elif not EVEN:
        for n in tl.range(n_whole, n_all, num_stages=STAGES):
            x, _, v_c = cut_block(
                q_r, k, v, at, last, place, key_places, n, c, d, SIZE, H * D, D, DP, COLUMNS, N, BAND, WIDTH, SINK,
                PRECISION,
            )  # fmt: skip
            top, total, o_r = softmax_step(x, v_c, top, total, o_r, factor, PRECISION)
            at = following(first, n, n_all, SLICES)
    none = top < SEES_NONE
    total = tl.where(none, 1.0, total)
    o_r = tl.where(none[:, None], 0.0, o_r / total[:, None])
    out += (b * NQ * H + h) * D
    store_rows(out, wide(r, BATCH * NQ * H * D) * (H * D), live_r, d, o_r, D)
    tl.store(lse + bh * NQ + r, tl.where(none, INFINITY, top + tl.log2(total)), mask=live_r)
    if is_last:
        clear_rest(out, end, NQ, d, BATCH * NQ * H * D, H * D, D, DP, M)


@kernel
def query_step(
    x: tl.tensor, k_c: tl.tensor, v_c: tl.tensor, g_r: tl.tensor, dq_r: tl.tensor, lse_r: tl.tensor,
    delta_r: tl.tensor, factor: tl.tensor, PRECISION: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Adds what comes through one block of scores [M, N] to the queries' gradient, the scale still to come."""
    p = tl.exp2(x * factor - lse_r[:, None])
    d_x = p * (tl.dot(g_r, v_c.T, input_precision=PRECISION) - delta_r[:, None])
    return tl.dot(d_x.to(k_c.dtype), k_c, dq_r, input_precision=PRECISION)


@kernel
def sparse_query_backward(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, d_out: tl.tensor, lse: tl.tensor, delta: tl.tensor, starts: tl.tensor,
    first: tl.tensor, last: tl.tensor, whole: tl.tensor, count: tl.tensor, places: tl.tensor, key_places: tl.tensor,
    dq: tl.tensor, scale: tl.tensor, NQ: tl.constexpr, NK: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BLOCKS: tl.constexpr, LISTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BAND: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, EVEN: tl.constexpr,
    BATCH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """dQ of M queries, over the same list. Grid (parts of blocks of queries, H, B)."""
    PARTS: tl.constexpr = (ROWS + M - 1) // M
    SLICES: tl.constexpr = (COLUMNS + N - 1) // N
    SIZE: tl.constexpr = BATCH * NK * H * D
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh = b * H + h
    d, c = tl.arange(0, DP), tl.arange(0, N)
    block, r, end, is_last = own_tokens(starts, bh, BLOCKS, PARTS, M)
    live_r = r < end
    q += (b * NQ * H + h) * D
    d_out += (b * NQ * H + h) * D
    k += (b * NK * H + h) * D
    v += (b * NK * H + h) * D
    q_r = load_block(q, r, live_r, d, BATCH * NQ * H * D, H * D, D, DP, False)
    g_r = load_block(d_out, r, live_r, d, BATCH * NQ * H * D, H * D, D, DP, False)
    lse_r = tl.load(lse + bh * NQ + r, mask=live_r, other=INFINITY)
    delta_r = tl.load(delta + bh * NQ + r, mask=live_r, other=0.0)
    place = r
    if BAND:
        place = tl.load(places + bh * NQ + r, mask=live_r, other=0)
        key_places += bh * NK
    first += (bh * BLOCKS + block) * LISTED
    last += (bh * BLOCKS + block) * LISTED
    n_whole = tl.load(whole + bh * BLOCKS + block) * SLICES
    n_all = tl.load(count + bh * BLOCKS + block) * SLICES
    dq_r = tl.zeros([M, DP], tl.float32)
    factor = scale * LOG2_E
    at = tl.load(first)
    for n in tl.range(0, n_whole, num_stages=STAGES):
        x, k_c, v_c = whole_block(q_r, k, v, at, n, c, d, SIZE, H * D, D, DP, COLUMNS, N, PRECISION)
        dq_r = query_step(x, k_c, v_c, g_r, dq_r, lse_r, delta_r, factor, PRECISION)
        at = following(first, n, n_all, SLICES)
    if not EVEN:
        for n in tl.range(n_whole, n_all, num_stages=STAGES):
            x, k_c, v_c = cut_block(
                q_r, k, v, at, last, place, key_places, n, c, d, SIZE, H * D, D, DP, COLUMNS, N, BAND, WIDTH, SINK,
                PRECISION,
            )  # fmt: skip
            dq_r = query_step(x, k_c, v_c, g_r, dq_r, lse_r, delta_r, factor, PRECISION)
            at = following(first, n, n_all, SLICES)
    dq += (b * NQ * H + h) * D
    store_rows(dq, wide(r, BATCH * NQ * H * D) * (H * D), live_r, d, dq_r * scale, D)
    if is_last:
        clear_rest(dq, end, NQ, d, BATCH * NQ * H * D, H * D, D, DP, M)


@kernel
def key_step(
    x: tl.tensor, v_c: tl.tensor, q_r: tl.tensor, g_r: tl.tensor, dk_c: tl.tensor, dv_c: tl.tensor, lse_r: tl.tensor,
    deltas: tl.tensor, live_r: tl.tensor, factor: tl.tensor, PRECISION: tl.constexpr, EARLY: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Adds what comes through one block of scores [N, M], keys first, to the gradients of keys and values.

    The third result is the scores' own gradient, in the dtype of the queries. `deltas` are read where they are needed,
    and the product with the values starts from them: registers are what is short. With EARLY it comes before the
    exponential.
    """
    if EARLY:
        start = tl.broadcast_to(-tl.load(deltas, mask=live_r, other=0.0)[None, :], x.shape)
        d_p = tl.dot(v_c, g_r.T, start, input_precision=PRECISION)
        p = tl.exp2(x * factor - lse_r[None, :])
        dv_c = tl.dot(p.to(g_r.dtype), g_r, dv_c, input_precision=PRECISION)
    else:
        p = tl.exp2(x * factor - lse_r[None, :])
        dv_c = tl.dot(p.to(g_r.dtype), g_r, dv_c, input_precision=PRECISION)
        start = tl.broadcast_to(-tl.load(deltas, mask=live_r, other=0.0)[None, :], x.shape)
        d_p = tl.dot(v_c, g_r.T, start, input_precision=PRECISION)
    d_x = (p * d_p).to(q_r.dtype)
    dk_c = tl.dot(d_x, q_r, dk_c, input_precision=PRECISION)
    return dk_c, dv_c, d_x


@kernel
def key_scores(
    q: tl.tensor, d_out: tl.tensor, lse: tl.tensor, query_places: tl.tensor, k_c: tl.tensor, place: tl.tensor,
    r: tl.tensor, live_r: tl.tensor, d: tl.tensor, SIZE: tl.constexpr, ROW: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, FULL: tl.constexpr, BAND: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Scores [N, M] of keys with queries r, keys first; these queries, dO and log-sum-exp, infinite where not live."""
    q_r = load_block(q, r, live_r, d, SIZE, ROW, D, DP, FULL)
    g_r = load_block(d_out, r, live_r, d, SIZE, ROW, D, DP, FULL)
    lse_r = tl.load(lse + r, mask=live_r, other=INFINITY)
    x = tl.dot(k_c, q_r.T, input_precision=PRECISION)
    if BAND:
        query_place = tl.load(query_places + r, mask=live_r, other=0)
        x = tl.where(near(query_place[None, :], place[:, None], WIDTH, SINK), x, LOWEST)
    return x, q_r, g_r, lse_r


@kernel
def keep_scores(
    d_scores: tl.tensor, slots: tl.tensor, slot: tl.tensor, d_x: tl.tensor, c: tl.tensor, m: tl.tensor,
    live_c: tl.tensor, n: tl.tensor, n_all: tl.tensor, SLICES: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Writes scores' gradients [N, M] into the slot [WIDE, TALL] of their pair of blocks, if it has one.

    Returns the slot of the step after n.
    """
    at = d_scores + slot.to(tl.int64) * (WIDE * TALL)
    tl.store(at + c[:, None] * TALL + m[None, :], d_x, mask=live_c[:, None] & (slot >= 0), cache_modifier=".cs")
    return following(slots, n, n_all, SLICES)


@kernel
def through_keys(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, d_out: tl.tensor, lse: tl.tensor, delta: tl.tensor, starts: tl.tensor,
    first: tl.tensor, last: tl.tensor, whole: tl.tensor, count: tl.tensor, slots: tl.tensor, places: tl.tensor,
    query_places: tl.tensor, head: tl.tensor, d_scores: tl.tensor, dk: tl.tensor, dv: tl.tensor, scale: tl.tensor,
    NQ: tl.constexpr, NK: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCKS: tl.constexpr,
    LISTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BAND: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, EVEN: tl.constexpr, BATCH: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, KEEP: tl.constexpr, HEADS: tl.constexpr,
    SLOTS: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
) -> None:  # fmt: skip
    """dK and dV of N keys; with KEEP also the scores' gradients, in `d_scores` [B, HEADS, SLOTS, WIDE, TALL]."""
    PARTS: tl.constexpr = (COLUMNS + N - 1) // N
    SLICES: tl.constexpr = (ROWS + M - 1) // M
    h, b = head + tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh = b * H + h
    d, m = tl.arange(0, DP), tl.arange(0, M)
    block, c, end, is_last = own_tokens(starts, bh, BLOCKS, PARTS, N)
    live_c = c < end
    q += (b * NQ * H + h) * D
    d_out += (b * NQ * H + h) * D
    k += (b * NK * H + h) * D
    v += (b * NK * H + h) * D
    lse += bh * NQ
    delta += bh * NQ
    k_c = load_block(k, c, live_c, d, BATCH * NK * H * D, H * D, D, DP, False)
    v_c = load_block(v, c, live_c, d, BATCH * NK * H * D, H * D, D, DP, False)
    place = c
    if BAND:
        place = tl.load(places + bh * NK + c, mask=live_c, other=0)
        query_places += bh * NQ
    first += (bh * BLOCKS + block) * LISTED
    last += (bh * BLOCKS + block) * LISTED
    if KEEP:
        slots += (bh * BLOCKS + block) * LISTED
        d_scores += (b * HEADS + tl.program_id(1)) * SLOTS * (WIDE * TALL)
        at_c = tl.program_id(0) % PARTS * N + tl.arange(0, N)
    n_whole = tl.load(whole + bh * BLOCKS + block) * SLICES
    n_all = tl.load(count + bh * BLOCKS + block) * SLICES
    dk_c = tl.zeros([N, DP], tl.float32)
    dv_c = tl.zeros([N, DP], tl.float32)
    factor = scale * LOG2_E
    at = tl.load(first)
    slot = at
    if KEEP:
        slot = tl.load(slots)
    for n in tl.range(0, n_whole, num_stages=STAGES):
        inside = (n % SLICES) * M + m
        r = at + inside
        live_r = inside < ROWS
        x, q_r, g_r, lse_r = key_scores(
            q, d_out, lse, query_places, k_c, place, r, live_r, d, BATCH * NQ * H * D, H * D, D, DP, ROWS % M == 0,
            False, WIDTH, SINK, PRECISION,
        )  # fmt: skip
        dk_c, dv_c, d_x = key_step(x, v_c, q_r, g_r, dk_c, dv_c, lse_r, delta + r, live_r, factor, PRECISION, EARLY)
        if KEEP:
            slot = keep_scores(d_scores, slots, slot, d_x, at_c, inside, live_c, n, n_all, SLICES, WIDE, TALL)
        at = following(first, n, n_all, SLICES)
    if not EVEN:
        for n in tl.range(n_whole, n_all, num_stages=STAGES):
            inside = (n % SLICES) * M + m
            r = at + inside
            live_r = r < tl.load(last + n // SLICES)
            x, q_r, g_r, lse_r = key_scores(
                q, d_out, lse, query_places, k_c, place, r, live_r, d, BATCH * NQ * H * D, H * D, D, DP, False, BAND,
                WIDTH, SINK, PRECISION,
            )  # fmt: skip
            dk_c, dv_c, d_x = key_step(x, v_c, q_r, g_r, dk_c, dv_c, lse_r, delta + r, live_r, factor, PRECISION, EARLY)
            if KEEP:
                slot = keep_scores(d_scores, slots, slot, d_x, at_c, inside, live_c, n, n_all, SLICES, WIDE, TALL)
            at = following(first, n, n_all, SLICES)
    keys = wide(c, BATCH * NK * H * D) * (H * D)
    dk += (b * NK * H + h) * D
    dv += (b * NK * H + h) * D
    store_rows(dk, keys, live_c, d, dk_c * scale, D)
    store_rows(dv, keys, live_c, d, dv_c, D)
    if is_last:
        clear_rest(dk, end, NK, d, BATCH * NK * H * D, H * D, D, DP, N)
        clear_rest(dv, end, NK, d, BATCH * NK * H * D, H * D, D, DP, N)


@kernel
def sparse_key_backward(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, d_out: tl.tensor, lse: tl.tensor, delta: tl.tensor, starts: tl.tensor,
    first: tl.tensor, last: tl.tensor, whole: tl.tensor, count: tl.tensor, places: tl.tensor, query_places: tl.tensor,
    dk: tl.tensor, dv: tl.tensor, scale: tl.tensor, NQ: tl.constexpr, NK: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BLOCKS: tl.constexpr, LISTED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BAND: tl.constexpr, WIDTH: tl.constexpr,
    SINK: tl.constexpr, EVEN: tl.constexpr, BATCH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """dK and dV of N keys, over the list of blocks of queries that see them. Grid (parts of blocks of keys, H, B)."""
    through_keys(
        q, k, v, d_out, lse, delta, starts, first, last, whole, count, first, places, query_places, 0, dk, dk, dv,
        scale, NQ, NK, H, D, DP, BLOCKS, LISTED, ROWS, COLUMNS, M, N, BAND, WIDTH, SINK, EVEN, BATCH, PRECISION, STAGES,
        EARLY, False, 0, 0, 0, 0,
    )  # fmt: skip


@kernel
def sparse_key_scores(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, d_out: tl.tensor, lse: tl.tensor, delta: tl.tensor, starts: tl.tensor,
    first: tl.tensor, last: tl.tensor, whole: tl.tensor, count: tl.tensor, slots: tl.tensor, places: tl.tensor,
    query_places: tl.tensor, head: tl.tensor, d_scores: tl.tensor, dk: tl.tensor, dv: tl.tensor, scale: tl.tensor,
    NQ: tl.constexpr, NK: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCKS: tl.constexpr,
    LISTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    BAND: tl.constexpr, WIDTH: tl.constexpr, SINK: tl.constexpr, EVEN: tl.constexpr, BATCH: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr,
    WIDE: tl.constexpr, TALL: tl.constexpr,
) -> None:  # fmt: skip
    """The same of some heads from `head` on, which also keeps the scores' gradients for `sparse_query_product`."""
    through_keys(
        q, k, v, d_out, lse, delta, starts, first, last, whole, count, slots, places, query_places, head, d_scores,
        dk, dv, scale, NQ, NK, H, D, DP, BLOCKS, LISTED, ROWS, COLUMNS, M, N, BAND, WIDTH, SINK, EVEN, BATCH, PRECISION,
        STAGES, EARLY, True, HEADS, SLOTS, WIDE, TALL,
    )  # fmt: skip


@kernel
def sparse_query_product(
    k: tl.tensor, d_scores: tl.tensor, starts: tl.tensor, first: tl.tensor, last: tl.tensor, count: tl.tensor,
    head: tl.tensor, dq: tl.tensor, scale: tl.tensor, NQ: tl.constexpr, NK: tl.constexpr, H: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, BLOCKS: tl.constexpr, LISTED: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BATCH: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr, TALL: tl.constexpr,
) -> None:  # fmt: skip
    """dQ of M queries of the same heads, from the scores' gradients: slot n is for entry n of a block's list.

    Grid (parts of blocks of queries, heads, B).
    """
    PARTS: tl.constexpr = (ROWS + M - 1) // M
    SLICES: tl.constexpr = (COLUMNS + N - 1) // N
    h, b = head + tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh = b * H + h
    d, c = tl.arange(0, DP), tl.arange(0, N)
    block, r, end, is_last = own_tokens(starts, bh, BLOCKS, PARTS, M)
    m = tl.program_id(0) % PARTS * M + tl.arange(0, M)
    k += (b * NK * H + h) * D
    first += (bh * BLOCKS + block) * LISTED
    last += (bh * BLOCKS + block) * LISTED
    d_scores += ((b * HEADS + tl.program_id(1)) * BLOCKS + block) * LISTED * (WIDE * TALL)
    n_all = tl.load(count + bh * BLOCKS + block) * SLICES
    dq_r = tl.zeros([M, DP], tl.float32)
    at, stop = tl.load(first), tl.load(last)
    for n in tl.range(0, n_all, num_stages=STAGES):
        inside = (n % SLICES) * N + c
        live_c = at + inside < stop
        k_c = load_block(k, at + inside, live_c, d, BATCH * NK * H * D, H * D, D, DP, False)
        slot = d_scores + wide(n // SLICES, LISTED * WIDE * TALL) * (WIDE * TALL)
        d_x = tl.load(slot + inside[:, None] * TALL + m[None, :], mask=live_c[:, None], other=0.0)
        dq_r = tl.dot(d_x.T, k_c, dq_r, input_precision=PRECISION)
        at, stop = following(first, n, n_all, SLICES), following(last, n, n_all, SLICES)
    dq += (b * NQ * H + h) * D
    store_rows(dq, wide(r, BATCH * NQ * H * D) * (H * D), r < end, d, dq_r * scale, D)
    if is_last:
        clear_rest(dq, end, NQ, d, BATCH * NQ * H * D, H * D, D, DP, M)
