"""What is compiled while something runs."""

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
