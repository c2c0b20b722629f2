"""Rules for kernels under vmap, and on arrays whose batch or heads are split over devices.

XLA cannot partition a custom call: it would gather split operands on every device and run the whole problem on each.
The rules of this module declare which axes are independent.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

# The axes of an array, one letter each. b and h, batch and heads, are independent; p is batch times heads merged, in
# arrays that only kernels read; a digit is an axis that no other array shares. Every array but `visible` begins with b
# or p.
Axes = str
QUERIES, KEYS, ROWS, VISIBLE = "baijhd", "bcijhd", "baijh", "a"


def forward_anywhere(forward: Callable[..., tuple]) -> Callable[..., tuple]:
    """Adds rules for vmap and split operands to a backend's forward pass, forward(problem, q, k, v, visible)."""

    def run(problem, q, k, v, visible):
        arrays = (q, k, v, visible)
        kept, structure = (), None
        if problem.keep:
            structs = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
            shapes, structure = jax.tree.flatten(jax.eval_shape(functools.partial(forward, problem), *structs))
            kept = tuple(map(_kept, shapes[2:]))
        fn = _flat(functools.partial(forward, problem))
        results = anywhere(fn, (QUERIES, KEYS, KEYS, VISIBLE), (QUERIES, ROWS, *kept))(*arrays)
        return results if structure is None else jax.tree.unflatten(structure, results)

    return run


def vjp_anywhere(vjp: Callable[..., tuple]) -> Callable[..., tuple]:
    """Adds rules for vmap and split operands to a backend's vjp, vjp(problem, residuals, d_out)."""

    def run(problem, residuals, d_out):
        r = residuals
        kept, structure = jax.tree.flatten(r.kept)

        def fn(q, k, v, out, lse, d_out, *rest):
            *kept, visible = rest
            return vjp(problem, type(r)(q, k, v, visible, out, lse, jax.tree.unflatten(structure, kept)), d_out)

        axes = (QUERIES, KEYS, KEYS, QUERIES, ROWS, QUERIES, *map(_kept, kept), VISIBLE)
        return anywhere(fn, axes, (QUERIES, KEYS, KEYS))(r.q, r.k, r.v, r.out, r.lse, d_out, *kept, r.visible)

    return run


def whole_tokens(*arrays: jax.Array, tiles: jax.Array | None = None) -> tuple[jax.Array, ...]:
    """Gathers tokens and head dimensions of arrays on a mesh with explicit axes; batch and heads stay split.

    The reshape to tiles and the products cannot be typed for arrays split along the other axes. Arrays that are not on
    such a mesh are returned unchanged.

    Args:
        arrays: [B, N, H, D] each; the first determines how batch and heads are split.
        tiles: [..., B, T, b1, b2, H, D], an array that determines this instead; None: the first of `arrays`.

    Returns:
        The same values, resharded.
    """
    given = [jax.typeof(x).sharding for x in (arrays if tiles is None else (tiles, *arrays))]
    explicit = [x for x in given if x.mesh.explicit_axes]
    if not explicit:
        return arrays
    first = explicit[0]
    if first is not given[0]:
        batch = heads = None
    elif tiles is None:
        batch, _, heads, _ = first.spec
    else:
        batch, _, _, _, heads, _ = first.spec[-6:]
    to = NamedSharding(first.mesh, PartitionSpec(batch, None, heads, None))
    return tuple(jax.sharding.reshard(x, to) for x in arrays)


def on_mesh_of(x: jax.Array, example: jax.Array) -> jax.Array:
    """Replicates `x` on the example's mesh if that has explicit axes and `x` is not on such a mesh already."""
    mesh = jax.typeof(example).sharding.mesh
    if not mesh.explicit_axes or jax.typeof(x).sharding.mesh.explicit_axes:
        return x
    return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec()))


def split_like(x: jax.Array, example: jax.Array) -> jax.Array:
    """Reshards `x` like `example` on a mesh with explicit axes: the inverse of `whole_tokens`."""
    to = jax.typeof(example).sharding
    return jax.sharding.reshard(x, to) if to.mesh.explicit_axes else x


