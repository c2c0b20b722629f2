"""Programs that several processes run together: none begins one before all have compiled it.

On CPUs, processes that meet in a collective for the first time wait for each other for half a minute; a compiler may
take longer than that on one machine, or where nothing is kept of an earlier start, than on another.
"""

from typing import Any

import jax

from monarchrt.models.processes.agreement import all_agree


def compiled_by_all(fn: Any) -> Any:
    """The same function, whose processes wait for each other before they run a program of it for the first time.

    Args:
        fn: Of `jax.jit`; arguments by position keep their shapes, those by name are static.

    Returns:
        A function of the same arguments, with `lower` and `eval_shape`; `fn` itself where there is one process.

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
            all_agree("compiled", None)
            self._compiled.add(which)
        return self._fn(*arguments, **static)
