"""Sharding on a mesh of devices: logical axes of parameters and activations, and one table of rules.

The axes of the mesh are those of `monarchrt.models.mesh`. Networks name the logical axes of their arrays (`constrain`),
and `RULES` maps these to axes of the mesh. Without a mesh (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`) the
functions have no effect.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, get_abstract_mesh
from jax.typing import DTypeLike

from monarchrt.models.mesh import AXES, MeshShape

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("heads",),  # tokens of a frame, outside of attention
    "heads": ("heads",),  # inside of attention
    "weights": ("fsdp",),
}
ANY = "any"  # an axis that the compiler may split in any way
BATCH_AXIS = "data"
WHOLE_WEIGHTS = "whole_weights"  # name of gathered weights, which `jax.checkpoint` must not keep as residuals
LONG = 64  # shortest axis that is split: smaller matrices are not worth a collective
type Logical = str | None
# Queries, keys and values on a mesh. Each device attends with its part (`on_each_device`): the compiler would partition
# a kernel by a callback whose address is part of the program, so other processes could not find it in the cache.
BY_HEADS: tuple[Logical, ...] = ("batch", None, "heads", None)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Creates a mesh; devices that are neighbours along heads, which exchange most, are neighbours in the list.

    Args:
        shape: Number of devices along each axis.
        devices: As many devices; None for all devices of all processes.

    Returns:
        The mesh, with all axes in auto mode.
    """
    chosen = np.array(jax.devices() if devices is None else list(devices))
    return Mesh(chosen.reshape(shape.sizes()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spread(x: jax.Array, where: NamedSharding) -> jax.Array:
    """Puts an array on a mesh; if the mesh spans processes, each provides the parts of its devices from its own copy.

    Examples:
        >>> where = NamedSharding(make_mesh(MeshShape(), jax.devices()[:1]), PartitionSpec())
        >>> spread(jax.numpy.ones(3), where).shape
        (3,)
    """
    if where.is_fully_addressable or not x.is_fully_addressable:
        return jax.device_put(x, where)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda at: host[at])


def whole_here(x: jax.Array) -> jax.Array:
    """The whole array on a device of this process, also if several processes share it.

    Examples:
        >>> whole_here(jax.numpy.ones(3)).shape
        (3,)
    """
    if x.is_fully_addressable:
        return x
    if not x.is_fully_replicated:
        sharding: Any = x.sharding
        x = jax.jit(lambda x: x, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))(x)
    return x.addressable_data(0)


