"""Passes over rows of tokens as Triton kernels, those of `rows.py`: what they serve, their sizes, and the calls."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from monarchrt.triton_kernels import missing_packages
from monarchrt.triton_kernels.config import power_of_two
from monarchrt.triton_kernels.one_kernel import call_kernel
from monarchrt.triton_kernels.plan import Launch

DTYPES = ("bfloat16", "float16")
MOST = 8192  # numbers of a row that a program holds


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowConfig:
    """Rows that a program takes one after the other, and its warps."""

    rows: int
    warps: int


SIZES = {"norm_rotate_write": RowConfig(rows=1, warps=2), "gated_norm": RowConfig(rows=1, warps=2)}


def supports(dtype: np.dtype, width: int) -> str | None:
    """Why the kernels cannot take rows of so many numbers, or None when they can; asks no device."""
    if reason := missing_packages():
        return reason
    if dtype.name not in DTYPES:
        return f"dtype {dtype.name} is not one of {', '.join(DTYPES)}."
    if width % 2 or width > MOST:
        return f"rows of {width} numbers are odd or above {MOST}."
    return None


def norm_rotate_write(
    projections: Sequence[tuple[jax.Array, int]],
    scales: tuple[jax.Array, jax.Array],
    rope: tuple[jax.Array, jax.Array],
    keys: jax.Array,
    values: jax.Array,
    layer: jax.Array,
    at: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries normalised and rotated; keys too, and written with values into the cache, which is changed in place.

    Args:
        projections: Of query, key and value: arrays [B, N, W] and the column that each begins at, D of them. All W are
            equal.
        scales: Weights of the norms of queries and keys, [D].
        rope: Cosines and sines, [N, head_dim / 2] float32.
        keys: [layers, B, slots, group, D], of groups of tokens.
        values: As keys.
        layer: int32 [1].
        at: int32 [1 + N / group]: whether the block is misplaced, which writes NaN; slots.
        eps: Epsilon of the norms.

    Returns:
        Queries [B, N, D], and the cache.
    """
    config = SIZES["norm_rotate_write"]
    (q, k, v), columns = zip(*projections, strict=True)
    batch, tokens, row = q.shape
    _, _, slots, group, width = keys.shape
    arrays = dict(q=q, k=k, v=v, q_scale=scales[0], k_scale=scales[1], cos=rope[0], sin=rope[1])
    arrays |= dict(layer=layer, at=at, keys=keys, values=values)
    call = Launch(
        "norm_rotate_write",
        ("query", "keys", "values"),
        (-(-batch * tokens // config.rows), 3, 1),
        dict(zip("QKV", columns, strict=True))
        | {"ROW": row, "BATCH": batch, "TOKENS": tokens, "GROUP": group, "SLOTS": slots, "D": width}
        | {"DP": power_of_two(width, 16), "HALF": rope[0].shape[-1], "EPS": eps, "ROWS": config.rows},
        config.warps,
        1,
    )
    results = call_kernel(call, arrays, {"query": jax.ShapeDtypeStruct((batch, tokens, width), q.dtype)})
    return results["query"], results["keys"], results["values"]


def gated_norm(
    x: jax.Array,
    y: jax.Array,
    time: jax.Array,
    gate: tuple[jax.Array, int],
    shift: tuple[jax.Array, int],
    scale: tuple[jax.Array, int],
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array]:
    """x + y * gate, and its LayerNorm, scaled and shifted.

    Args:
        x: [times, N, D].
        y: As x.
        time: [times, rows, D] float32.
        gate: A table [rows, D] and the row that the gate is, with that of `time` added.
        shift: Likewise, or weights [D] and -1: no time is added.
        scale: Likewise, of which 1 is less.
        eps: Epsilon of the norm.

    Returns:
        Both as x.
    """
    config = SIZES["gated_norm"]
    times, tokens, width = x.shape
    arrays = dict(x=x, y=y, time=time, gate=gate[0], bias=shift[0], weight=scale[0])
    call = Launch(
        "gated_norm",
        ("total", "normed"),
        (-(-tokens // config.rows), times, 1),
        {"GATE": gate[1], "SHIFT": shift[1], "SCALE": scale[1], "TABLE": time.shape[1], "TOKENS": tokens, "D": width}
        | {"DP": power_of_two(width, 16), "EPS": eps, "ROWS": config.rows},
        config.warps,
        1,
    )
    made = jax.ShapeDtypeStruct(x.shape, x.dtype)
    results = call_kernel(call, arrays, {"total": made, "normed": made})
    return results["total"], results["normed"]
