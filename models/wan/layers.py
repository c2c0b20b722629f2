"""Layers of Wan: norms, projections, embeddings, blocks. Attribute names are those of the official checkpoint."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Real

from monarchrt.models.attention.softmax import softmax_attention
from monarchrt.models.broadcasting import along_last
from monarchrt.models.norms import rms_norm
from monarchrt.models.sharding import on_each_device, parts
from monarchrt.models.wan.activations import gelu_tanh
from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.kept import PRODUCTS, bias_apart, in_stacks, kept, kept_apart
from monarchrt.models.wan.passes import Passes
from monarchrt.models.wan.rope import rotate
from monarchrt.models.wan.tokens import heads_to_tokens, tokens_to_heads

xavier = nnx.initializers.xavier_uniform()
small_normal = nnx.initializers.normal(0.02)
type Attend = Callable[[Array, Array, Array], Array]
type Modulation = Float[Array, "B T 1 D"]
HIDDEN_BYTES = 128 * 2**20  # limit on a group's hidden layer of the feed-forward, if a block is recomputed in groups


def linear(config: WanConfig, features: int, out: int, *, rngs: nnx.Rngs, init=xavier, precise: bool = False):
    """A dense layer with bias.

    Args:
        config: Gives the dtypes of computation and parameters.
        features: Input channels.
        out: Output channels.
        rngs: Random keys for the parameters.
        init: Initializer of the weights; biases are zero.
        precise: Whether to compute in float32 or wider rather than in the compute dtype.
    """
    dtype = config.precise_dtype if precise else jnp.dtype(config.dtype)
    return nnx.Linear(
        features,
        out,
        kernel_init=init,
        dtype=dtype,
        param_dtype=jnp.dtype(config.param_dtype),
        precision="highest" if precise else None,  # the default on GPUs is TF32, with ten bits of mantissa
        rngs=rngs,
    )


def computed_dtype[M: nnx.Module](model: M) -> M:
    """Casts kernels and biases of dense layers to the dtype in which they compute.

    A loop that calls the model then casts float32 parameters once rather than in every iteration. Results are
    identical. The parameters are for inference, not for training.

    Examples:
        >>> layer = nnx.Linear(2, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        >>> layer.kernel.dtype.name, computed_dtype(layer).kernel.dtype.name
        ('float32', 'bfloat16')

    Args:
        model: The model; it does not change.

    Returns:
        A copy that shares the arrays of all other layers.
    """
    dtypes: dict[tuple[Any, ...], Any] = {
        (*path, name): module.dtype
        for path, module in nnx.iter_graph(model)
        if isinstance(module, nnx.Linear) and module.dtype is not None
        for name in ("kernel", "bias")
    }
    graph, state = nnx.split(model)
    leaves = [
        (path, leaf.replace(leaf[...].astype(dtypes[path])) if path in dtypes else leaf)
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def layer_norm(config: WanConfig, width: int, *, affine: bool, rngs: nnx.Rngs, eps: float | None = None):
    """A LayerNorm that computes in and returns float32 or wider, with two-pass variance.

    Args:
        config: Gives dtypes and the default epsilon.
        width: Channels.
        affine: Whether it has weights and biases.
        rngs: Random keys for the parameters.
        eps: Epsilon; None: that of the configuration.
    """
    return nnx.LayerNorm(
        width,
        epsilon=config.eps if eps is None else eps,
        use_scale=affine,
        use_bias=affine,
        use_fast_variance=False,
        dtype=config.precise_dtype,
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


class RMSNorm(nnx.Module):
    """RMSNorm over the channels of all heads; rounds to the input's dtype before the weight, as Wan does."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.eps = config.eps
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (config.dim,), jnp.dtype(config.param_dtype)))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """x / sqrt(mean(x^2) + eps) * scale, in the dtype of `x`."""
        return rms_norm(x, self.scale[...], eps=self.eps)


class MLP(nnx.Module):
    """Two dense layers with an activation between them."""

    def __init__(self, config: WanConfig, widths: tuple[int, int, int], *, act, rngs, init=xavier, precise=False):
        self.act = act
        self.fc1 = linear(config, widths[0], widths[1], rngs=rngs, init=init, precise=precise)
        self.fc2 = linear(config, widths[1], widths[2], rngs=rngs, init=init, precise=precise)

    def __call__(self, x: Float[Array, "*batch D_in"]) -> Float[Array, "*batch D_out"]:
        """fc2(act(fc1(x)))."""
        return kept(self.fc2(self.act(kept_apart(self.fc1, x))))


