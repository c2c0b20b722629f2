"""Softmax attention of all queries to all keys, by cuDNN where it can run."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from monarch_jax.devices import on_cuda
from monarchrt.models.sharding import Logical, on_each_device

IMPLEMENTATIONS = ("xla", "cudnn")
BY_HEADS = ("batch", None, "heads", None)
BY_QUERIES = ("batch", "tokens", None, None)


def softmax_attention(
    query: Float[Array, "B Q n d"],
    key: Float[Array, "B K n d"],
    value: Float[Array, "B K n d"],
    *,
    valid_keys: Int[Array, ""] | None = None,
    implementation: str | None = None,
    split: tuple[Logical, ...] = BY_HEADS,
) -> Float[Array, "B Q n d"]:
    """Softmax attention without a mask, scale d^-1/2, float32 softmax.

    Examples:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> softmax_attention(x, x, x).shape
        (1, 8, 2, 4)

    Args:
        query: [B, queries, heads, head_dim].
        key: [B, keys, heads, head_dim].
        value: As `key`.
        valid_keys: How many leading keys are seen, a traced int32 scalar; None sees all.
        implementation: "xla", "cudnn", or None: cuDNN for half precision on an NVIDIA GPU from Ampere on, else XLA.
        split: How a mesh of devices, where one is set, shares the work: logical axes of `query`; each device attends
            for its part alone, to all keys (cuDNN takes nothing that is split along queries, or not alike).

    Returns:
        [B, queries, heads, head_dim].

    Raises:
        ValueError: If cuDNN is asked for and the dtype or head size is beyond it.
    """
    cudnn_can = query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    if implementation is None:
        implementation = "cudnn" if cudnn_can and on_cuda(capability=8) else "xla"
    if implementation == "cudnn" and not cudnn_can:
        raise ValueError(
            f"implementation='cudnn' needs bfloat16 or float16 and a head size that is a multiple of 8 up to 128, got "
            f"{query.dtype} and {query.shape[-1]}; use implementation='xla' or dtype='bfloat16'."
        )
    lengths = None if valid_keys is None else jnp.full(query.shape[:1], valid_keys, jnp.int32)

    def attend(_: None, query: Array, key: Array, value: Array, lengths: Array | None) -> Array:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            key_value_seq_lengths=lengths,
            implementation=implementation,  # type: ignore[arg-type]
        )

    keys = (split[0], None, *split[2:])
    return on_each_device(attend, None, (query, key, value, lengths), (split, keys, keys, split[:1]))
