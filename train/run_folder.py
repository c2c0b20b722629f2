"""A run folder and what its files belong to.

config.json                the settings, as given
log.jsonl                  one JSON object per line: step, loss, gradient norm, held-out loss, ...
tensorboard/               the same for TensorBoard
checkpoints/STEP/          the newest few, see `monarchrt.train.checkpointing`
unreadable_checkpoints/    corrupt ones that a resume set aside
samples/                   videos made while training
data.json                  digests of the files of latents, so that a resume reads only those that changed
"""

import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from monarchrt.models.errors import UserError, report_full_disk
from monarchrt.train.config import TrainConfig, from_dict, to_dict

CONFIG_NAME = "config.json"
DIGESTS_NAME = "data.json"
_UNFINISHED = "config.part"

# may change on resume without a word
_FREE = {"folder", "resume", "init_from", "steps", "keep", "log_every", "eval_every", "eval_windows", "eval_timesteps",
         "sample_every", "checkpoint_every", "wandb", "video", "latents"}  # fmt: skip
# may change on resume; the change is noted, as losses will differ from those of the uninterrupted run
_NOTED = {"implementation", "keep_intermediates", "remat", "sharding", "learning_rate", "beta1", "beta2", "eps",
          "weight_decay", "clip_norm", "warmup", "schedule", "decay_steps", "accumulation", "ema_start"}  # fmt: skip


def claim_folder(config: TrainConfig) -> None:
    """Checks that a run may use its folder; touches nothing.

    Args:
        config: The settings of the run.

    Raises:
        UserError: If the folder holds something and `resume` is not set, or is not a folder.
    """
    folder = config.run.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"folder {folder} is a file; give the path of a new or empty folder")
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if config.run.resume or not names:
        return
    if names & {CONFIG_NAME, _UNFINISHED, "checkpoints"}:
        raise UserError(f"folder {folder} already holds a run; go on with it with --resume, or give another --folder")
    raise UserError(f"folder {folder} holds other files, and no run; give the path of a new or empty folder")


class FolderLock:
    """Keeps a run folder to one process: two would delete each other's checkpoints. Ends with the process, too.

    Args:
        folder: The run folder; made by `take`, if it is not there.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._descriptor: int | None = None

    def take(self) -> None:
        """Makes the folder and takes it, unless it is taken already.

        Raises:
            UserError: If another process has it, or it cannot be made.
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
            if self._descriptor is None:  # else a file system without locks
                raise UserError(f"folder {self._folder} cannot be written to: {error.strerror}") from error

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def write_config(config: TrainConfig) -> None:
    """Makes the run folder and writes config.json, at once or not at all.

    Raises:
        DiskFullError: If there is no room.
        UserError: If the folder cannot be made.
    """
    folder = config.run.folder
    path = folder / CONFIG_NAME
    # how it was called this time is no setting of the run
    fresh = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=False))
    try:
        with report_full_disk(path):
            folder.mkdir(parents=True, exist_ok=True)
            unfinished = folder / _UNFINISHED
            unfinished.write_text(json.dumps(to_dict(fresh), indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be written to: {error.strerror}") from error


def read_config(folder: Path) -> TrainConfig | None:
    """Reads config.json of a run folder; None if there is none.

    Raises:
        UserError: If it is damaged.
    """
    path = folder / CONFIG_NAME
    if not path.is_file():
        return None
    try:
        return from_dict(TrainConfig, json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); mend it or give another run folder") from error


def identity(config: TrainConfig, *, fingerprint: str) -> dict[str, Any]:
    """What a checkpoint belongs to, as flat JSON values under the names of the settings.

    Args:
        config: The settings of the run.
        fingerprint: Content of the data, from the source.

    Returns:
        Name -> value. Where the data lies is left out; what it is counts.
    """
    flat: dict[str, Any] = {}
    for part in ("model", "data", "objective", "optimizer", "run"):
        flat |= {name: value for name, value in to_dict(getattr(config, part)).items() if name not in _FREE}
    if config.optimizer.schedule != "constant" and config.optimizer.decay_steps is None:
        flat["decay_steps"] = config.run.steps
    return flat | {"data": fingerprint}


def compare_identity(saved: dict[str, Any], wanted: dict[str, Any], *, step: int, folder: Path) -> list[str]:
    """Checks that a checkpoint fits the run that wants to go on from it.

    Args:
        saved: Identity in the checkpoint.
        wanted: Identity of the run.
        step: Step of the checkpoint, for the message.
        folder: Run folder, for the message.

    Returns:
        Notes on optimizer settings that differ, which is allowed.

    Raises:
        UserError: If model, attention, data, batch, seed or objective differ; names both values.

    Example:
        >>> saved, wanted = {"tile": [1, 2, 2]}, {"tile": [1, 4, 4]}
        >>> compare_identity(saved, wanted, step=7, folder=Path("run"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        monarchrt.models.errors.UserError: cannot resume: tile is [1, 4, 4], but the checkpoint of step 7 in run has...
    """
    notes = []
    for name in dict.fromkeys([*saved, *wanted]):
        old, new = saved.get(name), wanted.get(name)
        if name == "ema_decay" and (old is None) == (new is None):
            kind = "noted"
        else:
            kind = "noted" if name in _NOTED else "fixed"
        if old == new:
            continue
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
