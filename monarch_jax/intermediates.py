"""Rounding of alpha and Y to 8 bits, for `intermediates="e4m3"`.

alpha and Y (paper, A.2) pass between two kernels through device memory; in 8 bits they take half the bytes of bfloat16.
Each vector [D] is divided by a scale of its own, its largest magnitude in bfloat16 over 448, and rounded to
float8_e4m3fn. The largest entry, often the same channel in all keys, is thus as exact as in bfloat16. Nothing else is
rounded: the softmaxes, c_L, L's scores and the sums are in float32.
"""

import jax
import jax.numpy as jnp

from monarch_jax._typing import Array, Float
from monarch_jax.checks import brief

INTERMEDIATES = ("e4m3",)
LARGEST = 448.0  # largest finite float8_e4m3fn


def check_intermediates(intermediates: str | None) -> None:
    """Raises ValueError if `intermediates` is neither None nor one of `INTERMEDIATES`.

    Examples:
        >>> check_intermediates("fp8")
        Traceback (most recent call last):
        ...
        ValueError: intermediates='fp8' is not None (alpha and Y in the inputs' dtype) or 'e4m3'.
    """
    if intermediates is not None and intermediates not in INTERMEDIATES:
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
    top = jnp.abs(x).max(-1, keepdims=True).astype(jnp.bfloat16).astype(x.dtype)
    scale = jnp.where(top == 0, 1, top / LARGEST)
    return (x / scale).astype(jnp.float32).astype(jnp.float8_e4m3fn).astype(x.dtype) * scale


@_e4m3.defjvp
def _straight_through(primals, tangents):
    return _e4m3(*primals), *tangents
