"""Losses and gradients of distillation against what published functions gave: `tests/data/published.md` says which."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.train.data import Batch
from monarchrt.train.objectives.dmd import DMDDraws
from monarchrt.train.objectives.scores import ScoreDraws
from monarchrt.train.objectives.self_forcing import RolloutDraws, SelfForcingObjective
from monarchrt.train.objectives.settings import SelfForcingConfig
from tests.data import distilled_inputs as inputs

from .networks import gradient

PUBLISHED = np.load(Path(inputs.__file__).with_name("published_self_forcing.npz"))
BY_DEFAULT = ("student", 1, "clean", (3, 1, 2))


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
    loss, found = programs(case.role, case.conversion, case.tile)(DMDDraws(student, scores))
    np.testing.assert_allclose(loss, PUBLISHED[f"{case.name}/loss"], rtol=1e-5)
    ours = inputs.projected([leaf[...] for _, leaf in nnx.to_flat_state(found)])
    theirs = PUBLISHED[f"{case.name}/gradient"]
    assert ours.shape == theirs.shape == (len(jax.tree.leaves(found)), 9)
    whole = np.sqrt(np.sum(theirs[:, 0] ** 2))
    error = np.abs(ours - theirs).max(axis=1) / (theirs[:, 0] + 1e-3 * whole)
    print(f"{case.name}: {abs(float(loss) / PUBLISHED[f'{case.name}/loss'] - 1):.1e}, {error.max():.1e}")
    assert np.all(error <= 1e-5)
