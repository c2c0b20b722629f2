"""The demo: the paper's claim in miniature, on a CPU, from a clip to pictures in one command."""

from monarchrt.train.demo.config import DemoConfig
from monarchrt.train.demo.run import run_demo

__all__ = ["DemoConfig", "run_demo"]
