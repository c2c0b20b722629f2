"""The umT5 encoder, which maps token ids to embeddings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from monarchrt.models.norms import rms_norm
from monarchrt.models.umt5.config import UMT5Config


def relative_buckets(config: UMT5Config, length: int) -> Int[np.ndarray, "query key"]:
    """The bucket of each pair of positions (T5, arXiv:1910.10683, section 2.1).

    Half of the buckets are for keys after the query. In each half, the first half are single distances, the others grow
    logarithmically up to `max_distance`, and the last one includes all larger distances.

    Examples:
        >>> from monarchrt.models.umt5 import umt5_config
        >>> relative_buckets(umt5_config("tiny"), 9)[0].tolist()
        [0, 17, 18, 19, 20, 21, 22, 23, 24]

    Args:
        config: Number of buckets and largest distance.
        length: Number of positions.

    Returns:
        Integers from 0 to num_buckets - 1.
    """
    position = np.arange(length)
    relative = position[None, :] - position[:, None]  # key minus query
    half = config.num_buckets // 2
    exact = half // 2
    distance = np.abs(relative)
    # float32 as in the published code: some boundaries are powers of two and must round as there
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / math.log(config.max_distance / exact)
    far = np.minimum(exact + (ratio * (half - exact)).astype(np.int64), half - 1)
    return np.where(relative > 0, half, 0) + np.where(distance < exact, distance, far)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) in float32 or wider, rounded to the input's dtype, times the weight."""

    def __init__(self, config: UMT5Config, *, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.eps = config.eps
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (config.dim,), param_dtype))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises; keeps the dtype."""
        return rms_norm(x, self.scale[...], eps=self.eps)


def _linear(features: int, out: int, std: float, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
    init = nnx.initializers.normal(std)
    return nnx.Linear(features, out, use_bias=False, kernel_init=init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)


class SelfAttention(nnx.Module):
    """Attention with a relative-position bias and without a scale; the softmax is in float32 or wider."""

    def __init__(self, config: UMT5Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.config = config
        dim, inner = config.dim, config.attention_dim

        def linear(features, out, std):
            return _linear(features, out, std, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.q = linear(dim, inner, (dim * inner / config.num_heads) ** -0.5)
        self.k, self.v = linear(dim, inner, dim**-0.5), linear(dim, inner, dim**-0.5)
        self.o = linear(inner, dim, inner**-0.5)
        table = nnx.initializers.normal((2 * config.num_buckets * config.num_heads) ** -0.5)
        self.bias = nnx.Param(table(rngs.params(), (config.num_buckets, config.num_heads), param_dtype))

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], buckets: Int[Array, "L L"]
    ) -> Float[Array, "B L D"]:
        """Attends to the positions where the mask is True."""
        query, key, value = (
            rearrange(part(x), "b l (n d) -> b l n d", n=self.config.num_heads) for part in (self.q, self.k, self.v)
        )
        precise = jnp.promote_types(x.dtype, jnp.float32)
        scores = jnp.einsum("bqnd,bknd->bnqk", query, key, preferred_element_type=precise)
        scores += rearrange(self.bias[...][buckets], "q k n -> 1 n q k").astype(precise)
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(precise).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return self.o(rearrange(jnp.einsum("bnqk,bknd->bqnd", weights, value), "b l n d -> b l (n d)"))


class FeedForward(nnx.Module):
    """fc2(fc1(x) * GELU(gate(x))), with the tanh form of GELU."""

    def __init__(self, config: UMT5Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(features, out):
            return _linear(features, out, features**-0.5, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.gate, self.fc1 = linear(config.dim, config.ffn_dim), linear(config.dim, config.ffn_dim)
        self.fc2 = linear(config.ffn_dim, config.dim)

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """The output of the layer, without the residual connection."""
        return self.fc2(self.fc1(x) * jax.nn.gelu(self.gate(x), approximate=True))


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each applied to the normalised residual stream and added to it."""

    def __init__(self, config: UMT5Config, *, dtype: DTypeLike, param_dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config, param_dtype=param_dtype, rngs=rngs)
        self.attn = SelfAttention(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm2 = RMSNorm(config, param_dtype=param_dtype, rngs=rngs)
        self.ffn = FeedForward(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B L D"], mask: Bool[Array, "B L"], buckets: Int[Array, "L L"]
    ) -> Float[Array, "B L D"]:
        """The residual stream after this layer."""
        x = x + self.attn(self.norm1(x), mask, buckets)
        return x + self.ffn(self.norm2(x))


class UMT5Encoder(nnx.Module):
    """The umT5 encoder, the text encoder of Wan 2.1; a scan over `blocks`, whose parameters are stacked by layer.

    Examples:
        >>> from monarchrt.models.umt5 import umt5_config
        >>> encoder = UMT5Encoder(umt5_config("tiny"), rngs=nnx.Rngs(0))
        >>> ids = jnp.array([[5, 7, 1, 0]], jnp.int32)
        >>> encoder(ids, ids > 0).shape
        (1, 4, 32)

    Args:
        config: Sizes.
        rngs: Random keys for the parameters.
        dtype: Dtype of the residual stream and the matrix products; norms and softmax are float32 or wider.
        param_dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        config: UMT5Config,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        normal = nnx.initializers.normal(1.0)
        self.token_embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, config.dim), param_dtype))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.blocks = stack(rngs)
        self.norm = RMSNorm(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, "B L"], mask: Bool[Array, "B M"]) -> Float[Array, "B L D"]:
        """Encodes tokens.

        Args:
            ids: Token ids; ids beyond the vocabulary give NaN.
            mask: [B, L]; True for tokens, False for padding, at which the result is undefined.

        Returns:
            Embeddings in the compute dtype.

        Raises:
            ValueError: If the shapes differ.
        """
        if ids.shape != mask.shape:
            raise ValueError(f"mask has shape {mask.shape}, ids {ids.shape}; they must be the same.")
        buckets = jnp.asarray(relative_buckets(self.config, ids.shape[1]), jnp.int32)
        table = self.token_embedding[...]
        x = jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan).astype(self.dtype)
        graph, layers = nnx.split(self.blocks)

        def body(x, layer):
            return nnx.merge(graph, layer)(x, mask, buckets), None

        x, _ = jax.lax.scan(body, x, layers)
        return self.norm(x)
