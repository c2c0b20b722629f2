"""Range checks of numeric settings."""

from collections.abc import Mapping
from typing import Any

from monarchrt.models.errors import UserError


def check_bounds(settings: Any, bounds: Mapping[str, tuple[int | float, int | float]]) -> None:
    """Checks that numeric settings lie in their ranges.

    Examples:
        >>> check_bounds(type("Settings", (), {"steps": 0}), {"steps": (1, 1000)})
        Traceback (most recent call last):
        ...
        monarchrt.models.errors.UserError: steps is 0; it must be at least 1

    Args:
        settings: An object with some of these attributes; missing ones and those that are None are not checked.
        bounds: Smallest and largest valid value by name, both inclusive; the largest may be infinity.

    Raises:
        UserError: If a number is too small, too large or NaN.
    """
    for name, (least, most) in bounds.items():
        value = getattr(settings, name, None)
        if value is None or least <= value <= most:
            continue
        if value < least:
            raise UserError(f"{name} is {short(value)}; it must be at least {least}")
        if value > most:
            raise UserError(f"{name} is {short(value)}; it must be at most {most}")
        raise UserError(f"{name} is {value}; it must lie in [{least}, {most}]")


def short(value: object) -> str:
    """A value as text for a message, at most 40 characters.

    Examples:
        >>> short(81), short(10**50)
        ('81', '1000000000000000000000000000000000000...')
    """
    try:
        text = str(value)
    except ValueError:  # Python refuses to print integers of more than about 4300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= 40 else f"{text[:37]}..."