def mesh_axes(mesh: Mesh | AbstractMesh, name: Logical, size: int) -> tuple[str, ...]:
    """Mesh axes that split a logical axis of this size: those of its rule, in order, as long as they divide it."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    splitting: tuple[str, ...] = ()
    for axis in RULES.get(name or "", ()):
        if types.get(axis) is not AxisType.Auto:
            continue
        if size % math.prod(mesh.shape[x] for x in (*splitting, axis)) == 0:
            splitting = (*splitting, axis)
    return tuple(axis for axis in splitting if mesh.shape[axis] > 1)


def partition(mesh: Mesh | AbstractMesh, shape: Sequence[int], logical: Sequence[Logical]) -> PartitionSpec:
    """The partition spec of an array.

    Args:
        mesh: The mesh.
        shape: Shape of the array.
        logical: Logical axis of each of its axes; None or a name without a rule is not split, `ANY` not constrained.

    Returns:
        The partition spec.
    """
    entries: list[Any] = []
    for size, name in zip(shape, logical, strict=True):
        axes = mesh_axes(mesh, name, size)
        entries.append(PartitionSpec.UNCONSTRAINED if name == ANY else axes or None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *logical: Logical) -> jax.Array:
    """Constrains the sharding of an array on the current mesh by its logical axes; no effect without a mesh.

    Examples:
        >>> constrain(jax.numpy.ones((2, 3)), "batch", None).shape
        (2, 3)
    """
    mesh = get_abstract_mesh()
    if not _auto(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, partition(mesh, x.shape, logical))


def split_batch[Tree](tree: Tree) -> Tree:
    """Keeps the first axis of each array split along the batch.

    Without it the compiler may gather activations instead of weights that are split along the same mesh axis.

    Examples:
        >>> split_batch(jax.numpy.ones((2, 3))).shape
        (2, 3)
    """
    return jax.tree.map(lambda x: constrain(x, "batch", *(ANY,) * (x.ndim - 1)), tree)


def parts(name: Logical, size: int) -> int:
    """Number of parts that a logical axis of this size is split into on the current mesh; 1 without a mesh."""
    mesh = get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(mesh, name, size)) if _auto(mesh) else 1


def weight_axes(shape: Sequence[int]) -> tuple[Logical, ...]:
    """Logical axes of a parameter by its shape: the longest axis of a matrix is "weights"; vectors have none.

    The first of three or more axes is not considered, since layers are stacked there.

    Examples:
        >>> weight_axes((30, 1536, 8960)), weight_axes((30, 6, 1536)), weight_axes((30, 1536))
        ((None, None, 'weights'), (None, None, None), (None, None))
    """
    axes = _long_axes(shape)
    return tuple("weights" if axes and axis == axes[0] else None for axis in range(len(shape)))


def weight_spec(mesh: Mesh | AbstractMesh, shape: Sequence[int]) -> PartitionSpec:
    """The partition spec of a parameter and of its optimizer state.

    If its longest axis cannot be split evenly, a shorter one is split.
    """
    for axis in _long_axes(shape):
        if axes := mesh_axes(mesh, "weights", shape[axis]):
            return PartitionSpec(*(None,) * axis, axes)
    return PartitionSpec()


def _long_axes(shape: Sequence[int]) -> list[int]:
    """Axes of a matrix that may be split, longest first; empty unless there are two besides the axis of layers."""
    first = int(len(shape) > 2)
    axes = [axis for axis in range(first, len(shape)) if shape[axis] >= LONG]
    return sorted(axes, key=lambda axis: -shape[axis]) if len(axes) > 1 else []


def weight_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """`weight_spec` on the devices of a mesh."""
    return NamedSharding(mesh, weight_spec(mesh, shape))


def whole[Tree](weights: Tree, *, dtype: DTypeLike | None = None) -> Tree:
    """Gathers parameters once, so that loops that use them do not gather them in every iteration.

    Their gradients are summed over the devices and split again. No effect without a mesh that splits weights.

    Args:
        weights: A tree of parameters, or a module.
        dtype: Dtype of the computation, in which the weights are sent: values are rounded to it, and the dtype of the
            arrays does not change. None: the arrays' own.

    Returns:
        The gathered parameters.
    """
    if not splits_weights():
        return weights
    if isinstance(weights, nnx.Module):
        graph, state = nnx.split(weights)
        return nnx.merge(graph, whole(state, dtype=dtype))  # type: ignore[return-value]

    def one(x: jax.Array) -> jax.Array:
        if not any(weight_spec(get_abstract_mesh(), x.shape)):
            return x
        narrow = None if dtype is None or jnp.dtype(dtype).itemsize >= x.dtype.itemsize else jnp.dtype(dtype)
        return checkpoint_name(_gathered(x, narrow), WHOLE_WEIGHTS)

    return jax.tree.map(one, weights)


def on_each_device(
    fn: Callable[..., jax.Array],
    weights: Any,
    arrays: Sequence[Any],
    logical: Sequence[tuple[Logical, ...]],
) -> jax.Array:
    """Calls fn(weights, *arrays) on each device's part of the arrays, without collectives.

    If the arrays cannot be split, as one clip on devices along the batch, each device computes everything. Gradients of
    the weights are summed over the devices once, at the end, rather than in every iteration of a loop in `fn`.

    Args:
        fn: Independent along the split axes; returns an array that is split like the first of `arrays`.
        weights: A tree of arrays that every device has in full.
        arrays: Trees of arrays.
        logical: For each of `arrays`, the logical axes of its leaves.

    Returns:
        The result of `fn`.
    """
    mesh = get_abstract_mesh()
    if not _auto(mesh):
        return fn(weights, *arrays)
    specs = [
        jax.tree.map(lambda x, names=names: partition(mesh, x.shape, names), tree)
        for tree, names in zip(arrays, logical, strict=True)
    ]
    axes = tuple(axis for entry in specs[0] for axis in ((entry,) if isinstance(entry, str) else entry or ()))
    if mesh.size == 1:
        return fn(weights, *arrays)

    def vary(x: jax.Array) -> jax.Array:  # where it is not split, its gradient is summed here
        missing = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    def run(*given: Any) -> jax.Array:
        return fn(*jax.tree.map(vary, given))

    everywhere = jax.tree.map(lambda _: PartitionSpec(), weights)
    return jax.shard_map(run, mesh=mesh, in_specs=(everywhere, *specs), out_specs=specs[0])(weights, *arrays)


def splits_weights() -> bool:
    """Whether the current mesh splits weights."""
    mesh = get_abstract_mesh()
    return _auto(mesh) and any(mesh.shape.get(axis, 1) > 1 for axis in RULES["weights"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, narrow: Any) -> jax.Array:
    split = weight_spec(get_abstract_mesh(), x.shape)
    # constrained to be split first: else the compiler may gather before the barrier around a layer, and keep the
    # gathered weights for the backward pass
    sent = jax.lax.with_sharding_constraint(x if narrow is None else x.astype(narrow), split)
    return jax.lax.with_sharding_constraint(sent, PartitionSpec(*(None,) * x.ndim)).astype(x.dtype)


def _gathered_fwd(x: jax.Array, narrow: Any) -> tuple[jax.Array, None]:
    return _gathered(x, narrow), None


def _gathered_bwd(narrow: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # the transpose of the gather: each device keeps its part of the sum
    return (jax.lax.with_sharding_constraint(gradient, weight_spec(get_abstract_mesh(), gradient.shape)),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def no_whole_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint` that keeps all residuals but gathered weights and their casts and reshapes.

    Without it a pass would keep the gathered weights of all layers.
    """
    if primitive.name == "name":
        return params["name"] != WHOLE_WEIGHTS
    if primitive.name == "custom_vjp_call":
        steps = params["call_jaxpr"].eqns
        return not any(map(_gathers, steps)) and any(no_whole_weights(step.primitive, **step.params) for step in steps)
    if primitive.name == "sharding_constraint":
        return not params["sharding"].is_fully_replicated
    return primitive.name not in ("convert_element_type", "reshape", "transpose", "broadcast_in_dim", "squeeze")


def _gathers(step: Any) -> bool:
    """Whether an equation replicates an array on all devices, which is only done to weights."""
    return step.primitive.name == "sharding_constraint" and step.params["sharding"].is_fully_replicated


def _auto(mesh: Any) -> bool:
    """Whether the mesh has axes in auto mode."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return any(types.get(axis) is AxisType.Auto for axis in AXES)
