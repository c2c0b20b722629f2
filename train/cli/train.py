"""`monarchrt train`: trains, finetunes or distils a network, or resumes a run."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monarchrt.models.errors import UserError
from monarchrt.models.generate.runs import is_run
from monarchrt.models.processes.joining import joined
from monarchrt.models.processes.place import find_place
from monarchrt.train.cli.parsing import last_value, read_settings
from monarchrt.train.cli.roles import parse_roles
from monarchrt.train.cli.tables import print_table, say
from monarchrt.train.config import RunConfig, TrainConfig, replace_settings, to_dict
from monarchrt.train.interrupt import finish_first
from monarchrt.train.objectives.settings import FlowConfig
from monarchrt.train.run_folder import claim_folder, read_config

if TYPE_CHECKING:
    from monarchrt.train.plan import Plan

_TRAIN = """Train, finetune or distil a Wan-shaped video diffusion transformer with dense or Monarch attention.

monarchrt train --config small --video clip.mp4 --folder runs/dense --attention dense --steps 1000

monarchrt train --config small --video clip.mp4 --folder runs/monarch --init-from runs/dense --tile 4 8 14 \\
    --steps 200 --learning-rate 2e-3

monarchrt train --folder runs/monarch --resume --steps 400

monarchrt train --config settings.toml --folder runs/third

monarchrt train ... --plan      report the memory and time the run would take, without starting it

For --config, give a TOML or JSON file with the names of the options, such as steps = 500, or a run's config.json;
    options on the command line take precedence. `small` is the demo's configuration, a network for a CPU; it is
    the default with --video unless --config, --preset or --overrides describes a network."""
_SMALL = Path("small")
_NETWORK = ("--preset", "--overrides")


def parse_train(arguments: Sequence[str]) -> TrainConfig:
    """Parses the options of `monarchrt train`.

    Those not given come from the file of --config, then, with --resume, from the folder's config.json.

    Args:
        arguments: The words of the command line after `train`.

    Returns:
        The settings.

    Raises:
        UserError: If an option does not exist, a value cannot be read or is out of range, or a file of settings cannot
            be read.

    Examples:
        >>> config = parse_train(["--video", "clip.mp4", "--steps", "7"])
        >>> config.run.steps, str(config.data.video)
        (7, 'clip.mp4')
    """
    given, path = _take_config(arguments)
    path = _SMALL if path is None and takes_small(arguments) else path
    values = {} if path is None else read_settings(path)
    default = TrainConfig()
    with _naming_file(path):
        asked = replace_settings(default, values)
    if "--resume" in given or asked.run.resume:
        default = read_config(Path(last_value(given, "--folder") or asked.run.folder)) or default
        default = _with_given_mesh(default, asked, given)
    with _naming_file(path):
        default = replace_settings(default, values)
    return parse_roles(given, prog="monarchrt train", default=default, description=_TRAIN)


def takes_small(arguments: Sequence[str]) -> bool:
    """Whether the defaults are those of `--config small`, the demo's network for pixels and its training settings.

    The default preset is for latents of a few channels: it is too narrow for the default size of pixel blocks, and
    would learn nothing but noise.

    Examples:
        >>> takes_small(["--video", "a.mp4", "--steps", "9"]), takes_small(["--video", "a.mp4", "--preset", "tiny"])
        (True, False)
    """
    names = {word.partition("=")[0].replace("_", "-") for word in arguments if word.startswith("--")}
    of_pixels = last_value(arguments, "--objective") in (None, FlowConfig.name) and "--video" in names
    origin = last_value(arguments, "--init-from")
    of_a_run = origin is None or is_run(Path(origin))
    return of_pixels and of_a_run and not names & {"--config", "--resume", *_NETWORK}


def _with_given_mesh(stored: TrainConfig, asked: TrainConfig, given: Sequence[str]) -> TrainConfig:
    """The settings of a run folder, with the default mesh and sharding if either is given now."""
    plain = RunConfig()
    given_in_file = (asked.run.mesh, asked.run.sharding) != (plain.mesh, plain.sharding)
    if not given_in_file and last_value(given, "--mesh") is None and last_value(given, "--sharding") is None:
        return stored
    return dataclasses.replace(stored, run=dataclasses.replace(stored.run, mesh=plain.mesh, sharding=plain.sharding))


def _take_config(arguments: Sequence[str]) -> tuple[list[str], Path | None]:
    """The arguments without `--config FILE`, and the file."""
    rest: list[str] = []
    path = None
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value or value.startswith("--"):
            raise UserError("config is empty; give a file, --config FILE.toml or FILE.json")
        if path is not None:
            raise UserError(f"config is given twice, as {path} and {value}; give one")
        path = Path(value)
    return rest, path


@contextlib.contextmanager
def _naming_file(path: Path | None) -> Iterator[None]:
    """Adds the name of the settings file to error messages."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def train_command(arguments: Sequence[str]) -> int:
    """`monarchrt train`."""
    config = parse_train(arguments)
    plans, as_json = "--plan" in arguments, "--json" in arguments
    if as_json and not plans:
        raise UserError("json is for --plan, which was not given; leave it out, or add --plan")
    run = config.run
    place = find_place(run.coordinator, run.processes, run.process)
    if place is None:
        claim_folder(config)  # before JAX is loaded
    if takes_small(arguments):
        say(
            f"note: settings that are not given come from --config {_SMALL}, a network for a CPU; choose another with "
            f"--preset or --overrides"
        )
    with joined(place, identity=_shared(config), advice="continue with --resume"):
        return _train(config, plans=plans, as_json=as_json)


def _shared(config: TrainConfig) -> dict[str, Any]:
    """The settings that must be equal in all processes of a run, by option name."""
    settings: dict[str, Any] = {}

    def collect(values: dict[str, Any], prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                collect(value, f"{prefix}{name}.")
            else:
                settings[f"{prefix}{name}"] = value

    for part, values in to_dict(config).items():
        if isinstance(values, dict):
            collect(values, f"{part}." if part == "roles" else "")
        else:
            settings[part] = values
    return {name: value for name, value in settings.items() if name not in ("process", "coordinator", "processes")}


def _train(config: TrainConfig, *, plans: bool, as_json: bool) -> int:
    if config.data.video is None and config.data.precomputed is None:
        if config.run.resume and read_config(config.run.folder) is None:
            raise UserError(
                f"folder {config.run.folder} holds no run to resume; give the folder of one, or start one there with "
                f"--video CLIP.mp4 or --latents FOLDER"
            )
        raise UserError("neither video nor latents was given; give --video CLIP.mp4 or --latents FOLDER")

    with finish_first():
        from monarchrt.train.loop import plan, train

    from monarchrt.models.processes.agreement import is_first_process

    if plans:
        planned = plan(config)
        if is_first_process():
            _print_plan(planned, as_json=as_json)
        return 0
    result = train(config)
    if not is_first_process():
        return 0
    say(f"step {int(result.state.step)}: held-out loss {result.held_out_loss:.4f}; everything is in {result.folder}")
    return 0


def _print_plan(planned: "Plan", *, as_json: bool) -> None:
    from monarchrt.train.plan import plan_lines, plan_table

    if as_json:
        print(json.dumps(planned.to_dict(), indent=1))
        return
    print(f"{planned.devices}, mesh {planned.mesh}; on each device:")
    print_table(*plan_table(planned))
    print("\n".join(plan_lines(planned)))
