"""Programs with collectives of several processes, compiled by all processes before any of them runs one.

On CPUs, a process waits for the others in the first collective for half a minute and then fails. Compilation can take
longer than that on one machine than on another, for example without a compilation cache.
"""

from typing import Any

import jax

from monarchrt.models.processes.agreement import wait_for_all


def compiled_by_all(fn: Any) -> Any:
    """Wraps a jitted function so that its first call waits until all processes have compiled the program.

    Args:
        fn: From `jax.jit`. Positional arguments must keep their shapes; keyword arguments are static, and each
            combination of them is a program of its own.

    Returns:
        A function of the same arguments with `lower` and `eval_shape`; `fn` itself in a run of one process.

    Examples:
        >>> int(compiled_by_all(jax.jit(lambda x: x + 1))(1))
        2
    """
    return fn if jax.process_count() == 1 else _Waiting(fn)


class _Waiting:
    def __init__(self, fn: Any):
        self._fn, self._compiled = fn, set()
        self.lower, self.eval_shape = fn.lower, fn.eval_shape

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        if (which := repr(static)) not in self._compiled:
            self._fn.lower(*arguments, **static).compile()  # the call finds it
            wait_for_all("compiled")
            self._compiled.add(which)
        return self._fn(*arguments, **static)
