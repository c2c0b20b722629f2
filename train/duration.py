"""Estimates the time of a run's updates before it starts, from their arithmetic and the rates of its devices."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from monarchrt.train.arithmetic import UncountedError, Work, work
from monarchrt.train.data import Batch
from monarchrt.train.logs import duration
from monarchrt.train.objectives.base import Objective
from monarchrt.train.rates import Rates, known_rates, timed_rates
from monarchrt.train.state import TrainState
from monarchrt.train.step import Graphs, networks_of

_PASSES = 2  # passes over the state in an update: it is read and written
_COUNTED = 100_000  # most steps for which it is counted which roles they update


@dataclass(frozen=True, kw_only=True)
class UpdateTime:
    """Estimated time of an update of one role.

    Attributes:
        role: Name of the role.
        updates: Number of its remaining updates.
        work: Arithmetic of one update, on all devices together.
        parts: Seconds of each part, under the names with which `--times-every` logs them.
    """

    role: str
    updates: int
    work: Work
    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Seconds of all parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated time of a run.

    Attributes:
        rates: Rates of its devices; None if there is no estimate.
        updates: Time of an update of each role that trains.
        devices: Number of devices that share the work.
        left: Number of remaining steps.
        why: Why there is no estimate.
    """

    rates: Rates | None
    updates: tuple[UpdateTime, ...] = ()
    devices: int = 1
    left: int = 0
    why: str = ""

    @property
    def seconds(self) -> float | None:
        """Seconds of all remaining steps; None if there is no estimate."""
        return None if self.rates is None else sum(update.updates * update.seconds for update in self.updates)

    def to_dict(self) -> dict[str, Any]:
        """The estimate as JSON values."""
        updates = [
            {
                "role": update.role,
                "updates": update.updates,
                "tflop": _rounded(update.work.total / 1e12),
                "of_attention": _rounded(update.work.attended / 1e12),
                "parts": {name: _rounded(value) for name, value in update.parts.items()},
                "seconds": _rounded(update.seconds),
            }
            for update in self.updates
        ]
        rates = None if self.rates is None else dataclasses.asdict(self.rates)
        seconds = None if self.seconds is None else _rounded(self.seconds)
        return {"updates": updates, "rates": rates, "seconds": seconds, "why": self.why or None}

    def lines(self) -> Iterator[str]:
        """The estimate in words."""
        rates = self.rates
        if rates is None:
            yield f"the time is not estimated: {self.why}"
            return
        for update in self.updates:
            parts = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in update.parts.items())
            many = f" on {self.devices} devices" if self.devices > 1 else ""
            yield (
                f"an update of the {update.role}: {update.work.total / 1e12:.3g} TFLOP in products{many}, "
                f"{_between(rates, update.seconds, lambda x: f'{x:.3g} s')} ({parts})"
            )
        counts = " and ".join(f"{update.updates} of the {update.role}" for update in self.updates)
        whole = _between(rates, self.seconds or 0.0, lambda x: f"{x:.3g} s" if x < 120 else duration(x))
        aside = "held-out losses, samples and checkpoints" + (", and exchange between devices" * (self.devices > 1))
        yield f"{self.left} steps, {counts}: {whole}, {aside} aside; an estimate: {rates.basis}"


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def _between(rates: Rates, seconds: float, said: Callable[[float], str]) -> str:
    if rates.high is None:
        return f"more than {said(rates.low * seconds)}"
    return f"some {said(seconds)}, from {said(rates.low * seconds)} to {said(rates.high * seconds)}"


def estimated(
    objective: Objective,
    *,
    graphs: Graphs,
    template: TrainState,
    accumulation: Mapping[str, int],
    batches: Mapping[str, Batch],
    device: Any,
    devices: int,
    left: int,
    state: Mapping[str, int],
) -> Estimate:
    """Estimates the time of a run. If the rates of its devices are not known, one product is timed.

    Args:
        objective: The objective.
        graphs: Structure of each network.
        template: Shapes of the state.
        accumulation: Number of parts of the batch, by role that trains.
        batches: Batch of each role that trains, or its shapes.
        device: One of the devices.
        devices: Number of devices that share the work.
        left: Number of remaining steps.
        state: Bytes on a device that an update of each role changes.
    """
    try:
        jax.devices("cpu")
    except RuntimeError:
        return Estimate(rates=None, why="it is traced for a CPU, which JAX_PLATFORMS does not include")
    try:
        found = {
            name: _parts(name, objective, graphs, template, batch, accumulation[name])
            for name, batch in batches.items()
        }
    except (UncountedError, NotImplementedError) as reason:  # the second of a kernel that a CPU does not support
        return Estimate(rates=None, why=f"{reason}; it is estimated if attention names no implementation")
    whole = Work()
    for parts in found.values():
        whole = whole.plus(list(parts.values())[-1])
    rates = known_rates(getattr(device, "device_kind", device.platform))
    if rates is None:
        rates = timed_rates(device, single=2 * whole.float32 > whole.total)
    elif 100 * whole.full_precision > whole.total:
        why = "it has float32 products that must not be rounded, for which no rates were measured; see precision"
        return Estimate(rates=None, why=why)
    counted = range(left, max(0, left - _COUNTED), -1)  # a sample of the steps
    due = [objective.due(step) for step in counted]
    updates = []
    for name, parts in found.items():
        seconds, before = {}, 0.0
        for part, done in parts.items():
            until = rates.seconds(done) / devices
            seconds[part], before = max(0.0, until - before), until
        seconds["optimizer"] = rates.moving(_PASSES * state[name])
        share = sum(name in roles for roles in due) / max(1, len(due))
        updates.append(UpdateTime(role=name, updates=round(share * left), work=list(parts.values())[-1], parts=seconds))
    return Estimate(rates=rates, updates=tuple(updates), devices=devices, left=left)


def _parts(
    name: str, objective: Objective, graphs: Graphs, template: TrainState, batch: Batch, repeats: int
) -> dict[str, Work]:
    """Arithmetic of an update up to the end of each part, for the whole batch; the last part is the gradient."""
    shapes = Batch(*(jax.ShapeDtypeStruct((len(x) // repeats, *x.shape[1:]), x.dtype) for x in batch))  # type: ignore
    roles = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), template.roles)
    draws, turns = jax.eval_shape(objective.draws, jax.random.key(0), shapes)[name], objective.turns(name)

    def own(part: Callable[..., Any], *, gradient: bool = False) -> Callable[..., Any]:
        def run(roles: Any, batch: Any, draws: Any) -> Any:
            def of(params: Any) -> Any:
                seen = networks_of(objective, graphs, roles, {name: params})
                return part(seen, Batch(*batch), objective.typical(name, draws))

            return (jax.grad(of, has_aux=True) if gradient else of)(roles[name].params)

        return run

    def forward(seen: Any, batch: Batch, draws: Any) -> Any:
        return objective.loss(name, seen, batch, draws)

    programs = {part: own(run or forward) for part, run in objective.parts(name).items()}
    programs["backward"] = own(forward, gradient=True)
    return {
        part: work(run, roles, tuple(shapes), draws, turns=turns).times(float(repeats))
        for part, run in programs.items()
    }
