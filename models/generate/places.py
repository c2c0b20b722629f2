"""The devices for a video: a mesh for the network, and a device for the decoder."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.mesh import MeshShape
from monarchrt.models.sharding import make_mesh, spread, weight_sharding


@dataclass(frozen=True, kw_only=True)
class Places:
    """Devices of the parts of a pipeline.

    Attributes:
        mesh: Devices of the network; None: JAX's default, the first device.
        decoder: Device of the decoder; None: the same.
    """

    mesh: Mesh | None = None
    decoder: Any = None

    def weights(self, path: Any, shape: tuple[int, ...]) -> Any:
        """The sharding of a parameter of the network, for loaders."""
        return None if self.mesh is None else weight_sharding(self.mesh, shape)

    def moved[Model: nnx.Module](self, model: Model) -> Model:
        """The network with its arrays moved to the mesh."""
        if (mesh := self.mesh) is None:
            return model
        graph, state = nnx.split(model)
        return nnx.merge(graph, jax.tree.map(lambda x: spread(x, weight_sharding(mesh, x.shape)), state))


def find_places(config: GenerateConfig, *, heads: int) -> Places:
    """The devices requested by the settings.

    Args:
        config: The settings, with `mesh` and `decoder_device`.
        heads: Number of attention heads of the network.

    Returns:
        The devices; a separate device of the decoder is not part of the mesh.

    Raises:
        UserError: If there are too few devices, or the mesh does not fit one video or the number of heads.

    Examples:
        >>> find_places(GenerateConfig(), heads=12)
        Places(mesh=None, decoder=None)
    """
    devices, decoder = jax.devices(), None
    if config.decoder_device is not None:
        if config.decoder_device >= len(devices):
            last = f"use at most {len(devices) - 1}" if len(devices) > 1 else "leave it out"
            raise UserError(
                f"decoder_device is {config.decoder_device}, but there {'are' if len(devices) > 1 else 'is'} "
                f"{len(devices)} device{'s' * (len(devices) > 1)}, counted from 0; {last}"
            )
        decoder = devices[config.decoder_device]
        if decoder.process_index:
            raise UserError(
                f"decoder_device is {config.decoder_device}, a device of process {decoder.process_index}; process 0 "
                f"writes the video, so use one of its own, below {len(jax.local_devices(process_index=0))}"
            )
    if config.mesh is None:
        if jax.process_count() > 1:
            raise UserError(
                f"mesh is not given, and {jax.process_count()} processes are to make one video; give --mesh "
                f"heads={len(devices)}, or --processes 1 for a video of each"
            )
        return Places(decoder=decoder)
    own = [device for device in devices if device != decoder] or devices
    try:
        shape = MeshShape.parse(config.mesh, devices=len(own))
    except UserError as error:
        if len(own) == len(devices):
            raise
        raise UserError(f"{error}, since decoder_device {config.decoder_device} is not part of the mesh") from error
    shape.check_one_clip()
    shape.check_heads(heads)
    here = [device for device in own if device.process_index == jax.process_index()]
    if not here:
        raise UserError(
            f"decoder_device is {config.decoder_device}, which leaves process {jax.process_index()} none for the mesh; "
            f"leave it out"
        )
    if decoder is None or jax.process_index():  # the other processes decode too, and discard the frames
        decoder = here[0]
    return Places(mesh=make_mesh(shape, own), decoder=decoder)
