"""Tokens of a frame on a mesh of devices: how many each has, and the exchange with attention, which is by heads."""

from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import get_abstract_mesh
from jaxtyping import Array, Float, Real

from monarchrt.models.sharding import Logical, constrain, mesh_axes, partition, parts

type Logicals = tuple[Logical, ...]
ROWS = 8  # XLA fills up the rows of products to a multiple of it, by a copy before each


def padded(tokens: int) -> int:
    """Tokens of a frame with those that are added, so that each device has a multiple of 8; as many without a mesh.

    Those that are added are computed like others, but nothing is made of them: attention leaves them out.

    Examples:
        >>> padded(1560)
        1560
    """
    devices = parts("tokens", 0)
    return tokens if devices == 1 else -(-tokens // (ROWS * devices)) * ROWS * devices


def pad(x: Float[Array, "B F S *rest"], tokens: int) -> Float[Array, "B F T *rest"]:
    """Zeros up to so many tokens."""
    missing = tokens - x.shape[2]
    return jnp.pad(x, ((0, 0), (0, 0), (0, missing), *((0, 0),) * (x.ndim - 3))) if missing else x


def joins_frames(timesteps: Real[Array, "B"] | Real[Array, "B frames"]) -> bool:
    """Whether the tokens of all frames had better be in one row: split over a mesh, under one timestep.

    A device's part is then one piece of each sample, in the order that attention takes, and fewer tokens are added.
    """
    return timesteps.ndim == 1 and parts("tokens", 0) > 1


def join_frames(x: Float[Array, "*B F S D"]) -> Float[Array, "*B 1 N D"]:
    """Tokens, or their cosines and sines, of all frames in one row, N = F*S."""
    return x.reshape(*x.shape[:-3], 1, -1, x.shape[-1])


def pad_rope(rope: tuple[Array, Array]) -> tuple[Array, Array]:
    """Cosines and sines [F, S, half] with those of the tokens that a mesh adds; whole on every device."""
    cos, sin = (constrain(pad(table[None], padded(table.shape[1]))[0], None, None, None) for table in rope)
    return cos, sin


def split_tokens(x: Float[Array, "B F T D"]) -> Float[Array, "B F T D"]:
    """The residual stream, split along the batch and the tokens of a frame where a mesh says so."""
    return constrain(x, "batch", None, "tokens", None)


def whole_tokens(x: Float[Array, "B F T D"]) -> Float[Array, "B F T D"]:
    """All tokens on every device, split along the batch alone."""
    return constrain(x, "batch", None, None, None)


def tokens_to_heads(
    x: Float[Array, "B F T 3 n d"], tokens: int
) -> tuple[Float[Array, "B N n d"], Float[Array, "B N n d"], Float[Array, "B N n d"]]:
    """Query, key and value, each with its tokens in one axis, those that were added left out.

    On a mesh they are split along the heads, instead of a frame's tokens: one exchange for all, as in Ulysses.
    """
    x = _exchange(x, True)[:, :, :tokens]
    query, key, value = (rearrange(x[:, :, :, part], "b f s n d -> b (f s) n d") for part in range(3))
    return query, key, value


def heads_to_tokens(x: Float[Array, "B N n d"], frames: int, tokens: int) -> Float[Array, "B F T D"]:
    """The way back, by frame, filled up to so many tokens, and at the width of the residual stream."""
    x = _exchange(pad(rearrange(x, "b (f s) n d -> b f s n d", f=frames), tokens), False)
    return rearrange(x, "b f s n d -> b f s (n d)")


def _moved(x: Float[Array, "B F T *rest n d"], to_heads: bool) -> Float[Array, "B F T *rest n d"]:
    """Split along the heads instead of the tokens, or the other way round; the gradient goes the way back."""
    inner = (None,) * (x.ndim - 5)
    by_tokens, by_heads = ("batch", None, "tokens", *inner, None, None), ("batch", None, None, *inner, "heads", None)
    before, after = (by_tokens, by_heads) if to_heads else (by_heads, by_tokens)
    if parts("tokens", x.shape[2]) == parts("heads", x.shape[-2]) == 2:
        return _swap_halves(x, before, after, *((2, x.ndim - 2) if to_heads else (x.ndim - 2, 2)))
    return constrain(constrain(x, *before), *after)


def _swap_halves(x: Array, before: Logicals, after: Logicals, joined: int, split: int) -> Array:
    """The exchange of two devices: each sends the half that the other is to have, where an all-to-all takes both.

    Args:
        x: On a mesh, split along one axis.
        before: Its logical axes.
        after: Those that it is to have.
        joined: The axis that is split before.
        split: The axis that is split after.

    Returns:
        x, split along the other.
    """
    mesh = get_abstract_mesh()
    (axis,) = mesh_axes(mesh, "heads", 2)

    def run(x: Array) -> Array:
        here = jax.lax.axis_index(axis)
        halves = x.reshape(*x.shape[:split], 2, -1, *x.shape[split + 1 :])
        own, other = (jax.lax.dynamic_index_in_dim(halves, i, axis=split, keepdims=False) for i in (here, 1 - here))
        got = jax.lax.ppermute(other, axis, [(0, 1), (1, 0)])
        # its own part comes first on device 0, and last on device 1
        either = jnp.concatenate([own, got, own], axis=joined)
        return jax.lax.dynamic_slice_in_dim(either, here * own.shape[joined], 2 * own.shape[joined], axis=joined)

    specs = (partition(mesh, x.shape, names) for names in (before, after))
    return jax.shard_map(run, mesh=mesh, in_specs=next(specs), out_specs=next(specs), check_vma=False)(x)


def _way_back(to_heads: bool, _: None, gradient: Array) -> tuple[Array]:
    x = _moved(gradient, not to_heads)
    # of query, key and value it would else be formed again, and in float32, for each that reads it
    return (jax.lax.optimization_barrier(x) if to_heads else x,)


_exchange: Any = jax.custom_vjp(_moved, nondiff_argnums=(1,))
_exchange.defvjp(lambda x, to_heads: (_moved(x, to_heads), None), _way_back)
