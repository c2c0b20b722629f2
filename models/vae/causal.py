"""Causal 3x3x3 convolutions and the norms between them, by kernels where supported, with gradients by XLA."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float

from monarch_jax.devices import cuda_capability, on_cuda
from monarchrt.models.broadcasting import along_last

type Implementation = Literal["mosaic", "xla"]


def by_kernel(implementation: Implementation | None, x: Array | jax.ShapeDtypeStruct, kernel: tuple[int, ...]) -> bool:
    """Whether the kernel computes a convolution of `x` [B, T, H, W, C]; for None, only where it was measured faster."""
    if implementation == "xla" or (implementation is None and not on_cuda()):
        return False
    from monarchrt.pallas_kernels.sm90.convolution import measured, supports

    return supports(x, kernel) is None and (implementation == "mosaic" or measured(kernel))


def norms(implementation: Implementation | None, x: Array | jax.ShapeDtypeStruct, kernel: tuple[int, ...]) -> bool:
    """Whether the kernel also normalises its output."""
    from monarchrt.pallas_kernels.sm90.convolution import norms

    return norms(kernel) and by_kernel(implementation, x, kernel)


def causal_convolution(
    past: Float[Array, "B 2 H W C"] | None,
    x: Float[Array, "B T H W C"],
    kernel: Float[Array, "times 3 3 C D"],
    bias: Float[Array, " D"],
    *,
    added: Float[Array, "B T H W D"] | None = None,
    gamma: Float[Array, " D"] | None = None,
    both: bool = False,
) -> tuple[Float[Array, "B T H W D"], ...]:
    """Convolves frames as the continuation of a past, by the kernel.

    Args:
        past: The two frames before the first; None for a kernel with one step in time.
        x: Frames.
        kernel: Weights, with three steps in time or one.
        bias: Biases.
        added: Frames to add to the result.
        gamma: Weights of a norm to apply to the result, with SiLU; None: no norm.
        both: Whether to return the result before the norm, too.

    Returns:
        The result; with `both`, the result before and after the norm.
    """
    parts = [[None if y is None else y[n] for y in (past, x, added)] for n in range(len(x))]
    each = [_one(before, frames, kernel, bias, more, gamma, both) for before, frames, more in parts]
    return tuple(map(jnp.stack, zip(*each, strict=True)))


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _one(
    past: Array | None, x: Array, kernel: Array, bias: Array, added: Array | None, gamma: Array | None, both: bool
) -> tuple[Array, ...]:
    from monarchrt.pallas_kernels.sm90.convolution import convolution

    return convolution(past, x, kernel, bias, added, gamma, both=both)


def plain(
    past: Array | None,
    x: Array,
    kernel: Array,
    bias: Array,
    added: Array | None = None,
    gamma: Array | None = None,
    *,
    both: bool = False,
) -> tuple[Array, ...]:
    """The definition of `_one`, a 3-D convolution [T, H, W, D] in XLA.

    Args:
        past: The two frames before the first, [2, H, W, D]; None for a kernel with one step in time.
        x: Frames, [T, H, W, D].
        kernel: Weights, [3 or 1, 3, 3, D, D_out].
        bias: [D_out].
        added: Frames to add to the result; None: none.
        gamma: Weights of a norm to apply to the result, with SiLU; None: no norm.
        both: Whether to return the result before the norm, too.

    Returns:
        The result; with `both`, the result before and after the norm.
    """
    y = lax.conv_general_dilated(
        (x if past is None else jnp.concatenate([past, x]))[None],
        kernel,
        (1, 1, 1),
        ((0, 0), (1, 1), (1, 1)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )[0]
    y = y + along_last(bias.astype(y.dtype), y)
    y = y if added is None else y + added
    if gamma is None:
        return (y,)
    normed = silu(channel_norm(y, gamma))
    return (y, normed) if both else (normed,)


def channel_norm(x: Float[Array, "*batch C"], gamma: Float[Array, " C"]) -> Float[Array, "*batch C"]:
    """x / |x| over channels, times sqrt(C) and weights; computed in float32 or wider, returned in the dtype of `x`."""
    precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # |x| is at least 1e-12
    scale = lax.rsqrt(jnp.maximum(jnp.sum(precise**2, axis=-1, keepdims=True), 1e-24))
    return (precise * scale * along_last(gamma.astype(precise.dtype) * x.shape[-1] ** 0.5, x)).astype(x.dtype)


def silu(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """x / (1 + exp(-x)), computed in float32 or wider to avoid rounding each step, in the dtype of `x`."""
    return jax.nn.silu(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


def norm_by_kernel(implementation: Implementation | None, x: Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a kernel computes norm and SiLU of pixels [..., C], which are two passes in XLA; on Hopper."""
    if implementation == "xla" or int(cuda_capability() or 0) != 9:
        return False
    from monarchrt.triton_kernels.pixel_passes import supports

    return supports(x) is None


