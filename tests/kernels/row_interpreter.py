"""Runs the kernels over rows of tokens in Triton's interpreter, in place of the calls, and prints errors as JSON.

In a process of its own: TRITON_INTERPRET=1 counts when the kernels are imported. What they make starts as NaN.
"""

import inspect
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from monarchrt.models.wan import passes
from monarchrt.triton_kernels import row_passes, rows
from monarchrt.triton_kernels.row_passes import RowConfig

EPS = 1e-2  # large enough to count


def run(call: Any, arrays: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """`row_passes.call_kernel` in the interpreter."""
    tensors = {name: torch.tensor(np.asarray(x)) for name, x in arrays.items()}
    for name, x in made.items():
        tensors[name] = torch.full(x.shape, float("nan"), dtype=torch.float32)
    kernel = getattr(rows, call.kernel)
    names = [name for name in inspect.signature(kernel.fn).parameters if not name.isupper()]
    kernel[call.grid](**{name: tensors[name] for name in names}, **call.constants)
    return {name: jnp.asarray(tensors[name].numpy()) for name in call.writes}


def error(found: Any, right: Any) -> float:
    """The largest difference over the largest number; infinite where one is NaN and the other is not."""
    found, right = np.asarray(found), np.asarray(right)
    if (np.isnan(found) != np.isnan(right)).any():
        return float("inf")
    return float(np.nanmax(np.abs(found - right)) / np.nanmax(np.abs(right)))


def normal(number: int, *shape: int) -> jax.Array:
    """Random numbers."""
    return jax.random.normal(jax.random.key(number), shape)


def write(*, joined: bool, misplaced: bool, groups: int = 2) -> float:
    """Queries, keys and values of 2 samples of 10 tokens with 3 heads of 12, into the second of 2 layers."""
    width, tokens = 36, 10
    separate = tuple(normal(n, 2, tokens, width) for n in range(3))
    each = jnp.concatenate(separate, axis=-1)
    projections = [(each, n * width) for n in range(3)] if joined else [(x, 0) for x in separate]
    angles = normal(3, tokens, 6)
    keys, values = (normal(n, 2, 2, 3, tokens // groups, width) for n in (4, 5))
    inputs = (projections, (normal(6, width), normal(7, width)), (jnp.cos(angles), jnp.sin(angles)), keys, values)
    where = (jnp.int32(1), jnp.array(misplaced), jnp.array([2, 0][:groups], jnp.int32))
    results = [passes.norm_rotate_write(how, *inputs, *where, eps=EPS) for how in ("triton", "plain")]
    return max(error(found, right) for found, right in zip(*results, strict=True))


def gated(*, times: int, affine: bool) -> float:
    """2 samples of 2 frames of 5 tokens with 36 numbers."""
    x, y, time, table, before = (
        normal(n, *shape) for n, shape in enumerate([(2, 2, 5, 36)] * 2 + [(2, times, 6, 36)] + [(1, 6, 36)] * 2)
    )
    norm = ((normal(5, 36), -1), (normal(6, 36), -1)) if affine else ((table, 3), (table, 4))
    inputs = (x, y, time, (before, 5), *norm)
    results = [passes.gated_norm(how, *inputs, eps=EPS) for how in ("triton", "plain")]
    return max(error(found, right) for found, right in zip(*results, strict=True))


if __name__ == "__main__":
    row_passes.call_kernel = run
    row_passes.SIZES = {name: RowConfig(rows=3, warps=4) for name in row_passes.SIZES}
    found = {
        "joined": write(joined=True, misplaced=False),
        "apart": write(joined=False, misplaced=False),
        "one group": write(joined=True, misplaced=False, groups=1),
        "misplaced": write(joined=True, misplaced=True),
        "modulated": gated(times=2, affine=False),
        "one time": gated(times=1, affine=False),
        "affine": gated(times=2, affine=True),
    }
    print(json.dumps(found))
