"""Triton kernels for tiled Monarch attention, a backend of `monarch_jax` that works on tiles, not grids or layouts.

The interface is `monarch_jax.contract`: `supports`, `forward` and `vjp` on arrays [B, A, b1, b2, H, D]. Triton and
jax-triton are imported at the first call.
"""

import importlib.util
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from monarchrt.triton_kernels.config import Target, compile_for, target

if TYPE_CHECKING:
    from monarch_jax.contract import Problem, Residuals

__all__ = ["Target", "compile_for", "forward", "missing_packages", "supports", "supports_vjp", "target", "vjp"]

DTYPES = ("bfloat16", "float16", "float32")
MAX_DIM = 128
LEAST_BLOCK = 4
LEAST_SCALE = 1e-8  # in magnitude, for gradients


def missing_packages() -> str | None:
    """Names the packages that the kernels need and that are not installed, as a sentence; None if all are."""
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if missing:
        names, verb = " and ".join(missing).replace("_", "-"), "is" if len(missing) == 1 else "are"
        return f"{names} {verb} not installed: pip install 'monarchrt[cuda]'."
    return None


def supports(problem: "Problem", q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct) -> str | None:
    """The reason why the kernels do not support a call, or None if they do; does not depend on the device.

    Args:
        problem: `monarch_jax.contract.Problem`.
        q: Shape [B, A, b1, b2, H, D] and dtype of the query tiles.
        k: Shape [B, C, b1, b2, H, D] and dtype of the key tiles.

    Returns:
        The reason and an alternative, or None.
    """
    if reason := missing_packages():
        return reason
    if q.dtype.name not in DTYPES:
        return f"dtype {q.dtype.name} is not one of {', '.join(DTYPES)}."
    if problem.intermediates:
        return (
            f"intermediates={problem.intermediates!r}; these kernels keep alpha and Y in the inputs' dtype; on Hopper "
            f"'mosaic' stores 8 bits, and 'xla' computes the same numbers anywhere."
        )
    b1, b2, dim = q.shape[2], q.shape[3], q.shape[5]
    if min(b1, b2) < LEAST_BLOCK:
        return f"a tile of {b1} x {b2} has a side below {LEAST_BLOCK}; use implementation='xla' or a larger tile."
    if dim > MAX_DIM:
        return f"head_dim {dim} is above {MAX_DIM}; use implementation='xla'."
    if 0 in q.shape or 0 in k.shape:
        return f"there is nothing to compute for shapes {q.shape}, {k.shape}."
    return None


def supports_vjp(problem: "Problem", q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct) -> str | None:
    """The reason why the kernels do not support the gradient of a call, or None; arguments are as in `supports`."""
    if reason := supports(problem, q, k):
        return reason
    if abs(problem.scale) < LEAST_SCALE:
        return f"scale={problem.scale:g}; gradients of L's scores are divided by it."
    return None


def forward(
    problem: "Problem", q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The output and the log-sum-exp of the last refinement step's scores of L (paper, Sections 2.1, 4.2 and A.2).

    Args:
        problem: `monarch_jax.contract.Problem`.
        q: [B, A, b1, b2, H, D], bfloat16, float16 or float32.
        k: [B, C, b1, b2, H, D].
        v: [B, C, b1, b2, H, D].
        visible: int32 [A]; query tile a sees the key tiles c < visible[a].

    Returns:
        out [B, A, b1, b2, H, D] in q's dtype and lse float32 [B, A, b1, b2, H].
    """
    from monarchrt.triton_kernels import operation

    return operation.forward(float(problem.scale), q, k, v, visible, num_iters=problem.num_iters)


def vjp(problem: "Problem", residuals: "Residuals", d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients for any number of refinement steps (paper, A.2); results are bitwise reproducible.

    alpha, c_L, Y and R of all steps are recomputed for one chunk of query tiles and heads at a time.

    Args:
        problem: `monarch_jax.contract.Problem`; dk and dv are zero outside the last `grad_tiles` visible key tiles.
        residuals: `monarch_jax.contract.Residuals`.
        d_out: [B, A, b1, b2, H, D].

    Returns:
        dq [B, A, b1, b2, H, D], dk and dv [B, C, b1, b2, H, D].
    """
    from monarchrt.triton_kernels import operation

    r = residuals
    delta = jnp.einsum("baijhd,baijhd->baijh", d_out, r.out, preferred_element_type=jnp.float32)
    d_out = d_out.astype(r.q.dtype)
    arrays = (r.q, r.k, r.v, d_out, r.lse, delta, r.visible)
    return operation.backward(float(problem.scale), problem.grad_tiles, *arrays, num_iters=problem.num_iters)


if __name__ == "triton_kernels":  # imported by the folder's name, which is possible in a checkout only
    from monarchrt.checkout import same_as_in_monarchrt

    same_as_in_monarchrt(__name__)
