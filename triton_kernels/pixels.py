"""Kernels that pass once over pixels of the autoencoder: what XLA does in several passes between convolutions.

A pixel is C numbers side by side. A program takes ROWS pixels at once; what it makes is rounded where the network
rounds it (`monarchrt.models.vae.causal` has the definition).
"""

# pyright: basic, reportGeneralTypeIssues=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportReturnType=false, reportIndexIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# Kernel bodies are Triton's language, not Python's: its types are not the ones they run with.
import triton.language as tl

from monarchrt.triton_kernels.jit import kernel


@kernel
def normed_activated(x: tl.tensor, weights: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Pixels [ROWS, CP] over their length, times weights; rounded, and SiLU of it, rounded."""
    length = tl.maximum(tl.sum(x * x, 1), 1e-24)  # squared
    y = (x * tl.rsqrt(length)[:, None] * weights[None, :]).to(dtype).to(tl.float32)
    return (y / (1.0 + tl.exp(-y))).to(dtype)


@kernel
def channel_norm(
    x: tl.tensor, gamma: tl.tensor, normed: tl.tensor, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Norm over channels and SiLU of pixels [n, C], n a multiple of ROWS."""
    c = tl.arange(0, CP)
    inside = c < C
    weights = tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32) * C**0.5
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place, wanted = row[:, None] * C + c[None, :], inside[None, :] & (row[:, None] >= 0)
    value = tl.load(x + place, mask=wanted, other=0.0).to(tl.float32)
    tl.store(normed + place, normed_activated(value, weights, normed.dtype.element_ty), mask=wanted)


@kernel
def doubled_norm(
    y: tl.tensor, gamma: tl.tensor, x: tl.tensor, normed: tl.tensor,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Pixels of frames of twice the size, x, out of the four in each of y; and their norm and SiLU.

    y is [n, HEIGHT + 1, WIDTH + 1, 2, 2, C]: pixel (2h + a, 2w + b) of a frame is at (h + a, w + b, a, b). x and normed
    are [n, 2 HEIGHT, 2 WIDTH, C], and their pixels a multiple of ROWS.
    """
    c = tl.arange(0, CP)
    inside = c < C
    weights = tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32) * C**0.5
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column, line = row % (2 * WIDTH), row // (2 * WIDTH)
    frame, line = line // (2 * HEIGHT), line % (2 * HEIGHT)
    a, b = line % 2, column % 2
    source = (frame * (HEIGHT + 1) + line // 2 + a) * (WIDTH + 1) + column // 2 + b
    source = source * 4 + 2 * a + b
    wanted = inside[None, :] & (row[:, None] >= 0)
    value = tl.load(y + source[:, None] * C + c[None, :], mask=wanted, other=0.0)
    place = row[:, None] * C + c[None, :]
    tl.store(x + place, value, mask=wanted)
    activated = normed_activated(value.to(tl.float32), weights, normed.dtype.element_ty)
    tl.store(normed + place, activated, mask=wanted)


@kernel
def normed_taps(
    past: tl.tensor, x: tl.tensor, gamma: tl.tensor, taps: tl.tensor, latest: tl.tensor,
    FRAMES: tl.constexpr, PIXELS: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Norm over channels and SiLU of frames x, and three of them side by side, as a kernel of three steps meets them.

    past is [B, 2, PIXELS, C], frames before that are normalised; x [B, FRAMES, PIXELS, C]; taps [B, FRAMES, PIXELS, 3,
    C], of each frame the two before it and itself; latest, as past, the last two of all. PIXELS is a multiple of ROWS.
    """
    c = tl.arange(0, CP)
    inside = c < C
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wanted = inside[None, :] & (row[:, None] >= 0)
    sample = tl.program_id(1).to(tl.int64) // (FRAMES + 2)
    frame = tl.program_id(1) % (FRAMES + 2)  # of the past and x together
    if frame < 2:
        place = (((sample * 2 + frame) * PIXELS + row) * C)[:, None] + c[None, :]
        value = tl.load(past + place, mask=wanted, other=0.0)
    else:
        weights = tl.load(gamma + c, mask=inside, other=0.0).to(tl.float32) * C**0.5
        place = (((sample * FRAMES + frame - 2) * PIXELS + row) * C)[:, None] + c[None, :]
        value = tl.load(x + place, mask=wanted, other=0.0).to(tl.float32)
        value = normed_activated(value, weights, taps.dtype.element_ty)
    for tap in tl.static_range(3):
        at = frame - tap
        place = ((((sample * FRAMES + at) * PIXELS + row) * 3 + tap) * C)[:, None] + c[None, :]
        tl.store(taps + place, value, mask=wanted & (at >= 0) & (at < FRAMES))
    place = (((sample * 2 + frame - FRAMES) * PIXELS + row) * C)[:, None] + c[None, :]
    tl.store(latest + place, value, mask=wanted & (frame >= FRAMES))
