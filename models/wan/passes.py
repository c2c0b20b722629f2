"""Passes over rows of tokens between a layer's products, each in one kernel of its own: for generation, no gradients.

XLA puts a norm, a rotation and a write into the cache each in a pass of its own, and where a residual stream is both
kept and normalised it forms it twice. `plain` has what each pass is; the kernels round where it does.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from monarch_jax.devices import cuda_capability
from monarchrt.models.broadcasting import along_last
from monarchrt.models.wan.rope import rotate

type Passes = Literal["triton", "plain"]
type Part = tuple[Array, int]


def check_passes(passes: str | None, dtype: Any, width: int) -> None:
    """Raises ValueError if the name is unknown, or if the kernels are asked for and cannot take such rows."""
    if passes not in (None, "triton", "plain"):
        raise ValueError(f"passes={passes!r} is not None, 'triton' or 'plain'.")
    if passes == "triton":
        from monarchrt.triton_kernels.row_passes import supports

        if reason := supports(jnp.dtype(dtype), width):
            raise ValueError(f"passes='triton' cannot serve this network: {reason}")


def default_passes(dtype: Any, width: int) -> Passes | None:
    """What generation on one device takes: the kernels where they were measured, on Hopper; else nothing of its own."""
    if int(cuda_capability() or 0) != 9:
        return None
    from monarchrt.triton_kernels.row_passes import supports

    return "triton" if supports(jnp.dtype(dtype), width) is None else None


def norm_rotate_write(
    passes: Passes | None,
    projections: Sequence[Part],
    scales: tuple[Float[Array, " D"], Float[Array, " D"]],
    rope: tuple[Float[Array, "N half"], Float[Array, "N half"]],
    keys: Float[Array, "layers B slots group D"],
    values: Float[Array, "layers B slots group D"],
    layer: Int[Array, ""],
    misplaced: Array,
    slots: Int[Array, " groups"],
    *,
    eps: float,
) -> tuple[Float[Array, "B N D"], Array, Array]:
    """Normalises and rotates queries and keys, and writes keys and values into the cache of all layers, in place.

    Args:
        passes: By the kernel, or as the definition says.
        projections: Of query, key and value: an array [B, N, W] and the column that its D numbers begin at.
        scales: Weights of the norms of queries and keys.
        rope: Cosines and sines.
        keys: Keys of all layers, in slots of a group of tokens each.
        values: Likewise.
        layer: Which is written.
        misplaced: Whether the block has no place: it is written as NaN.
        slots: Slots of the groups of the N tokens.
        eps: Epsilon of the norms.

    Returns:
        The queries, and keys and values.
    """
    if passes == "triton":
        from monarchrt.triton_kernels.row_passes import norm_rotate_write as kernel

        at = jnp.concatenate([misplaced[None].astype(jnp.int32), slots.astype(jnp.int32)])
        where = jnp.asarray(layer, jnp.int32)[None]
        return kernel(projections, scales, rope, keys, values, where, at, eps=eps)
    _, _, _, group, width = keys.shape
    query, key, value = (array[..., column : column + width] for array, column in projections)

    def turned(x: Array, scale: Array) -> Array:
        precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        normed = precise * lax.rsqrt(jnp.mean(precise**2, axis=-1, keepdims=True) + eps)
        normed = normed.astype(x.dtype) * along_last(scale.astype(x.dtype), x)
        heads = normed.reshape(x.shape[0], 1, x.shape[1], -1, 2 * rope[0].shape[-1])
        return rotate(heads, *(table[None] for table in rope)).reshape(x.shape)

    def write(buffer: Array, x: Array) -> Array:
        x = jnp.where(misplaced, jnp.nan, x).astype(buffer.dtype)
        zero = jnp.zeros((), jnp.int32)
        for n in range(x.shape[1] // group):
            part = x[None, :, None, n * group : (n + 1) * group]
            at = [jnp.asarray(layer, jnp.int32), zero, slots[n].astype(jnp.int32), zero, zero]
            buffer = lax.dynamic_update_slice(buffer, part, at)
        return buffer

    return turned(query, scales[0]), write(keys, turned(key, scales[1])), write(values, value)


def gated_norm(
    passes: Passes | None,
    x: Float[Array, "B F S D"],
    y: Float[Array, "B F S D"],
    time: Float[Array, "B T rows D"],
    gate: Part,
    shift: Part,
    scale: Part,
    *,
    eps: float,
) -> tuple[Float[Array, "B F S D"], Float[Array, "B F S D"]]:
    """x + y * gate, and its LayerNorm, scaled and shifted; formed in float32 or wider.

    Args:
        passes: By the kernel, or as the definition says.
        x: The residual stream.
        y: What is added.
        time: Projected timestep embedding, T = F or 1.
        gate: A table [1, rows, D] and the row that, with the one of `time`, is the gate.
        shift: Likewise; or a norm's biases [D] and -1, to which no time is added.
        scale: Likewise, of which 1 is less; or weights and -1.
        eps: Epsilon of the norm.

    Returns:
        The residual stream, and what is normalised, both in x's dtype.
    """
    if passes == "triton":
        from monarchrt.triton_kernels.row_passes import gated_norm as kernel

        times = time.reshape(-1, *time.shape[2:])
        rows = (len(times), math.prod(x.shape[:3]) // len(times), x.shape[3])
        parts = [(table.reshape(-1, x.shape[3]) if row >= 0 else table, row) for table, row in (gate, shift, scale)]
        out = kernel(x.reshape(rows), y.reshape(rows), times, parts[0], parts[1], parts[2], eps=eps)
        return out[0].reshape(x.shape), out[1].reshape(x.shape)

    def of_time(table: Array, row: int) -> Array:
        if row < 0:
            return along_last(table.astype(time.dtype), x)
        return (time[:, :, row] + table[:, row].astype(time.dtype)[None])[:, :, None]

    total = (x.astype(time.dtype) + y.astype(time.dtype) * of_time(*gate)).astype(x.dtype)
    precise = total.astype(time.dtype)
    centred = precise - jnp.mean(precise, axis=-1, keepdims=True)
    normed = centred * lax.rsqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + eps)
    weights = of_time(*scale) if scale[1] < 0 else 1 + of_time(*scale)
    return total, (normed * weights + of_time(*shift)).astype(x.dtype)
