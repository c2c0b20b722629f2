"""`monarchrt convert`: write a Wan checkpoint in another format."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.runs import RunSettings, find_run
from monarchrt.train.cli.parsing import POSITIONAL, parse
from monarchrt.train.cli.tables import say

if TYPE_CHECKING:
    from monarchrt.models.lora import LoRA
    from monarchrt.models.wan.checkpoints import ConvertOptions
    from monarchrt.models.wan.checkpoints.load import Progress

_CONVERT = """Write a Wan checkpoint in another format. Official and diffusers hold the same bits under other names.

monarchrt convert Wan-AI/Wan2.1-T2V-1.3B wan-1.3b-diffusers --to diffusers

monarchrt convert self_forcing_dmd.pt self-forcing --to official --dtype bfloat16

monarchrt convert runs/wan finetuned      the newest checkpoint of a run of `monarchrt train`

monarchrt convert runs/few student.pt --to torch      for Self-Forcing's code

monarchrt convert Wan-AI/Wan2.1-T2V-1.3B wan-ink --lora ink.safetensors:0.8      merged

monarchrt convert ink.safetensors ink-diffusers.safetensors --to diffusers      a LoRA under other names"""
_LORA_FORMATS = {"official": "comfyui", "diffusers": "diffusers", "musubi": "musubi"}


def convert_command(arguments: Sequence[str]) -> int:
    """`monarchrt convert SRC DST --to {official,diffusers,orbax,torch}`."""
    from monarchrt.models.generate.loras import open_loras
    from monarchrt.models.lora.merging import with_loras
    from monarchrt.models.lora.reading import lora_file
    from monarchrt.models.wan.checkpoints import ConvertOptions

    options = parse(ConvertOptions, arguments, prog="monarchrt convert", description=_CONVERT, config=POSITIONAL)
    run = find_run(Path(options.src))
    with user_input(), _bar() as progress:  # main() reports a full disk; no incomplete file is left
        if run is not None:
            written = (_convert_run_of_a_lora if run.lora else _convert_run)(options, run)
        elif (file := lora_file(Path(options.src))) is not None:
            written = _convert_lora(options, file)
        else:
            _check_model_format(options)
            loras = open_loras(options.lora, report=say)
            written = options.run(progress, adapt=lambda source: with_loras(source, loras))
    if options.to == "torch":
        say(f"note: {written} holds no settings; give attention, blocks, shift and steps when using it")
    if run is not None and not run.lora and run.data.precomputed is None:
        say(
            f"note: {options.src} was trained on pixels, so no VAE can decode what {written} generates; give the run "
            f"folder itself to generate, serve and evaluate"
        )
    print(written)
    return 0


def _check_model_format(options: "ConvertOptions") -> None:
    suffix = options.dst.suffix.lower()
    if options.to == "torch" and suffix not in (".pt", ".pth"):
        raise UserError(f"to is 'torch', which is a file, but dst is {options.dst}; give one that ends in .pt")
    if options.to != "torch" and suffix in (".pt", ".pth"):
        raise UserError(f"dst is {options.dst}, but to is {options.to!r}, which is a folder; give --to torch")
    if options.to == "musubi":
        raise UserError(f"to is 'musubi', a format of LoRAs, but {options.src} is a model; give official or diffusers")


def _convert_lora(options: "ConvertOptions", file: Path) -> Path:
    """Writes a LoRA with the tensor names of another format."""
    from monarchrt.models.lora.reading import open_lora

    refuse_for_lora(options.src, options)
    return _write_lora(options, open_lora(file, warn=say))


def _convert_run_of_a_lora(options: "ConvertOptions", run: RunSettings) -> Path:
    """Writes the LoRA that a run trained."""
    from monarchrt.models.generate.loras import run_lora

    refuse_for_lora(options.src, options)
    return _write_lora(options, run_lora(run))


def _write_lora(options: "ConvertOptions", lora: "LoRA") -> Path:
    from monarchrt.models.lora.writing import rewrite_lora

    if options.lora:
        raise UserError(
            f"lora is {' '.join(options.lora)}, but {lora.path} is a LoRA itself; give a model to merge both into"
        )
    if options.to not in _LORA_FORMATS:
        raise UserError(f"to is {options.to!r}, but {lora.path} is a LoRA; choose from {', '.join(_LORA_FORMATS)}")
    return rewrite_lora(lora, options.dst, format=_LORA_FORMATS[options.to], dtype=options.dtype)


def refuse_for_lora(path: str, options: Any) -> None:
    """Raises UserError for options that describe the file of a model, which a LoRA's file does not have."""
    for name in ("weights", "revision", "num_heads", "head_dim", "max_shard_gb"):
        if getattr(options, name, None) is not None:
            raise UserError(f"{name} is {getattr(options, name)!r}, but {path} is a LoRA; leave it out")
    if getattr(options, "few_step", False):
        raise UserError(f"few_step was given, but {path} is a LoRA; leave it out")


def refuse_for_run(path: str, options: Any) -> None:
    """Raises UserError for options that describe the file of a model, which a run folder records itself."""
    for name in ("weights", "revision", "num_heads", "head_dim"):
        if getattr(options, name) is not None:
            raise UserError(f"{name} is {getattr(options, name)!r}, but {path} is a run folder; leave it out")


def _convert_run(options: "ConvertOptions", run: RunSettings) -> Path:
    """Writes the network of a run folder, in float32 unless `options.dtype` is given."""
    from monarchrt.models.generate.loras import open_loras
    from monarchrt.models.generate.run_arrays import run_network, trained_as
    from monarchrt.models.lora.merging import AsTrained, as_trained, merged
    from monarchrt.models.wan.checkpoints import save_checkpoint

    refuse_for_run(options.src, options)
    _check_model_format(options)
    loras = open_loras(options.lora, report=say)
    model = merged(run_network(run), loras)
    said = as_trained(AsTrained(model.config, run.generation.sampler == "few-step", trained_as(run)), loras)
    if loras:
        model = model.with_config(attention=said.config.attention, causal_block=said.config.causal_block)
    return save_checkpoint(
        model,
        options.dst,
        format=options.to,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_bytes,
        few_step=options.few_step or said.few_step,
        trained=said.trained,
    )


@contextmanager
def _bar() -> Iterator["Progress | None"]:
    """A progress bar of bytes on a terminal; None if standard error is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.description}"), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda name, done, total: bar.update(task, completed=done, total=total, description=name)
