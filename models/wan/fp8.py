"""Matrix products with weights in FP8 (e4m3), for inference."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float8e4m3fn, Float32

from monarch_jax.intermediates import LARGEST
from monarchrt.models.broadcasting import along_last
from monarchrt.models.wan.dit import WanModel
from monarchrt.models.wan.layers import MLP

CAPABILITY = 8.9  # least compute capability with products of e4m3
WIDE = 2048  # least channels for which a product is worth rounding its input for it alone
SMALLEST = 2.0**-100  # least scale, so that rows of zeros stay zeros


def rounded(x: Float[Array, "*batch D"]) -> tuple[Float8e4m3fn[Array, "*batch D"], Float32[Array, "*batch"]]:
    """Rounds to e4m3 with one scale per row, the row's largest magnitude over the largest e4m3.

    Examples:
        >>> eights, scale = rounded(jnp.array([[1.0, -896.0]]))
        >>> (eights.astype(jnp.float32) * scale[:, None]).tolist()
        [[1.0, -896.0]]

    Args:
        x: [..., D] of any float dtype; NaN stays NaN, and infinity makes its row NaN.

    Returns:
        `x` divided by the scale and rounded to nearest, and the scale [...].
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / LARGEST, SMALLEST)
    return (x / scale[..., None]).astype(jnp.float8_e4m3fn), scale


class FP8Linear(nnx.Module):
    """A dense layer with weights in e4m3 and one scale per output; its input is rounded row by row.

    Sums are in float32. The product is rounded to the dtype before it is scaled, as the library returns it, so that no
    float32 array is written. For inference only: rounding has no gradient.

    Attributes:
        kernel: [*layers, out, in], e4m3.
        scale: [*layers, out], float32.
        bias: [*layers, out], in its original dtype.
        dtype: Dtype of the result.
    """

    def __init__(self, linear: nnx.Linear):
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = jnp.dtype(linear.dtype)
        kernel, scale = jax.jit(lambda kernel: rounded(jnp.swapaxes(kernel, -1, -2)))(linear.kernel[...])
        self.kernel, self.scale = nnx.Param(kernel), nnx.Param(scale)
        if linear.bias is None:
            raise ValueError("linear has no bias; the network's products all have one.")
        self.bias = nnx.Param(linear.bias[...])

    def __call__(self, x: Float[Array, "*batch D_in"]) -> Float[Array, "*batch D_out"]:
        """x W + b."""
        return self.of_rounded(*rounded(x)).astype(self.dtype)

    def of_rounded(
        self, eights: Float8e4m3fn[Array, "*batch D_in"], rows: Float32[Array, "*batch"]
    ) -> Float32[Array, "*batch D_out"]:
        """The layer's float32 output for an input that was rounded before, and its scales."""
        sums = jax.lax.dot_general(
            eights, self.kernel[...], (((eights.ndim - 1,), (1,)), ((), ())), preferred_element_type=self.dtype
        )
        scaled = sums.astype(jnp.float32) * rows[..., None] * along_last(self.scale[...], sums)
        return scaled + along_last(self.bias[...].astype(jnp.float32), sums)


@jax.jit
def _largest(kernel: Float[Array, "*layers D_in D_out"], bias: Float[Array, "*layers D_out"]) -> Float[Array, "..."]:
    """The largest norm of a column and the largest bias, [*layers, 2] in float32."""
    norms = jnp.sqrt(jnp.max(jnp.sum(kernel.astype(jnp.float32) ** 2, axis=-2), axis=-1))
    return jnp.stack([norms, jnp.max(jnp.abs(bias.astype(jnp.float32)), axis=-1)], axis=-1)


class FP8FeedForward(nnx.Module):
    """A feed-forward network of two `FP8Linear` layers that rounds the hidden layer as it is computed.

    The scale of a hidden row is an upper bound of its magnitudes, since the maximum is known only after the whole row:
    with a bound, the hidden layer is written once, in 8 bits. As e4m3 is a floating-point format, a bound that is ten
    times too large reduces the range of small numbers but not the precision of the others.

    Attributes:
        fc1, fc2: The layers.
        largest: [*layers, 2], the largest column norm of fc1's weights and the largest magnitude of its biases, which
            with the norm of an input bound the hidden layer by the Cauchy-Schwarz inequality.
    """

    def __init__(self, ffn: MLP):
        self.act, self.fc1, self.fc2 = ffn.act, FP8Linear(ffn.fc1), FP8Linear(ffn.fc2)
        self.largest = nnx.Param(_largest(ffn.fc1.kernel[...], self.fc1.bias[...]))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """fc2(act(fc1(x)))."""
        norms, bias = self.largest[...]
        lengths = jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=-1))
        # rounding increases norms of rows and columns by a sixteenth at most; activations do not exceed their inputs
        scale = jnp.maximum((1.2 * lengths * norms + bias) / LARGEST, SMALLEST)
        hidden = self.act(self.fc1.of_rounded(*rounded(x)))
        return self.fc2.of_rounded((hidden / scale[..., None]).astype(jnp.float8_e4m3fn), scale).astype(self.fc2.dtype)


def fp8_products(model: WanModel) -> WanModel:
    """Converts the large matrix products of a model's blocks to FP8: query, key, value and the feed-forward layers.

    With 2048 channels or more, also the output projection of the attention, and query and output of the
    cross-attention. Embeddings, the head and everything that is not a product with weights keep their dtypes.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> model = fp8_products(WanModel(wan_config("tiny", dtype="bfloat16"), rngs=nnx.Rngs(0)))
        >>> model.blocks.ffn.fc1.kernel.dtype.name
        'float8_e4m3fn'

    Args:
        model: The model; it does not change.

    Returns:
        A new model that shares the other arrays; the new weights take one byte each.
    """
    model = nnx.merge(*nnx.split(model))
    blocks = model.blocks
    if isinstance(blocks.ffn, FP8FeedForward):  # already converted
        return model
    layers = [(blocks.self_attn, "qkvo"), (blocks.cross_attn, "qo")]
    for module, names in layers if model.config.dim >= WIDE else [(blocks.self_attn, "qkv")]:
        for name in names:
            setattr(module, name, FP8Linear(getattr(module, name)))
    blocks.ffn = FP8FeedForward(blocks.ffn)  # type: ignore[assignment]
    return model
