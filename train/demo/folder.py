"""The folder of a demo: checks whether a demo can start or resume there, and its stored settings. Does not import JAX.

demo.json                  the settings
dense/ control/ monarch/   the run folders of the three trainings; with --distill those of `few_steps.distillations`
*.json, *.png, *.mp4       the results
"""

import dataclasses
import json
import os
from pathlib import Path

from monarchrt.models.errors import UserError, report_full_disk
from monarchrt.models.files import decoded, is_litter
from monarchrt.train.config import TrainConfig, from_dict, to_dict
from monarchrt.train.demo.config import DemoConfig, dense_run, further_runs
from monarchrt.train.demo.few_steps import distillations
from monarchrt.train.run_folder import CONFIG_NAME, claim_folder, read_config

SETTINGS_NAME = "demo.json"
# must not change when resuming, since the runs depend on each other; the clip is compared by its content
_FIXED = ("seed", "steps", "finetune_steps", "height", "width", "tile", "distill", "distill_steps", "clips")


def claim_demo(config: DemoConfig) -> None:
    """Checks that a demo can use its folder without losing anything in it; changes nothing.

    Raises:
        UserError: If the path is a file, the folder has other files, or a demo that cannot be resumed with these
            settings.
    """
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"folder {folder} is a file; give the path of a new folder")
    names = {path.name for path in (folder.iterdir() if folder.is_dir() else ()) if not is_litter(path)}
    if CONFIG_NAME in names:
        raise UserError(f"folder {folder} is that of a single run, not of a demo; give the folder above, or a new one")
    _check_kind(config, exists=SETTINGS_NAME in names)
    further = distillations(config).values() if config.distill else further_runs(config)
    runs = {run.run.folder.name: run for run in (dense_run(config), *further)}
    known = names & {SETTINGS_NAME, *runs}
    if config.resume and not known:
        what = "other files, and no demo" if names else "no demo"
        raise UserError(
            f"folder {folder} holds {what} to continue; give the folder of one, or start one without --resume"
        )
    if not config.resume and names:
        advice = "give --resume to continue it, or another --folder" if known else "give another --folder"
        raise UserError(f"folder {folder} exists already; {advice}")
    for name, run in runs.items():
        _check_objective(name, run)
        claim_folder(run)
        if names & {"results.json", "comparison.mp4", "distillation.json"} and not _has_checkpoint(run.run.folder):
            # demos of versions without a control get one, and their results are written again
            if name == "control":
                continue
            raise UserError(
                f"folder {folder} holds the results of a demo whose run {name}/ is gone; nothing was changed: put it "
                f"back, or give another --folder"
            )
    stored = read_settings(folder)
    for field in _FIXED if stored is not None else ():
        there, here = getattr(stored, field), getattr(config, field)
        if there != here:
            raise UserError(
                f"cannot resume: {field} is {here}, but the demo in {folder} was started with {there}; use that value, "
                f"or another --folder"
            )


def _check_kind(config: DemoConfig, *, exists: bool) -> None:
    """Raises UserError if the folder has a demo with `distill` and this one is without, or the other way round."""
    try:
        stored = read_settings(config.folder) if exists else None
    except UserError:
        if config.resume:
            raise
        return  # the settings are damaged; later checks refuse the folder
    if stored is None or stored.distill == config.distill:
        return
    there, here = (f"with{'' if distils else 'out'} --distill" for distils in (stored.distill, config.distill))
    raise UserError(f"folder {config.folder} is that of a demo {there}, and this one is {here}; give another --folder")


def _check_objective(name: str, run: TrainConfig) -> None:
    """Raises UserError if the run was started by an earlier version with other settings of the objective."""
    stored = read_config(run.run.folder) if run.run.folder.is_dir() else None
    if stored is None or stored.objective == run.objective:
        return
    there, here = to_dict(stored.objective), to_dict(run.objective)
    changed = ", ".join(f"{key} {there.get(key)}, now {here[key]}" for key in here if here[key] != there.get(key))
    raise UserError(
        f"cannot resume: {name}/ of the demo in {run.run.folder.parent} was started by another version ({changed}); "
        f"give another --folder"
    )


def _has_checkpoint(folder: Path) -> bool:
    checkpoints = folder / "checkpoints"
    return checkpoints.is_dir() and any(path.name.isdigit() for path in checkpoints.iterdir())


def read_settings(folder: Path) -> DemoConfig | None:
    """Reads the settings with which a demo was started; returns None if the folder has none.

    Raises:
        UserError: If the file cannot be read or is damaged.
    """
    path = folder / SETTINGS_NAME
    try:
        values = json.loads(decoded(path.read_bytes(), name=str(path)))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); repair it, or remove it and give all settings") from error
    try:
        config = from_dict(DemoConfig, values)
    except UserError as error:
        raise UserError(f"{path} is not that of a demo: {error}") from error
    return dataclasses.replace(config, folder=folder)


def write_settings(config: DemoConfig) -> None:
    """Creates the folder and writes the settings, atomically.

    Raises:
        DiskFullError: If the disk is full.
        UserError: If the folder cannot be written to.
    """
    path = config.folder / SETTINGS_NAME
    unfinished = path.with_suffix(".part")
    try:
        with report_full_disk(path):
            config.folder.mkdir(parents=True, exist_ok=True)
            fresh = to_dict(dataclasses.replace(config, resume=False))
            unfinished.write_text(json.dumps(fresh, indent=2) + "\n", encoding="utf-8")
            os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"folder {config.folder} cannot be written to: {error.strerror}") from error
