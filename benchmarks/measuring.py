"""What the benchmarks share: how calls are timed, and how a report says where it was measured and is written."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax


def machine() -> dict[str, str]:
    """The first entries of a report: the card and JAX's version."""
    return {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def heading() -> str:
    """The same in words, for the first line that a benchmark prints."""
    return ", jax ".join(machine().values())


def write_report(path: Path, report: Mapping[str, Any], *, default: Callable[[Any], Any] | None = None) -> None:
    """Writes a report as JSON, into a folder that need not exist; `default` converts other values, as in `json.dumps`.

    Called after every row, so that an interrupted benchmark leaves those that it has measured.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, default=default) + "\n", encoding="utf-8")


def clock[Result](call: Callable[..., Result], *arguments: Any) -> tuple[Result, float]:
    """The result of one call, and its seconds until that is there."""
    start = time.perf_counter()
    result = jax.block_until_ready(call(*arguments))
    return result, time.perf_counter() - start


def median_seconds(call: Callable[[], Any], repeats: int, *, uncounted: int = 1) -> float:
    """Median of single calls, each waited for, after some that are not counted: the first one may compile."""
    seconds = [clock(call)[1] for _ in range(uncounted + repeats)]
    return statistics.median(seconds[uncounted:])


def calls_within(seconds: float, one: float) -> int:
    """How many calls of `one` second each to send at a time: about those `seconds`, 2 at least and 50 at most."""
    return max(2, min(50, int(seconds / one)))


def milliseconds(compiled: Callable[..., Any], arrays: tuple[jax.Array, ...], calls: int) -> float:
    """Milliseconds per call of several that are sent without waiting for each other.

    The time to launch one then hides behind the one before.
    """
    start = time.perf_counter()
    for _ in range(calls):
        out = compiled(*arrays)
    jax.block_until_ready(out)
    return 1e3 * (time.perf_counter() - start) / calls


def clocked(compiled: Callable[..., Any], arrays: tuple[jax.Array, ...], repeats: int) -> float:
    """Median ms of a call of a compiled function."""
    calls = calls_within(0.1, milliseconds(compiled, arrays, 2) / 1e3)
    return statistics.median(milliseconds(compiled, arrays, calls) for _ in range(repeats))
