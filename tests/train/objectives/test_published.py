"""Losses and gradients of distillation against what published functions gave: `tests/data/published.md` says which."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.train.data import Batch
from monarchrt.train.objectives.consistency import ConsistencyDraws, ConsistencyObjective
from monarchrt.train.objectives.dmd import DMDDraws, DMDObjective, StudentDraws
from monarchrt.train.objectives.flow import FlowDraws, FlowObjective, noise_levels
from monarchrt.train.objectives.ode import ODEDraws, ODEObjective
from monarchrt.train.objectives.scores import ScoreDraws
from monarchrt.train.objectives.self_forcing import RolloutDraws, SelfForcingObjective
from monarchrt.train.objectives.settings import (
    ConsistencyConfig,
    DMDConfig,
    FlowConfig,
    ODEConfig,
    SelfForcingConfig,
    TeacherForcingConfig,
)
from monarchrt.train.objectives.teacher_forcing import TeacherForcingDraws, TeacherForcingObjective
from tests.data import distilled_inputs as inputs

from .networks import gradient

PUBLISHED = np.load(Path(inputs.__file__).with_name("published_self_forcing.npz"))
STAGES = np.load(Path(inputs.__file__).with_name("published_stages.npz"))
BY_DEFAULT = ("student", 1, "clean", (3, 1, 2))


def slow_but(names, *quick):
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def programs():
    """Loss and gradient by role, noise levels and tiles: a program for all last steps."""
    made: dict[Any, Any] = {}

    def of(role, conversion, tile):
        if (role, conversion, tile) not in made:
            objective = SelfForcingObjective(
                SelfForcingConfig(
                    student_steps=inputs.STEPS, block=inputs.BLOCK, negative=Path("given"), conversion=conversion
                )
            )
            objective.negative = inputs.negative()[0]
            attention = "dense" if tile is None else f"monarch(tile=({','.join(map(str, tile))}))"
            networks = {name: inputs.model(name, attention if name == "student" else "dense") for name in inputs.SEEDS}
            batch = Batch(np.zeros(inputs.SHAPE, np.float32), inputs.text())

            def loss(network, draws):
                return objective.loss(role, networks | {role: network}, batch, draws)[0]

            made[role, conversion, tile] = gradient(loss, networks[role])
        return made[role, conversion, tile]

    return of


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=() if case == BY_DEFAULT else pytest.mark.slow)
        for case in (*inputs.DENSE, *inputs.MONARCH)
    ],
)
def test_losses_and_gradients_are_those_of_the_published_code(programs, case):
    draws = {name: jnp.asarray(x) for name, x in inputs.draws(case.role).items()}
    student: Any = RolloutDraws(draws["noise"], draws["fresh"], draws["context"], jnp.int32(case.last))
    scores = ScoreDraws(jnp.array([inputs.TIME], jnp.int32), draws["scores"])
    assert_published(PUBLISHED, case.name, programs(case.role, case.conversion, case.tile)(DMDDraws(student, scores)))


def assert_published(arrays, name, found):
    """Loss, and gradient of each parameter by its norm and products with random vectors."""
    loss, gradients = found
    np.testing.assert_allclose(loss, arrays[f"{name}/loss"], rtol=1e-5)
    ours = inputs.projected([leaf[...] for _, leaf in nnx.to_flat_state(gradients)])
    theirs = arrays[f"{name}/gradient"]
    assert ours.shape == theirs.shape == (len(jax.tree.leaves(gradients)), 9)
    whole = np.sqrt(np.sum(theirs[:, 0] ** 2))
    error = np.abs(ours - theirs).max(axis=1) / (theirs[:, 0] + 1e-3 * whole)
    print(f"{name}: {abs(float(loss) / arrays[f'{name}/loss'] - 1):.1e}, {error.max():.1e}")
    assert np.all(error <= 1e-5)


@pytest.mark.parametrize("role", ["student", "critic"])
@pytest.mark.parametrize("conversion", ["clean", pytest.param("published", marks=pytest.mark.slow)])
def test_dmd_of_a_bidirectional_student_is_published(role, conversion):
    objective = DMDObjective(DMDConfig(student_steps=inputs.STEPS, negative=Path("given"), conversion=conversion))
    objective.negative = inputs.negative()[0]
    networks = {name: inputs.model(name, causal=False) for name in inputs.SEEDS}
    batch = Batch(np.zeros(inputs.SHAPE, np.float32), inputs.text())
    draws = {name: jnp.asarray(x) for name, x in inputs.draws(role).items()}
    scores = ScoreDraws(jnp.array([inputs.TIME], jnp.int32), draws["scores"])

    def loss(network, last):
        student = StudentDraws(draws["noise"], draws["fresh"], last)
        return objective.loss(role, networks | {role: network}, batch, DMDDraws(student, scores))[0]

    program = gradient(loss, networks[role])
    for case in inputs.BIDIRECTIONAL:
        if (case.role, case.conversion) == (role, conversion):
            assert_published(STAGES, case.name, program(jnp.int32(case.last)))


@pytest.mark.parametrize("name", slow_but(inputs.CONSISTENCY, "consistency 48"))
def test_consistency_is_published(name):
    """On a grid of 48 the published code turns flows into data at the nearest of 1000 levels."""
    levels = int(name.split()[1])
    conversion: Any = "clean" if levels == 50 else "published"
    objective = ConsistencyObjective(
        ConsistencyConfig(grid=levels, block=inputs.BLOCK, negative=Path("given"), conversion=conversion)
    )
    objective.negative = inputs.negative()[0]
    average, teacher = (inputs.model(role, causal=True) for role in ("critic", "teacher"))
    draws = ConsistencyDraws(jnp.array([inputs.PLACE]), jnp.asarray(inputs.regression_draws()["noise"]))
    batch = Batch(inputs.states()[:, -1], inputs.text())

    def loss(student):
        networks = {"student": student, "student.average": average, "teacher": teacher}
        return objective.loss("student", networks, batch, draws)[0]

    assert_published(STAGES, name, gradient(loss, inputs.model("student"))())


def regression(name) -> tuple[Any, Batch, Any]:
    """Objective, batch and draws."""
    draws, states = inputs.regression_draws(), inputs.states()
    noise, clip = jnp.asarray(draws["noise"]), Batch(states[:, -1], inputs.text())
    level = jnp.asarray(999 - draws["index"])  # the published list falls
    if name == "ode":
        stacked = states.reshape(1, -1, *inputs.SHAPE[2:])
        objective = ODEObjective(ODEConfig(student_steps=inputs.STEPS, block=inputs.BLOCK))
        return objective, Batch(stacked, inputs.text()), ODEDraws(jnp.asarray(draws["state"]))
    if name == "diffusion forcing":
        return FlowObjective(FlowConfig(frames_per_level=inputs.BLOCK)), clip, FlowDraws(level, noise)
    noised = "noised" in name
    config = TeacherForcingConfig(frames_per_level=inputs.BLOCK, context_sigma=0.999 if noised else 0.0)
    context = jnp.asarray(noise_levels(config).sigma)[999 - draws["clean index"]]
    return (
        TeacherForcingObjective(config),
        clip,
        TeacherForcingDraws(level, noise, context, noise),
    )  # noise of the target


@pytest.mark.parametrize("name", slow_but(inputs.REGRESSIONS, "teacher forcing, noised", "ode"))
def test_stages_with_data_are_published(name):
    objective, batch, draws = regression(name)
    student = inputs.model("student")
    program = gradient(lambda network: objective.loss("student", {"student": network}, batch, draws)[0], student)
    assert_published(STAGES, name, program())
