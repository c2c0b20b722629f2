"""The configuration of a Wan VAE: channels, levels, and the statistics of its latents."""

import dataclasses
from typing import Any

from monarch_jax.checks import positive
from monarchrt.models.presets import from_preset

# per-channel statistics of the released autoencoder's latents (Wan 2.1; the same in diffusers' vae/config.json)
WAN21_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN21_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
_LARGEST = {"dim": 2**14, "z_dim": 2**14, "num_res_blocks": 100}  # far above practical values


@dataclasses.dataclass(frozen=True, kw_only=True)
class VAEConfig:
    """Sizes of a causal video autoencoder (Wan technical report, Section 4.1).

    Examples:
        >>> config = vae_config("wan21")
        >>> config.spatial_factor, config.temporal_factor, config.latent_shape(81, 480, 832)
        (8, 4, (21, 60, 104, 16))

    Attributes:
        dim: Channels of the first level.
        dim_mult: Channels of each level as multiples of `dim`; rows and columns are halved between levels.
        z_dim: Channels of the latents.
        num_res_blocks: Residual blocks of each encoder level; the decoder has one more.
        temporal_downsample: Whether each halving also halves the frames, in the encoder's order.
        latents_mean: Mean of each latent channel; latents are returned as (mu - mean) / std.
        latents_std: Standard deviation of each latent channel.

    Raises:
        ValueError: If a size is invalid, or lengths of the tuples are inconsistent.
    """

    dim: int = 96
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    z_dim: int = 16
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = WAN21_MEAN
    latents_std: tuple[float, ...] = WAN21_STD

    def __post_init__(self):
        for name, most in _LARGEST.items():
            positive(name, getattr(self, name), most=most)
        for name in ("dim_mult", "temporal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for multiple in self.dim_mult:
            positive("dim_mult", multiple, most=64)
        if len(self.temporal_downsample) != len(self.dim_mult) - 1:
            raise ValueError(
                f"temporal_downsample={self.temporal_downsample} has {len(self.temporal_downsample)} entries; "
                f"dim_mult={self.dim_mult} needs {len(self.dim_mult) - 1}."
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; z_dim={self.z_dim} needs as many.")
        if min(self.latents_std) <= 0:
            raise ValueError(f"latents_std={self.latents_std} has an entry that is not positive.")
        odd = [width for width in self.widths[1:] if width % 2]
        if odd:
            raise ValueError(f"dim={self.dim} with dim_mult={self.dim_mult} gives odd widths {odd}; use an even dim.")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.dim * multiple for multiple in self.dim_mult)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent position along rows and columns."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame after the first."""
        return 2 ** sum(self.temporal_downsample)

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Latents [F, h, w, z] of a video of `frames` x `height` x `width` pixels.

        Raises:
            ValueError: If `frames` is not 1 + 4 k, or `height` or `width` is not a multiple of 8 (for the released
                factors).
        """
        time, space = self.temporal_factor, self.spatial_factor
        if frames < 1 or (frames - 1) % time:
            below = 1 + max(frames - 1, 0) // time * time
            raise ValueError(
                f"frames={frames} is not 1 + {time} k; the nearest that are: "
                f"{f'{below} and ' if frames > 1 else ''}{below + time if frames > 1 else 1}."
            )
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % space:
                below = size // space * space
                nearest = f"{below} and {below + space}" if below > 0 else f"{space}"
                raise ValueError(f"{name}={size} pixels is not a multiple of {space}; the nearest that are: {nearest}.")
        return 1 + (frames - 1) // time, height // space, width // space, self.z_dim


PRESETS: dict[str, VAEConfig] = {
    "wan21": VAEConfig(),
    "tiny": VAEConfig(dim=8, num_res_blocks=1),
}


def vae_config(name: str, /, **overrides: Any) -> VAEConfig:
    """A preset by name, with fields replaced.

    Examples:
        >>> vae_config("tiny", dim=4).widths
        (4, 8, 16, 16)

    Args:
        name: One of `PRESETS`.
        **overrides: Fields of `VAEConfig`.

    Returns:
        The configuration.

    Raises:
        ValueError: If the preset or a field is unknown, or a value is invalid.
    """
    return from_preset(PRESETS, name, overrides)
