"""The priority of this process on the host's cores: whoever sends work to a GPU must not wait for other programs."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax

Priority = Literal["auto", "normal"]
RAISED = -10  # as `nice` counts: 0 is normal, -20 the highest


def set_priority(priority: Priority, report: Callable[[str], None] = lambda _: None) -> None:
    """Raises the priority of this process, where that is of use and permitted.

    Of use with "auto" and an accelerator: on a CPU the computation itself would take the cores from other programs. Not
    permitted on most systems without root or `CAP_SYS_NICE`; a priority that the process was started with stays.

    Args:
        priority: "auto", or "normal" to leave it as it is.
        report: Told in a line if it was raised.
    """
    if priority == "auto" and jax.default_backend() != "cpu" and raise_threads():
        report(
            f"CPU priority raised to nice {RAISED}, so that blocks stay even on a busy host "
            "(--priority normal: as it was)"
        )


def raise_threads(nice: int = RAISED, *, process: Path = Path("/proc/self/task")) -> bool:
    """Gives all threads of this process a priority, on Linux; those that they start take it over.

    Args:
        nice: As `nice` counts.
        process: Folder with an entry for each thread.

    Returns:
        Whether it was done: not without permission, on another system, or if the process was started with another
        priority than the normal one.
    """
    if not process.is_dir() or os.getpriority(os.PRIO_PROCESS, 0) != 0:
        return False
    for task in sorted(int(entry.name) for entry in process.iterdir()):
        try:
            os.setpriority(os.PRIO_PROCESS, task, nice)
        except ProcessLookupError:  # that thread has ended
            continue
        except OSError:
            return False
    return True
