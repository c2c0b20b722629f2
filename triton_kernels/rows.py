"""Kernels that pass once over the rows of tokens of a Wan layer: what XLA does in several passes between products.

A row is a token's D numbers, all heads side by side. A program takes ROWS rows, one after the other, and holds what
they share. Steps are rounded where the network rounds them (`monarchrt.models.wan.passes` has the definition).
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Kernel bodies are Triton's language, not Python's: its types are not the ones they run with.
import triton.language as tl

from monarchrt.triton_kernels.jit import kernel

NAN = tl.constexpr(float("nan"))


@kernel
def rotated(
    x: tl.tensor, scale: tl.tensor, cos: tl.tensor, sin: tl.tensor, token: tl.tensor, live: tl.tensor,
    D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, EPS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """A row [DP] after RMSNorm with weights `scale`, its pairs turned as the tables say, in its dtype."""
    dtype = x.dtype
    precise = x.to(tl.float32)
    share = tl.rsqrt(tl.sum(precise * precise, 0) / D + EPS)
    normed = ((precise * share).to(dtype).to(tl.float32) * scale).to(dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(normed, [DP // 2, 2]))
    pair = tl.arange(0, DP // 2)
    angle, inside = token * HALF + pair % HALF, live & (pair < D // 2)
    c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
    return tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), [DP]).to(dtype)


@kernel
def norm_rotate_write(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, q_scale: tl.tensor, k_scale: tl.tensor, cos: tl.tensor, sin: tl.tensor,
    layer: tl.tensor, at: tl.tensor, keys: tl.tensor, values: tl.tensor, query: tl.tensor,
    Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr, ROW: tl.constexpr, BATCH: tl.constexpr, TOKENS: tl.constexpr,
    GROUP: tl.constexpr, SLOTS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr,
    EPS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Queries normalised and rotated, keys too and, with values, written where they lie in the cache of all layers.

    q, k, v are columns of arrays [BATCH * TOKENS, ROW] from Q, K and V on. The cache is [layers, BATCH, SLOTS, GROUP,
    D]; `at` says whether the block is misplaced (NaN is written then), and has the slot of each group of tokens.
    """
    kind, d = tl.program_id(1), tl.arange(0, DP)
    inside = d < D
    first, misplaced = tl.load(layer).to(tl.int64) * BATCH, tl.load(at)
    if kind == 0:
        scale = tl.load(q_scale + d, mask=inside, other=0.0).to(tl.float32)
    else:
        scale = tl.load(k_scale + d, mask=inside, other=0.0).to(tl.float32)
    for n in tl.static_range(ROWS):
        row = tl.program_id(0) * ROWS + n
        live = row < BATCH * TOKENS
        sample, token = row // TOKENS, row % TOKENS
        wanted = inside & live
        slot = tl.load(at + 1 + token // GROUP, mask=live, other=0)
        place = (((first + sample) * SLOTS + slot) * GROUP + token % GROUP) * D
        row = row.to(tl.int64)
        if kind == 0:
            x = tl.load(q + row * ROW + Q + d, mask=wanted, other=0.0)
            tl.store(query + row * D + d, rotated(x, scale, cos, sin, token, live, D, DP, HALF, EPS), mask=wanted)
        elif kind == 1:
            x = tl.load(k + row * ROW + K + d, mask=wanted, other=0.0)
            x = rotated(x, scale, cos, sin, token, live, D, DP, HALF, EPS)
            tl.store(keys + place + d, tl.where(misplaced == 0, x, NAN), mask=wanted)
        else:
            x = tl.load(v + row * ROW + V + d, mask=wanted, other=0.0)
            tl.store(values + place + d, tl.where(misplaced == 0, x, NAN), mask=wanted)


@kernel
def gated_norm(
    x: tl.tensor, y: tl.tensor, time: tl.tensor, gate: tl.tensor, bias: tl.tensor, weight: tl.tensor,
    total: tl.tensor, normed: tl.tensor,
    GATE: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr, TABLE: tl.constexpr, TOKENS: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, EPS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """x + y * gate, and its LayerNorm with scale and shift.

    x and y are [times * TOKENS, D]; `time` is [times, TABLE, D]. The gate is `time` and `gate` at row GATE, added. So
    are shift and 1 + scale, at SHIFT and SCALE, or if SCALE is below 0 the norm's own weights and biases.
    """
    time_row, d = tl.program_id(1), tl.arange(0, DP)
    inside = d < D
    time += time_row * TABLE * D + d
    own = tl.load(gate + GATE * D + d, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(time + GATE * D, mask=inside, other=0.0) + own
    if SCALE < 0:
        shifts = tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
        scales = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    else:
        own = tl.load(bias + SHIFT * D + d, mask=inside, other=0.0).to(tl.float32)
        shifts = tl.load(time + SHIFT * D, mask=inside, other=0.0) + own
        own = tl.load(weight + SCALE * D + d, mask=inside, other=0.0).to(tl.float32)
        scales = 1.0 + (tl.load(time + SCALE * D, mask=inside, other=0.0) + own)
    for n in tl.static_range(ROWS):
        token = tl.program_id(0) * ROWS + n
        wanted = inside & (token < TOKENS)
        row = (time_row.to(tl.int64) * TOKENS + token) * D + d
        added = tl.load(y + row, mask=wanted, other=0.0).to(tl.float32) * gates
        z = (tl.load(x + row, mask=wanted, other=0.0).to(tl.float32) + added).to(total.dtype.element_ty)
        tl.store(total + row, z, mask=wanted)
        z = z.to(tl.float32)
        centred = tl.where(inside, z - tl.sum(z, 0) / D, 0.0)
        share = tl.rsqrt(tl.sum(centred * centred, 0) / D + EPS)
        tl.store(normed + row, (centred * share * scales + shifts).to(normed.dtype.element_ty), mask=wanted)
