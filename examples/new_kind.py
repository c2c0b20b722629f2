"""An attention kind of your own, which works in every part of the project: training, checkpoints, generation.

    python examples/new_kind.py

A kind is a frozen dataclass with a name. In this one, tokens see their own frame and the frames near it, and the output
of each head is scaled by a factor that is learned.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from monarchrt.models.attention import base, registry
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.causal import cached_forward, init_cache


class Gain(nnx.Module):
    """The parameters that each layer of this kind has: one number for each head, starting at zero."""

    def __init__(self, heads: int, *, rngs: nnx.Rngs):
        self.gain = nnx.Param(jnp.zeros((heads, 1)))


@registry.register
@dataclasses.dataclass(frozen=True, kw_only=True)
class NearFrames(base.Attention):
    """Attention to frames at most `reach` away, with a learned gain for each head."""

    name = "near"
    reach: int = 1

    def init(self, sizes, *, rngs):
        return Gain(sizes.num_heads, rngs=rngs)

    def attend_clip(self, query, key, value, clip):
        frame = jnp.arange(query.shape[1]) // clip.per_frame
        seen = jnp.abs(frame[:, None] - frame) <= self.reach
        if clip.causal_block is not None:
            seen &= frame // clip.causal_block <= (frame // clip.causal_block)[:, None]
        out = jax.nn.dot_product_attention(query, key, value, mask=seen[None, None])
        return out * (1 + clip.context.own(self).gain[...])

    def attend_cache(self, cache, query, *, layer=None, context=base.NO_CONTEXT):
        _, height, width = cache.spec.grid
        key, value = cache.tokens(layer=layer)
        frames = jnp.arange(key.shape[1]) // (height * width)
        newest = cache.length - query.shape[1] // (height * width) + jnp.arange(query.shape[1]) // (height * width)
        seen = (jnp.abs(newest[:, None] - frames) <= self.reach) & (frames < cache.length)
        out = jax.nn.dot_product_attention(query, key, value, mask=seen[None, None])
        return out * (1 + context.own(self).gain[...])

    def density(self, grid, *, causal_block=None, steps=None):
        near = sum(abs(i - j) <= self.reach for i in range(grid[0]) for j in range(grid[0])) / grid[0] ** 2
        return base.Density(near, near, near / base.visible_share(grid, causal_block))


def main() -> None:
    """Trains a network of this kind for a few steps, then computes a block of frames with a cache."""
    config = wan_config("tiny", num_layers=2, attention=NearFrames(reach=1))
    model = WanModel(config, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    clip, noise = jax.random.normal(jax.random.key(0), (2, 1, 6, 4, 8, 16))
    text = jnp.zeros((1, 5, config.text_dim))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model((clip + noise) / 2, jnp.array([500.0]), text) - (noise - clip)) ** 2)

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(model, optimizer)) for _ in range(5)]
    print(f"{config.attention}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    cache = init_cache(model, text, frames=6, height=4, width=8)
    flow, cache = nnx.jit(cached_forward)(model, noise[:, :3], jnp.full((1, 3), 1000.0), cache)
    print(f"with the cache: {flow.shape}, {int(cache.length)} frames")


if __name__ == "__main__":
    main()
