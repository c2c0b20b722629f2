"""`monarchrt demo`: dense, Monarch, finetuned, on a CPU."""

from collections.abc import Sequence

from monarchrt.train.cli.parsing import parse
from monarchrt.train.interrupt import finish_first


def demo_command(arguments: Sequence[str]) -> int:
    """`monarchrt demo`."""
    with finish_first():
        from monarchrt.train.demo import DemoConfig, run_demo

    config = parse(DemoConfig, arguments, prog="monarchrt demo")
    run_demo(config)
    return 0
