"""Causal 3x3x3 convolutions by the kernel for Hopper, where it serves; their gradient is XLA's."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from monarch_jax.devices import on_cuda

type Implementation = Literal["mosaic", "xla"]


def by_kernel(implementation: Implementation | None, x: Array | jax.ShapeDtypeStruct, kernel: tuple[int, ...]) -> bool:
    """Whether the kernel takes a convolution of [B, T, H, W, C]; if nothing is said, on a GPU that it is for."""
    if implementation == "xla" or (implementation is None and not on_cuda()):
        return False
    from monarchrt.pallas_kernels.sm90.convolution import supports

    return supports(x, kernel) is None


def causal_convolution(
    past: Float[Array, "B 2 H W C"],
    x: Float[Array, "B T H W C"],
    kernel: Float[Array, "3 3 3 C D"],
    bias: Float[Array, " D"],
    added: Float[Array, "B T H W D"] | None = None,
) -> Float[Array, "B T H W D"]:
    """Convolves `x` as the continuation of `past`, plus `bias` and `added`, by the kernel."""
    more = () if added is None else (added,)
    return jnp.stack([_one(past[n], x[n], kernel, bias, *(a[n] for a in more)) for n in range(len(x))])


@jax.custom_vjp
def _one(past: Array, x: Array, kernel: Array, bias: Array, *added: Array) -> Array:
    from monarchrt.pallas_kernels.sm90.convolution import convolution

    return convolution(past, x, kernel, bias, *added)


def plain(past: Array, x: Array, kernel: Array, bias: Array, *added: Array) -> Array:
    """The same as one convolution in three dimensions, [T, H, W, D]."""
    y = lax.conv_general_dilated(
        jnp.concatenate([past, x])[None],
        kernel,
        (1, 1, 1),
        ((0, 0), (1, 1), (1, 1)),
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )[0]
    return sum(added, start=y + bias.astype(y.dtype))


def _forward(*arguments: Array) -> tuple[Array, tuple[Array, ...]]:
    return _one(*arguments), arguments


def _backward(arguments: tuple[Array, ...], gradient: Array) -> tuple[Array, ...]:
    pull: Callable[[Array], tuple[Array, ...]] = jax.vjp(plain, *arguments)[1]
    return pull(gradient)


_one.defvjp(_forward, _backward)
