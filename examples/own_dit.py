"""Monarch attention in a video transformer of your own: as one function, in Flax NNX and in Linen.

    python examples/own_dit.py

The function takes queries, keys and values [batch, tokens, heads, head_dim] whose tokens are ordered by frame, row and
column, after the rotary embedding, and the grid of those tokens. The rest of the model does not change.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen, nnx

from monarch_jax import attention_fn, monarch_attention, sparsity

GRID, TILE = (4, 6, 8), (2, 6, 8)  # frames, rows and columns of tokens; of a tile
HEADS, WIDTH = 4, 64
TOKENS = GRID[0] * GRID[1] * GRID[2]


def rotary(x, grid):
    """A 3-D rotary embedding for [B, N, H, D]: a third of the channels each for frame, row and column."""
    positions = jnp.stack(jnp.meshgrid(*map(jnp.arange, grid), indexing="ij"), -1).reshape(-1, 3)  # [N, 3]
    pairs = x.shape[-1] // 2
    axis = jnp.arange(pairs) % 3
    angles = positions[:, axis] * 100.0 ** -(jnp.arange(pairs) / pairs)  # [N, D/2]
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    a, b = x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


class Block(nnx.Module):
    """A transformer block in NNX; only `attend` differs from one with dense attention."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.norm1, self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs), nnx.LayerNorm(WIDTH, rngs=rngs)
        self.qkv = nnx.Linear(WIDTH, 3 * WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.mlp = nnx.Sequential(
            nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs), jax.nn.gelu, nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        )

    def __call__(self, x):
        q, k, v = (y.reshape(*x.shape[:2], HEADS, -1) for y in jnp.split(self.qkv(self.norm1(x)), 3, axis=-1))
        q, k = rotary(q, GRID), rotary(k, GRID)  # before the attention, as for dense attention
        attended = monarch_attention(q, k, v, grid=GRID, tile=TILE)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.mlp(self.norm2(x))


class LinenBlock(linen.Module):
    """The same idea in Linen, whose own attention layer takes another attention function."""

    @linen.compact
    def __call__(self, x):
        attend = attention_fn(grid=GRID, tile=TILE)
        x = x + linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=attend)(linen.LayerNorm()(x))
        hidden = jax.nn.gelu(linen.Dense(4 * WIDTH)(linen.LayerNorm()(x)))
        return x + linen.Dense(WIDTH)(hidden)


def main() -> None:
    """Runs both forward and backward."""
    x = jax.random.normal(jax.random.key(0), (1, TOKENS, WIDTH))

    block = Block(rngs=nnx.Rngs(0))
    loss, grads = nnx.jit(nnx.value_and_grad(lambda block: jnp.mean(block(x) ** 2)))(block)
    size = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
    print(f"NNX:   loss {loss:.3f}, gradient {size:.3f}")

    model = LinenBlock()
    variables = jax.jit(model.init)(jax.random.key(1), x)

    def mean_square(variables):
        out: Any = model.apply(variables, x)
        return jnp.mean(out**2)

    loss, grads = jax.jit(jax.value_and_grad(mean_square))(variables)
    size = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
    print(f"Linen: loss {loss:.3f}, gradient {size:.3f}")

    dense = monarch_attention(*[x.reshape(1, TOKENS, HEADS, -1)] * 3, grid=GRID, tile=(1, 1, 1))
    print(f"tile {TILE} stores {1 - sparsity(grid=GRID, tile=TILE):.0%} of the map; (1, 1, 1) is dense: {dense.shape}")


if __name__ == "__main__":
    main()
