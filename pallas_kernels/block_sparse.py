"""Block-sparse attention, forward, as a Mosaic GPU kernel for Hopper: what it serves and where it is the default.

The contract is `SparseProblem` and `Side` of `monarch_jax.contract`. There are no gradients here: those of the Triton
kernels are from the same residuals.
"""

from typing import TYPE_CHECKING

from monarch_jax.devices import cuda_capability
from monarchrt.pallas_kernels import DTYPES, HEAD_DIMS
from monarchrt.pallas_kernels.sm90.config import CAPABILITY, ROWS

if TYPE_CHECKING:
    import jax

    from monarch_jax.contract import Side, SparseProblem


def supports(
    problem: "SparseProblem", q: "jax.ShapeDtypeStruct | jax.Array", k: "jax.ShapeDtypeStruct | jax.Array"
) -> str | None:
    """Why the kernel cannot serve a call where JAX runs by default, or None when it can; no GPU is taken for Hopper.

    Args:
        problem: Sizes of blocks, and what is masked in them.
        q: Queries [B, Nq, H, D], shape and dtype.
        k: Keys [B, Nk, H, D], shape and dtype.

    Returns:
        The reason, or None.
    """
    capability = cuda_capability()
    if capability is not None and int(capability) != CAPABILITY:
        return f"the GPU has compute capability {capability}; the kernel is for Hopper's {CAPABILITY}.0 alone."
    if not problem.even:
        return "the mask has a band, or blocks of several sizes or of sizes that are traced; use 'triton' or 'xla'."
    if max(problem.rows, problem.columns) > ROWS:
        return f"blocks of {problem.rows} queries and {problem.columns} keys; each may hold up to {ROWS}."
    if problem.rows % 4:
        return f"blocks of {problem.rows} queries; copies are of a multiple of 4."
    if q.dtype.name not in DTYPES:
        return f"the inputs are {q.dtype.name}; the tensor cores take {' or '.join(DTYPES)}."
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim={q.shape[-1]} is not {' or '.join(map(str, HEAD_DIMS))}."
    if 0 in q.shape or q.shape[1] < problem.rows or k.shape[1] < problem.columns:
        return f"{q.shape[1]} queries and {k.shape[1]} keys are no whole block."
    return None


def preferred(problem: "SparseProblem", q: "jax.ShapeDtypeStruct | jax.Array") -> bool:
    """Whether it was measured to be faster than the Triton kernel: blocks of 60 and heads of 128."""
    return problem.even and (problem.rows, problem.columns, q.shape[-1]) == (60, 60, 128) and q.dtype.name in DTYPES


def forward(
    problem: "SparseProblem", q: "jax.Array", k: "jax.Array", v: "jax.Array", queries: "Side"
) -> "tuple[jax.Array, jax.Array]":
    """Output and log-sum-exp.

    Args:
        problem: One that `supports` accepts.
        q: [B, Nq, H, D], bfloat16 or float16.
        k: [B, Nk, H, D].
        v: [B, Nk, H, D].
        queries: Blocks of queries and their lists.

    Returns:
        out [B, Nq, H, D] in q's dtype and lse float32 [B, H, Nq], to the base 2, infinite where no key is seen.

    Raises:
        NotImplementedError: If `supports` gives a reason.
    """
    import jax

    from monarchrt.pallas_kernels.sm90.block_sparse import forward as run

    if reason := supports(problem, q, k):
        raise NotImplementedError(reason)
    with jax.enable_x64(False):  # Python numbers in the kernel are meant as 32-bit
        return run(problem, q, k, v, queries)