def left_to_the_compiler(fn: Callable[..., jax.Array], tokens: Sequence[jax.Array], *rest: Any) -> jax.Array:
    """Calls fn(*tokens, *rest), which need not support explicitly sharded arrays, with the mesh's axes in auto mode.

    Tokens are gathered first (see `whole_tokens`). Without explicit axes this is just the call.

    Examples:
        >>> x = jnp.ones((1, 6, 2, 4))
        >>> left_to_the_compiler(lambda q, k, v, number: q + k * v * number, (x, x, x), 2).shape
        (1, 6, 2, 4)

    Args:
        fn: Returns an array shaped like the first of `tokens`, and closes over no JAX arrays.
        tokens: [B, N, H, D] each, the queries first.
        rest: Trees of arrays; those that are not on a mesh are replicated on that of the queries.

    Returns:
        The result of `fn`, split like the queries.
    """
    if not (explicit := jax.typeof(tokens[0]).sharding.mesh.explicit_axes):
        return fn(*tokens, *rest)
    arrays = whole_tokens(*tokens)
    rest = jax.tree.map(functools.partial(on_mesh_of, example=arrays[0]), rest)
    run = jax.sharding.auto_axes(fn, axes=explicit, out_sharding=jax.typeof(arrays[0]).sharding)
    return split_like(cast(jax.Array, run(*arrays, *rest)), tokens[0])


def _flat(fn: Callable[..., Any]) -> Callable[..., tuple[jax.Array, ...]]:
    return lambda *arrays: tuple(jax.tree.leaves(fn(*arrays)))


def _kept(x) -> Axes:
    return "p" + "1" * (x.ndim - 1)


