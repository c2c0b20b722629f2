"""Kinds of attention on a mesh of explicit axes, where the type of an array says how it is split."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from monarch_jax import MonarchKVCache
from monarch_jax.checks import array
from monarch_jax.partitioning import left_to_the_compiler, on_mesh_of


def on_explicit_axes(attend: Callable[..., Array], tokens: Sequence[Array], context: Any, *rest: Any) -> Array:
    """attend(*tokens, *rest, context), its tokens whole and the rest of the splitting left to the compiler.

    Examples:
        >>> import jax.numpy as jnp
        >>> from monarchrt.models.attention.base import Context
        >>> x = jnp.ones((1, 6, 2, 4))
        >>> on_explicit_axes(lambda q, k, v, context: q * context.step, (x, x, x), Context(step=jnp.int32(2))).sum()
        Array(96., dtype=float32)

    Args:
        attend: Gives an array as the queries.
        tokens: [B, N, heads, head_dim] each, the queries first.
        context: A `Context`; what it knows stays known.
        rest: Trees of arrays.

    Returns:
        The array, split as the queries.
    """
    numbers = {name: getattr(context, name) for name in ("layer", "step", "block")}
    arrays = {name: x for name, x in numbers.items() if isinstance(x, jax.Array)}
    inputs = None if context.inputs is None else context.inputs()
    graph, state = nnx.split(dict(context.modules))

    def run(*given: Any) -> Array:
        *parts, arrays, inputs, state = given
        make = None if inputs is None else lambda: inputs
        here = dataclasses.replace(context, **arrays, inputs=make, modules=nnx.merge(graph, state))
        return attend(*parts, here)

    return left_to_the_compiler(run, tokens, *rest, arrays, inputs, state)


def over_any_cache(attend_cache: Callable[..., Array], *, no_context: Any) -> Callable[..., Array]:
    """A kind's `attend_cache` with what all check first, also for arrays whose types say how they are split.

    Args:
        attend_cache: (kind, cache, query, *, layer, context) -> an array as the query.
        no_context: The context where none is given.

    Returns:
        The same; on explicit axes the array is split as the query.
    """

    @functools.wraps(attend_cache)
    def run(self: Any, cache: Any, query: Any, **where: Any) -> Array:
        query = array("query", query)
        if isinstance(cache, MonarchKVCache):
            cache.check_query(query, layer=where.get("layer"))
        parts, structure = jax.tree.flatten(cache)
        example = next((x for x in (query, *parts) if jax.typeof(x).sharding.mesh.explicit_axes), None)
        if example is None:
            return attend_cache(self, cache, query, **where)

        def attend(query: Array, parts: Any, layers: list[Array], context: Any) -> Array:
            whole = jax.tree.unflatten(structure, parts)
            if isinstance(cache, MonarchKVCache):  # with what only the writer of the newest block knows
                whole = cache.of_arrays(whole.key, whole.value, whole.length)
            return attend_cache(self, whole, query, layer=layers[0] if layers else layer, context=context)

        layer, context = where.get("layer"), where.get("context", no_context)
        layers = [layer] if isinstance(layer, jax.Array) else []  # what is known stays known
        return on_explicit_axes(attend, (on_mesh_of(query, example),), context, parts, layers)

    return run
