"""The Wan 2.1 video autoencoder in Flax NNX: whole clips, and streaming in both directions."""

from models.vae.checkpoint import load_vae
from models.vae.config import PRESETS, VAEConfig, vae_config
from models.vae.vae import WanVAE

__all__ = ["PRESETS", "VAEConfig", "WanVAE", "load_vae", "vae_config"]
