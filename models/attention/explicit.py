"""Kinds of attention on a mesh of explicit axes, where the type of an array says how it is split."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from monarch_jax.partitioning import left_to_the_compiler


def on_explicit_axes(attend: Callable[..., Array], query: Array, key: Array, value: Array, context: Any) -> Array:
    """attend(query, key, value, context), its tokens whole and the rest of the splitting left to the compiler.

    Examples:
        >>> import jax.numpy as jnp
        >>> from monarchrt.models.attention.base import Context
        >>> x = jnp.ones((1, 6, 2, 4))
        >>> on_explicit_axes(lambda q, k, v, context: q * context.step, x, x, x, Context(step=jnp.int32(2))).sum()
        Array(96., dtype=float32)

    Args:
        attend: Gives an array as the query.
        query: [B, N, heads, head_dim].
        key: [B, K, heads, head_dim].
        value: As `key`.
        context: A `Context`; what it knows stays known.

    Returns:
        The array, split as the query.
    """
    numbers = {name: getattr(context, name) for name in ("layer", "step", "block")}
    arrays = {name: x for name, x in numbers.items() if isinstance(x, jax.Array)}
    inputs = None if context.inputs is None else context.inputs()
    graph, state = nnx.split(dict(context.modules))

    def run(query: Array, key: Array, value: Array, given: Any) -> Array:
        arrays, inputs, state = given
        make = None if inputs is None else lambda: inputs
        here = dataclasses.replace(context, **arrays, inputs=make, modules=nnx.merge(graph, state))
        return attend(query, key, value, here)

    return left_to_the_compiler(run, query, key, value, (arrays, inputs, state))
