"""Whoever calls the network at a step of a sampler tells it which: kinds of attention may depend on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.sampling.solve import guided, keep_context
from monarchrt.models.sampling.tables import sampler_table
from monarchrt.models.wan.teacher_forced import teacher_forced
from monarchrt.train.data import Batch
from monarchrt.train.demo.film import make_continuation
from monarchrt.train.objectives.dmd import DMDObjective
from monarchrt.train.objectives.flow import FlowObjective, flow_sampler
from monarchrt.train.objectives.ode import ODEDraws, ODEObjective
from monarchrt.train.objectives.settings import DMDConfig, FlowConfig, ODEConfig
from monarchrt.train.pairs import trajectory
from monarchrt.train.state import split_model

from .networks import batch, wan

SHAPE = (1, 4, 4, 4, 2)
NOISE, TEXT = jnp.ones(SHAPE), jnp.zeros((1, 2, 4))


class Numbered(nnx.Module):
    """A flow that is the number of the step."""

    config = None

    def __call__(self, latents, timesteps, text, image=None, *, step=None):
        assert step is not None, "not told the step"
        return jnp.zeros(latents.shape) + step


def shifted(count, shift):
    u = np.arange(count, -1, -1) / count
    return shift * u / (1 + (shift - 1) * u)


def test_euler_samples_while_training():
    sigma = shifted(3, 3.0)
    sampled = flow_sampler(FlowConfig(shift=3.0), steps=3)(Numbered(), NOISE, TEXT, NOISE)
    expected = 1 + sum(number * (sigma[number + 1] - sigma[number]) for number in range(3))
    np.testing.assert_allclose(sampled, np.full(SHAPE, expected), rtol=1e-5)


def test_every_sampler_of_an_objective():
    for objective in (FlowObjective(FlowConfig()), DMDObjective(DMDConfig())):
        for sampler in objective.samplers().values():
            assert jax.eval_shape(sampler, Numbered(), NOISE, TEXT, NOISE).shape == SHAPE


@pytest.mark.parametrize("last", [0, 1, 2])
def test_the_steps_of_a_student_that_makes_whole_clips(last):
    objective = DMDObjective(DMDConfig(student_steps=(1000, 600, 200)))
    sigma = [5 * u / (1 + 4 * u) for u in (1.0, 0.6, 0.2)]
    draws = objective._fixed_draws(NOISE)._replace(last=jnp.int32(last), fresh=jnp.zeros((1, 2, *SHAPE[1:])))
    z = 1.0
    for number in range(last):
        z = (1 - sigma[number + 1]) * (z - sigma[number] * number)
    expected = z - sigma[last] * last
    np.testing.assert_allclose(objective.samples(Numbered(), TEXT, draws), np.full(SHAPE, expected), rtol=1e-5)


def test_a_student_that_learns_from_a_teachers_states():
    """Each block is told the step of its state; those at the end, the number after the last."""

    class Numbered(nnx.Module):
        config = wan(0, causal_block=2).config

        def __call__(self, latents, timesteps, text, image=None, *, step=None):
            assert step is not None, "not told the step"
            return jnp.zeros(latents.shape) + step[..., None, None, None]

    objective = ODEObjective(ODEConfig(student_steps=(1000, 600), block=2))
    draws = ODEDraws(jnp.asarray([[0, 0, 1, 1], [1, 1, 2, 2]]))
    ones = Batch(np.ones((2, 3 * 4, 4, 4, 2), np.float32), np.zeros((2, 2, 4), np.float32))
    loss, metrics = objective.loss("student", {"student": Numbered()}, ones, draws)
    sigma = 5 * 0.6 / (1 + 4 * 0.6)  # of step 1, whose flow is 1
    np.testing.assert_allclose(metrics["loss_at_1000"], 0.0)
    np.testing.assert_allclose(metrics["loss_at_600"], sigma**2, rtol=1e-5)
    np.testing.assert_allclose(loss, 2 / 3 * sigma**2, rtol=1e-5)


def test_states_of_a_teacher():
    flow = guided(Numbered(), TEXT)
    states, end = trajectory(flow, NOISE, sampler_table("euler", steps=2, shift=1.0), stored=(1,), numbered=True)
    np.testing.assert_allclose(states[0], NOISE, rtol=1e-6)  # a flow of 0, then of 1
    np.testing.assert_allclose(end, NOISE - 0.5, rtol=1e-6)


def test_with_a_context_and_guidance():
    model = keep_context(Numbered(), NOISE)
    flow = guided(model, TEXT, TEXT + 1, guidance=5.0)
    np.testing.assert_allclose(flow(NOISE, jnp.float32(500), 3), 3 * NOISE)


def test_a_network_that_has_no_such_argument_is_not_told():
    flow = guided(keep_context(lambda x, t, text: x, NOISE), TEXT)
    np.testing.assert_array_equal(flow(NOISE, jnp.float32(500), 3), NOISE)


def test_the_film_of_the_demo():
    parts = split_model(Numbered())
    sample = make_continuation(parts[0], objective=FlowConfig(shift=1.0))
    made = sample(*parts[1:], NOISE, TEXT, NOISE)
    np.testing.assert_array_equal(made[:, 0], NOISE[:, 0])
    np.testing.assert_allclose(made[:, 1:], 1 - sum(range(16)) / 16, rtol=1e-5)


def test_noisy_blocks_are_at_a_step_and_clean_ones_after_all():
    """One layer, so that what the clean half attends to changes nothing of the noisy half."""
    examples, times = batch(SHAPE), jnp.full((1,), 500.0)
    clean, text = jnp.asarray(examples.latents), jnp.asarray(examples.text)
    model = wan(0, "first_steps(1, dense, sliding_tile(tile=(1,1,1),window=(1,1,1)))", causal_block=2)

    @jax.jit
    def flows(model):
        def forced(model, step=None):
            return teacher_forced(model, clean[:, ::-1], times, clean, text, step=step)

        exact = model.with_attention(model.config.layer_attention[0].first)
        return forced(exact), jax.lax.map(lambda step: forced(model, step), jnp.arange(2))

    exact, (first, second) = flows(model)
    np.testing.assert_allclose(first, exact, atol=1e-6)
    assert np.abs(second - first).max() > 1e-3


def test_frames_are_at_steps_of_their_own():
    """One layer: what a frame's queries see does not depend on the steps of others."""
    examples, times = batch((2, *SHAPE[1:])), jnp.full((2,), 500.0)
    latents, text = jnp.asarray(examples.latents), jnp.asarray(examples.text)
    model = wan(0, "first_steps(1, dense, sliding_tile(tile=(1,1,1),window=(1,1,1)))", causal_block=2)
    steps = jnp.asarray([[0, 0, 1, 1], [1, 1, 0, 0]])
    mixed, uniform = nnx.jit(
        lambda model: (model(latents, times, text, step=steps), [model(latents, times, text, step=n) for n in (0, 1)])
    )(model)
    assert np.abs(uniform[0] - uniform[1]).max() > 1e-3
    expected = np.where(np.asarray(steps)[..., None, None, None] == 0, *uniform)
    np.testing.assert_allclose(mixed, expected, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"step has shape \(3,\), not \(\) for one, \(2,\) .* \(2, 4\) for one per frame"
    ):
        model.check_latents(latents, times, jnp.zeros(3, jnp.int32))
