"""The exact form of sparse kinds, which defines them: softmax attention under a mask, one chunk of queries at a time.

Memory is linear in the number of queries, forward and backward, since scores and masks exist for one chunk only.
Nothing is skipped, so that this takes the time of dense attention.
"""

import abc
import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from monarch_jax import MonarchKVCache
from monarch_jax.checks import brief, index
from monarchrt.models.attention.base import NO_CONTEXT, Attention, CacheShape, Clip, Context, Grid, Layer, Tokens

SORTED = 4096  # longest row of scores that is sorted; longer rows are searched bit by bit
ROWS = 512  # queries per chunk
MOST_FRAMES = 4096  # limit on latent frames, 17 minutes of video: some tables have an entry for each pair of frames
type Keep = Callable[[Int[Array, "C"], Float[Array, "B n C K"]], Bool[Array, "..."]]


def masked_attention(
    query: Float[Array, "B Q n d"],
    key: Float[Array, "B K n d"],
    value: Float[Array, "B K n e"],
    *,
    keep: Keep | None = None,
    visible: Bool[Array, "K"] | None = None,
    rows: int = ROWS,
) -> Float[Array, "B Q n e"]:
    """Softmax attention under a mask, with scale d^-1/2; the softmax is in float32 or wider.

    Gradients are those of the masked softmax; the mask has none.

    Examples:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> before = lambda rows, scores: (rows[:, None] > jnp.arange(8)[None])[None, None]
        >>> masked_attention(x, x, x, keep=before)[0, 0, 0]
        Array([0., 0., 0., 0.], dtype=float32)

    Args:
        query: [B, queries, heads, head_dim].
        key: [B, keys, heads, head_dim].
        value: [B, keys, heads, width].
        keep: (indices of C queries, their scaled scores [B, heads, C, keys]) -> mask that broadcasts to the scores, of
            four axes. None keeps all keys.
        visible: bool [keys], which keys are valid; None: all.
        rows: Queries per chunk.

    Returns:
        [B, queries, heads, width] in the queries' dtype; zero for a query that keeps no key.
    """
    batch, tokens, heads, width = query.shape
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    rows = min(rows, tokens)
    chunks = -(-tokens // rows)
    there = None if visible is None else visible[None, None, None]
    narrow, wide = key.dtype, (key.astype(dtype), value.astype(dtype))  # gradients accumulate over chunks in this dtype

    @jax.checkpoint
    def attend(numbers, part):
        key, value = wide[0].astype(narrow), wide[1]
        scores = jnp.einsum("bcnd,bknd->bnck", part, key, preferred_element_type=dtype) * width**-0.5
        mask = None if keep is None else keep(numbers, lax.stop_gradient(scores))
        if there is not None:
            mask = there if mask is None else mask & there
        if mask is not None:
            scores = jnp.where(mask, scores, -jnp.inf)
        top = lax.stop_gradient(scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))  # 0 in rows that keep no key
        total = jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]  # [B, C, n, 1]
        out = jnp.einsum("bnck,bknd->bcnd", weights, value)  # 16 bits would round the gradient of the weights
        return (out / jnp.where(total == 0.0, 1.0, total)).astype(query.dtype)

    # the last chunk is padded with the index of the last query; the padding's output is dropped
    numbers = jnp.minimum(jnp.arange(chunks * rows), tokens - 1).reshape(chunks, rows)
    parts = jnp.pad(query, ((0, 0), (0, chunks * rows - tokens), (0, 0), (0, 0)))
    parts = jnp.moveaxis(parts.reshape(batch, chunks, rows, heads, width), 1, 0)
    out = lax.map(lambda xs: attend(*xs), (numbers, parts))
    return jnp.moveaxis(out, 0, 1).reshape(batch, chunks * rows, heads, value.shape[-1])[:, :tokens]


