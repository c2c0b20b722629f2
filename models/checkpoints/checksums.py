"""Checksums of arrays, computed where they live."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


@jax.jit
def checksums(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    """A 32-bit checksum of each array's bits, computed where the array lives.

    Sums the words, each multiplied with an odd number that depends on its place, modulo 2**32: the order of summation
    does not matter, so the checksum is the same on every device and under every sharding.
    """
    return {name: _checksum(array) for name, array in arrays.items()}


def _checksum(array: Array) -> Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    width = array.dtype.itemsize * 8
    words = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(width, 32)}")).astype(jnp.uint32)
    # counted axis by axis: a flat view of an array that is split would be gathered on every device first
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        stride = math.prod(words.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
