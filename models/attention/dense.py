"""Dense attention: softmax over all tokens, block-causal by one call per block."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from monarch_jax.checks import one_of
from monarchrt.models.attention.base import HOW, NOWHERE, Attention, Context, Density, Grid, visible_share
from monarchrt.models.attention.softmax import IMPLEMENTATIONS, softmax_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseAttention(Attention):
    """Softmax attention over all tokens.

    Examples:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> DenseAttention()(x, x, x, grid=(2, 2, 2)).shape
        (1, 8, 2, 4)

    Attributes:
        implementation: "xla", "cudnn" (half precision on an NVIDIA GPU only), or None: cuDNN where it can run.
    """

    name = "dense"
    implementation: str | None = dataclasses.field(default=None, metadata=HOW)

    def __post_init__(self):
        if self.implementation is not None:
            one_of("implementation", self.implementation, IMPLEMENTATIONS)

    def __call__(
        self,
        query: Float[Array, "B N n d"],
        key: Float[Array, "B N n d"],
        value: Float[Array, "B N n d"],
        *,
        grid: Grid,
        causal_block: int | None = None,
        context: Context = NOWHERE,
    ) -> Float[Array, "B N n d"]:
        """See `Attention`; also ValueError if cuDNN is asked for where it cannot run."""
        if causal_block is None or causal_block >= grid[0]:
            return softmax_attention(query, key, value, implementation=self.implementation)
        # One call per block on the keys it sees: no mask, and nothing computed only to be masked.
        block = causal_block * grid[1] * grid[2]
        outputs = [
            softmax_attention(
                query[:, start : start + block],
                key[:, : start + block],
                value[:, : start + block],
                implementation=self.implementation,
            )
            for start in range(0, query.shape[1], block)
        ]
        return jnp.concatenate(outputs, axis=1)

    def attend_cache(
        self,
        cache: Any,
        query: Float[Array, "B N n d"],
        *,
        layer: Int[Array, ""] | None = None,
        context: Context = NOWHERE,
    ) -> Float[Array, "B N n d"]:
        """See `Attention`. The order of keys is of no matter, so that a cache in any tiled order is read as it lies."""
        key, value = cache.key, cache.value
        if layer is not None:
            key, value = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (key, value))
        _, height, width = cache.spec.grid
        return softmax_attention(
            query,
            key.reshape(key.shape[0], -1, *key.shape[-2:]),
            value.reshape(value.shape[0], -1, *value.shape[-2:]),
            valid_keys=cache.valid_frames * (height * width),  # whole groups of frames come first
            implementation=self.implementation,
        )

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """Everything that is visible."""
        return Density(1.0, visible_share(grid, causal_block), 1.0)

    @classmethod
    def from_old_json(cls, data: Any) -> Attention | None:
        """It was null."""
        return cls() if data is None else None
