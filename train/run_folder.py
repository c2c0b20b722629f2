"""The run folder: its files, its settings, and the identity of a run that its checkpoints store.

config.json                the settings, as given
log.jsonl                  one JSON object per line: step, loss, gradient norm, held-out loss, ...
tensorboard/               the same for TensorBoard
checkpoints/STEP/          the newest few checkpoints, see `monarchrt.train.checkpointing`
unreadable_checkpoints/    corrupt checkpoints, moved here when a run was resumed
samples/                   videos sampled during training
data.json                  digests of the files of latents, so that resuming reads only those that changed
log_dropped.jsonl          log lines after the checkpoint from which a run was resumed
wandb.json                 with --wandb: the id of the run there
"""

import dataclasses
import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from monarchrt.models.attention.notation import parse
from monarchrt.models.attention.registry import SHORT
from monarchrt.models.errors import UserError, report_full_disk
from monarchrt.models.files import decoded, is_litter
from monarchrt.models.generate.runs import CHECKPOINTS_NAME, CONFIG_NAME, GENERATION
from monarchrt.train.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    remat_kind,
    to_dict,
)
from monarchrt.train.logs import LOG_NAME, TENSORBOARD_NAME, read_log
from monarchrt.train.objectives.registry import settings_class

DIGESTS_NAME = "data.json"
SET_ASIDE_NAME = "unreadable_checkpoints"
SAMPLES_NAME = "samples"
_UNFINISHED = "config.part"
_FILES_OF_A_RUN = {CONFIG_NAME, _UNFINISHED, LOG_NAME, CHECKPOINTS_NAME, SET_ASIDE_NAME, SAMPLES_NAME, TENSORBOARD_NAME}
_NOT_REPRODUCIBLE = {
    SET_ASIDE_NAME: "checkpoints of a run that were set aside as unreadable",
    SAMPLES_NAME: "samples of a run",
}

# may change when a run is resumed, without a note
_FREE = {"folder", "resume", "init_from", "steps", "keep", "log_every", "eval_every", "eval_windows", "eval_timesteps",
         "sample_every", "times_every", "checkpoint_every", "wandb", "video", "latents", "prompts", "components",
         "text_cache", "coordinator", "processes", "process", "prefetch"}  # fmt: skip
# may change when a run is resumed; a note is printed, since losses will differ from those of the uninterrupted run
_NOTED = {"implementation", "keep_intermediates", "remat", "sharding", "mesh", "learning_rate", "beta1", "beta2", "eps",
          "weight_decay", "clip_norm", "warmup", "schedule", "decay_steps", "accumulation", "ema_start"}  # fmt: skip

# settings that older checkpoints lack, with the values that they had
_LATER = {"objective": "flow", "trainable": ["all"]}
PARAMETERS = "parameters"  # name of the digest of a network that checkpoints do not contain


def claim_folder(config: TrainConfig) -> None:
    """Checks that a run can use its folder without losing anything in it; changes nothing.

    Args:
        config: The settings of the run.

    Raises:
        UserError: If the path is a file, the folder has other files, or a run while `resume` is not set, or results of
            a run whose checkpoints are missing.
    """
    folder = config.run.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"folder {folder} is a file; give the path of a new or empty folder")
    entries = folder.iterdir() if folder.is_dir() else ()
    names = {path.name for path in entries if path.name == _UNFINISHED or not is_litter(path)}
    if not names:
        return
    if not names & _FILES_OF_A_RUN:
        raise UserError(f"folder {folder} holds other files, and no run; give the path of a new or empty folder")
    resumable = any(path.name.isdigit() for path in _entries(folder / CHECKPOINTS_NAME))
    left = None if resumable else _left_behind(folder, names)
    if left:
        raise UserError(
            f"folder {folder} holds {left}, and no checkpoint to continue from; nothing was changed: put its "
            f"{CHECKPOINTS_NAME}/ back and give --resume, or give another --folder"
        )
    if not config.run.resume:
        raise UserError(f"folder {folder} already holds a run; continue it with --resume, or give another --folder")
    if not resumable:
        _check_same_settings(config, read_config(folder))


