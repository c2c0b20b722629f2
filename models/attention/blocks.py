"""Attention over a whole clip, block by block over a cache, for block structures that `attend_clip` cannot express.

The queries of a block attend, by `Attention.attend_cache`, to a cache with the keys and values of earlier blocks and of
their own. Gradients pass through the cache.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from monarchrt.models.attention.base import Attention, CacheShape, Context, Grid


def block_sizes(frames: int, block: int, *, independent_first_frame: bool = False) -> list[int]:
    """Divides a clip into blocks.

    Examples:
        >>> block_sizes(9, 3), block_sizes(7, 3, independent_first_frame=True)
        ([3, 3, 3], [1, 3, 3])

    Args:
        frames: Number of frames of the clip.
        block: Frames per block.
        independent_first_frame: Whether the first frame is a block of its own.

    Returns:
        Frames of each block.

    Raises:
        ValueError: If the clip is not a whole number of blocks; the message names the nearest valid numbers of frames.
    """
    first = [1] if independent_first_frame else []
    rest, over = divmod(frames - len(first), block)
    if frames < 1 or over or rest < 0:
        at = [len(first) + max(1 - len(first), rest + up) * block for up in (0, 1)]
        form = f"1 + {block} k" if first else f"{block} k"
        raise ValueError(
            f"frames={frames} latent frames are not {form}, whole blocks; the nearest that are: "
            f"{' or '.join(map(str, dict.fromkeys(at)))}."
        )
    return first + [block] * rest


def attend_blocks(
    setting: Attention,
    query: Float[Array, "B N n d"],
    key: Float[Array, "B N n d"],
    value: Float[Array, "B N n d"],
    *,
    past: tuple[Float[Array, "B N n d"], Float[Array, "B N n d"]],
    grid: Grid,
    sizes: Sequence[int],
    context: Context,
) -> Float[Array, "B N n d"]:
    """Attention of each block's queries to `past` in earlier blocks and to the block's own keys.

    Blocks of equal size are one loop, and each is recomputed in the backward pass: memory is that of one block.

    Examples:
        >>> from monarchrt.models.attention.dense import DenseAttention
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 6, 2, 4))
        >>> even = DenseAttention()(q, k, v, grid=(6, 1, 1), causal_block=3)
        >>> out = attend_blocks(
        ...     DenseAttention(), q, k, v, past=(k, v), grid=(6, 1, 1), sizes=[3, 3], context=Context()
        ... )
        >>> bool(jnp.allclose(out, even, atol=1e-6))
        True

    Args:
        setting: The kind.
        query: Queries of the whole clip, [B, F*h*w, heads, head_dim].
        key: As `query`.
        value: As `query`.
        past: Keys and values of the whole clip, of which each block sees those before it.
        grid: (F, h, w) tokens.
        sizes: Frames of each block; all but the first have the same size.
        context: Context of the whole clip; the call for a block gets its index, and its part of the inputs and steps.

    Returns:
        An array like `query`.

    Raises:
        ValueError: If the kind does not fit the grid, or its tiles do not fit a block.
    """
    frames, height, width = grid
    per_frame, (batch, _, heads, head_dim) = height * width, query.shape
    shape = CacheShape(
        batch=batch, frames=frames, height=height, width=width, heads=heads, head_dim=head_dim, layers=1,
        dtype=query.dtype.name, block=sizes[-1] if len(set(sizes)) == 1 else None,
    )  # fmt: skip
    layers = dataclasses.replace(setting.init_cache(shape), length=None)
    empty = dataclasses.replace(jax.tree.map(lambda leaf: leaf[0], layers), length=jnp.int32(0))  # as in a loop
    filled = dataclasses.replace(empty.append(*past, frame=0), length=None)
    inputs = None if context.inputs is None else context.inputs()
    here = dataclasses.replace(context, inputs=None if inputs is None else lambda: inputs)

    @partial(jax.checkpoint, static_argnums=2)
    def block(number: Any, frame: Any, size: int) -> Array:
        def own(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, frame * per_frame, size * per_frame, axis=1)

        before = dataclasses.replace(filled, length=frame)  # frames from its length on are not valid
        where = dataclasses.replace(here.of_frames(frame, size, per_frame), block=number)
        return setting.attend_cache(before.append(own(key), own(value), frame=frame), own(query), context=where)

    return over_blocks(lambda _, *place: (None, block(*place)), None, sizes)[1]


def over_blocks(body: Callable[[Any, Array, Array, int], tuple[Any, Any]], carry: Any, sizes: Sequence[int]) -> Any:
    """Loops over the blocks of a clip, with one compiled body for blocks of equal size.

    Examples:
        >>> def body(total, number, frame, size):
        ...     return total + size, jnp.full((1, size), number)
        >>> over_blocks(body, 0, [1, 3, 3])[1].tolist()
        [[0, 1, 1, 1, 2, 2, 2]]

    Args:
        body: (carry, index of the block, its first frame, its frames) -> carry and arrays [B, frames or tokens, ...].
        carry: Initial carry.
        sizes: Frames of each block; all but the first have the same size.

    Returns:
        The last carry, and the arrays with all blocks joined on axis 1.
    """
    apart = sizes[:1] if sizes[0] != sizes[-1] else []
    parts = []
    if apart:
        carry, out = body(carry, jnp.int32(0), jnp.int32(0), apart[0])
        parts.append(out)
    numbers = jnp.arange(len(apart), len(sizes), dtype=jnp.int32)
    starts = sum(apart) + (numbers - len(apart)) * sizes[-1]
    carry, out = lax.scan(lambda carry, place: body(carry, *place, sizes[-1]), carry, (numbers, starts))
    parts.append(jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:]), out))
    return carry, jax.tree.map(lambda *xs: jnp.concatenate(xs, axis=1), *parts)
