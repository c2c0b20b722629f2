"""Capture of the latents of each network call during sampling."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from monarchrt.models.host import check_host
from monarchrt.models.wan.dit import Times, Tokens, WanModel


class NetworkCall(NamedTuple):
    """Inputs of one call of the network.

    Attributes:
        latents: Noisy latents [B, F, h, w, C].
        timesteps: [B] or [B, F].
    """

    latents: Float[np.ndarray, "B F h w C"]
    timesteps: Float[np.ndarray, "B *F"]


class _Watched(WanModel):
    """The same network, which sends its inputs to the host."""

    send: Any

    def embed_latents(
        self, latents: Array, timesteps: Array, times: Times | None = None, *, joined: bool = False
    ) -> Tokens:
        jax.debug.callback(self.send, latents, timesteps, ordered=True)
        return super().embed_latents(latents, timesteps, times, joined=joined)


@contextlib.contextmanager
def watching(model: WanModel) -> Iterator[tuple[WanModel, list[NetworkCall]]]:
    """Captures the latents and timesteps of a network's calls inside the block.

    Examples:
        >>> import jax.numpy as jnp
        >>> from monarchrt.models.wan import wan_config
        >>> model = WanModel(wan_config("tiny", num_layers=1), rngs=nnx.Rngs(0))
        >>> with watching(model) as (watched, calls):
        ...     flow = watched(jnp.zeros((1, 3, 4, 8, 16)), jnp.array([500.0]), jnp.zeros((1, 5, 32)))
        >>> [(call.latents.shape, call.timesteps.tolist()) for call in calls]
        [((1, 3, 4, 8, 16), [500.0])]

    Args:
        model: The network, on one device; it does not change.

    Yields:
        A network that computes the same and is to be run, and the list of its calls, in order, which is complete at the
        end of the block.

    Raises:
        UserError: If `JAX_PLATFORMS` excludes the CPU.
    """
    check_host("watching a network")
    calls: list[NetworkCall] = []

    def send(latents: Any, timesteps: Any) -> None:
        calls.append(NetworkCall(np.asarray(latents, np.float32), np.asarray(timesteps, np.float32)))

    watched: Any = nnx.merge(*nnx.split(model))
    watched.__class__ = _Watched
    watched.send = send
    try:
        yield watched, calls
    finally:
        jax.effects_barrier()
