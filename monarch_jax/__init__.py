"""Tiled Monarch attention for video diffusion transformers, in JAX (MonarchRT, arXiv 2602.12271)."""

from monarch_jax.attention import monarch_attention, monarch_attention_1d, monarch_factors
from monarch_jax.cache import MonarchKVCache
from monarch_jax.flax import MonarchSelfAttention, attention_fn
from monarch_jax.reference import MonarchFactors
from monarch_jax.spec import BLOCKS, MonarchSpec, bytes_moved, dense_flops, flops, sparsity

__version__ = "0.2.0"

__all__ = [
    "BLOCKS",
    "MonarchFactors",
    "MonarchKVCache",
    "MonarchSelfAttention",
    "MonarchSpec",
    "attention_fn",
    "bytes_moved",
    "dense_flops",
    "flops",
    "monarch_attention",
    "monarch_attention_1d",
    "monarch_factors",
    "sparsity",
]
