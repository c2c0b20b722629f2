"""What `remat="cheap"` keeps of a block for its backward pass."""

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

PRODUCT = "product"  # what policies of `jax.checkpoint` call a product with weights
_DOTS = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
PRODUCTS = jax.checkpoint_policies.save_only_these_names(PRODUCT)
_NAMED = jax.checkpoint_policies.save_only_these_names(SAVED, PRODUCT)
in_stacks = Switch("in_stacks")  # on where layers are traced by `through_stacks`


def kept(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A product with weights, its bias added, by the name that policies know it by.

    Kept without its bias, the product's library could not add it, and what reads it would be a pass of its own.
    """
    return checkpoint_name(_row_major(x), PRODUCT)


def kept_apart(linear: Any, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
    """`kept(linear(x))`; by `through_stacks` without its bias, so that the product writes into the stack."""
    return _row_major(_bias_apart(linear, x, lambda y: y)) if in_stacks.on else kept(linear(x))


def bias_apart(linear: Any, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
    """`linear(x)`, whose bias what reads it adds: XLA has no product with a bias read a stack."""
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
    """x, whose gradient is written before anything reads it, and lies in memory as x does.

    In a loop over layers XLA lays out gradients as the gradients of weights would like it, which products do not care
    for, and transposes all that it reads beside them, such as the whole stack of hidden layers. And it sums up the
    gradient of a bias in the pass that writes what is summed: 1.15 ms for a hidden layer on an H200, GELU's gradient
    and value included, where one after the other takes 0.60 and 0.17.
    """
    return x


def _gradient(_, gradient):
    if AxisType.Explicit in get_abstract_mesh().axis_types:  # a user's own: only of parts can it be said
        return (gradient,)

    def laid_out(_, part):
        return jax.lax.optimization_barrier(with_layout_constraint(part, Layout(tuple(range(part.ndim)))))

    # of each device's part: of an array that is split the compiler takes no word for it
    axes = ("batch", None, "tokens", None) if gradient.ndim == 4 else ("batch", *(None,) * (gradient.ndim - 1))
    return (on_each_device(laid_out, None, (gradient,), (axes,)),)


_row_major.defvjp(lambda x: (x, None), _gradient)


def cheap(primitive: Any, *args: Any, **params: Any) -> bool:
    """The policy: products with weights and what attention computes are kept, that of cuDNN too, which has no name."""
    by_cudnn = primitive.name == "dot_product_attention_fwd_wrapper"
    return by_cudnn or any(policy(primitive, *args, **params) for policy in (_DOTS, _NAMED))


_ATTENTION = jax.checkpoint_policies.save_only_these_names(SAVED)
POLICIES = {"full": None, "attention": _ATTENTION, "dots": _DOTS, "cheap": cheap}
BY_GROUPS = ("full", "attention")  # what follows the attention then goes by groups of frames in large clips
