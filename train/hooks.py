"""What happens between steps: metrics are logged, networks measured, samples shown, checkpoints saved.

A hook is called after the steps that it is due at, once their metrics are in the log, in the order of the list.
"""

import collections
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from monarchrt.models.errors import NonFiniteError
from monarchrt.train.checkpointing import Checkpoints
from monarchrt.train.config import RunConfig, TrainConfig
from monarchrt.train.data import Source
from monarchrt.train.logs import Progress, RunLog
from monarchrt.train.objectives.base import Metrics
from monarchrt.train.pictures import Pictures
from monarchrt.train.sample import write_held_out_sample
from monarchrt.train.state import TrainState, all_finite
from monarchrt.train.watch import Watch


@runtime_checkable
class Hook(Protocol):
    """Something that a run does at some of its steps."""

    def due(self, step: int) -> bool:
        """Whether it is to be called after this step, counted from 1."""
        ...

    def __call__(self, step: int, state: TrainState) -> None:
        """Does it; the state must not be kept, as the next step overwrites it."""
        ...


class Failure:
    """Makes the error that ends a run whose numbers are not finite; its words name the role, if there are several.

    Args:
        config: The settings.
        checkpoints: What is kept.
    """

    def __init__(self, config: TrainConfig, checkpoints: Checkpoints):
        self._config, self._checkpoints = config, checkpoints
        self._several = len(config.objective.roles) > 1

    def of_metrics(self, role: str, step: int, values: Mapping[str, float]) -> NonFiniteError:
        """The loss or the gradient of a step."""
        name = "loss" if not np.isfinite(values["loss"]) else "grad_norm"
        what = f"{name.replace('grad_norm', 'gradient norm')} is {values[name]}"
        return self._make(f"the {role}'s {what}" if self._several else what, role, step, values["learning_rate"])

    def of_parameters(self, role: str, step: int) -> NonFiniteError:
        """A parameter, its average or its optimizer's moments."""
        what = f"a parameter of the {role} is not finite" if self._several else "a parameter is not finite"
        return self._make(what, role, step, self._config.trained(role).learning_rate)

    def _make(self, what: str, role: str, step: int, rate: float) -> NonFiniteError:
        self._checkpoints.wait()
        good = [saved for saved in self._checkpoints.steps() if saved < step]
        kept = f"the checkpoint of step {good[-1]} is kept" if good else "there is no earlier checkpoint"
        options = [
            self._config.option(role, name).replace("_", "-") for name in ("learning_rate", "warmup", "clip_norm")
        ]
        when = f"at step {step} (learning_rate {rate:.3g})"
        advice = "try a smaller --{}, a longer --{} or a smaller --{} with --resume".format(*options)
        return NonFiniteError(f"{what} {when}; {kept} in {self._checkpoints.path}", advice=advice, step=step)


class MetricsLog:
    """Writes the metrics of finished steps to the log; the run ends at the first that are not finite.

    The device works on a step while the one before is looked at, so metrics are handed over first and written later.

    Args:
        log: Where they go.
        progress: Shows the losses.
        every: Steps between two that are written.
        total: Steps of the run; the last is always written.
        prefix: Whether names begin with the role.
        failure: Makes the error.
        watch: Sees what is written, and warns.
    """

    def __init__(
        self,
        log: RunLog,
        progress: Progress,
        *,
        every: int,
        total: int,
        prefix: bool,
        failure: Failure,
        watch: Watch | None = None,
    ):
        self._log, self._progress, self._failure, self._watch = log, progress, failure, watch or Watch(())
        self._every, self._total, self._prefix = every, total, prefix
        self._pending: collections.deque[tuple[int, dict[str, Metrics]]] = collections.deque()
        self._clock = time.monotonic()

    def add(self, step: int, metrics: dict[str, Metrics]) -> None:
        """Hands over what a step returned, which may not be computed yet."""
        self._pending.append((step, metrics))

    def write(self, *, leave: int) -> None:
        """Writes what was handed over, but for the last `leave` steps.

        Raises:
            NonFiniteError: If the loss or the gradient of a role is not finite.
        """
        while len(self._pending) > leave:
            step, metrics = self._pending.popleft()
            roles = {
                role: {name: value.item() for name, value in values.items()}
                for role, values in jax.device_get(metrics).items()
            }
            broken = [role for role, values in roles.items() if not values.pop("finite")]
            now = time.monotonic()
            if step % self._every == 0 or step == self._total or broken:
                scalars = {self._name(role, name): value for role in roles for name, value in roles[role].items()}
                self._log.write(step, scalars | {"seconds": round(now - self._clock, 4)})
                for line in self._watch.add(step, scalars):
                    self._progress.note(f"warning: {line}")
            self._clock = now
            losses = [f"{self._name(role, 'loss')} {values['loss']:.4f}" for role, values in roles.items()]
            self._progress.update(step, ", ".join(losses))
            if broken:
                raise self._failure.of_metrics(broken[0], step, roles[broken[0]])

    def _name(self, role: str, name: str) -> str:
        return f"{role}/{name}" if self._prefix else name


