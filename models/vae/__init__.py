"""The Wan 2.1 video autoencoder in Flax NNX: whole clips, and streaming in both directions."""

from monarchrt.models.vae.checkpoint import load_vae
from monarchrt.models.vae.config import PRESETS, VAEConfig, vae_config
from monarchrt.models.vae.vae import WanVAE

__all__ = ["PRESETS", "VAEConfig", "WanVAE", "load_vae", "vae_config"]
