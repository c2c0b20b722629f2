"""What is compiled while something runs, and how large what a program makes is."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import jax


@contextlib.contextmanager
def compiled_here() -> Iterator[list[str]]:
    """A list of what this thread compiles meanwhile; other threads may still compile what an earlier test began."""
    thread, events = threading.get_ident(), []

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and threading.get_ident() == thread:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def array_sizes(jaxpr: Any) -> Iterator[int]:
    """Elements of every array that a program makes."""
    for equation in jaxpr.eqns:
        yield from (var.aval.size for var in equation.outvars)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from array_sizes(getattr(value, "jaxpr", value))
