"""The Wan 2.1 video autoencoder in Flax NNX, and a tiny one for the same latents, for whole clips and for streams."""

from monarchrt.models.vae.checkpoint import load_vae
from monarchrt.models.vae.config import PRESETS, VAEConfig, vae_config
from monarchrt.models.vae.tiny import TinyVAE, TinyVAEConfig
from monarchrt.models.vae.tiny_checkpoint import TINY_FILES, load_tiny_vae
from monarchrt.models.vae.vae import WanVAE

__all__ = [
    "PRESETS",
    "TINY_FILES",
    "TinyVAE",
    "TinyVAEConfig",
    "VAEConfig",
    "WanVAE",
    "load_tiny_vae",
    "load_vae",
    "vae_config",
]
