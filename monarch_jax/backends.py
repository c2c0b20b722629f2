"""The registry of backends, the order in which they are tried, and the choice of one for a call.

`contract` defines the interface of a backend. To add one, add a row to `_REGISTRY`.
"""

import functools
import types
from collections.abc import Callable

import jax

from monarch_jax.checks import brief, is_one_of
from monarch_jax.contract import Backend, Problem, Residuals, Vjp, differentiable
from monarch_jax.devices import cuda_capability, on_cuda
from monarch_jax.partitioning import forward_anywhere, vjp_anywhere


@functools.cache  # the same function object in every call, so that JAX finds it in its tracing cache
def _reference() -> Backend:
    from monarch_jax import reference

    return Backend("reference", lambda problem, q, k: None, reference.attend)


@functools.cache
def _xla() -> Backend:
    from monarch_jax import xla

    return Backend("xla", lambda problem, q, k: None, xla.attend)


@functools.cache
def _triton() -> Backend:
    from monarchrt import triton_kernels

    attend = differentiable(forward_anywhere(triton_kernels.forward), vjp_anywhere(first_vjp(triton_kernels)))
    return Backend("triton", triton_kernels.supports, attend)


@functools.cache
def _mosaic() -> Backend:
    """Mosaic kernels, with Triton kernels between refinement steps if there are several."""
    from monarchrt import pallas_kernels, triton_kernels

    def supports(problem: Problem, q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct) -> str | None:
        reason = pallas_kernels.supports(problem, q, k)
        return triton_kernels.missing_packages() if reason is None and problem.num_iters > 1 else reason

    def pairs(**arguments):
        from monarchrt.triton_kernels.pairs import Pairs

        return Pairs(**arguments)

    run, run_keeping, back = (
        functools.partial(x, pairs=pairs)
        for x in (pallas_kernels.forward, pallas_kernels.forward_keeping, pallas_kernels.vjp)
    )
    first = types.SimpleNamespace(supports_vjp=pallas_kernels.supports_vjp, vjp=back)
    vjp = vjp_anywhere(first_vjp(first, triton_kernels))
    return Backend("mosaic", supports, differentiable(forward_anywhere(run), vjp, forward_anywhere(run_keeping)))


def first_vjp(*kernels) -> Vjp:
    """A vjp that runs the first of these packages to support the call, else XLA, on the same residuals."""

    def vjp(problem: Problem, residuals: Residuals, d_out: jax.Array):
        from monarch_jax import xla

        shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (residuals.q, residuals.k)]
        chosen = next((x for x in kernels if x.supports_vjp(problem, *shapes) is None), xla)
        return chosen.vjp(problem, residuals, d_out)

    return vjp


_REGISTRY: dict[str, Callable[[], Backend]] = {
    "mosaic": _mosaic,
    "triton": _triton,
    "xla": _xla,
    "reference": _reference,
}
IMPLEMENTATIONS = tuple(_REGISTRY)
AUTOMATIC = ("triton", "xla")  # tried in this order for implementation=None
# exceptions by major compute capability of the GPU: Triton kernels need Ampere (8), Mosaic kernels Hopper (9)
AUTOMATIC_ON = {7: ("xla",), 9: ("mosaic", "triton", "xla")}
_ON_CUDA = frozenset({"mosaic", "triton"})  # chosen automatically only on NVIDIA GPUs; by name they lower anywhere


def check_name(implementation: str | None) -> None:
    """Raises ValueError if it is neither None nor one of `IMPLEMENTATIONS`."""
    if implementation is not None and not is_one_of(implementation, IMPLEMENTATIONS):
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation={brief(implementation)} is not None or one of {names}.")


def choose(implementation: str | None, problem: Problem, q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct) -> Backend:
    """The backend for a call: the named one, or the first of `automatic()` that supports it.

    Args:
        implementation: One of `IMPLEMENTATIONS`, or None.
        problem: The static part of the call.
        q: Shape [B, A, b1, b2, H, D] and dtype of the query tiles.
        k: Shape [B, C, b1, b2, H, D] and dtype of the key tiles.

    Returns:
        The backend.

    Raises:
        ValueError: If the name is unknown.
        NotImplementedError: If the named backend, or every automatic one, does not support the call; the message says
            why.
    """
    check_name(implementation)
    reasons = []
    for name in automatic() if implementation is None else (implementation,):
        reason = None
        if implementation is None and name in _ON_CUDA and not on_cuda():
            reason = "it needs an NVIDIA GPU, which is not where JAX runs by default."
        if reason is None:
            backend = _REGISTRY[name]()
            reason = backend.supports(problem, q, k)
            if reason is None:
                return backend
        reasons.append(f"implementation={name!r} cannot run this call: {reason}")
    raise NotImplementedError(" ".join(reasons))


def automatic() -> tuple[str, ...]:
    """Backends tried for implementation=None on the default device, in order: of `AUTOMATIC_ON`, else `AUTOMATIC`."""
    capability = cuda_capability()
    return AUTOMATIC if capability is None else AUTOMATIC_ON.get(int(capability), AUTOMATIC)
