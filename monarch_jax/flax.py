"""Monarch attention for Flax: an `attention_fn` for the modules of NNX and Linen, and a self-attention module."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from monarch_jax._typing import Array, Float, Int
from monarch_jax.attention import monarch_attention
from monarch_jax.backends import check_name
from monarch_jax.cache import MonarchKVCache
from monarch_jax.checks import array, flag, float_dtype, positive, triple
from monarch_jax.intermediates import check_intermediates
from monarch_jax.spec import MonarchSpec


def attention_fn(
    *,
    grid: tuple[int, int, int],
    tile: tuple[int, int, int] | None = None,
    blocks: str = "fh,w",
    num_iters: int = 1,
    causal_block: int | None = None,
    intermediates: str | None = None,
    implementation: str | None = None,
) -> Callable[..., jax.Array]:
    """Monarch attention as the `attention_fn` of `nnx.MultiHeadAttention` or Linen's `MultiHeadDotProductAttention`.

    Examples:
        >>> from flax import nnx
        >>> attend = attention_fn(grid=(2, 4, 6))
        >>> layer = nnx.MultiHeadAttention(
        ...     num_heads=2, in_features=16, decode=False, attention_fn=attend, rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 2 * 4 * 6, 16))).shape
        (1, 48, 16)

    Args:
        grid: (F, h, w) of the tokens; this and the other arguments are as in `monarch_attention`.
        tile: (n_f, n_h, n_w).
        blocks: Layout.
        num_iters: Refinement steps T.
        causal_block: Frames per causal block.
        intermediates: Precision of alpha and Y.
        implementation: Backend.

    Returns:
        A function of query, key, value [..., tokens, heads, head_dim] that returns an array of the query's shape. It
        raises ValueError for arguments that a Monarch map cannot express: a mask, a bias, dropout, `is_causal` and
        `sow_weights`. Its `precision` has no effect; use `jax.default_matmul_precision`.

    Raises:
        ValueError: If an argument is invalid, or they are inconsistent.
    """
    MonarchSpec(grid=grid, tile=tile, blocks=blocks, num_iters=num_iters, causal_block=causal_block)
    check_name(implementation)
    check_intermediates(intermediates)
    run = functools.partial(
        monarch_attention,
        grid=grid,
        tile=tile,
        blocks=blocks,
        num_iters=num_iters,
        causal_block=causal_block,
        intermediates=intermediates,
        implementation=implementation,
    )

    def attend(
        query,
        key,
        value,
        bias=None,
        mask=None,
        *,
        dropout_rate=0.0,
        deterministic=True,
        is_causal=False,
        dtype=None,
        module=None,
        dropout_rng=None,
        broadcast_dropout=True,
        precision=None,
    ):
        if mask is not None or bias is not None:
            raise ValueError("mask and bias cannot be part of a Monarch map; causal_block makes it causal by frames.")
        if module is not None:
            raise ValueError("sow_weights=True: attention weights are never formed; see monarch_factors.")
        if is_causal:
            raise ValueError("is_causal=True is causal by token; Monarch attention is causal by frames: causal_block.")
        if dropout_rate and not deterministic:
            raise ValueError(f"dropout_rate={dropout_rate}: attention weights are never formed; it should be 0.")
        query, key, value = array("query", query), array("key", key), array("value", value)
        if dtype is not None:
            dtype = float_dtype("dtype", dtype)
            query, key, value = (x.astype(dtype) for x in (query, key, value))
        return _over_batch_axes(run, query, key, value)

    return attend


def _over_batch_axes(attend: Callable[..., jax.Array], query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of arrays [..., tokens, heads, head_dim] by a function of arrays with one batch axis."""
    batch = query.shape[:-3]
    if key.shape[:-3] != batch or value.shape[:-3] != batch:
        raise ValueError(f"query has shape {query.shape}, key {key.shape}, value {value.shape}: batch axes differ.")
    if min(x.ndim for x in (query, key, value)) < 3:
        raise ValueError(f"query has shape {query.shape}; it should be [..., tokens, heads, head_dim].")
    out = attend(*(x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)))
    return out.reshape(*batch, *out.shape[1:])


