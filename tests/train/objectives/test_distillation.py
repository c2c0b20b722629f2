"""DMD and Self-Forcing: losses and gradients against plain forms written here."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.errors import UserError
from monarchrt.models.umt5 import save_embeddings
from monarchrt.models.wan.causal import cached_forward, init_cache
from monarchrt.models.wan.layers import computed_dtype
from monarchrt.train.objectives import self_forcing
from monarchrt.train.objectives.dmd import DMDObjective
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.objectives.scores import draw_scores, levels_of, matching_gradient, matching_loss, sample_metrics
from monarchrt.train.objectives.self_forcing import SelfForcingObjective
from monarchrt.train.objectives.settings import DMDConfig, SelfForcingConfig
from tests.untyped import untyped

from .networks import Small, assert_same, batch, gradient, wan

STEPS = (1000, 600, 200)
SHAPE = (1, 4, 4, 4, 2)  # B, F, H, W, C
SIGMAS = [5 * u / (1 + 4 * u) for u in (1.0, 0.6, 0.2)]  # shift 5, by hand


def draws_of(objective, shape=SHAPE) -> Any:
    return objective.draws(jax.random.key(1), batch(shape))["student"].student


def test_a_bidirectional_student_learns_by_its_last_step():
    objective, student = DMDObjective(DMDConfig(student_steps=STEPS)), Small(0)
    draws, weights = draws_of(objective), jax.random.normal(jax.random.key(2), SHAPE)
    text = jnp.asarray(batch(SHAPE).text)

    def plain(model, last):
        z = draws.noise
        for n in range(last):
            x = z - SIGMAS[n] * model(z, jnp.array([1000 * SIGMAS[n]]), text)
            z = (1 - SIGMAS[n + 1]) * x + SIGMAS[n + 1] * draws.fresh[:, n]
        z = jax.lax.stop_gradient(z)
        return jnp.sum(weights * (z - SIGMAS[last] * model(z, jnp.array([1000 * SIGMAS[last]]), text)))

    def ours(model, last):
        return jnp.sum(weights * objective.samples(model, text, draws._replace(last=last)))

    compiled = gradient(ours, student)
    for last in range(3):
        (value, grads), expected = compiled(jnp.int32(last)), gradient(partial(plain, last=last), student)()
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)
        assert_same(grads, expected[1], 1e-5)


@pytest.mark.parametrize(
    "settings",
    [DMDConfig(student_steps=(1000,)), SelfForcingConfig(student_steps=(1000,), block=2)],
    ids=lambda x: x.name,
)
def test_a_student_of_one_step_makes_its_clip_of_noise_at_once(settings):
    """Block by block or whole: what it sees in the noise, with the gradient of just that."""
    objective: Any = make_objective(settings)
    causal = settings.name == "self-forcing"
    student: Any = wan(0, causal_block=2) if causal else Small(0)
    draws, text = draws_of(objective), jnp.asarray(batch(SHAPE).text)
    assert draws.fresh.shape[1] == draws.last == 0

    def ours(model):
        clip = objective.samples(model, text, draws)
        return jnp.sum(clip**2), clip

    (_, clip), grads = gradient(ours, student, has_aux=True)()
    if causal:  # its first block sees no other
        flow = jax.jit(lambda z: student.with_config(causal_block=None)(z, jnp.full((1, 2), 1000.0), text))
        np.testing.assert_allclose(clip[:, :2], draws.noise[:, :2] - flow(draws.noise[:, :2]), rtol=1e-4, atol=1e-5)
        assert all(bool(jnp.isfinite(leaf).all()) and jnp.any(leaf != 0) for leaf in jax.tree.leaves(grads["head"]))
        return
    expected = gradient(
        lambda model: jnp.sum((draws.noise - model(draws.noise, jnp.array([1e3]), text)) ** 2), student
    )()
    np.testing.assert_allclose(jnp.sum(clip**2), expected[0], rtol=1e-5)
    assert_same(grads, expected[1], 1e-5)


WINDOW = {"window": 3, "sink_frames": 1}


@pytest.mark.parametrize(
    ("attention", "blocks", "layers", "lasts", "options"),
    [
        ("monarch(tile=(1,2,2))", (2, 2), 1, (1,), {}),
        *(
            pytest.param(attention, blocks, 2, (0, 1, 2), options, marks=pytest.mark.slow)
            for attention, blocks, options in (
                ("dense", (2, 2), {}),
                ("dense", (1, 3), {}),
                ("monarch(tile=(1,2,2))", (2, 2), {}),
                ("monarch(tile=(2,2,2))", (2, 2), {}),
                ("monarch(tile=(1,1,2))", (2, 2), {}),
                ("dense", (1, 1, 1, 1), WINDOW),
                ("monarch(tile=(1,2,2))", (1, 1, 1, 1), {"window": 2, "scored_frames": 1}),
                ("monarch(tile=(1,1,2))", (1, 1, 1, 1), WINDOW | {"scored_frames": 3}),
                ("monarch(tile=(2,2,2))", (2, 2, 2, 2), {"window": 6, "sink_frames": 2, "scored_frames": 4}),
                ("dense", (1, 2, 2, 2), {"window": 4, "scored_frames": 4}),
                ("vsa(keep=0.5, cube=(1,1,2))", (1, 1, 1, 1), WINDOW | {"scored_frames": 2}),
            )
        ),
    ],
)
def test_a_roll_out_is_differentiated_by_its_last_steps(attention, blocks, layers, lasts, options):
    """Unrolled by hand, with the caches as constants; and what is replayed is what was rolled out."""
    first, frames = blocks[0] != blocks[-1], sum(blocks)
    objective = SelfForcingObjective(
        SelfForcingConfig(student_steps=STEPS, block=blocks[-1], independent_first_frame=first, **options)
    )
    student = wan(0, attention, num_layers=layers, causal_block=blocks[-1], independent_first_frame=first)
    examples = batch((1, frames, *SHAPE[2:]))
    draws = untyped(objective.draws(jax.random.key(1), examples)["student"].student)
    weights = jax.random.normal(jax.random.key(2), examples.latents.shape)
    text, scored = jnp.asarray(examples.text), frames - options.get("scored_frames", frames)
    lowest = 5 * 0.001 / (1 + 4 * 0.001)
    rolling = {"rolling": True, "sink_frames": options.get("sink_frames", 0)} if "window" in options else {}

    @jax.jit  # a program, and one for its gradient, for all calls
    def forward(model, z, sigma, cache, start):
        flow, written = cached_forward(model, z, jnp.full(z.shape[:2], 1000 * sigma), cache, frame=start)
        return flow, dataclasses.replace(jax.tree.map(jax.lax.stop_gradient, written), cross=cache.cross)

    def plain(model, last):
        model = model.with_config(causal_block=None)
        cache = init_cache(
            model, text, frames=options.get("window", frames), height=4, width=4, detach_past=True, **rolling
        )
        parts, start = [], 0
        for size in blocks:
            where = slice(start, start + size)
            z = draws.noise[:, where]
            for n in range(last):
                flow, cache = forward(model, z, SIGMAS[n], cache, start)
                z = (1 - SIGMAS[n + 1]) * (z - SIGMAS[n] * flow) + SIGMAS[n + 1] * draws.fresh[:, n, where]
            z = jax.lax.stop_gradient(z)
            flow, cache = forward(model, z, SIGMAS[last], cache, start)
            x = z - SIGMAS[last] * flow
            parts.append(x if start >= scored else jax.lax.stop_gradient(x))
            kept = jax.lax.stop_gradient((1 - lowest) * x + lowest * draws.context[:, where])
            cache = forward(model, kept, 0.0, cache, start)[1]
            start += size
        return jnp.sum(weights * jnp.concatenate(parts, axis=1))

    def ours(model, last):
        rolled = objective.roll_out(model, text, draws._replace(last=last))
        return jnp.sum(weights * objective.replay(model, text, rolled, last)), rolled.x

    compiled = gradient(ours, student, has_aux=True)
    for last in lasts:
        ((value, x), grads), expected = compiled(jnp.int32(last)), gradient(partial(plain, last=last), student)()
        np.testing.assert_allclose(value, expected[0], rtol=1e-4)
        np.testing.assert_allclose(jnp.sum(weights * x), value, rtol=1e-4)
        assert_same(grads, expected[1], 1e-4)


@pytest.mark.slow
def test_only_the_frames_that_are_scored_are_differentiated_and_compared():
    """Of four blocks the last two: loss and gradient as if the others were given; networks see four frames."""
    all_frames = SelfForcingObjective(SelfForcingConfig(student_steps=STEPS, block=2))
    objective = SelfForcingObjective(SelfForcingConfig(student_steps=STEPS, block=2, scored_frames=4))
    student, long = wan(0, num_layers=1, causal_block=2), (1, 8, *SHAPE[2:])
    examples, text = batch(long), jnp.asarray(batch(long).text)
    draws = all_frames.draws(jax.random.key(1), examples)["student"]
    draws = draws._replace(student=draws.student._replace(last=jnp.int32(1)))
    networks = {"critic": Small(1), "teacher": Small(2)}
    loss, grads = gradient(lambda model: objective.loss("student", networks | {"student": model}, examples, draws)[0],
                           student)()  # fmt: skip

    def plain(model):
        rolled = all_frames.roll_out(model, text, untyped(draws.student))
        x = all_frames.replay(model, text, rolled, draws.student.last)[:, 4:]
        levels, noise = levels_of(draws.scores.time, shift=5.0), draws.scores.noise[:, 4:]
        g, _ = matching_gradient(x, text, None, **networks, guidance=0.0, levels=levels, noise=noise)
        return matching_loss(x, g)

    expected = gradient(plain, student)()
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    assert_same(grads, expected[1], 1e-5)


def test_frames_that_are_scored_are_whole_blocks():
    objective = SelfForcingObjective(SelfForcingConfig(block=3, independent_first_frame=True, scored_frames=6))
    assert [objective._skipped(sizes) for sizes in ([1, 3, 3], [1, 3, 3, 3])] == [1, 2]
    all_frames = untyped(draws_of(objective, (1, 10, 1, 1, 1)))
    assert objective._scored(jnp.zeros((1, 10, 1, 1, 1)), all_frames).shape[1] == 6
    with pytest.raises(UserError, match=r"scored_frames is 6, .* clips of 5 frames; the nearest that are: 3 or 5"):
        objective._skipped([2, 3])
    assert SelfForcingObjective(SelfForcingConfig(block=3))._skipped([3, 3]) == 0
    with pytest.raises(UserError, match="scored_frames is 0"):
        SelfForcingConfig(scored_frames=0)


def test_what_is_shown_while_training_is_a_roll_out_of_all_steps():
    """Its noise of every step follows from the first."""
    objective = SelfForcingObjective(SelfForcingConfig(student_steps=(1000, 500), block=2))
    student, text = wan(0, "dense", num_layers=1, causal_block=2), jnp.asarray(batch(SHAPE).text)
    noise = jax.random.normal(jax.random.key(3), SHAPE)
    shown = jax.jit(objective.samplers()["sampled"])(student, jnp.zeros(SHAPE), text, noise)
    fresh = jnp.roll(noise, (1, 1), axis=(1, -1))[:, None]
    draws = draws_of(objective)._replace(noise=noise, fresh=fresh, context=jnp.zeros(SHAPE), last=jnp.int32(1))
    np.testing.assert_allclose(shown, objective.roll_out(student, text, draws).x, rtol=1e-4, atol=1e-5)


def test_the_students_gradient_is_g_over_the_number_of_latents():
    x, g = jax.random.normal(jax.random.key(0), (2, *SHAPE))
    np.testing.assert_allclose(jax.grad(matching_loss)(x, g), g / x.size, rtol=1e-4, atol=1e-7)  # x - (x - g) rounds
    np.testing.assert_allclose(matching_loss(x, g), 0.5 * np.mean(np.square(g)), rtol=1e-5)


def test_g_by_hand():
    """With networks that are linear in what they see."""
    x, noise = jax.random.normal(jax.random.key(0), (2, 2, *SHAPE[1:]))
    text, negative = jnp.ones((2, 1, 1)), -jnp.ones((2, 1, 1))
    levels = levels_of(jnp.array([100, 900]), shift=5.0)
    g, metrics = matching_gradient(
        x,
        text,
        negative,
        critic=lambda x, t, text: 0.5 * x,
        teacher=lambda x, t, text: 0.25 * x + text[:, :, :, None, None] * 0.1,
        guidance=3.0,
        levels=levels,
        noise=noise,
    )
    for n, u in enumerate((0.1, 0.9)):
        sigma = 5 * u / (1 + 4 * u)
        mixed = (1 - sigma) * np.asarray(x[n]) + sigma * np.asarray(noise[n])
        fake = mixed - sigma * 0.5 * mixed
        conditional, unconditional = (mixed - sigma * (0.25 * mixed + sign * 0.1) for sign in (1, -1))
        real = conditional + 3 * (conditional - unconditional)
        np.testing.assert_allclose(g[n], (fake - real) / np.mean(np.abs(x[n] - real)), rtol=1e-3, atol=1e-4)
    assert float(metrics["replaced"]) == 0


class Linear(nnx.Module):
    """A flow of so much of what is seen and of the text."""

    def __init__(self, share, of_text=0.0):
        self.share, self.of_text = share, of_text

    def __call__(self, x, timesteps, text):
        return self.share * x + self.of_text * text.mean((1, 2))[:, None, None, None, None]


def test_the_students_loss_is_of_its_settings(tmp_path):
    """By hand, with none of the published ones: shift, bounds of the noise levels, guidance, a negative prompt."""
    path, rows = tmp_path / "negative.safetensors", np.full((1, 4), -2.0, np.float32)
    save_embeddings(path, {"bad": rows})
    settings = DMDConfig(student_steps=STEPS, shift=3.0, low=0.3, high=0.6, guidance=2.0, negative=path)
    objective, student, examples = DMDObjective(settings), Small(0), batch(SHAPE)
    networks = {"student": student, "critic": Linear(0.5, 0.3), "teacher": Linear(0.25, 0.1)}
    for time, u in ((10, 0.3), (250, 0.5), (900, 0.6)):  # 3 u / (1 + 2 u), within the bounds
        draws = objective.draws(jax.random.key(1), examples)["student"]
        draws = draws._replace(scores=draws.scores._replace(time=jnp.array([time])))
        loss, _ = objective.loss("student", networks, examples, draws)
        x = np.asarray(objective.samples(student, jnp.asarray(examples.text), draws.student), np.float64)
        mixed = (1 - u) * x + u * np.asarray(draws.scores.noise)
        fake = mixed - u * (0.5 * mixed + 0.3 * examples.text.mean())
        of_text, of_negative = (mixed - u * (0.25 * mixed + 0.1 * mean) for mean in (examples.text.mean(), -2.0))
        real = of_text + 2 * (of_text - of_negative)
        g = (fake - real) / np.mean(np.abs(x - real))
        np.testing.assert_allclose(loss, 0.5 * np.mean(g**2), rtol=1e-4)


def test_finished_blocks_are_seen_after_all_steps(monkeypatch):
    """Of kinds that depend on the step; what a roll-out tells the network last is kept in the cache."""

    def forward(model, z, timesteps, cache, *, frame, step, block, in_place):
        assert in_place  # nothing is differentiated
        return jnp.zeros_like(z), dataclasses.replace(cache, length=jnp.int32(step))

    monkeypatch.setattr(self_forcing, "cached_forward", forward)
    objective = SelfForcingObjective(SelfForcingConfig(student_steps=STEPS, block=2))
    text = jnp.asarray(batch(SHAPE).text)
    rolled = objective.roll_out(wan(0, num_layers=1, causal_block=2), text, draws_of(objective))
    assert int(rolled.cache.length) == len(STEPS)


@pytest.mark.parametrize("attention", ["dense", "monarch(tile=(1,2,2))"])
def test_parameters_are_rounded_once(monkeypatch, attention):
    """To what they are computed in: clip and gradient are those of rounding in every call, and float32 as they are."""
    objective = SelfForcingObjective(SelfForcingConfig(student_steps=STEPS, block=2))
    student = wan(0, attention, causal_block=2, dtype="bfloat16", param_dtype="float32", num_layers=2)
    draws, weights = draws_of(objective)._replace(last=jnp.int32(1)), jax.random.normal(jax.random.key(2), SHAPE)
    text, seen = jnp.asarray(batch(SHAPE).text), []

    def ours(model):
        clip = objective.samples(model, text, draws)
        return jnp.sum(weights * clip), clip

    def watched(model):
        seen.append(computed_dtype(model))
        return seen[-1]

    monkeypatch.setattr(self_forcing, "computed_dtype", watched)
    (_, clip), grads = gradient(ours, student, has_aux=True)()
    assert [model.blocks.ffn.fc1.kernel[...].dtype for model in seen] == [jnp.bfloat16] * 2  # roll-out and replay
    monkeypatch.setattr(self_forcing, "computed_dtype", lambda model: model)
    (_, expected), others = gradient(ours, student, has_aux=True)()
    np.testing.assert_array_equal(clip, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    assert_same(grads, others, 1e-6)


def test_noise_levels_of_the_published_code():
    """Mixed on a grid of shift 5, turned into data on one of shift 8 (nearest entries)."""
    levels = levels_of(jnp.array([0, 250, 999]), shift=5.0, conversion="published")
    np.testing.assert_allclose(levels.timesteps, [20.0, 625.0, 980.0], rtol=1e-6)
    grids = {shift: [shift * n / (1000 + (shift - 1) * n) for n in range(1000, 0, -1)] for shift in (5, 8)}
    for n, t in enumerate((20.0, 625.0, 980.0)):
        for found, shift in ((levels.mixed[n], 5), (levels.converted[n], 8)):
            assert float(found) == pytest.approx(min(grids[shift], key=lambda sigma: abs(1000 * sigma - t)), rel=1e-5)
    clean = levels_of(jnp.array([250]), shift=5.0)
    assert float(clean.mixed[0]) == float(clean.converted[0]) == 0.625


@pytest.mark.parametrize("conversion", ["clean", "published"])
def test_the_critics_loss_is_that_of_the_flow_of_the_students_samples(conversion):
    objective = DMDObjective(DMDConfig(student_steps=STEPS, conversion=conversion))
    student, critic = Small(0), Small(1)
    draws = objective.draws(jax.random.key(1), batch(SHAPE))["critic"]
    examples = batch(SHAPE)
    text = jnp.asarray(examples.text)
    networks = {"student": student, "critic": critic, "teacher": Small(2)}
    loss, metrics = objective.loss("critic", networks, examples, draws)
    x = objective.samples(student, text, draws.student)
    u = float(draws.scores.time[0]) / 1000
    t = min(max(5000 * u / (1 + 4 * u), 20), 980)
    grids = {shift: [shift * n / (1000 + (shift - 1) * n) for n in range(1000, 0, -1)] for shift in (5, 8)}
    mixed, converted = (min(grids[s], key=lambda sigma: abs(1000 * sigma - t)) for s in (5, 8))
    if conversion == "clean":
        mixed = converted = t / 1000
    noise = draws.scores.noise
    flow = critic((1 - mixed) * x + mixed * noise, jnp.array([t]), text) * converted / mixed
    np.testing.assert_allclose(loss, jnp.mean(jnp.square(flow - (noise - x))), rtol=1e-4)
    bins = [float(value) for name, value in metrics.items() if name.startswith("loss_at_")]
    assert np.nansum(bins) == pytest.approx(float(loss))
    assert np.isnan(bins).sum() == 4
    _, grads = gradient(
        lambda model: objective.loss("critic", networks | {"student": model}, examples, draws)[0], student
    )()
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads)), "the student is not the critic's to move"


def test_who_is_due_and_what_is_drawn():
    objective = DMDObjective(DMDConfig(student_every=5))
    assert [len(objective.due(step)) for step in range(1, 12)] == [2, 1, 1, 1, 1, 2, 1, 1, 1, 1, 2]
    draws = objective.draws(jax.random.key(0), batch(SHAPE))
    assert not np.array_equal(draws["student"].student.noise, draws["critic"].student.noise)
    lasts = [int(objective.draws(jax.random.key(n), batch(SHAPE))["student"].student.last) for n in range(60)]
    assert set(lasts) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"student_steps": ()}, "student_steps is empty"),
        ({"student_steps": (500, 750)}, "decreasing timesteps"),
        ({"student_steps": (1001, 750)}, "decreasing timesteps"),
        (
            {"student_steps": tuple(range(1001, 0, -1))},
            "student_steps is 1001 1000 999 998 997 996 995 994 and 993 more",
        ),
        ({"guidance": 3.0}, "--negative"),
        ({"low": 0.5, "high": 0.4}, "low is 0.5"),
        ({"student_every": 0}, "student_every is 0"),
    ],
)
def test_bad_settings(settings, word):
    with pytest.raises(UserError, match=word):
        DMDConfig(**settings)


@pytest.mark.parametrize(
    ("block", "network", "frames", "word"),
    [
        (3, {"causal_block": 3}, 4, "frames=4 latent frames are not 3 k, whole blocks; the nearest that are: 3 or 6"),
        (3, {"causal_block": 2}, 6, "give --student.overrides causal_block=3"),
        (3, {}, 6, "causal_block is None"),
        (3, {"causal_block": 3, "independent_first_frame": True}, 6, "the network's is True"),
    ],
)
def test_blocks_that_do_not_fit(block, network, frames, word):
    objective, examples = SelfForcingObjective(SelfForcingConfig(block=block)), batch((1, frames, 4, 4, 2))
    draws = untyped(objective.draws(jax.random.key(0), examples)["student"].student)
    with pytest.raises(UserError, match=word):
        objective.roll_out(nnx.eval_shape(lambda: wan(0, **network)), jnp.asarray(examples.text), draws)


def test_a_causal_student_does_not_make_whole_clips():
    objective = DMDObjective(DMDConfig(student_steps=STEPS))
    student = nnx.eval_shape(lambda: wan(0, causal_block=2))
    with pytest.raises(UserError, match=r"causal_block is 2, but dmd generates whole clips .* self-forcing"):
        objective.samples(student, jnp.asarray(batch(SHAPE).text), draws_of(objective))


def test_levels_on_the_grid_are_of_shift_5_whatever_the_times_are_of():
    """Its least level is that of 0.001, not 0."""
    levels = levels_of(jnp.array([0, 999]), shift=3.0, low=0.0, high=1.0, conversion="grid")
    np.testing.assert_allclose(levels.mixed, [5 * n / (1000 + 4 * n) for n in (1, 998)], rtol=1e-6)
    np.testing.assert_allclose(levels.converted, levels.mixed)


def test_what_is_not_finite_in_g_is_nothing():
    """A teacher that agrees with the sample to the last bit leaves nothing to divide by."""
    nothing = jnp.zeros(SHAPE)
    levels = levels_of(jnp.array([500]), shift=5.0)
    networks = {"critic": lambda x, t, text: x, "teacher": lambda x, t, text: x}
    g, metrics = matching_gradient(
        nothing, jnp.ones((1, 1, 1)), None, **networks, guidance=0.0, levels=levels, noise=nothing
    )
    assert not np.asarray(g).any()
    assert float(metrics["replaced"]) == 1


def test_what_collapses_show():
    """Four frames that spread further from frame to frame, one latent in eight far below zero."""
    x = jnp.array([-1.0, 1.0])[None, None, None, None] * jnp.array([1.0, 2.0, 3.0, 5.0])[None, :, None, None, None]
    shown = {name: float(value) for name, value in sample_metrics(x).items()}
    assert shown["drift"] == pytest.approx(5 - 1)
    assert shown["motion"] == pytest.approx(4 / 3)
    assert shown["saturated"] == pytest.approx(2 / 8)
    assert float(sample_metrics(-jnp.abs(x))["saturated"]) == pytest.approx(2 / 8)


def test_what_solid_colours_and_stripes_show():
    """Frames of one colour each have no detail; rows that alternate are as rough as can be, ramps hardly."""
    colours = jnp.broadcast_to(jnp.arange(4.0)[None, :, None, None, None], (1, 4, 4, 4, 1))
    assert float(sample_metrics(colours)["detail"]) == 0
    rows, ramp = np.array([1.0, -1.0, 1.0, -1.0]), np.array([-1.5, -0.5, 0.5, 1.5])
    frames = [np.broadcast_to(row[:, None, None], (4, 4, 1)) for row in (ramp, ramp, ramp, rows)]
    shown = sample_metrics(jnp.asarray(np.stack(frames)[None]))
    assert float(shown["stripes"]) == pytest.approx(np.sqrt(4 / 1) / np.sqrt(1 / 1.25), rel=1e-5)
    assert float(shown["detail"]) == pytest.approx((3 * np.std(ramp) + 1) / 4, rel=1e-5)
    one = sample_metrics(jnp.ones((1, 2, 1, 1, 2)))
    assert float(one["stripes"]) == 1


def test_all_times_and_all_last_steps_are_drawn():
    time = np.asarray(draw_scores(jax.random.key(0), (2000, 1, 1, 1, 1)).time)
    assert 0 <= time.min() < 20
    assert 980 <= time.max() < 1000
    rolled = SelfForcingObjective(SelfForcingConfig(student_steps=STEPS))
    draws = [rolled.draws(jax.random.key(n), batch(SHAPE))["student"].student.last for n in range(40)]
    assert set(map(int, draws)) == {0, 1, 2}


def test_settings_of_the_published_training():
    """Self-Forcing's; a guidance of 0 is none, and a noise level of the past that is given is taken."""
    roles = DMDConfig.roles
    student, critic = (dict(roles[name].defaults) for name in ("student", "critic"))
    assert (student["learning_rate"], critic["learning_rate"]) == (2e-6, 4e-7)
    for defaults in (student, critic):
        assert (defaults["beta1"], defaults["beta2"], defaults["weight_decay"]) == (0.0, 0.999, 0.01)
    assert student["ema_start"] == 200
    assert critic["ema_decay"] is None
    assert [roles[name].own_batch for name in ("student", "critic")] == [False, True]
    negative = Path("negative.safetensors")
    assert [DMDConfig(negative=negative, guidance=w).weight for w in (None, 0.0, 2.0)] == [3.0, 0.0, 2.0]
    assert SelfForcingObjective(SelfForcingConfig(context_sigma=0.25))._context_sigma == 0.25
    assert SelfForcingObjective(SelfForcingConfig(shift=3.0))._context_sigma == pytest.approx(3 / 1002)
