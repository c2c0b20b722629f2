"""A kernel by itself, which is no part of an operation: a pass over rows or pixels."""

import jax

from monarchrt.triton_kernels.config import target
from monarchrt.triton_kernels.plan import Launch


def call_kernel(
    call: Launch, arrays: dict[str, jax.Array], made: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """What a launch writes, by name, out of the arrays that it reads and the shapes of those that it makes."""
    from monarchrt.triton_kernels import launch  # imports Triton

    shapes = made | {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    return launch.call(call, arrays, shapes, target().compute_capability)