class MonarchSelfAttention(nnx.Module):
    """Multi-head self-attention over video tokens with a tiled Monarch map.

    Examples:
        >>> from flax import nnx
        >>> layer = MonarchSelfAttention(32, num_heads=4, tile=(2, 4, 6), rngs=nnx.Rngs(0))
        >>> layer(jnp.ones((1, 4 * 4 * 6, 32)), grid=(4, 4, 6)).shape
        (1, 96, 32)

    Args:
        features: Size of the last axis of inputs and outputs.
        num_heads: Number of heads H; divides `features`.
        tile: (n_f, n_h, n_w); None means (1, h, w) of each call's grid.
        blocks: Layout, as in `monarch_attention`.
        num_iters: Refinement steps T.
        causal_block: Frames per causal block; None for bidirectional attention.
        qk_norm: Whether queries and keys are RMS-normalised over each head.
        use_bias: Whether the projections have biases.
        dtype: Dtype of the computation; None means the common dtype of inputs and parameters.
        param_dtype: Dtype of the parameters.
        keep_intermediates: As in `monarch_attention`.
        intermediates: As in `monarch_attention`.
        implementation: As in `monarch_attention`.
        rngs: Random keys for the parameters.

    Raises:
        ValueError: If an argument is invalid, `num_heads` does not divide `features`, or tile, blocks and causal_block
            are inconsistent.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        tile: tuple[int, int, int] | None = None,
        blocks: str = "fh,w",
        num_iters: int = 1,
        causal_block: int | None = None,
        qk_norm: bool = True,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        keep_intermediates: bool = False,
        intermediates: str | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        spec = MonarchSpec(  # for its checks; the grid of a call may be any that the tile divides
            grid=(1, 1, 1) if tile is None else triple("tile", tile, "(n_f, n_h, n_w)"),
            tile=tile,
            blocks=blocks,
            num_iters=num_iters,
            causal_block=causal_block,
        )
        features, num_heads = positive("features", features), positive("num_heads", num_heads)
        if features % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide features={features}.")
        head_dim = features // num_heads
        qk_norm, use_bias = flag("qk_norm", qk_norm), flag("use_bias", use_bias)
        dtype = None if dtype is None else float_dtype("dtype", dtype)
        param_dtype = float_dtype("param_dtype", param_dtype)
        check_name(implementation)
        check_intermediates(intermediates)
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(f"rngs={rngs!r} is not flax.nnx.Rngs, such as nnx.Rngs(0).")
        general = functools.partial(
            nnx.LinearGeneral, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        norm = functools.partial(nnx.RMSNorm, head_dim, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.qkv = general(features, (3, num_heads, head_dim))
        self.out = general((num_heads, head_dim), features, axis=(-2, -1))
        self.query_norm = norm() if qk_norm else None
        self.key_norm = norm() if qk_norm else None
        self.tile = None if tile is None else spec.tile_shape
        self.blocks, self.num_iters = blocks, num_iters
        self.causal_block, self.implementation = causal_block, implementation
        self.intermediates = intermediates
        self.keep_intermediates = flag("keep_intermediates", keep_intermediates)
        self.features = features

    def __call__(
        self,
        x: Float[Array, "B N C"],
        *,
        grid: tuple[int, int, int],
        rope: Callable[[jax.Array], jax.Array] | None = None,
    ) -> Float[Array, "B N C"]:
        """Self-attention over all tokens of a clip.

        Args:
            x: [B, F*h*w, features].
            grid: (F, h, w).
            rope: Rotary embedding, applied to queries and to keys: [B, N, H, D] -> [B, N, H, D].

        Returns:
            [B, F*h*w, features].

        Raises:
            ValueError: If the tokens, the grid and the tile are inconsistent.
        """
        query, key, value = self._project(x, rope)
        out = monarch_attention(
            query,
            key,
            value,
            grid=grid,
            tile=self.tile,
            blocks=self.blocks,
            num_iters=self.num_iters,
            causal_block=self.causal_block,
            keep_intermediates=self.keep_intermediates,
            intermediates=self.intermediates,
            implementation=self.implementation,
        )
        return self.out(out)

    def extend(
        self,
        x: Float[Array, "B N C"],
        cache: MonarchKVCache,
        *,
        frame: int | Int[Array, ""] | None = None,
        rope: Callable[[jax.Array], jax.Array] | None = None,
    ) -> tuple[Float[Array, "B N C"], MonarchKVCache]:
        """Attends from a new block of frames to the cached frames and to itself.

        Args:
            x: [B, n*h*w, features], the block.
            cache: Keys and values of the frames so far; its tile and blocks must be the module's.
            frame: Absolute index of the block's first frame; default: the frame after the newest.
            rope: As in `__call__`, for the block's positions.

        Returns:
            The outputs [B, n*h*w, features] and the cache with the block.

        Raises:
            ValueError: If the block does not fit the cache, or the cache's tile or blocks are not the module's.
        """
        if not isinstance(cache, MonarchKVCache):
            raise ValueError(f"cache is a {type(cache).__name__}; it should be a MonarchKVCache.")
        tile = self.tile or (1, *cache.spec.grid[1:])
        if (tile, self.blocks) != (cache.spec.tile_shape, cache.spec.blocks):
            raise ValueError(
                f"cache has tile={cache.spec.tile_shape}, blocks={cache.spec.blocks!r}; the module has tile={tile}, "
                f"blocks={self.blocks!r}. Pass the module's to MonarchKVCache.init."
            )
        query, key, value = self._project(x, rope)
        cache = cache.append(key, value, frame=frame)
        out = cache.attend(
            query,
            num_iters=self.num_iters,
            causal_block=self.causal_block,
            intermediates=self.intermediates,
            implementation=self.implementation,
        )
        return self.out(out), cache

    def _project(self, x, rope) -> tuple[Any, Any, Any]:
        x = array("x", x)
        if x.ndim != 3 or x.shape[-1] != self.features:
            raise ValueError(f"x has shape {x.shape}; it should be [batch, tokens, features={self.features}].")
        if rope is not None and not callable(rope):
            raise ValueError(f"rope={rope!r} is not a function of queries or keys [B, N, H, D].")
        query, key, value = (t.squeeze(-3) for t in jnp.split(self.qkv(x), 3, axis=-3))
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rope is not None:
            query, key = _rotated(rope, query), _rotated(rope, key)
        return query, key, value


def _rotated(rope: Callable[..., object], x: jax.Array) -> jax.Array:
    """What `rope` returns for queries or keys; ValueError unless it has their shape and dtype."""
    y = rope(x)
    known = isinstance(y, jax.Array | np.ndarray)
    if not known or (y.shape, y.dtype) != (x.shape, x.dtype):
        shown = f"{y.dtype.name} {y.shape}" if known else f"a {type(y).__name__}"
        raise ValueError(f"rope returns {shown} for {x.dtype.name} {x.shape}; it should keep shape and dtype.")
    return jnp.asarray(y)
