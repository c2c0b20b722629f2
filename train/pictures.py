"""Held-out examples and samples as pixels, decoded from latents by their VAE, or from pixel blocks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from monarchrt.models.errors import UserError, user_input
from monarchrt.train.data import ClipWindows, Source
from monarchrt.train.texts import PromptFile

if TYPE_CHECKING:
    from monarchrt.models.generate.decoders import FrameDecoder

PART = 3  # latent frames per call of the decoder


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Functions that convert latents and held-out examples to pixels.

    Attributes:
        decode: Decodes latents [F, h, w, C] into frames [T, H, W, 3], uint8.
        clip: (index of a held-out example, its last F latent frames) -> its frames; None if there are no clips, as for
            prompts.
    """

    decode: Callable[[Float[np.ndarray, "F h w C"]], UInt8[np.ndarray, "T H W 3"]]
    clip: Callable[[int, Float[np.ndarray, "F h w C"]], UInt8[np.ndarray, "T H W 3"]] | None


def pictures(source: Source, components: Path | None, *, every: int, load: bool = True) -> Pictures | None:
    """Sets up the conversion of a run's samples to pixels.

    Args:
        source: The data of the run.
        components: Folder or repository with the VAE of latents; not needed for clips.
        every: The setting `sample_every`, for messages.
        load: Whether to read the VAE; otherwise it only has to exist.

    Returns:
        The conversions; None if the VAE was not read.

    Raises:
        UserError: If the data are latents without `components`, or the VAE cannot be read or has other channels.
    """
    if isinstance(source, ClipWindows):
        return Pictures(decode=source.transform.decode, clip=lambda index, _: source.held_out_window(index))
    if components is None:
        raise UserError(
            f"sample_every is {every}, but latents are shown as pixels by their VAE; give its folder with components, "
            f"for example Wan-AI/Wan2.1-T2V-1.3B, or sample_every 0"
        )
    from monarchrt.models.generate.config import GenerateConfig
    from monarchrt.models.generate.load import find_components, load_decoder

    settings = GenerateConfig(components=components)
    path = find_components(settings, components, texts=False).vae
    if not load:
        return None
    with user_input():
        decoder = load_decoder(settings, path)
    if (channels := source.latent_shape[-1]) != decoder.channels:
        raise UserError(
            f"sample_every is {every}, but components {components} decodes latents of {decoder.channels} channels, and "
            f"these have {channels}; give the VAE that made them, or sample_every 0"
        )

    def decode(latents: np.ndarray) -> np.ndarray:
        return decoded_frames(decoder, latents)

    return Pictures(decode=decode, clip=None if isinstance(source, PromptFile) else lambda _, latents: decode(latents))


def decoded_frames(decoder: "FrameDecoder", latents: Float[np.ndarray, "F h w C"]) -> UInt8[np.ndarray, "T H W 3"]:
    """Decodes the latents of a clip, a few frames at a time.

    Examples:
        >>> from monarchrt.models.generate.decoders import PatchDecoder
        >>> from monarchrt.models.media.latents import PatchDCT
        >>> decoded_frames(PatchDecoder(PatchDCT(patch=4)), np.zeros((7, 2, 3, 48), np.float32)).shape
        (7, 8, 12, 3)
    """
    state, made = decoder.start(1, *latents.shape[1:3]), []
    for begin in range(0, latents.shape[0], PART):
        frames, state = decoder.decode(jnp.asarray(latents[None, begin : begin + PART], jnp.float32), state)
        made.append(np.asarray(frames[0]))
    return np.concatenate(made)
