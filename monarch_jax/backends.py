"""What computes the attention: the ordered registry of backends and what a backend is.

A backend works on tiles and knows nothing of tokens, grids or layouts. Adding one means adding a row to `_REGISTRY`.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from monarch_jax._typing import Array, Float, Int
from monarch_jax.partitioning import forward_anywhere, vjp_anywhere


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The static part of one call, all that a backend may specialise on besides shapes and dtypes.

    Attributes:
        scale: Softmax scale s.
        num_iters: Refinement steps T.
        masked: Whether `visible` may hide any key tile; False promises that every query tile sees all.
        grad_tiles: How many of the last visible key tiles need gradients of k and v (a cache's newest block); the
            gradients of the other tiles are not used and may be left zero. None: all tiles need them.
        keep: Whether the forward pass of a differentiated call may keep alpha, c_L and Y for the backward pass.
    """

    scale: float
    num_iters: int = 1
    masked: bool = False
    grad_tiles: int | None = None
    keep: bool = False


@runtime_checkable
class Attend(Protocol):
    """Computes the attention over tiles; differentiable in q, k and v."""

    def __call__(
        self,
        problem: Problem,
        q: Float[Array, "B A b1 b2 H D"],
        k: Float[Array, "B C b1 b2 H D"],
        v: Float[Array, "B C b1 b2 H D"],
        visible: Int[Array, " A"],
    ) -> Float[Array, "B A b1 b2 H D"]:
        """Query tile a sees the key tiles c < visible[a]."""
        ...


@runtime_checkable
class Supports(Protocol):
    """Says why a backend cannot serve a call, or None when it can."""

    def __call__(self, problem: Problem, q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct) -> str | None:
        """Shapes as in `Attend`, no data."""
        ...


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation: its name, what it cannot do, and the differentiable computation."""

    name: str
    supports: Supports
    attend: Attend


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residuals:
    """What the forward pass (T = 1) keeps for the backward pass; R and L are recomputed.

    Attributes:
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        v: [B, C, b1, b2, H, D].
        visible: int32 [A].
        out: [B, A, b1, b2, H, D].
        lse: [B, A, b1, b2, H], log-sum-exp of the scores of L over all (c, k), in float32 or wider.
        kept: alpha, Y and c_L as the backend lays them out, or None: they are recomputed.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    visible: jax.Array
    out: jax.Array
    lse: jax.Array
    kept: tuple[jax.Array, ...] | None = None


Forward = Callable[..., tuple[jax.Array, jax.Array]]
Vjp = Callable[[Problem, Residuals, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]


def differentiable(forward: Forward, vjp: Vjp, keeping: Callable[..., tuple] | None = None) -> Attend:
    """Joins a forward pass (problem, q, k, v, visible) -> (out, lse) and its vjp into an `Attend`.

    Args:
        forward: Returns out [B, A, b1, b2, H, D] and lse [B, A, b1, b2, H].
        vjp: (problem, residuals, d_out) -> (dq, dk, dv).
        keeping: The forward pass where `problem.keep`, returns out, lse and `Residuals.kept`; None: there is no other.

    Returns:
        The differentiable function.
    """

    def attend(problem, q, k, v, visible):
        return forward(problem, q, k, v, visible)[0]

    def fwd(problem, q, k, v, visible):
        out, lse, *kept = (keeping if problem.keep and keeping else forward)(problem, q, k, v, visible)
        return out, Residuals(q, k, v, visible, out, lse, *kept)

    def bwd(problem, residuals, d_out):
        return *vjp(problem, residuals, d_out), None

    op = jax.custom_vjp(attend, nondiff_argnums=(0,))
    op.defvjp(fwd, bwd)

    def aligned(problem, q, k, v, visible):
        return op(problem, *_vary_alike(q, k, v, visible))

    return aligned


def _vary_alike(*operands: jax.Array) -> list[jax.Array]:
    """Under `shard_map`, what varies over a mesh axis makes all vary: the others' gradients are summed over it."""
    varying = [jax.typeof(x).manual_axis_type.varying for x in operands]
    missing = [tuple(frozenset().union(*varying) - axes) for axes in varying]
    return [lax.pcast(x, axes, to="varying") if axes else x for x, axes in zip(operands, missing, strict=True)]


def _reference() -> Backend:
    from monarch_jax import reference

    return Backend("reference", lambda problem, q, k: None, reference.attend)


def _xla() -> Backend:
    from monarch_jax import xla

    return Backend("xla", lambda problem, q, k: None, xla.attend)


def _triton() -> Backend:
    from monarchrt import triton_kernels

    attend = differentiable(forward_anywhere(triton_kernels.forward), vjp_anywhere(triton_kernels.vjp))
    return Backend("triton", triton_kernels.supports, attend)


def _mosaic() -> Backend:
    from monarchrt import pallas_kernels

    forward, keeping = map(forward_anywhere, (pallas_kernels.forward, pallas_kernels.forward_keeping))
    attend = differentiable(forward, vjp_anywhere(_mosaic_vjp), keeping)
    return Backend("mosaic", pallas_kernels.supports, attend)


def _mosaic_vjp(problem: Problem, residuals: Residuals, d_out: jax.Array):
    """The gradient: the kernels' own, else Triton's where it is installed, else XLA's, all from the same residuals."""
    from monarch_jax import xla
    from monarchrt import pallas_kernels, triton_kernels

    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (residuals.q, residuals.k)]
    if pallas_kernels.supports_vjp(problem, *shapes) is None:
        return pallas_kernels.vjp(problem, residuals, d_out)
    vjp = xla.vjp if triton_kernels.supports(problem, *shapes) else triton_kernels.vjp
    return vjp(problem, residuals, d_out)


