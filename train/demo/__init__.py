"""The demo: the paper's claim in miniature, on a CPU, from a clip to pictures in one command."""

from typing import TYPE_CHECKING, Any

from monarchrt.train.demo.config import DemoConfig

if TYPE_CHECKING:
    from monarchrt.train.demo.run import run_demo

__all__ = ["DemoConfig", "run_demo"]


def __getattr__(name: str) -> Any:
    """`run_demo` is loaded when it is asked for: what needs no JAX, such as help, stays quick."""
    if name == "run_demo":
        from monarchrt.train.demo.run import run_demo

        return run_demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
