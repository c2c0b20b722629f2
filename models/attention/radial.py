"""Radial attention: a band in every pair of frames that narrows with their distance."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from monarch_jax.block_mask import block_mask
from monarch_jax.checks import LARGEST, one_of, positive
from monarchrt.models.attention.base import Context, Density, Grid
from monarchrt.models.attention.listed import Blocks, ListedAttention, even_starts, frames_of, is_known
from monarchrt.models.attention.masked import MOST_FRAMES, Places, check_frames, check_share, seen_frames

RULES = ("general", "published")
STEPS = 20  # bisection steps for the decay


@dataclasses.dataclass(frozen=True, kw_only=True)
class RadialAttention(ListedAttention):
    """Tokens see a band around their position in other frames, which halves as the distance doubles (Radial, 2025).

    With d the number of frames between two frames and L the power of two above the tokens of a frame, the band reaches
    decay * L / 2^bit_length(d) tokens to both sides. Where that is less than a block, the band stays one block wide and
    only every n-th distance is kept. All tokens see the first frame. The band is rounded to blocks of tokens.

    rule="published" is the rule as published, with blocks of 128 tokens that may span frames: frames at distance 0 and
    1 are dense (1 only if a frame has at least a block of tokens), and the band never becomes narrower than a block
    whatever the decay, so that it keeps at least 33.8% at 480p.
    rule="general" is dense only at distance 0, also drops distances according to the decay, and starts new blocks in
    each frame; it can keep as little as 9.3% at 480p and 720p.

    Block-causal attention combines the mask of the whole clip with the causal mask. There are no parameters.

    Examples:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> RadialAttention(decay=0.5, block=2)(x, x, x, grid=(2, 2, 2)).shape
        (1, 8, 2, 4)
        >>> print(RadialAttention(decay=0.1).density((21, 30, 52)))
        14.9% of the map

    Attributes:
        keep: Fraction of the map of the whole clip to keep; bisection finds a decay that keeps at most this much.
        decay: Factor of the band's width, instead of `keep`. If neither is given: `keep=0.15`, or `decay=0.2` for the
            published rule.
        rule: "general" or "published".
        block: Tokens of a block; None: 60, which divides a frame of 480p and of 720p, or 128 for the published rule
            (whose authors' code, given 64, drops distances as with 128).
        frames: Frames of the clip to which `keep` and the published blocks refer; None: those of the grid or cache.
    """

    name = "radial"
    keep: float | int | None = None
    decay: float | int | None = None
    rule: str = "general"
    block: int | None = None
    frames: int | None = None

    def __post_init__(self):
        super().__post_init__()
        one_of("rule", self.rule, RULES)
        if self.keep is not None and self.decay is not None:
            raise ValueError(f"radial: keep={self.keep} and decay={self.decay} are both given; leave one out.")
        if self.keep is not None:
            self._set(keep=check_share(self.name, "keep", self.keep))
        if self.decay is not None:
            decay = self.decay
            if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay < float("inf"):
                raise ValueError(f"radial: decay={decay!r} is not a number from 0 on, such as 0.1.")
            self._set(decay=float(decay))
        for name, most in (("block", LARGEST), ("frames", MOST_FRAMES)):
            if getattr(self, name) is not None:
                self._set(**{name: positive(name, getattr(self, name), most=most)})

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.block or (128 if self.rule == "published" else 60)

    def check(self, grid: Grid | None, *, causal_block: int | None = None) -> None:
        """Raises ValueError if the requested fraction is too small for the grid."""
        if grid is not None:
            self.decay_for(grid)

    def check_rolling(self, rolling: bool) -> None:
        """Raises ValueError for the published rule, whose blocks are aligned to the beginning of the clip."""
        if rolling and self.rule == "published":
            raise ValueError(
                "radial: rule='published' has blocks across frames, which end with the clip; a rolling cache needs "
                "rule='general'."
            )

    def decay_for(self, grid: Grid) -> float:
        """The decay on a grid.

        Examples:
            >>> round(RadialAttention(keep=0.15).decay_for((21, 30, 52)), 2)
            0.1

        Raises:
            ValueError: If no decay keeps as little as requested; the message names the least possible.
        """
        if self.decay is not None:
            check_frames(self.name, self.frames, grid)
            return self.decay
        if self.keep is None and self.rule == "published":
            check_frames(self.name, self.frames, grid)
            return 0.2
        frames = check_frames(self.name, self.frames, grid)
        return _decay(self.rule, self.block_size, self.keep or 0.15, frames, grid[1] * grid[2])

    def attend(self, query: Array, key: Array, value: Array, places: Places, context: Context) -> Array:
        """See `MaskedAttention`."""
        frames = check_frames(self.name, self.frames, places.grid)
        decay, block = self.decay_for(places.grid), self.block_size
        key_frame, key_place = places.keys()
        table = block_table(self.rule, block, decay, frames, places.per_frame)
        blocks = jnp.asarray(table)

        def published(rows):
            frame, place = places.queries(rows)
            mine, theirs = ((f * places.per_frame + p) // block for f, p in ((frame, place), (key_frame, key_place)))
            return blocks[mine[:, None], theirs[None]]

        def general(rows):
            frame, place = places.queries(rows)
            distance = jnp.minimum(jnp.abs(frame[:, None] - key_frame[None]), frames - 1)  # sinks may be farther away
            near = blocks[distance, place[:, None] // block, key_place[None] // block]
            return near | (key_frame == 0)[None]

        mask = published if self.rule == "published" else general
        return self.attend_kept(
            query,
            key,
            value,
            places,
            keep=lambda rows, scores: mask(rows)[None, None],
            blocks=lambda: self._listed(places, table, query.shape[1], key.shape[1]),
        )

    def _listed(self, places: Places, table: np.ndarray, queries: int, keys: int) -> Blocks:
        """The mask by blocks; `table` is the result of `block_table`."""
        block, per_frame = self.block_size, places.per_frame
        xp: Any = np if is_known(places) else jnp
        if self.rule == "published":  # blocks are aligned to the clip; the queries may begin inside one
            first = places.first * per_frame
            count = (queries - 1) // block + 2
            numbers = first // block + np.arange(count)
            starts = xp.clip((first // block + np.arange(count + 1)) * block - first, 0, queries)
            ends = even_starts(keys, block, end=places.seen * per_frame)
            seen = xp.asarray(table)[xp.minimum(numbers, len(table) - 1)][:, : len(ends) - 1]
            return Blocks(
                mask=block_mask(seen[None, None], query_starts=starts, key_starts=ends, rows=block, columns=block)
            )
        mine, theirs = frames_of(places)
        count = table.shape[1]
        distance = xp.minimum(abs(mine[:, None] - theirs[None]), table.shape[0] - 1)  # sinks may be farther away
        seen = xp.asarray(table)[distance] | (theirs == 0)[None, :, None, None]
        seen = (seen & (theirs >= 0)[None, :, None, None]).swapaxes(1, 2)
        seen = seen.reshape(1, 1, len(mine) * count, len(theirs) * count)
        edges = np.minimum(np.arange(count) * block, per_frame)
        starts, ends = (
            np.append((np.arange(frames)[:, None] * per_frame + edges).ravel(), frames * per_frame)
            for frames in (len(mine), len(theirs))
        )
        return Blocks(mask=block_mask(seen, query_starts=starts, key_starts=ends))

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """Exact; if `frames` exceeds the grid's, the density of the first part of the clip."""
        frames, per_frame = check_frames(self.name, self.frames, grid), grid[1] * grid[2]
        pairs = _kept(self.rule, self.block_size, self.decay_for(grid), frames, per_frame)[: grid[0], : grid[0]]
        seen = seen_frames(grid[0], causal_block)
        kept = int(pairs[np.arange(grid[0]) < seen[:, None]].sum()) / per_frame**2
        asked = self.keep
        if asked is None:
            asked = kept / int(seen.sum()) if self.decay is not None or self.rule == "published" else 0.15
        return Density(asked, kept / grid[0] ** 2, kept / int(seen.sum()))


def _width(distance: int, *, decay: float, per_frame: int, block: int, general: bool) -> float | None:
    """Half of the band's width at a distance in frames; None if the distance is dropped."""
    if distance == 0:
        return float(per_frame)
    length = 2.0 ** (per_frame.bit_length() - distance.bit_length())
    split = length * decay if general else length
    if split * (distance + 1) <= block or (split < block and distance % int(block / split)):
        return None  # only every int(block / split)-th distance is kept
    if distance == 1 and not general:
        return float(per_frame)
    return max(float(block), length * decay)


def _near_blocks(width: float, rows: np.ndarray, columns: np.ndarray, per_frame: int, full: int | None) -> np.ndarray:
    """The pairs of blocks that are kept for the band between two frames.

    A pair is kept if, of its columns with entries in the band, over 60% have entries in more than a third of the rows.

    Args:
        width: Half-width of the band: tokens whose positions differ by at most this are in it.
        rows: [R + 1], boundaries of the blocks of rows, from 0 or below to `per_frame` or above.
        columns: [C + 1], likewise for columns.
        per_frame: Tokens of a frame.
        full: Number of rows to count for each block; None: its actual number.

    Returns:
        bool [R, C].
    """
    reach, column = int(min(width, per_frame)), np.arange(per_frame)
    starts, ends = np.maximum(rows[:-1], 0), np.minimum(rows[1:], per_frame)
    low, high = np.maximum(starts[:, None], column - reach), np.minimum(ends[:, None] - 1, column + reach)
    count = np.maximum(high - low + 1, 0)
    sizes = (ends - starts if full is None else np.full(len(starts), full))[:, None]
    edges = np.clip(columns, 0, per_frame)

    def by_block(flags: np.ndarray) -> np.ndarray:
        sums = np.concatenate([np.zeros((len(starts), 1), np.int64), flags.cumsum(1)], 1)
        return sums[:, edges[1:]] - sums[:, edges[:-1]]

    return 5 * by_block(3 * count > sizes) > 3 * by_block(count > 0)


@functools.lru_cache(maxsize=64)
def block_table(rule: str, block: int, decay: float, frames: int, per_frame: int) -> np.ndarray:
    """Kept pairs of blocks: of the clip, [blocks, blocks] ("published"), or by distance, [F, blocks, blocks]."""
    width = functools.partial(_width, decay=decay, per_frame=per_frame, block=block, general=rule == "general")
    if rule == "general":
        count = -(-per_frame // block)
        edges = np.minimum(np.arange(count + 1) * block, per_frame)
        kept = np.zeros((frames, count, count), bool)
        for distance in range(frames):
            if (reach := width(distance)) is not None:
                kept[distance] = True if distance == 0 else _near_blocks(reach, edges, edges, per_frame, None)
        return kept
    count, each = -(-frames * per_frame // block), -(-per_frame // block)
    kept = np.zeros((count + 1, count + 1), bool)  # blocks of a frame may extend past the end of the clip
    near = functools.lru_cache(lambda reach, row, column: _pair(reach, row, column, block, per_frame))
    for query in range(frames):
        for key in range(frames):
            reach = float(per_frame) if key == 0 else width(abs(query - key))
            if reach is not None:
                rows, columns = query * per_frame, key * per_frame
                part = near(reach, rows % block, columns % block)
                kept[rows // block : rows // block + each, columns // block : columns // block + each] |= part
    return kept[:count, :count]


def _pair(reach: float, row: int, column: int, block: int, per_frame: int) -> np.ndarray:
    """Kept pairs of blocks for two frames that begin `row` and `column` tokens into a block."""
    steps = np.arange(-(-per_frame // block) + 1) * block
    return _near_blocks(reach, steps - row, steps - column, per_frame, block)


@functools.lru_cache(maxsize=64)
def _kept(rule: str, block: int, decay: float, frames: int, per_frame: int) -> np.ndarray:
    """Number of kept entries for each pair of frames, [F, F]."""
    blocks = block_table(rule, block, decay, frames, per_frame)
    if rule == "general":
        sizes = np.diff(np.minimum(np.arange(blocks.shape[1] + 1) * block, per_frame))
        by_distance = np.einsum("dij,i,j->d", blocks.astype(np.int64), sizes, sizes)
        pairs = by_distance[np.abs(np.arange(frames)[:, None] - np.arange(frames))]
        pairs[:, 0] = per_frame**2
        return pairs
    # number of tokens of each block in each frame
    edges = np.arange(blocks.shape[0] + 1) * block
    starts = np.arange(frames)[:, None] * per_frame
    shared = np.minimum(edges[None, 1:], starts + per_frame) - np.maximum(edges[None, :-1], starts)
    shared = np.maximum(shared, 0)
    return shared @ blocks.astype(np.int64) @ shared.T


@functools.lru_cache(maxsize=64)
def _decay(rule: str, block: int, keep: float, frames: int, per_frame: int) -> float:
    """A decay that keeps at most the requested fraction, found by bisection next to one that keeps more."""

    def kept(decay: float) -> float:
        return int(_kept(rule, block, decay, frames, per_frame).sum()) / (frames * per_frame) ** 2

    low, high = 0.0, 2.0 ** (frames.bit_length() + 1)
    least, most = kept(low), kept(high)
    if keep < least:
        other = "" if rule == "general" else ", or rule='general', which keeps less"
        raise ValueError(
            f"radial: keep={keep} is out of reach on {frames} frames of {per_frame} tokens; the least is {least:.4f}"
            f"{other}."
        )
    if keep >= most:
        return high
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) <= keep else (low, middle)
    return low
