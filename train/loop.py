"""The training run, which puts data, networks, steps, logs and checkpoints together.

    result = train(TrainConfig(data=DataConfig(video=Path("clip.mp4")), run=RunConfig(folder=Path("runs/a"))))

Each step is a pure function of (state, step number, seed), so a run that is resumed from a checkpoint reproduces the
uninterrupted run bit for bit on the same machine.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
from flax import nnx

from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.runs import checkpoint_steps
from monarchrt.models.processes.agreement import (
    broadcast_value,
    check_seen,
    check_shared,
    is_first_process,
    run_in_first,
    wait_for_all,
)
from monarchrt.models.processes.alike import check_same, listing
from monarchrt.train.checkpointing import FOLDER_NAME, Checkpoints
from monarchrt.train.config import RunConfig, TrainConfig
from monarchrt.train.data import Batch, ClipWindows, LatentFolder, Source
from monarchrt.train.evaluate import held_out_losses
from monarchrt.train.header import check_fits, run_header
from monarchrt.train.hooks import Evaluate, Failure, Hook, MetricsLog, Sample, Save
from monarchrt.train.interrupt import StopRequest
from monarchrt.train.logs import NoLog, Progress, RunLog, read_log
from monarchrt.train.model import check_frame_size, model_settings
from monarchrt.train.networks import Networks
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.part_times import PartTimes
from monarchrt.train.pictures import Pictures, pictures
from monarchrt.train.plan import Plan, make_plan
from monarchrt.train.programs import Programs, choose_programs, make_step
from monarchrt.train.remat import automatic
from monarchrt.train.run_folder import DIGESTS_NAME, FolderLock, claim_folder, compare_identity, identity, write_config
from monarchrt.train.sample import make_sampler
from monarchrt.train.sharding import Placement
from monarchrt.train.sinks import check_sinks, open_sinks
from monarchrt.train.state import TrainState
from monarchrt.train.step import make_error_fn
from monarchrt.train.trainer import Batches, Trainer
from monarchrt.train.watch import Watch

_EXAMINED = 10_000  # leading steps among which all distinct sets of updated roles are expected


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """The result of a run.

    Attributes:
        state: The final state.
        graphs: Structure of each role's network.
        held_out: Held-out losses by role, of the evaluated parameters (the moving average, if there is one).
        exported: The exported role, whose network is `model`.
        folder: The run folder; `monarchrt.train.logs.read_log` reads its log.
    """

    state: TrainState
    graphs: Mapping[str, nnx.GraphDef]
    held_out: Mapping[str, float]
    exported: str
    folder: Path

    @property
    def held_out_loss(self) -> float:
        """Held-out loss of the exported role; NaN if the objective does not measure it."""
        return self.held_out.get(self.exported, math.nan)

    @property
    def model(self) -> Any:
        """The exported network with the evaluated parameters."""
        return self.network(self.exported)

    def network(self, role: str) -> Any:
        """The network of a role with its evaluated parameters."""
        return nnx.merge(self.graphs[role], self.state.roles[role].evaluated, self.state.frozen(role))


def train(
    config: TrainConfig,
    *,
    source: Source | None = None,
    model: nnx.Module | Mapping[str, nnx.Module] | None = None,
    quiet: bool | None = None,
    after_step: Callable[[int, TrainState], None] | None = None,
) -> TrainResult:
    """Trains the networks of a config and writes a run folder.

    Args:
        config: All settings.
        source: Data to use instead of that of the config.
        model: Network to start from instead of that of the config, or networks by role. The config's model settings
            should describe it, since resuming compares them.
        quiet: Whether to hide the progress bar; None shows it on a terminal only.
        after_step: Called after each step with its number, counted from 1, and the state, whose buffers the next step
            overwrites.

    Returns:
        The final state and the held-out losses.

    Raises:
        UserError: If the settings, the data or the run folder cannot be used.
        NonFiniteError: If the loss, the gradient or the parameters of a role became NaN or infinite.
        DiskFullError: If the disk was full for the log or a checkpoint.
        Interrupted: After a signal, once the state has been saved.
    """
    _check_joined(config.run)
    run_in_first("claim", lambda: claim_folder(config))
    check_sinks(config)
    source = source or _open_source(config)
    with FolderLock(config.run.folder) as lock, contextlib.ExitStack() as opened:

        def claim() -> None:
            lock.take()
            claim_folder(config)  # again, since another run may have used it while the data was read

        run_in_first("claim again", lambda: claim() if config.run.folder.is_dir() else None)
        models = model if isinstance(model, Mapping) else {} if model is None else {config.objective.exported: model}
        run = _Run(config, source, models, opened)
        state, notes = run.begin()
        run_in_first("claim at last", claim)
        return run.train(state, notes, quiet=quiet, after_step=after_step)


def _check_joined(run: RunConfig) -> None:
    if run.processes is not None and run.processes != jax.process_count():
        raise UserError(
            f"processes is {run.processes}, but JAX has {jax.process_count()}; call train within "
            f"monarchrt.models.processes.joining.joined, entered before JAX initializes its devices"
        )


def plan(config: TrainConfig, *, source: Source | None = None) -> Plan:
    """Plans a run: memory of each device by role and of the compiled steps, and an estimate of the time.

    Everything is checked as in `train`, but no step is taken and nothing is written.

    Args:
        config: All settings.
        source: Data to use instead of that of the config.

    Returns:
        The plan.

    Raises:
        UserError: If the settings, the data or the run folder cannot be used.
    """
    _check_joined(config.run)
    run_in_first("claim", lambda: claim_folder(config))
    check_sinks(config)
    with contextlib.ExitStack() as opened:
        run = _Run(config, source or _open_source(config, encode=False), {}, opened, dry=True)
        return run.plan()


def _attention_errors(network: Any, latents: Sequence[int]) -> set[str]:
    """The errors of a network's attention settings for latents of shape (F, h, w, C)."""
    found = set()
    for setting in getattr(network, "layer_attention", ()):
        try:
            with user_input():
                setting.check(network.token_grid(*latents[:3]), causal_block=network.causal_block)
        except UserError as error:
            found.add(str(error))
    return found