def largest(
    scores: Float[Array, "*rows K"], count: int | Int[Array, ""], *, among: Bool[Array, "..."] | None = None
) -> Bool[Array, "*rows K"]:
    """Marks exactly the `count` largest values along the last axis; of equal values the first.

    The threshold is found among the order-preserving integers of float32, for short rows by sorting, which is one
    launch on a GPU, for longer ones by bisection in 32 counts.

    Examples:
        >>> largest(jnp.array([[1.0, 3.0, 2.0, 2.0]]), 2)
        Array([[False,  True,  True, False]], dtype=bool)

    Args:
        scores: [..., K], compared in float32.
        count: Number of values, at most the number of candidates.
        among: Mask of candidates, with as many axes as the scores; None: all.

    Returns:
        bool, the shape of `scores`.
    """
    scores = scores.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.where(scores == 0.0, 0.0, scores), jnp.uint32)  # -0 is 0
    sign = jnp.uint32(1 << 31)
    image = jnp.where(bits >= sign, ~bits, bits | sign)  # in the order of the floats
    if among is not None:
        image = jnp.where(among, image, jnp.uint32(0))

    def bit(at, least):
        higher = least | (jnp.uint32(1 << 31) >> at.astype(jnp.uint32))
        return jnp.where((image >= higher).sum(-1, keepdims=True) >= count, higher, least)

    if image.shape[-1] <= SORTED:
        in_order = jnp.sort(image, axis=-1)
        least = lax.dynamic_slice_in_dim(in_order, image.shape[-1] - jnp.asarray(count, jnp.int32), 1, axis=-1)
    else:
        least = lax.fori_loop(0, 32, bit, jnp.zeros((*image.shape[:-1], 1), jnp.uint32))
    above, equal = image > least, image == least
    chosen = above | (equal & (jnp.cumsum(equal, -1) <= count - above.sum(-1, keepdims=True)))
    return chosen if among is None else chosen & among


