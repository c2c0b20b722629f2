"""The summary of a run folder for `monarchrt inspect RUN`. Nothing in the folder is changed."""

import dataclasses
import math
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from monarchrt.models.attention.densities import density_of_network
from monarchrt.models.attention.notation import to_text
from monarchrt.models.checkpoints.orbax_arrays import open_arrays
from monarchrt.models.errors import UserError, printable
from monarchrt.models.generate.run_arrays import StoredNetwork, run_config, stored_network
from monarchrt.models.generate.run_checkpoint import run_defaults
from monarchrt.models.generate.runs import CHECKPOINTS_NAME, CONFIG_NAME, RunSettings, checkpoint_steps, read_run
from monarchrt.models.wan import WanConfig
from monarchrt.train.config import TrainConfig
from monarchrt.train.data import LatentFolder
from monarchrt.train.logs import LOG_NAME, read_log
from monarchrt.train.run_folder import SET_ASIDE_NAME, read_config

READ_AT_MOST = 2**31  # bytes; the arrays of larger networks are not read, so that the command is quick
SHORT = 160  # most characters of an error message in the summary


class Summary(NamedTuple):
    """A report on a run folder.

    Attributes:
        lines: The lines of the report.
        usable: Whether `generate` or `convert` can use the run: there is a checkpoint that can be read.
    """

    lines: list[str]
    usable: bool


class _Newest(NamedTuple):
    """The newest readable checkpoint, whether its arrays were read, and the errors of newer ones by step."""

    network: StoredNetwork | None
    read: bool
    wrong: dict[int, str]


def run_summary(folder: Path) -> Summary:
    """Summarizes a run folder: its progress, losses, networks and settings, and the commands that use it.

    Args:
        folder: A run folder, which may be incomplete or damaged.

    Returns:
        The report, which includes what is damaged or missing.
    """
    settings, config, said = _settings(folder)
    newest = _newest(folder)
    report = {"path": str(folder), "format": "a run folder of monarchrt train", "settings": said}
    report["checkpoint"] = _checkpoint(folder, newest)
    report |= _log(folder)
    network = None
    if settings is not None:
        network, wrong = _network(settings, newest.network)
        report |= {"model": wrong} if network is None else {"model": _model(network), **_attention(network, settings)}
    if newest.network is not None:
        report["parameters"] = f"{sum(math.prod(shape) for shape in newest.network.shapes.values()):,}"
    if config is not None:
        report |= _training(config)
    usable = network is not None and newest.network is not None
    if usable and settings is not None and network is not None:
        report |= _uses(folder, settings, network, newest.network)
    else:
        report["commands"] = "neither generate nor convert: they need config.json and a checkpoint that can be read"
    width = max(12, 1 + max(map(len, report)))
    return Summary([f"{name:<{width}}{value}" for name, value in report.items()], usable)


def _reason(error: Exception) -> str:
    return printable(" ".join(str(error).split()).rstrip("."), SHORT)


def _settings(folder: Path) -> tuple[RunSettings | None, TrainConfig | None, str]:
    """Network and training settings in config.json, None if they cannot be read; and the file's name or the error."""
    if not (folder / CONFIG_NAME).is_file():
        return None, None, f"{CONFIG_NAME} does not exist"
    parts: list[Any] = []
    for read in (read_run, read_config):
        try:
            parts.append(read(folder))
        except UserError as error:
            return (parts[0] if parts else None), None, _reason(error)
    return parts[0], parts[1], CONFIG_NAME


def _newest(folder: Path) -> _Newest:
    wrong: dict[int, str] = {}
    for step in reversed(checkpoint_steps(folder)):
        try:
            network = stored_network(folder, step)
            stores = open_arrays(network.folder, network.names.values())
            small = sum(store.size * store.dtype.numpy_dtype.itemsize for store in stores.values()) <= READ_AT_MOST
            if small:
                shapes = {
                    name: jax.ShapeDtypeStruct(network.shapes[name], stores[stored].dtype.numpy_dtype)
                    for name, stored in network.names.items()
                }
                network.read(shapes)
        except Exception as error:  # tensorstore raises whatever its storage layer raised
            wrong[step] = _reason(error)
            continue
        return _Newest(network, small, wrong)
    return _Newest(None, False, wrong)


