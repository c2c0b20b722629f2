"""Wan 2.1 video diffusion transformers in Flax NNX."""

from monarchrt.models.wan.config import PRESETS, Attention, DenseAttention, MonarchAttention, WanConfig, wan_config
from monarchrt.models.wan.dit import WanModel, count_parameters

__all__ = [
    "PRESETS",
    "Attention",
    "DenseAttention",
    "MonarchAttention",
    "WanConfig",
    "WanModel",
    "count_parameters",
    "wan_config",
]
