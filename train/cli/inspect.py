"""`monarchrt inspect`: describes a Wan checkpoint, a LoRA or a run folder, and says whether it can be loaded."""

from collections.abc import Sequence
from pathlib import Path

from monarchrt.models.errors import user_input
from monarchrt.models.generate.runs import find_run, is_begun
from monarchrt.train.cli.convert import refuse_for_lora, refuse_for_run
from monarchrt.train.cli.parsing import POSITIONAL, parse
from monarchrt.train.cli.tables import say

_INSPECT = """Show what a Wan checkpoint holds: format, model, attention, parameters, missing and unexpected tensors.

For a LoRA: its format, the model it is for, rank, alpha and layers.

For a run folder of `monarchrt train`: its newest checkpoint, losses, settings, and how to use it.

Exits with code 2 if it could not be loaded.

monarchrt inspect Wan-AI/Wan2.1-T2V-1.3B

monarchrt inspect runs/demo/monarch"""


def inspect_command(arguments: Sequence[str]) -> int:
    """`monarchrt inspect PATH`."""
    from monarchrt.models.lora.reading import lora_file, open_lora
    from monarchrt.models.lora.report import report
    from monarchrt.models.wan.checkpoints import InspectOptions

    options = parse(InspectOptions, arguments, prog="monarchrt inspect", description=_INSPECT, config=POSITIONAL)
    path = Path(options.path)
    if is_begun(path):
        from monarchrt.train.summary import run_summary

        refuse_for_run(options.path, options)
        summary = run_summary(path)
        print("\n".join(summary.lines))
        return 0 if summary.usable else 2
    find_run(path)  # raises for a folder that contains runs, and names them
    with user_input():
        if (file := lora_file(path)) is not None:
            refuse_for_lora(options.path, options)
            print("\n".join(report(open_lora(file, warn=say))))
            return 0
        info = options.run()
    print("\n".join(info.lines()))
    return 0 if info.complete else 2
