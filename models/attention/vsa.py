"""Video sparse attention (VSA): cubes of tokens choose cubes by their means, beside attention among the means."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from monarch_jax import MonarchKVCache
from monarch_jax.block_sparse import block_mask
from monarch_jax.checks import flag, triple
from monarchrt.models.attention.base import (
    ALWAYS_WRITTEN,
    Attention,
    CacheShape,
    Context,
    Density,
    Grid,
    Sizes,
    zero_linear,
)
from monarchrt.models.attention.listed import Blocks, ListedAttention, Order
from monarchrt.models.attention.masked import (
    Places,
    ceil_share,
    check_reach,
    check_share,
    largest,
    lies_in,
    masked_attention,
    seen_frames,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VSAttention(ListedAttention):
    """Trainable sparse attention in two branches, out = gate * coarse + fine (VSA, 2025).

    Queries, keys and values are averaged over cubes. Coarse: softmax attention among the means, each cube's output
    for all of its tokens. Fine: softmax attention of a cube's tokens to those of the k cubes with the largest scores of
    means, of equal ones the first. The gate is a linear layer of the block's input and zero at the start, so that a
    model begins as `gate=False` is, training-free. Gradients are exact; the choice of cubes has none.

    k is the share of the cubes that are seen, rounded up. Cubes at the end of an axis may hold fewer tokens.
    Block-causal, cubes lie in one block of frames, and a cube chooses among those that its block sees.

    Examples:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> VSAttention(keep=0.5, cube=(1, 2, 1), gate=False)(x, x, x, grid=(2, 2, 2)).shape
        (1, 8, 2, 4)
        >>> VSAttention(keep=0.15).cubes((21, 30, 52)), VSAttention(keep=0.15).cubes_kept(546)
        ((7, 6, 13), 82)

    Attributes:
        keep: Share of the cubes that each cube attends to, above 0 and at most 1.
        cube: (n_f, n_h, n_w) tokens; published is (4, 4, 4), while (3, 5, 4) divides 480p, 720p and blocks of 3 frames.
        gate: Whether there is the coarse branch and its gate, dim x dim and a bias per layer.
    """

    name = "vsa"
    keep: float | int = dataclasses.field(default=0.1, metadata=ALWAYS_WRITTEN)
    cube: tuple[int, int, int] = (3, 5, 4)
    gate: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._set(keep=check_share(self.name, "keep", self.keep))
        self._set(cube=triple("cube", self.cube, "(n_f, n_h, n_w)"))
        flag("gate", self.gate)

    def check(self, grid: Grid | None, *, causal_block: int | None = None) -> None:
        """A cube must lie in one causal block, and one cube of all be about what is asked for."""
        if grid is not None:
            cubes = math.prod(self.cubes(grid))
            check_reach(
                self.name, self.keep, 1 / cubes, f"{cubes} cube{'s' * (cubes > 1)} of {self.cube}", "a smaller cube"
            )
        if causal_block is None or (grid is not None and causal_block >= grid[0]):
            return
        if causal_block % self.cube[0]:
            fitting = ", ".join(str(n) for n in range(1, causal_block + 1) if causal_block % n == 0)
            raise ValueError(
                f"vsa: cube={self.cube} does not lie in one causal block of {causal_block} frames; its first side can "
                f"be {fitting}."
            )

    def init(self, sizes: Sizes, *, rngs: nnx.Rngs) -> nnx.Module | None:
        """The gate: [dim, dim] and a bias, zeros."""
        if not self.gate:
            return None
        return zero_linear(sizes.dim, sizes.num_heads * sizes.head_dim, sizes, rngs=rngs)

    def cubes(self, grid: Grid) -> tuple[int, int, int]:
        """How many cubes there are along each axis."""
        return tuple(-(-size // side) for size, side in zip(grid, self.cube, strict=True))  # type: ignore[return-value]

    def cubes_kept(self, seen: int) -> int:
        """How many of those seen a cube attends to."""
        return ceil_share(self.keep, seen)

    def attend(self, query: Array, key: Array, value: Array, places: Places, context: Context) -> Array:
        """See `MaskedAttention`. Values of another width than the queries', as for a map, get the fine branch alone."""
        height, width = places.grid[1:]
        query_grid, key_grid = (places.frames, height, width), (len(places.key_frames), height, width)
        per_layer = math.prod(self.cubes((1, height, width)))  # cubes in as many frames as a cube has
        in_cubes = places.key_tile is not None
        means = [self._means(query, query_grid), self._means(key, key_grid, in_cubes=in_cubes)]
        scores = jnp.einsum("bcnd,bknd->bnck", *means, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
        there = jnp.asarray(places.key_frames)[:: self.cube[0]] >= 0
        there = jnp.repeat(there, per_layer)[None, None, None]
        count = places.by_seen(lambda frames: self.cubes_kept(-(-frames // self.cube[0]) * per_layer))
        chosen = largest(lax.stop_gradient(scores), count, among=there)
        of_query, of_key = self._cube_of(query_grid), self._cube_of(key_grid)
        if in_cubes:
            of_key = np.sort(of_key)

        def keep(rows, scores):
            return chosen[:, :, jnp.asarray(of_query)[rows]][..., of_key]

        def blocks() -> Blocks:
            starts = [np.concatenate([[0], np.bincount(of).cumsum()]) for of in (of_query, of_key)]
            most = self.cubes_kept(len(starts[1]) - 1)
            mask = block_mask(chosen, query_starts=starts[0], key_starts=starts[1], most=most)
            return Blocks(mask=mask, queries=Order.by(of_query), keys=None if in_cubes else Order.by(of_key))

        out = self.attend_kept(query, key, value, places, keep=keep, blocks=blocks)
        if not self.gate or value.shape[-1] != query.shape[-1]:
            return out
        gate = context.own(self)(_inputs(self, context)).reshape(query.shape)
        coarse = masked_attention(
            means[0], means[1], self._means(value, key_grid, in_cubes=in_cubes), visible=there[0, 0, 0]
        )
        return out + gate.astype(out.dtype) * coarse[:, of_query]

    def _cube_of(self, grid: Grid) -> np.ndarray:
        """The number of each token's cube, [N]."""
        _, rows, columns = self.cubes(grid)
        frame, row, column = (np.arange(size) // side for size, side in zip(grid, self.cube, strict=True))
        return ((frame[:, None, None] * rows + row[:, None]) * columns + column).ravel().astype(np.int32)

    def _means(self, tokens: Float[Array, "B N n d"], grid: Grid, *, in_cubes: bool = False) -> Float[Array, "B C n d"]:
        """Of each cube, summed in float32 or wider; `in_cubes` if tokens lie cube by cube."""
        cubes, of = self.cubes(grid), self._cube_of(grid)
        batch, _, heads, width = tokens.shape
        dtype = jnp.promote_types(tokens.dtype, jnp.float32)
        if in_cubes:
            return tokens.reshape(batch, -1, math.prod(self.cube), heads, width).mean(2, dtype).astype(tokens.dtype)
        cube = tuple(map(min, self.cube, grid))  # one that is larger than the grid holds no more
        padding = [(0, count * side - size) for count, side, size in zip(cubes, cube, grid, strict=True)]
        x = jnp.pad(tokens.reshape(batch, *grid, -1).astype(dtype), ((0, 0), *padding, (0, 0)))
        (f, h, w), (cf, ch, cw) = cubes, cube
        sums = x.reshape(batch, f, cf, h, ch, w, cw, -1).sum((2, 4, 6)).reshape(batch, f * h * w, heads, width)
        count = np.bincount(of).astype(dtype)
        return (sums / count[None, :, None, None]).astype(tokens.dtype)

    def key_tile(self, cache: MonarchKVCache) -> Grid | None:
        """Its cubes."""
        return self.cube if lies_in(cache, self.cube) else None

    def init_cache(self, shape: CacheShape) -> MonarchKVCache:
        """Keys and values cube by cube if cubes divide a frame; else in token order, in groups of a cube's frames."""
        if shape.frames % self.cube[0]:
            raise ValueError(
                f"vsa: a cache of {shape.frames} frames does not hold whole cubes {self.cube}; use a multiple of "
                f"{self.cube[0]}."
            )
        whole = shape.height % self.cube[1] == shape.width % self.cube[2] == 0
        tile = self.cube if whole else (self.cube[0], shape.height, shape.width)
        return MonarchKVCache.init(**shape.fields(), tile=tile)

    def reads(self, cache: Any) -> bool:
        """Caches whose groups of frames are whole numbers of a cube's."""
        return isinstance(cache, MonarchKVCache) and cache.spec.tile_shape[0] % self.cube[0] == 0

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """Of the fine branch, as if all cubes were as large; exact where they are."""
        self.check(grid, causal_block=causal_block)
        per_layer = math.prod(self.cubes((1, *grid[1:])))
        seen = seen_frames(grid[0], causal_block)
        cubes = [-(-int(frames) // self.cube[0]) * per_layer for frames in seen]
        shares = [self.cubes_kept(count) / count for count in cubes]
        kept = sum(share * int(frames) for share, frames in zip(shares, seen, strict=True))
        return Density(self.keep, kept / grid[0] ** 2, kept / int(seen.sum()))


def _inputs(setting: Attention, context: Context) -> Array:
    """What the layer's queries are projections of."""
    if context.inputs is None:
        raise ValueError(f"{setting}: the gate needs the block's input, context.inputs; or set gate=False.")
    return context.inputs()