def _left_behind(folder: Path, names: set[str]) -> str | None:
    """Results of a run that cannot be reproduced without its checkpoints, in words; None if there are none."""
    steps = (
        [step for record in read_log(folder) if isinstance(step := record.get("step"), int)]
        if LOG_NAME in names
        else []
    )
    if max(steps, default=0) > 0:
        return f"the log of a run up to step {max(steps)}"
    for name, words in _NOT_REPRODUCIBLE.items():
        if _entries(folder / name):
            return words
    if LOG_NAME not in names and _entries(folder / TENSORBOARD_NAME):  # a run creates the log first
        return "the TensorBoard files of a run whose log is gone"
    return None


def _check_same_settings(config: TrainConfig, stored: TrainConfig | None) -> None:
    """Checks that a run which was stopped before its first checkpoint is started again with the same settings.

    Raises:
        UserError: If a setting that must not change when resuming differs; names both values.
    """
    if stored is None:
        return
    here, there = identity(config, fingerprint=""), identity(stored, fingerprint="")
    for name, value in there.items():
        if name.rpartition(".")[2] not in _NOTED and value != here.get(name):
            raise UserError(
                f"folder {config.run.folder} holds the settings of another run, which had no checkpoint yet: {name} "
                f"is {value} there and {here.get(name)} here; use that value, or give another --folder"
            )


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


class FolderLock:
    """A lock of a run folder, since two runs would delete each other's checkpoints. It ends with the process at latest.

    Args:
        folder: The run folder; `take` creates it if needed.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._descriptor: int | None = None

    def take(self) -> None:
        """Creates the folder and locks it, unless this lock is already held.

        Raises:
            UserError: If another process holds the lock, or the folder cannot be created.
        """
        if self._descriptor is not None:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._folder, os.O_RDONLY)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"folder {self._folder} is in use by another run; wait for it, or give another --folder"
            ) from error
        except OSError as error:
            if self._descriptor is None:  # otherwise the file system does not support locks
                raise UserError(f"folder {self._folder} cannot be written to: {error.strerror}") from error

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def write_config(config: TrainConfig, *, latents: Sequence[int] | None = None) -> None:
    """Creates the run folder and writes config.json, atomically.

    Args:
        config: The settings.
        latents: Shape (F, h, w) of the latents of the data, which commands that sample the network use.

    Raises:
        DiskFullError: If the disk is full.
        UserError: If the folder cannot be created.
    """
    folder = config.run.folder
    path = folder / CONFIG_NAME
    # options of this start that are not stored
    called = {"resume": False, "coordinator": None, "processes": None, "process": None}
    fresh = dataclasses.replace(config, run=dataclasses.replace(config.run, **called))
    values = to_dict(fresh) | {"model": fresh.model.stored()}
    generation = config.objective.generation
    values[GENERATION] = dataclasses.asdict(generation) | {"latents": None if latents is None else list(latents)}
    for name, role in fresh.roles.items():
        values["roles"][name]["model"] = role.model.stored()
    try:
        with report_full_disk(path):
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = folder / _UNFINISHED
            unfinished.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written to: {error.strerror}") from error


def read_config(folder: Path) -> TrainConfig | None:
    """Reads config.json of a run folder; returns None if there is none.

    Raises:
        UserError: If the file cannot be read or is damaged.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        values = json.loads(decoded(path.read_bytes(), name=str(path)))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:  # invalid JSON, numbers with thousands of digits, a million brackets
        raise UserError(f"{path} is damaged ({error}); repair it or give another run folder") from error
    if isinstance(values, dict):
        values.pop(GENERATION, None)  # follows from the objective
    try:
        return from_dict(TrainConfig, values)
    except UserError as error:
        raise UserError(f"{path} is not the config.json of a run: {error}") from error


