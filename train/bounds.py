"""Valid ranges of the integer settings of a run."""

from collections.abc import Mapping

# the upper bounds are far beyond practical use, but small enough not to exhaust memory or to overflow an int32
WHOLE_NUMBERS: Mapping[str, tuple[int, int]] = {
    "steps": (1, 10**7),  # smaller, since the roles that each step updates are counted before the first step
    **dict.fromkeys(("log_every", "eval_every", "eval_windows", "checkpoint_every", "keep"), (1, 10**9)),
    **dict.fromkeys(("sample_every", "times_every", "warmup", "ema_start"), (0, 10**9)),
    **dict.fromkeys(("batch", "accumulation"), (1, 10**5)),
    "decay_steps": (1, 10**9),
    "eval_timesteps": (1, 1000),
    "prefetch": (0, 1000),
}
