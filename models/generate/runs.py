"""What a run folder of `monarchrt train` says of the network in it. Nothing here imports JAX.

config.json          settings: what it trained on, the network with its attention, how that is sampled
checkpoints/STEP/    `about`, what the arrays are, and `state`, the arrays
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
ABOUT = "about/metadata"  # of a checkpoint, what it belongs to and a checksum of each array
GENERATION = "generation"  # in config.json: how the network is sampled, for readers that know no objective
# options of older files beside the attention's kind, with what they were where nothing was said
_BESIDE = {"tile": None, "blocks": "fh,w", "num_iters": 1, "implementation": None, "keep_intermediates": False}


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How `monarchrt generate` samples a trained network where nothing else is said.

    Attributes:
        shift: Of the noise levels.
        level_per_frame: Whether it was trained with a level per frame, and can continue a video in windows.
        sampler: As its option.
        steps: Of the sampler: how many, or of few-step the list that it was distilled at, such as (1000, 757, 522).
        latents: Shape (F, h, w) of a sample that it was trained on; None: files written before do not say.
        window: Latent frames that a causal network's block reached back over, with its own; None: all.
        sink_frames: Leading ones that such a window never let go.
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
    """What a run trained on; the fields are those of `monarchrt.train.config.DataConfig`.

    Attributes:
        video: A file, or a folder of them.
        latents: A folder.
        prompts: A file of texts, without clips.
        frames: Of a window.
        height: In pixels.
        width: In pixels.
        fps: That the video was read at.
        stride: Every n-th frame.
        patch: Of the transform.
        whitening: Of the transform.
        held_out: Fraction.
        gap: Frames.
        crop: How much larger the video was read.
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
        """What is not pixels: latents, or prompts of clips that a network is yet to make."""
        return self.latents or self.prompts


class RunSettings(NamedTuple):
    """A run folder's settings, as far as its network is concerned.

    Attributes:
        path: The folder.
        preset: Name of the network's preset.
        overrides: Fields of it that differ.
        attention: In its notation.
        data: What it trained on.
        generation: How it is sampled.
        lora: Whether its checkpoints hold a LoRA of the network, and not the network.
        lora_alpha: Of the LoRA; None: the rank.
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
    """Whether a path is a run folder that has been trained in.

    Examples:
        >>> is_run(Path("nowhere"))
        False
    """
    return (path / CONFIG_NAME).is_file() and (path / CHECKPOINTS_NAME).is_dir()


def told_apart_by(path: Path) -> list[Path]:
    """Files that differ between two run folders of other weights: what the newest checkpoint says of each array."""
    return [path / CHECKPOINTS_NAME / str(step) / ABOUT for step in checkpoint_steps(path)[-1:]]


def is_begun(path: Path) -> bool:
    """Whether a folder is a run, or what is left of one: settings that are a run's, its log or its checkpoints."""
    if is_run(path) or (path / LOG_NAME).is_file() or checkpoint_steps(path):
        return True
    try:
        return {"data", "model", "run"} <= read_json(path / CONFIG_NAME).keys()
    except ValueError:
        return False


def find_run(path: Path) -> RunSettings | None:
    """The settings of a run folder; None if the path is something else.

    Args:
        path: Any path, existing or not.

    Returns:
        The settings.

    Raises:
        UserError: If its settings are damaged, if it has not been trained in, or if the folder holds run folders
            instead of being one; names them.
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
    """Reads config.json of a run folder, of this version or of one before.

    Raises:
        UserError: If it is damaged, or not that of a run.
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
    given = _as_said_since(tables[GENERATION], objective) if GENERATION in values else _of_the_flow(objective)
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
    """Overrides of a preset by name; values are read as JSON, or else taken as text.

    Examples:
        >>> override_values(["dim=96", "remat=dots"])
        {'dim': 96, 'remat': 'dots'}

    Raises:
        UserError: If one has no name or no value.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not (equals and name):
            raise UserError(f"overrides has {printable(override, 80)!r}; write name=value, for example num_layers=2")
        try:
            value = json.loads(text)
            values[name] = tuple(value) if isinstance(value, list) else value
        except (ValueError, RecursionError):  # a text
            values[name] = text
    return values


def _of_the_flow(objective: dict[str, Any]) -> dict[str, Any]:
    """How the network of a run is sampled that does not say so: there was no objective but the flow's then."""
    shift = {"shift": objective["shift"]} if "shift" in objective else {}
    return shift | {"level_per_frame": objective.get("frames_per_level") is not None}


def _as_said_since(generation: dict[str, Any], objective: dict[str, Any]) -> dict[str, Any]:
    """With what runs written before say among the settings of their objective alone: the list of a student's steps, of
    which they say here only how many there are, and the window that it rolled out with."""
    steps = objective.get("student_steps")
    same = isinstance(steps, list) and generation.get("sampler") == "few-step" and generation.get("steps") == len(steps)
    window = {name: objective[name] for name in ("window", "sink_frames") if name in objective}
    return window | generation | ({"steps": steps} if same else {})


def _table[T](kind: type[T], values: dict[str, Any], where: Path) -> T:
    """The settings of one table that are known here."""
    hints = get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    known = {name: value for name, value in values.items() if name in fields}
    return kind(**{name: revived(name, hints[name], value, where) for name, value in known.items()})


def checkpoint_steps(path: Path) -> list[int]:
    """Steps of the complete checkpoints of a run folder, oldest first.

    Examples:
        >>> checkpoint_steps(Path("nowhere"))
        []
    """
    folder = path / CHECKPOINTS_NAME
    children = folder.iterdir() if folder.is_dir() else ()
    # Orbax gives a checkpoint its number when it is complete
    return sorted(int(child.name) for child in children if child.name.isdecimal() and child.is_dir())
