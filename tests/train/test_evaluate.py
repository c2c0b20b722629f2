"""The held-out loss: which examples, levels and noise count, and how often."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.train.data import Batch
from monarchrt.train.evaluate import held_out_loss
from monarchrt.train.objectives.settings import FlowConfig

SHAPE = (2, 2, 2, 3)


class Source:
    """Three held-out examples, each a constant."""

    latent_shape, held_out, fingerprint = SHAPE, 3, "x"

    def train_batch(self, step, batch, seed):
        raise AssertionError("held-out examples only")

    def held_out_batch(self, indices):
        latents = np.stack([np.full(SHAPE, index + 1.0, np.float32) for index in indices])
        return Batch(latents, np.zeros((len(indices), 1, 1), np.float32))


class Silent(nnx.Module):
    """Predicts no flow, so that the error is the mean square of eps - x0."""

    def __init__(self):
        self.scale = nnx.Param(jnp.zeros(()))

    def __call__(self, latents, timesteps, text):
        return self.scale * latents


@pytest.mark.parametrize("frames", [None, 1])
@pytest.mark.parametrize("batch", [1, 2, 4, 5, 6, 7, 16])
def test_what_fills_the_last_batch_up_does_not_count(batch, frames):
    """Three examples at five levels are 15 pairs, which most of these batches do not divide."""
    config = FlowConfig(frames_per_level=frames)
    found = held_out_loss(Silent(), Source(), objective=config, windows=3, timesteps=5, batch=batch)
    # by its definition: weights of the middles of five equal parts of the grid, noise by example and level
    grid = np.arange(1, 1001) / 1000
    sigma = 5 * grid / (1 + 4 * grid)
    bell = np.exp(-2 * (sigma - 0.5) ** 2)
    weight = (bell - bell.min()) / (bell - bell.min()).mean()
    middles = weight[[100, 300, 500, 700, 900]]
    total = []
    for index in range(3):
        for level in range(5):
            noise = np.random.default_rng([20, index, level]).standard_normal(SHAPE, np.float32)
            errors = ((noise - (index + 1)) ** 2).mean((1, 2, 3))
            # neighbouring frames are three levels apart
            weights = middles[[level, (level + 3) % 5]] if frames else middles[level]
            total.append((weights * errors).mean())
    assert found == pytest.approx(np.mean(total), rel=1e-5)