def identity(config: TrainConfig, *, fingerprint: str) -> dict[str, Any]:
    """The settings and data that a checkpoint belongs to.

    Args:
        config: The settings of the run.
        fingerprint: Digest of the data, from the source; paths of the data are not part of the identity.

    Returns:
        JSON values by name of the setting, ROLE.name for networks other than the exported one.
    """
    flat: dict[str, Any] = {}
    for part in ("model", "data", "objective", "optimizer", "run"):
        flat |= {name: value for name, value in to_dict(getattr(config, part)).items() if name not in _FREE}
    flat |= _attention(config.model)
    flat["objective"] = flat.pop("name")
    for role, values in to_dict(config).get("roles", {}).items():
        values = {**values.pop("model"), **(values.pop("optimizer") or {}), **values}
        values |= _attention(config.roles[role].model)
        flat |= {f"{role}.{name}": value for name, value in values.items() if name not in _FREE}
    for role in config.objective.training:
        settings = config.trained(role)
        if settings.schedule != "constant" and settings.decay_steps is None:
            flat["decay_steps" if role == config.objective.exported else f"{role}.decay_steps"] = config.run.steps
    return flat | {"data": fingerprint}


def _attention(model: ModelConfig) -> dict[str, Any]:
    """An attention in its notation, split into what must not change when resuming, and `implementation`, which may."""
    if model.attention == SHORT:
        return {}
    setting = parse(model.attention)
    how = str(setting) if setting != setting.stored() else None
    return {"attention": str(setting.stored()), "implementation": how}


def _as_written_now(name: str, value: Any) -> Any:
    """A stored value in the form of this version: texts of earlier versions may denote the same attention."""
    setting = name.rpartition(".")[2]
    if setting == "remat":
        return remat_kind(value)
    if setting not in ("attention", "implementation") or not isinstance(value, str):
        return value
    try:
        return str(parse(value))
    except ValueError:  # the name of an implementation, or a kind that no longer exists
        return value


def _defaults(objective: str) -> dict[str, Any]:
    """Defaults by name of the setting, for settings that an older checkpoint lacks."""
    parts = (DataConfig(), ModelConfig(), OptimizerConfig(), RunConfig(), settings_class(objective)())
    return {name: value for part in parts for name, value in to_dict(part).items()} | _LATER


def compare_identity(saved: dict[str, Any], wanted: dict[str, Any], *, step: int, folder: Path) -> list[str]:
    """Checks that a run can be resumed from a checkpoint.

    Args:
        saved: Identity in the checkpoint.
        wanted: Identity of the run.
        step: Step of the checkpoint, for the message.
        folder: Run folder, for the message.

    Returns:
        Notes on differing settings that may change, such as those of the optimizer.

    Raises:
        UserError: If model, attention, data, batch, seed or objective differ; names both values.

    Examples:
        >>> saved, wanted = {"tile": [1, 2, 2]}, {"tile": [1, 4, 4]}
        >>> compare_identity(saved, wanted, step=7, folder=Path("run"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        monarchrt.models.errors.UserError: cannot resume: tile is [1, 4, 4], but the checkpoint of step 7 in run has...
    """
    notes = []
    defaults = _defaults(wanted.get("objective", _LATER["objective"]))
    older = {name: defaults[setting] for name in wanted if (setting := name.rpartition(".")[2]) in defaults}
    saved = older | {name: _as_written_now(name, value) for name, value in saved.items()}
    for name in dict.fromkeys([*saved, *wanted]):
        old, new = saved.get(name), wanted.get(name)
        role, dot, setting = name.rpartition(".")
        if setting == "ema_decay" and (old is None) == (new is None):
            kind = "noted"
        else:
            kind = "noted" if setting in _NOTED else "fixed"
        if old == new:
            continue
        if dot and setting == PARAMETERS:
            if new is None:  # the parameters have not been read yet
                continue
            raise UserError(
                f"cannot resume: the parameters of the {role} are not those that the run in {folder} started with; "
                f"give the original --{role}.init-from, or another --folder"
            )
        if kind == "noted":
            notes.append(f"note: {name} changes from {old} to {new}")
            continue
        if name == "data":
            old, new = f"other frames or latents (SHA-256 {str(old)[:12]})", f"SHA-256 {str(new)[:12]}"
        raise UserError(
            f"cannot resume: {name} is {new}, but the checkpoint of step {step} in {folder} has {old}; "
            f"use that value, or another --folder"
        )
    return notes
