"""Noise schedules of flow matching: the noise levels of a sampler and the timesteps given to the network.

A latent at noise level sigma is (1 - sigma) data + sigma noise. Levels are shifted towards high noise by
sigma = s u / (1 + (s - 1) u) (Esser et al. 2024, arXiv:2403.03206, section 5.3.2). All values are float64 in NumPy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from monarch_jax.checks import brief

NUM_TRAIN_TIMESTEPS = 1000
UNIPC_FIRST = 0.999  # first u of Wan's UniPC grid


class Schedule(NamedTuple):
    """The noise levels of a sampler.

    Attributes:
        sigmas: Noise levels, decreasing, [steps + 1]; the last is 0.
        timesteps: Timestep given to the network at each level but the last, [steps].
    """

    sigmas: Float64[np.ndarray, "steps_plus_1"]
    timesteps: Float64[np.ndarray, "steps"]


def shifted[U: (float, Float64[np.ndarray, "*n"])](u: U, shift: float) -> U:
    """Shifts noise levels u in [0, 1] towards 1: sigma = s u / (1 + (s - 1) u), s = `shift`. The inverse is by 1/s.

    Examples:
        >>> shifted(np.array([0.0, 0.5, 1.0]), 5.0).round(4).tolist()
        [0.0, 0.8333, 1.0]
    """
    return shift * u / (1 + (shift - 1) * u)


def _check(steps: int, shift: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r} is not a positive integer, for example 50.")
    if not shift > 0:
        raise ValueError(f"shift={shift!r} is not positive; Wan uses 3, 5 or 8.")


def _ending_in_data(sigmas: np.ndarray) -> np.ndarray:
    return np.append(sigmas, 0.0)


def uniform_schedule(steps: int, shift: float = 5.0, *, start: float = 1.0) -> Schedule:
    """Levels that are evenly spaced in u, down to 0, and shifted; the timestep is 1000 sigma.

    Examples:
        >>> uniform_schedule(4, 5.0).timesteps.round(1).tolist()
        [1000.0, 937.5, 833.3, 625.0]
        >>> uniform_schedule(2, 5.0, start=0.5).sigmas.round(4).tolist()
        [0.5, 0.3125, 0.0]

    Args:
        steps: Number of network calls.
        shift: Shift s.
        start: First level sigma in (0, 1]; below 1 to start from a noised clip rather than from noise.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is not positive, or `start` exceeds 1.
    """
    _check(steps, shift)
    if not 0 < start <= 1:
        raise ValueError(f"start={start!r} is not a noise level in (0, 1], for example 1.")
    first = 1.0 if start == 1 else shifted(start, 1 / shift)  # the inverse shift
    sigmas = shifted(np.linspace(first, 0, steps + 1), shift)
    return Schedule(sigmas, NUM_TRAIN_TIMESTEPS * sigmas[:-1])


def truncated_schedule(steps: int, shift: float = 5.0) -> Schedule:
    """As `uniform_schedule`, with timesteps truncated to whole numbers, as in Wan's DPM-Solver++.

    Wan truncates float64 values, so a timestep that is 600 in theory and 599.9999999999999 in float64 becomes 599.

    Examples:
        >>> truncated_schedule(4, 5.0).timesteps.tolist()
        [1000.0, 937.0, 833.0, 625.0]
    """
    sigmas, timesteps = uniform_schedule(steps, shift)
    return Schedule(sigmas, np.trunc(timesteps))


def unipc_schedule(steps: int, shift: float = 5.0) -> Schedule:
    """The grid of Wan 2.1's UniPC: even in u from 0.999 down, shifted; timesteps are truncated, levels are not.

    Examples:
        >>> unipc_schedule(50, 8.0).timesteps[:4].tolist()
        [999.0, 997.0, 994.0, 991.0]

    Args:
        steps: Number of network calls.
        shift: s; Wan advises 8 for 1.3B at 480p, 5 otherwise.

    Returns:
        The schedule.

    Raises:
        ValueError: If an argument is not positive.
    """
    _check(steps, shift)
    sigmas = shifted(np.linspace(UNIPC_FIRST, 0, steps + 1)[:-1], shift)
    # Wan's 0.999 is float32, which is slightly larger: timesteps just below an integer in float64 are not truncated
    return Schedule(_ending_in_data(sigmas), np.trunc(np.round(NUM_TRAIN_TIMESTEPS * sigmas, 9)))


def few_step_schedule(steps: Sequence[int] = (1000, 750, 500, 250), shift: float = 5.0) -> Schedule:
    """The levels of a distilled few-step model (Self-Forcing, arXiv:2506.08009, section 3.3).

    Step n stands for entry 1000 - n of the shifted training grid, whose entry j is u = 1 - j/1000.

    Examples:
        >>> few_step_schedule().timesteps.round(4).tolist()
        [1000.0, 937.5, 833.3333, 625.0]

    Args:
        steps: Decreasing steps between 1000 and 1.
        shift: Shift s.

    Returns:
        The schedule.

    Raises:
        ValueError: If the steps are not decreasing or out of range.
    """
    steps = [int(step) if step == int(step) else step for step in steps]
    if not all(isinstance(step, int) for step in steps):
        raise ValueError(f"steps={brief(steps)} are not whole numbers in 1...1000, for example 1000, 750, 500, 250.")
    if not steps or sorted(set(steps), reverse=True) != steps or not 1 <= steps[-1] <= steps[0] <= NUM_TRAIN_TIMESTEPS:
        raise ValueError(
            f"steps={brief(steps)} are not decreasing indices in 1...1000, for example 1000, 750, 500, 250."
        )
    _check(len(steps), shift)
    grid = shifted(1 - np.arange(NUM_TRAIN_TIMESTEPS) / NUM_TRAIN_TIMESTEPS, shift)
    sigmas = grid[[NUM_TRAIN_TIMESTEPS - step for step in steps]]
    return Schedule(_ending_in_data(sigmas), NUM_TRAIN_TIMESTEPS * sigmas)
