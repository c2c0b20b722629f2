"""Tiled Monarch attention, `monarch_jax.monarch_attention`."""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array

from monarch_jax import MonarchKVCache, flops, monarch_attention
from monarch_jax.checks import triple
from monarch_jax.intermediates import check_intermediates
from monarch_jax.spec import MonarchSpec
from monarch_jax.tiles import tokens_to_tiles
from monarchrt.models.attention.base import (
    NO_CONTEXT,
    NOT_STORED,
    Attention,
    CacheShape,
    Clip,
    Context,
    Density,
    Grid,
    Layer,
    Tokens,
    visible_share,
)
from monarchrt.models.sharding import BY_HEADS, Logical, on_each_device


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonarchAttention(Attention):
    """Tiled Monarch attention (MonarchRT paper, Section 4), without parameters.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> MonarchAttention(tile=(2, 2, 2))(x, x, x, grid=(2, 2, 2)).shape
        (1, 8, 2, 4)
        >>> print(MonarchAttention(tile=(3, 30, 52)).density((21, 30, 52), causal_block=3))
        1.7% of the map, 3.0% of what is visible

    Attributes:
        tile: (n_f, n_h, n_w) in tokens, or None: one tile per frame, (1, h, w).
        blocks: Dimensions that form the rows and columns of a tile, as in `monarch_jax.MonarchSpec`.
        num_iters: Refinement steps T.
        implementation: Backend of `monarch_jax.monarch_attention`; None chooses automatically.
        intermediates: As in `monarch_jax.monarch_attention`: None, or "e4m3" for alpha and Y in 8 bits, for inference.
        keep_intermediates: As in `monarch_jax.monarch_attention`; with `remat="full"` they are kept for one layer at a
            time.
    """

    name = "monarch"
    tile: tuple[int, int, int] | None = None
    blocks: str = "fh,w"
    num_iters: int = 1
    intermediates: str | None = None
    implementation: str | None = dataclasses.field(default=None, metadata=NOT_STORED)
    keep_intermediates: bool = dataclasses.field(default=False, metadata=NOT_STORED)

    def __post_init__(self):
        if self.tile is not None:
            self._set(tile=triple("tile", self.tile, "(n_f, n_h, n_w)"))
        if not isinstance(self.keep_intermediates, bool):
            raise ValueError(f"keep_intermediates={self.keep_intermediates!r} is not True or False.")
        check_intermediates(self.intermediates)
        # a grid that the tile divides: finds errors that do not depend on the grid
        self.spec(self.tile or (1, 1, 1))

    def spec(self, grid: Grid, *, causal_block: int | None = None) -> MonarchSpec:
        """The attention on `grid` (frames, rows, columns of tokens); raises ValueError if the tile does not fit."""
        return MonarchSpec(
            grid=grid, tile=self.tile, blocks=self.blocks, num_iters=self.num_iters, causal_block=causal_block
        )

    @property
    def unit(self) -> Grid | None:
        """The tile."""
        return self.tile

    def check(self, grid: Grid | None, *, causal_block: int | None = None) -> None:
        """Raises ValueError unless the tile divides the grid and lies in one causal block."""
        self.spec(grid or self.tile or (1, 1, 1), causal_block=causal_block)

    def attend_clip(self, query: Tokens, key: Tokens, value: Tokens, clip: Clip) -> Tokens:
        """See `Attention`."""

        def attend(_, query, key, value):
            return monarch_attention(
                query,
                key,
                value,
                grid=clip.grid,
                tile=self.tile,
                blocks=self.blocks,
                num_iters=self.num_iters,
                causal_block=clip.causal_block,
                keep_intermediates=self.keep_intermediates,
                intermediates=self.intermediates,
                implementation=self.implementation,
            )

        return on_each_device(attend, None, (query, key, value), (BY_HEADS,) * 3)

    def init_cache(self, shape: CacheShape) -> MonarchKVCache:
        """A cache in tiled order, so that only new blocks are rearranged."""
        return MonarchKVCache.init(**shape.fields(), tile=self.tile, blocks=self.blocks)

    def reads(self, cache: Any) -> bool:
        """Whether the cache's frame groups are whole numbers of this tile's, in any order within a group."""
        n_f = 1 if self.tile is None else self.tile[0]
        return isinstance(cache, MonarchKVCache) and cache.spec.tile_shape[0] % n_f == 0

    def attend_cache(self, cache: Any, query: Tokens, *, layer: Layer = None, context: Context = NO_CONTEXT) -> Tokens:
        """See `Attention`. A cache in the order of another tile is rearranged in every call, one layer at a time."""
        tile = self.tile or (1, *cache.spec.grid[1:])
        if (cache.spec.tile_shape, cache.spec.blocks) != (tile, self.blocks):
            cache, layer = _retiled(cache, tile, self.blocks, layer), None

        def attend(_, query, key, value, length, *traced):
            return cache.of_arrays(key, value, length).attend(
                query,
                num_iters=self.num_iters,
                layer=traced[0] if traced else layer,
                intermediates=self.intermediates,
                implementation=self.implementation,
            )

        kept: tuple[Logical, ...] = (*(None,) * (cache.key.ndim - 6), "batch", None, None, None, "heads", None)
        arrays: tuple[Array, ...] = (query, cache.key, cache.value, cache.length)
        arrays += (layer,) if isinstance(layer, jax.Array) else ()  # a static index stays static
        return on_each_device(attend, None, arrays, (BY_HEADS, kept, kept, (), ())[: len(arrays)])

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """Stored numbers per entry of the map, 1/b1 + 1/b2 (paper, Section 4.2)."""
        density = self.spec(grid, causal_block=causal_block).density
        return Density(density, density * visible_share(grid, causal_block), density)

    def flops(self, grid: Grid, *, key_frames: int | None = None, heads: int, head_dim: int) -> int:
        """As `monarch_jax.flops`."""
        spec = dataclasses.replace(self.spec(grid), key_frames=key_frames or grid[0])
        return flops(spec, heads=heads, head_dim=head_dim)

    @classmethod
    def from_old_json(cls, data: Any) -> Attention | None:
        """Monarch attention was stored as an object of three fields, without a name."""
        if not isinstance(data, dict) or set(data) != {"tile", "blocks", "num_iters"}:
            return None
        tile = None if data["tile"] is None else tuple(data["tile"])
        return cls(tile=tile, blocks=data["blocks"], num_iters=data["num_iters"])


def _retiled(cache: MonarchKVCache, tile: Grid, blocks: str, layer: Array | None) -> MonarchKVCache:
    """One layer's cache in the order of another tile; only a reshape if both are in token order."""
    _, height, width = cache.spec.grid
    spec = MonarchSpec(grid=(tile[0], height, width), key_frames=cache.capacity, tile=tile, blocks=blocks)
    frames = dataclasses.replace(spec, grid=(cache.capacity, height, width))
    key, value = (tokens_to_tiles(x, frames) for x in cache.tokens(layer=layer))
    # `_newest` is dropped, so gradients are computed for all tiles, which is correct
    return dataclasses.replace(cache, key=key, value=value, spec=spec)
