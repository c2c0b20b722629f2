"""VBench (arXiv:2311.17982): generates the videos that its tools evaluate, and computes its scores from their results.

Its networks run in a separate environment, see docs/evaluate.md. JAX is imported only when a video is generated.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from monarchrt.models.errors import UserError
from monarchrt.models.files import decoded
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.train.resuming import check_unchanged, read_stored
from monarchrt.train.studies.results import progress, write_json

SAMPLES = 5  # videos per prompt
STILL = 25  # videos per prompt of temporal flickering, from which VBench's static filter selects
SETTINGS = "settings.json"  # file in the folder of the videos
STILL_DIMENSION = "temporal_flickering"

# dimension -> lowest and highest value, between which scores are scaled, and weight
QUALITY = {
    "subject_consistency": (0.1462, 1.0, 1.0),
    "background_consistency": (0.2615, 1.0, 1.0),
    "temporal_flickering": (0.6293, 1.0, 1.0),
    "motion_smoothness": (0.706, 0.9975, 1.0),
    "aesthetic_quality": (0.0, 1.0, 1.0),
    "imaging_quality": (0.0, 1.0, 1.0),
    "dynamic_degree": (0.0, 1.0, 0.5),
}
SEMANTIC = {
    "object_class": (0.0, 1.0, 1.0),
    "multiple_objects": (0.0, 1.0, 1.0),
    "human_action": (0.0, 1.0, 1.0),
    "color": (0.0, 1.0, 1.0),
    "spatial_relationship": (0.0, 1.0, 1.0),
    "scene": (0.0, 0.8222, 1.0),
    "appearance_style": (0.0009, 0.2855, 1.0),
    "temporal_style": (0.0, 0.364, 1.0),
    "overall_consistency": (0.0, 0.364, 1.0),
}
DIMENSIONS = (*QUALITY, *SEMANTIC)


@dataclass(frozen=True, kw_only=True)
class VBenchConfig:
    """Write the videos that VBench evaluates."""

    full_info: Path | None = None
    """VBench_full_info.json of the package vbench, or a list of the same form."""

    checkpoint: str | None = None
    """A Wan checkpoint, as for `monarchrt generate`."""

    attention: str | None = None
    """Attention setting, as for `monarchrt generate`. Default: that stored with the weights."""

    components: Path | None = None
    """Folder or Hugging Face repository with VAE, text encoder and tokenizer, as for `monarchrt generate`."""

    dimensions: tuple[str, ...] = ()
    """Dimensions whose prompts to use. Default: all."""

    frames: int | None = None
    """Frames of the videos. Default: that of `monarchrt generate`."""

    steps: int | None = None
    """Steps of the sampler. Default: that of `monarchrt generate`."""

    seed: int = 0
    """Seed of the first video of each prompt; further videos use the following seeds."""

    still: bool = False
    """Write 25 videos instead of five for the prompts of temporal flickering, for VBench's static filter."""

    part: tuple[int, int] = (0, 1)
    """`--part 2 8` processes only the third of eight parts of the prompts, as one of eight processes on a GPU each."""

    out: Path = Path("vbench")
    """Folder for the videos. Existing ones are kept, so a stopped run can continue; its settings.json records how they
    were made, and other settings are refused."""

    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        for name in self.dimensions:
            if name not in DIMENSIONS:
                raise UserError(f"dimensions has {name!r}; choose from {', '.join(DIMENSIONS)}")
        if not 0 <= self.seed <= 2**32 - STILL:
            raise UserError(
                f"seed is {self.seed}; it must lie in [0, 2**32 - {STILL}], since further videos have the next"
            )
        number, count = self.part
        if not 0 <= number < count:
            raise UserError(
                f"part is {number} {count}; the first number must be at least 0 and below the second, such as 2 8"
            )


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """Read VBench's results."""

    results: tuple[Path, ...] = ()
    """Folders with VBench's result files, *_eval_results.json, or such files: one column per folder."""

    json: bool = False
    """Print JSON instead of a table."""


class Task(NamedTuple):
    """A prompt and the number of its videos."""

    prompt: str
    videos: int


