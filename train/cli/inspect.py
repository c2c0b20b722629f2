"""`monarchrt inspect`: what a Wan checkpoint holds, and whether it is complete."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from monarchrt.models.errors import UserError, user_input
from monarchrt.train.cli.parsing import POSITIONAL, parse
from monarchrt.train.export import find_run

_INSPECT = """Say what a Wan checkpoint holds: format, model, attention, parameters, what is missing or too much.

Leaves with exit code 2 if it could not be loaded.

monarchrt inspect Wan-AI/Wan2.1-T2V-1.3B"""


def inspect_command(arguments: Sequence[str]) -> int:
    """`monarchrt inspect PATH`."""
    from monarchrt.models.wan.checkpoints import InspectOptions

    options = parse(InspectOptions, arguments, prog="monarchrt inspect", description=_INSPECT, config=POSITIONAL)
    if find_run(Path(options.path)) is not None:
        raise UserError(
            f"{options.path} is a run folder of `monarchrt train`; `monarchrt convert {shlex.quote(options.path)} NEW` "
            f"makes a model of it"
        )
    with user_input():
        info = options.run()
    print("\n".join(info.lines()))
    return 0 if info.complete else 2
