"""A loop over layers that writes residuals directly into arrays stacked over layers."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

from monarchrt.models.switch import Switch
from monarchrt.models.wan.kept import in_stacks

STACKED = "cheap"  # the value of `remat` that it supports
# on for networks that use `through_stacks`, in programs compiled with `training_options(stacks=True)`: without these
# options, readers of the stacks would copy slices out of them
stacks_written = Switch("stacks_written")


class Place(NamedTuple):
    """The array in which the backward pass finds a residual."""

    source: str  # "stacks", "layers", "constants", "own" (a constant of the program) or "value"
    at: Any


class Program(NamedTuple):
    """The forward pass of a layer and its residuals."""

    closed: ClosedJaxpr  # (x, layer, constants, numbers) -> (x, residuals)
    structure: Any  # tree structure of the residuals, which is a function of the gradient
    places: tuple[Place, ...]
    shapes: tuple[Any, ...]  # shapes of the residuals
    rows: tuple[int, ...]  # index of the residual in each stack; -1, in the last stack, stands for x
    written: frozenset[int]  # those of these that the rest of the forward pass reads from the stack


def through_stacks(body: Callable[[Any, Any], tuple[Any, None]], x: jax.Array, stacked: Any) -> jax.Array:
    """Computes `jax.lax.scan(body, x, stacked)[0]` and writes residuals directly into stacks.

    A scan computes the residuals of a layer and copies them into the stack of all layers. XLA can let products and
    kernels write there directly, but then computes them a second time for their other readers; here these read the
    stack. Gradients are those of the body's `jax.vjp`, one layer at a time. Forward mode (`jax.jvp`) is not supported.

    Args:
        body: (x, layer) -> (x, None), recomputed in the backward pass according to its `jax.checkpoint`.
        x: Initial carry, the residual stream.
        stacked: A tree of arrays with a leading axis of layers.

    Returns:
        The carry after the last layer.
    """
    leaves, tree = jax.tree.flatten(stacked)
    layers = _Leaves(tree, tuple(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves))

    def one(x: Any, learned: Sequence[Any], fixed: Sequence[Any]) -> Any:
        with in_stacks():
            return body(x, layers.join(learned, fixed))[0]

    first = layers.split([leaf[0] for leaf in leaves])
    run, constants, numbers = _closed_over(one, x, *first)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (x, *first, constants, numbers))
    return _Loop(run, shapes, length=leaves[0].shape[0])(x, *layers.split(leaves), constants, numbers)


class _Leaves(NamedTuple):
    """The arrays of a layer: which of them have gradients."""

    tree: Any  # tree structure of a layer
    trained: tuple[bool, ...]

    def split(self, leaves: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """Those with gradients, and the others."""
        pairs = list(zip(leaves, self.trained, strict=True))
        return [leaf for leaf, own in pairs if own], [leaf for leaf, own in pairs if not own]

    def join(self, learned: Sequence[Any], fixed: Sequence[Any]) -> Any:
        """The layer that consists of them."""
        sources = {True: iter(learned), False: iter(fixed)}
        return jax.tree.unflatten(self.tree, [next(sources[own]) for own in self.trained])


class _Loop:
    """A loop over layers with a gradient of its own, which finds the residuals in stacks.

    Its arguments are the carry; the layers' arrays with gradients and without, each with a leading axis of layers; and
    the values that the layers have in common, with gradients (constants) and without (numbers).
    """

    def __init__(self, layer: Callable[..., Any], shapes: tuple[Any, ...], *, length: int):
        """`layer` computes one layer from such arguments, whose `shapes` are without the axis of layers."""
        self._layer, self._shapes, self._length = layer, shapes, length

    def __call__(self, *inputs: Any) -> Any:
        loop = jax.custom_vjp(self._scan)
        loop.defvjp(self._forward, self._backward)
        return loop(*inputs)

    @functools.cached_property
    def _program(self) -> Program:
        """A layer's forward pass, traced when a gradient is first asked for."""
        _, learned, fixed, *_ = self._shapes
        closed, (_, back) = jax.make_jaxpr(self._with_gradient, return_shape=True)(*self._shapes)
        return _planned(closed, jax.tree.structure(back), len(learned) + len(fixed))

    def _with_gradient(self, x: Any, learned: Any, fixed: Any, constants: Any, numbers: Any) -> tuple[Any, Any]:
        """A layer's output, and its gradient as a function, whose leaves are the residuals."""
        return jax.vjp(lambda x, layer, more: self._layer(x, layer, fixed, more, numbers), x, learned, constants)

    def _scan(self, x: Any, learned: Any, fixed: Any, constants: Any, numbers: Any) -> Any:
        """The loop where no gradient is asked for."""
        return jax.lax.scan(lambda x, own: (self._layer(x, *own, constants, numbers), None), x, (learned, fixed))[0]

    def _forward(self, x: Any, learned: Any, fixed: Any, constants: Any, numbers: Any) -> tuple[Any, tuple[Any, ...]]:
        """The loop that writes the stacks, and what the backward pass needs."""
        plan = self._program
        shapes = [plan.shapes[row] for row in plan.rows[:-1]] + [x]
        stacks = [jax.lax.empty((self._length, *_rows(shape.shape)), shape.dtype) for shape in shapes]

        def turn(number: Any, carry: Any) -> tuple[jax.Array, list[jax.Array]]:
            x, stacks = carry
            layer = [_at(leaf, number) for leaf in (*learned, *fixed)]
            return _turn(plan, number, (x, *layer, *constants, *numbers), list(stacks))

        x, stacks = jax.lax.fori_loop(0, self._length, turn, (x, stacks))
        return x, (stacks, learned, fixed, constants, numbers)

    def _backward(self, kept: tuple[Any, ...], gradient: Any) -> tuple[Any, ...]:
        """Gradients of the loop's arguments, from the last layer to the first."""
        stacks, learned, fixed, constants, numbers = kept
        plan = self._program

        def turn(carry: Any, number: Any) -> tuple[Any, Any]:
            gradient, sums = carry
            values = _residuals(plan, number, stacks, (*learned, *fixed), (*constants, *numbers))
            gradient, layer, more = jax.tree.unflatten(plan.structure, values)(gradient)
            return (gradient, jax.tree.map(jnp.add, sums, more)), layer

        zeros = jax.tree.map(jnp.zeros_like, constants)
        (gradient, sums), layers = jax.lax.scan(turn, (gradient, zeros), jnp.arange(self._length), reverse=True)
        return gradient, layers, None, sums, None


