"""The plan of a run (`monarchrt train --plan`): memory of each device and time, without taking a step.

The memory of parameters, optimizer and averages follows from shapes and shardings. That of activations is an estimate
from the traced loss. The memory of a compiled step is what its compiler reports.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from monarchrt.models.memory import Memory, device_memory, reported, shown
from monarchrt.train.config import AUTO, TrainConfig
from monarchrt.train.data import Batch
from monarchrt.train.duration import Estimate, estimated
from monarchrt.train.gathering import Gathering
from monarchrt.train.logs import duration
from monarchrt.train.networks import Networks
from monarchrt.train.objectives.base import Objective
from monarchrt.train.remat import Choice
from monarchrt.train.sharding import Placement
from monarchrt.train.state import TrainState
from monarchrt.train.step import StepFn, networks_of


@dataclass(frozen=True, kw_only=True)
class RolePlan:
    """Bytes of one network on each device.

    Attributes:
        role: Name of the role.
        parameters: Trained parameters.
        fixed: Other variables; 0 if they are shared with another role.
        gradient: Gradient of the trained parameters, during an update.
        moments: Moments of the optimizer.
        average: Moving average.
        activations: Values that the loss keeps for its backward pass, without those counted otherwise. An estimate from
            the traced loss, divided evenly over the devices; compiled programs may keep more or less.
        cache: Keys and values of a roll-out.
    """

    role: str
    parameters: int
    fixed: int
    gradient: int = 0
    moments: int = 0
    average: int = 0
    activations: int = 0
    cache: int = 0

    @property
    def held(self) -> int:
        """The sum of all fields."""
        return sum(getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "role")


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The compiled program of a step.

    Attributes:
        roles: The roles that it updates.
        memory: Bytes on each device; None if the compiler does not report them.
        seconds: Seconds to compile it.
    """

    roles: tuple[str, ...]
    memory: Memory | None
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run.

    Attributes:
        devices: Number and kind of the devices.
        mesh: Axes of the mesh.
        available: Bytes of memory of each device.
        networks: Memory of each network.
        steps: Each distinct step.
        remat: The choice for `remat="auto"`, and its reason.
        gathering: The choice whether to gather weights ahead, on devices for which there is one.
        advice: Options that reduce the memory.
        left: Number of remaining steps.
        seconds: Mean seconds of a step so far, from the log; None before the run has started.
        estimate: Estimated time of the remaining steps.
    """

    devices: str
    mesh: str
    available: int
    networks: tuple[RolePlan, ...]
    steps: tuple[StepPlan, ...]
    remat: Choice | None = None
    gathering: Gathering | None = None
    advice: tuple[str, ...] = ()
    left: int = 0
    seconds: float | None = None
    estimate: Estimate | None = None

    @property
    def most(self) -> int | None:
        """Largest memory of a step on a device in bytes, as its compiler reports it; None if it does not."""
        return most_of(self.steps)

    @property
    def fits(self) -> bool | None:
        """Whether all steps fit into a device's memory; None if their compiler does not report theirs."""
        return None if self.most is None else self.most <= self.available

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON values."""
        steps = [
            {
                "roles": list(step.roles),
                "memory": None if step.memory is None else step.memory._asdict() | {"total": step.memory.total},
                "compile_seconds": round(step.seconds, 1),
            }
            for step in self.steps
        ]
        networks = [dataclasses.asdict(network) for network in self.networks]
        return {
            "devices": self.devices,
            "mesh": self.mesh,
            "available": self.available,
            "networks": networks,
            "steps": steps,
            "most": self.most,
            "fits": self.fits,
            "remat": None if self.remat is None else dataclasses.asdict(self.remat) | {"kind": self.remat.kind},
            "gathered_ahead": None if self.gathering is None else self.gathering.ahead,
            "steps_left": self.left,
            "seconds_per_step": None if self.seconds is None else round(self.seconds, 4),
            "estimate": None if self.estimate is None else self.estimate.to_dict(),
        }


def most_of(steps: Sequence[StepPlan]) -> int | None:
    """Largest memory of the steps on a device in bytes; None if their compiler does not report it."""
    return max((step.memory.total for step in steps if step.memory is not None), default=None)


def make_plan(
    config: TrainConfig,
    *,
    objective: Objective,
    networks: Networks,
    placement: Placement,
    step_fn: StepFn,
    batches: Mapping[tuple[str, ...], Mapping[str, Batch]],
    remat: Choice | None = None,
    gathering: Gathering | None = None,
    steps: Sequence[StepPlan] | None = None,
    done: int = 0,
    log: Sequence[Mapping[str, Any]] = (),
) -> Plan:
    """Makes the plan of a run.

    Args:
        config: The settings.
        objective: The objective.
        networks: The networks, with shapes of the state.
        placement: Devices and shardings.
        step_fn: The step, which is compiled but does not run.
        batches: For each distinct set of roles that a step updates, its batches or their shapes.
        remat: The choice for `remat="auto"`.
        gathering: The choice whether to gather weights ahead.
        steps: Plans of the steps, if they are already compiled.
        done: Number of completed steps.
        log: Records of the log of these steps.

    Returns:
        The plan.
    """
    devices = list(placement.mesh.devices.flat)
    own = own_device(placement)
    kind = getattr(own, "device_kind", own.platform)
    roles = role_plans(config, objective=objective, networks=networks, placement=placement, batches=batches)
    estimate = estimated(
        objective,
        graphs=networks.graphs,
        template=networks.template,
        accumulation={name: config.trained(name).accumulation for name in config.objective.training},
        batches={role: batch for several in batches.values() for role, batch in several.items()},
        device=own,
        devices=len(devices),
        left=config.run.steps - done,
        state={role.role: role.parameters + role.moments + role.average for role in roles},
    )
    return Plan(
        devices=f"{len(devices)} x {kind}",
        mesh=str(placement.shape),
        available=device_memory(own),
        networks=roles,
        steps=tuple(steps or step_plans(networks, placement=placement, step_fn=step_fn, batches=batches)),
        remat=remat,
        gathering=gathering,
        advice=memory_advice(config),
        left=config.run.steps - done,
        seconds=mean_seconds(log),
        estimate=estimate,
    )


def own_device(placement: Placement) -> Any:
    """A device of this process, since JAX does not report the memory of others."""
    return next(device for device in placement.mesh.devices.flat if device.process_index == jax.process_index())


def role_plans(
    config: TrainConfig, *, objective: Objective, networks: Networks, placement: Placement,
    batches: Mapping[tuple[str, ...], Mapping[str, Batch]],
) -> tuple[RolePlan, ...]:  # fmt: skip
    """Plans the memory of each network, without compiling; arguments are those of `make_plan`."""
    seen = {role: batch for several in batches.values() for role, batch in several.items()}
    return tuple(_network(name, config, objective, networks, placement, seen.get(name)) for name in networks.graphs)


def step_plans(
    networks: Networks, *, placement: Placement, step_fn: StepFn,
    batches: Mapping[tuple[str, ...], Mapping[str, Batch]],
) -> tuple[StepPlan, ...]:  # fmt: skip
    """Compiles each distinct step and reports its memory; arguments are those of `make_plan`."""
    return tuple(_step(roles, networks.template, placement, step_fn, several) for roles, several in batches.items())


def memory_advice(config: TrainConfig) -> tuple[str, ...]:
    """Options that reduce the memory of a run."""
    training = config.objective.training
    open_to = [name for name in training if config.role(name).model.remat not in ("full", AUTO)]
    remat = [f"--{config.option(name, 'remat')} full" for name in open_to]
    larger = [f"a larger --{config.option(name, 'accumulation')}" for name in training]
    return (*remat, "a smaller --batch", *larger, "--mesh fsdp=N")


def on_a_device(tree: Any) -> int:
    """Bytes of a tree of shapes on each device, from the shapes of its shards.

    Examples:
        >>> on_a_device([jax.ShapeDtypeStruct((3, 4), "float32")])
        48
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape) if leaf.sharding else leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _network(
    name: str,
    config: TrainConfig,
    objective: Objective,
    networks: Networks,
    placement: Placement,
    batch: Batch | None,
) -> RolePlan:
    state = networks.template.roles[name]
    plan = RolePlan(role=name, parameters=on_a_device(state.params), fixed=on_a_device(state.frozen))
    if not state.trains or batch is None:
        return plan
    parts = placement.shape.size  # devices among which batches, and clips, are divided
    part = _shapes(batch, config.trained(name).accumulation)
    kept, cache = _kept(name, objective, networks, part)
    return dataclasses.replace(
        plan,
        gradient=plan.parameters,
        moments=on_a_device(state.optimizer),
        average=on_a_device(state.average),
        activations=max(0, kept - cache) // parts,
        cache=cache // parts,
    )


