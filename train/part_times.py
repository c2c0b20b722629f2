"""Timing of the parts of an update, by separate programs that run after a step.

The parts of one compiled step cannot be timed. Instead, a program is compiled for each part that computes the update up
to its end; the time of a part is the difference to the program of the previous one. Steps themselves do not get slower.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import use_abstract_mesh

from monarchrt.models.processes.programs import compiled_by_all
from monarchrt.train.data import Batch
from monarchrt.train.logs import RunLog
from monarchrt.train.objectives.base import Objective
from monarchrt.train.state import Training, TrainState, update_ema
from monarchrt.train.step import mesh_of, networks_of

Batches = Callable[[int, Sequence[str]], Mapping[str, Batch]]


class PartTimes:
    """A hook that logs `seconds_PART` of each role: the parts of its loss (`Objective.parts`), backward, optimizer.

    With accumulation, losses and gradients are those of one part of the batch. The first call compiles the programs and
    runs them once before timing. A call takes about as long as two steps, and needs memory for a gradient, or for a
    second copy of what an update of one role changes.

    Args:
        objective: The objective, with its losses and their parts.
        graphs: Structure of each role's network.
        trainings: Optimizer of each role that trains.
        batches: Reads the batches of a step.
        log: The log of the run.
        every: Steps between two calls.
        prefix: Whether names start with the role.
        shardings: Shardings of the state.
    """

    def __init__(
        self,
        objective: Objective,
        graphs: Mapping[str, nnx.GraphDef],
        trainings: Mapping[str, Training],
        *,
        batches: Batches,
        log: RunLog,
        every: int,
        prefix: bool,
        shardings: TrainState | None = None,
    ):
        self._batches, self._log, self._every = batches, log, every
        self._prefix, self._warm = prefix, False
        self._programs = {
            role: part_programs(objective, graphs, training, role, shardings=shardings)
            for role, training in trainings.items()
        }

    def due(self, step: int) -> bool:
        """After the first step, and every `every` steps."""
        return step == 1 or step % self._every == 0

    def __call__(self, step: int, state: TrainState) -> None:
        """Times the updates of every role."""
        key, batches = jax.random.fold_in(state.rng, step), self._batches(step, tuple(self._programs))
        found = {}
        for role, programs in self._programs.items():
            arguments = (state, batches[role], key)
            if not self._warm:
                _seconds(programs, arguments)
            name = f"{role}/seconds" if self._prefix else "seconds"
            found |= {f"{name}_{part}": value for part, value in _seconds(programs, arguments).items()}
        self._warm = True
        self._log.write(step, found)


def part_programs(
    objective: Objective,
    graphs: Mapping[str, nnx.GraphDef],
    training: Training,
    role: str,
    *,
    shardings: TrainState | None = None,
) -> dict[str, Callable[..., Any]]:
    """The programs that compute a role's update up to the end of each part, and the optimizer's update by itself.

    Args:
        objective: The objective, with its losses and their parts.
        graphs: Structure of each role's network.
        training: Optimizer of the role.
        role: Name of the role.
        shardings: Shardings of the state.

    Returns:
        Compiled functions (state, batch, key) by part.
    """
    share = training.settings.accumulation  # one part of the batch is used

    def own(part: Callable[..., Any], *, gradient: bool = False) -> Callable[..., Any]:
        def run(state: TrainState, batch: Batch, key: Any) -> Any:
            draws = objective.draws(key, Batch(*batch))[role]
            batch, draws = jax.tree.map(lambda x: x[::share] if x.ndim else x, (tuple(batch), draws))

            def whole(params: Any) -> Any:
                return part(networks_of(objective, graphs, state.roles, {role: params}), Batch(*batch), draws)

            with use_abstract_mesh(mesh_of(shardings)):
                return (jax.grad(whole, has_aux=True) if gradient else whole)(state.roles[role].params)

        return run

    def forward(networks: Any, batch: Batch, draws: Any) -> Any:
        return objective.loss(role, networks, batch, draws)

    def optimizer(state: TrainState, batch: Batch, key: Any) -> Any:
        now = state.roles[role]
        changes, moments = training.optimizer.update(now.params, now.optimizer, now.params)  # any tree of their shapes
        params = optax.apply_updates(now.params, changes)
        return params, moments, update_ema(now.average, params, jnp.int32(2**30), training.settings)

    parts = {name: own(part or forward) for name, part in objective.parts(role).items()}
    programs = parts | {"backward": own(forward, gradient=True), "optimizer": optimizer}
    return {name: compiled_by_all(jax.jit(run)) for name, run in programs.items()}


def _seconds(programs: Mapping[str, Callable[..., Any]], arguments: tuple) -> dict[str, float]:
    """Seconds of each part: the difference to the previous program's time, at least 0."""
    found, before = {}, 0.0
    for name, program in programs.items():
        begun = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        taken = time.perf_counter() - begun
        found[name] = round(taken if name == "optimizer" else max(0.0, taken - before), 6)
        before = taken
    return found
