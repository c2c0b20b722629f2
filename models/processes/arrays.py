"""Arrays of process 0, given to all processes: what each would otherwise read or compute by itself."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from monarchrt.models.processes.alike import check_same
from monarchrt.models.sharding import whole_here


def broadcast_arrays[Tree](what: str, tree: Tree) -> Tree:
    """The arrays of process 0, in all processes; a run of one process keeps its own.

    Examples:
        >>> broadcast_arrays("embeddings", [np.ones(2)])
        [array([1., 1.])]

    Args:
        what: What they are, in the plural, for errors.
        tree: Arrays; structure, shapes and dtypes must be equal in all processes.

    Returns:
        The same tree with arrays of this process alone, on its default device.

    Raises:
        UserError: In all processes, if structure, shapes or dtypes differ.
    """
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    shapes = [(x.shape, str(x.dtype)) for x in leaves]
    check_same(what, lambda: hashlib.sha256(repr((structure, shapes)).encode()).hexdigest())
    devices = np.array(jax.devices())
    mesh = Mesh(devices, ("all",))

    def row_of_each_device(x: jax.Array) -> jax.Array:
        mine = np.asarray(x)[None]
        split = NamedSharding(mesh, PartitionSpec("all"))
        return jax.make_array_from_callback((devices.size, *x.shape), split, lambda _: mine)

    take = jax.jit(lambda tree: jax.tree.map(lambda x: x[0], tree), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(whole_here(x))), take(jax.tree.map(row_of_each_device, tree)))
