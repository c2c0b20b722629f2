"""Attention of a video's tokens to a text whose last rows are all alike, which are read once."""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Kernel bodies are Triton's language, not Python's: its types are not the ones they run with.
import triton.language as tl

from monarchrt.triton_kernels.jit import LOG2_E, LOWEST, kernel


@kernel
def text_attention(
    query: tl.tensor, keys: tl.tensor, values: tl.tensor, rows: tl.tensor, out: tl.tensor,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr,
    SCALE: tl.constexpr, M: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr,
) -> None:  # fmt: skip
    """Of M queries of a head, [samples, TOKENS, HEADS, D], to the first `rows` of KEYS keys: the last stands for more.

    As many as are left out, and itself, so that it counts KEYS - rows + 1 times.
    """
    head, sample, d = tl.program_id(1), tl.program_id(2), tl.arange(0, D)
    count, width = tl.load(rows + sample), HEADS * D
    token = tl.program_id(0) * M + tl.arange(0, M)
    wanted = (token < TOKENS)[:, None]
    at = (sample.to(tl.int64) * TOKENS + token)[:, None] * width + head * D + d[None, :]
    q = tl.load(query + at, mask=wanted, other=0.0)
    weight = tl.log2((KEYS - count + 1).to(tl.float32))
    largest = tl.full([M], LOWEST, tl.float32)
    total, acc = tl.zeros([M], tl.float32), tl.zeros([M, D], tl.float32)
    for start in range(0, count, L):
        key = start + tl.arange(0, L)
        read = (key < count)[:, None]
        place = (sample * KEYS + key)[:, None] * width + head * D + d[None, :]
        k = tl.load(keys + place, mask=read, other=0.0)
        x = tl.dot(q, k.T, input_precision=PRECISION) * (SCALE * LOG2_E)
        x = tl.where(key == count - 1, x + weight, x)
        x = tl.where(key < count, x, float("-inf"))
        new = tl.maximum(largest, tl.max(x, 1))
        p, shrink = tl.exp2(x - new[:, None]), tl.exp2(largest - new)
        total, largest = total * shrink + tl.sum(p, 1), new
        v = tl.load(values + place, mask=read, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=wanted)
