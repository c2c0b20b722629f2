"""Settings in a run folder of `monarchrt train`. Does not import JAX.

config.json          data, network with its attention, and sampling
checkpoints/STEP/    `about`, the description of the arrays, and `state`, the arrays
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from monarchrt.models.attention.notation import with_options
from monarchrt.models.attention.registry import SHORT
from monarchrt.models.checkpoints.json_files import read_json
from monarchrt.models.errors import UserError, printable
from monarchrt.models.generate.config import revived

CONFIG_NAME = "config.json"
LOG_NAME = "log.jsonl"
CHECKPOINTS_NAME = "checkpoints"
ABOUT = "about/metadata"  # description of a checkpoint, with a checksum of each array
GENERATION = "generation"  # entry in config.json with settings for sampling, which do not depend on the objective
# options of older files besides the attention's kind, with their defaults
_BESIDE = {"tile": None, "blocks": "fh,w", "num_iters": 1, "implementation": None, "keep_intermediates": False}


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Sampling defaults of a trained network for `monarchrt generate`.

    Attributes:
        shift: Shift of the noise levels.
        level_per_frame: Whether it was trained with a noise level per frame, and can continue a video in windows.
        sampler: Name of the sampler, as in the option.
        steps: Number of steps, or for few-step samplers the list that it was distilled at, such as (1000, 757, 522).
        latents: Shape (F, h, w) of a training sample; None in files of older versions.
        window: Attention window of a causal network in latent frames, including the block; None: all frames.
        sink_frames: First latent frames, which the window never dropped.
    """

    shift: float = 5.0
    level_per_frame: bool = False
    sampler: str = "euler"
    steps: int | tuple[int, ...] = 20
    latents: tuple[int, int, int] | None = None
    window: int | None = None
    sink_frames: int = 0


@dataclass(frozen=True, kw_only=True)
class RunData:
    """Training data of a run; the fields are those of `monarchrt.train.config.DataConfig`.

    Attributes:
        video: A video file or a folder of videos.
        latents: Folder of latents.
        prompts: File of prompts, without clips.
        frames: Frames of a window.
        height: Height in pixels.
        width: Width in pixels.
        fps: Frame rate at which the video was read.
        stride: Every `stride`-th frame was used.
        patch: Patch size of the pixel transform.
        whitening: Whitening of the pixel transform.
        held_out: Fraction of held-out data.
        gap: Frames left out between training and held-out parts.
        crop: Factor by which the video was read larger, for random crops.
    """

    video: Path | None = None
    latents: Path | None = None
    prompts: Path | None = None
    frames: int = 9
    height: int = 64
    width: int = 112
    fps: float = 0.0
    stride: int = 1
    patch: int = 8
    whitening: float = 0.5
    held_out: float = 0.2
    gap: int = 4
    crop: float = 1.0

    @property
    def precomputed(self) -> Path | None:
        """The data if it is not pixels: the folder of latents, or the file of prompts."""
        return self.latents or self.prompts


class RunSettings(NamedTuple):
    """The settings of a run that concern its network.

    Attributes:
        path: The run folder.
        preset: Preset of the network.
        overrides: Fields that differ from the preset.
        attention: Attention, in its notation.
        data: Training data.
        generation: Sampling defaults.
        lora: Whether its checkpoints hold a LoRA instead of the network.
        lora_alpha: Alpha of the LoRA; None: the rank.
    """

    path: Path
    preset: str
    overrides: dict[str, Any]
    attention: str
    data: RunData
    generation: Generation
    lora: bool = False
    lora_alpha: float | None = None


def is_run(path: Path) -> bool:
    """Whether a path is a run folder with training progress.

    Examples:
        >>> is_run(Path("nowhere"))
        False
    """
    return (path / CONFIG_NAME).is_file() and (path / CHECKPOINTS_NAME).is_dir()


def identifying_files(path: Path) -> list[Path]:
    """Files that identify the weights of a run folder: the description of its newest checkpoint, with checksums."""
    return [path / CHECKPOINTS_NAME / str(step) / ABOUT for step in checkpoint_steps(path)[-1:]]


def is_begun(path: Path) -> bool:
    """Whether a folder holds a run or remains of one: a run's settings, log or checkpoints."""
    if is_run(path) or (path / LOG_NAME).is_file() or checkpoint_steps(path):
        return True
    try:
        return {"data", "model", "run"} <= read_json(path / CONFIG_NAME).keys()
    except ValueError:
        return False


