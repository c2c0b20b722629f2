"""Fused passes over tokens between a layer's products, one kernel each: for generation, without gradients.

XLA runs a norm, a rotation and a write into the cache as separate passes, and computes a residual stream that is both
kept and normalised twice. `plain` defines each pass; the kernels round at the same places.
"""

import math
from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from monarch_jax.devices import cuda_capability
from monarchrt.models.broadcasting import along_last
from monarchrt.models.wan.rope import rotate

type Passes = Literal["triton", "plain"]
type Part = tuple[Array, int]


def check_passes(passes: str | None, dtype: DTypeLike, width: int) -> None:
    """Raises ValueError if the name is unknown, or the kernels are requested and do not support the dtype or width."""
    if passes not in (None, "triton", "plain"):
        raise ValueError(f"passes={passes!r} is not None, 'triton' or 'plain'.")
    if passes == "triton":
        from monarchrt.triton_kernels.row_passes import supports

        if reason := supports(jnp.dtype(dtype), width):
            raise ValueError(f"passes='triton' cannot serve this network: {reason}")


def default_passes(dtype: DTypeLike, width: int) -> Passes | None:
    """The default for generation on one device: the kernels on Hopper, where they were measured; else None."""
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
        passes: "triton" for the kernel; otherwise the definition.
        projections: Query, key and value, each an array [B, N, W] and the index of the first of its D columns.
        scales: Weights of the norms of queries and keys.
        rope: Cosines and sines.
        keys: Keys of all layers, in slots of a group of tokens each.
        values: Values of all layers, likewise.
        layer: Index of the layer to write.
        misplaced: Whether the block cannot be placed, and NaN is written.
        slots: Slots of the groups of the N tokens.
        eps: Epsilon of the norms.

    Returns:
        The queries, and the updated keys and values.
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
    """The residual stream x + y * gate, and its LayerNorm with scale and shift, computed in float32 or wider.

    Args:
        passes: "triton" for the kernel; otherwise the definition.
        x: The residual stream.
        y: Output of the branch to add.
        time: Projected timestep embedding, T = F or 1.
        gate: A table [1, rows, D] and a row; the gate is the sum of this row of the table and of `time`.
        shift: Likewise; or the biases [D] of a norm and -1, which do not depend on `time`.
        scale: Likewise, where the norm is multiplied by 1 + scale; or the weights [D] of a norm and -1.
        eps: Epsilon of the norm.

    Returns:
        The residual stream and its norm, both in the dtype of `x`.
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
