"""Where a run's arrays live: the batch split over the devices, the state on all of them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.errors import UserError
from train.state import TrainState


class Placement:
    """Data parallelism over the local devices, along one mesh axis, "data".

    Args:
        batch: Samples per step; the devices must divide it.
        accumulation: Parts that the batch is processed in.
        devices: Devices to use; None takes all.

    Raises:
        UserError: If the devices do not divide a part of the batch.
    """

    def __init__(self, *, batch: int, accumulation: int = 1, devices: Sequence[Any] | None = None):
        devices = list(devices) if devices is not None else jax.local_devices()
        if batch % (len(devices) * accumulation):
            raise UserError(
                f"batch is {batch}, which {len(devices)} devices times accumulation {accumulation} do not divide; "
                f"use a multiple of {len(devices) * accumulation}"
            )
        self.mesh = Mesh(np.array(devices), ("data",))

    def state(self, state: TrainState) -> TrainState:
        """Puts a copy of the state on every device."""
        return jax.device_put(state, NamedSharding(self.mesh, PartitionSpec()))

    def batch(self, batch: Any) -> Any:
        """Splits every array's first axis over the devices."""
        return jax.device_put(tuple(batch), NamedSharding(self.mesh, PartitionSpec("data")))