def _shapes(batch: Batch, parts: int) -> Batch:
    """The shapes of a batch, or of one of its parts with accumulation."""
    return Batch(*(jax.ShapeDtypeStruct((len(x) // parts, *x.shape[1:]), x.dtype) for x in batch))  # type: ignore


def _kept(name: str, objective: Objective, networks: Networks, batch: Batch) -> tuple[int, int]:
    """Bytes that a role's loss keeps for its backward pass, except its inputs, and bytes of its cache."""
    roles = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), networks.template.roles)
    graphs, draws = networks.graphs, jax.eval_shape(objective.draws, jax.random.key(0), batch)[name]

    def residuals(roles: Any, batch: Any, draws: Any) -> Any:
        def loss(params: Any) -> Any:
            seen = networks_of(objective, graphs, roles, {name: params})
            return objective.loss(name, seen, Batch(*batch), draws)

        return jax.vjp(loss, roles[name].params, has_aux=True)[1]

    def cache(roles: Any, batch: Any) -> Any:
        return objective.cache(name, networks_of(objective, graphs, roles, {}), Batch(*batch))

    traced = jax.make_jaxpr(residuals)(roles, tuple(batch), draws).jaxpr
    given = {id(variable) for variable in (*traced.invars, *traced.constvars)}
    kept = {id(variable): variable.aval for variable in traced.outvars if id(variable) not in given}
    return _bytes(list(kept.values())), _bytes(jax.eval_shape(cache, roles, tuple(batch)))


def _bytes(tree: Any) -> int:
    """Bytes of all arrays or shapes of a tree."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _step(
    roles: tuple[str, ...],
    template: TrainState,
    placement: Placement,
    step_fn: StepFn,
    batches: Mapping[str, Batch],
) -> StepPlan:
    begin = time.monotonic()
    program = step_fn.lower(*placement.shapes(template, dict(batches)), due=roles).compile()
    return StepPlan(roles=roles, memory=reported(program), seconds=time.monotonic() - begin)


def plan_table(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the table of memory, with a column for each network."""
    names = [field.name for field in dataclasses.fields(RolePlan)[1:]]
    words = {"fixed": "not trained", "activations": "activations (estimate)"}
    rows = [[words.get(name, name), *(shown(getattr(role, name)) for role in plan.networks)] for name in names]
    return ["", *(role.role for role in plan.networks)], rows


def plan_lines(plan: Plan) -> list[str]:
    """Lines below the table: choices, memory of the compiled steps, whether they fit, and the time."""
    lines = [str(choice) for choice in (plan.remat, plan.gathering) if choice is not None]
    for step in plan.steps:
        what = f"a step that updates {' and '.join(step.roles)}"
        if step.memory is None:
            lines.append(f"{what}: this backend's compiler does not report the memory of its program")
            continue
        parts = ", ".join(f"{name} {shown(size)}" for name, size in step.memory._asdict().items() if size)
        lines.append(f"{what}: {shown(step.memory.total)} at most, as its compiler reports ({parts})")
    if plan.most is not None:
        *others, last = plan.advice or ("a smaller run",)
        advice = f"{', '.join(others)}, or {last}" if others else last
        verdict = "it fits" if plan.fits else f"it does not fit; try {advice}"
        lines.append(f"at most {shown(plan.most)} on each device, of {shown(plan.available)}: {verdict}")
    lines += [] if plan.estimate is None else plan.estimate.lines()
    if plan.seconds is not None:
        left = f"{plan.left} steps are left" if plan.left != 1 else "one step is left"
        took = f"steps took {plan.seconds:.3g} s in the run so far"
        lines.append(f"{left}; {took}, held-out losses and checkpoints aside: {duration(plan.left * plan.seconds)}")
    return lines


def mean_seconds(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean seconds of the last hundred steps in a log, without those that compiled a program.

    Examples:
        >>> mean_seconds([{"step": 1, "seconds": 60.0}, {"step": 2, "seconds": 1.0}, {"step": 3, "seconds": 3.0}])
        2.0

    Args:
        records: Records of the log, in order. Steps of at least ten times the median are left out.

    Returns:
        The mean; None if no step but the first is in the log.
    """
    seconds = [record["seconds"] for record in records if "seconds" in record][1:][-100:]
    if not seconds:
        return None
    most = 10 * statistics.median(seconds)
    return statistics.fmean([taken for taken in seconds if taken < most] or seconds)
