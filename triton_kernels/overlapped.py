"""The forward pass in one kernel per step: R of this step's chunk next to L of the chunk before it.

The two factors load different parts of the card (R writes alpha and Y, L reads them), so blocks of both run side by
side; `mid` and `stats` have two slots that alternate.
"""

import triton.language as tl

from triton_kernels.jit import kernel
from triton_kernels.left import left_rows
from triton_kernels.right import right_rows


@kernel
def forward(
    step, visible, q, k, v, mid, stats, out, lse, scale,
    A: tl.constexpr, C: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    ZC: tl.constexpr, AC: tl.constexpr, Z: tl.constexpr, AP: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, L: tl.constexpr, L2: tl.constexpr, SPLIT: tl.constexpr, RIGHT_STAGES: tl.constexpr,
    I: tl.constexpr, I2: tl.constexpr, N: tl.constexpr, LEFT_STAGES: tl.constexpr,
):  # fmt: skip
    """One step. `step` is (pair, tile) of the chunk for R, (pair, tile) of the one for L, slot that R writes.

    A first pair of Z means nothing to do. Grid (C*B1*SPLIT*ZC + AC*B2*blocks of i*ZC).
    """
    NI: tl.constexpr = (B1 + I + I2 - 1) // (I + I2)
    RIGHT: tl.constexpr = C * B1 * SPLIT * ZC
    LEFT: tl.constexpr = AC * B2 * NI * ZC
    slot = tl.load(step + 4).to(tl.int64)
    program = tl.program_id(0).to(tl.int64)
    # the two kinds of work alternate in proportion, so that both are under way at any time
    item = (program * RIGHT // (RIGHT + LEFT)).to(tl.int32)
    following = ((program + 1) * RIGHT // (RIGHT + LEFT)).to(tl.int32)
    SLOT: tl.constexpr = ZC * AC * B2 * C * B1
    if following > item:
        right_rows(
            item % (C * B1), item // (C * B1) % SPLIT, item // (C * B1 * SPLIT), tl.load(step), tl.load(step + 1),
            visible, q, k, v, mid + slot * (SLOT * 2 * D), stats + slot * (2 * SLOT), scale,
            A, C, B1, B2, H, D, ZC, AC, Z, AP, DP, M, L, L2, SPLIT, False, PRECISION, RIGHT_STAGES,
        )  # fmt: skip
    else:
        item = tl.program_id(0) - item
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
                A, C, B1, B2, H, D, DP, I, I2, N, PRECISION, LEFT_STAGES,
            )  # fmt: skip
