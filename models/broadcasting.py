"""Vectors that meet arrays of more axes, said in full: programs may forbid axes that are added without a word."""

import numpy as np
from jaxtyping import Array, Shaped


def along_last[Vector: (Array, np.ndarray)](vector: Vector, like: Shaped[Array, "*batch _"]) -> Vector:
    """A vector with as many axes as another array, all but the last of size 1.

    Examples:
        >>> import jax.numpy as jnp
        >>> along_last(jnp.ones(3), jnp.ones((2, 5, 3))).shape
        (1, 1, 3)

    Args:
        vector: [D], for the last axis.
        like: Has as many axes.

    Returns:
        The vector, [1, ..., 1, D].
    """
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
