"""Products with weights in FP8 (e4m3), for generation with a network that is not trained any more."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float8e4m3fn, Float32

from monarch_jax.intermediates import LARGEST
from monarchrt.models.broadcasting import along_last
from monarchrt.models.wan.dit import WanModel
from monarchrt.models.wan.layers import MLP

CAPABILITY = 8.9  # of NVIDIA GPUs that multiply e4m3
WIDE = 2048  # channels from which a product repays that its input is rounded for it alone
SMALLEST = 2.0**-100  # of a scale: a row of zeros stays zeros


def rounded(x: Float[Array, "*batch D"]) -> tuple[Float8e4m3fn[Array, "*batch D"], Float32[Array, "*batch"]]:
    """Numbers in e4m3 and the scale of each row, its largest number over the largest of e4m3.

    Examples:
        >>> eights, scale = rounded(jnp.array([[1.0, -896.0]]))
        >>> (eights.astype(jnp.float32) * scale[:, None]).tolist()
        [[1.0, -896.0]]

    Args:
        x: Of any float type; NaN stays NaN, and infinity makes its row NaN.

    Returns:
        x over the scale, rounded to nearest, and the scale.
    """
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / LARGEST, SMALLEST)
    return (x / scale[..., None]).astype(jnp.float8_e4m3fn), scale


class FP8Linear(nnx.Module):
    """A dense layer whose weights are e4m3 with a scale for each output; its input is rounded row by row.

    Sums are of float32, and the result is rounded once more to the dtype before both scales, as the product's library
    returns it, so that nothing of float32 is written. Inference only: rounding has no gradient.

    Attributes:
        kernel: [*layers, out, in], e4m3.
        scale: [*layers, out], float32.
        bias: [*layers, out], as it was.
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
        """The same of an input that was rounded, in float32."""
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
    """A feed-forward network of two such layers whose hidden layer is rounded as it is made.

    A row's scale is not that of its largest number, which is known only when all are there: with a bound, the hidden
    layer is written once, in 8 bits. e4m3 is a float: a bound that is ten times too large costs none of its digits, but
    of its smallest numbers.

    Attributes:
        fc1, fc2: The layers.
        largest: [*layers, 2], the largest norm of a column of fc1's weights and the largest of its biases: with the
            norm of an input they bound what comes of it, by Cauchy and Schwarz.
    """

    def __init__(self, ffn: MLP):
        self.act, self.fc1, self.fc2 = ffn.act, FP8Linear(ffn.fc1), FP8Linear(ffn.fc2)
        self.largest = nnx.Param(_largest(ffn.fc1.kernel[...], self.fc1.bias[...]))

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """fc2(act(fc1(x)))."""
        norms, bias = self.largest[...]
        lengths = jnp.sqrt(jnp.sum(x.astype(jnp.float32) ** 2, axis=-1))
        # rounding lengthens a row and a column by a sixteenth each at most; activations are no larger than their inputs
        scale = jnp.maximum((1.2 * lengths * norms + bias) / LARGEST, SMALLEST)
        hidden = self.act(self.fc1.of_rounded(*rounded(x)))
        return self.fc2.of_rounded((hidden / scale[..., None]).astype(jnp.float8_e4m3fn), scale).astype(self.fc2.dtype)


def fp8_products(model: WanModel) -> WanModel:
    """The model with its blocks' large products in FP8: query, key, value and both of the feed-forward.

    Where the network has 2048 channels or more, also the attention's output and the cross-attention's query and output.
    Text, time, patches and the head keep their types, and so does everything that is no product with weights.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> model = fp8_products(WanModel(wan_config("tiny", dtype="bfloat16"), rngs=nnx.Rngs(0)))
        >>> model.blocks.ffn.fc1.kernel.dtype.name
        'float8_e4m3fn'

    Args:
        model: It is left as it is.

    Returns:
        A new one, which shares the other arrays; its new weights take one byte each.
    """
    model = nnx.merge(*nnx.split(model))
    blocks = model.blocks
    if isinstance(blocks.ffn, FP8FeedForward):  # they are already
        return model
    layers = [(blocks.self_attn, "qkvo"), (blocks.cross_attn, "qo")]
    for module, names in layers if model.config.dim >= WIDE else [(blocks.self_attn, "qkv")]:
        for name in names:
            setattr(module, name, FP8Linear(getattr(module, name)))
    blocks.ffn = FP8FeedForward(blocks.ffn)  # type: ignore[assignment]
    return model
