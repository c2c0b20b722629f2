"""Mosaic GPU kernels for tiled Monarch attention, a backend of `monarch_jax` that works on tiles, not grids or layouts.

The kernels are for Hopper (sm_90a): TMA, wgmma, warp-specialised persistent blocks. They can be lowered and compiled
for CUDA on a machine without a GPU. Sizes measured on a GPU (`tuning`) take precedence over those of `config`.
"""

from typing import TYPE_CHECKING, Any

from monarch_jax.devices import cuda_capability
from monarchrt.pallas_kernels.sm90.config import CAPABILITY, MOST_COLUMNS, MOST_ROWS, right_config
from monarchrt.pallas_kernels.sm90.refined_config import MOST_REFINED_ROWS, refined_config

if TYPE_CHECKING:
    import jax

    from monarch_jax.contract import Problem, Residuals
    from monarchrt.pallas_kernels.sm90.refined import PairKernels

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
LEAST_SCALE = 1e-8  # some kernels take scores of columns that are none for -1e30 before they are scaled


def supports(
    problem: "Problem", q: "jax.ShapeDtypeStruct | jax.Array", k: "jax.ShapeDtypeStruct | jax.Array"
) -> str | None:
    """The reason why the kernels do not support a call on the default device, or None; without a GPU, as on Hopper.

    Args:
        problem: `monarch_jax.contract.Problem`.
        q: Shape [B, A, b1, b2, H, D] and dtype of the query tiles.
        k: Shape [B, C, b1, b2, H, D] and dtype of the key tiles.

    Returns:
        The reason, or None.
    """
    del k
    _, _, rows, cols, _, dim = q.shape
    capability = cuda_capability()
    if capability is not None and int(capability) != CAPABILITY:
        return f"the GPU has compute capability {capability}; the kernels are for Hopper's {CAPABILITY}.0 alone."
    if problem.num_iters > 1 and problem.intermediates:
        return f"num_iters={problem.num_iters} with intermediates={problem.intermediates!r}; those are for one step."
    if q.dtype.name not in DTYPES:
        return f"the inputs are {q.dtype.name}; the tensor cores take {' or '.join(DTYPES)}."
    if dim not in HEAD_DIMS:
        return f"head_dim={dim} is not {' or '.join(map(str, HEAD_DIMS))}."
    if problem.scale < LEAST_SCALE:
        return f"scale={problem.scale:g}; the kernels take {LEAST_SCALE:g} or more; use 'triton' or 'xla'."
    if right_config(cols, dim) is None:
        return f"b2={cols} columns of keys and values with head_dim={dim} do not fit a block's shared memory."
    if problem.num_iters > 1 and refined_config(rows, cols, dim) is None:
        return (
            f"num_iters={problem.num_iters} with tiles of {rows} x {cols} and head_dim={dim}; several refinement steps "
            f"take up to {MOST_REFINED_ROWS} rows, and columns whose gradients fit a warpgroup's registers."
        )
    return None


def forward(
    problem: "Problem",
    q: "jax.Array",
    k: "jax.Array",
    v: "jax.Array",
    visible: "jax.Array",
    *,
    pairs: "PairKernels | None" = None,
) -> "tuple[jax.Array, jax.Array]":
    """The output and the log-sum-exp of the last step's scores of L (paper, Sections 2.1, 4.2 and A.2).

    Args:
        problem: `monarch_jax.contract.Problem`, one that `supports` accepts.
        q: [B, A, b1, b2, H, D], bfloat16 or float16.
        k: [B, C, b1, b2, H, D].
        v: As `k`.
        visible: int32 [A], number of leading key tiles that each query tile sees; may be traced.
        pairs: Kernels between two refinement steps, for more than one: `triton_kernels.pairs.Pairs`.

    Returns:
        out [B, A, b1, b2, H, D] in the inputs' dtype and lse [B, A, b1, b2, H] in float32.

    Raises:
        NotImplementedError: If `supports` gives a reason.
    """
    return _forward(problem, q, k, v, visible, keep=False, pairs=pairs)[:2]


def forward_keeping(
    problem: "Problem",
    q: "jax.Array",
    k: "jax.Array",
    v: "jax.Array",
    visible: "jax.Array",
    *,
    pairs: "PairKernels | None" = None,
) -> "tuple[jax.Array, jax.Array, tuple[jax.Array, ...] | None]":
    """`forward`, which also returns alpha, Y and c_L of all heads and query tiles for `vjp`.

    They take 4*D bytes for every pair of a query (a, j) and a key row (c, k) of a head, as much as a forward pass moves
    through device memory in one direction.

    Args:
        problem: As in `forward`.
        q: As in `forward`.
        k: As in `forward`.
        v: As in `forward`.
        visible: As in `forward`.
        pairs: As in `forward`.

    Returns:
        out, lse, and alpha, Y and c_L; None instead of these with several refinement steps, or if `supports_vjp` gives
        a reason.

    Raises:
        NotImplementedError: If `supports` gives a reason.
    """
    keep = problem.num_iters == 1 and supports_vjp(problem, q, k) is None
    return _forward(problem, q, k, v, visible, keep=keep, pairs=pairs)


