"""The demo: finetuning with Monarch attention, or distillation, at small scale on a CPU, from a clip to plots."""

from typing import TYPE_CHECKING, Any

from monarchrt.train.demo.config import DemoConfig

if TYPE_CHECKING:
    from monarchrt.train.demo.run import run_demo

__all__ = ["DemoConfig", "run_demo"]


def __getattr__(name: str) -> Any:
    """Imports `run_demo` lazily, since it needs JAX, and the command's help should be quick."""
    if name == "run_demo":
        from monarchrt.train.demo.run import run_demo

        return run_demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
