"""What annotations of the kernels name: references, and the numbers and arrays that a kernel computes as it is traced.

In a kernel, letters of a shape are those of its products: j, i and l columns and rows of 64 or fewer, n pairs (c, k),
d a slab of D, w the keys of a product.
"""

from typing import Any

from jaxtyping import Array, Bool, Float, Float32, Int32

Ref = Any
"""A reference to memory of the device, or a view of one (`.at`), of which JAX has no public type."""

Refs = tuple[Ref, ...]

Number = Int32[Array, ""]
"""A number that the kernel computes."""

Index = Number | int

Flag = Bool[Array, ""]

Place = tuple[Number, Number, Number]
"""Batch entry, head of the chunk, and the query tile or the row of keys or queries, as the function says."""

Tile = Float[Array, "_ _"]
"""In registers, in the inputs' dtype or float32."""

Rows = Float32[Array, " _"]
"""A number for each row of a tile, in registers."""

Slabs = list[Float32[Array, "_ _"]]
"""Accumulators, one for each 64 of D."""
