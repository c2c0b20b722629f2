"""Where a run's arrays live: the batch split over the devices, the state copied to all of them or split as well."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from monarchrt.models.errors import UserError
from monarchrt.models.sharding import BATCH_AXIS

LONG = 64  # an axis that may be split; the layers, stacked along the first, are fewer


class Placement:
    """Data parallelism over the local devices, along one mesh axis, "data".

    Args:
        batch: Samples per step; the devices must divide it.
        accumulation: Parts that the batch is processed in.
        state: "replicated": every device holds the whole state. "fsdp": each array is split along its longest axis
            that the devices divide, and gathered by the compiler where it is needed, layer by layer; arrays without a
            long one are copied.
        devices: Devices to use; None takes all.

    Raises:
        UserError: If the devices do not divide a part of the batch.

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
        state: Literal["replicated", "fsdp"] = "replicated",
        devices: Sequence[Any] | None = None,
    ):
        devices = list(devices) if devices is not None else jax.local_devices()
        if batch % (len(devices) * accumulation):
            raise UserError(
                f"batch is {batch}, which {len(devices)} devices times accumulation {accumulation} do not divide; "
                f"use a multiple of {len(devices) * accumulation}"
            )
        self.mesh = Mesh(np.array(devices), (BATCH_AXIS,))
        self._split = state == "fsdp"

    def shardings[Tree](self, state: Tree) -> Tree:
        """The sharding of each array of a state, or of a part of one."""
        return jax.tree.map(lambda leaf: self.sharding(leaf.shape), state)

    def batch(self, batch: Any) -> Any:
        """Splits every array's first axis over the devices; scalars go to all."""

        def place(leaf: Any) -> NamedSharding:
            return NamedSharding(self.mesh, PartitionSpec(*(BATCH_AXIS,) * bool(np.ndim(leaf))))

        return jax.device_put(batch, jax.tree.map(place, batch))

    def sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of an array of the state."""
        count = self.mesh.size
        axes = [axis for axis, size in enumerate(shape) if size >= max(count, LONG) and size % count == 0]
        # arrays of a few numbers are not worth a collective
        if not self._split or not axes or math.prod(shape) < 128 * count:
            return NamedSharding(self.mesh, PartitionSpec())
        longest = max(axes, key=lambda axis: shape[axis])
        return NamedSharding(self.mesh, PartitionSpec(*(None,) * longest, BATCH_AXIS))