@jax.custom_vjp
def norm_silu(x: Float[Array, "*batch C"], gamma: Float[Array, " C"]) -> Float[Array, "*batch C"]:
    """`silu` of `channel_norm`, by the kernel."""
    from monarchrt.triton_kernels.pixel_passes import channel_norm as kernel

    return sequential_vmap(kernel)(x, gamma)


def plain_norm_silu(x: Float[Array, "*batch C"], gamma: Float[Array, " C"]) -> Float[Array, "*batch C"]:
    """The definition of `norm_silu`, in XLA."""
    return silu(channel_norm(x, gamma))


@jax.custom_vjp
def normed_taps(
    past: Float[Array, "B 2 H W C"], x: Float[Array, "B T H W C"], gamma: Float[Array, " C"]
) -> tuple[Float[Array, "B T H W CCC"], Float[Array, "B 2 H W C"]]:
    """Norm and SiLU of frames, with the two normalised frames before each concatenated to its channels, by the kernel.

    Args:
        past: The two normalised frames before the first.
        x: Frames.
        gamma: Weights of the norm.

    Returns:
        [B, T, H, W, 3 C], the input of a convolution with three steps in time as one over frames; and the new past.
    """
    from monarchrt.triton_kernels.pixel_passes import normed_taps as kernel

    return sequential_vmap(kernel)(past, x, gamma)


def plain_normed_taps(
    past: Float[Array, "B 2 H W C"], x: Float[Array, "B T H W C"], gamma: Float[Array, " C"]
) -> tuple[Float[Array, "B T H W CCC"], Float[Array, "B 2 H W C"]]:
    """The definition of `normed_taps`, in XLA."""
    joined = jnp.concatenate([past, plain_norm_silu(x, gamma)], axis=1)
    return jnp.concatenate([joined[:, k : k + x.shape[1]] for k in range(3)], axis=-1), joined[:, -2:]


@jax.custom_vjp
def doubled_norm_silu(
    y: Float[Array, "N h w abC"], gamma: Float[Array, " C"]
) -> tuple[Float[Array, "N H W C"], Float[Array, "N H W C"]]:
    """`doubled(y)`, and its norm and SiLU, by the kernel."""
    from monarchrt.triton_kernels.pixel_passes import doubled_norm as kernel

    return sequential_vmap(kernel)(y, gamma)


def plain_doubled_norm_silu(
    y: Float[Array, "N h w abC"], gamma: Float[Array, " C"]
) -> tuple[Float[Array, "N H W C"], Float[Array, "N H W C"]]:
    """The definition of `doubled_norm_silu`, in XLA."""
    x = doubled(y)
    return x, plain_norm_silu(x, gamma)


def doubled(y: Float[Array, "N h w abC"]) -> Float[Array, "N H W C"]:
    """Interleaves pixels to twice the size: pixel (2h + a, 2w + b) is number (a, b) of the four at (h + a, w + b)."""
    y = rearrange(y, "n h w (a b d) -> n h w a b d", a=2, b=2)
    height, width = y.shape[1] - 1, y.shape[2] - 1
    each = [[y[:, a : a + height, b : b + width, a, b] for b in range(2)] for a in range(2)]
    y = jnp.stack([jnp.stack(row, axis=3) for row in each], axis=2)  # [n, h, 2, w, 2, d]
    return rearrange(y, "n h a w e d -> n (h a) (w e) d")


def _by_xla(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of a kernel's function: XLA's gradients of its definition."""

    def pull(arguments: tuple[Array, ...], gradients: Any) -> tuple[Array, ...]:
        return jax.vjp(plain, *arguments)[1](gradients)

    return pull


norm_silu.defvjp(lambda *x: (norm_silu(*x), x), _by_xla(plain_norm_silu))
normed_taps.defvjp(lambda *x: (normed_taps(*x), x), _by_xla(plain_normed_taps))
doubled_norm_silu.defvjp(lambda *x: (doubled_norm_silu(*x), x), _by_xla(plain_doubled_norm_silu))


def _forward(*arguments: Any) -> tuple[tuple[Array, ...], tuple[Array | None, ...]]:
    return _one(*arguments), arguments[:6]


def _backward(both: bool, arguments: tuple[Array | None, ...], gradients: Any) -> tuple[Array | None, ...]:
    pull: Callable[[Any], tuple[Array | None, ...]] = jax.vjp(partial(plain, both=both), *arguments)[1]
    return pull(gradients)


_one.defvjp(_forward, _backward)
