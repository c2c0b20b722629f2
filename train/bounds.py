"""What whole numbers among the settings of a run may be."""

from typing import Any

from monarchrt.models.errors import UserError

# what is largest is far beyond use, and short of what fills the memory or an int32
_BOUNDS = {
    "steps": (1, 10**7),  # each is looked at before the first, for who is due
    **dict.fromkeys(("log_every", "eval_every", "eval_windows", "checkpoint_every", "keep"), (1, 10**9)),
    **dict.fromkeys(("sample_every", "times_every", "warmup", "ema_start"), (0, 10**9)),
    **dict.fromkeys(("batch", "accumulation"), (1, 10**5)),
    "decay_steps": (1, 10**9),
    "eval_timesteps": (1, 1000),
    "prefetch": (0, 1000),
}


def check_bounds(settings: Any) -> None:
    """Looks whether the whole numbers of a table of settings are in range.

    Examples:
        >>> check_bounds(type("Settings", (), {"steps": 0}))
        Traceback (most recent call last):
        ...
        monarchrt.models.errors.UserError: steps is 0; it must be at least 1

    Args:
        settings: Anything with some of these attributes; None stands for one that is not given.

    Raises:
        UserError: If one is too small or too large.
    """
    for name, (least, most) in _BOUNDS.items():
        value = getattr(settings, name, None)
        if value is None:
            continue
        if value < least:
            raise UserError(f"{name} is {value}; it must be at least {least}")
        if value > most:
            shown = value if value < 10**30 else "a number of more than 30 digits"
            raise UserError(f"{name} is {shown}; it must be at most {most}")
