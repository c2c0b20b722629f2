"""Where arrays live on a mesh of devices: logical axes of parameters and activations, and one table of rules.

The axes of the mesh are those of `monarchrt.models.mesh`. A network names what its axes are (`constrain`); `RULES` says
which axes of the mesh split them. Without a mesh (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`) nothing is done.
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

from monarchrt.models.mesh import AXES, MeshShape

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("heads",),  # of a frame, outside of attention
    "heads": ("heads",),  # inside
    "weights": ("fsdp",),
}
ANY = "any"  # an axis that the compiler splits as it likes
BATCH_AXIS = "data"
WHOLE_WEIGHTS = "whole_weights"  # name of gathered weights, which are no residuals
LONG = 64  # numbers along each axis of a matrix that is worth a collective
type Logical = str | None
# queries, keys and values on a mesh. Each device attends with its part (`on_each_device`): the compiler would split a
# kernel by a callback, whose address is in the program, and no other process then finds it among those that are kept
BY_HEADS: tuple[Logical, ...] = ("batch", None, "heads", None)


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a shape; neighbours along heads, which exchange most, are neighbours among the devices.

    Args:
        shape: Devices along each axis.
        devices: As many; None takes all of all processes.
    """
    chosen = np.array(jax.devices() if devices is None else list(devices))
    return Mesh(chosen.reshape(shape.sizes()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spread(x: jax.Array, where: NamedSharding) -> jax.Array:
    """An array on a mesh; on one of several processes, each gives its devices their parts of its own copy.

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
    """An array that this process has in full: of one that several processes share, its copy on a device here.

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
    """Axes of the mesh that split a logical axis: as many of its rule's, in order, as divide it."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    splitting: tuple[str, ...] = ()
    for axis in RULES.get(name or "", ()):
        if types.get(axis) is not AxisType.Auto:
            continue
        if size % math.prod(mesh.shape[x] for x in (*splitting, axis)) == 0:
            splitting = (*splitting, axis)
    return tuple(axis for axis in splitting if mesh.shape[axis] > 1)


def partition(mesh: Mesh | AbstractMesh, shape: Sequence[int], logical: Sequence[Logical]) -> PartitionSpec:
    """How an array of logical axes is split; those that the rules do not name are whole."""
    entries: list[Any] = []
    for size, name in zip(shape, logical, strict=True):
        axes = mesh_axes(mesh, name, size)
        entries.append(PartitionSpec.UNCONSTRAINED if name == ANY else axes or None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *logical: Logical) -> jax.Array:
    """Splits an array over the mesh that is set, by its logical axes; leaves it alone if there is none.

    Examples:
        >>> constrain(jax.numpy.ones((2, 3)), "batch", None).shape
        (2, 3)
    """
    mesh = get_abstract_mesh()
    if not _auto(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, partition(mesh, x.shape, logical))


def split_batch[Tree](tree: Tree) -> Tree:
    """Keeps the first axis of each array split along the batch, whatever the weights are.

    Without it the compiler may gather activations rather than weights that are split along the same mesh axis.

    Examples:
        >>> split_batch(jax.numpy.ones((2, 3))).shape
        (2, 3)
    """
    return jax.tree.map(lambda x: constrain(x, "batch", *(ANY,) * (x.ndim - 1)), tree)


def parts(name: Logical, size: int) -> int:
    """Parts that a logical axis of this size is split in, on the mesh that is set; 1 without one."""
    mesh = get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(mesh, name, size)) if _auto(mesh) else 1


def weight_axes(shape: Sequence[int]) -> tuple[Logical, ...]:
    """Logical axes of a parameter, by its shape: the longest axis of a matrix is "weights"; vectors have none.

    The first axis of three or more is never it, for layers are stacked there.

    Examples:
        >>> weight_axes((30, 1536, 8960)), weight_axes((30, 6, 1536)), weight_axes((30, 1536))
        ((None, None, 'weights'), (None, None, None), (None, None))
    """
    axes = _long_axes(shape)
    return tuple("weights" if axes and axis == axes[0] else None for axis in range(len(shape)))


def weight_spec(mesh: Mesh | AbstractMesh, shape: Sequence[int]) -> PartitionSpec:
    """How a parameter, or what the optimizer keeps of it, is split.

    Where its longest axis cannot be split evenly, a shorter one is.
    """
    for axis in _long_axes(shape):
        if axes := mesh_axes(mesh, "weights", shape[axis]):
            return PartitionSpec(*(None,) * axis, axes)
    return PartitionSpec()


def _long_axes(shape: Sequence[int]) -> list[int]:
    """Axes of a matrix that may be split, the longest first; none unless there are two, the layers not counted."""
    first = int(len(shape) > 2)
    axes = [axis for axis in range(first, len(shape)) if shape[axis] >= LONG]
    return sorted(axes, key=lambda axis: -shape[axis]) if len(axes) > 1 else []


def weight_sharding(mesh: Mesh, shape: Sequence[int]) -> NamedSharding:
    """`weight_spec` on the devices of a mesh."""
    return NamedSharding(mesh, weight_spec(mesh, shape))


def whole[Tree](weights: Tree, *, dtype: Any = None) -> Tree:
    """Parameters gathered where this is called, once, so that no loop inside gathers them again.

    Their gradients come back split, summed over the devices. Nothing is done without a mesh that splits weights.

    Args:
        weights: A tree of parameters, or a module.
        dtype: What they are computed in: it is what travels. Values are then rounded to it; their dtype stays.
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
    """fn(weights, *arrays) on every device's part, where parts are independent of each other: without collectives.

    Where nothing divides the arrays, as one clip on devices along the batch, each device computes all.

    The gradients of the weights are summed over the devices once, after all of `fn`: a loop in it, whose parts the
    compiler would else sum one by one, sums none.

    Args:
        fn: Gives an array that is split as the first of `arrays`.
        weights: A tree of arrays that are whole on every device.
        arrays: Trees of arrays.
        logical: The logical axes of the arrays of each of them.

    Returns:
        The array.
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
    """Whether the mesh that is set splits weights."""
    mesh = get_abstract_mesh()
    return _auto(mesh) and any(mesh.shape.get(axis, 1) > 1 for axis in RULES["weights"])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: jax.Array, narrow: Any) -> jax.Array:
    split = weight_spec(get_abstract_mesh(), x.shape)
    # first split: else the compiler may gather what a barrier around a layer takes, and keep it for the backward pass
    sent = jax.lax.with_sharding_constraint(x if narrow is None else x.astype(narrow), split)
    return jax.lax.with_sharding_constraint(sent, PartitionSpec(*(None,) * x.ndim)).astype(x.dtype)


def _gathered_fwd(x: jax.Array, narrow: Any) -> tuple[jax.Array, None]:
    return _gathered(x, narrow), None


def _gathered_bwd(narrow: Any, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    # the transpose of the gather: each device keeps its part of the sum
    return (jax.lax.with_sharding_constraint(gradient, weight_spec(get_abstract_mesh(), gradient.shape)),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


def no_whole_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint` that keeps all residuals but gathered weights and what is only another form of them.

    Without it a pass would hold the weights of all layers whole.
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
    """Whether a step of a program makes an array whole on every device, as only weights are."""
    return step.primitive.name == "sharding_constraint" and step.params["sharding"].is_fully_replicated


def _auto(mesh: Any) -> bool:
    """Whether there is a mesh whose axes the compiler deals with."""
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return any(types.get(axis) is AxisType.Auto for axis in AXES)
