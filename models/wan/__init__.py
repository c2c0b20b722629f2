"""Wan 2.1 video diffusion transformers in Flax NNX."""

from monarchrt.models.attention.base import Attention
from monarchrt.models.attention.dense import DenseAttention
from monarchrt.models.attention.monarch import MonarchAttention
from monarchrt.models.wan.config import PRESETS, WanConfig, wan_config
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
