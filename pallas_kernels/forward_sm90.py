"""The forward pass on Hopper: both stages for one chunk of heads and query tiles after another.

alpha, c_L and Y of a chunk are all that exists at a time, so the memory beyond inputs and outputs is bounded.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.config import SLAB, LeftConfig, RightConfig
from pallas_kernels.left_sm90 import left
from pallas_kernels.right_sm90 import right

CHUNK_BYTES = 1536 * 2**20  # alpha and Y of a chunk, when a single head and query tile does not need more


def chunk_sizes(batch: int, heads: int, tiles: int, pair_bytes: int, limit: int) -> tuple[int, int]:
    """Heads and query tiles per chunk: divisors of both; all query tiles of fewer heads before fewer query tiles.

    Args:
        batch: B.
        heads: H.
        tiles: A.
        pair_bytes: Bytes of alpha and Y of one head and query tile.
        limit: Bytes a chunk may use, unless one head and query tile use more.

    Returns:
        (heads, tiles).
    """

    def fits(h: int, t: int) -> bool:
        return batch * h * t * pair_bytes <= limit

    chunk_heads = next((h for h in _divisors(heads) if fits(h, tiles)), 1)
    return chunk_heads, next((t for t in _divisors(tiles) if fits(chunk_heads, t)), 1)


def _divisors(n: int) -> list[int]:
    return [d for d in range(n, 0, -1) if n % d == 0]


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    *,
    scale: float,
    masked: bool,
    right_config: RightConfig,
    left_config: LeftConfig,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[jax.Array, jax.Array]:
    """The output and log-sum-exp, as `pallas_kernels.forward`.

    Args:
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        v: As k.
        visible: int32 [A].
        scale: Softmax scale.
        masked: Whether `visible` may hide a key tile.
        right_config: Sizes of stage 1.
        left_config: Sizes of stage 2.
        chunk_bytes: Bytes of alpha and Y that may exist at a time.

    Returns:
        out [B, A, b1, b2, H, D] and lse [B, A, b1, b2, H] in float32.
    """
    batch, tiles, rows, cols, heads, dim = q.shape
    slabs, pairs = dim // SLAB, k.shape[1] * rows
    limits = jnp.minimum(visible, k.shape[1]).astype(jnp.int32) * rows
    depth = left_config.key_block
    bound = (limits.max() + depth - 1) // depth * depth
    thin = (dim // right_config.slab, right_config.slab)
    by_row = q.reshape(batch, tiles, rows, cols, heads, *thin)
    by_column = q.reshape(batch, tiles, rows, cols * heads, slabs, SLAB)
    keys, values = (x.reshape(batch, pairs, cols, heads, *thin) for x in (k, v))
    pair_bytes = 4 * pairs * cols * dim
    chunk_heads, chunk_tiles = chunk_sizes(batch, heads, tiles, pair_bytes, chunk_bytes)
    sizes = dict(scale=scale, heads=chunk_heads, tiles=chunk_tiles, masked=masked)

    def chunk(head: jax.Array, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = jnp.stack([head, tile, bound]).astype(jnp.int32)
        alpha, y, c = right(by_row, keys, values, limits, start, key_block=depth, config=right_config, **sizes)
        alpha, y = (x.reshape(-1, pairs, cols, slabs, SLAB) for x in (alpha, y))
        out, lse = left(by_column, alpha, y, c, limits, start, config=left_config, **sizes)
        lse = lse.reshape(batch, chunk_heads, chunk_tiles, cols, -1)[..., :rows].transpose(0, 2, 4, 3, 1)
        return out.reshape(batch, chunk_tiles, rows, cols, chunk_heads, dim), lse

    if (chunk_heads, chunk_tiles) == (heads, tiles):
        return chunk(jnp.int32(0), jnp.int32(0))

    def body(i, carry):
        head, tile = i // (tiles // chunk_tiles) * chunk_heads, i % (tiles // chunk_tiles) * chunk_tiles
        parts = chunk(head, tile)
        zero = jnp.int32(0)
        at = (zero, tile, zero, zero, head, zero)
        return tuple(lax.dynamic_update_slice(x, part, at[: x.ndim]) for x, part in zip(carry, parts, strict=True))

    empty = (jnp.zeros(q.shape, q.dtype), jnp.zeros(q.shape[:-1], jnp.float32))
    return lax.fori_loop(0, heads // chunk_heads * (tiles // chunk_tiles), body, empty)
