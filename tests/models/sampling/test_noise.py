"""Noise, samplers and cache settings of one's own, given to block by block, windowed and whole generation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.sampling import Noise, Rollout, Windows, autoregressive, few_step, sampler_table, windows
from monarchrt.models.sampling.schedules import few_step_schedule
from monarchrt.models.wan.causal import cached_forward, init_cache
from tests.untyped import there, untyped

SIZE: dict[str, Any] = dict(height=4, width=8, key=jax.random.key(4))
SHAPE = 4, 8, 6


@pytest.fixture
def model(wan):
    return wan.model(in_channels=6, num_layers=1)


@pytest.fixture
def text():
    return jnp.asarray(np.random.default_rng(5).standard_normal((1, 7, 20)), jnp.float32)


def drawn(seed, frames, steps=None):
    rng = np.random.default_rng(seed)
    first = rng.standard_normal((1, frames, *SHAPE), np.float32)
    return Noise(
        untyped(first), None if steps is None else untyped(rng.standard_normal((steps, 1, frames, *SHAPE), np.float32))
    )


def video(parts):
    return np.concatenate(list(parts), axis=1)


def test_block_by_block_with_given_noise(model, text):
    """Self-Forcing's loop with noise from NumPy: the pre-drawn slice, fresh noise by step, a last call at 0 or so."""
    noise = drawn(0, 3, 2)
    initial = jnp.asarray(drawn(1, 3).first)
    rollout = Rollout(steps=(1000, 757, 522), context_noise=30.0)
    out = video(autoregressive(model, text, frames=6, rollout=rollout, initial=initial, noise=noise, **SIZE))

    u = np.array([1.0, 0.757, 0.522])
    levels = 5 * u / (1 + 4 * u)
    cache = init_cache(model, text, frames=6, height=4, width=8)
    forward = nnx.jit(lambda model, *args, frame: cached_forward(model, *args, frame=frame))
    at = lambda t: jnp.full((1, 3), t, jnp.float32)  # noqa: E731
    _, cache = forward(model, initial, at(0), cache, frame=jnp.int32(0))
    x = noise.first
    for n, sigma in enumerate(levels):
        flow, cache = forward(model, x, at(1000 * sigma), cache, frame=jnp.int32(3))
        data = x - sigma * flow
        if n < 2:
            x = (1 - levels[n + 1]) * data + levels[n + 1] * there(noise.fresh)[n]
    np.testing.assert_array_equal(out[:, :3], initial)
    np.testing.assert_allclose(out[:, 3:], data, atol=5e-4)


def test_the_timestep_of_finished_blocks_counts(model, text):
    noise = drawn(0, 6)
    clean, noised = (
        video(autoregressive(model, text, frames=6, rollout=Rollout(context_noise=t), noise=noise, **SIZE))
        for t in (0.0, 300.0)
    )
    np.testing.assert_array_equal(clean[:, :3], noised[:, :3])
    assert np.abs(clean[:, 3:] - noised[:, 3:]).max() > 1e-4


@pytest.mark.parametrize(
    ("sampler", "given"),
    [
        ("few-step", 3),
        ("euler", 0),
        *(pytest.param(*row, marks=pytest.mark.slow) for row in (("few-step", 0), ("euler", 3))),
    ],
)
def test_noise_that_was_taken_gives_the_same_video(model, text, sampler, given):
    initial = jnp.asarray(drawn(1, given).first) if given else None
    rollout, settings = Rollout(sampler=sampler, steps=3), Windows(sampler=sampler, steps=3, window=4)
    for generate, options in ((autoregressive, dict(rollout=rollout)), (windows, dict(settings=settings))):
        common: dict[str, Any] = dict(frames=9, initial=initial, **options, **SIZE)
        maker = options.get("rollout") or options["settings"]
        noise = maker.noise(SIZE["key"], (1, 9, *SHAPE), given=given)
        assert (noise.fresh is None) == (sampler == "euler")
        other: dict[str, Any] = common | dict(key=jax.random.key(9))
        one, two, three = (
            video(untyped(generate)(model, text, **arguments))
            for arguments in (common, other | dict(noise=noise), other)
        )
        np.testing.assert_array_equal(two, one)
        assert np.abs(three - one).max() > 0.1


def test_the_first_noise_alone(model, text):
    """What is not given of the noise follows from the key."""
    rollout = Rollout(steps=2)
    noise = rollout.noise(SIZE["key"], (1, 3, *SHAPE))
    common: dict[str, Any] = dict(frames=3, rollout=rollout, **SIZE)
    expected = video(autoregressive(model, text, **common))
    np.testing.assert_array_equal(video(autoregressive(model, text, noise=Noise(noise.first), **common)), expected)


@pytest.mark.parametrize("settings", [Rollout, Windows])
def test_a_table_of_ones_own(model, text, settings):
    """The same numbers as by name give the same video; it counts as a setting, so other numbers give another one."""
    by_name = settings(sampler="few-step", steps=(1000, 500))
    table = few_step(few_step_schedule((1000, 500)))
    assert settings(sampler=table) == settings(sampler=sampler_table("few-step", steps=[1000, 500]))
    assert hash(settings(sampler=table)) == hash(settings(sampler=table._replace(sigmas=table.sigmas.copy())))
    made = []
    for each in (by_name, settings(sampler=table), settings(sampler=table._replace(predict=table.predict / 2))):
        options: dict[str, Any] = {"rollout": each} if settings is Rollout else {"settings": each}
        generate = autoregressive if settings is Rollout else windows
        made.append(video(untyped(generate)(model, text, frames=3, **options, **SIZE)))
    np.testing.assert_array_equal(made[0], made[1])
    assert np.abs(made[0] - made[2]).max() > 0.1


@pytest.mark.parametrize(
    ("generate", "options", "noise", "message"),
    [
        (autoregressive, dict(rollout=Rollout()), drawn(0, 3, 3), r"first has shape \(1, 3, 4, 8, 6\); the new frames"),
        (autoregressive, dict(rollout=Rollout()), drawn(0, 6, 4), "adds noise after 3 of its steps"),
        (autoregressive, dict(rollout=Rollout(sampler="euler")), drawn(0, 6, 4), "adds no noise after a step"),
        (
            autoregressive,
            dict(rollout=Rollout(window=6), frames=None),
            drawn(0, 6, 3),
            "noise is given, but frames=None",
        ),
        (windows, dict(settings=Windows(window=4)), drawn(0, 6), r"the new frames are \(1, 7, 4, 8, 6\)"),
    ],
)
def test_noise_that_does_not_fit_is_found_at_once(model, text, generate, options, noise, message):
    with pytest.raises(ValueError, match=message):
        generate(model, text, **(dict(frames=6, noise=noise) | options | SIZE))


@pytest.mark.parametrize("settings", [Rollout, Windows])
def test_context_noise_is_a_timestep(settings):
    with pytest.raises(ValueError, match=r"context_noise=1001\.0 is not a timestep in 0\.\.\.1000"):
        settings(context_noise=1001.0)


def test_the_timestep_of_a_windows_context(model, text):
    made = [
        video(windows(model, text, frames=5, settings=Windows(window=3, steps=2, context_noise=t), **SIZE))
        for t in (0.0, 300.0)
    ]
    np.testing.assert_array_equal(made[0][:, :3], made[1][:, :3])
    assert np.abs(made[0][:, 3:] - made[1][:, 3:]).max() > 1e-4
