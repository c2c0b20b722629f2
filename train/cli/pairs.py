"""`monarchrt pairs`: saves states along a teacher's ODE trajectories, to train a few-step student on."""

from collections.abc import Sequence

from monarchrt.train.cli.parsing import parse
from monarchrt.train.cli.tables import say

_PAIRS = """Follow a teacher from noise to data and keep its states at a student's steps, for
`monarchrt train --objective ode --latents PAIRS`.

monarchrt pairs --checkpoint Wan-AI/Wan2.1-T2V-1.3B --latents LATENTS --negative negative.safetensors --out pairs"""


def pairs_command(arguments: Sequence[str]) -> int:
    """`monarchrt pairs --checkpoint TEACHER --latents FOLDER --out FOLDER`."""
    from monarchrt.train.pairs import PairsConfig, make_pairs

    options = parse(PairsConfig, arguments, prog="monarchrt pairs", description=_PAIRS)
    files = make_pairs(options)
    say(f"{len(files)} examples are in {options.out}")
    return 0