def _closed_over(run: Callable[..., Any], *arguments: Any) -> tuple[Callable[..., Any], list[Any], list[Any]]:
    """Turns the traced values that `run` closes over into arguments: a new function, values with gradients, and others.

    `jax.closure_convert` leaves the values without gradients, such as steps and masks, in the closure, and gradients of
    the loop under `jax.jit`, a scan, `jax.checkpoint` or `jax.vmap` then fail with leaked tracers.
    """
    closed = jax.make_jaxpr(run)(*arguments)
    traced = [at for at, value in enumerate(closed.consts) if isinstance(value, Tracer)]
    learned = [at for at in traced if jnp.issubdtype(closed.consts[at].dtype, jnp.inexact)]
    fixed = [at for at in traced if at not in learned]

    def converted(x: Any, layer: Any, more: Any, constants: Sequence[Any], numbers: Sequence[Any]) -> Any:
        given = dict(zip((*learned, *fixed), (*constants, *numbers), strict=True))
        values = [given.get(at, value) for at, value in enumerate(closed.consts)]
        return jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, values))(*jax.tree.leaves((x, layer, more)))[0]

    return converted, [closed.consts[at] for at in learned], [closed.consts[at] for at in fixed]


def _planned(closed: ClosedJaxpr, structure: Any, leaves: int) -> Program:
    """Finds the source of each residual, and gives each distinct one a single stack."""
    jaxpr = closed.jaxpr
    inputs = {var: number for number, var in enumerate(jaxpr.invars)}
    own = {var: number for number, var in enumerate(jaxpr.constvars)}
    made = {var: eqn for eqn in jaxpr.eqns for var in eqn.outvars}
    rows: dict[Any, int] = {}
    written, places = set(), []
    for number, var in enumerate(jaxpr.outvars[1:]):
        if isinstance(var, Literal):
            places.append(Place("value", var.val))
        elif var in own:
            places.append(Place("own", own[var]))
        elif (at := inputs.get(var)) is not None:
            own_layer = Place("layers", at - 1) if at <= leaves else Place("constants", at - 1 - leaves)
            places.append(own_layer if at else Place("stacks", -1))
        else:
            if rows.setdefault(var, number) == number and not _summed(var, made):
                written.add(number)
            places.append(Place("stacks", list(rows).index(var)))
    shapes = tuple(jax.eval_shape(jaxpr_as_fun(closed), *closed.in_avals)[1:])
    return Program(closed, structure, tuple(places), shapes, (*rows.values(), -1), frozenset(written))