gelu_exact = partial(jax.nn.gelu, approximate=False)


class SelfAttention(nnx.Module):
    """Projections of the self-attention, with RMSNorm over all heads and rotary embedding; attention is passed in."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (linear(config, config.dim, config.dim, rngs=rngs) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config, rngs=rngs), RMSNorm(config, rngs=rngs)

    def products(self, x: Float[Array, "B F T D"]) -> tuple[tuple[Array, int], ...]:
        """Query, key and value, each as an array of which it is D columns and the index of the first of these."""
        return tuple((kept(linear(x)), 0) for linear in (self.q, self.k, self.v))

    def qkv(
        self, x: Float[Array, "B F T D"], rope: tuple[Array, Array], tokens: int
    ) -> tuple[Float[Array, "B N n d"], Float[Array, "B N n d"], Float[Array, "B N n d"]]:
        """Rotated queries and keys, and values, flattened over frames and the first `tokens` of each.

        On a mesh they are split by heads.
        """
        split = partial(rearrange, pattern="b f s (n d) -> b f s n d", n=self.num_heads)
        query, key, value = (y[..., at : at + x.shape[-1]] for y, at in self.products(x))
        query, key, value = (
            rotate(split(self.norm_q(query)), *rope),
            rotate(split(self.norm_k(key)), *rope),
            split(value),
        )
        if parts("heads", self.num_heads) == 1:  # no exchange is needed, for which they would be concatenated
            own = (y[:, :, :tokens] for y in (query, key, value))
            query, key, value = (rearrange(y, "b f s n d -> b (f s) n d") for y in own)
            return query, key, value
        return tokens_to_heads(jnp.stack([query, key, value], axis=3), tokens)


class CrossAttention(nnx.Module):
    """Cross-attention to the text, padding included, and in i2v to the image with the same queries; no positions."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.num_heads = config.num_heads
        self.q, self.k, self.v, self.o = (linear(config, config.dim, config.dim, rngs=rngs) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(config, rngs=rngs), RMSNorm(config, rngs=rngs)
        if config.model_type == "i2v":
            self.k_img, self.v_img = (linear(config, config.dim, config.dim, rngs=rngs) for _ in range(2))
            self.norm_k_img = RMSNorm(config, rngs=rngs)

    def keys_values(
        self, text: Float[Array, "B L D"], image: Float[Array, "B I D"] | None
    ) -> tuple[tuple[Array, Array], ...]:
        """(key, value) of the text, and of the image if there is one, each [B, rows, heads, head_dim]."""
        split = partial(rearrange, pattern="b l (n d) -> b l n d", n=self.num_heads)
        pairs = ((split(self.norm_k(kept(self.k(text)))), split(kept(self.v(text)))),)
        if image is not None:
            pairs += ((split(self.norm_k_img(kept(self.k_img(image)))), split(kept(self.v_img(image)))),)
        return pairs

    def __call__(
        self, x: Float[Array, "B F S D"], keys_values: tuple[tuple[Array, Array], ...]
    ) -> Float[Array, "B F S D"]:
        """The sum of the attention to text and image, projected."""
        return kept(self.o(self.attended(x, keys_values)))

    def attended(
        self, x: Float[Array, "B F S D"], keys_values: tuple[tuple[Array, Array], ...]
    ) -> Float[Array, "B F S D"]:
        """The sum of the attention to text and image, before the output projection."""
        query = self.norm_q(kept(self.q(x)))
        if parts("tokens", x.shape[2]) > 1:  # each device attends for its own tokens, with all heads
            tokens, whole = ("batch", None, "tokens", None), ("batch", None, None, None)
            return on_each_device(self.attend, None, (query, keys_values), (tokens, whole))
        return self.attend(None, query, keys_values)

    def attend(self, _: None, query: Float[Array, "B F S D"], keys_values: tuple[tuple[Array, Array], ...]) -> Array:
        """The sum of the attention to text and image, [B, F, S, D], for normalised queries."""
        own = rearrange(query, "b f s (n d) -> b (f s) n d", n=self.num_heads)
        out = [softmax_attention(own, key, value) for key, value in keys_values]
        return sum(out[1:], start=out[0]).reshape(query.shape)


class WanBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward; the timestep modulates self-attention and feed-forward."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.dtype = jnp.dtype(config.dtype)
        self.passes: Passes | None = None  # set by `unroll_layers`
        self.modulation = nnx.Param(modulation_table(config, 6, rngs))
        self.norm1 = layer_norm(config, dim, affine=False, rngs=rngs)
        self.self_attn = SelfAttention(config, rngs=rngs)
        self.norm3 = layer_norm(config, dim, affine=True, rngs=rngs)
        self.cross_attn = CrossAttention(config, rngs=rngs)
        self.norm2 = layer_norm(config, dim, affine=False, rngs=rngs)
        self.ffn = MLP(config, (dim, config.ffn_dim, dim), act=gelu_tanh, rngs=rngs)

    def modulations(self, time: Float[Array, "B T 6 D"]) -> list[Float[Array, "B T 1 D"]]:
        """Shift, scale, gate of the self-attention, then of the feed-forward, broadcast over a frame's tokens."""
        table = time + self.modulation[...].astype(time.dtype)[None]
        return [table[:, :, None, i] for i in range(6)]

    def modulated(self, norm, x: Array, shift: Array, scale: Array) -> Array:
        """norm(x) * (1 + scale) + shift, computed in float32 or wider.

        Args:
            norm: Norm over the last axis.
            x: [B, F, S, D].
            shift: [B, F or 1, 1, D].
            scale: As `shift`.

        Returns:
            An array like x, in the block's dtype.
        """
        return (norm(x) * (1 + scale) + shift).astype(self.dtype)

    def attention_inputs(self, x: Float[Array, "B F S D"], time: Float[Array, "B T 6 D"]) -> Float[Array, "B N D"]:
        """The input of the projections to queries, keys and values, tokens flattened; for attention with a gate."""
        shift, scale = self.modulations(time)[:2]
        return rearrange(self.modulated(self.norm1, x, shift, scale), "b f s d -> b (f s) d")

    def gated(self, x: Array, y: Array, gate: Array | None) -> Array:
        """x + y * gate, computed in float32 or wider; None if y already includes the gate."""
        if gate is None:
            return x + y
        return (x.astype(gate.dtype) + y.astype(gate.dtype) * gate).astype(self.dtype)

    def __call__(
        self,
        x: Float[Array, "B F S D"],
        time: Float[Array, "B T 6 D"],
        rope: tuple[Array, Array],
        keys_values: tuple[tuple[Array, Array], ...],
        attend: Attend,
        *,
        tokens: int | None = None,
        recompute: bool = False,
    ) -> Float[Array, "B F S D"]:
        """Computes the block.

        Args:
            x: Residual stream by frame, with `padded` tokens per frame.
            time: Projected timestep embedding, T = F or 1.
            rope: Cosines and sines of the tokens.
            keys_values: Keys and values of the cross-attention, as its `keys_values` gives them.
            attend: (query, key, value) -> output, over the flattened tokens without padding.
            tokens: Tokens of a frame without padding; None if there is no padding.
            recompute: Whether to save memory in the backward pass: if the feed-forward's hidden layer is larger than
                `HIDDEN_BYTES`, everything after the self-attention is computed by groups of frames.

        Returns:
            The residual stream.
        """
        shift, scale, *after = self.modulations(time)
        groups = frame_groups(x.shape, self.ffn.fc1.out_features, self.dtype) if recompute else 1

        def project(x, shift, scale):
            return self.self_attn.qkv(
                self.modulated(self.norm1, x, shift, scale), rope, x.shape[2] if tokens is None else tokens
            )

        if groups > 1:  # norms and rotation are recomputed after the attention's gradient rather than kept during it
            project = jax.checkpoint(project, policy=PRODUCTS)
        out = heads_to_tokens(attend(*project(x, shift, scale)), *x.shape[1:3])
        if groups > 1:
            return self.after_attention_by_groups(x, out, after, keys_values, groups)
        return self.after_attention(x, out, after, keys_values)

    def after_attention(
        self,
        x: Float[Array, "B F S D"],
        out: Float[Array, "B F S D"],
        modulations: Sequence[Any],
        keys_values: tuple[tuple[Array, Array], ...],
    ) -> Float[Array, "B F S D"]:
        """The rest of the block, which is independent per token: output projection, cross-attention, feed-forward.

        Args:
            x: Residual stream that entered the block.
            out: Output of the self-attention.
            modulations: Gate of the self-attention; shift, scale and gate of the feed-forward. A gate is None if it was
                multiplied into weights.
            keys_values: Keys and values of the cross-attention.

        Returns:
            The residual stream.
        """
        if in_stacks.on and x.shape[0] == modulations[0].shape[1] == 1:
            gate1, shift2, scale2, gate2 = self.gates_in_weights(modulations)
            x = kept(self.gated(x, bias_apart(self.self_attn.o, out), gate1))
        else:
            gate1, shift2, scale2, gate2 = modulations
            x = self.gated(x, kept(self.self_attn.o(out)), gate1)
        attended = self.cross_attn.attended(self.norm3(x).astype(self.dtype), keys_values)
        x = kept(x + bias_apart(self.cross_attn.o, attended)) if in_stacks.on else x + kept(self.cross_attn.o(attended))
        y = self.ffn(self.modulated(self.norm2, x, shift2, scale2))
        return self.gated(x, y, gate2)

    def gates_in_weights(self, modulations: Sequence[Modulation]) -> list[Any]:
        """Multiplies gates into the preceding dense layers where possible, and returns the remaining modulations.

        A gate shared by all tokens scales the columns of the weights. Its gradient then follows from that of the
        weights, and the backward pass need not recompute the feed-forward's last product, which only the gate uses.
        """
        gate1, shift, scale, gate2 = modulations
        if type(self.self_attn.o) is nnx.Linear:
            self.self_attn.o, gate1 = with_gate(self.self_attn.o, gate1), None
        if type(self.ffn.fc2) is nnx.Linear:
            self.ffn.fc2, gate2 = with_gate(self.ffn.fc2, gate2), None
        return [gate1, shift, scale, gate2]

    def after_attention_by_groups(self, x, out, modulations, keys_values, groups: int):
        """`after_attention` for one group of frames at a time, each recomputed in the backward pass.

        Nothing is computed three times: if the whole block is recomputed, its output is not needed.
        """

        graph, weights = nnx.split(self)
        per_frame = modulations[0].shape[1] > 1

        def run(weights, x, out, modulations, keys_values):
            block = nnx.merge(graph, weights)
            if x.shape[0] == 1 and not per_frame:
                modulations = block.gates_in_weights(modulations)

            def split(array):  # [B, F, ...] to [groups, B, F/groups, ...]
                return jnp.moveaxis(array.reshape(array.shape[0], groups, -1, *array.shape[2:]), 1, 0)

            @jax.checkpoint
            def part(inputs):
                x, out, *own = inputs
                return block.after_attention(x, out, own if per_frame else modulations, keys_values)

            parts = jax.lax.map(part, tuple(map(split, (x, out, *modulations) if per_frame else (x, out))))
            return jnp.moveaxis(parts, 0, 1).reshape(x.shape)

        tokens, of_batch = ("batch", None, "tokens", None), ("batch", None, None, None)
        arrays = (x, out, tuple(modulations), keys_values)
        return on_each_device(run, weights, arrays, (tokens, tokens, of_batch, of_batch))


def with_gate(linear: nnx.Linear, gate: Modulation) -> nnx.Linear:
    """A dense layer whose output is multiplied by a gate that is the same for all tokens.

    Examples:
        >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        >>> with_gate(layer, jnp.zeros((1, 1, 1, 3)))(jnp.ones(2)).tolist()
        [0.0, 0.0, 0.0]
    """
    gate = gate.reshape(-1)
    graph, state = nnx.split(linear)
    return nnx.merge(graph, jax.tree.map(lambda x: (x.astype(gate.dtype) * along_last(gate, x)).astype(x.dtype), state))


def frame_groups(shape: tuple[int, ...], hidden: int, dtype: jnp.dtype) -> int:
    """Least number of groups of frames whose hidden layers fit in `HIDDEN_BYTES`, or the number of frames.

    Examples:
        >>> frame_groups((1, 21, 30 * 52, 1536), 8960, jnp.dtype("bfloat16"))
        7
        >>> frame_groups((1, 3, 30 * 52, 1536), 8960, jnp.dtype("bfloat16"))
        1
    """
    batch, frames, tokens, _ = shape
    batch, tokens = batch // parts("batch", batch), tokens // parts("tokens", tokens)  # on one device
    size = batch * frames * tokens * hidden * dtype.itemsize
    return next((n for n in range(1, frames) if frames % n == 0 and size <= n * HIDDEN_BYTES), frames)


class PatchEmbedding(nnx.Module):
    """A convolution with stride equal to its kernel, computed as one matrix product over patches."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        pt, ph, pw = config.patch_size
        param_dtype = jnp.dtype(config.param_dtype)
        flat = xavier(rngs.params(), (pt * ph * pw * config.in_channels, config.dim), param_dtype)
        self.kernel = nnx.Param(flat.reshape(pt, ph, pw, config.in_channels, config.dim))
        self.bias = nnx.Param(jnp.zeros((config.dim,), param_dtype))

    def __call__(
        self, latents: Float[Array, "B F H W C"], arrange: Callable[[Array], Array] = lambda patches: patches
    ) -> Float[Array, "B f S D"]:
        """Tokens by frame, in row-major order; `arrange` is applied to the patches [B, f, S, P] before the product."""
        kernel = self.kernel[...].astype(self.dtype)
        pt, ph, pw = kernel.shape[:3]
        patches = rearrange(
            latents.astype(self.dtype), "b (f pt) (h ph) (w pw) c -> b f (h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw
        )
        tokens = arrange(patches) @ kernel.reshape(-1, kernel.shape[-1])
        return tokens + along_last(self.bias[...].astype(self.dtype), tokens)


class ImageEmbedding(nnx.Module):
    """Projects features of the image encoder to the channels of the model (i2v); its norms use torch's eps."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.dtype = jnp.dtype(config.dtype)
        self.norm1 = layer_norm(config, config.image_dim, affine=True, rngs=rngs, eps=1e-5)
        self.mlp = MLP(config, (config.image_dim, config.image_dim, config.dim), act=gelu_exact, rngs=rngs)
        self.norm2 = layer_norm(config, config.dim, affine=True, rngs=rngs, eps=1e-5)

    def __call__(self, features: Float[Array, "B I E"]) -> Float[Array, "B I D"]:
        """Rows for the cross-attention."""
        return self.norm2(self.mlp(self.norm1(features).astype(self.dtype))).astype(self.dtype)


class Head(nnx.Module):
    """Modulated norm and projection of each token to its patch, in float32 or wider."""

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.modulation = nnx.Param(modulation_table(config, 2, rngs))
        self.norm = layer_norm(config, config.dim, affine=False, rngs=rngs)
        zeros = nnx.initializers.zeros_init()
        self.proj = linear(config, config.dim, config.patch_features, rngs=rngs, init=zeros, precise=True)

    def __call__(self, x: Float[Array, "B F S D"], time: Float[Array, "B T D"]) -> Float[Array, "B F S P"]:
        """Patches [B, F, S, P]; `time` is the embedding before its projection, T = F or 1."""
        table = time[:, :, None] + self.modulation[...].astype(time.dtype)[None]
        shift, scale = table[:, :, None, 0], table[:, :, None, 1]
        return self.proj(self.norm(x) * (1 + scale) + shift)


def modulation_table(config: WanConfig, rows: int, rngs: nnx.Rngs) -> Float[Array, "1 rows D"]:
    """A modulation table initialised from a normal distribution with variance 1/D."""
    init = nnx.initializers.normal(config.dim**-0.5)
    return init(rngs.params(), (1, rows, config.dim), jnp.dtype(config.param_dtype))


def sinusoid(timesteps: Real[Array, "*batch"], width: int) -> Float[Array, "*batch width"]:
    """The sinusoidal embedding [cos(t w_0), ..., sin(t w_0), ...] with w_m = 10000^(-2m/width), cosines first.

    Wan computes the angles, up to 1000, in float64. Here t = t1 + t2 and w = w1 + w2 with 12-bit t1 and w1, so that
    t1*w1 is exact in float32 and the small remainder is added by the addition theorem: accurate to about 1e-7.

    Examples:
        >>> [round(float(x), 6) for x in sinusoid(jnp.array([1000.0]), 256)[0, :2]]
        [0.562379, 0.789615]

    Args:
        timesteps: Timesteps from 0 to 1000, which may be fractional.
        width: Channels of the embedding, even.

    Returns:
        [..., width], float32.
    """
    half = width // 2
    exact = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
    exponent = np.floor(np.log2(exact)) - 11
    coarse = (np.round(exact / 2.0**exponent) * 2.0**exponent).astype(np.float32)
    rest = (exact - coarse).astype(np.float32)
    t = timesteps.astype(jnp.float32)[..., None]
    t1 = jax.lax.reduce_precision(t, exponent_bits=8, mantissa_bits=11)
    coarse, rest, whole = (along_last(w, t) for w in (coarse, rest, exact.astype(np.float32)))
    large = t1 * coarse
    small = t1 * rest + (t - t1) * whole
    cos = jnp.cos(large) * jnp.cos(small) - jnp.sin(large) * jnp.sin(small)
    sin = jnp.sin(large) * jnp.cos(small) + jnp.cos(large) * jnp.sin(small)
    return jnp.concatenate([cos, sin], axis=-1)