def _forward(
    problem: "Problem",
    q: "jax.Array",
    k: "jax.Array",
    v: "jax.Array",
    visible: "jax.Array",
    *,
    keep: bool,
    pairs: "PairKernels | None",
) -> "tuple[jax.Array, jax.Array, tuple[jax.Array, ...] | None]":
    import jax

    from monarchrt.pallas_kernels.sm90 import tuning
    from monarchrt.pallas_kernels.sm90.forward import forward as run

    _, tiles, rows, cols, _, dim = q.shape
    few, e4m3 = tiles < k.shape[1], problem.intermediates == "e4m3"
    config = tuning.forward(rows, cols, dim, few=few, e4m3=e4m3, masked=problem.masked)
    if (reason := supports(problem, q, k)) or config is None:
        raise NotImplementedError(reason)
    with jax.enable_x64(False):  # Python numbers in the kernels are meant as 32-bit
        if problem.num_iters > 1:
            from monarchrt.pallas_kernels.sm90 import refined

            sizes = {"scale": problem.scale, "masked": problem.masked, "config": config}
            steps = {"num_iters": problem.num_iters, "kernels": _given(problem, pairs)}
            return *refined.forward(q, k, v, visible.astype("int32"), **sizes, **steps), None
        options = {"scale": problem.scale, "masked": problem.masked, "config": config, "keep": keep}
        return run(q, k, v, visible.astype("int32"), **options)


def _given(problem: "Problem", pairs: "PairKernels | None") -> "PairKernels":
    if pairs is None:
        raise ValueError(f"num_iters={problem.num_iters} takes pairs=triton_kernels.pairs.Pairs, not None.")
    return pairs


def supports_vjp(
    problem: "Problem", q: "jax.ShapeDtypeStruct | jax.Array", k: "jax.ShapeDtypeStruct | jax.Array"
) -> str | None:
    """The reason why the kernels do not support the gradient of a call, or None if they do.

    Args:
        problem: `monarch_jax.contract.Problem`.
        q: Shape [B, A, b1, b2, H, D] and dtype of the query tiles.
        k: Shape [B, C, b1, b2, H, D] and dtype of the key tiles.

    Returns:
        The reason, or None.
    """
    _, _, rows, cols, _, _ = q.shape
    if reason := supports(problem, q, k):
        return reason
    if problem.intermediates:
        return f"intermediates={problem.intermediates!r}; the gradients take alpha and Y in the inputs' dtype."
    if rows > MOST_ROWS:
        return f"b1={rows} rows are above {MOST_ROWS}, whose gradients fit a block's registers."
    if cols > MOST_COLUMNS:
        return f"b2={cols} columns are above {MOST_COLUMNS}, whose gradients fit a block's registers."
    return None


def vjp(
    problem: "Problem", residuals: "Residuals", d_out: "jax.Array", *, pairs: "PairKernels | None" = None
) -> "tuple[jax.Array, jax.Array, jax.Array]":
    """Gradients, bitwise reproducible; R, and alpha, c_L and Y if they were not kept, are recomputed.

    Args:
        problem: `monarch_jax.contract.Problem`; dk and dv are zero outside the last `grad_tiles` visible key tiles.
        residuals: `monarch_jax.contract.Residuals`.
        d_out: [B, A, b1, b2, H, D].
        pairs: As in `forward`.

    Returns:
        dq [B, A, b1, b2, H, D], dk and dv [B, C, b1, b2, H, D], in the inputs' dtype.

    Raises:
        NotImplementedError: If `supports_vjp` gives a reason.
    """
    import jax

    from monarchrt.pallas_kernels.sm90 import tuning
    from monarchrt.pallas_kernels.sm90.backward import backward

    r = residuals
    _, _, rows, cols, _, dim = r.q.shape
    several = problem.num_iters > 1
    config = (tuning.refined_backward if several else tuning.backward)(rows, cols, dim)
    if (reason := supports_vjp(problem, r.q, r.k)) or config is None:
        raise NotImplementedError(reason)
    arrays = (r.q, r.k, r.v, r.visible.astype("int32"), r.out, r.lse, d_out.astype(r.q.dtype))
    sizes: dict[str, Any] = dict(
        scale=problem.scale, masked=problem.masked, grad_tiles=problem.grad_tiles, config=config
    )
    with jax.enable_x64(False):  # Python numbers in the kernels are meant as 32-bit
        if several:
            from monarchrt.pallas_kernels.sm90 import refined

            return refined.backward(*arrays, **sizes, num_iters=problem.num_iters, kernels=_given(problem, pairs))
        return backward(*arrays, **sizes, kept=r.kept)


if __name__ == "pallas_kernels":  # imported by the folder's name, which is possible in a checkout only
    from monarchrt.checkout import same_as_in_monarchrt

    same_as_in_monarchrt(__name__)
