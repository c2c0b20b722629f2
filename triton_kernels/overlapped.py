"""The forward pass (paper, A.2) in one kernel per step: R of this step's chunk next to L of the chunk before it.

The two factors load different parts of the card (R writes alpha and Y, L reads them), so blocks of both run side by
side; `mid` and `stats` have two slots that alternate. The first step has nothing for L, the last nothing for R.
"""

import triton.language as tl

from monarchrt.triton_kernels.jit import kernel
from monarchrt.triton_kernels.left import left_rows
from monarchrt.triton_kernels.right import right_rows


@kernel
def right_item(
    item: tl.tensor, step: tl.tensor, visible: tl.tensor, q: tl.tensor, k: tl.tensor, v: tl.tensor, mid: tl.tensor,
    stats: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr, Z: tl.constexpr, AP: tl.constexpr,
    DP: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, L: tl.constexpr, L2: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """R of one key row and share of the rows of the step's chunk."""
    SLOT: tl.constexpr = ZC * AC * B2 * C * B1
    slot = tl.load(step + 4).to(tl.int64)
    right_rows(
        item % (C * B1), item // (C * B1) % SPLIT, item // (C * B1 * SPLIT), tl.load(step), tl.load(step + 1),
        visible, q, k, v, mid + slot * (SLOT * 2 * D), stats + slot * (2 * SLOT), scale,
        A, C, B1, B2, H, D, ZC, AC, Z, AP, DP, M, L, L2, SPLIT, False, PRECISION, STAGES,
    )  # fmt: skip


@kernel
def left_item(
    item: tl.tensor, step: tl.tensor, visible: tl.tensor, q: tl.tensor, mid: tl.tensor, stats: tl.tensor,
    out: tl.tensor, lse: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr,
    B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr, Z: tl.constexpr,
    DP: tl.constexpr, PRECISION: tl.constexpr, I: tl.constexpr, I2: tl.constexpr, N: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """L of one block of rows of one query column of the chunk before."""
    NI: tl.constexpr = (B1 + I + I2 - 1) // (I + I2)
    SLOT: tl.constexpr = ZC * AC * B2 * C * B1
    slot = tl.load(step + 4).to(tl.int64)
    r = item // NI % (AC * B2)
    z = item // (AC * B2 * NI)
    a = tl.load(step + 3) + r // B2
    zh = tl.load(step + 2) + z
    mid += (1 - slot) * (SLOT * 2 * D)
    c_l = stats + (1 - slot) * (2 * SLOT) + SLOT
    if (zh < Z) & (a < A):
        left_rows(
            z.to(tl.int64) * (AC * B2) + r, a, r % B2, zh, item % NI,
            visible, q, mid, c_l, out, lse, scale,
            A, C, B1, B2, H, D, DP, I, I2, N, PRECISION, STAGES,
        )  # fmt: skip


@kernel
def forward(
    step: tl.tensor, visible: tl.tensor, q: tl.tensor, k: tl.tensor, v: tl.tensor, mid: tl.tensor, stats: tl.tensor,
    out: tl.tensor, lse: tl.tensor, scale: tl.tensor, A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr,
    B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr, ZC: tl.constexpr, AC: tl.constexpr, Z: tl.constexpr,
    AP: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr, M: tl.constexpr, L: tl.constexpr, L2: tl.constexpr,
    SPLIT: tl.constexpr, RIGHT_STAGES: tl.constexpr, I: tl.constexpr, I2: tl.constexpr, N: tl.constexpr,
    LEFT_STAGES: tl.constexpr, WORK: tl.constexpr,
) -> None:  # fmt: skip
    """One step. `step` is (pair, tile) of the chunk for R, (pair, tile) of the one for L, slot that R writes.

    A first pair of Z means nothing to do. Grid (C*B1*SPLIT*ZC + AC*B2*blocks of i*ZC), of which WORK "right" and "left"
    have the first or the second part only; "left" alone needs fewer registers.
    """
    if WORK == "right":
        right_item(
            tl.program_id(0), step, visible, q, k, v, mid, stats, scale,
            A, C, B1, B2, H, D, ZC, AC, Z, AP, DP, PRECISION, M, L, L2, SPLIT, RIGHT_STAGES,
        )  # fmt: skip
    elif WORK == "left":
        left_item(
            tl.program_id(0), step, visible, q, mid, stats, out, lse, scale,
            A, C, B1, B2, H, D, ZC, AC, Z, DP, PRECISION, I, I2, N, LEFT_STAGES,
        )  # fmt: skip
    else:
        NI: tl.constexpr = (B1 + I + I2 - 1) // (I + I2)
        RIGHT: tl.constexpr = C * B1 * SPLIT * ZC
        LEFT: tl.constexpr = AC * B2 * NI * ZC
        program = tl.program_id(0).to(tl.int64)
        # the two kinds of work alternate in proportion, so that both are under way at any time
        item = (program * RIGHT // (RIGHT + LEFT)).to(tl.int32)
        following = ((program + 1) * RIGHT // (RIGHT + LEFT)).to(tl.int32)
        if following > item:
            right_item(
                item, step, visible, q, k, v, mid, stats, scale,
                A, C, B1, B2, H, D, ZC, AC, Z, AP, DP, PRECISION, M, L, L2, SPLIT, RIGHT_STAGES,
            )  # fmt: skip
        else:
            left_item(
                tl.program_id(0) - item, step, visible, q, mid, stats, out, lse, scale,
                A, C, B1, B2, H, D, ZC, AC, Z, DP, PRECISION, I, I2, N, LEFT_STAGES,
            )  # fmt: skip
