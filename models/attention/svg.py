"""Sparse VideoGen (SVG): a band and a sink in one of two token orders, chosen per head."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from monarch_jax.block_mask import BlockMask, block_mask
from monarch_jax.checks import index, positive
from monarchrt.models.attention.base import ALWAYS_WRITTEN, Context, Density, Grid
from monarchrt.models.attention.listed import Blocks, ListedAttention, Order, either, even_starts, frames_of
from monarchrt.models.attention.masked import (
    MOST_FRAMES,
    Places,
    check_frames,
    check_reach,
    check_seed,
    check_share,
    seen_frames,
)

type Number = Callable[[Any, Any], Any]  # (frame, position in the frame) -> index in an order
LISTED = (128, 64)  # queries and keys of a block of the kernels, independent of `block`
MOST_AT_A_TIME = 128  # rows of scores that are computed at a time
MOST_ROWS = 10_000  # limit on the number of compared rows, far above practical values
UNREACHED = 2**30  # index of an invalid key, outside of every band


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVGAttention(ListedAttention):
    """A band around the diagonal and a sink of one frame's length, in one of two token orders per head (SVG, 2025).

    Spatial heads use token order, in which the band covers neighbouring frames and the sink the first frame. Temporal
    heads order tokens by position, p*F + f: the band covers nearby positions in all frames, and the sink the first
    positions of all frames, as many tokens as a frame has. Each call chooses the order for each head and sample: for
    some rows it compares the output of dense attention with the outputs under two coarse masks and takes the closer
    one. The choice has no gradient.

    It was published for use without training; `keep=0.15` is its argument `--sparsity 0.15`, the fraction that the band
    keeps. With the sink it is 19.3% at 480p, as `density` reports. Its authors recommend at least 0.2 to 0.25 for Wan.

    Block-causal attention combines the mask of the whole clip with the causal mask, draws rows from the newest block,
    and reports the mean of both orders as `density`.

    Examples:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> SVGAttention(keep=0.3, block=2)(x, x, x, grid=(2, 2, 2)).shape
        (1, 8, 2, 4)
        >>> print(SVGAttention(keep=0.15).density((21, 30, 52)))
        19.3% of the map (asked for: 15.0%)

    Attributes:
        keep: Fraction of the map in the band, above 0 and at most 1.
        rows: Indices of the rows to compare; or their number, to be drawn with replacement, the same in every call.
        seed: Seed of the draw.
        drawn_from: Number of first rows from which rows are drawn.
        block: Multiple of tokens to which the band's width is rounded up, and size of the blocks of the coarse masks.
        frames: Frames of the clip that determine the orders and the width; None: those of the grid or the cache.
    """

    name = "svg"
    keep: float | int = dataclasses.field(default=0.25, metadata=ALWAYS_WRITTEN)
    rows: int | tuple[int, ...] = 64
    seed: int = 0
    drawn_from: int = 10_000
    block: int = 128
    frames: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self._set(keep=check_share(self.name, "keep", self.keep))
        if isinstance(self.rows, tuple | list):
            rows = tuple(int(index("rows", row)) for row in self.rows)
            if not rows or min(rows) < 0:
                raise ValueError(f"svg: rows={self.rows} are not numbers of rows from 0 on, or how many to draw.")
            self._set(rows=rows)
        else:
            self._set(rows=positive("rows", self.rows, most=MOST_ROWS))
        self._set(seed=check_seed(self.name, self.seed))
        for name in ("drawn_from", "block"):
            self._set(**{name: positive(name, getattr(self, name))})
        if self.frames is not None:
            self._set(frames=positive("frames", self.frames, most=MOST_FRAMES))

    def check(self, grid: Grid | None, *, causal_block: int | None = None) -> None:
        """Raises ValueError unless rows exist in every block, the grid has at most `frames`, and `keep` is feasible."""
        if grid is None:
            return
        whole = check_frames(self.name, self.frames, grid) * grid[1] * grid[2]
        band = 1 - (1 - min(1.0, self.block / whole)) ** 2
        check_reach(self.name, self.keep, band, f"a band of {self.block} of {whole} tokens", "a smaller block")
        least = grid[0] if causal_block is None else (grid[0] % causal_block or min(causal_block, grid[0]))
        tokens = least * grid[1] * grid[2]
        if isinstance(self.rows, tuple) and max(self.rows) >= tokens:
            raise ValueError(
                f"svg: rows={self.rows} has one past the {tokens} queries of a call; use 0 to {tokens - 1}."
            )

    def half_width(self, grid: Grid) -> int:
        """Half-width of the band: pairs of tokens at most this far apart in the order are in it.

        Examples:
            >>> SVGAttention(keep=0.15).half_width((21, 30, 52))
            2560
        """
        tokens = check_frames(self.name, self.frames, grid) * grid[1] * grid[2]
        rest = (1 - Fraction(str(self.keep))) * tokens**2  # entries of the map outside of the band

        def reaches(blocks: int) -> bool:
            """Whether a half-width of this many blocks is at least N*(1 - sqrt(1 - keep)) tokens."""
            outside = tokens - blocks * self.block
            return outside <= 0 or outside**2 <= rest

        blocks = max(0, math.ceil(tokens * (1 - math.sqrt(1 - self.keep)) / self.block) - 1)
        while not reaches(blocks):
            blocks += 1
        return blocks * self.block

    def _orders(self, grid: Grid) -> tuple[Number, Number]:
        """Index of a token in the spatial and in the temporal order."""
        frames, per_frame = check_frames(self.name, self.frames, grid), grid[1] * grid[2]
        return (lambda frame, place: frame * per_frame + place), (lambda frame, place: place * frames + frame)

    def profile_rows(self, tokens: int) -> Int[Array, "R"]:
        """Indices of the queries by which heads are told apart, of a call with so many tokens."""
        if isinstance(self.rows, tuple):
            return jnp.asarray(self.rows, jnp.int32)
        among = min(tokens, self.drawn_from)
        return jax.random.randint(jax.random.key(self.seed), (self.rows,), 0, among, jnp.int32)

    def profile_masks(self, rows: Int[Array, "R"], places: Places) -> list[Bool[Array, "R K"]]:
        """The coarse spatial and temporal masks of some queries, by which the order is chosen."""
        reach, masks = 2 * places.per_frame // self.block, []
        for order in self._orders(places.grid):
            mine, theirs = order(*places.queries(rows)), order(*places.keys())
            near = jnp.abs(mine[:, None] // self.block - theirs[None] // self.block) < reach
            masks.append(near | (theirs < places.per_frame)[None])
        return masks

    def temporal_heads(self, query: Array, key: Array, value: Array, places: Places) -> Bool[Array, "B n"]:
        """Which heads are closer to dense attention under the coarse temporal mask than under the spatial one.

        Arguments are as in `MaskedAttention.attend`. The masks keep pairs of blocks that are less than two frames of
        tokens apart, and the keys of the first frame.
        """
        rows = self.profile_rows(query.shape[1])
        visible = places.visible
        wide = jnp.promote_types(query.dtype, jnp.float32)

        def outputs(rows: Int[Array, "R"]) -> Float[Array, "3 B R n d"]:
            """Outputs of dense attention and under both masks, from one computation of the scores."""
            scores = jnp.einsum("brnd,bknd->bnrk", query[:, rows], key, preferred_element_type=wide)
            scores *= query.shape[-1] ** -0.5
            if visible is not None:
                scores = jnp.where(visible[None, None, None], scores, -jnp.inf)
            masks = self.profile_masks(rows, places)
            kept = [scores, *(jnp.where(mask[None, None], scores, -jnp.inf) for mask in masks)]
            lowest, none = (jnp.asarray(x, wide) for x in (-jnp.inf, 0.0))
            tops = lax.reduce(tuple(kept), (lowest,) * 3, lambda x, y: tuple(map(jnp.maximum, x, y)), (3,))
            weights = [
                jnp.exp(x - jnp.where(top == -jnp.inf, 0.0, top)[..., None]) for x, top in zip(kept, tops, strict=True)
            ]
            totals = lax.reduce(tuple(weights), (none,) * 3, lambda x, y: tuple(map(jnp.add, x, y)), (3,))
            joined = jnp.concatenate(weights, axis=2).astype(value.dtype)  # one matrix product for all three
            out = jnp.einsum("bnrk,bknd->bnrd", joined, value, preferred_element_type=wide)
            total = jnp.concatenate(totals, axis=2)[..., None]
            out = jnp.stack(jnp.split(out / jnp.where(total == 0.0, 1.0, total), 3, axis=2))
            return jnp.moveaxis(out, 2, 3)

        chunk = min(len(rows), MOST_AT_A_TIME)
        chunks = jnp.pad(rows, (0, -len(rows) % chunk), mode="edge").reshape(-1, chunk)
        out = jnp.moveaxis(lax.map(outputs, chunks), 0, 2)  # [3, B, chunks, R, n, d]
        out = out.reshape(*out.shape[:2], -1, *out.shape[4:])[:, :, : len(rows)]
        spatial, temporal = (jnp.square(x - out[0]).mean((1, 3)) for x in out[1:])
        return temporal < spatial  # spatial in case of a tie

    def attend(self, query: Array, key: Array, value: Array, places: Places, context: Context) -> Array:
        """See `MaskedAttention`."""
        fixed = tuple(lax.stop_gradient(x) for x in (query, key, value))
        of_head = self.temporal_heads(fixed[0], fixed[1], fixed[2], places)
        temporal = of_head[:, :, None, None]
        width, sink, key_at = self.half_width(places.grid), places.per_frame, places.keys()

        def band(order: Number, rows: Array) -> Bool[Array, "1 1 C K"]:
            mine, theirs = order(*places.queries(rows)), order(*key_at)
            return ((jnp.abs(mine[:, None] - theirs[None]) <= width) | (theirs < sink)[None])[None, None]

        def keep(rows, scores):
            by_frame, by_place = (band(order, rows) for order in self._orders(places.grid))
            return (temporal & by_place) | (~temporal & by_frame)

        return self.attend_kept(query, key, value, places, keep=keep, blocks=lambda: self._blocks(places, of_head))

    def _blocks(self, places: Places, temporal: Bool[Array, "B n"]) -> Blocks:
        """The mask by blocks, with the tokens of each head in its order."""
        by_frame, by_place = (self._in_order(places, by_place=by_place) for by_place in (False, True))
        return Blocks(
            mask=either(temporal, by_place[0], by_frame[0]),
            queries=Order.either(temporal, by_place[1], by_frame[1]),
            keys=Order.either(temporal, by_place[2], by_frame[2]),
        )

    def _in_order(self, places: Places, *, by_place: bool) -> tuple[BlockMask, Order, Order]:
        """The mask by blocks in one of the orders, and the orders of queries and keys."""
        number = self._orders(places.grid)[by_place]
        width, sink = self.half_width(places.grid), places.per_frame
        orders, numbers, starts, ends = [], [], [], []
        sides = zip(frames_of(places), (places.frames, places.seen), LISTED, strict=True)
        for frames, seen, block in sides:
            order, frame, place = order_of(frames, seen, places.per_frame, by_place=by_place)
            xp: Any = np if isinstance(frame, np.ndarray) and isinstance(place, np.ndarray) else jnp
            orders.append(order)
            numbers.append(xp.where(frame >= 0, number(frame, place), UNREACHED).astype(np.int32))
            starts.append(even_starts(len(place), block))
            ends.append((numbers[-1][starts[-1][:-1]], numbers[-1][starts[-1][1:] - 1]))  # first and last of each block
        low, high = (x[:, None] for x in ends[0])
        key_low, key_high = (x[None] for x in ends[1])
        seen = ((key_low - high <= width) & (low - key_high <= width)) | (key_low < sink)
        whole = ((key_high - low <= width) & (high - key_low <= width)) | (key_high < sink)
        mask = block_mask(
            seen[None, None], query_starts=starts[0], key_starts=starts[1], cut=~whole[None, None], width=width,
            sink=sink, query_places=numbers[0][None, None], key_places=numbers[1][None, None],
        )  # fmt: skip
        return mask, orders[0], orders[1]

    def kept_by_order(self, grid: Grid, *, causal_block: int | None = None) -> tuple[float, float]:
        """Fractions of all N^2 entries that spatial and temporal heads keep, counted exactly."""
        frames, per_frame = check_frames(self.name, self.frames, grid), grid[1] * grid[2]
        tokens, width = grid[0] * per_frame, self.half_width(grid)
        frame, place = np.divmod(np.arange(tokens, dtype=np.int64), per_frame)
        seen = seen_frames(grid[0], causal_block)[frame]

        def spatial(number: np.ndarray) -> np.ndarray:
            """Number of visible keys before an index."""
            return np.clip(number, 0, seen * per_frame)

        def temporal(number: np.ndarray) -> np.ndarray:
            number = np.clip(number, 0, frames * per_frame)
            return number // frames * seen + np.minimum(number % frames, seen)

        shares = []
        for before, order in zip((spatial, temporal), self._orders(grid), strict=True):
            mine = order(frame, place)
            low, high = np.maximum(mine - width, per_frame), np.maximum(mine + width + 1, per_frame)
            kept = before(np.full_like(mine, per_frame)) + before(high) - before(low)
            shares.append(int(kept.sum()) / tokens**2)
        return shares[0], shares[1]

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """Exact; both orders keep the same fraction unless attention is block-causal, for which this is their mean."""
        self.check(grid, causal_block=causal_block)
        kept = sum(self.kept_by_order(grid, causal_block=causal_block)) / 2
        return Density(self.keep, kept, kept / (float(seen_frames(grid[0], causal_block).sum()) / grid[0] ** 2))


def order_of(frames: Any, seen: Any, per_frame: int, *, by_place: bool) -> tuple[Order, Any, Any]:
    """Orders tokens by frame, or by position and then frame; tokens of invalid frames come last, by frame.

    Only the frames are sorted; the index of each token is computed from their order.

    Examples:
        >>> order, frame, place = order_of(np.array([0, 1]), 2, 3, by_place=True)
        >>> order.to.tolist(), order.back.tolist()
        ([0, 3, 1, 4, 2, 5], [0, 2, 4, 1, 3, 5])
        >>> frame.tolist(), place.tolist()
        ([0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2])

    Args:
        frames: [F], the frame of each run of `per_frame` tokens; negative if not valid.
        seen: Number of valid frames.
        per_frame: Tokens of a frame.
        by_place: Whether to order by position first.

    Returns:
        The order, and the frame and the position of each token in this order.
    """
    xp: Any = np if isinstance(frames, np.ndarray) else jnp
    in_time = xp.argsort(xp.where(frames >= 0, frames, UNREACHED), stable=True)
    rank, count = xp.argsort(in_time), len(frames)
    if isinstance(seen, jax.Array):
        xp = jnp
    at, place = np.arange(count * per_frame), np.arange(per_frame)[None]
    turn, where = at // per_frame, at % per_frame
    back = rank[:, None] * per_frame + place
    if by_place:
        there = at < seen * per_frame
        turn, where = xp.where(there, at % seen, turn), xp.where(there, at // seen, where)
        back = xp.where(rank[:, None] < seen, place * seen + rank[:, None], back)
    to = in_time[turn] * per_frame + where
    return Order(to.astype(np.int32), back.ravel().astype(np.int32)), frames[in_time][turn], where
