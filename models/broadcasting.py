"""Explicit broadcasting of vectors, since `jax_numpy_rank_promotion` may forbid the implicit kind."""

import numpy as np
from jaxtyping import Array, Shaped


def along_last[Vector: (Array, np.ndarray)](vector: Vector, like: Shaped[Array, "*batch _"]) -> Vector:
    """Reshapes a vector to the number of axes of another array, all of size 1 but the last.

    Examples:
        >>> import jax.numpy as jnp
        >>> along_last(jnp.ones(3), jnp.ones((2, 5, 3))).shape
        (1, 1, 3)

    Args:
        vector: [D], for the last axis.
        like: The array whose number of axes the result gets.

    Returns:
        The vector, [1, ..., 1, D].
    """
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
