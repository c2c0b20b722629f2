"""A head on the critic's features that says how real a noisy clip looks: one number for each clip.

A learned query attends to all tokens of the residual stream after some of the critic's blocks; what it gathers goes
through a small MLP. The head's parameters are the critic's, `discriminator` among its own, and train with them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32

from monarchrt.models.errors import UserError
from monarchrt.models.wan import WanModel


class Discriminator(nnx.Module):
    """One query over the tokens of a clip, and an MLP; computed in float32.

    Examples:
        >>> head = nnx.eval_shape(lambda: Discriminator(24, heads=2, rngs=nnx.Rngs(0)))
        >>> nnx.eval_shape(lambda head, features: head(features), head, jnp.ones((3, 4, 6, 24))).shape
        (3,)

    Args:
        dim: Width of the features, D.
        heads: Number of heads of the query; they divide D.
        rngs: Its `params` stream initialises.
    """

    def __init__(self, dim: int, *, heads: int, rngs: nnx.Rngs):
        self.heads = heads
        self.query = nnx.Param(0.02 * jax.random.normal(rngs.params(), (dim,)))
        self.norm_tokens, self.norm = nnx.LayerNorm(dim, rngs=rngs), nnx.LayerNorm(dim, rngs=rngs)
        self.keys_values = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.hidden, self.out = nnx.Linear(dim, dim, rngs=rngs), nnx.Linear(dim, 1, rngs=rngs)

    def __call__(self, features: Float[Array, "b f n d"]) -> Float32[Array, "b"]:
        """Logits; larger is more real."""
        batch, frames, per_frame, dim = features.shape
        tokens = features.reshape(batch, frames * per_frame, dim).astype(jnp.float32)
        size = (batch, -1, self.heads, dim // self.heads)
        keys, values = jnp.split(self.keys_values(self.norm_tokens(tokens)), 2, axis=-1)
        query = jnp.broadcast_to(self.query[...], (batch, 1, dim))
        seen = jax.nn.dot_product_attention(query.reshape(size), keys.reshape(size), values.reshape(size))
        return self.out(jax.nn.silu(self.hidden(self.norm(seen.reshape(batch, dim)))))[:, 0]


def with_discriminator(critic: Any, *, seed: int) -> Any:
    """A critic with a head of its own, new.

    Args:
        critic: Wan, or its shapes.
        seed: Seed of the head's parameters.

    Returns:
        A critic of the same arrays, and the head's.

    Raises:
        UserError: If it is not Wan.
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
    """How real noisy clips look to a critic with a head.

    Args:
        critic: Of `with_discriminator`.
        latents: Noisy clips.
        timesteps: Their times.
        text: Embeddings of their prompts.
        layers: Blocks whose output the head sees; None: all.

    Raises:
        UserError: If there are not so many blocks.
    """
    if layers is not None and layers > critic.config.num_layers:
        raise UserError(f"gan_layers is {layers}, but the critic has {critic.config.num_layers}; give as many or fewer")
    grid = critic.check_latents(latents, timesteps)
    tokens = critic.embed_latents(latents, timesteps)
    return critic.discriminator(critic.run_blocks(tokens, critic.embed_context(text), grid, layers=layers))
