"""Dense attention: softmax over all tokens, block-causal by one call per block."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import lax

from monarch_jax.checks import one_of
from monarchrt.models.attention.base import (
    NO_CONTEXT,
    NOT_STORED,
    Attention,
    Clip,
    Context,
    Density,
    Grid,
    Layer,
    Tokens,
    visible_share,
)
from monarchrt.models.attention.softmax import IMPLEMENTATIONS, softmax_attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseAttention(Attention):
    """Softmax attention over all tokens.

    Examples:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> DenseAttention()(x, x, x, grid=(2, 2, 2)).shape
        (1, 8, 2, 4)

    Attributes:
        implementation: "xla", "cudnn" (only half precision on an NVIDIA GPU), or None: cuDNN if it supports the call.
    """

    name = "dense"
    implementation: str | None = dataclasses.field(default=None, metadata=NOT_STORED)

    def __post_init__(self):
        if self.implementation is not None:
            one_of("implementation", self.implementation, IMPLEMENTATIONS)

    def attend_clip(self, query: Tokens, key: Tokens, value: Tokens, clip: Clip) -> Tokens:
        """See `Attention`; also raises ValueError if cuDNN is requested and cannot run."""
        # one call per block on the keys that it sees: needs no mask, and computes no masked entries
        outputs = []
        for start, end in clip.blocks:
            rows, seen = slice(start * clip.per_frame, end * clip.per_frame), slice(end * clip.per_frame)
            block = (query[:, rows], key[:, seen], value[:, seen])
            outputs.append(softmax_attention(*block, implementation=self.implementation))
        return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)

    @property
    def layers_apart(self) -> bool:
        """See `Attention`: cuDNN reads whole arrays."""
        return True

    def attend_cache(self, cache: Any, query: Tokens, *, layer: Layer = None, context: Context = NO_CONTEXT) -> Tokens:
        """See `Attention`. The order of keys does not matter, so that a cache in tiled order is read in place."""
        key, value = cache.key, cache.value
        if layer is not None:
            key, value = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (key, value))
        _, height, width = cache.spec.grid
        return softmax_attention(
            query,
            key.reshape(key.shape[0], -1, *key.shape[-2:]),
            value.reshape(value.shape[0], -1, *value.shape[-2:]),
            valid_keys=cache.valid_frames * (height * width),  # tiles are ordered by frame groups first
            implementation=self.implementation,
        )

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """All visible entries."""
        return Density(1.0, visible_share(grid, causal_block), 1.0)

    @classmethod
    def from_old_json(cls, data: Any) -> Attention | None:
        """Dense attention was stored as null."""
        return cls() if data is None else None
