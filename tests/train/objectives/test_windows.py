"""Self-Forcing with a cache that lets frames go: roll-outs and their gradients, against frames in a list.

The network is a small one, whose cache holds a number for each latent; Wan's is in `test_distillation`, slowly.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.attention.base import CacheShape
from monarchrt.models.errors import UserError
from monarchrt.models.wan import wan_config
from monarchrt.models.wan.causal import WanCache
from monarchrt.train.objectives import self_forcing
from monarchrt.train.objectives.by_blocks import sum_over_blocks
from monarchrt.train.objectives.self_forcing import SelfForcingObjective
from monarchrt.train.objectives.settings import SelfForcingConfig
from tests.untyped import untyped

from .networks import batch, gradient, wan

SIGMAS = [5 * u / (1 + 4 * u) for u in (1.0, 0.6, 0.2)]  # shift 5, by hand
LOWEST = 5 * 0.001 / (1 + 4 * 0.001)
SHAPE = (1, 6, 2, 2, 1)


class Toy(nnx.Module):
    """What a frame leaves in the cache, and how a frame is made of noise and the mean of what it sees."""

    config = wan_config("tiny", causal_block=1)

    def __init__(self):
        self.key, self.own, self.seen, self.text = (nnx.Param(jnp.float32(x)) for x in (0.7, -0.4, 0.9, 0.3))
        self.unused = nnx.Param(jnp.float32(1.0))

    def with_config(self, **_):
        return self

    def left(self, z):
        return jnp.tanh(self.key[...] * z)

    def flow(self, z, sigma, seen, cross):
        return jnp.sin(self.own[...] * z + self.seen[...] * seen + cross) + sigma


class OfSlots(SelfForcingObjective):
    """The objective with a network that is not Wan."""

    def _empty(self, student, text, size):
        shape = CacheShape(batch=1, frames=self._window(size[0]) or size[0], height=2, width=2, heads=1, head_dim=1)
        slots = jnp.zeros((1, shape.frames, *size[1:], 1))
        return WanCache(runs=slots, length=jnp.int32(0), cross=student.text[...] * text.mean(), shape=shape)

    def _append(self, student, z, cache, frame):
        count, sinks = cache.runs.shape[1], self.settings.sink_frames
        slot = jnp.where(frame < count, frame, sinks + (frame - sinks) % max(1, count - sinks))
        runs = jax.lax.dynamic_update_slice_in_dim(jax.lax.stop_gradient(cache.runs), student.left(z), slot, 1)
        return dataclasses.replace(cache, runs=runs, length=frame + 1)

    def _denoise_block(self, student, z, cache, frame, number, index, *, in_place=False):
        cache = self._append(student, z, cache, frame)
        there = jnp.arange(cache.runs.shape[1]) < cache.length
        seen = jnp.mean(cache.runs, axis=1, keepdims=True, where=there[:, None, None, None])
        sigma = jnp.asarray(SIGMAS)[index]
        return z - sigma * student.flow(z, sigma, seen, cache.cross), cache

    def _keep_block(self, student, kept, cache, frame, number, *, in_place=False):
        return self._append(student, kept, cache, frame)


@pytest.mark.parametrize(
    ("options", "lasts"),
    [
        ({"window": 3, "sink_frames": 1, "scored_frames": 2, "scored_anywhere": True}, (2,)),
        *(
            pytest.param(options, (0, 1, 2), marks=pytest.mark.slow)
            for options in (
                {},
                {"scored_frames": 3},
                {"scored_frames": 2, "scored_anywhere": True},
                {"window": 3, "sink_frames": 1, "scored_frames": 2},
                {"window": 2},
                {"window": 3, "sink_frames": 1},
                {"window": 3, "sink_frames": 2, "scored_frames": 3},
            )
        ),
    ],
)
def test_a_window_of_what_was_made(options, lasts, monkeypatch):
    """Frames that a block sees are counted in a list: sinks, and the newest; no gradient but through the last steps."""
    monkeypatch.setattr(self_forcing, "cross_keys_values", lambda student, text: student.text[...] * text.mean())
    objective = OfSlots(SelfForcingConfig(student_steps=(1000, 600, 200), block=1, **options))
    draws = untyped(objective.draws(jax.random.key(1), batch(SHAPE))["student"].student)
    text, frames = jnp.ones((1, 1, 1)), SHAPE[1]
    weights = jax.random.normal(jax.random.key(2), SHAPE)
    count = options.get("scored_frames", frames)
    first = int(draws.first) if "scored_anywhere" in options else frames - count
    if "scored_anywhere" in options:
        assert 0 < first < frames - count, "neither the first nor the last is a test of it"
    window, sinks = options.get("window", frames), options.get("sink_frames", 0)

    def plain(toy, last):
        cross, stop = toy.text[...] * text.mean(), jax.lax.stop_gradient
        kept, made = [], []
        for frame in range(frames):
            oldest = frame + 1 - (window - sinks)
            past = [stop(toy.left(x)) for n, x in enumerate(kept) if n < sinks or n >= oldest]
            z = draws.noise[:, frame]
            for n in range(last + 1):
                z = stop(z)
                seen = sum(past, toy.left(z)) / (len(past) + 1)
                x = z - SIGMAS[n] * toy.flow(z, SIGMAS[n], seen, cross)
                if n < last:
                    z = (1 - SIGMAS[n + 1]) * x + SIGMAS[n + 1] * draws.fresh[:, n, frame]
            made.append(x if first <= frame < first + count else stop(x))
            kept.append(stop((1 - LOWEST) * x + LOWEST * draws.context[:, frame]))
        clip = jnp.stack(made, axis=1).at[:, first + count :].set(0.0)
        return jnp.sum(weights * clip), clip

    def ours(toy, last):
        rolled = objective.roll_out(toy, text, draws._replace(last=last))
        return jnp.sum(weights * objective.replay(toy, text, rolled, last, draws.first)), rolled.x

    compiled = gradient(ours, Toy(), has_aux=True)
    for last in lasts:
        (_, made), expected = gradient(lambda toy, last=last: plain(toy, last), Toy(), has_aux=True)()
        ((_, x), grads) = compiled(jnp.int32(last))
        np.testing.assert_allclose(x, made, rtol=1e-5, atol=1e-6)
        numbers = [np.stack(jax.tree.leaves(tree)) for tree in (grads, expected)]
        np.testing.assert_allclose(*numbers, atol=1e-5 * np.linalg.norm(numbers[1]), rtol=0)


def test_gradients_of_what_is_not_asked_for_are_not_made():
    """As of the network under a LoRA."""

    def block(params, shared, past, inputs, number, frame, size):
        return jnp.full((1, size, 1, 1, 1), params[0] * jnp.sum(params[1]))

    def clip(moved, other):
        return sum_over_blocks(
            jnp.ones((1, 2, 1, 1, 1)), (moved, other), 0.0, (), share=lambda *_: 0.0, block=block,
            following=lambda params, shared, past, *_: past, sizes=[1, 1],
        ).sum()  # fmt: skip

    other = jnp.ones((7, 9))
    assert float(jax.grad(clip)(3.0, other)) == 2 * 63.0
    summed = r"f32\[7,9\] = (add|broadcast)"
    assert not re.search(summed, str(jax.make_jaxpr(jax.grad(clip))(3.0, other)))
    assert re.search(summed, str(jax.make_jaxpr(jax.grad(clip, argnums=1))(3.0, other)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 5, "sink_frames": 3}, r"window is 5, which has no room for a block of 3 and 3 sink_frames; give 6"),
        ({"window": 0}, r"window is 0, .* give 3 or more, for example 21"),
        ({"sink_frames": 3}, r"sink_frames is 3, but there is no window; give --window 21"),
        ({"scored_anywhere": True}, r"scored_anywhere is true, but all frames are scored; give --scored-frames 21"),
        ({"scored_anywhere": True, "scored_frames": 7}, r"scored_frames is 7, .* blocks of 3; .*: 6 or 9"),
        ({"sink_frames": -1}, r"sink_frames is -1; it must be at least 0"),
    ],
)
def test_windows_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        SelfForcingConfig(**options)


def test_runs_of_blocks_that_are_scored():
    """Each that there is, of blocks of one size; critic, teacher and figures see its frames."""
    settings: dict = {"block": 2, "independent_first_frame": True, "scored_frames": 4, "scored_anywhere": True}
    objective = SelfForcingObjective(SelfForcingConfig(**settings))
    shape = (1, 9, 1, 1, 1)
    drawn = [untyped(objective.draws(jax.random.key(n), batch(shape))["critic"].student) for n in range(20)]
    assert {int(draws.first) for draws in drawn} == {1, 2, 3}
    clip = jnp.arange(9.0).reshape(shape)
    for draws in drawn[:5]:
        start = 2 * int(draws.first) - 1
        assert objective._scored(clip, draws).ravel().tolist() == [start, start + 1, start + 2, start + 3]
    with pytest.raises(UserError, match="scored_frames is 4, but clips have 2 in blocks of 2; give as many or fewer"):
        objective.draws(jax.random.key(0), batch((1, 3, 1, 1, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 5}, "window is 5, which are not whole tiles of 2 frames; the nearest that are: 4 or 6"),
        ({"window": 4, "sink_frames": 1}, "sink_frames is 1, which are not whole tiles of 2 frames; .*: 0 or 2"),
    ],
)
def test_windows_of_whole_tiles(options, message):
    objective = SelfForcingObjective(SelfForcingConfig(block=2, **options))
    student = nnx.eval_shape(lambda: wan(0, "monarch(tile=(2,2,2))", causal_block=2))
    with pytest.raises(UserError, match=message):
        objective._empty(student, jnp.zeros((1, 2, 4)), (8, 4, 4))


def test_a_window_that_holds_all_is_none():
    objective = SelfForcingObjective(SelfForcingConfig(window=21))
    assert [objective._window(frames) for frames in (6, 21, 24)] == [None, None, 21]


def test_clips_longer_than_positions():
    objective = SelfForcingObjective(SelfForcingConfig(block=1, window=21))
    with pytest.raises(UserError, match="clips have 1025 latent frames; the network supports positions up to 1024"):
        objective.block_sizes(Toy(), 1025)
