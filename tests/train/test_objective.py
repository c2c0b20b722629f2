"""The rectified-flow objective against the published numbers and against its definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarchrt.models.errors import UserError
from monarchrt.train.objectives.flow import (
    add_noise,
    draw_noise,
    evaluation_indices,
    evaluation_levels,
    evaluation_noise,
    flow_errors,
    flow_loss,
    noise_levels,
)  # fmt: skip
from monarchrt.train.objectives.settings import FlowConfig

SHAPE = (5, 2, 3, 4, 6)


def test_published_weights_at_shift_5():
    sigma, weight = noise_levels(FlowConfig(shift=5.0))
    assert sigma.shape == weight.shape == (1000,)
    assert weight.mean() == pytest.approx(1, abs=1e-6)
    assert weight.max() == pytest.approx(2.0764, abs=5e-5)
    assert 1000 * sigma[weight.argmax()] == pytest.approx(500, abs=2)
    assert sigma[-1] == 1
    assert weight[-1] == 0
    assert 1000 * sigma[0] == pytest.approx(4.98, abs=5e-3)
    assert weight[0] == pytest.approx(0.0319, abs=5e-5)


def test_shift_1_is_the_plain_grid_and_uniform_weights_are_one():
    sigma, weight = noise_levels(FlowConfig(shift=1.0, weighting="uniform", num_train_timesteps=10))
    np.testing.assert_allclose(sigma, np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_array_equal(weight, 1)


def test_noise_mixes_linearly_and_each_sample_has_its_own_level():
    rng = np.random.default_rng(0)
    clean, noise = (jnp.asarray(rng.standard_normal(SHAPE), jnp.float32) for _ in range(2))
    sigma = jnp.array([0.0, 0.25, 0.5, 0.75, 1.0])
    mixed = add_noise(clean, noise, sigma)
    np.testing.assert_array_equal(mixed[0], clean[0])
    np.testing.assert_array_equal(mixed[4], noise[4])
    np.testing.assert_allclose(mixed[1], 0.75 * clean[1] + 0.25 * noise[1], rtol=1e-6)


def test_loss_is_the_definition():
    config = FlowConfig()
    rng = np.random.default_rng(1)
    clean, guess = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
    level, noise = draw_noise(jax.random.key(3), SHAPE, config)
    seen = {}

    def network(latents, timesteps, text):
        seen.update(latents=latents, timesteps=timesteps)
        return jnp.asarray(guess)

    loss = flow_loss(network, jnp.asarray(clean), jnp.zeros((5, 1, 1)), level=level, noise=noise, config=config)

    u = (np.asarray(level) + 1) / 1000
    sigma = 5 * u / (1 + 4 * u)
    grid = np.arange(1, 1001) / 1000
    bell = np.exp(-2 * ((1000 * (5 * grid / (1 + 4 * grid)) - 500) / 1000) ** 2)
    weight = (bell - bell.min()) * 1000 / (bell - bell.min()).sum()
    error = ((guess - (np.asarray(noise) - clean)) ** 2).mean((1, 2, 3, 4))
    assert float(loss) == pytest.approx((weight[np.asarray(level)] * error).mean(), rel=1e-5)
    np.testing.assert_allclose(seen["timesteps"], 1000 * sigma, rtol=1e-5)
    s = sigma[:, None, None, None, None]
    np.testing.assert_allclose(seen["latents"], (1 - s) * clean + s * np.asarray(noise), rtol=1e-4, atol=1e-5)


def test_levels_of_frames():
    """With frames_per_level, runs of frames share a level, the network is told every frame's, the loss weights each."""
    config = FlowConfig(frames_per_level=2)
    shape = (3, 6, 2, 2, 4)
    level, noise = draw_noise(jax.random.key(0), shape, config)
    assert level.shape == (3, 6)
    np.testing.assert_array_equal(level[:, ::2], level[:, 1::2])
    assert len(np.unique(level)) > 5
    rng = np.random.default_rng(2)
    clean, guess = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    seen = {}

    def network(latents, timesteps, text):
        seen.update(latents=latents, timesteps=timesteps)
        return jnp.asarray(guess)

    loss = flow_loss(network, jnp.asarray(clean), jnp.zeros((3, 1, 1)), level=level, noise=noise, config=config)
    sigma, weight = (np.asarray(x)[np.asarray(level)] for x in noise_levels(config))
    error = ((guess - (np.asarray(noise) - clean)) ** 2).mean((2, 3, 4))
    assert float(loss) == pytest.approx((weight * error).mean(), rel=1e-5)
    np.testing.assert_allclose(seen["timesteps"], 1000 * sigma, rtol=1e-5)
    s = sigma[:, :, None, None, None]
    np.testing.assert_allclose(seen["latents"], (1 - s) * clean + s * np.asarray(noise), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"frames_per_level is 4, which does not divide the 6 frames .* 1, 2, 3, 6"):
        draw_noise(jax.random.key(0), shape, FlowConfig(frames_per_level=4))


def test_every_run_of_frames_is_evaluated_at_every_level():
    config = FlowConfig(frames_per_level=1)
    found = np.stack([evaluation_indices(config, level, 8, 5) for level in range(8)])
    assert found.shape == (8, 5)
    np.testing.assert_array_equal(np.sort(found, axis=0), np.arange(8)[:, None].repeat(5, 1))


def test_levels_are_uniform_over_the_grid_and_drawn_per_sample():
    level, noise = draw_noise(jax.random.key(0), (20_000, 1, 1, 1, 1), FlowConfig(num_train_timesteps=10))
    counts = np.bincount(np.asarray(level), minlength=10)
    assert len(counts) == 10
    assert abs(counts - 2000).max() < 6 * np.sqrt(2000)
    assert float(noise.mean()) == pytest.approx(0, abs=0.03)
    assert float(noise.std()) == pytest.approx(1, abs=0.03)


def test_half_precision_predictions_are_compared_in_float32():
    zeros = jnp.zeros(SHAPE)
    noise = jnp.full(SHAPE, 1.0)
    errors = flow_errors(lambda *_: zeros.astype(jnp.bfloat16), zeros, jnp.zeros((5, 1, 1)), noise, jnp.ones(5))
    assert errors.dtype == jnp.float32
    np.testing.assert_array_equal(errors, 1)


def test_evaluation_has_no_chance_in_it():
    config = FlowConfig()
    first, second = evaluation_levels(config, 8), evaluation_levels(config, 8)
    np.testing.assert_array_equal(first.sigma, second.sigma)
    assert len(set(first.sigma)) == 8
    # an even subset of the training grid
    assert set(first.sigma) <= set(noise_levels(config).sigma)
    np.testing.assert_array_equal(evaluation_noise(3, 1, (4, 5)), evaluation_noise(3, 1, (4, 5)))
    assert not np.array_equal(evaluation_noise(3, 1, (4, 5)), evaluation_noise(3, 2, (4, 5)))
    assert not np.array_equal(evaluation_noise(3, 1, (4, 5)), evaluation_noise(4, 1, (4, 5)))


def test_evaluation_levels_average_to_the_training_loss():
    # for a network whose error depends on the level only, many levels give the mean over the grid
    config = FlowConfig()
    grid, few = noise_levels(config), evaluation_levels(config, 50)
    assert (few.weight * few.sigma).mean() == pytest.approx((grid.weight * grid.sigma).mean(), rel=0.01)