def _open_source(config: TrainConfig, *, encode: bool = True) -> Source:
    with config.naming_role(config.objective.exported):
        text_dim = model_settings(config.model, precision=config.run.precision).text_dim
    digests = config.run.folder / DIGESTS_NAME
    return make_objective(config.objective).open_source(
        config.data, text_shape=(1, text_dim), digests=digests, encode=encode
    )


def _close(
    checkpoints: Checkpoints, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
) -> None:
    """Waits for a pending save and closes; an error while closing does not replace the one that ended the run."""
    try:
        checkpoints.close()
    except Exception as second:
        if error is None:
            raise
        error.add_note(f"{checkpoints.path} could not be closed either: {second}")


class _Run:
    """One call of `train`, or of `plan`.

    The constructor checks everything that can be checked before anything is computed or written. A `dry` run writes
    nothing, and does not compare the content of the data.
    """

    def __init__(
        self,
        config: TrainConfig,
        source: Source,
        models: Mapping[str, nnx.Module],
        opened: contextlib.ExitStack,
        *,
        dry: bool = False,
    ):
        self.config, self.source, self.opened, self._dry = config, source, opened, dry
        self.pictures: Pictures | None = None
        run = config.run
        if run.resume:
            check_seen("checkpoints", lambda: checkpoint_steps(run.folder), option="folder", path=run.folder)
        continues = run.resume and (run.folder / FOLDER_NAME).is_dir()
        self.previous = self._open() if continues else None
        resumed = self._check_previous()
        self.objective = make_objective(config.objective)
        parts = math.lcm(*(config.trained(role).accumulation for role in config.objective.training))
        self.placement = Placement(batch=run.batch, accumulation=parts, mesh=run.mesh, state=run.sharding)
        self._models = models
        self.networks = self._networks(config)
        self._check_networks(resumed=resumed)
        self.batches = Batches(source, self.objective, run=run, placement=self.placement)
        self.step_fn = make_step(self.networks, objective=self.objective, placement=self.placement)
        self._check_step()
        self.programs = choose_programs(
            Programs(networks=self.networks, step_fn=self.step_fn),
            config,
            roles=automatic(config, given=models),
            networks_of=self._networks,
            objective=self.objective,
            placement=self.placement,
            batches=self._first_batches,
        )
        self.networks, self.step_fn = self.programs.networks, self.programs.step_fn
        if self.programs.remat is not None:
            self.networks.check_origins(resumed=resumed)
        if not dry:
            _ = self.identity  # may read all of the data
        self.measure = functools.partial(
            held_out_losses,
            make_error_fn(
                self.objective, self.networks.graphs, shardings=self.placement.shardings(self.networks.template)
            ),
            source=source,
            objective=self.objective,
            windows=run.eval_windows,
            timesteps=run.eval_timesteps,
            batch=run.batch,
            place=self.placement.batch,
        )

    def _check_previous(self) -> bool:
        """Whether the folder has a checkpoint to resume from; checks that the settings fit it."""
        if self.previous is None:
            return False
        if not self._dry:
            self.previous.check_newest(self._compare([]))  # before the networks are built, which takes time
        run, done = self.config.run, self.previous.steps()
        if done and done[-1] > run.steps:
            raise UserError(f"steps is {run.steps}, but {run.folder} has {done[-1]} already; give {done[-1]} or more")
        return bool(done)

    def _check_networks(self, *, resumed: bool) -> None:
        """Checks that the networks fit the devices, the data and the mesh, and are the same in all processes."""
        if not self._dry:  # a dry run reports how much they take instead
            check_fits(self.networks.template, list(self.placement.mesh.local_devices))
        for role, settings in self.networks.configs.items():
            if settings is not None and isinstance(self.source, ClipWindows):
                check_frame_size(self.config.data, settings)
            if (heads := getattr(settings, "num_heads", None)) is not None:
                whose = f"the {role}" if len(self.networks.configs) > 1 else "the network"
                self.placement.shape.check_heads(heads, whose=whose)
        self.networks.check_origins(resumed=resumed)
        check_same("weights", lambda: self.networks.listing)
        if (negative := getattr(self.config.objective, "negative", None)) is not None:
            check_same("embeddings of the negative prompt", lambda: listing([negative.expanduser()]))

    def _networks(self, config: TrainConfig) -> Networks:
        channels = self.source.latent_shape[-1]
        return Networks(config, self.objective, channels=channels, placement=self.placement, models=self._models)

    def _first_batches(self) -> dict[tuple[str, ...], Mapping[str, Batch]]:
        """The batches of the first step, for each distinct set of updated roles."""
        return {roles: self.batches.host(1, roles) for roles in self._kinds()}

    def _open(self) -> Checkpoints:
        """Opens the checkpoints, which are closed at the end of the run, also after an error."""
        config = self.config
        run, exported = config.run, config.objective.exported
        checkpoints = Checkpoints(run.folder, keep=run.keep, exported=exported, read_only=self._dry)
        self.opened.push(functools.partial(_close, checkpoints))
        return checkpoints

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Settings and data that the checkpoints belong to (see `run_folder.identity`).

        This may read all of the data, so everything that is quick to check is checked before. Of several processes,
        only the first reads a folder of latents; the others must have files with the same names, sizes and samples of
        the content. Other data must have the same fingerprint in all processes.
        """
        source = self.source
        if isinstance(source, LatentFolder):
            check_same("data", lambda: source.listing)
        agreed = broadcast_value("fingerprint", lambda: source.fingerprint)
        if not isinstance(source, LatentFolder):
            check_same("data", lambda: agreed if is_first_process() else source.fingerprint)
        return identity(self.config, fingerprint=agreed)

    def _check_step(self) -> None:
        """Traces each step, which checks shapes, tiles and backends before anything is computed or written."""
        run, objective = self.config.run, self.objective
        if run.sample_every:
            components = self.config.data.components
            self.pictures = pictures(self.source, components, every=run.sample_every, load=not self._dry)
        for roles in self._kinds():
            if not roles or not set(roles) <= set(objective.settings.training):
                raise ValueError(f"due says {roles}; it must name roles that train: {objective.settings.training}")
            with self._naming_role_of_attention(), user_input():
                # with the arguments of the actual step, which then need not be traced again
                batches = self.batches.host(1, roles)
                self._check_texts(batches[roles[0]].text)
                shapes = self.placement.shapes(self.networks.template, batches)
                self.step_fn.eval_shape(*shapes, due=roles)

    def _check_texts(self, of_data: np.ndarray) -> None:
        """Checks that text embeddings have the networks' width, and no more rows than they support."""
        data = self.config.data
        whose = (
            "the data" if data.precomputed is None else f"{'prompts' if data.prompts else 'latents'} {data.precomputed}"
        )
        for what, text in {whose: of_data, **self.objective.texts()}.items():
            rows, width = text.shape[-2:]
            for role, network in self.networks.configs.items():
                wanted, most = (getattr(network, name, None) for name in ("text_dim", "text_len"))
                if wanted is not None and width != wanted:
                    raise UserError(
                        f"{what} has text of width {width}, but the {role} takes {wanted}; encode it with the text "
                        f"encoder that the network was trained with"
                    )
                if most is not None and rows > most:
                    raise UserError(
                        f"{what} has text of {rows} rows, but the {role} takes at most {most}; encode it with --rows "
                        f"{most}"
                    )

    @contextlib.contextmanager
    def _naming_role_of_attention(self) -> Iterator[None]:
        """Adds the role to errors of a network's attention settings."""
        try:
            yield
        except UserError as error:
            for name, network in self.networks.configs.items():
                if str(error) in _attention_errors(network, self.source.latent_shape):
                    with self.config.naming_role(name):
                        raise
            raise

    def _kinds(self) -> list[tuple[str, ...]]:
        """The distinct sets of roles that steps update."""
        steps = range(1, min(self.config.run.steps, _EXAMINED) + 1)
        return list(dict.fromkeys(map(self.objective.due, steps)))

    def plan(self) -> Plan:
        """Plans the run."""
        return make_plan(
            self.config,
            objective=self.objective,
            networks=self.networks,
            placement=self.placement,
            step_fn=self.step_fn,
            batches=self._first_batches(),
            remat=self.programs.remat,
            gathering=self.programs.gathering,
            steps=self.programs.steps,
            done=self.previous.steps()[-1] if self.previous and self.previous.steps() else 0,
            log=read_log(self.config.run.folder) if self.previous else (),
        )

    def begin(self) -> tuple[TrainState, list[str]]:
        """The initial or restored state, and notes to print about it."""
        run, restored = self.config.run, None
        remat, gathering = self.programs.remat, self.programs.gathering
        notes = [] if remat is None else [str(remat)]
        notes += [] if gathering is None or gathering.ahead else [f"note: {gathering}"]
        if self.previous and self.previous.steps():
            template = self.networks.frozen()
            digests = self.networks.digests(template)
            restored = self.previous.restore(template, check=self._compare(notes, digests), note=notes.append)
        if run.resume:
            notes.append(
                f"resuming {run.folder} at step {int(restored.step)}"
                if restored is not None
                else f"nothing to resume in {run.folder}"
            )
        if restored is not None:
            return restored, notes
        state = self.networks.start()
        wait_for_all("start")  # reading takes different times, and collectives on CPUs time out after half a minute
        self.networks.check_finite(state)
        return state, notes

    def _compare(
        self, notes: list[str], digests: Mapping[str, str] | None = None
    ) -> Callable[[dict[str, Any], int], None]:
        def check(saved: dict[str, Any], step: int) -> None:
            wanted = {**self.identity, **(digests or {})}
            notes.extend(compare_identity(saved, wanted, step=step, folder=self.config.run.folder))

        return check

    def train(
        self,
        state: TrainState,
        notes: list[str],
        *,
        quiet: bool | None,
        after_step: Callable[[int, TrainState], None] | None,
    ) -> TrainResult:
        """Opens the files of the run folder, and trains."""
        config, run, start = self.config, self.config.run, int(state.step)
        resumed = bool(self.previous and self.previous.steps())
        run_in_first("folder", self._check_folder)
        run_in_first("settings", lambda: write_config(config, latents=self.source.latent_shape[:3]))
        check_shared(run.folder, option="folder")
        if is_first_process() and isinstance(self.source, LatentFolder):
            self.source.keep_digests()
        checkpoints = self.previous or self._open()
        several = len(config.objective.roles) > 1
        failure = Failure(config, checkpoints)
        with (
            self._log(start if resumed else -1, checkpoints) as log,
            Progress(run.steps, start=start, quiet=quiet if is_first_process() else True) as progress,
            StopRequest() as stop,
        ):
            for note in notes if is_first_process() else []:
                progress.note(note)
            progress.header(self._header())
            watch = Watch(self.objective.checks() if is_first_process() else ())
            if resumed and is_first_process():
                watch.replay(read_log(run.folder))
            metrics = MetricsLog(
                log, progress, every=run.log_every, total=run.steps, prefix=several, failure=failure, watch=watch
            )
            evaluate = Evaluate(self.measure, log, progress, run=run, prefix=several)
            save = Save(checkpoints, self.identity | self.networks.digests(state), run=run, failure=failure)
            if not resumed:
                if run.init_from is not None:
                    evaluate(0, state)  # the held-out loss before any training
                # a first checkpoint, so that there always is one and a full disk is noticed at once
                save(0, state)
                checkpoints.wait()
            # saving comes last, so that the log is complete up to the step of a checkpoint
            hooks: list[Hook] = [evaluate, *self._samples(), *self._times(log), save]
            trainer = Trainer(
                state, self.step_fn, objective=self.objective, batches=self.batches, metrics=metrics, hooks=hooks,
                save=save, run=run,
            )  # fmt: skip
            state = trainer.train(stop, after_step)
            if evaluate.last is None:
                evaluate.measured(state)
            checkpoints.wait()
        return TrainResult(
            state=state,
            graphs=self.networks.graphs,
            held_out=evaluate.last or {},
            exported=config.objective.exported,
            folder=run.folder,
        )

    def _check_folder(self) -> None:
        folder = self.config.run.folder
        if self.previous is None and (folder / FOLDER_NAME).exists():
            raise UserError(f"folder {folder} was used by another run meanwhile; try again with --resume")

    def _log(self, step: int, checkpoints: Checkpoints) -> RunLog:
        """The log of the run, which only the first process writes."""
        folder = self.config.run.folder
        if not is_first_process():
            return NoLog(folder)
        return RunLog(folder, step=step, kept=checkpoints.kept, sinks=open_sinks(self.config))

    def _samples(self) -> list[Sample]:
        run, role = self.config.run, self.config.objective.exported
        if self.pictures is None:
            return []
        graph = self.networks.graphs[role]
        samplers = {
            label: make_sampler(graph, sampler, mesh=self.placement.mesh)
            for label, sampler in self.objective.samplers().items()
        }
        folder, every = run.folder / "samples", run.sample_every
        return [Sample(samplers, self.source, pictures=self.pictures, role=role, folder=folder, every=every)]

    def _times(self, log: RunLog) -> list[Hook]:
        if not self.config.run.times_every:
            return []
        return [
            PartTimes(
                self.objective,
                self.networks.graphs,
                self.networks.trainings,
                batches=self.batches,
                log=log,
                every=self.config.run.times_every,
                prefix=len(self.config.objective.roles) > 1,
                shardings=self.placement.shardings(self.networks.template),
            )
        ]

    def _header(self) -> list[str]:
        with user_input():
            lines = run_header(
                self.config,
                self.networks.template,
                latent_shape=self.source.latent_shape,
                held_out=self.source.held_out,
                networks=self.networks.configs,
                devices=list(self.placement.mesh.devices.flat),
            )
        return lines + self.networks.notes
