"""What several devices ask of a network: that its activations stay split along the batch, whatever its weights are."""

import jax
from jax.sharding import AxisType, PartitionSpec, get_abstract_mesh

BATCH_AXIS = "data"  # of the mesh


def split_batch[Tree](tree: Tree) -> Tree:
    """Keeps the first axis of each array split over the mesh axis "data".

    Without it the compiler may gather activations rather than weights that are split along the same mesh axis. Does
    nothing unless a mesh with that axis is set (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`) and divides the
    array's first axis.

    Examples:
        >>> split_batch(jax.numpy.ones((2, 3))).shape
        (2, 3)
    """
    mesh = get_abstract_mesh()
    if dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get(BATCH_AXIS) is not AxisType.Auto:
        return tree

    def split(x):
        if x.shape[0] % mesh.shape[BATCH_AXIS]:
            return x
        rest = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 1)
        return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXIS, *rest))

    return jax.tree.map(split, tree)