def _summed(var: Any, made: dict[Any, Any]) -> bool:
    """Whether a value is a sum, as of a product and a bias, which no product or kernel can write directly."""
    while (eqn := made.get(var)) is not None and eqn.primitive.name in ("reduce_precision", "name"):
        var = eqn.invars[0]
    return eqn is not None and eqn.primitive.name == "add"


def _turn(
    plan: Program, number: jax.Array, inputs: Sequence[Any], stacks: list[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    """Evaluates the forward pass of a layer and writes its residuals into the stacks."""
    jaxpr = plan.closed.jaxpr
    outvars = jaxpr.outvars[1:]
    stack_of = {outvars[row]: at for at, row in enumerate(plan.rows[:-1])}
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*plan.closed.consts, *inputs), strict=True))

    def read(var):
        return var.val if isinstance(var, Literal) else values[var]

    def write(at, value):
        stacks[at] = jax.lax.dynamic_update_index_in_dim(
            stacks[at], value.reshape(_rows(value.shape)), number, 0, allow_negative_indices=False
        )

    write(-1, inputs[0])
    for eqn in jaxpr.eqns:
        one = jaxpr.replace(constvars=(), invars=[*filter(_is_var, eqn.invars)], outvars=eqn.outvars, eqns=[eqn])
        results = jaxpr_as_fun(ClosedJaxpr(one, ()))(*map(read, one.invars))
        for var, value in zip(eqn.outvars, results, strict=True):
            if (at := stack_of.get(var)) is not None:
                write(at, value)
                if plan.rows[at] in plan.written:  # behind a barrier: otherwise XLA would read the value, not the stack
                    value = _at(jax.lax.optimization_barrier(stacks[at]), number).reshape(value.shape)
            values[var] = value
    return read(jaxpr.outvars[0]), stacks


def _residuals(
    plan: Program, number: jax.Array, stacks: Sequence[Any], layers: Sequence[Any], constants: Sequence[Any]
) -> list[Any]:
    """The residuals of a layer, each read from its place."""
    values = []
    for place, residual in zip(plan.places, plan.shapes, strict=True):
        if place.source == "stacks":
            values.append(_at(stacks[place.at], number).reshape(residual.shape))
        elif place.source == "layers":
            values.append(_at(layers[place.at], number))
        elif place.source == "constants":
            values.append(constants[place.at])
        else:
            values.append(plan.closed.consts[place.at] if place.source == "own" else place.at)
    return values


def _is_var(atom: Any) -> bool:
    return not isinstance(atom, Literal)


def _rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an array as a matrix: with axes of size 1, XLA could choose layouts that products cannot write."""
    return shape if len(shape) < 2 else (math.prod(shape[:-1]), shape[-1])


def _at(stack: jax.Array, number: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, number, 0, keepdims=False, allow_negative_indices=False)
