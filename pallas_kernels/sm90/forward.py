"""The forward pass on Hopper: both stages for one chunk of heads and query tiles after another, or in one kernel.

alpha, c_L and Y of one chunk are all that exists at a time: memory beyond inputs and outputs is bounded. Tiles of few
rows can do without (`fused`).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels.sm90.config import SLAB, ForwardConfig, LeftE4M3Config
from monarchrt.pallas_kernels.sm90.left import left_role
from monarchrt.pallas_kernels.sm90.left_e4m3 import left_e4m3_role
from monarchrt.pallas_kernels.sm90.right import right_role
from monarchrt.pallas_kernels.sm90.right_e4m3 import RightE4M3
from monarchrt.pallas_kernels.sm90.roles import Role, launch
from monarchrt.pallas_kernels.sm90.shared import varying
from monarchrt.pallas_kernels.sm90.types import Index

Arrays = tuple[jax.Array, ...]
Pair = tuple[jax.Array, jax.Array]  # output and log-sum-exp
Results = tuple[jax.Array, jax.Array, Arrays | None]  # the same, and what stage 1 made where it is kept


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


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of a forward pass, shaped for both kernels, and the size of its chunks."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    limits: jax.Array  # int32 [A], pairs that a query tile sees; [1] where each sees all
    heads: int  # of a chunk
    tiles: int  # of a chunk
    scale: float
    masked: bool
    config: ForwardConfig

    @property
    def pairs(self) -> int:
        """C*b1."""
        return self.k.shape[1] * self.k.shape[2]

    @property
    def places(self) -> list[tuple[int, int]]:
        """First head and query tile of each chunk."""
        tiles, heads = self.q.shape[1], self.q.shape[4]
        return [(h, t) for h in range(0, heads, self.heads) for t in range(0, tiles, self.tiles)]

    def start(self, head: Index, tile: Index) -> jax.Array:
        """int32 [3]: a chunk's first head and query tile, and the pairs that anyone needs."""
        depth = self.config.left.key_block
        bound = lax.div(self.limits.max() + depth - 1, depth) * depth
        return jnp.stack([jnp.int32(head), jnp.int32(tile), bound])

    def right(
        self, head: Index, tile: Index, *, values: bool = True, queries: jax.Array | None = None
    ) -> tuple[Role, Arrays]:
        """Stage 1 of the chunk that starts at (head, tile), for `launch`; `values` as `right_role` says.

        `queries`, of a refinement step after the first, are [B * heads, tiles, C*b1, b2, ...].
        """
        batch, tiles, rows, cols, heads, dim = self.q.shape
        thin = (dim // self.config.right.slab, self.config.right.slab)
        q = self.q.reshape(batch, tiles, rows, cols, heads, *thin)
        k, v = (x.reshape(batch, self.pairs, cols, heads, *thin) for x in (self.k, self.v))
        role = right_role(
            like(q),
            like(k),
            scale=self.scale,
            heads=self.heads,
            tiles=self.tiles,
            key_block=self.config.left.key_block,
            masked=self.masked,
            config=self.config.right,
            kind=RightE4M3 if isinstance(self.config.left, LeftE4M3Config) else None,
            values=values,
            further=queries is not None,
        )
        own = q if queries is None else queries.reshape(*queries.shape[:4], *thin)
        return role, (own, k, v, self.limits, self.start(head, tile))

    def left(self, head: Index, tile: Index, made: Arrays) -> tuple[Role, Arrays]:
        """Stage 2 of a chunk from what stage 1 made, for `launch`."""
        batch, tiles, rows, cols, heads, dim = self.q.shape
        slabs = dim // SLAB
        q = self.q.reshape(batch, tiles, rows, cols * heads, slabs, SLAB)
        alpha, y, *numbers = made
        config, sizes = self.config.left, {"heads": self.heads, "tiles": self.tiles, "masked": self.masked}
        if isinstance(config, LeftE4M3Config):
            alpha, y = (x.reshape(-1, *x.shape[2:]) for x in (alpha, y))
            role = left_e4m3_role(like(self.q), self.pairs, scale=self.scale, config=config, **sizes)
        else:
            alpha, y = (x.reshape(-1, self.pairs, cols, slabs, SLAB) for x in (alpha, y))
            role = left_role(like(self.q), self.pairs, scale=self.scale, config=config, **sizes)
        return role, (q, alpha, y, *numbers, self.limits, self.start(head, tile))

    def tiled(self, out: jax.Array, lse: jax.Array) -> Pair:
        """The chunk's output [B, tiles, b1, b2, heads, D] and log-sum-exp [B, tiles, b1, b2, heads]."""
        batch, _, rows, cols, _, dim = self.q.shape
        lse = lse.reshape(batch, self.heads, self.tiles, cols, -1)[..., :rows].transpose(0, 2, 4, 3, 1)
        return out.reshape(batch, self.tiles, rows, cols, self.heads, dim), lse


def tiles_seen(visible: jax.Array, key_tiles: int, masked: bool) -> jax.Array:
    """int32 [A], key tiles that a query tile sees. Where each sees all, no kernel reads it and one number will do.

    One number is a constant of the program; several equal ones are written by a kernel in every call.
    """
    if not masked:
        return jnp.full(1, key_tiles, jnp.int32)
    return jnp.minimum(visible, key_tiles).astype(jnp.int32)


def like(x: jax.Array) -> jax.ShapeDtypeStruct:
    """Its shape and dtype."""
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def fill_chunks(call: Call, chunk: Callable[[Index, Index], Pair]) -> Pair:
    """The whole output and log-sum-exp, from those of one chunk after another, `chunk(head, tile)`."""
    q, k, places = call.q, call.k, call.places
    if len(places) == 1:
        return chunk(0, 0)
    empty = (varying(lax.empty(q.shape, q.dtype), q, k), varying(lax.empty(q.shape[:-1], jnp.float32), q, k))

    def body(n, whole):
        head, tile = jnp.array(places, jnp.int32)[n]
        at = [jnp.int32(x) for x in (0, tile, 0, 0, head, 0)]
        parts = zip(whole, chunk(head, tile), strict=True)
        out, lse = (lax.dynamic_update_slice(x, part, at[: x.ndim]) for x, part in parts)
        return out, lse

    return lax.fori_loop(0, len(places), body, empty)


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible: jax.Array,
    *,
    scale: float,
    masked: bool,
    config: ForwardConfig,
    keep: bool = False,
) -> Results:
    """The output and log-sum-exp, as `pallas_kernels.forward`.

    Args:
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        v: As k.
        visible: int32 [A].
        scale: Softmax scale.
        masked: Whether `visible` may hide a key tile.
        config: Sizes.
        keep: Whether alpha, Y and c_L of all chunks are wanted; then there is one.

    Returns:
        out [B, A, b1, b2, H, D], lse [B, A, b1, b2, H] in float32, and if wanted alpha, Y and c_L as `right_role` says.

    Raises:
        ValueError: If the sizes have clusters that cannot serve these tiles.
    """
    batch, tiles, rows, cols, heads, dim = q.shape
    limits = tiles_seen(visible, k.shape[1], masked) * rows
    config.fused.check(rows, cols, dim)
    if config.fused.clusters and not keep:
        from monarchrt.pallas_kernels.sm90.fused import fused

        return *fused(q, k, v, limits, scale=scale, masked=masked, config=config.fused), None
    pair_bytes = (2 if isinstance(config.left, LeftE4M3Config) else 4) * k.shape[1] * rows * cols * dim
    limit = batch * heads * tiles * pair_bytes if keep else config.chunk_bytes
    chunk_heads, chunk_tiles = chunk_sizes(batch, heads, tiles, pair_bytes, limit)
    call = Call(q, k, v, limits, chunk_heads, chunk_tiles, scale, masked, config)
    if keep:
        return _chunk(call, 0, 0)
    return *fill_chunks(call, lambda head, tile: _chunk(call, head, tile)[:2]), None


def _chunk(call: Call, head: Index, tile: Index) -> tuple[jax.Array, jax.Array, Arrays]:
    """One stage after the other: the output, the log-sum-exp and what stage 1 made."""
    made = launch(*call.right(head, tile))
    out, lse = launch(*call.left(head, tile, made))
    return *call.tiled(out, lse), made