def read_tasks(path: Path, *, dimensions: tuple[str, ...] = (), still: bool = False) -> list[Task]:
    """Reads the prompts of VBench_full_info.json, each once.

    Args:
        path: The file.
        dimensions: Dimensions whose prompts to use; empty for all.
        still: Whether prompts of temporal flickering have 25 videos instead of five.

    Raises:
        UserError: If the file cannot be read or has another form, or no prompt is left.
    """
    try:
        values = json.loads(decoded(path.read_bytes(), name=f"full_info {path}"))
    except OSError as error:
        raise UserError(f"full_info {path} cannot be read: {error.strerror}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"full_info {path} is not JSON: {error}") from error
    tasks: dict[str, int] = {}
    entries = values if isinstance(values, list) else []
    for entry in entries:
        prompt, of = (entry.get(name) if isinstance(entry, dict) else None for name in ("prompt_en", "dimension"))
        if not isinstance(prompt, str) or not isinstance(of, list):
            raise UserError(f"full_info {path} is not VBench's: an entry has no prompt_en and dimension")
        if not dimensions or set(dimensions) & set(of):
            many = STILL if still and STILL_DIMENSION in of else SAMPLES
            tasks[prompt] = max(many, tasks.get(prompt, 0))
    if not tasks:
        chosen = f" of the dimensions {', '.join(dimensions)}" if dimensions else ""
        raise UserError(f"full_info {path} has no prompt{chosen}")
    for prompt in tasks:
        name = f"{prompt}-{tasks[prompt] - 1}.mp4"
        if "/" in prompt or "\0" in prompt or len(name.encode()) > 255:
            raise UserError(f"full_info {path}: no file can have the name of the prompt {prompt[:60]!a}")
    return [Task(prompt, count) for prompt, count in tasks.items()]


def video_name(prompt: str, number: int) -> str:
    """The file name that VBench expects: the whole prompt and the number of the video.

    Examples:
        >>> video_name("a cat", 2)
        'a cat-2.mp4'
    """
    return f"{prompt}-{number}.mp4"


def _claim(config: VBenchConfig) -> bool:
    """Creates the folder, or checks that its videos have the same settings except parts and dimensions.

    Returns:
        Whether there were no settings in the folder.
    """
    values = {"checkpoint": config.checkpoint, "attention": config.attention, "frames": config.frames}
    values |= {"steps": config.steps, "seed": config.seed}
    values["components"] = None if config.components is None else str(config.components)
    config.out.mkdir(parents=True, exist_ok=True)
    there = config.out / SETTINGS
    if not there.is_file():
        write_json(there, values)
        return True
    check_unchanged(values, read_stored(there), of=f"the set of videos in {config.out}")
    return False


def write_videos(config: VBenchConfig) -> tuple[int, int]:
    """Generates the videos that do not exist yet.

    Args:
        config: The settings.

    Returns:
        Number of generated videos, and of those that already existed.

    Raises:
        UserError: If a setting cannot be used.
    """
    if config.full_info is None:
        raise UserError("no full_info was given; give VBench_full_info.json, which the package vbench has")
    if config.checkpoint is None:
        raise UserError("no checkpoint was given; give one that takes prompts, such as Wan2.1-T2V-1.3B")
    if (Path(config.checkpoint) / "checkpoints").is_dir():
        raise UserError(
            f"checkpoint {config.checkpoint} is a run folder, which takes no text; give one that takes prompts, such "
            f"as Wan2.1-T2V-1.3B"
        )
    tasks = read_tasks(config.full_info, dimensions=config.dimensions, still=config.still)
    number, count = config.part
    tasks = tasks[number::count]
    if config.out.exists() and not config.out.is_dir():
        raise UserError(f"out {config.out} is a file; give the path of a folder")
    was_there = config.out.is_dir()
    is_first = _claim(config)
    try:
        return _make(config, tasks)
    except UserError:
        if is_first and [path.name for path in config.out.iterdir()] == [
            SETTINGS
        ]:  # so that other settings can be given
            (config.out / SETTINGS).unlink()
            if not was_there:
                config.out.rmdir()
        raise


def _make(config: VBenchConfig, tasks: list[Task]) -> tuple[int, int]:
    """Generates the missing videos of some prompts; returns the same as `write_videos`."""
    made = there = 0
    with progress("videos", sum(task.videos for task in tasks), quiet=config.quiet) as advance:
        for task in tasks:
            missing = [n for n in range(task.videos) if not (config.out / video_name(task.prompt, n)).is_file()]
            there += task.videos - len(missing)
            advance(task.videos - len(missing), task.prompt)
            if missing:
                made += _make_of_prompt(config, task.prompt, missing, advance)
    return made, there


def _make_of_prompt(config: VBenchConfig, prompt: str, missing: list[int], advance: Callable[[], None]) -> int:
    """Generates the missing videos of a prompt; returns their number."""
    from monarchrt.models.generate.load import load_material
    from monarchrt.models.generate.make import make_video

    options: dict[str, Any] = {} if config.attention is None else {"attention": config.attention}
    given = GenerateConfig(
        checkpoint=config.checkpoint,
        prompt=prompt,
        components=config.components,
        frames=config.frames,
        steps=config.steps,
        zoom=1,
        quiet=True,
        **options,
    )
    material = load_material(given)
    for n in missing:
        own = replace(material.plan.config, seed=config.seed + n, out=config.out / video_name(prompt, n))
        plan = replace(material.plan, config=own)
        make_video(material.pipeline, material.text, **replace(material, plan=plan).options())
        advance()
    return len(missing)


def read_columns(paths: tuple[Path, ...]) -> dict[str, dict[str, float]]:
    """Reads the values of all dimensions for each folder of results, in the given order.

    Args:
        paths: Folders, or files, which count to their folder.

    Returns:
        Values by dimension, by the folder's name, or by its path if two folders have the same name.

    Raises:
        UserError: If there are no files, a file is invalid, or two files of a folder differ in a dimension.
    """
    if not paths:
        raise UserError("no results were given; give VBench's *_eval_results.json, or the folder that has them")
    files: dict[Path, list[Path]] = {}
    for path in paths:
        inside = sorted(path.glob("*eval_results.json")) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"results {path} holds no *eval_results.json; give the folder that VBench wrote them to")
        files.setdefault((path if path.is_dir() else path.parent).resolve(), []).extend(inside)
    names = [folder.name for folder in files]
    titles = [name if names.count(name) == 1 else str(folder) for name, folder in zip(names, files, strict=True)]
    return {title: read_results(own) for title, own in zip(titles, files.values(), strict=True)}


