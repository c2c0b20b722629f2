"""The training run: data, network, steps, logs and checkpoints put together.

    result = train(TrainConfig(data=DataConfig(video=Path("clip.mp4")), run=RunConfig(folder=Path("runs/a"))))

Each step is a pure function of (state, step number, seed), so a run that goes on from a checkpoint repeats the
uninterrupted run bit for bit on the same machine.
"""

import collections
import contextlib
import functools
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monarchrt.models.errors import NonFiniteError, UserError, user_input
from monarchrt.train.checkpointing import FOLDER_NAME, Checkpoints
from monarchrt.train.config import TrainConfig
from monarchrt.train.data import ClipWindows, LatentFolder, Source, open_source
from monarchrt.train.evaluate import held_out_loss
from monarchrt.train.header import run_header
from monarchrt.train.interrupt import Interrupted, StopRequest
from monarchrt.train.logs import Progress, RunLog
from monarchrt.train.model import (
    build_model,
    check_pretrained,
    check_same_network,
    model_settings,
    pretrained_parameters,
)
from monarchrt.train.run_folder import DIGESTS_NAME, FolderLock, claim_folder, compare_identity, identity, write_config
from monarchrt.train.sample import make_sampler, write_held_out_sample
from monarchrt.train.sharding import Placement
from monarchrt.train.sinks import check_sinks, open_sinks
from monarchrt.train.state import TrainState, all_finite, create_state, make_optimizer, split_model
from monarchrt.train.step import StepFn, make_error_fn, make_train_step


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run ends with.

    Attributes:
        state: The last state.
        graph: Structure of the network; `model` puts it together with parameters.
        held_out_loss: Held-out loss of the evaluated parameters (the moving average, if there is one).
        folder: The run folder; `monarchrt.train.logs.read_log` reads its log.
    """

    state: TrainState
    graph: nnx.GraphDef
    held_out_loss: float
    folder: Path

    @property
    def model(self) -> Any:
        """The network with the evaluated parameters."""
        return nnx.merge(self.graph, self.state.evaluated, self.state.fixed)


def train(
    config: TrainConfig,
    *,
    source: Source | None = None,
    model: nnx.Module | None = None,
    quiet: bool | None = None,
    after_step: Callable[[int, TrainState], None] | None = None,
) -> TrainResult:
    """Trains a network and leaves a run folder.

    Args:
        config: All settings.
        source: Data to use instead of opening what the config names.
        model: Network to start from instead of building what the config names; the config's model settings should
            still describe it, since they are what a resume compares.
        quiet: Hide (True) or show (False) the progress bar; None shows it on a terminal.
        after_step: Called after each step with the step number, counted from 1, and the state, which must not be
            kept, as the next step overwrites it.

    Returns:
        The last state and the held-out loss.

    Raises:
        UserError: If the settings, the data or the run folder cannot be used.
        NonFiniteError: If the loss, the gradient or the parameters became NaN or infinite.
        DiskFullError: If there was no room for the log or a checkpoint.
        Interrupted: If a signal asked to stop; the state has been saved.
    """
    claim_folder(config)
    check_sinks(config)
    if source is None:
        text_dim = model_settings(config.model, precision=config.run.precision).text_dim
        source = open_source(config.data, text_shape=(1, text_dim), digests=config.run.folder / DIGESTS_NAME)
    with FolderLock(config.run.folder) as lock, contextlib.ExitStack() as opened:
        if config.run.folder.is_dir():
            lock.take()
            claim_folder(config)  # while the data was read, another run may have come and gone
        return _Run(config, source, model, quiet, opened).go(lock, after_step)


def _close(
    checkpoints: Checkpoints, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Waits for the save that is under way and closes; what ended the run is not hidden by what goes wrong then."""
    try:
        checkpoints.close()
    except Exception as second:
        if error is None:
            raise
        error.add_note(f"{checkpoints.path} could not be closed either: {second}")


