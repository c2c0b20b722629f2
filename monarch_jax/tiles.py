"""Rearrangement of tokens into tiles and back, for every layout (paper, Section 4.2)."""

import jax.numpy as jnp
from einops import rearrange

from monarch_jax._typing import Array, Float, Int
from monarch_jax.checks import index
from monarch_jax.spec import MonarchSpec


def _patterns(blocks: str) -> tuple[str, str]:
    rows, cols = (" ".join(part) for part in blocks.split(","))
    return "b (tf f th h tw w) ...", f"b (tf th tw) ({rows}) ({cols}) ..."


def _sizes(spec: MonarchSpec) -> dict[str, int]:
    if not isinstance(spec, MonarchSpec):
        raise ValueError(f"spec={spec!r} is not a MonarchSpec; make one, MonarchSpec(grid=(frames, height, width)).")
    (_, height, width), (n_f, n_h, n_w) = spec.grid, spec.tile_shape
    return {"f": n_f, "h": n_h, "w": n_w, "th": height // n_h, "tw": width // n_w}


def _shape(x: object) -> object:
    return getattr(x, "shape", type(x).__name__)


def tokens_to_tiles(x: Float[Array, "B N *rest"], spec: MonarchSpec) -> Float[Array, "B T b1 b2 *rest"]:
    """Rearranges tokens in (frame, height, width) order into tiles; `x` may have any multiple of n_f frames.

    Examples:
        >>> spec = MonarchSpec(grid=(2, 4, 6), tile=(1, 2, 6))
        >>> tokens_to_tiles(jnp.zeros((1, 48, 3, 8)), spec).shape
        (1, 4, 2, 6, 3, 8)

    Args:
        x: [B, F*h*w, ...].
        spec: Gives the grid's height and width, the tile and the layout; its number of frames is not used.

    Returns:
        [B, tiles, b1, b2, ...], tiles ordered by (frame group, vertical, horizontal) position.

    Raises:
        ValueError: If the tokens are not a whole number of tiles.
    """
    sizes, (_, height, width) = _sizes(spec), spec.grid
    step = sizes["f"] * height * width
    if getattr(x, "ndim", 0) < 2 or x.shape[1] % step:
        raise ValueError(f"x has shape {_shape(x)}; it should be [batch, n*{step}, ...], whole tiles of {spec.grid}.")
    tokens, tiles = _patterns(spec.blocks)
    return rearrange(x, f"{tokens} -> {tiles}", **sizes)


def tiles_to_tokens(x: Float[Array, "B T b1 b2 *rest"], spec: MonarchSpec) -> Float[Array, "B N *rest"]:
    """The inverse of `tokens_to_tiles`.

    Examples:
        >>> spec = MonarchSpec(grid=(2, 4, 6), tile=(2, 2, 3), blocks="w,fh")
        >>> x = jnp.arange(48.0).reshape(1, 48, 1, 1)
        >>> bool((tiles_to_tokens(tokens_to_tiles(x, spec), spec) == x).all())
        True

    Args:
        x: [B, tiles, b1, b2, ...].
        spec: As in `tokens_to_tiles`.

    Returns:
        [B, F*h*w, ...].

    Raises:
        ValueError: If the tiles do not have the sizes of `spec`.
    """
    sizes, group = _sizes(spec), spec.tiles_per_group
    rows, cols = spec.block_rows, spec.block_cols
    if getattr(x, "ndim", 0) < 4 or x.shape[1] % group or x.shape[2:4] != (rows, cols):
        raise ValueError(f"x has shape {_shape(x)}; it should be [batch, n*{group}, {rows}, {cols}, ...].")
    tokens, tiles = _patterns(spec.blocks)
    return rearrange(x, f"{tiles} -> {tokens}", **sizes)


def visible_tiles(spec: MonarchSpec, kv_frames: int | Int[Array, ""] | None = None) -> Int[Array, " A"]:
    """Number of leading key tiles that each query tile sees.

    Key tiles are ordered by time first, so the tiles that a block-causal mask and a partly filled cache leave visible
    are always a prefix. A tile is valid if all of its frames are.

    Examples:
        >>> spec = MonarchSpec(grid=(6, 2, 2), causal_block=3)
        >>> visible_tiles(spec).tolist()
        [3, 3, 3, 6, 6, 6]
        >>> visible_tiles(MonarchSpec(grid=(1, 2, 2), key_frames=6), kv_frames=4).tolist()
        [4]

    Args:
        spec: The attention.
        kv_frames: Leading key frames that are valid, an integer or an int32 scalar; None means all.

    Returns:
        int32 [query tiles].

    Raises:
        ValueError: If kv_frames is not an integer, or is not traced and not a multiple of n_f from n_f to F_k.
    """
    _sizes(spec)
    if kv_frames is None:
        return jnp.asarray(spec.visible_tiles(), jnp.int32)
    n_f, group = spec.tile_shape[0], spec.tiles_per_group
    if isinstance(kv_frames := index("kv_frames", kv_frames), int):
        total = spec.total_key_frames
        if not 0 < kv_frames <= total or kv_frames % n_f:
            raise ValueError(
                f"kv_frames={kv_frames} is not a multiple of the tile's {n_f} frames from {n_f} to {total}."
            )
    valid = jnp.asarray(kv_frames, jnp.int32)
    seen = jnp.full((spec.grid[0] // n_f,), valid // n_f, jnp.int32)
    if spec.causal_block is not None:
        frame = valid - spec.grid[0] + jnp.arange(0, spec.grid[0], n_f, dtype=jnp.int32)
        block_end = (frame // spec.causal_block + 1) * spec.causal_block
        seen = jnp.minimum(seen, block_end // n_f)
    return jnp.repeat(seen, group) * group