def find_run(path: Path) -> RunSettings | None:
    """The settings of a run folder; None if the path is not one.

    Args:
        path: Any path, existing or not.

    Returns:
        The settings.

    Raises:
        UserError: If its settings are damaged, it has no training progress, or it contains run folders instead of
            being one; names them.
    """
    if is_run(path):
        return read_run(path)
    if not path.is_dir():
        return None
    if runs := [child for child in sorted(path.iterdir()) if is_run(child)]:
        raise UserError(f"checkpoint {path} holds runs; give one of them: {', '.join(map(str, runs))}")
    if is_begun(path):
        lacks = " and ".join(
            what
            for what, there in (
                (CONFIG_NAME, (path / CONFIG_NAME).is_file()),
                (f"{CHECKPOINTS_NAME}/", (path / CHECKPOINTS_NAME).is_dir()),
            )
            if not there
        )
        raise UserError(f"checkpoint {path} is a run folder without {lacks}; `monarchrt inspect` says what is there")
    return None


def read_run(path: Path) -> RunSettings:
    """Reads config.json of a run folder, of this or an older version.

    Raises:
        UserError: If it is damaged or not from a run.
    """
    where = path / CONFIG_NAME
    try:
        values = read_json(where)
    except ValueError as error:
        raise UserError(f"{where} is damaged ({error}); repair it or give another run folder") from error
    tables = {name: values.get(name, {}) for name in ("data", "model", "objective", "optimizer", GENERATION)}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"{where} is not that of a run: {name} is {table!a:.60}; it must be a table of settings")
    model, objective = tables["model"], tables["objective"]
    given = _with_older_settings(tables[GENERATION], objective) if GENERATION in values else _flow_defaults(objective)
    attention, overrides = model.get("attention", SHORT), model.get("overrides", [])
    if not isinstance(attention, str) or not isinstance(overrides, list) or not isinstance(model.get("preset"), str):
        raise UserError(f"{where} is not that of a run: its model has no preset, overrides and attention")
    alpha = tables["optimizer"].get("lora_alpha")
    if type(alpha) not in (int, float, type(None)):
        raise UserError(f"{where} is not that of a run: its lora_alpha is {alpha!a:.60}")
    beside = {name: model.get(name, plain) for name, plain in _BESIDE.items()}
    beside = {name: tuple(x) if isinstance(x, list) else x for name, x in beside.items() if x != _BESIDE[name]}
    return RunSettings(
        path=path,
        preset=model["preset"],
        overrides=override_values(map(str, overrides)),
        attention=with_options(attention, beside),
        data=_table(RunData, tables["data"], where),
        generation=_table(Generation, given, where),
        lora=tables["optimizer"].get("lora_rank") is not None,
        lora_alpha=None if alpha is None else float(alpha),
    )


def override_values(overrides: Iterable[str]) -> dict[str, Any]:
    """Overrides of a preset by name; values are parsed as JSON where possible, otherwise text.

    Examples:
        >>> override_values(["dim=96", "remat=dots"])
        {'dim': 96, 'remat': 'dots'}

    Raises:
        UserError: If an override has no name or no value.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not (equals and name):
            raise UserError(f"overrides has {printable(override, 80)!r}; write name=value, for example num_layers=2")
        try:
            value = json.loads(text)
            values[name] = tuple(value) if isinstance(value, list) else value
        except (ValueError, RecursionError):  # text
            values[name] = text
    return values


def _flow_defaults(objective: dict[str, Any]) -> dict[str, Any]:
    """Sampling defaults of an old run that does not record them: its objective was rectified flow."""
    shift = {"shift": objective["shift"]} if "shift" in objective else {}
    return shift | {"level_per_frame": objective.get("frames_per_level") is not None}


def _with_older_settings(generation: dict[str, Any], objective: dict[str, Any]) -> dict[str, Any]:
    """Adds settings that older runs stored only with their objective: the list of a student's steps, of which they
    stored just the number here, and the window of its roll-outs."""
    steps = objective.get("student_steps")
    same = isinstance(steps, list) and generation.get("sampler") == "few-step" and generation.get("steps") == len(steps)
    window = {name: objective[name] for name in ("window", "sink_frames") if name in objective}
    return window | generation | ({"steps": steps} if same else {})


def _table[T](kind: type[T], values: dict[str, Any], where: Path) -> T:
    """The known settings of one table of the file."""
    hints = get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    known = {name: value for name, value in values.items() if name in fields}
    return kind(**{name: revived(name, hints[name], value, where) for name, value in known.items()})


def checkpoint_steps(path: Path) -> list[int]:
    """Steps of a run folder's complete checkpoints, in ascending order.

    Examples:
        >>> checkpoint_steps(Path("nowhere"))
        []
    """
    folder = path / CHECKPOINTS_NAME
    children = folder.iterdir() if folder.is_dir() else ()
    # Orbax gives a checkpoint its number when it is complete
    return sorted(int(child.name) for child in children if child.name.isdecimal() and child.is_dir())
