"""The programs of a run's steps, with the recomputation and the gathers that fit the devices' memory."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from monarchrt.models.memory import device_memory
from monarchrt.models.processes.agreement import first_problem, smallest
from monarchrt.train.config import TrainConfig
from monarchrt.train.data import Batch
from monarchrt.train.gathering import Gathering, fitting
from monarchrt.train.networks import Networks
from monarchrt.train.objectives.base import Objective
from monarchrt.train.plan import StepPlan, most_of, role_plans, step_plans
from monarchrt.train.remat import Choice, choose, with_remat
from monarchrt.train.sharding import Placement
from monarchrt.train.step import StepFn, make_train_step, may_gather_ahead


@dataclass(frozen=True, kw_only=True)
class Programs:
    """Networks and the step that trains them.

    Attributes:
        networks: The networks.
        step_fn: The step.
        steps: Plans of the step for each set of roles that it updates; None if nothing depended on them, and the step
            has not been compiled.
        gathering: Whether weights are gathered a layer ahead; None if they cannot be.
        remat: The choice of recomputation; None without roles of `remat="auto"`.
    """

    networks: Networks
    step_fn: StepFn
    steps: tuple[StepPlan, ...] | None = None
    gathering: Gathering | None = None
    remat: Choice | None = None


def make_step(networks: Networks, *, objective: Objective, placement: Placement, ahead: bool = True) -> StepFn:
    """The step that trains the networks where they are placed.

    Args:
        networks: The networks.
        objective: Draws and losses.
        placement: Where the state and the batches are.
        ahead: As in `make_train_step`.
    """
    return make_train_step(
        objective,
        networks.graphs,
        networks.trainings,
        configs=networks.configs,
        shardings=placement.shardings(networks.template),
        ahead=ahead,
    )


def choose_programs(
    given: Programs,
    config: TrainConfig,
    *,
    roles: tuple[str, ...],
    networks_of: Callable[[TrainConfig], Networks],
    objective: Objective,
    placement: Placement,
    batches: Callable[[], Mapping[tuple[str, ...], Mapping[str, Batch]]],
) -> Programs:
    """Compiles steps until one fits the devices' memory, if recomputation or gathers are to be chosen.

    Args:
        given: The networks of the config and their step, which are returned if nothing is to be chosen.
        config: Settings of the run.
        roles: The roles of `remat="auto"`.
        networks_of: Makes the networks of settings.
        objective: Draws and losses.
        placement: Where the state and the batches are; of several processes, all choose the same.
        batches: Makes the batches of a step, for each set of roles that it may update.

    Returns:
        The programs.
    """
    may_be_ahead = may_gather_ahead(objective, given.networks.trainings, placement.mesh)
    if not roles and not may_be_ahead:
        return given
    choosing = _Choosing(
        objective=objective,
        placement=placement,
        batches=batches(),
        # all processes try the same kinds
        available=smallest("device memory", min(map(device_memory, placement.mesh.local_devices))),
        may_be_ahead=may_be_ahead,
    )
    if not roles:
        return choosing.gathering(given.networks)
    return choosing.recomputing(config, roles, networks_of)


def _fits_all(fits: bool) -> bool:
    """Whether a step fits in all processes, from whether it fits in this one."""
    return first_problem("memory", None if fits else "it does not fit") is None


@dataclass(frozen=True, kw_only=True)
class _Choosing:
    """What is compiled for, and the bytes of each device's memory."""

    objective: Objective
    placement: Placement
    batches: Mapping[tuple[str, ...], Mapping[str, Batch]]
    available: int
    may_be_ahead: bool

    def compiled(self, networks: Networks, *, ahead: bool) -> tuple[StepFn, tuple[StepPlan, ...]]:
        """A step, compiled, and its plans."""
        step_fn = make_step(networks, objective=self.objective, placement=self.placement, ahead=ahead)
        return step_fn, step_plans(networks, placement=self.placement, step_fn=step_fn, batches=self.batches)

    def gathering(self, networks: Networks) -> Programs:
        """The step of these networks, with weights gathered ahead if that is possible and fits."""
        compiled = functools.partial(self.compiled, networks)
        if not self.may_be_ahead:
            step_fn, steps = compiled(ahead=False)
            return Programs(networks=networks, step_fn=step_fn, steps=steps)
        (step_fn, steps), gathering = fitting(
            lambda ahead: compiled(ahead=ahead),
            lambda step: most_of(step[1]),
            available=self.available,
            agreed=_fits_all,
        )
        return Programs(networks=networks, step_fn=step_fn, steps=steps, gathering=gathering)

    def recomputing(
        self, config: TrainConfig, roles: tuple[str, ...], networks_of: Callable[[TrainConfig], Networks]
    ) -> Programs:
        """The step of networks that recompute as little as fits."""
        programs: dict[str, Programs] = {}

        @functools.cache
        def made(kind: str) -> tuple[TrainConfig, Networks]:
            changed = with_remat(config, roles, kind)
            return changed, networks_of(changed)

        def estimate(kind: str) -> int:
            changed, networks = made(kind)
            plans = role_plans(
                changed, objective=self.objective, networks=networks, placement=self.placement, batches=self.batches
            )
            return sum(plan.held for plan in plans)

        def compiled(kind: str) -> int | None:
            programs[kind] = self.gathering(made(kind)[1])
            return most_of(programs[kind].steps or ())

        choice = choose(roles, available=self.available, estimate=estimate, compiled=compiled, agreed=_fits_all)
        return replace(programs[choice.kind], remat=choice)
