"""Policies of `remat`, and products whose outputs `remat="cheap"` keeps for the backward pass."""

from typing import Any

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AxisType, get_abstract_mesh
from jaxtyping import Array, Float

from monarch_jax.contract import SAVED
from monarchrt.models.broadcasting import along_last
from monarchrt.models.sharding import on_each_device
from monarchrt.models.switch import Switch

PRODUCT = "product"  # name of a product with weights for policies of `jax.checkpoint`
_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
PRODUCTS = jax.checkpoint_policies.save_only_these_names(PRODUCT)
_NAMED = jax.checkpoint_policies.save_only_these_names(SAVED, PRODUCT)
in_stacks = Switch("in_stacks")  # on while `through_stacks` traces layers


def kept(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Names the output of a product with weights, bias included, for policies of `jax.checkpoint`.

    If the output without the bias were kept, the library could not fuse the bias, which would need a pass of its own.
    """
    return checkpoint_name(_row_major(x), PRODUCT)


def kept_apart(linear: Any, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
    """`kept(linear(x))`; within `through_stacks` kept without the bias, so that the product writes into the stack."""
    return _row_major(_bias_apart(linear, x, lambda y: y)) if in_stacks.on else kept(linear(x))


def bias_apart(linear: Any, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
    """`linear(x)` whose bias is added by its consumer: XLA cannot fuse the bias into a product that reads a stack."""
    return _bias_apart(linear, x, jax.lax.optimization_barrier)


def _bias_apart(linear, x, formed):
    if type(linear) is not nnx.Linear or linear.bias is None:
        return linear(x)
    plain = nnx.merge(*nnx.split(linear))
    plain.bias, plain.use_bias = None, False
    y = formed(plain(x))
    return y + along_last(linear.bias[...].astype(y.dtype), y)


@jax.custom_vjp
def _row_major(x):
    """The identity, whose gradient is materialized in the row-major layout of x.

    In a loop over layers XLA chooses layouts of gradients that suit the gradients of weights, although products support
    any layout, and transposes everything else that is read with them, such as the whole stack of hidden layers. It also
    fuses the sum for the bias gradient into the pass that writes the summand: 1.15 ms for a hidden layer on an H200,
    with GELU's gradient and value, against 0.60 ms and 0.17 ms for two separate passes.
    """
    return x


def _gradient(_, gradient):
    if AxisType.Explicit in get_abstract_mesh().axis_types:  # a layout constraint needs each device's part
        return (gradient,)

    def laid_out(_, part):
        return jax.lax.optimization_barrier(with_layout_constraint(part, Layout(tuple(range(part.ndim)))))

    # on each device's part: the compiler ignores the layout constraint of a split array
    axes = ("batch", None, "tokens", None) if gradient.ndim == 4 else ("batch", *(None,) * (gradient.ndim - 1))
    return (on_each_device(laid_out, None, (gradient,), (axes,)),)


_row_major.defvjp(lambda x: (x, None), _gradient)


def cheap(primitive: Any, *args: Any, **params: Any) -> bool:
    """The policy "cheap": keeps products with weights and outputs of attention, also of cuDNN's, which has no name."""
    by_cudnn = primitive.name == "dot_product_attention_fwd_wrapper"
    return by_cudnn or any(policy(primitive, *args, **params) for policy in (_DOTS, _NAMED))


_ATTENTION = jax.checkpoint_policies.save_only_these_names(SAVED)
POLICIES = {"full": None, "attention": _ATTENTION, "dots": _DOTS, "cheap": cheap}
BY_GROUPS = ("full", "attention")  # policies under which layers process large clips by groups of frames
