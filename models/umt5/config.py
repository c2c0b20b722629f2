"""The configuration of a umT5 encoder, and presets."""

import dataclasses
from typing import Any

from monarch_jax.checks import positive, small
from monarchrt.models.presets import from_preset

_LARGEST = {"num_layers": 1000, "vocab_size": 2**24}  # and 2^20 for other sizes: far above practical values


@dataclasses.dataclass(frozen=True, kw_only=True)
class UMT5Config:
    """Sizes of a umT5 encoder (Chung et al. 2023, arXiv:2304.09151; the T5 v1.1 layer with a bias table per layer).

    Examples:
        >>> umt5_config("xxl").num_heads
        64

    Attributes:
        vocab_size: Rows of the token embedding.
        dim: Channels D of the residual stream.
        attention_dim: Channels of queries, keys and values over all heads.
        ffn_dim: Hidden channels of the gated feed-forward layers.
        num_heads: Number of attention heads.
        num_layers: Number of layers.
        num_buckets: Rows of each layer's table of relative position biases, half of them for each direction.
        max_distance: Distance from which all positions share a bucket.
        eps: Epsilon of the RMSNorms.

    Raises:
        ValueError: If a size is invalid.
    """

    vocab_size: int
    dim: int
    attention_dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name != "eps":
                positive(field.name, getattr(self, field.name), most=_LARGEST.get(field.name, 2**20))
        small("eps", self.eps)
        if self.attention_dim % self.num_heads:
            raise ValueError(f"attention_dim={self.attention_dim} is not a multiple of num_heads={self.num_heads}.")
        if self.num_buckets % 4:
            raise ValueError(f"num_buckets={self.num_buckets} is not a multiple of 4; umT5 has 32.")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"max_distance={self.max_distance} is not above num_buckets / 4 = {self.num_buckets // 4}."
            )


PRESETS: dict[str, UMT5Config] = {
    "xxl": UMT5Config(vocab_size=256_384, dim=4096, attention_dim=4096, ffn_dim=10_240, num_heads=64, num_layers=24),
    "tiny": UMT5Config(vocab_size=384, dim=32, attention_dim=32, ffn_dim=64, num_heads=4, num_layers=2),
}


def umt5_config(name: str, /, **overrides: Any) -> UMT5Config:
    """A preset by name, with fields replaced.

    Examples:
        >>> umt5_config("tiny", dim=48).dim
        48

    Args:
        name: One of `PRESETS`.
        **overrides: Fields of `UMT5Config`.

    Returns:
        The configuration.

    Raises:
        ValueError: If the preset or a field is unknown, or a value is invalid.
    """
    return from_preset(PRESETS, name, overrides)
