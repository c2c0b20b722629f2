"""Kernels anywhere in a program: under vmap, and on arrays whose batch or heads are split over devices.

The compiler cannot look into a kernel: it would gather split operands on every device and run the whole problem on
each. Here it is told which axes are independent.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, use_abstract_mesh

# The axes of an array, a letter each. b: batch and h: heads, independent of each other and of all else. p: batch times
# heads, of what only a kernel reads; a digit is an axis like no other. Every array but `visible` begins with b or p.
Axes = str
QUERIES, KEYS, ROWS, VISIBLE = "baijhd", "bcijhd", "baijh", "a"


def forward_anywhere(forward: Callable[..., tuple]) -> Callable[..., tuple]:
    """A backend's forward pass, of (problem, q, k, v, visible), with rules for vmap and for split operands."""

    def run(problem, q, k, v, visible):
        arrays = (q, k, v, visible)
        kept, structure = (), None
        if problem.keep:
            structs = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
            shapes, structure = jax.tree.flatten(jax.eval_shape(functools.partial(forward, problem), *structs))
            kept = tuple(map(_kept, shapes[2:]))
        fn = _flat(functools.partial(forward, problem))
        found = _anywhere(fn, (QUERIES, KEYS, KEYS, VISIBLE), (QUERIES, ROWS, *kept))(*arrays)
        return found if structure is None else jax.tree.unflatten(structure, found)

    return run


def vjp_anywhere(vjp: Callable[..., tuple]) -> Callable[..., tuple]:
    """A backend's vjp, of (problem, residuals, d_out), with rules for vmap and for split operands."""

    def run(problem, residuals, d_out):
        r = residuals
        kept, structure = jax.tree.flatten(r.kept)

        def fn(q, k, v, out, lse, d_out, *rest):
            *kept, visible = rest
            return vjp(problem, type(r)(q, k, v, visible, out, lse, jax.tree.unflatten(structure, kept)), d_out)

        axes = (QUERIES, KEYS, KEYS, QUERIES, ROWS, QUERIES, *map(_kept, kept), VISIBLE)
        return _anywhere(fn, axes, (QUERIES, KEYS, KEYS))(r.q, r.k, r.v, r.out, r.lse, d_out, *kept, r.visible)

    return run


def _flat(fn: Callable[..., Any]) -> Callable[..., tuple[jax.Array, ...]]:
    return lambda *arrays: tuple(jax.tree.leaves(fn(*arrays)))


def _kept(x) -> Axes:
    return "p" + "1" * (x.ndim - 1)


def _anywhere(fn: Callable[..., tuple], inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> Callable[..., tuple]:
    """`fn` of arrays, the last of them `visible`; under vmap the mapped axis joins the batch."""
    mapped = jax.custom_batching.custom_vmap(_implicit(_split(fn, inputs, outputs), outputs))

    @mapped.def_vmap
    def rule(size, in_batched, *args):
        spread = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(args, in_batched, strict=True)]
        if in_batched[-1]:  # a mapped `visible` has no place in the kernels: one example after the other
            found = jax.lax.map(lambda xs: mapped(*xs), tuple(spread))
        else:
            found = mapped(*(x.reshape(-1, *x.shape[2:]) for x in spread[:-1]), args[-1])
            found = tuple(x.reshape(size, -1, *x.shape[1:]) for x in found)
        return found, (True,) * len(outputs)

    return mapped


def _implicit(fn: Callable[..., tuple], outputs: tuple[Axes, ...]) -> Callable[..., tuple]:
    """`fn` where types say how arrays are split (a mesh with explicit axes): they say it again of the results."""

    def run(*arrays):
        queries = jax.typeof(arrays[0]).sharding
        explicit = queries.mesh.explicit_axes
        if not explicit:
            return fn(*arrays)
        implicit = jax.sharding.auto_axes(fn, axes=explicit, out_sharding=_shardings(queries, outputs))
        return cast(Callable[..., tuple], implicit)(*arrays)

    return run


def _split(fn: Callable[..., tuple], inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> Callable[..., tuple]:
    """`fn` on every device's part of the batch and the heads; what is split along another axis is gathered."""

    def run(*arrays):
        program = jax.make_jaxpr(fn)(*arrays)  # its constants become operands, as `custom_partitioning` takes none
        operands = (*inputs, *("1" * np.ndim(x) for x in program.consts))
        rule, whole = sharding_rule(operands, outputs)

        def partition(mesh, arg_shapes, result_shape):
            args, results = (tuple(x.sharding for x in shapes) for shapes in (arg_shapes, result_shape))
            if isinstance(queries := args[0], NamedSharding):
                heads = "h" not in whole
                args, results = (_shardings(queries, arrays, heads=heads) for arrays in (operands, outputs))
            return mesh, on_a_device, results, args

        def on_a_device(*parts):
            with use_abstract_mesh(AbstractMesh((), ())):
                return fn(*parts[: len(inputs)])

        @custom_partitioning
        def split(*values):
            arrays, constants = values[: len(inputs)], values[len(inputs) :]
            return tuple(jaxpr_as_fun(ClosedJaxpr(program.jaxpr, constants))(*arrays))

        split.def_partition(partition, sharding_rule=rule, need_replication_factors=whole)
        return split(*arrays, *program.consts)

    return run


def _shardings(queries: NamedSharding, arrays: tuple[Axes, ...], *, heads: bool = True) -> tuple[NamedSharding, ...]:
    """Of each array, split as the queries are along the batch and, unless told not to, the heads."""
    found = dict(zip(QUERIES, (*queries.spec, *(None,) * len(QUERIES)), strict=False))
    names = {"b": found["b"], "p": found["b"], "h": found["h"] if heads else None}
    return tuple(NamedSharding(queries.mesh, PartitionSpec(*map(names.get, axes))) for axes in arrays)


def sharding_rule(inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> tuple[str, tuple[str, ...]]:
    """The rule in the compiler's notation, and the factors in it that must not be split.

    Along a product of batch and heads only the batch may be: parts along both would not lie side by side.

    Example:
        >>> sharding_rule(("bad", "bch", "a"), ("bah",))
        ('b a d, b c h, a -> b a h', ('a', 'd', 'c'))
        >>> sharding_rule(("bah", "p1"), ("p1",))
        ('b a h, (b h) x1 -> (b h) x2', ('a', 'h', 'x1', 'x2'))
    """
    numbers = itertools.count(1)
    whole: dict[str, None] = {}
    free = "b" if any(axes[0] == "p" for axes in inputs + outputs) else "bh"

    def factor(axis: str) -> str:
        name = "(b h)" if axis == "p" else f"x{next(numbers)}" if axis.isdigit() else axis
        if axis != "p" and axis not in free:
            whole[name] = None
        return name

    sides = [", ".join(" ".join(map(factor, axes)) for axes in arrays) for arrays in (inputs, outputs)]
    return " -> ".join(sides), tuple(whole)
