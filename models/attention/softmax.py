"""Softmax attention of all queries to all keys, by cuDNN if it supports the call."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from monarch_jax.devices import on_cuda
from monarchrt.models.sharding import BY_HEADS, on_each_device

IMPLEMENTATIONS = ("xla", "cudnn")
BLOCKS = 132  # pairs of a block of keys and a head that occupy a Hopper GPU, one for each multiprocessor
KEYS, QUERIES = 64, 1024  # keys of a block; least number of queries of a group
type Attend = Callable[..., Array]


def softmax_attention(
    query: Float[Array, "B Q n d"],
    key: Float[Array, "B K n d"],
    value: Float[Array, "B K n d"],
    *,
    valid_keys: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Q n d"]:
    """Softmax attention without a mask, with scale d^-1/2 and a float32 softmax.

    On a mesh each device attends for its part of the batch and its heads, since cuDNN supports no other splits. Without
    an NVIDIA GPU float16 is computed in float32: XLA has no products of float16 with float32 sums for CPUs.

    Examples:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> softmax_attention(x, x, x).shape
        (1, 8, 2, 4)

    Args:
        query: [B, queries, heads, head_dim].
        key: [B, keys, heads, head_dim].
        value: As `key`.
        valid_keys: Number of leading keys that are seen, an int32 scalar that may be traced; None: all.
        implementation: "xla", "cudnn", or None: cuDNN for half precision on an NVIDIA GPU from Ampere on, else XLA.

    Returns:
        [B, queries, heads, head_dim].

    Raises:
        ValueError: If cuDNN is requested and does not support the dtype or the head size.
    """
    cudnn_can = query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    if implementation is None:
        implementation = "cudnn" if cudnn_can and on_cuda(capability=8) else "xla"
    if implementation == "cudnn" and not cudnn_can:
        raise ValueError(
            f"implementation='cudnn' needs bfloat16 or float16 and a head size that is a multiple of 8 up to 128, got "
            f"{query.dtype} and {query.shape[-1]}; use implementation='xla' or dtype='bfloat16'."
        )
    lengths = None if valid_keys is None else jnp.full(query.shape[:1], valid_keys, jnp.int32)

    def attend(_: None, query: Array, key: Array, value: Array, lengths: Array | None) -> Array:
        run: Attend = partial(jax.nn.dot_product_attention, implementation=implementation)  # type: ignore[arg-type]
        if query.dtype == jnp.float16 and not on_cuda():
            run = _in_float32(run)
        if lengths is not None:
            return run(query, key, value, key_value_seq_lengths=lengths)
        groups = query_groups(query.shape, key.shape[1]) if implementation == "cudnn" else 1
        return run(query, key, value) if groups == 1 else _by_groups(run, groups)(query, key, value)

    return on_each_device(attend, None, (query, key, value, lengths), (*(BY_HEADS,) * 3, BY_HEADS[:1]))


def _in_float32(attend: Attend) -> Attend:
    def run(*arrays: Array, **options: Any) -> Array:
        return attend(*(x.astype(jnp.float32) for x in arrays), **options).astype(arrays[0].dtype)

    return run


def query_groups(shape: tuple[int, ...], keys: int) -> int:
    """Number of groups of queries for cuDNN's gradient, which parallelises over blocks of keys: a text has few.

    Examples:
        >>> query_groups((1, 32760, 12, 128), 512), query_groups((1, 32760, 12, 128), 32760)
        (2, 1)
    """
    batch, queries, heads, _ = shape
    blocks = batch * heads * -(-keys // KEYS)
    fitting = [n for n in range(1, queries // QUERIES + 1) if queries % n == 0] or [1]
    return next((n for n in fitting if n * blocks >= BLOCKS), fitting[-1])


def _by_groups(attend: Attend, groups: int) -> Attend:
    """`attend` with a gradient that is computed for groups of queries in parallel and summed for keys and values."""

    def repeated(x: Array) -> Array:
        return jnp.repeat(x, groups, axis=0)

    def forward(query: Array, key: Array, value: Array) -> tuple[Array, Any]:
        batch, queries, *rest = query.shape
        split = query.reshape(batch * groups, queries // groups, *rest)
        out, back = jax.vjp(attend, split, repeated(key), repeated(value))
        return out.reshape(query.shape), back

    def backward(back: Any, gradient: Array) -> tuple[Array, ...]:
        batch, queries, *rest = gradient.shape
        query, *others = back(gradient.reshape(batch * groups, queries // groups, *rest))
        key, value = (x.reshape(batch, groups, *x.shape[1:]).sum(1, dtype=jnp.float32).astype(x.dtype) for x in others)
        return query.reshape(gradient.shape), key, value

    op = jax.custom_vjp(lambda *x: attend(*x))
    op.defvjp(forward, backward)
    return op
