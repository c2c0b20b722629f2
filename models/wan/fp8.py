"""Products with weights in FP8 (e4m3), for generation with a network that is not trained any more."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float8e4m3fn, Float32

from monarchrt.models.broadcasting import along_last
from monarchrt.models.wan.dit import WanModel

LARGEST = 448.0  # of e4m3
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
        dtype: Of the result.
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
        eights, rows = rounded(x)
        sums = jax.lax.dot_general(
            eights, self.kernel[...], (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=self.dtype
        )
        scaled = sums.astype(jnp.float32) * rows[..., None] * along_last(self.scale[...], sums)
        return (scaled + along_last(self.bias[...].astype(jnp.float32), sums)).astype(self.dtype)


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
    layers = [(blocks.self_attn, "qkv"), (blocks.ffn, ("fc1", "fc2"))]
    if model.config.dim >= WIDE:
        layers += [(blocks.self_attn, "o"), (blocks.cross_attn, "qo")]
    for module, names in layers:
        for name in names:
            if isinstance(linear := getattr(module, name), nnx.Linear):
                setattr(module, name, FP8Linear(linear))
    return model
