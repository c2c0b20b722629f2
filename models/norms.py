"""Normalisation layers that several networks share."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from monarchrt.models.broadcasting import along_last


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, "D"], *, eps: float) -> Float[Array, "*batch D"]:
    """RMSNorm: x / sqrt(mean(x^2) + eps) in float32 or wider, rounded to the dtype of `x`, then scaled in that dtype.

    Examples:
        >>> [f"{x:.3f}" for x in rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2), eps=0.0)]
        ['0.849', '1.131']

    Args:
        x: [..., D].
        scale: [D].
        eps: Added to the mean square.

    Returns:
        [..., D] in the dtype of `x`.
    """
    precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    normed = precise * lax.rsqrt(jnp.mean(precise**2, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * along_last(scale.astype(x.dtype), x)
