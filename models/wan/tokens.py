"""Tokens of a frame on a mesh of devices: how many each has, and the exchange with attention, which is by heads."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Real

from monarchrt.models.sharding import constrain, parts

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
    x = constrain(x, "batch", None, "tokens", None, None, None)
    x = constrain(x, "batch", None, None, None, "heads", None)[:, :, :tokens]
    query, key, value = (rearrange(x[:, :, :, part], "b f s n d -> b (f s) n d") for part in range(3))
    return query, key, value


def heads_to_tokens(x: Float[Array, "B N n d"], frames: int, tokens: int) -> Float[Array, "B F T D"]:
    """The way back, by frame, filled up to so many tokens, and at the width of the residual stream."""
    x = pad(rearrange(x, "b (f s) n d -> b f s n d", f=frames), tokens)
    x = constrain(constrain(x, "batch", None, None, "heads", None), "batch", None, "tokens", None, None)
    return rearrange(x, "b f s n d -> b f s (n d)")
