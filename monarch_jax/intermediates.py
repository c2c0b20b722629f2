"""Rounding of alpha and Y to 8 bits, for `intermediates="e4m3"`.

alpha and Y (paper, A.2) pass between two kernels through device memory; in 8 bits they take half the bytes of bfloat16.
Each vector [D] is divided by a scale of its own, its largest magnitude in bfloat16 over 448, and rounded to
float8_e4m3fn. The largest entry, often the same channel in all keys, is thus as exact as in bfloat16. Nothing else is
rounded: the softmaxes, c_L, L's scores and the sums are in float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

from monarch_jax._typing import Array, Float
from monarch_jax.checks import brief, is_one_of

INTERMEDIATES = ("e4m3",)
LARGEST = 448.0  # largest finite float8_e4m3fn
LEAST = 1e-30  # largest magnitudes below count as this one, whose 448th is a normal float32
SMALLEST_NORMAL, SUBNORMALS = 2.0**-6, 2**9  # below the first, float8_e4m3fn is a multiple of one over the second
BFLOAT16 = (8, 7)  # bits of exponent and mantissa


def check_intermediates(intermediates: str | None) -> None:
    """Raises ValueError if `intermediates` is neither None nor one of `INTERMEDIATES`.

    Examples:
        >>> check_intermediates("fp8")
        Traceback (most recent call last):
        ...
        ValueError: intermediates='fp8' is not None (alpha and Y in the inputs' dtype) or 'e4m3'.
    """
    if intermediates is not None and not is_one_of(intermediates, INTERMEDIATES):
        names = ", ".join(map(repr, INTERMEDIATES))
        raise ValueError(
            f"intermediates={brief(intermediates)} is not None (alpha and Y in the inputs' dtype) or {names}."
        )


def stored(x: Float[Array, "*batch D"], intermediates: str | None) -> Float[Array, "*batch D"]:
    """Rounds vectors as `intermediates` says; the gradient is the identity (a straight-through estimator).

    Examples:
        >>> stored(jnp.array([7.0, 1.0, 0.3]), "e4m3").tolist()  # 448, 64 and 19.2, which becomes 20, in units of 1/64
        [7.0, 1.0, 0.3125]

    Args:
        x: [..., D], alpha or Y.
        intermediates: "e4m3", or None to leave `x` unchanged.

    Returns:
        The rounded values [..., D], in the dtype of `x`.
    """
    return x if intermediates is None else _e4m3(x)


@jax.custom_jvp
def _e4m3(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = lax.reduce_precision(jnp.maximum(jnp.abs(wide).max(-1, keepdims=True), LEAST), *BFLOAT16) / LARGEST
    return (rounded_to_e4m3(wide / scale) * scale).astype(x.dtype)


def rounded_to_e4m3(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Numbers of up to 448 rounded to float8_e4m3fn, in their own dtype.

    XLA leaves out a conversion to fewer bits and back on GPUs (`xla_allow_excess_precision`), so there is none here.

    Examples:
        >>> rounded_to_e4m3(jnp.array([19.2, 450.0, 0.0007, -0.0014])).tolist()  # below 1/64 in steps of 1/512
        [20.0, 448.0, 0.0, -0.001953125]
    """
    few = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=3)
    small = lax.round(x * SUBNORMALS, lax.RoundingMethod.TO_NEAREST_EVEN) / SUBNORMALS
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, small, jnp.clip(few, -LARGEST, LARGEST))


@_e4m3.defjvp
def _straight_through(primals, tangents):
    return _e4m3(*primals), *tangents
