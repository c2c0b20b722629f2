"""The devices that make a video: a mesh for the network, and one for the decoder."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.mesh import MeshShape
from monarchrt.models.sharding import make_mesh, weight_sharding


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the parts of a pipeline live.

    Attributes:
        mesh: Of the network's devices; None: JAX's own choice, the first device.
        decoder: Device of the decoder; None: likewise.
    """

    mesh: Mesh | None = None
    decoder: Any = None

    def weights(self, path: Any, shape: tuple[int, ...]) -> Any:
        """Where a parameter of the network goes, for the loaders."""
        return None if self.mesh is None else weight_sharding(self.mesh, shape)

    def moved[Model: nnx.Module](self, model: Model) -> Model:
        """A network with its arrays where they belong."""
        if self.mesh is None:
            return model
        graph, state = nnx.split(model)
        return nnx.merge(graph, jax.device_put(state, jax.tree.map(lambda x: self.weights(None, x.shape), state)))


def find_places(config: GenerateConfig, *, heads: int) -> Places:
    """The devices that the settings ask for.

    Args:
        config: Its `mesh` and `decoder_device`.
        heads: Attention heads of the network.

    Returns:
        The places; a decoder's own device is none of the mesh.

    Raises:
        UserError: If there are not so many devices, or the mesh does not suit one video or the heads.

    Examples:
        >>> find_places(GenerateConfig(), heads=12)
        Places(mesh=None, decoder=None)
    """
    devices, decoder = jax.devices(), None
    if config.decoder_device is not None:
        if config.decoder_device >= len(devices):
            last = f"use at most {len(devices) - 1}" if len(devices) > 1 else "leave it out"
            raise UserError(
                f"decoder_device is {config.decoder_device}, and there {'are' if len(devices) > 1 else 'is'} "
                f"{len(devices)} device{'s' * (len(devices) > 1)}, counted from 0; {last}"
            )
        decoder = devices[config.decoder_device]
    if config.mesh is None:
        return Places(decoder=decoder)
    own = [device for device in devices if device != decoder] or devices
    shape = MeshShape.parse(config.mesh, devices=len(own))
    shape.check_one_clip()
    shape.check_heads(heads)
    return Places(mesh=make_mesh(shape, own), decoder=own[0] if decoder is None else decoder)
