"""Whole clips and windows against plain loops."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.sampling import Windows, uniform_schedule, windows
from monarchrt.models.sampling.bidirectional import generate_window
from tests.compiled import compiled_here
from tests.untyped import programs

H, W = 8, 12
SHAPE: dict[str, Any] = dict(height=H, width=W, key=jax.random.key(4))


@pytest.fixture
def tiny(wan):
    model = wan.model(in_channels=6, num_layers=2)
    return model, jnp.asarray(np.random.default_rng(5).standard_normal((1, 7, 20)), jnp.float32)


def noise(number, shape):
    return jax.random.normal(jax.random.split(jax.random.fold_in(SHAPE["key"], number))[0], shape)


def euler(model, x, t_of, text, negative, *, steps, guidance, context=None):
    """Written out; the context is shown at time 0 in every step."""
    forward = nnx.jit(lambda model, *args: model(*args))
    sigmas = uniform_schedule(steps, 5.0).sigmas
    for sigma, following in pairwise(sigmas):
        given = x if context is None else jnp.concatenate([context, x], axis=1)
        flows = [forward(model, given, t_of(1000 * sigma), part)[:, -x.shape[1] :] for part in (text, negative)]
        x = x + (following - sigma) * (flows[1] + guidance * (flows[0] - flows[1]))
    return x


def test_a_whole_clip(tiny):
    model, text = tiny
    settings = Windows(sampler="euler", steps=3, guidance=5.0)
    (out,) = windows(model, text, frames=5, settings=settings, negative=-text[:, :3], **SHAPE)
    expected = euler(
        model,
        noise(0, (1, 5, H, W, 6)),
        lambda t: jnp.full((1,), t, jnp.float32),
        text,
        -text[:, :3],
        steps=3,
        guidance=5.0,
    )
    np.testing.assert_allclose(out, expected, atol=5e-4)
    assert out.std() > 0.3


def test_four_steps_bidirectional_take_all_four(tiny):
    """One program, the flow at 625 counts, and nothing is compiled once the clip is there."""
    model, text = tiny
    clip = windows(model, text, frames=3, settings=Windows(sampler="few-step"), **SHAPE)
    out = next(clip)
    with compiled_here() as later:
        assert list(clip) == []
    assert not later
    key = jax.random.split(jax.random.fold_in(SHAPE["key"], 0))[1]
    forward = nnx.jit(lambda model, *args: model(*args))
    x = noise(0, (1, 3, H, W, 6))
    for n, sigma in enumerate([1, 0.9375, 5 / 6, 0.625]):
        data = x - sigma * forward(model, x, jnp.full((1,), 1000 * sigma, jnp.float32), text)
        following = [0.9375, 5 / 6, 0.625, 0][n]
        fresh = jax.random.normal(jax.random.split(jax.random.fold_in(key, n), 1)[0], x.shape)
        x = (1 - following) * data + following * fresh
    np.testing.assert_allclose(out, x, atol=5e-4)


def test_windows_continue_each_other(tiny):
    model, text = tiny
    settings = Windows(sampler="euler", steps=2, window=4, context=1, guidance=3.0)
    image = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, H, W, 6)), jnp.float32)
    before = programs(generate_window)
    parts = list(windows(model, text, frames=6, settings=settings, negative=-text, initial=image, **SHAPE))
    assert [part.shape[1] for part in parts] == [1, 3, 2]
    assert programs(generate_window) == before + 1
    np.testing.assert_array_equal(parts[0], image)
    context = image
    for number, part in enumerate(parts[1:]):
        expected = euler(
            model,
            noise(number, (1, 3, H, W, 6)),
            lambda t: jnp.asarray([[0, t, t, t]], jnp.float32),
            text,
            -text,
            steps=2,
            guidance=3.0,
            context=context,
        )
        np.testing.assert_allclose(part, expected[:, : part.shape[1]], atol=5e-4)
        context = expected[:, -1:]


def test_context_is_taken_of_all_that_is_finished(tiny):
    """Of two parts, where a window makes fewer frames than the next one starts with."""
    model, text = tiny
    settings = Windows(sampler="euler", steps=1, window=4, context=3, guidance=3.0)
    parts = list(windows(model, text, frames=6, settings=settings, negative=-text, **SHAPE))
    assert [part.shape[1] for part in parts] == [4, 1, 1]
    done = parts[0]
    for number, part in enumerate(parts[1:], start=1):
        expected = euler(
            model,
            noise(number, (1, 1, H, W, 6)),
            lambda t: jnp.asarray([[0, 0, 0, t]], jnp.float32),
            text,
            -text,
            steps=1,
            guidance=3.0,
            context=done[:, -3:],
        )
        np.testing.assert_allclose(part, expected, atol=5e-4)
        done = jnp.concatenate([done, expected], axis=1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(frames=0), "frames=0 is not a positive number"),
        (dict(height=7), "height=7 is not a multiple of the patch's 2"),
        (dict(initial=jnp.zeros((1, 1, H, W, 5)), settings=Windows(window=4)), "initial has shape"),
        (dict(initial=jnp.zeros((1, 1, H, W, 6))), "initial frames can only be continued by windows"),
    ],
)
def test_bad_arguments_are_found_at_once(tiny, more, message):
    model, text = tiny
    with pytest.raises(ValueError, match=message):
        windows(model, text, **(dict(frames=4, settings=Windows()) | SHAPE | more))


def test_context_fits_the_window():
    with pytest.raises(ValueError, match=r"window=4 frames has no room for context=4 .* a window of at least 5"):
        Windows(window=4, context=4)