class _Run:
    """One call of `train`; the order of the methods is the order in which they run."""

    def __init__(
        self,
        config: TrainConfig,
        source: Source,
        model: nnx.Module | None,
        quiet: bool | None,
        opened: contextlib.ExitStack,
    ):
        self.config, self.source, self.quiet, self.opened = config, source, quiet, opened
        run = config.run
        found = run.resume and (run.folder / FOLDER_NAME).is_dir()
        self.previous = self._open() if found else None
        if self.previous:
            self.previous.check_newest(self._compare([]))  # before the time is spent on building the network
            done = max(self.previous.steps(), default=0)
            if done > run.steps:
                raise UserError(f"steps is {run.steps}, but {run.folder} has {done} already; give {done} or more")
        self.placement = Placement(batch=run.batch, accumulation=config.optimizer.accumulation, state=run.sharding)
        self.model = model
        self.build = functools.partial(
            build_model, config.model, channels=source.latent_shape[-1], seed=run.seed, precision=run.precision
        )
        if model is None:
            model = nnx.eval_shape(self.build)
        if run.init_from is not None and not (self.previous and self.previous.steps()):
            self._check_origin(run.init_from, model)
        self.graph, params, fixed = split_model(model)
        self.optimizer = make_optimizer(config.optimizer, steps=run.steps)
        self.template = self._template(params, fixed)
        self.network = getattr(model, "config", None)
        shardings = self.placement.shardings(self.template)
        self.step_fn: StepFn = make_train_step(
            self.graph,
            self.optimizer,
            objective=config.objective,
            settings=config.optimizer,
            steps=run.steps,
            shardings=shardings,
        )
        self._check_step()
        _ = self.identity  # reads the data where it has to
        self.error_fn = make_error_fn(self.graph, objective=config.objective, shardings=shardings)
        self.pending: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self.held_out: float | None = None
        self.samplers: dict[str, Callable[..., jax.Array]] = {}

    def _open(self) -> Checkpoints:
        """The checkpoints, closed when the run ends, however it does."""
        checkpoints = Checkpoints(self.config.run.folder, keep=self.config.run.keep)
        self.opened.push(functools.partial(_close, checkpoints))
        return checkpoints

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What the checkpoints belong to; may read all of the data, so what is quick to check is checked before."""
        return identity(self.config, fingerprint=self.source.fingerprint)

    def _check_origin(self, origin: Path, model: Any) -> None:
        """Looks whether the parameters to start from are of the network's sizes; reads none."""
        if not (origin / FOLDER_NAME).is_dir():
            check_pretrained(origin, model.config)
            return
        with Checkpoints(origin, read_only=True) as checkpoints:
            checkpoints.check_newest(lambda saved, step: check_same_network(origin, saved, self.config.model))

    def _template(self, params: Any, fixed: Any) -> TrainState:
        """Shapes and places of the state."""
        shapes = jax.eval_shape(self._create, params, fixed)
        return jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            self.placement.shardings(shapes),
        )

    def _create(self, params: Any, fixed: Any) -> TrainState:
        config = self.config
        average = config.optimizer.ema_decay is not None
        return create_state(params, fixed, self.optimizer, seed=config.run.seed, ema=average)

    def _check_step(self) -> None:
        """Traces a step: shapes, tiles and backends are checked before anything is computed or written."""
        run = self.config.run
        if run.sample_every and not isinstance(self.source, ClipWindows):
            raise UserError(
                f"sample_every is {run.sample_every}, but latents cannot be shown as pixels without their "
                f"decoder; use sample_every 0, or a video"
            )
        batch = self.source.train_batch(0, run.batch, run.seed)
        with user_input():
            jax.eval_shape(self.step_fn, self.template, *batch)

    def go(self, lock: FolderLock, after_step: Callable[[int, TrainState], None] | None) -> TrainResult:
        config, run = self.config, self.config.run
        checkpoints = self.previous
        start, restored = 0, None
        notes: list[str] = []
        if checkpoints:
            restored = checkpoints.restore(self.template, check=self._compare(notes), note=notes.append)
            if restored is not None:
                start = int(restored.step)
        if run.resume:
            notes.append(
                f"resuming {run.folder} at step {start}"
                if restored is not None
                else f"nothing to resume in {run.folder}"
            )
        self.state = self._start() if restored is None else restored
        lock.take()
        claim_folder(config)  # likewise
        if checkpoints is None and (run.folder / FOLDER_NAME).exists():
            raise UserError(f"folder {run.folder} was begun by another run meanwhile; try again with --resume")
        write_config(config)
        if isinstance(self.source, LatentFolder):
            self.source.keep_digests()
        self.checkpoints = checkpoints or self._open()
        with (
            RunLog(
                run.folder,
                step=-1 if restored is None else start,
                kept=self.checkpoints.kept,
                sinks=open_sinks(config),
            ) as self.log,
            Progress(run.steps, start=start, quiet=self.quiet) as self.progress,
            StopRequest() as stop,
        ):
            for note in notes:
                self.progress.note(note)
            self.progress.header(self._header())
            self.clock = time.monotonic()
            if restored is None and run.init_from is not None:
                self._measure(0)  # what the parameters are worth before any training
            if restored is None:
                # a first checkpoint, so that there always is a good one and a full disk shows at once
                self._save(0)
                self.checkpoints.wait()
            for step in range(start + 1, run.steps + 1):
                self._step(step)
                if after_step:
                    after_step(step, self.state)
                if stop.signal is not None:
                    self._stop(step, stop.signal)
            self._drain(0)
            if self.held_out is None:
                self.held_out = self._evaluate()
            self.checkpoints.wait()
        return TrainResult(state=self.state, graph=self.graph, held_out_loss=self.held_out, folder=run.folder)

    def _compare(self, notes: list[str]) -> Callable[[dict[str, Any], int], None]:
        def check(saved: dict[str, Any], step: int) -> None:
            notes.extend(compare_identity(saved, self.identity, step=step, folder=self.config.run.folder))

        return check

    def _start(self) -> TrainState:
        """The state at step 0, made where it lives: no device need hold the whole of it."""
        places = self.placement.shardings(self.template)
        make = functools.partial(jax.jit, out_shardings=places)
        origin = self.config.run.init_from
        if self.model is None and origin is None:
            return make(lambda: self._create(*split_model(self.build())[1:]))()
        params, fixed = self.template.params, self.template.fixed
        if self.model is not None:
            # a step overwrites its input; the caller keeps the model that was given
            params, fixed = jax.tree.map(jnp.copy, split_model(self.model)[1:])
        if origin is not None:
            params = self._parameters_of(origin)
        return make(self._create)(*jax.device_put((params, fixed), (places.params, places.fixed)))

    def _parameters_of(self, origin: Path) -> Any:
        if (origin / FOLDER_NAME).is_dir():
            with Checkpoints(origin, read_only=True) as checkpoints:
                return checkpoints.restore_parameters(self.template.params)
        model: Any = nnx.merge(self.graph, self.template.params, self.template.fixed)
        return pretrained_parameters(origin, model.config, sharding=lambda _, shape: self.placement.sharding(shape))

    def _step(self, step: int) -> None:
        run = self.config.run
        batch = self.source.train_batch(step - 1, run.batch, run.seed)
        self.state, metrics = self.step_fn(self.state, *self.placement.batch(batch))
        self.pending.append((step, metrics))
        last = step == run.steps
        evaluate = step % run.eval_every == 0 or last
        save = step % run.checkpoint_every == 0 or last
        # the device works on this step while the one before is looked at
        self._drain(0 if evaluate or save else 1)
        if evaluate:
            self._measure(step)
        if run.sample_every and step % run.sample_every == 0:
            self._sample(step)
        # after everything that the log says about this step, so that a resume finds it there
        if save:
            self._save(step)

    def _drain(self, leave: int) -> None:
        """Logs the metrics of finished steps; stops the run at the first that are not finite."""
        while len(self.pending) > leave:
            step, metrics = self.pending.popleft()
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            finite = values.pop("finite")
            now = time.monotonic()
            if step % self.config.run.log_every == 0 or step == self.config.run.steps or not finite:
                self.log.write(step, values | {"seconds": round(now - self.clock, 4)})
            self.clock = now
            self.progress.update(step, f"loss {values['loss']:.4f}")
            if not finite:
                which = "loss" if not np.isfinite(values["loss"]) else "gradient norm"
                value = values["loss"] if which == "loss" else values["grad_norm"]
                raise self._non_finite(f"{which} is {value}", step, values["learning_rate"])

    def _non_finite(self, what: str, step: int, rate: float) -> NonFiniteError:
        self.checkpoints.wait()
        good = [saved for saved in self.checkpoints.steps() if saved < step]
        kept = f"the checkpoint of step {good[-1]} is kept" if good else "there is no earlier checkpoint"
        return NonFiniteError(
            f"{what} at step {step} (learning_rate {rate:.3g}); {kept} in {self.checkpoints.path}",
            advice="try a smaller --learning-rate, a longer --warmup or a smaller --clip-norm with --resume",
            step=step,
        )

    def _header(self) -> list[str]:
        with user_input():
            return run_header(
                self.config,
                self.template,
                latent_shape=self.source.latent_shape,
                network=self.network,
                devices=list(self.placement.mesh.devices.flat),
            )

    def _measure(self, step: int) -> None:
        """Evaluates and says so."""
        self.held_out = self._evaluate()
        self.log.write(step, {"held_out_loss": self.held_out})
        self.progress.measured(step, f"held-out loss {self.held_out:.4f}")

    def _evaluate(self) -> float:
        run = self.config.run
        return held_out_loss(
            self.error_fn,
            self.state.evaluated,
            self.state.fixed,
            self.source,
            objective=self.config.objective,
            windows=run.eval_windows,
            timesteps=run.eval_timesteps,
            batch=run.batch,
            place=self.placement.batch,
        )

    def _sample(self, step: int) -> None:
        source = self.source
        if not isinstance(source, ClipWindows):
            return  # refused by _check_step
        if not self.samplers:
            make = functools.partial(make_sampler, self.graph, objective=self.config.objective)
            self.samplers = {"restored": make(start=0.6), "sampled": make(start=1.0)}
        path = self.config.run.folder / "samples" / f"step_{step:06d}.mp4"
        write_held_out_sample(path, self.samplers, self.state.evaluated, self.state.fixed, source)

    def _save(self, step: int) -> None:
        if not bool(all_finite((self.state.params, self.state.ema, self.state.optimizer))):
            raise self._non_finite("a parameter is not finite", step, self.config.optimizer.learning_rate)
        self.checkpoints.save(self.state, self.identity)

    def _stop(self, step: int, number: int) -> None:
        self._drain(0)
        self._save(step)
        self.checkpoints.wait()
        folder = shlex.quote(str(self.config.run.folder))
        raise Interrupted(
            f"stopped at step {step} and saved; go on with --folder {folder} --resume",
            code=128 + number,
            step=step,
        )
