"""The settings of block-by-block generation."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from monarchrt.models.attention.blocks import block_sizes
from monarchrt.models.sampling.noise import Noise, joined
from monarchrt.models.sampling.schedules import NUM_TRAIN_TIMESTEPS
from monarchrt.models.sampling.solve import fresh_noise
from monarchrt.models.sampling.tables import SamplerTable, sampler_table


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The settings of an autoregressive generation.

    Attributes:
        sampler: Name of a sampler, as in `sampler_table`, or a table; few-step for distilled models.
        steps: Network calls per block, or for few-step the list of its timesteps; None: the sampler's default.
        shift: Shift of the noise levels.
        guidance: Weight of classifier-free guidance, with a negative text; 1 is none (distilled models need none).
        block: Latent frames per block.
        independent_first_frame: Whether the first frame is a block of its own.
        window: Frames of keys and values to keep, including the current block; None keeps all.
        sink_frames: Leading frames that a window always keeps.
        context_noise: Timestep, 0 to 1000, given to the network when it writes a finished block into the cache.
            Self-Forcing's setting of this name; as in its inference, no noise is added to the latents themselves.
    """

    sampler: str | SamplerTable = "few-step"
    steps: int | tuple[int, ...] | None = None
    shift: float = 5.0
    guidance: float = 1.0
    block: int = 3
    independent_first_frame: bool = False
    window: int | None = None
    sink_frames: int = 0
    context_noise: float = 0.0

    def __post_init__(self):
        check_sampler(self)
        if self.block < 1:
            raise ValueError(f"block={self.block} is not a positive number of frames; Self-Forcing uses 3.")
        if self.window is not None and self.window < self.block + self.sink_frames:
            raise ValueError(
                f"window={self.window} frames has no room for a block of {self.block} and sink_frames="
                f"{self.sink_frames}; use at least {self.block + self.sink_frames}."
            )
        if self.sink_frames and self.window is None:
            raise ValueError(f"sink_frames={self.sink_frames} needs a window, for example window=21.")

    def table(self) -> SamplerTable:
        """The sampler."""
        return sampler_table(self.sampler, steps=self.steps, shift=self.shift)

    def calls(self) -> SamplerTable:
        """The sampler with two more calls, which write finished latents of generated and of given blocks."""
        return self.table().with_rewrite(self.context_noise).with_rewrite()

    def noise(self, key: Key[Array, ""], shape: tuple[int, ...], *, given: int = 0) -> Noise:
        """The noise that `autoregressive` draws from a key, for use elsewhere.

        Examples:
            >>> noise = Rollout().noise(jax.random.key(0), (1, 6, 4, 8, 16), given=3)
            >>> noise.first.shape, noise.fresh.shape
            ((1, 3, 4, 8, 16), (3, 1, 3, 4, 8, 16))

        Args:
            key: As in `autoregressive`.
            shape: Shape of the whole video's latents, [B, F, H, W, C].
            given: Number of leading frames that are given and need no noise.

        Returns:
            The noise of the new frames.
        """
        parts, frame, noisy = [], 0, self.table().noisy
        for count in self.blocks(shape[1]):
            if frame >= given:
                of_block = jax.random.fold_in(key, frame)
                first = block_noise(of_block, (shape[0], count, *shape[2:]))
                draw = fresh_noise(of_block, first)
                parts.append(Noise(first, jnp.stack([draw(int(n)) for n in noisy]) if len(noisy) else None))
            frame += count
        return joined(parts)

    def blocks(self, frames: int) -> list[int]:
        """Sizes of the blocks that make up `frames` latent frames.

        Examples:
            >>> Rollout().blocks(9), Rollout(independent_first_frame=True).blocks(7)
            ([3, 3, 3], [1, 3, 3])

        Raises:
            ValueError: If they are not whole blocks.
        """
        return block_sizes(frames, self.block, independent_first_frame=self.independent_first_frame)


def block_noise(key: Key[Array, ""], shape: tuple[int, ...]) -> Float[Array, "B F H W C"]:
    """The initial noise of a block."""
    return jax.random.normal(jax.random.fold_in(key, 2**31 - 1), shape)


def check_sampler(settings: Any) -> None:
    """Raises ValueError unless sampler, steps and context noise of frozen settings are valid; lists become tuples."""
    if isinstance(settings.steps, list):
        object.__setattr__(settings, "steps", tuple(settings.steps))
    settings.table()
    if not 0 <= settings.context_noise <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"context_noise={settings.context_noise} is not a timestep in 0...{NUM_TRAIN_TIMESTEPS}; 0 is clean."
        )
