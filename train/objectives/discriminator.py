"""A discriminator: a head on the critic's features with one logit per clip.

A learned query attends to all tokens of the residual stream after some of the critic's blocks; the result goes through
a small MLP. The head is the critic's submodule `discriminator`, and trains with it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from monarchrt.models.errors import UserError
from monarchrt.models.wan import WanModel


class Discriminator(nnx.Module):
    """Attention of one learned query to the tokens of a clip, and an MLP; computed in float32.

    Examples:
        >>> head = nnx.eval_shape(lambda: Discriminator(24, heads=2, rngs=nnx.Rngs(0)))
        >>> nnx.eval_shape(lambda head, features: head(features), head, jnp.ones((3, 4, 6, 24))).shape
        (3,)

    Args:
        dim: Width D of the features.
        heads: Number of attention heads; must divide D.
        rngs: Random streams; `params` initializes the parameters.
    """

    def __init__(self, dim: int, *, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.query = nnx.Param(0.02 * jax.random.normal(rngs.params(), (dim,)))
        self.norm_tokens, self.norm = nnx.LayerNorm(dim, rngs=rngs), nnx.LayerNorm(dim, rngs=rngs)
        self.keys_values = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.hidden, self.out = nnx.Linear(dim, dim, rngs=rngs), nnx.Linear(dim, 1, rngs=rngs)

    def __call__(self, features: Float[Array, "b f n d"]) -> Float32[Array, "b"]:
        """Logits; larger is more likely real."""
        batch, frames, per_frame, dim = features.shape
        tokens = features.reshape(batch, frames * per_frame, dim).astype(jnp.float32)
        size = (batch, -1, self.heads, dim // self.heads)
        keys, values = jnp.split(self.keys_values(self.norm_tokens(tokens)), 2, axis=-1)
        query = jnp.broadcast_to(self.query[...], (batch, 1, dim))
        seen = jax.nn.dot_product_attention(query.reshape(size), keys.reshape(size), values.reshape(size))
        return self.out(jax.nn.silu(self.hidden(self.norm(seen.reshape(batch, dim)))))[:, 0]


def with_discriminator(critic: Any, *, seed: int) -> Any:
    """Adds a new discriminator to a critic.

    Args:
        critic: A `WanModel`, or its shapes.
        seed: Seed of the head's parameters.

    Returns:
        A critic with the same arrays and the head.

    Raises:
        UserError: If the critic is not a `WanModel`.
    """
    if not isinstance(critic, WanModel):
        raise UserError(f"the critic is {type(critic).__name__}; the adversarial term needs the features of Wan")
    critic, config = nnx.merge(*nnx.split(critic)), critic.config
    critic.discriminator = Discriminator(config.dim, heads=config.num_heads, rngs=nnx.Rngs(seed))
    return critic


def logits_of(
    critic: Any,
    latents: Float[Array, "b f h w c"],
    timesteps: Float32[Array, "b"],
    text: Float[Array, "b l d"],
    *,
    layers: int | None = None,
) -> Float32[Array, "b"]:
    """Logits of noisy clips; larger is more likely real.

    Args:
        critic: A critic from `with_discriminator`.
        latents: Noisy clips.
        timesteps: Timestep of each clip.
        text: Embeddings of the prompts.
        layers: Number of the critic's blocks before the head; None for all.

    Raises:
        UserError: If the critic has fewer blocks.
    """
    if layers is not None and layers > critic.config.num_layers:
        raise UserError(f"gan_layers is {layers}, but the critic has {critic.config.num_layers}; give as many or fewer")
    grid = critic.check_latents(latents, timesteps)
    tokens = critic.embed_latents(latents, timesteps)
    return critic.discriminator(critic.run_blocks(tokens, critic.embed_context(text), grid, layers=layers))
