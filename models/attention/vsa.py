"""Video sparse attention (VSA): attention to cubes of tokens selected by their means, and attention among the means."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from monarch_jax import MonarchKVCache
from monarch_jax.block_mask import block_mask
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

    Queries, keys and values are averaged over cubes. Coarse branch: softmax attention among the means; each cube's
    output applies to all of its tokens. Fine branch: softmax attention of a cube's tokens to the tokens of the k cubes
    with the largest scores of means, with ties resolved in favour of earlier cubes. The gate is a linear layer on the
    block's input, initialized to zero, so that a model starts as with `gate=False`, which needs no training. Gradients
    are exact; the choice of cubes has none.

    k is `keep` times the number of visible cubes, rounded up. Cubes at the end of an axis may hold fewer tokens. In
    block-causal attention a cube lies in one block of frames, and its tokens see the cubes that the block sees.

    Examples:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> VSAttention(keep=0.5, cube=(1, 2, 1), gate=False)(x, x, x, grid=(2, 2, 2)).shape
        (1, 8, 2, 4)
        >>> VSAttention(keep=0.15).cubes((21, 30, 52)), VSAttention(keep=0.15).cubes_kept(546)
        ((7, 6, 13), 82)

    Attributes:
        keep: Fraction of the cubes that each cube attends to, above 0 and at most 1.
        cube: (n_f, n_h, n_w), frames, rows and columns of tokens of a cube. (4, 4, 4) was published; (3, 5, 4) divides
            480p, 720p and blocks of 3 frames.
        gate: Whether to add the coarse branch with its gate, dim x dim and a bias per layer.
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
        """Raises ValueError unless cubes lie in causal blocks, and one cube is at most twice the requested fraction."""
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
        """Number of cubes along each axis."""
        return tuple(-(-size // side) for size, side in zip(grid, self.cube, strict=True))  # type: ignore[return-value]

    def cubes_kept(self, seen: int) -> int:
        """Number of cubes that a cube attends to, of those that it sees."""
        return ceil_share(self.keep, seen)

    def attend(self, query: Array, key: Array, value: Array, places: Places, context: Context) -> Array:
        """See `MaskedAttention`. Values whose width is not head_dim, as for a map, use the fine branch only."""
        height, width = places.grid[1:]
        query_grid, key_grid = (places.frames, height, width), (len(places.key_frames), height, width)
        per_layer = math.prod(self.cubes((1, height, width)))  # cubes in the frames of one cube
        in_cubes = places.key_tile is not None
        means = [self._means(query, query_grid), self._means(key, key_grid, in_cubes=in_cubes)]
        scores = jnp.einsum("bcnd,bknd->bnck", *means, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
        there = jnp.asarray(places.key_frames)[:: self.cube[0]] >= 0
        there = jnp.repeat(there, per_layer)[None, None, None]
        count = places.by_seen(lambda frames: self.cubes_kept(-(-frames // self.cube[0]) * per_layer))
        chosen = largest(lax.stop_gradient(scores), count, among=there)
        of_query, of_key = self.cube_of(query_grid), self.cube_of(key_grid)
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

    def cube_of(self, grid: Grid) -> np.ndarray:
        """Index of each token's cube, [N]."""
        _, rows, columns = self.cubes(grid)
        frame, row, column = (np.arange(size) // side for size, side in zip(grid, self.cube, strict=True))
        return ((frame[:, None, None] * rows + row[:, None]) * columns + column).ravel().astype(np.int32)

    def _means(self, tokens: Float[Array, "B N n d"], grid: Grid, *, in_cubes: bool = False) -> Float[Array, "B C n d"]:
        """The mean of each cube, summed in float32 or wider; `in_cubes` if tokens are ordered by cubes."""
        cubes, of = self.cubes(grid), self.cube_of(grid)
        batch, _, heads, width = tokens.shape
        dtype = jnp.promote_types(tokens.dtype, jnp.float32)
        if in_cubes:
            return tokens.reshape(batch, -1, math.prod(self.cube), heads, width).mean(2, dtype).astype(tokens.dtype)
        cube = tuple(map(min, self.cube, grid))  # a cube holds at most the grid
        padding = [(0, count * side - size) for count, side, size in zip(cubes, cube, grid, strict=True)]
        x = jnp.pad(tokens.reshape(batch, *grid, -1).astype(dtype), ((0, 0), *padding, (0, 0)))
        (f, h, w), (cf, ch, cw) = cubes, cube
        sums = x.reshape(batch, f, cf, h, ch, w, cw, -1).sum((2, 4, 6)).reshape(batch, f * h * w, heads, width)
        count = np.bincount(of).astype(dtype)
        return (sums / count[None, :, None, None]).astype(tokens.dtype)

    def key_tile(self, cache: MonarchKVCache) -> Grid | None:
        """The cube, if the cache is in its order."""
        return self.cube if lies_in(cache, self.cube) else None

    def init_cache(self, shape: CacheShape) -> MonarchKVCache:
        """A cache ordered by cubes if these divide a frame; else in token order, in groups of a cube's frames."""
        if shape.frames % self.cube[0]:
            raise ValueError(
                f"vsa: a cache of {shape.frames} frames does not hold whole cubes {self.cube}; use a multiple of "
                f"{self.cube[0]}."
            )
        whole = shape.height % self.cube[1] == shape.width % self.cube[2] == 0
        tile = self.cube if whole else (self.cube[0], shape.height, shape.width)
        return MonarchKVCache.init(**shape.fields(), tile=tile)

    def reads(self, cache: Any) -> bool:
        """Whether the cache's frame groups are whole numbers of a cube's frames."""
        return isinstance(cache, MonarchKVCache) and cache.spec.tile_shape[0] % self.cube[0] == 0

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """The density of the fine branch, assuming cubes of equal size."""
        self.check(grid, causal_block=causal_block)
        per_layer = math.prod(self.cubes((1, *grid[1:])))
        seen = seen_frames(grid[0], causal_block)
        cubes = [-(-int(frames) // self.cube[0]) * per_layer for frames in seen]
        shares = [self.cubes_kept(count) / count for count in cubes]
        kept = sum(share * int(frames) for share, frames in zip(shares, seen, strict=True))
        return Density(self.keep, kept / grid[0] ** 2, kept / int(seen.sum()))


def _inputs(setting: Attention, context: Context) -> Array:
    """The input of the layer's projections; raises ValueError if the context has none."""
    if context.inputs is None:
        raise ValueError(f"{setting}: the gate needs the block's input, context.inputs; or set gate=False.")
    return context.inputs()