@dataclasses.dataclass(frozen=True, kw_only=True)
class Places:
    """Positions in the video of the queries and keys of one call. All queries of a call see the same keys.

    Attributes:
        grid: (F, h, w): frames of the whole clip or of the cache's capacity, and tokens of a frame.
        first: Frame of the first query, which may be traced.
        frames: Number of frames of the queries, which are consecutive.
        key_frames: [F_k], the frame in each slot of keys; negative for slots without one.
        seen: Number of valid frames of keys, which may be traced.
        key_tile: (n_f, n_h, n_w) if keys are in tiled order, and frames are valid in groups of n_f; None: in token
            order.
        stack: Keys and values of all layers of a cache, [1, layers*K, heads, head_dim] each, and the index in them of
            the layer's first key, for kernels that can read them in place. None: there is no such stack.
    """

    grid: Grid
    first: int | Int[Array, ""]
    frames: int
    key_frames: Int[Array, "Fk"] | np.ndarray
    seen: int | Int[Array, ""]
    key_tile: Grid | None = None
    stack: tuple[Array, Array, Int[Array, ""]] | None = None

    @property
    def per_frame(self) -> int:
        """Tokens of a frame."""
        return self.grid[1] * self.grid[2]

    def queries(self, rows: Int[Array, "C"]) -> tuple[Int[Array, "C"], Int[Array, "C"]]:
        """Frame of each of these queries, and its position y*w + x in the frame."""
        return self.first + rows // self.per_frame, rows % self.per_frame

    def keys(self) -> tuple[Int[Array, "K"], Int[Array, "K"]]:
        """Frame of each key, and its position y*w + x in the frame."""
        frames = jnp.asarray(self.key_frames, jnp.int32)
        places = jnp.arange(self.per_frame, dtype=jnp.int32)
        frames, places = jnp.repeat(frames, self.per_frame), jnp.tile(places, frames.shape[0])
        return self._as_keys_lie(frames), self._as_keys_lie(places)

    def _as_keys_lie(self, x: Int[Array, "K"]) -> Int[Array, "K"]:
        """Rearranges an array from token order to the order of the keys."""
        if self.key_tile is None:
            return x
        sides = zip((-1, *self.grid[1:]), self.key_tile, strict=True)
        (_, f), (rows, h), (columns, w) = sides
        return x.reshape(-1, f, rows // h, h, columns // w, w).transpose(0, 2, 4, 1, 3, 5).ravel()

    @property
    def visible(self) -> Bool[Array, "K"] | None:
        """Which keys are valid; None: all."""
        if isinstance(self.seen, int):
            return None
        return jnp.repeat(jnp.asarray(self.key_frames) >= 0, self.per_frame)

    def by_seen(self, function: Callable[[int], int]) -> int | Int[Array, ""]:
        """function(number of valid frames), by a table of exact integers if the number is traced."""
        if isinstance(self.seen, int):
            return function(self.seen)
        return jnp.asarray([function(max(1, frames)) for frames in range(self.grid[0] + 1)], jnp.int32)[self.seen]


def frames_of_slots(cache: MonarchKVCache) -> Int[Array, "F"]:
    """The frame in each slot of a cache; -1 for empty slots."""
    slots, sinks = jnp.arange(cache.capacity, dtype=jnp.int32), cache.sink_frames
    frames = slots
    if cache.rolling:
        rolls = cache.capacity - sinks
        newest = slots + (cache.length - 1 - slots) // rolls * rolls
        frames = jnp.where(slots < sinks, slots, newest)
    return jnp.where((frames >= slots) & (frames < cache.length), frames, -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedAttention(Attention):
    """A kind that implements `attend`, a call whose queries all see the same frames.

    A block-causal clip is computed as one call per block, as over a cache, with the same result.
    """

    @abc.abstractmethod
    def attend(self, query: Array, key: Array, value: Array, places: Places, context: Context) -> Array:
        """Attention of one call's queries to its keys.

        Args:
            query: [B, Q, heads, head_dim].
            key: [B, K, heads, head_dim].
            value: [B, K, heads, width].
            places: Positions of queries and keys in the video.
            context: Place in the network and in generation; its inputs are those of the queries.

        Returns:
            [B, Q, heads, width].
        """

    def attend_clip(self, query: Tokens, key: Tokens, value: Tokens, clip: Clip) -> Tokens:
        """See `Attention`."""
        return self._by_block(query, key, value, clip)

    def _by_block(self, query: Array, key: Array, value: Array, clip: Clip) -> Array:
        """As `attend_clip`, for values of any width."""
        outputs = []
        for start, end in clip.blocks:
            rows, seen = slice(start * clip.per_frame, end * clip.per_frame), slice(end * clip.per_frame)
            places = Places(grid=clip.grid, first=start, frames=end - start, key_frames=np.arange(end), seen=end)
            here = clip.context
            if here.inputs is not None:
                here = dataclasses.replace(here, inputs=_rows_of(here.inputs, rows))
            outputs.append(self.attend(query[:, rows], key[:, seen], value[:, seen], places, here))
        return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)

    def attend_cache(self, cache: Any, query: Tokens, *, layer: Layer = None, context: Context = NO_CONTEXT) -> Tokens:
        """See `Attention`. If the cache has the tiles of another kind, keys are put in token order first."""
        _, height, width = cache.spec.grid
        grid = (cache.capacity, height, width)
        frames = query.shape[1] // (height * width)
        self.check(grid, causal_block=frames)
        self.check_rolling(cache.rolling)
        tile = self.key_tile(cache)
        if tile is None:
            key, value = cache.tokens(layer=layer)
        else:
            key, value = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in _of_layer(cache, layer))
        places = Places(
            grid=grid,
            first=cache.length - frames,
            frames=frames,
            key_frames=frames_of_slots(cache),
            seen=cache.valid_frames,
            key_tile=tile,
            stack=_stack(cache, layer, key.shape[1]) if tile or lies_in(cache, cache.spec.grid) else None,
        )
        out = self.attend(query, key, value, places, context)
        return jnp.where(cache.length < 0, jnp.nan, out)  # a block could not be placed in the cache

    def key_tile(self, cache: MonarchKVCache) -> Grid | None:
        """The tile in whose order `attend` takes keys from this cache; None: it takes them in token order."""
        return None

    def init_cache(self, shape: CacheShape) -> MonarchKVCache:
        """Keys and values in token order."""
        grid = (shape.frames, shape.height, shape.width)
        self.check(grid)
        self.check_rolling(shape.rolling)
        return super().init_cache(shape)

    def check_block(self, grid: Grid, *, whole: Grid | None = None) -> None:
        """Checks the whole clip, whose mask applies, rather than the block."""
        if whole is not None:
            self.check(whole, causal_block=grid[0])

    def for_frames(self, frames: int) -> Attention:
        """Sets the field `frames` if the kind has one and it is None."""
        return dataclasses.replace(self, frames=frames) if getattr(self, "frames", 0) is None else self

    def check_rolling(self, rolling: bool) -> None:
        """Raises ValueError if the kind is not defined over a rolling cache."""

    def attention_map(
        self,
        query: Tokens,
        key: Tokens,
        *,
        grid: Grid,
        causal_block: int | None = None,
        context: Context = NO_CONTEXT,
    ) -> Float[Array, "B n N N"]:
        """The map, computed as the output for unit vectors as values.

        Args:
            query: [B, N, n, d].
            key: As `query`.
            grid: (frames, rows, columns) of the tokens.
            causal_block: Frames that see each other and all earlier ones; None: all frames see each other.
            context: Place of the call in the network and in generation.

        Returns:
            Probabilities, from queries (rows) to keys (columns).
        """
        batch, tokens, heads, _ = query.shape
        units = jnp.broadcast_to(jnp.eye(tokens, dtype=query.dtype)[None, :, None], (batch, tokens, heads, tokens))
        self.check(grid, causal_block=causal_block)
        clip = Clip(grid=grid, causal_block=causal_block, context=context)
        return jnp.moveaxis(self._by_block(query, key, units, clip), 2, 1)


