"""Tokens of a frame on a mesh: padding, splitting, and the exchange between splits by tokens and by heads."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Real

from monarchrt.models.sharding import Logical, constrain, mesh_axes, partition, parts

type Logicals = tuple[Logical, ...]
ROWS = 8  # XLA pads the rows of products to a multiple of this, by a copy before each


def padded(tokens: int) -> int:
    """Tokens of a frame with padding, so that each device has a multiple of 8; without a mesh there is no padding.

    Padding is computed like other tokens, but attention leaves it out, and it is dropped at the end.

    Examples:
        >>> padded(1560)
        1560
    """
    devices = parts("tokens", 0)
    return tokens if devices == 1 else -(-tokens // (ROWS * devices)) * ROWS * devices


def pad(x: Float[Array, "B F S *rest"], tokens: int) -> Float[Array, "B F T *rest"]:
    """Pads each frame with zeros to this many tokens."""
    missing = tokens - x.shape[2]
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing), *((0, 0),) * (x.ndim - 3))) if missing else x


def joins_frames(timesteps: Real[Array, "B"] | Real[Array, "B frames"]) -> bool:
    """Whether to put the tokens of all frames in one row: on a mesh that splits tokens, with one timestep per sample.

    Each device's part is then one piece of a sample, in the order of the attention, and less padding is needed.
    """
    return timesteps.ndim == 1 and parts("tokens", 0) > 1


def join_frames(x: Float[Array, "*B F S D"]) -> Float[Array, "*B 1 N D"]:
    """Puts the tokens of all frames, or their cosines and sines, in one row, N = F*S."""
    return x.reshape(*x.shape[:-3], 1, -1, x.shape[-1])


def pad_rope(rope: tuple[Array, Array]) -> tuple[Array, Array]:
    """Pads cosines and sines [F, S, half] like the tokens; every device has them in full."""
    cos, sin = (constrain(pad(table[None], padded(table.shape[1]))[0], None, None, None) for table in rope)
    return cos, sin


def split_tokens(x: Float[Array, "B F T D"]) -> Float[Array, "B F T D"]:
    """Splits the residual stream along the batch and the tokens of a frame, on a mesh."""
    return constrain(x, "batch", None, "tokens", None)


def whole_tokens(x: Float[Array, "B F T D"]) -> Float[Array, "B F T D"]:
    """Splits the residual stream along the batch only, so that every device has all tokens."""
    return constrain(x, "batch", None, None, None)


def tokens_to_heads(
    x: Float[Array, "B F T 3 n d"], tokens: int
) -> tuple[Float[Array, "B N n d"], Float[Array, "B N n d"], Float[Array, "B N n d"]]:
    """Query, key and value, each with all tokens in one axis, without padding.

    On a mesh they change from a split along tokens to one along heads, in one exchange for all three, as in Ulysses.
    """
    x = _exchange(x, True)[:, :, :tokens]
    query, key, value = (rearrange(x[:, :, :, part], "b f s n d -> b (f s) n d") for part in range(3))
    return query, key, value


def heads_to_tokens(x: Float[Array, "B N n d"], frames: int, tokens: int) -> Float[Array, "B F T D"]:
    """The inverse of `tokens_to_heads`: by frame, padded to `tokens`, with the channels of all heads in one axis."""
    x = _exchange(pad(rearrange(x, "b (f s) n d -> b f s n d", f=frames), tokens), False)
    return rearrange(x, "b f s n d -> b f s (n d)")


def _moved(x: Float[Array, "B F T *rest n d"], to_heads: bool) -> Float[Array, "B F T *rest n d"]:
    """Changes the split from tokens to heads, or the reverse; the gradient does the opposite."""
    inner = (None,) * (x.ndim - 5)
    by_tokens, by_heads = ("batch", None, "tokens", *inner, None, None), ("batch", None, None, *inner, "heads", None)
    before, after = (by_tokens, by_heads) if to_heads else (by_heads, by_tokens)
    if parts("tokens", x.shape[2]) == parts("heads", x.shape[-2]) == 2:
        return _swap_halves(x, before, after, *((2, x.ndim - 2) if to_heads else (x.ndim - 2, 2)))
    return constrain(constrain(x, *before), *after)


def _swap_halves(x: Array, before: Logicals, after: Logicals, joined: int, split: int) -> Array:
    """The exchange between two devices, each of which sends only the other's half; an all-to-all takes both halves.

    Args:
        x: An array on a mesh, split along one axis.
        before: Its logical axes.
        after: The logical axes of the result.
        joined: The axis that is split before.
        split: The axis that is split after.

    Returns:
        `x`, split along the other axis.
    """
    mesh = get_abstract_mesh()
    (axis,) = mesh_axes(mesh, "heads", 2)

    def run(x: Array) -> Array:
        here = jax.lax.axis_index(axis)
        halves = x.reshape(*x.shape[:split], 2, -1, *x.shape[split + 1 :])
        own, other = (jax.lax.dynamic_index_in_dim(halves, i, axis=split, keepdims=False) for i in (here, 1 - here))
        got = jax.lax.ppermute(other, axis, [(0, 1), (1, 0)])
        # a device's own part comes first on device 0 and last on device 1
        either = jnp.concatenate([own, got, own], axis=joined)
        return jax.lax.dynamic_slice_in_dim(either, here * own.shape[joined], 2 * own.shape[joined], axis=joined)

    specs = (partition(mesh, x.shape, names) for names in (before, after))
    return jax.shard_map(run, mesh=mesh, in_specs=next(specs), out_specs=next(specs), check_vma=False)(x)


def _way_back(to_heads: bool, _: None, gradient: Array) -> tuple[Array]:
    x = _moved(gradient, not to_heads)
    # a barrier: otherwise the gradient of query, key and value is recomputed, in float32, for each of its readers
    return (jax.lax.optimization_barrier(x) if to_heads else x,)


_exchange: Any = jax.custom_vjp(_moved, nondiff_argnums=(1,))
_exchange.defvjp(lambda x, to_heads: (_moved(x, to_heads), None), _way_back)
