"""The forward pass (paper, A.2) in one launch: chunk after chunk of query rows, R of one beside L of an earlier one.

The intermediates are a ring of a few chunks. It can be small enough for the L2 cache, and no launch ends between
chunks, which counts where there is little work (decoding). Programs wait only for programs with a smaller number, and
blocks start in the order of their numbers, as CUB's scans rely on too: so they cannot wait for each other in a circle.
What is computed does not depend on the order: two runs agree bit for bit.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Kernel bodies are Triton's language, not Python's: its types are not the ones they run with.
import triton.language as tl

from monarchrt.triton_kernels.jit import arrive, kernel, wait_for
from monarchrt.triton_kernels.left import left_rows
from monarchrt.triton_kernels.right import right_keys


@kernel
def streamed(
    visible: tl.tensor, q: tl.tensor, k: tl.tensor, v: tl.tensor, counters: tl.tensor, mid: tl.tensor,
    stats: tl.tensor, out: tl.tensor, lse: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr,
    B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, Z: tl.constexpr, DP: tl.constexpr,
    PRECISION: tl.constexpr, RC: tl.constexpr, TILES: tl.constexpr, LAG: tl.constexpr, SLOTS: tl.constexpr,
    M: tl.constexpr, L: tl.constexpr, L2: tl.constexpr, RIGHT_STAGES: tl.constexpr, I: tl.constexpr, I2: tl.constexpr,
    N: tl.constexpr, LEFT_STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Grid (all items). Segment n has the items of R of chunk n and of L of chunk n - LAG, where there are such.

    Chunk n is rows (a, j) from (n % NC) * RC on, of pair n // NC; its alpha, Y and c_L are in slot n % SLOTS of
    `mid` [SLOTS, RC, C*B1, 2, D] and `stats` [SLOTS, RC, C*B1]. `counters` int32, zero at first: per chunk the finished
    items of R; per chunk those of L.
    """
    NC: tl.constexpr = (A * B2 + RC - 1) // RC
    CHUNKS: tl.constexpr = Z * NC
    CK: tl.constexpr = C * B1
    NI: tl.constexpr = (B1 + I + I2 - 1) // (I + I2)
    NM: tl.constexpr = (RC + M - 1) // M
    PARTS: tl.constexpr = (C + TILES - 1) // TILES
    RIGHT: tl.constexpr = B1 * NM * PARTS
    LEFT: tl.constexpr = RC * NI
    item = tl.program_id(0)
    right_done = counters
    left_done = counters + CHUNKS
    HEAD: tl.constexpr = LAG * RIGHT  # R alone, before there is anything for L
    BOTH: tl.constexpr = (CHUNKS - LAG) * (RIGHT + LEFT)
    middle = item - HEAD
    tail = middle - BOTH  # L alone
    # in between the two kinds of work alternate in proportion, so that both are under way at any time
    at = middle % (RIGHT + LEFT)
    turn = at * RIGHT // (RIGHT + LEFT)
    is_right = (middle < 0) | ((tail < 0) & ((at + 1) * RIGHT // (RIGHT + LEFT) > turn))
    if is_right:
        chunk = tl.where(middle < 0, item // RIGHT, LAG + middle // (RIGHT + LEFT))
        turn = tl.where(middle < 0, item % RIGHT, turn)
        slot = (chunk % SLOTS).to(tl.int64)
        if chunk >= SLOTS:
            wait_for(left_done + chunk - SLOTS, LEFT)
        right_keys(
            turn % B1, turn // (B1 * NM) * TILES, chunk // NC, chunk % NC * RC, turn // B1 % NM,
            visible, q, k, v, mid + slot * (RC * CK * 2 * D), stats + slot * (RC * CK), scale,
            A, C, B1, B2, H, D, RC, TILES, DP, M, L, L2, PRECISION, RIGHT_STAGES,
        )  # fmt: skip
        arrive(right_done + chunk)
    else:
        chunk = tl.where(tail < 0, middle // (RIGHT + LEFT), CHUNKS - LAG + tail // LEFT)
        turn = tl.where(tail < 0, at - turn, tail % LEFT)
        row = turn // NI
        r = chunk % NC * RC + row
        if r < A * B2:
            left_rows(
                (chunk % SLOTS).to(tl.int64) * RC + row, r // B2, r % B2, chunk // NC, turn % NI,
                visible, q, mid, stats, out, lse, scale,
                A, C, B1, B2, H, D, DP, I, I2, N, PRECISION, LEFT_STAGES, right_done + chunk, RIGHT,
            )  # fmt: skip
        if chunk + SLOTS < CHUNKS:  # some R waits for the slot
            arrive(left_done + chunk)
