"""Causal 3x3x3 convolutions by the kernel for Hopper, where it serves; their gradient is XLA's."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from monarch_jax.devices import on_cuda
from monarchrt.models.broadcasting import along_last

type Implementation = Literal["mosaic", "xla"]


def by_kernel(implementation: Implementation | None, x: Array | jax.ShapeDtypeStruct, kernel: tuple[int, ...]) -> bool:
    """Whether the kernel takes a convolution of [B, T, H, W, C]; if nothing is said, where it is known to be quick."""
    if implementation == "xla" or (implementation is None and not on_cuda()):
        return False
    from monarchrt.pallas_kernels.sm90.convolution import measured, supports

    return supports(x, kernel) is None and (implementation == "mosaic" or measured(kernel))


def norms(implementation: Implementation | None, kernel: tuple[int, ...]) -> bool:
    """Whether the kernel also normalises what it makes, which was not measured yet."""
    from monarchrt.pallas_kernels.sm90.convolution import norms

    return implementation == "mosaic" and norms(kernel)


def causal_convolution(
    past: Float[Array, "B 2 H W C"],
    x: Float[Array, "B T H W C"],
    kernel: Float[Array, "3 3 3 C D"],
    bias: Float[Array, " D"],
    *,
    added: Float[Array, "B T H W D"] | None = None,
    gamma: Float[Array, " D"] | None = None,
) -> Float[Array, "B T H W D"]:
    """Convolves `x` as the continuation of `past`, plus `bias` and `added`, by the kernel; see `convolution`."""
    each = [(past[n], x[n], kernel, bias, None if added is None else added[n], gamma) for n in range(len(x))]
    return jnp.stack([_one(*arguments) for arguments in each])


@jax.custom_vjp
def _one(past: Array, x: Array, kernel: Array, bias: Array, added: Array | None, gamma: Array | None) -> Array:
    from monarchrt.pallas_kernels.sm90.convolution import convolution

    return convolution(past, x, kernel, bias, added, gamma)


def plain(
    past: Array, x: Array, kernel: Array, bias: Array, added: Array | None = None, gamma: Array | None = None
) -> Array:
    """The same as one convolution in three dimensions, [T, H, W, D]."""
    y = lax.conv_general_dilated(
        jnp.concatenate([past, x])[None],
        kernel,
        (1, 1, 1),
        ((0, 0), (1, 1), (1, 1)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )[0]
    y = y + along_last(bias.astype(y.dtype), y)
    y = y if added is None else y + added
    return y if gamma is None else jax.nn.silu(channel_norm(y, gamma))


def channel_norm(x: Float[Array, "*batch C"], gamma: Float[Array, " C"]) -> Float[Array, "*batch C"]:
    """x / |x| over channels, times sqrt(C) and weights; computed in float32 at least, in x's dtype."""
    precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    # |x| is at least 1e-12
    scale = lax.rsqrt(jnp.maximum(jnp.sum(precise**2, axis=-1, keepdims=True), 1e-24))
    return (precise * scale * along_last(gamma.astype(precise.dtype) * x.shape[-1] ** 0.5, x)).astype(x.dtype)


def _forward(*arguments: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
    return _one(*arguments), arguments


def _backward(arguments: tuple[Array | None, ...], gradient: Array) -> tuple[Array | None, ...]:
    pull: Callable[[Array], tuple[Array | None, ...]] = jax.vjp(plain, *arguments)[1]
    return pull(gradient)


_one.defvjp(_forward, _backward)