class Evaluate:
    """Measures the networks on held-out data, writes it to the log and shows it.

    Attributes:
        last: What was measured last, by role.

    Args:
        measure: Measures a state.
        log: Log to write to.
        progress: Progress bar that shows the values.
        run: Settings of the run, which say how often.
        prefix: Whether names begin with the role.
    """

    def __init__(
        self,
        measure: Callable[[TrainState], dict[str, float]],
        log: RunLog,
        progress: Progress,
        *,
        run: RunConfig,
        prefix: bool,
    ):
        self._measure, self._log, self._progress, self._run, self._prefix = measure, log, progress, run, prefix
        self.last: dict[str, float] | None = None

    def due(self, step: int) -> bool:
        """Every `eval_every` steps, and at the end."""
        return step % self._run.eval_every == 0 or step == self._run.steps

    def __call__(self, step: int, state: TrainState) -> None:
        """Measures and says so."""
        losses = self.measured(state)
        names = {role: f"{role}/held_out_loss" if self._prefix else "held_out_loss" for role in losses}
        self._log.write(step, {names[role]: value for role, value in losses.items()})
        words = [f"{role} {value:.4f}" if self._prefix else f"{value:.4f}" for role, value in losses.items()]
        self._progress.measured(step, f"held-out loss {', '.join(words)}")

    def measured(self, state: TrainState) -> dict[str, float]:
        """Measures without a word."""
        self.last = self._measure(state)
        return self.last


class Sample:
    """Writes videos of what the exported network makes of a held-out window, with its average and without.

    Args:
        samplers: Label -> compiled sampler.
        source: Source of the held-out data.
        pictures: Converts data and samples to pixels.
        role: Role of the network.
        folder: Folder of the files.
        every: Steps between two videos.
    """

    def __init__(
        self,
        samplers: Mapping[str, Callable[..., Any]],
        source: Source,
        *,
        pictures: Pictures,
        role: str,
        folder: Path,
        every: int,
    ):
        self._samplers, self._source, self._pictures = samplers, source, pictures
        self._role, self._folder, self._every = role, folder, every

    def due(self, step: int) -> bool:
        """Every `every` steps."""
        return step % self._every == 0

    def __call__(self, step: int, state: TrainState) -> None:
        """Writes one."""
        role = state.roles[self._role]
        latest = None if role.average is None else role.params
        path = self._folder / f"step_{step:06d}.mp4"
        frozen = state.frozen(self._role)
        write_held_out_sample(
            path, self._samplers, role.evaluated, frozen, self._source, pictures=self._pictures, latest=latest
        )


class Save:
    """Saves checkpoints of what is finite.

    Args:
        checkpoints: Where they go.
        identity: What they belong to.
        run: Says how often.
        failure: Makes the error if something is not finite.
    """

    def __init__(self, checkpoints: Checkpoints, identity: dict[str, Any], *, run: RunConfig, failure: Failure):
        self._checkpoints, self._identity, self._run, self._failure = checkpoints, identity, run, failure

    def due(self, step: int) -> bool:
        """Every `checkpoint_every` steps, and at the end."""
        return step % self._run.checkpoint_every == 0 or step == self._run.steps

    def __call__(self, step: int, state: TrainState) -> None:
        """Begins to save.

        Raises:
            NonFiniteError: If a network has numbers that are not finite.
        """
        for name, role in state.roles.items():
            # what does not train is as it was before the first step, when all was looked at
            if role.trains and not bool(all_finite((role.params, role.average, role.optimizer))):
                raise self._failure.of_parameters(name, step)
        self._checkpoints.save(state, self._identity)
