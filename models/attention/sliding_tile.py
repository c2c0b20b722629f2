"""Sliding tile attention (STA): every tile of tokens sees the tiles of a window around it."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from monarch_jax import MonarchKVCache
from monarch_jax.block_mask import block_mask
from monarch_jax.checks import positive, triple
from monarchrt.models.attention.base import CacheShape, Context, Density, Grid
from monarchrt.models.attention.listed import Blocks, ListedAttention, Order, frames_of, is_known
from monarchrt.models.attention.masked import MOST_FRAMES, Places, check_frames, dividing, lies_in, seen_frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlidingTileAttention(ListedAttention):
    """Tokens of a tile see the tokens of all tiles in a window around it (STA, 2025).

    At the borders the window is moved inwards rather than cut off. An even side counts as the next odd one, as
    published. Block-causal attention combines the mask of the whole clip with the causal mask. There are no parameters;
    it was published for use without training and with finetuning, with windows that were searched per head.

    Examples:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> SlidingTileAttention(tile=(1, 1, 1), window=(1, 1, 1))(x, x, x, grid=(2, 2, 2)).shape
        (1, 8, 2, 4)
        >>> print(SlidingTileAttention(tile=(3, 5, 4), window=(3, 3, 9)).density((21, 30, 52)))
        14.8% of the map

    Attributes:
        tile: (n_f, n_h, n_w), frames, rows and columns of tokens of a tile.
        window: (frames, rows, columns) of the window in tiles, one for all heads or a tuple with one per head.
        frames: Frames of the clip, at whose end the window is moved inwards; None: those of the grid or the cache.
    """

    name = "sliding_tile"
    tile: tuple[int, int, int] = (3, 5, 4)
    window: tuple[int, int, int] | tuple[tuple[int, int, int], ...] = (3, 3, 9)
    frames: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self._set(tile=triple("tile", self.tile, "(n_f, n_h, n_w)"))
        window: Any = self.window
        if isinstance(window, tuple | list) and window and all(isinstance(item, tuple | list) for item in window):
            window = tuple(triple("window", item, "(frames, rows, columns) in tiles") for item in window)
        else:
            window = triple("window", window, "(frames, rows, columns) in tiles")
        self._set(window=window)
        if self.frames is not None:
            self._set(frames=positive("frames", self.frames, most=MOST_FRAMES))

    def _windows(self) -> tuple[tuple[int, int, int], ...]:
        """The windows: one for all heads, or one per head."""
        return self.window if isinstance(self.window[0], tuple) else (self.window,)  # type: ignore[return-value]

    def check(self, grid: Grid | None, *, causal_block: int | None = None) -> None:
        """Raises ValueError unless tiles divide the grid."""
        if grid is None:
            return
        grid = (check_frames(self.name, self.frames, grid), *grid[1:])
        if any(size % side for size, side in zip(grid, self.tile, strict=True)):
            raise ValueError(
                f"sliding_tile: tile={self.tile} does not divide the grid {grid}; these do: {dividing(grid)}."
            )

    def check_rolling(self, rolling: bool) -> None:
        """Raises ValueError for a rolling cache, since the clip has no last tile at which to move the window."""
        if rolling:
            raise ValueError(
                "sliding_tile: a rolling cache has no end at which to move the window inwards; generate only "
                "as much as fits the cache."
            )

    def key_tile(self, cache: MonarchKVCache) -> Grid | None:
        """The tile, if the cache is in its order."""
        return self.tile if lies_in(cache, self.tile) else None

    def init_cache(self, shape: CacheShape) -> MonarchKVCache:
        """A cache in tiled order if blocks are known to be whole tiles, else in token order."""
        cache = super().init_cache(shape)
        if shape.block is None or shape.block % self.tile[0] or shape.frames % self.tile[0]:
            return cache
        return MonarchKVCache.init(**shape.fields(), tile=self.tile)

    def attend(self, query: Array, key: Array, value: Array, places: Places, context: Context) -> Array:
        """See `MaskedAttention`."""
        windows, heads = self._windows(), query.shape[2]
        if len(windows) not in (1, heads):
            raise ValueError(f"sliding_tile: {len(windows)} windows are not one, or one for each of {heads} heads.")
        grid = (check_frames(self.name, self.frames, places.grid), *places.grid[1:])
        tiles = [size // side for size, side in zip(grid, self.tile, strict=True)]

        def tile_of(frame, place):
            at = (frame, place // grid[2], place % grid[2])
            return [number // side for number, side in zip(at, self.tile, strict=True)]

        halves = np.array(windows) // 2  # [1 or n, 3]
        near = [near_tiles(count, halves[:, axis]) for axis, count in enumerate(tiles)]
        key_tiles = tile_of(*places.keys())

        # by lookup in small tables: XLA miscompiles the written-out comparisons for GPUs (jax 0.11.2)
        def keep(rows, scores):
            mask = jnp.ones((1, 1, 1, 1), bool)
            for table, mine, theirs in zip(near, tile_of(*places.queries(rows)), key_tiles, strict=True):
                of_queries = jnp.asarray(table).at[:, mine].get(mode="clip")  # [1 or n, C, tiles]
                mask &= of_queries.at[:, :, theirs].get(mode="clip")[None]
            return mask

        return self.attend_kept(query, key, value, places, keep=keep, blocks=lambda: self._blocks(places, tiles, near))

    def _blocks(self, places: Places, tiles: list[int], tables: list[np.ndarray]) -> Blocks:
        """The mask by blocks, the parts of tiles in the frames of the call; `tables` are from `near_tiles`."""
        (_, rows, columns), place = tiles, np.arange(places.per_frame)
        of_place = place // places.grid[2] // self.tile[1] * columns + place % places.grid[2] // self.tile[2]
        # if frames of the cache are valid by whole tiles, as for tiles of one frame, only indices of tiles are traced
        even = not is_known(places) and (self.tile[0] == 1 or places.key_tile is not None)
        sides = zip(frames_of(places), (places.first, 0), strict=True)  # the cache does not roll: slots are frames
        starts, groups, orders = zip(
            *(self._side(frames, first, of_place, rows * columns, even=even) for frames, first in sides), strict=True
        )
        near = []  # for each axis, [1 or n, blocks of queries, blocks of keys]
        numbers = (groups, [np.arange(rows)] * 2, [np.arange(columns)] * 2)
        for table, (mine, theirs) in zip(tables, numbers, strict=True):
            xp: Any = np if all(isinstance(x, np.ndarray) for x in (mine, theirs)) else jnp
            seen = xp.take(xp.take(xp.asarray(table), mine, axis=1, mode="clip"), theirs, axis=2, mode="clip")
            near.append(seen & (theirs >= 0)[None, None])
        in_frames, in_rows, in_columns = near
        seen = in_frames[:, :, None, None, :, None, None] & in_rows[:, None, :, None, None, :, None]
        seen = seen & in_columns[:, None, None, :, None, None, :]
        seen = seen.reshape(len(tables[0]), len(starts[0]) - 1, len(starts[1]) - 1)
        most = [math.prod(self.tile[1:]) * min(self.tile[0], n) for n in (places.frames, len(places.key_frames))]
        most = [None if isinstance(x, np.ndarray) else size for x, size in zip(starts, most, strict=True)]
        longest = math.prod(int(table.sum(2).max()) for table in tables)
        mask = block_mask(
            seen[None], query_starts=starts[0], key_starts=starts[1], rows=most[0], columns=most[1], most=longest
        )
        return Blocks(mask=mask, queries=orders[0], keys=None if places.key_tile else orders[1])

    def _side(self, frames: Any, first: Any, of_place: np.ndarray, per_layer: int, *, even: bool) -> tuple:
        """First tokens of the blocks of queries or keys, index in time of each layer of tiles, and order of the tokens.

        Args:
            frames: The frame of each frame of tokens; negative if not valid.
            first: The first of them.
            of_place: Index of the tile of each position in a frame.
            per_layer: Tiles of a frame.
            even: Whether the frames form whole tiles.
        """
        depth, count = self.tile[0], len(frames)
        if even:
            of_frame, numbers = np.arange(count) // depth, (frames // depth)[::depth]
            sizes = np.full(count // depth, depth)
        else:
            of_frame = (np.arange(count) + first % depth) // depth
            most = int(of_frame[-1]) + 1 if isinstance(of_frame, np.ndarray) else (count + depth - 2) // depth + 1
            sizes = ((of_frame[None] == np.arange(most)[:, None]) & (frames >= 0)[None]).sum(1)
            of_frame = of_frame + (frames < 0) * most  # invalid frames come last
            numbers = first // depth + np.arange(most)
        xp: Any = np if isinstance(sizes, np.ndarray) else jnp
        sizes = xp.repeat(sizes * math.prod(self.tile[1:]), per_layer)
        starts = xp.concatenate([np.zeros(1, np.int32), sizes.cumsum()])
        return starts, numbers, Order.by((of_frame[:, None] * per_layer + of_place[None]).ravel())

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """Exact; the mean over heads."""
        self.check(grid, causal_block=causal_block)
        frames = check_frames(self.name, self.frames, grid)
        seen = seen_frames(grid[0], causal_block)
        total = 0
        for window in self._windows():
            near = []
            for size, side, length in zip((frames, *grid[1:]), self.tile, window, strict=True):
                near.append(near_tiles(size // side, np.array([length // 2]))[0])
            pairs = near[0].repeat(self.tile[0], 0).repeat(self.tile[0], 1)[: grid[0], : grid[0]]
            pairs = pairs & (np.arange(grid[0]) < seen[:, None])
            total += int(pairs.sum()) * math.prod(int(axis.sum()) for axis in near[1:])
        tiles = math.prod((size // side) ** 2 for size, side in zip(grid[1:], self.tile[1:], strict=True))
        total /= len(self._windows()) * tiles
        kept, visible = total / grid[0] ** 2, total / int(seen.sum())
        return Density(visible, kept, visible)


def near_tiles(count: int, halves: np.ndarray) -> np.ndarray:
    """Which of `count` tiles along an axis see which, [n, count, count], for windows of half-widths [n]."""
    half = halves[:, None]
    centre = np.minimum(np.maximum(np.arange(count)[None], half), count - 1 - half)
    return np.abs(centre[:, :, None] - np.arange(count)) <= half[:, :, None]
