"""The training loop: takes steps on batches and calls hooks, independent of the objective and its roles."""

import contextlib
import functools
import shlex
from collections.abc import Callable, Mapping, Sequence

from monarchrt.models.processes.agreement import AgreedStop
from monarchrt.train.config import RunConfig
from monarchrt.train.data import Batch, ReadsParts, Source
from monarchrt.train.hooks import Hook, MetricsLog
from monarchrt.train.interrupt import Interrupted, StopRequest
from monarchrt.train.objectives.base import Objective
from monarchrt.train.prefetch import made_ahead
from monarchrt.train.sharding import Placement
from monarchrt.train.state import TrainState
from monarchrt.train.step import StepFn


class Batches:
    """Reads the batches of each step, by role, and moves them to the devices.

    Args:
        source: The data.
        objective: Defines which roles have a batch of their own.
        run: Settings of the run, of which `batch` and `seed` are used.
        placement: Devices that share each batch.
    """

    def __init__(self, source: Source, objective: Objective, *, run: RunConfig, placement: Placement):
        self._source, self._run, self._placement = source, run, placement
        settings = objective.settings
        own = [name for name in settings.training if settings.roles[name].own_batch]
        self._stream = {name: own.index(name) + 1 if name in own else 0 for name in settings.training}
        self._streams = len(own) + 1

    def host(self, step: int, roles: Sequence[str]) -> Mapping[str, Batch]:
        """The batches of a step, counted from 1, on the host."""
        return self._take(step, roles, lambda batch: batch, self._source.train_batch)

    def __call__(self, step: int, roles: Sequence[str]) -> Mapping[str, Batch]:
        """The batches of a step, counted from 1, on the devices.

        A process reads only the rows for its own devices, if the source supports it.
        """
        rows, source = self._placement.rows(self._run.batch), self._source
        if rows is None or not isinstance(source, ReadsParts):
            return self._take(step, roles, self._placement.batch, source.train_batch)
        place = functools.partial(self._placement.part, rows=rows, batch=self._run.batch)
        return self._take(step, roles, place, functools.partial(source.train_part, rows=rows))

    def _take(
        self, step: int, roles: Sequence[str], place: Callable[[Batch], Batch], read: Callable[[int, int, int], Batch]
    ) -> Mapping[str, Batch]:
        first = (step - 1) * self._streams
        batches = {
            stream: place(read(first + stream, self._run.batch, self._run.seed))
            for stream in sorted({self._stream[role] for role in roles})
        }
        return {role: batches[self._stream[role]] for role in roles}


class Trainer:
    """Trains from a state to the last step of the run.

    Args:
        state: The initial state.
        step_fn: From `monarchrt.train.step.make_train_step`.
        objective: Defines the roles that each step updates.
        batches: Reads the batches of a step.
        metrics: Logs the metrics that a step returns.
        hooks: Called, in this order, after the steps at which they are due.
        save: Called with the step and the state before a signal ends the run; returns once they are saved.
        run: Settings of the run, of which `steps`, `prefetch` and `folder` are used.
    """

    def __init__(
        self,
        state: TrainState,
        step_fn: StepFn,
        *,
        objective: Objective,
        batches: Batches,
        metrics: MetricsLog,
        hooks: Sequence[Hook],
        save: Callable[[int, TrainState], None],
        run: RunConfig,
    ):
        self.state = state
        self._step_fn, self._objective, self._batches = step_fn, objective, batches
        self._metrics, self._hooks, self._save, self._run = metrics, hooks, save, run

    def train(self, stop: StopRequest, after_step: Callable[[int, TrainState], None] | None = None) -> TrainState:
        """Trains until the last step of the run.

        Args:
            stop: Checked for a signal after each step.
            after_step: Called after each step with its number, counted from 1, and the state.

        Returns:
            The final state.

        Raises:
            NonFiniteError: If a role's loss, gradient or parameters became NaN or infinite.
            DiskFullError: If the disk was full for the log or a checkpoint.
            Interrupted: After a signal, once the state has been saved.
        """
        agreed = AgreedStop()
        due = ((step, self._objective.due(step)) for step in range(int(self.state.step) + 1, self._run.steps + 1))
        with contextlib.closing(made_ahead(lambda key: self._batches(*key), due, ahead=self._run.prefetch)) as made:
            for (step, roles), batch in made:
                self.state, metrics = self._step_fn(self.state, batch, due=roles)
                self._metrics.add(step, metrics)
                hooks = [hook for hook in self._hooks if hook.due(step)]
                self._metrics.write(leave=0 if hooks else 1)
                for hook in hooks:
                    hook(step, self.state)
                if after_step:
                    after_step(step, self.state)
                if (signal := agreed.due(step, stop.signal)) is not None:
                    self._stop(step, signal)
        self._metrics.write(leave=0)
        return self.state

    def _stop(self, step: int, number: int) -> None:
        self._metrics.write(leave=0)
        self._save(step, self.state)
        folder = shlex.quote(str(self._run.folder))
        raise Interrupted(
            f"stopped at step {step} and saved; continue with --folder {folder} --resume",
            code=128 + number,
            step=step,
        )
