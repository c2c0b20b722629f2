"""Self-attention of a block by its setting: dense softmax or tiled Monarch, bidirectional or block-causal."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from monarch_jax import monarch_attention
from monarch_jax.devices import on_cuda
from monarchrt.models.wan.config import DenseAttention, MonarchAttention


def attend(
    query: Float[Array, "B S n d"],
    key: Float[Array, "B S n d"],
    value: Float[Array, "B S n d"],
    *,
    grid: tuple[int, int, int],
    setting: DenseAttention | MonarchAttention,
    causal_block: int | None = None,
) -> Float[Array, "B S n d"]:
    """Attention among all tokens of `grid`, after the rotary embedding.

    Example:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> attend(x, x, x, grid=(2, 2, 2), setting=DenseAttention()).shape
        (1, 8, 2, 4)

    Args:
        query: [B, F*h*w, heads, head_dim].
        key: Likewise.
        value: Likewise.
        grid: (F, h, w) tokens.
        setting: Dense or Monarch.
        causal_block: Frames per block: a block sees itself and earlier ones. None sees everything.

    Returns:
        As `query`, in its dtype.

    Raises:
        ValueError: If a tile does not fit the grid, or cuDNN is asked for where it cannot run.
    """
    if isinstance(setting, MonarchAttention):
        return monarch_attention(
            query,
            key,
            value,
            grid=grid,
            tile=setting.tile,
            blocks=setting.blocks,
            num_iters=setting.num_iters,
            causal_block=causal_block,
            keep_intermediates=setting.keep_intermediates,
            implementation=setting.implementation,
        )
    if causal_block is None or causal_block >= grid[0]:
        return dense_attention(query, key, value, implementation=setting.implementation)
    # One call per block on the keys it sees: no mask, and nothing computed only to be masked.
    block = causal_block * grid[1] * grid[2]
    outputs = [
        dense_attention(
            query[:, start : start + block],
            key[:, : start + block],
            value[:, : start + block],
            implementation=setting.implementation,
        )
        for start in range(0, query.shape[1], block)
    ]
    return jnp.concatenate(outputs, axis=1)


def dense_attention(
    query: Float[Array, "B Q n d"],
    key: Float[Array, "B K n d"],
    value: Float[Array, "B K n d"],
    *,
    valid_keys: Int[Array, ""] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Q n d"]:
    """Softmax attention without a mask, scale d^-1/2, float32 softmax.

    Args:
        query: [B, queries, heads, head_dim].
        key: [B, keys, heads, head_dim].
        value: Likewise.
        valid_keys: How many leading keys are seen, a traced int32 scalar; None sees all.
        implementation: "xla", "cudnn", or None: cuDNN for half precision on an NVIDIA GPU from Ampere on, else XLA.

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
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        key_value_seq_lengths=lengths,
        implementation=implementation,  # type: ignore[arg-type]
    )
