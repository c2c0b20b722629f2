"""Noise for exchange with other implementations: initial noise of a video, and noise that stochastic samplers add."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from monarchrt.models.sampling.tables import SamplerTable


class Noise(NamedTuple):
    """All unit Gaussian noise of a video's new frames, for comparing implementations.

    Attributes:
        first: Initial noise of the frames, [B, F, H, W, C].
        fresh: Noise added after each step that adds noise, [n, B, F, H, W, C], with n = `len(table.noisy)`: 3 for a
            few-step sampler with 4 steps. None: drawn from the key, or not needed.
    """

    first: Float[Array, "B F H W C"]
    fresh: Float[Array, "n B F H W C"] | None = None

    def check(self, table: SamplerTable, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless this is noise for frames of this shape and this sampler.

        Examples:
            >>> from monarchrt.models.sampling import sampler_table
            >>> Noise(jnp.zeros((1, 3, 4, 8, 16))).check(sampler_table("euler"), (1, 6, 4, 8, 16))  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            ValueError: noise: first has shape (1, 3, 4, 8, 16); the new frames are (1, 6, 4, 8, 16), [batch, ...
        """
        if self.first.shape != shape:
            raise ValueError(
                f"noise: first has shape {self.first.shape}; the new frames are {shape}, [batch, frames, height, "
                f"width, channels]."
            )
        count = len(table.noisy)
        if self.fresh is not None and not count:
            raise ValueError("noise: fresh is given, but this sampler adds no noise after a step; leave it out.")
        if self.fresh is not None and self.fresh.shape != (count, *shape):
            raise ValueError(
                f"noise: fresh has shape {self.fresh.shape}; the sampler adds noise after {count} of its steps, so it "
                f"should be {(count, *shape)}."
            )

    def part(self, start: int, count: int) -> "Noise":
        """The noise of some of the frames."""
        fresh = None if self.fresh is None else self.fresh[:, :, start : start + count]
        return Noise(self.first[:, start : start + count], fresh)

    def by_step(self, table: SamplerTable, *, rows: int | None = None) -> Float[Array, "steps B F H W C"] | None:
        """`fresh` with an entry for each step (or row), zero where no noise is added; None if there is none."""
        if self.fresh is None:
            return None
        places = jnp.zeros((rows or table.steps, *self.fresh.shape[1:]), self.fresh.dtype)
        return places.at[jnp.asarray(table.noisy)].set(self.fresh)


def joined(parts: list[Noise]) -> Noise:
    """The noise of consecutive parts of a video, concatenated."""
    fresh = [part.fresh for part in parts if part.fresh is not None]
    return Noise(
        jnp.concatenate([part.first for part in parts], axis=1), jnp.concatenate(fresh, axis=2) if fresh else None
    )