def _of_layer(cache: MonarchKVCache, layer: Layer) -> tuple[Array, Array]:
    """Keys and values of a layer in the order of the cache, [B, tiles, b1, b2, heads, head_dim]."""
    if layer is None:
        return cache.key, cache.value
    key, value = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (cache.key, cache.value))
    return key, value


def _stack(cache: MonarchKVCache, layer: Layer, keys: int) -> tuple[Array, Array, Array] | None:
    """`Places.stack` of a cache with layers and one sample, in which the layers' keys are contiguous; else None."""
    if layer is None or cache.key.shape[1] != 1:
        return None
    key, value = (lax.stop_gradient(x).reshape(1, -1, *x.shape[-2:]) for x in (cache.key, cache.value))
    return key, value, jnp.asarray(layer, jnp.int32) * keys


def lies_in(cache: MonarchKVCache, tile: Grid) -> bool:
    """Whether a cache is in the order of these tiles, each in token order."""
    return (cache.spec.tile_shape, cache.spec.blocks) == (tile, "fh,w")


def _rows_of(inputs: Callable[[], Array], rows: slice) -> Callable[[], Array]:
    return lambda: inputs()[:, rows]


def seen_frames(frames: int, causal_block: int | None) -> np.ndarray:
    """Number of frames that each frame sees, [F].

    Examples:
        >>> seen_frames(5, 2)
        array([2, 2, 4, 4, 5])
    """
    step = frames if causal_block is None else causal_block
    return np.minimum((np.arange(frames) // step + 1) * step, frames)


def warn_exact(kind: str, why: str) -> None:
    """Warns that a call on a GPU saves no time; Python shows the warning once."""
    warnings.warn(f"{kind} runs in its exact form, in the time of dense attention or more: {why}", stacklevel=2)


# Argument checks, and fractions of integers


def ceil_share(share: float, count: int) -> int:
    """ceil(share * count) in exact arithmetic, with the share taken as the decimal number that it is written as.

    Examples:
        >>> ceil_share(0.15, 1260), math.ceil((1 - 0.85) * 1260)
        (189, 190)
    """
    return math.ceil(Fraction(str(share)) * count)


def check_share(kind: str, name: str, value: Any) -> float:
    """The value as a float; raises ValueError unless it is above 0 and at most 1."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.floating) or not 0 < value <= 1:
        raise ValueError(f"{kind}: {name}={value!r} is not a number above 0 and at most 1, such as 0.15.")
    return float(value)


def check_reach(kind: str, keep: float, least: float, of: str, instead: str = "") -> None:
    """Raises ValueError if the least that a kind can keep is more than twice the requested fraction.

    Smaller excesses are due to rounding up to whole keys or blocks.

    Examples:
        >>> check_reach("vsa", 0.1, 1 / 8, "8 cubes")
        >>> check_reach("vsa", 0.05, 1 / 8, "8 cubes", "smaller cubes")
        Traceback (most recent call last):
        ...
        ValueError: vsa: keep=0.05 is out of reach of 8 cubes; the least is 0.125, or less with smaller cubes.

    Args:
        kind: Name of the kind.
        keep: The requested fraction.
        least: The least that the kind can keep.
        of: What the least follows from.
        instead: What could be given for less.

    Raises:
        ValueError: As above; the message names them all.
    """
    if least > 2 * keep:
        instead = f", or less with {instead}" if instead else ""
        raise ValueError(f"{kind}: keep={keep:g} is out of reach of {of}; the least is {least:.4g}{instead}.")


def check_seed(kind: str, seed: int) -> int:
    """The seed as an int; raises ValueError unless it is an integer from 0 to 2**32 - 1."""
    number = index("seed", seed)
    if isinstance(number, jax.Array) or not 0 <= number < 2**32:
        raise ValueError(f"{kind}: seed={brief(seed)} does not lie in 0...2**32 - 1.")
    return number


def check_frames(kind: str, frames: int | None, grid: Grid) -> int:
    """Frames that a mask is made for: `frames`, or the grid's; raises ValueError if the grid has more than `frames`."""
    if frames is not None and grid[0] > frames:
        raise ValueError(f"{kind}: frames={frames} is less than the {grid[0]} of the grid {grid}; leave frames out.")
    return frames or grid[0]


def dividing(sizes: Sequence[int]) -> str:
    """The divisors of each size, for messages: `1, 3 frames; 1, 2, 4 rows; 1, 2, 3, 6 columns`."""
    parts = []
    for size, name in zip(sizes, ("frames", "rows", "columns"), strict=False):
        parts.append(", ".join(str(n) for n in range(1, size + 1) if size % n == 0) + f" {name}")
    return "; ".join(parts)
