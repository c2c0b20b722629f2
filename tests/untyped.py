"""Where tests know more of a type than the type checker does."""

from typing import Any


def untyped(x: Any) -> Any:
    """x, of whose type nothing is said: what users pass in error, or what the library takes beyond its annotations."""
    return x


def there[T](x: T | None) -> T:
    """x, which is not None."""
    assert x is not None
    return x


def programs(run: Any) -> int:
    """How many programs a function of `jax.jit` has compiled."""
    return run._cache_size()