def anywhere(fn: Callable[..., tuple], inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> Callable[..., tuple]:
    """Adds to `fn` a rule for vmap, which merges the mapped axis into the batch, and one for split operands.

    Derivatives of the result raise NotImplementedError: forward and backward passes of kernels are such functions, and
    second derivatives would need more kernels.

    Examples:
        >>> double = anywhere(lambda x: (2 * x,), ("b1h1",), ("b1h1",))
        >>> jax.vmap(double)(jnp.ones((3, 1, 2, 4, 5)))[0].shape
        (3, 1, 2, 4, 5)

    Args:
        fn: Maps arrays, the queries first, to a tuple of arrays, independently along batch and heads.
        inputs: Axes of each argument.
        outputs: Axes of each result.

    Returns:
        A function with the same arguments and results.
    """
    mapped = jax.custom_batching.custom_vmap(_implicit(_split(fn, inputs, outputs), inputs, outputs))
    shared = [axes[0] not in "bp" for axes in inputs]  # arguments without a batch axis

    @mapped.def_vmap
    def rule(size, in_batched, *args):
        spread = [x if b else jnp.broadcast_to(x, (size, *x.shape)) for x, b in zip(args, in_batched, strict=True)]
        if any(b and alone for b, alone in zip(in_batched, shared, strict=True)):
            results = jax.lax.map(lambda xs: mapped(*xs), tuple(spread))  # one example after the other
        else:
            results = mapped(
                *(
                    x if alone else wide.reshape(-1, *wide.shape[2:])
                    for x, wide, alone in zip(args, spread, shared, strict=True)
                )
            )
            results = tuple(x.reshape(size, -1, *x.shape[1:]) for x in results)
        return results, (True,) * len(outputs)

    whole = jax.custom_jvp(lambda *args: mapped(*args))
    whole.defjvp(_no_derivative)
    return whole


def _no_derivative(primals: tuple, tangents: tuple) -> tuple:
    del primals, tangents
    raise NotImplementedError(
        "GPU kernels have first derivatives in reverse mode only (jax.grad, jax.vjp), no second ones; "
        "use implementation='xla'."
    )


def _implicit(fn: Callable[..., tuple], inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> Callable[..., tuple]:
    """`fn` for arrays on a mesh with explicit axes: runs it in auto mode and gives the results explicit shardings."""

    def run(*arrays):
        queries = jax.typeof(arrays[0]).sharding
        explicit = queries.mesh.explicit_axes
        if not explicit:
            return fn(*arrays)
        implicit = jax.sharding.auto_axes(fn, axes=explicit, out_sharding=_shardings(queries, inputs[0], outputs))
        return cast(Callable[..., tuple], implicit)(*arrays)

    return run


def _split(fn: Callable[..., tuple], inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> Callable[..., tuple]:
    """`fn` on each device's part of the batch and the heads; operands split along other axes are gathered."""

    def run(*arrays):
        program = jax.make_jaxpr(fn)(*arrays)  # `custom_partitioning` accepts no constants: they become operands
        operands = (*inputs, *("1" * np.ndim(x) for x in program.consts))
        rule, whole = sharding_rule(operands, outputs)

        def partition(mesh, arg_shapes, result_shape):
            given = arg_shapes[0].sharding
            if mesh.empty:  # devices, but no names for their axes
                mesh = Mesh(np.array(given._device_assignment), ("device",))
            queries = named(mesh, given, len(inputs[0]))
            args, results = (_shardings(queries, inputs[0], x, heads="h" not in whole) for x in (operands, outputs))
            return mesh, on_a_device, results, args

        def on_a_device(*parts):
            with use_abstract_mesh(AbstractMesh((), ())):
                return fn(*parts[: len(inputs)])

        @custom_partitioning
        def split(*values):
            arrays, constants = values[: len(inputs)], values[len(inputs) :]
            return tuple(jaxpr_as_fun(ClosedJaxpr(program.jaxpr, constants))(*arrays))

        # decode_shardings=False: JAX fails to decode shardings whose sizes do not divide
        split.def_partition(partition, decode_shardings=False, sharding_rule=rule, need_replication_factors=whole)
        return split(*arrays, *program.consts)

    return run


def named(mesh: Mesh, sharding: jax.sharding.Sharding, ndim: int) -> NamedSharding:
    """Expresses the compiler's sharding by axes of a mesh, where whole mesh axes split an axis of the array.

    Other splits, such as 6 tiles over half of a mesh axis of 4 devices, cannot be expressed; those axes are gathered.

    Args:
        mesh: Mesh of the program.
        sharding: The `GSPMDSharding` that the compiler chose.
        ndim: Number of axes of the array.

    Returns:
        The sharding.
    """
    chosen = sharding._to_xla_hlo_sharding(ndim)
    spec: list[tuple[str, ...] | None] = [None] * ndim
    if not chosen.is_replicated() and chosen.is_tiled():
        places = np.asarray(chosen.tile_assignment_devices()).reshape(chosen.tile_assignment_dimensions())
        for axis in range(ndim):
            part = np.empty(mesh.size, int)  # index of the part of the array's axis on each device
            part[places] = np.arange(places.shape[axis]).reshape([-1 if n == axis else 1 for n in range(places.ndim)])
            spec[axis] = _axes_that_split(mesh, part.reshape(mesh.devices.shape))
    return NamedSharding(mesh, PartitionSpec(*spec))


def _axes_that_split(mesh: Mesh, part: np.ndarray) -> tuple[str, ...] | None:
    """The mesh axes, slowest first, whose coordinates number the parts on the devices; None if none do or it is one."""
    sizes, count = dict(mesh.shape), int(part.max()) + 1
    for number in range(1, len(sizes) + 1):
        for axes in itertools.permutations(sizes, number):
            if count == 1 or math.prod(sizes[x] for x in axes) != count:
                continue
            index = np.zeros(part.shape, int)
            for name in axes:
                index = index * sizes[name] + np.indices(part.shape)[list(sizes).index(name)]
            if (index == part).all():
                return axes
    return None


def _shardings(
    queries: NamedSharding, theirs: Axes, arrays: tuple[Axes, ...], *, heads: bool = True
) -> tuple[NamedSharding, ...]:
    """Shardings of arrays that are split like the queries along the batch and, if `heads`, along the heads.

    Args:
        queries: Sharding of the queries.
        theirs: Axes of the queries.
        arrays: Axes of each array.
        heads: Whether arrays are split along the heads.
    """
    axes = dict(zip(theirs, (*queries.spec, *(None,) * len(theirs)), strict=False))
    names = {"b": axes["b"], "p": axes["b"], "h": axes["h"] if heads else None}
    return tuple(NamedSharding(queries.mesh, PartitionSpec(*map(names.get, axes))) for axes in arrays)


def sharding_rule(inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> tuple[str, tuple[str, ...]]:
    """The sharding rule in the notation of `custom_partitioning`, and the factors in it that must not be split.

    Arrays with merged batch and heads may be split along the batch only: parts along both would not be contiguous.

    Examples:
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
