"""`monarchrt convert`: write a Wan checkpoint in another format."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.runs import RunSettings, find_run
from monarchrt.train.cli.parsing import POSITIONAL, parse

if TYPE_CHECKING:
    from monarchrt.models.wan.checkpoints import ConvertOptions
    from monarchrt.models.wan.checkpoints.load import Progress

_CONVERT = """Write a Wan checkpoint in another format. Official and diffusers hold the same bits under other names.

monarchrt convert Wan-AI/Wan2.1-T2V-1.3B wan-1.3b-diffusers --to diffusers

monarchrt convert self_forcing_dmd.pt self-forcing --to official --dtype bfloat16

monarchrt convert runs/wan finetuned      the newest checkpoint of a run of `monarchrt train`"""


def convert_command(arguments: Sequence[str]) -> int:
    """`monarchrt convert SRC DST --to {official,diffusers,orbax}`."""
    from monarchrt.models.wan.checkpoints import ConvertOptions

    options = parse(ConvertOptions, arguments, prog="monarchrt convert", description=_CONVERT, config=POSITIONAL)
    run = find_run(Path(options.src))
    with user_input(), _bar() as progress:  # a full disk is reported by the caller; nothing is left there
        folder = options.run(progress) if run is None else _convert_run(options, run)
    print(folder)
    return 0


def refuse_of_a_run(path: str, options: Any) -> None:
    """Raises UserError for options that say something of a file which a run folder knows itself."""
    for name in ("weights", "revision", "num_heads", "head_dim"):
        if getattr(options, name) is not None:
            raise UserError(f"{name} is {getattr(options, name)!r}, but {path} is a run folder; leave it out")


def _convert_run(options: "ConvertOptions", run: RunSettings) -> Path:
    """Writes the network of a run folder, in float32 unless another dtype is asked for."""
    from monarchrt.models.generate.run_arrays import run_network, trained_as
    from monarchrt.models.wan.checkpoints import save_checkpoint

    refuse_of_a_run(options.src, options)
    model = run_network(run)
    return save_checkpoint(
        model,
        options.dst,
        format=options.to,
        dtype=options.dtype,
        max_shard_bytes=options.max_shard_bytes,
        few_step=options.few_step or run.generation.sampler == "few-step",
        trained=trained_as(run),
    )


@contextmanager
def _bar() -> Iterator["Progress | None"]:
    """A bar of bytes on a terminal, None elsewhere."""
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
