"""`monarchrt demo`: dense, Monarch and finetuned Monarch attention, or a distilled stream, on a CPU."""

from collections.abc import Sequence
from pathlib import Path

from monarchrt.train.cli.parsing import last_value, parse
from monarchrt.train.demo.config import DISTILLED, DemoConfig
from monarchrt.train.demo.folder import claim_demo, read_settings
from monarchrt.train.interrupt import finish_first


def demo_command(arguments: Sequence[str]) -> int:
    """`monarchrt demo`."""
    distills = [word for word in arguments if word in ("--distill", "--no-distill")][-1:] == ["--distill"]
    default = DemoConfig(folder=DISTILLED) if distills else DemoConfig()
    if "--resume" in arguments:
        default = read_settings(Path(last_value(arguments, "--folder") or default.folder)) or default
    config = parse(DemoConfig, arguments, prog="monarchrt demo", default=default)
    claim_demo(config)  # before JAX is loaded
    with finish_first():
        from monarchrt.train.demo.run import run_demo

    run_demo(config)
    return 0
