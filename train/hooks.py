"""Hooks, which run between steps: evaluation, samples and checkpoints; and the log of the steps' metrics.

A hook is called after the steps at which it is due, once their metrics are in the log.
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
    """An action after some of a run's steps."""

    def due(self, step: int) -> bool:
        """Whether to call the hook after this step, counted from 1."""
        ...

    def __call__(self, step: int, state: TrainState) -> None:
        """Runs the hook; the next step overwrites the buffers of the state."""
        ...


class Failure:
    """Makes the errors that end a run with NaN or infinite values; messages name the role, if there are several.

    Args:
        config: The settings.
        checkpoints: The checkpoints of the run, which messages refer to.
    """

    def __init__(self, config: TrainConfig, checkpoints: Checkpoints):
        self._config, self._checkpoints = config, checkpoints
        self._several = len(config.objective.roles) > 1

    def of_metrics(self, role: str, step: int, values: Mapping[str, float]) -> NonFiniteError:
        """The error for a role's loss or gradient norm.

        Args:
            role: Name of the role.
            step: Number of the step.
            values: Metrics of the role at this step.
        """
        name = "loss" if not np.isfinite(values["loss"]) else "grad_norm"
        what = f"{name.replace('grad_norm', 'gradient norm')} is {values[name]}"
        return self._make(f"the {role}'s {what}" if self._several else what, role, step, values["learning_rate"])

    def of_parameters(self, role: str, step: int) -> NonFiniteError:
        """The error for a role's parameters, their average or the optimizer's moments after a step."""
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
    """Writes the metrics of steps to the log, and raises an error if they are not finite.

    Metrics are added when a step is dispatched and written later, so that the device computes the next step meanwhile.

    Args:
        log: The log of the run.
        progress: Shows the losses.
        every: Write every this many steps.
        total: Number of steps of the run; the last is always written.
        prefix: Whether names start with the role.
        failure: Makes the errors.
        watch: Checks what is written; its warnings are printed.
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
        """Adds the metrics that a step returned, which need not be computed yet."""
        self._pending.append((step, metrics))

    def write(self, *, leave: int) -> None:
        """Writes the metrics that were added, except those of the last `leave` steps.

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
    """Evaluates the networks on held-out data and logs the losses.

    Attributes:
        last: Losses of the last evaluation by role; None before the first.

    Args:
        measure: Computes the held-out losses of a state by role.
        log: The log of the run.
        progress: Shows the losses.
        run: Settings of the run, of which `eval_every` and `steps` are used.
        prefix: Whether names start with the role.
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
        """Evaluates a state, and logs and shows the losses."""
        losses = self.measured(state)
        names = {role: f"{role}/held_out_loss" if self._prefix else "held_out_loss" for role in losses}
        self._log.write(step, {names[role]: value for role, value in losses.items()})
        words = [f"{role} {value:.4f}" if self._prefix else f"{value:.4f}" for role, value in losses.items()]
        self._progress.measured(step, f"held-out loss {', '.join(words)}")

    def measured(self, state: TrainState) -> dict[str, float]:
        """Evaluates a state without logging; returns the losses by role."""
        self.last = self._measure(state)
        return self.last


class Sample:
    """Writes videos of the exported network's samples for a held-out window, with and without its moving average.

    Args:
        samplers: Compiled samplers by label.
        source: Source of the held-out data.
        pictures: Converts data and samples to pixels.
        role: Role of the network.
        folder: Folder of the videos.
        every: Write a video every this many steps.
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
        """Writes the video of a step."""
        role = state.roles[self._role]
        latest = None if role.average is None else role.params
        path = self._folder / f"step_{step:06d}.mp4"
        frozen = state.frozen(self._role)
        write_held_out_sample(
            path, self._samplers, role.evaluated, frozen, self._source, pictures=self._pictures, latest=latest
        )


class Save:
    """Saves checkpoints, after a check that all values are finite.

    Args:
        checkpoints: The checkpoints of the run.
        identity: Settings that the checkpoints belong to (see `run_folder.identity`).
        run: Settings of the run, of which `checkpoint_every` and `steps` are used.
        failure: Makes the error for values that are not finite.
    """

    def __init__(self, checkpoints: Checkpoints, identity: dict[str, Any], *, run: RunConfig, failure: Failure):
        self._checkpoints, self._identity, self._run, self._failure = checkpoints, identity, run, failure

    def due(self, step: int) -> bool:
        """Every `checkpoint_every` steps, and at the end."""
        return step % self._run.checkpoint_every == 0 or step == self._run.steps

    def __call__(self, step: int, state: TrainState) -> None:
        """Starts to save a checkpoint.

        Raises:
            NonFiniteError: If parameters, average or optimizer state of a network are not finite.
        """
        for name, role in state.roles.items():
            # networks that do not train were checked before the first step
            if role.trains and not bool(all_finite((role.params, role.average, role.optimizer))):
                raise self._failure.of_parameters(name, step)
        self._checkpoints.save(state, self._identity)