_REGISTRY: dict[str, Callable[[], Backend]] = {
    "mosaic": _mosaic,
    "triton": _triton,
    "xla": _xla,
    "reference": _reference,
}
IMPLEMENTATIONS = tuple(_REGISTRY)
AUTOMATIC = ("triton", "xla")  # what None tries, in order
# the same where the GPU's compute capability begins with that number: kernels need Ampere, those of Mosaic Hopper
AUTOMATIC_ON = {7: ("xla",), 9: ("mosaic", "triton", "xla")}
_ON_CUDA = frozenset({"mosaic", "triton"})  # None takes these on NVIDIA GPUs only; by name they lower anywhere


def choose(implementation: str | None, problem: Problem, q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct) -> Backend:
    """The backend for a call: the named one, or the first of `automatic()` that can serve it.

    Args:
        implementation: One of `IMPLEMENTATIONS`, or None.
        problem: The call.
        q: Query tiles, shape and dtype.
        k: Key tiles, shape and dtype.

    Returns:
        The backend.

    Raises:
        ValueError: If the name is unknown.
        NotImplementedError: If the named backend, or none of the automatic ones, can serve the call; says why.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(map(repr, IMPLEMENTATIONS))
        raise ValueError(f"implementation={implementation!r} is not None or one of {names}.")
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
    """What None tries, in order, where JAX runs by default: `AUTOMATIC`, or the GPU's entry in `AUTOMATIC_ON`."""
    capability = _cuda_capability()
    return AUTOMATIC if capability is None else AUTOMATIC_ON.get(int(capability), AUTOMATIC)


def on_cuda(*, capability: int | float = 0) -> bool:
    """Whether JAX runs on an NVIDIA GPU by default (`jax.default_device` counts), of at least a compute capability."""
    found = _cuda_capability()
    return found is not None and found >= capability


def _cuda_capability() -> float | None:
    """Compute capability of the NVIDIA GPU that JAX runs on by default, None where it runs on something else."""
    chosen = jax.config.jax_default_device
    platform = getattr(chosen, "platform", chosen) or jax.default_backend()
    if platform not in ("gpu", "cuda"):
        return None
    device = jax.devices(platform)[0] if chosen is None or isinstance(chosen, str) else chosen
    return float(device.compute_capability) if "cuda" in device.client.platform_version.lower() else None


def accumulator_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Softmaxes and sums are in float32, or wider when the inputs are."""
    return jnp.promote_types(dtype, jnp.float32)