def read_results(files: list[Path]) -> dict[str, float]:
    """Reads the value of each dimension from VBench's result files.

    Raises:
        UserError: If a file is invalid, or two files differ in a dimension.
    """
    scores: dict[str, float] = {}
    for file in files:
        try:
            values = json.loads(decoded(file.read_bytes(), name=f"results {file}"), parse_int=float)
        except OSError as error:
            raise UserError(f"results {file} cannot be read: {error.strerror}") from error
        except UserError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"results {file} is not JSON: {error}") from error
        for name, value in values.items() if isinstance(values, dict) else ():
            value = value[0] if isinstance(value, list) and value else value
            if name not in DIMENSIONS or isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"results {file} is not VBench's: {name!a:.60} is not a dimension with a number")
            if not math.isfinite(value) or abs(value) > 1:
                raise UserError(f"results {file}: {name} is {value}, and VBench's values lie in [-1, 1]")
            if scores.setdefault(name, float(value)) != float(value):
                raise UserError(
                    f"results {file}: {name} is {value}, and {scores[name]} in another file beside it; leave one "
                    f"of them, or give each setting's results a folder of its own"
                )
    if not scores:
        raise UserError(f"results {files[0]} has no dimension of VBench")
    return {name: scores[name] for name in DIMENSIONS if name in scores}


class Scores(NamedTuple):
    """The three scores by name, None if a dimension is missing, and the missing dimensions."""

    scores: dict[str, float | None]
    missing: list[str]


def scores(values: Mapping[str, float]) -> Scores:
    """Computes VBench's quality, semantic and total scores.

    Each dimension is scaled to 0...1 between VBench's lowest and highest value. Quality is the mean of seven
    dimensions, of which dynamic degree has half the weight; semantic is the mean of the other nine; total is
    (4 quality + semantic) / 5. VBench's own tool counts missing dimensions as 0; here the score is None.

    Examples:
        >>> round(scores({name: 1.0 for name in QUALITY}).scores["quality"], 4)
        1.0013

    Args:
        values: Values by dimension.

    Returns:
        The scores.
    """

    def mean(of: Mapping[str, tuple[float, float, float]]) -> float | None:
        if not all(name in values for name in of):
            return None
        scaled = [(values[name] - low) / (high - low) * weight for name, (low, high, weight) in of.items()]
        return sum(scaled) / sum(weight for _, _, weight in of.values())

    quality, semantic = mean(QUALITY), mean(SEMANTIC)
    total = None if quality is None or semantic is None else (4 * quality + semantic) / 5
    missing = [name for name in DIMENSIONS if name not in values]
    return Scores({"quality": quality, "semantic": semantic, "total": total}, missing)
