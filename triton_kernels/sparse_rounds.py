"""The forward pass over short lists: a program goes through blocks of queries, one after the other.

A program of `sparse.sparse_forward` waits for its lists, then for its queries, then for the first keys, and at the end
for its results to be written; where a list has a dozen blocks of keys, that is a quarter of its time. Here as many
programs as run at a time share all blocks of queries, and the next one's lists and queries are read while the products
of this one go on. Only where all blocks are whole, so that the work of programs differs little and no key is masked.
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Kernel bodies are Triton's language, not Python's: its types are not the ones they run with.
import triton.language as tl

from monarchrt.triton_kernels.jit import LOG2_E, LOWEST, kernel
from monarchrt.triton_kernels.sparse import following, load_block, softmax_step, whole_block, write_rows


@kernel
def read_ahead(
    q: tl.tensor, starts: tl.tensor, first: tl.tensor, count: tl.tensor, turn: tl.tensor, d: tl.tensor,
    NQ: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BLOCKS: tl.constexpr, LISTED: tl.constexpr,
    PARTS: tl.constexpr, M: tl.constexpr, BATCH: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """What a program needs to begin part `turn` of all: its first token, the block's end, blocks of keys, the first of
    them, and queries."""
    bh = (turn // (BLOCKS * PARTS)).to(tl.int64)
    block = turn // PARTS % BLOCKS
    start = tl.load(starts + bh * (BLOCKS + 1) + block) + turn % PARTS * M
    end = tl.load(starts + bh * (BLOCKS + 1) + block + 1)
    n_all = tl.load(count + bh * BLOCKS + block)
    at = tl.load(first + (bh * BLOCKS + block) * LISTED)
    r = start + tl.arange(0, M)
    q += (bh // H * NQ * H + bh % H) * D
    return start, end, n_all, at, load_block(q, r, r < end, d, BATCH * NQ * H * D, H * D, D, DP, False)


@kernel
def sparse_forward_rounds(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, starts: tl.tensor, first: tl.tensor, count: tl.tensor, out: tl.tensor,
    lse: tl.tensor, scale: tl.tensor, NQ: tl.constexpr, NK: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, BLOCKS: tl.constexpr, LISTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, BATCH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PROGRAMS: tl.constexpr,
) -> None:  # fmt: skip
    """Output and log-sum-exp of every PROGRAMS-th part of the blocks of queries. Grid (PROGRAMS, 1, 1)."""
    PARTS: tl.constexpr = (ROWS + M - 1) // M
    SLICES: tl.constexpr = (COLUMNS + N - 1) // N
    TURNS: tl.constexpr = BATCH * H * BLOCKS * PARTS
    d, c = tl.arange(0, DP), tl.arange(0, N)
    factor = scale * LOG2_E
    turn = tl.program_id(0)
    start, end, n_all, at, q_r = read_ahead(
        q, starts, first, count, turn, d, NQ, H, D, DP, BLOCKS, LISTED, PARTS, M, BATCH
    )  # fmt: skip
    for _round in tl.range(0, (TURNS - turn + PROGRAMS - 1) // PROGRAMS, num_stages=1):
        bh = (turn // (BLOCKS * PARTS)).to(tl.int64)
        listed = first + (bh * BLOCKS + turn // PARTS % BLOCKS) * LISTED
        keys = (bh // H * NK * H + bh % H) * D
        then = tl.minimum(turn + PROGRAMS, TURNS - 1)
        next_start, next_end, next_all, next_at, next_q = read_ahead(
            q, starts, first, count, then, d, NQ, H, D, DP, BLOCKS, LISTED, PARTS, M, BATCH
        )  # fmt: skip
        top = tl.full([M], LOWEST, tl.float32)
        total = tl.zeros([M], tl.float32)
        o_r = tl.zeros([M, DP], tl.float32)
        for n in tl.range(0, n_all * SLICES, num_stages=STAGES):
            x, _, v_c = whole_block(
                q_r, k + keys, v + keys, at, n, c, d, BATCH * NK * H * D, H * D, D, DP, COLUMNS, N, PRECISION
            )  # fmt: skip
            top, total, o_r = softmax_step(x, v_c, top, total, o_r, factor, PRECISION)
            at = following(listed, n, n_all * SLICES, SLICES)
        r = start + tl.arange(0, M)
        mine = out + (bh // H * NQ * H + bh % H) * D
        write_rows(mine, lse + bh * NQ, r, end, d, top, total, o_r, BATCH * NQ * H * D, H * D, D)
        turn, start, end, n_all, at, q_r = then, next_start, next_end, next_all, next_at, next_q
