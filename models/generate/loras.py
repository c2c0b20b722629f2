"""LoRAs for a video, from files and from run folders that trained one."""

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from monarchrt.models.attention.notation import to_text
from monarchrt.models.checkpoints.tensor_files import TensorInfo
from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import NO_LORA, GenerateConfig
from monarchrt.models.generate.run_arrays import run_arrays, run_config, trained_as
from monarchrt.models.generate.runs import RunSettings, find_run, identifying_files, is_run
from monarchrt.models.lora.layers import factors_of
from monarchrt.models.lora.merging import Scaled, parse_scaled
from monarchrt.models.lora.reading import Change, LoRA, lora_file, open_lora
from monarchrt.models.processes.alike import digest_of
from monarchrt.models.wan import wan_config
from monarchrt.models.wan.checkpoints import settings


def given_loras(config: GenerateConfig, *, report: Callable[[str], None]) -> tuple[Scaled, ...]:
    """Opens the LoRAs of `--lora`.

    Args:
        config: The settings.
        report: Called with a line for each LoRA, and one more if it does not record its alpha.

    Returns:
        The LoRAs with their scales.

    Raises:
        ValueError: If one cannot be read or is for another family of models.
    """
    if config.lora == NO_LORA:
        return ()
    opened = open_loras(config.lora, report=report)
    for lora, scale in opened:
        report(f"lora {lora.path}: {lora.summary}, strength {scale:g}")
    return opened


def lora_files(config: GenerateConfig) -> list[Path]:
    """Files that identify the LoRAs of `--lora`: LoRA files, and of run folders the checkpoint's description."""
    found: list[Path] = []
    for text in () if config.lora == NO_LORA else config.lora:
        path = Path(parse_scaled(text)[0])
        file = None if is_run(path) else lora_file(path)
        found += identifying_files(path) if file is None else [file]
    return found


def lora_settings(config: GenerateConfig) -> str:
    """A digest of the training settings of the runs in `--lora`, on which the merged weights depend too."""
    paths = () if config.lora == NO_LORA else (Path(parse_scaled(text)[0]) for text in config.lora)
    runs = [find_run(path) for path in paths]
    kept = [(run.preset, run.overrides, run.attention, run.generation, run.lora_alpha) for run in runs if run]
    return digest_of(kept)


def open_loras(texts: Iterable[str], *, report: Callable[[str], None]) -> tuple[Scaled, ...]:
    """Opens LoRAs from files and run folders.

    Args:
        texts: Each `PATH` or `PATH:SCALE`.
        report: Called with a line for each that does not record its alpha.

    Returns:
        The LoRAs with their scales.

    Raises:
        ValueError: If one cannot be read, is not a LoRA, or is for another family of models.
    """
    opened = []
    for text in texts:
        path, scale = parse_scaled(text)
        run = find_run(Path(path))
        opened.append(Scaled(open_lora(path, warn=report) if run is None else run_lora(run), scale))
    return tuple(opened)


class Arrays:
    """Arrays in memory, with the interface of a file of tensors."""

    def __init__(self, path: Path, arrays: dict[str, np.ndarray]):
        self.path, self._arrays = path, arrays
        self.infos = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
        self.metadata: dict[str, str] = {}

    def read(self, name: str) -> np.ndarray:
        """The array."""
        return self._arrays[name]


def run_lora(run: RunSettings) -> LoRA:
    """The LoRA that a run trained, from its newest readable checkpoint: the moving average, if there is one.

    Args:
        run: Its settings.

    Returns:
        The LoRA, which records the attention and sampler that it was trained for.

    Raises:
        UserError: If the run did not train a LoRA or has no readable checkpoint.
    """
    if not run.lora:
        raise UserError(f"lora {run.path} is a run that trained a network, not a LoRA; give it as the checkpoint")
    config = run_config(run, channels=wan_config(run.preset).in_channels)
    factors = factors_of(run_arrays(run), config, alpha=run.lora_alpha)
    arrays, changes = {}, {}
    for module, (down, up, alpha) in factors.items():
        names = f"{module}.lora_down.weight", f"{module}.lora_up.weight"
        arrays |= dict(zip(names, (down, up), strict=True))
        shape = (len(up), down.shape[1])
        changes[f"{module}.weight"] = Change(down=names[0], up=names[1], scale=alpha / len(down), shape=shape)
    attention = config.attention
    layers = attention if isinstance(attention, tuple) else (attention,)
    text = to_text(layers[0].stored()) if len(layers) == 1 else to_text([layer.stored() for layer in layers])
    said = settings.own_to_json(config, few_step=run.generation.sampler == "few-step", trained=trained_as(run)) or {}
    return LoRA(
        path=run.path,
        format="comfyui",
        changes=changes,
        ranks={module: len(one.down) for module, one in factors.items()},
        alphas={module: one.alpha for module, one in factors.items()},
        said="the run's settings",
        settings={"attention": text, "causal_block": config.causal_block} | said,
        file=Arrays(run.path, arrays),
    )
