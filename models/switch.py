"""Flags that are on while something is traced."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar


class Switch:
    """A flag that is off, except inside a `with` block, in the same thread.

    Examples:
        >>> loud = Switch("loud")
        >>> with loud():
        ...     print(loud.on)
        True
        >>> loud.on
        False

    Args:
        name: Name of its context variable.
    """

    def __init__(self, name: str):
        self._on: ContextVar[bool] = ContextVar(name, default=False)

    @property
    def on(self) -> bool:
        """Whether the flag is on."""
        return self._on.get()

    @contextlib.contextmanager
    def __call__(self, on: bool = True) -> Iterator[None]:
        """Sets the flag inside a `with` block."""
        token = self._on.set(on)
        try:
            yield
        finally:
            self._on.reset(token)
