"""How long the parts of an update take: programs of their own, on the numbers of a step that was just taken.

One compiled step cannot be looked into. So that nothing is slower while nobody looks, parts are measured apart: each
part is a program that ends with it, and takes what it takes longer than the one that ends before it.
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
    """Logs `seconds_PART` of each role: the parts of its loss, as the objective names them, backward, optimizer.

    Of a batch that is accumulated in parts, losses and gradients are those of one part. Programs are compiled at the
    first call, which is not counted; a call takes as long as some two steps, and holds a gradient or another copy of
    what changes in one role.

    Args:
        objective: Its losses and their parts.
        graphs: Structure of each role's network.
        trainings: How each role that trains does so.
        batches: Batches of a step.
        log: Log to write to.
        every: Steps between two calls.
        prefix: Whether names begin with the role.
        shardings: Where the state lives.
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
        """At the first step, and every `every`."""
        return step == 1 or step % self._every == 0

    def __call__(self, step: int, state: TrainState) -> None:
        """Measures every role."""
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
    """(state, batch, key) -> what a role's update has after each of its parts; but for the optimizer, which is alone.

    Args:
        objective: Its losses and their parts.
        graphs: Structure of each role's network.
        training: How the role trains.
        role: Which.
        shardings: Where the state lives.
    """
    share = training.settings.accumulation  # of the batch, one part is looked at

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
    """What each part takes longer than the one before it, at least 0."""
    found, before = {}, 0.0
    for name, program in programs.items():
        begun = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        taken = time.perf_counter() - begun
        found[name] = round(taken if name == "optimizer" else max(0.0, taken - before), 6)
        before = taken
    return found
