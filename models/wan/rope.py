"""Wan's 3-D rotary position embedding: tables for a grid of tokens, and the rotation."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

MAX_POSITIONS = 1024
THETA = 10000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that encode time, height and width.

    Examples:
        >>> axis_widths(128)
        (44, 42, 42)
    """
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def frequencies(width: int) -> np.ndarray:
    """Frequencies of one axis, theta_j = 10000^(-2j/width), [width/2] float64."""
    return THETA ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def axis_table(positions: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of position times frequency, [positions, width/2] float32, computed in float64.

    Angles computed in float32 would have errors of up to 5e-5 over 1024 positions.
    """
    angles = np.outer(positions.astype(np.float64), frequencies(width))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rope_table(
    grid: tuple[int, int, int], head_dim: int, *, start_frame: int | Array = 0
) -> tuple[Float[Array, "F S half"], Float[Array, "F S half"]]:
    """Cosines and sines for every token of `grid`.

    Each axis has its own channels and frequencies; only the tables of the axes become constants of the program.

    Examples:
        >>> cos, sin = rope_table((3, 2, 4), 24, start_frame=6)
        >>> cos.shape
        (3, 8, 12)

    Args:
        grid: (F, h, w) tokens.
        head_dim: Channels of a head, even.
        start_frame: Absolute index of the first frame, for generation with a cache; static or a traced int32 scalar.

    Returns:
        cos, sin: [F, h*w, head_dim/2] float32, pairs ordered time, height, width.

    Raises:
        ValueError: If a position is 1024 or more; with a traced `start_frame` the result is NaN instead.
    """
    frames, height, width = grid
    last = frames + (start_frame if isinstance(start_frame, int) else 0)
    for name, size in (("frames", last), ("height", height), ("width", width)):
        if size > MAX_POSITIONS:
            raise ValueError(f"{name}: position {size - 1} is beyond the rotary table's {MAX_POSITIONS} positions.")
    time_width, height_width, width_width = axis_widths(head_dim)
    if isinstance(start_frame, int):
        time = axis_table(np.arange(start_frame, start_frame + frames), time_width)
    else:
        inside = start_frame + frames <= MAX_POSITIONS
        time = tuple(
            jnp.where(inside, jax.lax.dynamic_slice_in_dim(jnp.asarray(table), start_frame, frames), jnp.nan)
            for table in axis_table(np.arange(MAX_POSITIONS), time_width)
        )
    rows = axis_table(np.arange(height), height_width)
    columns = axis_table(np.arange(width), width_width)

    def combine(t, y, x):
        parts = (t[:, None, None, :], y[None, :, None, :], x[None, None, :, :])
        full = [jnp.broadcast_to(part, (frames, height, width, part.shape[-1])) for part in parts]
        return jnp.concatenate(full, axis=-1).reshape(frames, height * width, head_dim // 2)

    return combine(time[0], rows[0], columns[0]), combine(time[1], rows[1], columns[1])


def rotate(
    x: Float[Array, "B F S n d"], cos: Float[Array, "F S half"], sin: Float[Array, "F S half"]
) -> Float[Array, "B F S n d"]:
    """Rotates adjacent channel pairs (2m, 2m+1) by angle m, in float32 or wider.

    Examples:
        >>> cos, sin = rope_table((1, 1, 2), 12)
        >>> x = jnp.ones((1, 1, 2, 1, 12))
        >>> bool(jnp.allclose(rotate(x, cos, sin)[0, 0, 0], x[0, 0, 0]))  # position 0 is not rotated
        True

    Args:
        x: Queries or keys, [B, F, h*w, heads, head_dim].
        cos: [F, h*w, head_dim/2], from `rope_table`.
        sin: [F, h*w, head_dim/2], from `rope_table`.

    Returns:
        The rotated `x`, in its dtype.
    """
    precise = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    pairs = precise.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = (table[None, :, :, None, :].astype(precise.dtype) for table in (cos, sin))
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x.shape).astype(x.dtype)
