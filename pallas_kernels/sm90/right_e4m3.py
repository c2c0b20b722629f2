"""Stage 1 with alpha and Y stored in 8 bits: `right.py`, whose results leave as e4m3 with a scale for every vector.

What is stored is what `monarch_jax.intermediates` defines: a vector over its largest magnitude, that in bfloat16, times
448. The two magnitudes of a pair (alpha in the upper 16 bits, Y in the lower) are one 32-bit word, laid out as c_L is.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Int32

from monarchrt.pallas_kernels.sm90.right import Block
from monarchrt.pallas_kernels.sm90.types import Index

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0  # of E4M3
NOTHING = 1e-30  # vectors below it are stored as zeros, with a scale for which stage 2 has room
UPPER = -65536  # the upper 16 bits of a word


class RightE4M3(Block):
    """A persistent block; `numbers` are c_L and the words."""

    numbers: ClassVar[tuple[DTypeLike, ...]] = (jnp.float32, jnp.int32)

    @staticmethod
    def stored(q: jax.ShapeDtypeStruct) -> tuple[Any, int, int]:
        """A vector is one slab."""
        return E4M3, 1, q.shape[5] * q.shape[6]

    def rounded(self, results: Sequence[jax.Array]) -> list[jax.Array]:
        """For alpha, Y or both: the vectors [64 j, D] in 8 bits, and the bits of their scales [64]."""
        out = []
        for first in range(0, len(results), self.slabs):
            slabs = results[first : first + self.slabs]
            most = jnp.abs(slabs[0])
            for x in slabs[1:]:
                most = jnp.maximum(most, jnp.abs(x))
            most = most.max(axis=1)
            bits = to_bfloat16(jnp.where(most < NOTHING, jnp.ones_like(most), most))
            factor = LARGEST / lax.bitcast_convert_type(bits, jnp.float32)
            small = [(x * lax.broadcast_in_dim(factor, x.shape, [0])).astype(E4M3) for x in slabs]
            out += [lax.concatenate(small, 1), bits]
        return out

    def put(self, mine: Index, made: list[jax.Array]) -> tuple[jax.Array, ...]:
        """See `Block`."""
        alpha, alpha_bits, y, y_bits = made
        self.alpha_reg[mine, 0] = alpha
        self.y_reg[mine, 0] = y
        return (alpha_bits | lax.shift_right_logical(y_bits, jnp.full_like(y_bits, 16)),)


def to_bfloat16(x: Float32[Array, " _"]) -> Int32[Array, " _"]:
    """The bits of positive numbers, rounded to bfloat16."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    even = lax.shift_right_logical(bits, jnp.full_like(bits, 16)) & 1
    return (bits + even + 0x7FFF) & UPPER
