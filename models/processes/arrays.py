"""Arrays that each of several processes has made or read by itself, of which all are to have the same."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from monarchrt.models.processes.alike import same
from monarchrt.models.sharding import whole_here


def of_first[Tree](what: str, tree: Tree) -> Tree:
    """The first process's arrays, in all of them; one process keeps its own.

    Examples:
        >>> of_first("embeddings", [np.ones(2)])
        [array([1., 1.])]

    Args:
        what: In the plural, for the message.
        tree: Arrays, of the same shapes in all processes.

    Returns:
        A tree of arrays of this process alone, on its default device.

    Raises:
        UserError: In all processes, if there are other arrays or shapes in one of them.
    """
    if jax.process_count() == 1:
        return tree
    leaves, structure = jax.tree.flatten(tree)
    shapes = [(x.shape, str(x.dtype)) for x in leaves]
    same(what, lambda: hashlib.sha256(repr((structure, shapes)).encode()).hexdigest())
    devices = np.array(jax.devices())
    mesh = Mesh(devices, ("all",))

    def row_of_each_device(x: jax.Array) -> jax.Array:
        mine = np.asarray(x)[None]
        split = NamedSharding(mesh, PartitionSpec("all"))
        return jax.make_array_from_callback((devices.size, *x.shape), split, lambda _: mine)

    take = jax.jit(lambda tree: jax.tree.map(lambda x: x[0], tree), out_shardings=NamedSharding(mesh, PartitionSpec()))
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(whole_here(x))), take(jax.tree.map(row_of_each_device, tree)))