def _checkpoint(folder: Path, newest: _Newest) -> str:
    steps = checkpoint_steps(folder)
    parts = []
    if newest.network is None:
        parts.append("none can be read" if steps else "none")
    else:
        how = "verified" if newest.read else "too large to be verified here"
        parts.append(f"step {newest.network.step}, {how}")
        if older := [step for step in steps if step < newest.network.step]:
            parts.append(f"older ones {', '.join(map(str, reversed(older)))}")
    parts += [f"step {step} cannot be read ({reason})" for step, reason in newest.wrong.items()]
    path = folder / CHECKPOINTS_NAME
    if not path.is_dir():
        parts.append(f"there is no {CHECKPOINTS_NAME}/")
    elif leftover := len(list(path.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"))):
        parts.append(f"{leftover} incomplete, still being written or left by a process that was killed")
    if (aside := folder / SET_ASIDE_NAME).is_dir() and (count := len(list(aside.iterdir()))):
        parts.append(f"{count} in {SET_ASIDE_NAME}/")
    return "; ".join(parts)


def _log(folder: Path) -> dict[str, str]:
    if not (folder / LOG_NAME).is_file():
        return {"log": f"{LOG_NAME} does not exist"}
    try:
        records = read_log(folder)
    except OSError as error:
        return {"log": f"{LOG_NAME} cannot be read ({error.strerror})"}
    if not records:
        return {"log": "no step yet"}
    lines = {"log": f"up to step {max(record['step'] for record in records)}"}
    losses = [(record, name) for record in records for name in record if name.endswith("held_out_loss")]
    for name in dict.fromkeys(name for _, name in losses):
        values = [(record["step"], record[name]) for record, there in losses if there == name]
        values = [(step, value) for step, value in values if isinstance(value, int | float)]
        if values:
            step, last = values[-1]
            first = f"; {values[0][1]:.4f} at step {values[0][0]}" if len(values) > 1 else ""
            role = name.removesuffix("held_out_loss").rstrip("/")
            label = f"{role} loss" if role else "held-out"
            lines[label] = f"{last:.4f} at step {step}{first}"
    return lines


def _network(settings: RunSettings, stored: StoredNetwork | None) -> tuple[WanConfig | None, str]:
    """The configuration of the network, or None and the reason why it cannot be determined."""
    kernel = () if stored is None else stored.shapes.get("patch_embedding.kernel", ())
    patch = settings.data.patch
    channels = kernel[-2] if len(kernel) > 1 else None if settings.data.precomputed else 3 * patch * patch
    try:
        if channels is None:
            return run_config(settings, channels=16), ""
        return run_config(settings, channels=channels), ""
    except ValueError as error:
        return None, _reason(error)


def _model(network: WanConfig) -> str:
    return (
        f"dim {network.dim}, {network.num_layers} layers, {network.num_heads} heads, ffn {network.ffn_dim}, "
        f"{network.in_channels} channels"
    )


def _attention(network: WanConfig, settings: RunSettings) -> dict[str, str]:
    """The attention with its density, and the data with the tokens of a sample."""
    layers = network.layer_attention
    text = to_text(layers[0] if len(set(layers)) == 1 else layers)
    data = settings.data
    try:
        if settings.generation.latents is not None:
            shape = settings.generation.latents
        elif data.latents is None:
            shape = (data.frames, data.height // data.patch, data.width // data.patch)
        else:
            shape = LatentFolder(data.latents, TrainConfig().data).latent_shape[:3]
        grid = network.token_grid(*shape)
        density = density_of_network(network.attention, network.num_layers, grid, causal_block=network.causal_block)
    except (ValueError, NotImplementedError) as error:
        return {"attention": f"{text}; its density is not known ({_reason(error)})"}
    tokens = f"{math.prod(grid):,} tokens a sample, {' x '.join(map(str, grid))}"
    return {"attention": f"{text}, {density}", "data": f"{data.video or data.precomputed or 'unknown'}; {tokens}"}


def _training(config: TrainConfig) -> dict[str, str]:
    objective, run = config.objective, config.run
    lines = {"objective": f"{objective.name}; exported: {objective.exported}"}
    if fields := [f"{item.name} {getattr(objective, item.name)}" for item in dataclasses.fields(objective)]:
        lines["objective"] += f"; {', '.join(fields)}"
    for name, role in objective.roles.items():
        origin = config.origin(name) or "random parameters"
        if not role.trains:
            lines[name] = f"does not train; from {origin}"
            continue
        made = config.trained(name)
        average = "no average" if made.ema_decay is None else f"average {made.ema_decay:g}"
        lines[name] = f"from {origin}; AdamW at {made.learning_rate:g}, {made.schedule}, {average}"
        if made.lora_rank is not None:
            alpha = made.lora_rank if made.lora_alpha is None else made.lora_alpha
            lines[name] += f"; trains a LoRA of rank {made.lora_rank}, alpha {alpha:g}"
        if tuple(made.trainable) != ("all",):
            lines[name] += f"; trains {' '.join(made.trainable)}"
    lines["run"] = f"{run.steps} steps of {run.batch} samples, seed {run.seed}, {run.precision}"
    return lines


def _uses(folder: Path, settings: RunSettings, network: WanConfig, stored: StoredNetwork | None) -> dict[str, str]:
    """The commands that use the run, with what they do."""
    path = shlex.quote(str(folder))
    averaged = stored is not None and any(
        ".average." in name or name.startswith("ema.") for name in stored.names.values()
    )
    what = "the moving average of its weights" if averaged else "its weights"
    if settings.lora:
        what = "the moving average of its matrices" if averaged else "its matrices"
        return {
            "convert": f"monarchrt convert {path} NEW.safetensors    writes the LoRA, {what}; --to names the format",
            "generate": f"monarchrt generate --checkpoint NETWORK --lora {path}    with its base network",
        }
    if settings.data.precomputed is not None:
        return {
            "convert": f"monarchrt convert {path} NEW    writes a model with {what}",
            "generate": "needs a model written by convert, and --components for VAE and text encoder",
        }
    defaults = run_defaults(settings, network)
    sampled = f"{defaults.frames} frames of {defaults.height} x {defaults.width}, {defaults.mode}, {defaults.sampler}"
    # not convert: the latents are pixel blocks, which no VAE of a converted model could decode
    return {"generate": f"monarchrt generate --checkpoint {path}    generates {sampled}, with {what}"}
