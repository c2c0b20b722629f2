"""Held-out examples as pixels: what clips are cut from, or latents through the VAE that they are of."""

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

PART = 3  # latent frames that are decoded at once


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """How to show latents, and what is held out.

    Attributes:
        decode: Latents [F, h, w, C] to frames [T, H, W, 3], uint8.
        clip: A held-out window's frames, given as index and its latents, the newest F of them; None: there is none, as
            of prompts.
    """

    decode: Callable[[Float[np.ndarray, "F h w C"]], UInt8[np.ndarray, "T H W 3"]]
    clip: Callable[[int, Float[np.ndarray, "F h w C"]], UInt8[np.ndarray, "T H W 3"]] | None


def pictures(source: Source, components: Path | None, *, every: int, load: bool = True) -> Pictures | None:
    """How a run shows what it samples.

    Args:
        source: Its data.
        components: Folder or repository with the VAE of latents; not needed for clips.
        every: `sample_every`, named in what is said.
        load: Whether the VAE is read; else it is looked for only.

    Returns:
        The pictures; None if the VAE was not read.

    Raises:
        UserError: If latents have no VAE, it cannot be read, or it is of latents of other channels.
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
    """The frames of a clip's latents, some at a time.

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
