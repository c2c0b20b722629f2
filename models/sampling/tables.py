"""Solvers as tables of coefficients, computed in float64.

Every solver is linear in its history. At step n, with the network's data prediction m_n = x - sigma_n v:

    x      <- correct[n] . (x, y, m_n, m_{n-1}, m_{n-2})      y is the last step's corrected x
    x_next <- predict[n] . (x, m_n, m_{n-1}, fresh noise)

lambda = ln(1 - sigma) - ln sigma is half the log signal-to-noise ratio; it is infinite at sigma = 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from monarch_jax.checks import brief
from monarchrt.models.sampling.schedules import (
    Schedule,
    few_step_schedule,
    truncated_schedule,
    uniform_schedule,
    unipc_schedule,
)

SAMPLERS = ("unipc", "dpm++", "euler", "few-step")
FEW_STEPS = (1000, 750, 500, 250)
UNCHANGED = (1.0, 0.0, 0.0, 0.0, 0.0)


class SamplerTable(NamedTuple):
    """A sampler: one row per network call.

    Attributes:
        sigmas: Noise levels, [steps].
        timesteps: Timesteps given to the network, [steps].
        correct: Corrector coefficients, [steps, 5]; see the module.
        predict: Predictor coefficients, [steps, 4]; see the module.
    """

    sigmas: Float64[np.ndarray, "steps"]
    timesteps: Float64[np.ndarray, "steps"]
    correct: Float64[np.ndarray, "steps 5"]
    predict: Float64[np.ndarray, "steps 4"]

    @property
    def steps(self) -> int:
        """Number of network calls."""
        return len(self.sigmas)

    @property
    def stochastic(self) -> bool:
        """Whether steps add fresh noise."""
        return bool(np.any(self.predict[:, 3]))

    @property
    def noisy(self) -> Int[np.ndarray, "n"]:
        """Indices of the steps that add fresh noise."""
        return np.flatnonzero(self.predict[:, 3])

    def __hash__(self) -> int:  # a static argument of compiled programs, as part of their settings
        return hash(tuple(column.tobytes() for column in self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SamplerTable) and all(map(np.array_equal, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def check(self) -> None:
        """Raises ValueError unless the columns have one length, at least one row and finite values.

        Examples:
            >>> euler(uniform_schedule(2))._replace(sigmas=np.ones(3)).check()  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            ...
            ValueError: sampler: sigmas has shape (3,), timesteps (2,), correct (2, 5) and predict (2, 4); ...
        """
        shapes = [np.shape(column) for column in self]
        steps = len(self.predict) if shapes[3] else 0
        if not steps or shapes != [(steps,), (steps,), (steps, 5), (steps, 4)]:
            raise ValueError(
                f"sampler: sigmas has shape {shapes[0]}, timesteps {shapes[1]}, correct {shapes[2]} and predict "
                f"{shapes[3]}; n steps need (n,), (n,), (n, 5) and (n, 4)."
            )
        for name, column in zip(self._fields, self, strict=True):
            if not np.isfinite(column).all():
                raise ValueError(f"sampler: {name} is not finite: {np.asarray(column).tolist()}.")

    def with_rewrite(self, timestep: float = 0.0) -> "SamplerTable":
        """The table with one more call, on the finished latents at `timestep`, which only rewrites the cache.

        Examples:
            >>> few_step(few_step_schedule()).with_rewrite().timesteps.round(1).tolist()
            [1000.0, 937.5, 833.3, 625.0, 0.0]
        """
        row = SamplerTable(
            np.zeros(1), np.full(1, float(timestep)), np.array([UNCHANGED]), np.array([[1.0, 0.0, 0.0, 0.0]])
        )
        return SamplerTable(*(np.concatenate(pair) for pair in zip(self, row, strict=True)))


def _log_snr(sigmas: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log1p(-sigmas) - np.log(sigmas)


def _table(schedule: Schedule, correct: list, predict: list) -> SamplerTable:
    return SamplerTable(
        schedule.sigmas[:-1].copy(), schedule.timesteps.copy(), np.array(correct, float), np.array(predict, float)
    )


def _multistep(sigmas: np.ndarray, n: int, order: int) -> tuple[float, float, float, float]:
    """Data-prediction step of order 1 or 2 from level n to n + 1 (DPM-Solver++ 2M; the predictor of UniPC-bh2)."""
    lam = _log_snr(sigmas)
    h, alpha = lam[n + 1] - lam[n], 1 - sigmas[n + 1]
    scaled = -alpha * np.expm1(-h)  # 1 - exp(-h), times alpha
    second = 0.0
    if order == 2:
        second = 0.5 * scaled * h / (lam[n] - lam[n - 1])
    return float(sigmas[n + 1] / sigmas[n]), float(scaled + second), float(0.0 - second), 0.0


def euler(schedule: Schedule) -> SamplerTable:
    """Euler steps along the flow, x + (sigma_{n+1} - sigma_n) v.

    Examples:
        >>> euler(uniform_schedule(2, 1.0)).predict.tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    """
    ratio = schedule.sigmas[1:] / schedule.sigmas[:-1]
    return _table(schedule, [UNCHANGED] * len(ratio), [(r, 1 - r, 0.0, 0.0) for r in ratio])


def dpmpp_2m(schedule: Schedule) -> SamplerTable:
    """DPM-Solver++ of order 2, multistep, midpoint (Lu et al. 2022, arXiv:2211.01095, algorithm 2).

    The first step and the last one, to sigma = 0, have order 1.

    Examples:
        >>> dpmpp_2m(uniform_schedule(4, 1.0)).predict[[0, 3]].tolist()
        [[0.75, 0.25, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    """
    sigmas, steps = schedule.sigmas, len(schedule.timesteps)
    orders = [2 if 0 < n < steps - 1 else 1 for n in range(steps)]  # after sigma = 1 the second order's weight is 0
    return _table(schedule, [UNCHANGED] * steps, [_multistep(sigmas, n, orders[n]) for n in range(steps)])


def unipc(schedule: Schedule) -> SamplerTable:
    """UniPC of order 2 with B(h) = e^h - 1, data prediction, and the corrector (Zhao et al. 2023, arXiv:2302.04867).

    Examples:
        >>> table = unipc(unipc_schedule(4, 5.0))
        >>> table.correct[0].tolist(), table.predict[-1].tolist()
        ([1.0, 0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0])

    Args:
        schedule: A schedule from below sigma = 1 down to 0.

    Returns:
        The table. The first and the last step have order 1.

    Raises:
        ValueError: If the schedule begins at sigma = 1.
    """
    sigmas, steps = schedule.sigmas, len(schedule.timesteps)
    if sigmas[0] >= 1:
        raise ValueError(f"sigmas begin at {sigmas[0]}; UniPC needs less than 1, as unipc_schedule gives.")
    orders = [min(2, steps - n, n + 1) for n in range(steps)]
    correct = [UNCHANGED] + [_correct(sigmas, n, orders[n - 1]) for n in range(1, steps)]
    return _table(schedule, correct, [_multistep(sigmas, n, orders[n]) for n in range(steps)])


def _correct(sigmas: np.ndarray, n: int, order: int) -> tuple[float, float, float, float, float]:
    """UniC for the step from level n - 1 to n, whose predictor was of `order`."""
    lam = _log_snr(sigmas)
    h, alpha = lam[n] - lam[n - 1], 1 - sigmas[n]
    beta = np.expm1(-h)
    if order == 1:
        older, now = 0.0, 0.5
    else:
        r = (lam[n - 2] - lam[n - 1]) / h
        g1 = beta / -h - 1
        g2 = g1 / -h - 0.5
        rho = np.linalg.solve([[1.0, 1.0], [r, 1.0]], [g1 / beta, 2 * g2 / beta])
        older, now = rho[0] / r, rho[1]
    scaled = -alpha * beta
    return (
        0.0,
        float(sigmas[n] / sigmas[n - 1]),
        float(scaled * now),
        float(scaled * (1 - older - now)),
        float(scaled * older),
    )


def few_step(schedule: Schedule) -> SamplerTable:
    """The sampler of distilled models, which predicts the data and adds fresh noise up to the next level.

    Self-Forcing (arXiv:2506.08009), algorithm 1; consistency models (arXiv:2303.01469), algorithm 1.

    Examples:
        >>> few_step(few_step_schedule()).predict.round(4)[:2].tolist()
        [[0.0, 0.0625, 0.0, 0.9375], [0.0, 0.1667, 0.0, 0.8333]]
    """
    return _table(schedule, [UNCHANGED] * len(schedule.timesteps), [(0.0, 1 - s, 0.0, s) for s in schedule.sigmas[1:]])


def sampler_table(
    name: str | SamplerTable, *, steps: int | Sequence[int] | None = None, shift: float = 5.0
) -> SamplerTable:
    """A sampler by name, with the schedule that Wan uses for it.

    Examples:
        >>> sampler_table("few-step").steps, sampler_table("unipc", steps=20).steps
        (4, 20)
        >>> sampler_table("few-step", steps=(1000, 757, 522)).timesteps.round(1).tolist()
        [1000.0, 939.7, 845.2]

    Args:
        name: One of `SAMPLERS`: unipc, dpm++ and euler follow the flow in many steps; few-step is for distilled models.
            A table is checked and returned.
        steps: Number of network calls; None: 50, or 4 for few-step. For few-step also the list of its timesteps, as in
            `few_step_schedule`; a model should be sampled at those that it was distilled at.
        shift: Shift of the noise levels.

    Returns:
        The table.

    Raises:
        ValueError: If the name is unknown, or the steps are not valid for it.
    """
    if isinstance(name, SamplerTable):
        if steps is not None:
            raise ValueError(f"steps={steps} does not go with a table, which has its own {name.steps}; leave it out.")
        name.check()
        return name
    if name not in SAMPLERS:
        raise ValueError(f"sampler={name!r} is unknown; choose from {', '.join(SAMPLERS)}.")
    if isinstance(steps, Sequence):
        if name != "few-step":
            raise ValueError(
                f"steps={brief(tuple(steps))} is a list, which few-step takes; {name} takes a number, such as 50."
            )
        return few_step(few_step_schedule(steps, shift))
    if name == "few-step":
        count = len(FEW_STEPS) if steps is None else steps
        if not 1 <= count <= 1000:
            raise ValueError(f"steps={steps} is not in 1...1000; few-step models are distilled for 4.")
        return few_step(few_step_schedule([round(1000 * (count - n) / count) for n in range(count)], shift))
    count = 50 if steps is None else steps
    schedule, solver = {
        "unipc": (unipc_schedule, unipc),
        "dpm++": (truncated_schedule, dpmpp_2m),
        "euler": (uniform_schedule, euler),
    }[name]
    return solver(schedule(count, shift))
