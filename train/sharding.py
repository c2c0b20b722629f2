"""Shardings of a run: the batch is split over a mesh of devices, the state replicated or split as well."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from monarchrt.models.mesh import MeshShape, mesh_shape
from monarchrt.models.sharding import make_mesh, partition, weight_sharding


class Placement:
    """A mesh of devices, and the shardings of batches and state on it.

    Args:
        batch: Samples per step, a multiple of the devices along data and fsdp.
        accumulation: Number of parts in which the batch is processed.
        mesh: Axes and their sizes, in the notation of `monarchrt.models.mesh.MeshShape`; None for `state`.
        state: Without `mesh`: all devices along "data", each with the whole state ("replicated"), or along "fsdp",
            where matrices are split, and gathered layer by layer once per pass.
        devices: Devices to use; None for all.

    Raises:
        UserError: If the mesh has another number of devices, or a part of the batch is not divisible by its axes.

    Examples:
        >>> placement = Placement(batch=4, devices=jax.local_devices()[:1])
        >>> placement.batch((np.zeros((4, 2)),))[0].shape
        (4, 2)
    """

    def __init__(
        self,
        *,
        batch: int,
        accumulation: int = 1,
        mesh: str | None = None,
        state: Literal["replicated", "fsdp"] = "replicated",
        devices: Sequence[Any] | None = None,
    ):
        devices = list(devices) if devices is not None else jax.devices()
        self.shape: MeshShape = mesh_shape(mesh, devices=len(devices), sharding=state)
        self.shape.check_batch(batch, accumulation=accumulation)
        self.mesh: Mesh = make_mesh(self.shape, devices)

    def shardings[Tree](self, state: Tree) -> Tree:
        """The sharding of each array of a state, or of a part of it."""
        return jax.tree.map(lambda leaf: self.sharding(leaf.shape), state)

    def batch[Tree](self, batch: Tree) -> Tree:
        """Moves a batch to the devices, with the first axis of each array split over them; scalars are replicated."""
        places = jax.tree.map(lambda leaf: self.batch_sharding(np.shape(leaf)), batch)
        if jax.process_count() == 1:
            return jax.device_put(batch, places)

        def put(leaf: Any, where: NamedSharding) -> jax.Array:  # the parts for the devices of this process
            array = np.asarray(leaf)
            return jax.make_array_from_callback(array.shape, where, lambda index: array[index])

        return jax.tree.map(put, batch, places)

    def part[Tree](self, rows_of_batch: Tree, *, rows: range, batch: int) -> Tree:
        """Moves a batch to the devices of which this process has read only some rows.

        Args:
            rows_of_batch: Arrays of these rows.
            rows: Their positions in the batch, which must include those for all devices of this process.
            batch: Samples of the whole batch.
        """

        def put(leaf: Any) -> jax.Array:
            array = np.asarray(leaf)
            shape = batch, *array.shape[1:]
            where = self.batch_sharding(shape)

            def of(index: Any) -> np.ndarray:
                start, stop, _ = index[0].indices(batch)
                return array[start - rows.start : stop - rows.start]

            return jax.make_array_from_callback(shape, where, of)

        return jax.tree.map(put, rows_of_batch)

    def rows(self, batch: int) -> range | None:
        """The range of a batch's samples for the devices of this process; None for all with a single process."""
        if jax.process_count() == 1:
            return None
        where = NamedSharding(self.mesh, partition(self.mesh, (batch,), ("batch",)))
        places: Sequence[Any] = list(where.addressable_devices_indices_map((batch,)).values())
        parts = [index[0].indices(batch) for index in places]
        return range(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))

    def batch_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of an array of a batch, with the first axis split over the devices."""
        logical = ("batch", *(None,) * (len(shape) - 1)) if shape else ()
        return NamedSharding(self.mesh, partition(self.mesh, shape, logical))

    def shapes(self, state: Any, batch: Any) -> tuple[Any, Any]:
        """Shapes, dtypes and shardings of state and batch, with which a step is traced as for the arrays themselves."""

        def describe(leaf: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(
                np.shape(leaf), jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True), sharding=place
            )

        places = jax.tree.map(lambda leaf: self.batch_sharding(np.shape(leaf)), batch)
        return jax.tree.map(describe, state, self.shardings(state)), jax.tree.map(describe, batch, places)

    def everywhere(self) -> NamedSharding:
        """The sharding of a replicated array."""
        return NamedSharding(self.mesh, PartitionSpec())

    def sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of an array of the state."""
        return weight_sharding(self.mesh, shape)
