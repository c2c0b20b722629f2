"""Checksums of arrays, computed on their devices."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


@jax.jit
def checksums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    """A 32-bit checksum of each array's bits, computed on its devices.

    The checksum is the sum of all words modulo 2**32, each multiplied by an odd number that depends on its index. The
    order of summation does not matter, so it is the same on every device and under every sharding.
    """
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(array: Array) -> Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = array.dtype.itemsize * 8
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(width, 32)}")).astype(jnp.uint32)
    # indices are computed axis by axis: flattening a split array would gather it on every device
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
