"""Kinds of attention on meshes with explicit axes, where sharding is part of the type of an array."""

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
    """Calls attend(*tokens, *rest, context) in auto mode, with whole tokens (see `partitioning.left_to_the_compiler`).

    Examples:
        >>> import jax.numpy as jnp
        >>> from monarchrt.models.attention.base import Context
        >>> x = jnp.ones((1, 6, 2, 4))
        >>> on_explicit_axes(lambda q, k, v, context: q * context.step, (x, x, x), Context(step=jnp.int32(2))).sum()
        Array(96., dtype=float32)

    Args:
        attend: Returns an array like the queries.
        tokens: [B, N, heads, head_dim] each, the queries first.
        context: A `Context`; its static values stay static.
        rest: Trees of arrays.

    Returns:
        The result, split like the queries.
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
    """Adds to a kind's `attend_cache` the common checks, and support for meshes with explicit axes.

    Args:
        attend_cache: (kind, cache, query, *, layer, context) -> an array like the query.
        no_context: Default context.

    Returns:
        The method; on explicit axes its result is split like the query.
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
            if isinstance(cache, MonarchKVCache):  # keeps `_newest`, which is not part of the pytree
                whole = cache.of_arrays(whole.key, whole.value, whole.length)
            return attend_cache(self, whole, query, layer=layers[0] if layers else layer, context=context)

        layer, context = where.get("layer"), where.get("context", no_context)
        layers = [layer] if isinstance(layer, jax.Array) else []  # a static index stays static
        return on_explicit_axes(attend, (on_mesh_of(query, example),), context, parts, layers)

    return run
