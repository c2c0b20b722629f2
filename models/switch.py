"""Settings that hold while something is traced."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar


class Switch:
    """Off, but within a `with` of it, in that thread alone.

    Examples:
        >>> loud = Switch("loud")
        >>> with loud():
        ...     print(loud.on)
        True
        >>> loud.on
        False

    Args:
        name: For who looks at the context's variables.
    """

    def __init__(self, name: str):
        self._on: ContextVar[bool] = ContextVar(name, default=False)

    @property
    def on(self) -> bool:
        """Whether it is."""
        return self._on.get()

    @contextlib.contextmanager
    def __call__(self, on: bool = True) -> Iterator[None]:
        """Switches it on, or off, for as long as the context lasts."""
        token = self._on.set(on)
        try:
            yield
        finally:
            self._on.reset(token)
