"""`--remat auto`: chooses the kind of recomputation with the least work that fits the device's memory."""

import dataclasses
from collections.abc import Callable, Container
from dataclasses import dataclass

from monarchrt.models.memory import shown
from monarchrt.train.config import AUTO, REMAT, TrainConfig

SPARE = 0.1  # fraction of a device's memory left for prefetched batches, held-out errors and fragmentation
_BEYOND = 1.25  # kinds whose estimate exceeds the memory by this factor are not compiled


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A kind of recomputation and its memory.

    Attributes:
        kind: A value of `WanConfig.remat`.
        taken: Bytes of a step on each device.
        compiled: Whether the compiler reported them; otherwise they are the estimate.
    """

    kind: str
    taken: int
    compiled: bool

    def __str__(self) -> str:
        return f"{self.kind} takes {shown(self.taken)}{'' if self.compiled else ' (estimate)'}"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The choice.

    Attributes:
        roles: The roles whose networks it is for.
        tried: The kinds that were tried, in order; the last is the choice.
        available: Bytes of memory of each device.
        fits: Whether the choice leaves `SPARE` of the memory.
    """

    roles: tuple[str, ...]
    tried: tuple[Tried, ...]
    available: int
    fits: bool

    @property
    def kind(self) -> str:
        """The chosen kind."""
        return self.tried[-1].kind

    def __str__(self) -> str:
        *others, last = self.tried
        whose = f" of {' and '.join(self.roles)}" if len(self.roles) > 1 else ""
        why = f"; {', '.join(map(str, others))}" if others else ", and nothing is recomputed"
        lacks = "" if self.fits else ", and nothing takes less"
        return f"remat auto{whose}: {last} of {shown(self.available)} on each device{why}{lacks}"


def automatic(config: TrainConfig, *, given: Container[str] = ()) -> tuple[str, ...]:
    """The roles that train with `remat="auto"`, except those whose networks are `given` as modules.

    Examples:
        >>> from monarchrt.train.config import ModelConfig
        >>> automatic(TrainConfig(model=ModelConfig(remat="auto"))), automatic(TrainConfig())
        (('student',), ())
    """
    training = config.objective.training
    return tuple(name for name in training if config.role(name).model.remat == AUTO and name not in given)


def with_remat(config: TrainConfig, roles: Container[str], kind: str) -> TrainConfig:
    """The settings with `remat=kind` for some roles."""

    def changed(model):
        return dataclasses.replace(model, remat=kind)

    further = {
        name: dataclasses.replace(role, model=changed(role.model)) if name in roles else role
        for name, role in config.roles.items()
    }
    model = changed(config.model) if config.objective.exported in roles else config.model
    return dataclasses.replace(config, model=model, roles=further)


def choose(
    roles: tuple[str, ...],
    *,
    available: int,
    estimate: Callable[[str], int],
    compiled: Callable[[str], int | None],
    agreed: Callable[[bool], bool] = bool,
) -> Choice:
    """Chooses the kind that recomputes the least among those that fit.

    Args:
        roles: The roles whose networks it is for.
        available: Bytes of memory of each device.
        estimate: Estimates the bytes of a step with a kind, from the traced loss.
        compiled: Compiles a step with a kind; returns its bytes, or None if the compiler does not report them.
        agreed: Maps whether a kind fits in this process to whether it fits in all processes.

    Returns:
        The choice, "full" if nothing fits.
    """
    most, tried = int(available * (1 - SPARE)), []
    for kind in REMAT:
        last = kind == REMAT[-1]
        expected = estimate(kind)
        if expected > _BEYOND * available and not last:
            tried.append(Tried(kind=kind, taken=expected, compiled=False))
            continue
        said = compiled(kind)
        tried.append(Tried(kind=kind, taken=expected if said is None else said, compiled=said is not None))
        fits = agreed(tried[-1].taken <= most)
        if fits or last:
            return Choice(roles=roles, tried=tuple(tried), available=available, fits=fits)
    raise AssertionError("the last kind is always taken")
