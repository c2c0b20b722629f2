"""When the weights of a layer are gathered, where devices share them: a layer ahead, if there is memory for that."""

from collections.abc import Callable
from dataclasses import dataclass

from monarchrt.models.memory import shown
from monarchrt.train.remat import SPARE


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """What was chosen.

    Attributes:
        ahead: Whether a layer's weights are gathered while the layer before it computes, else beside its own products.
        taken: Bytes of a step with weights that are gathered ahead, on each device; None if its compiler does not say.
        available: Bytes of each device.
    """

    ahead: bool
    taken: int | None
    available: int

    def __str__(self) -> str:
        if self.ahead:
            return "a layer's weights are gathered while the layer before it computes"
        return (
            f"a layer's weights are gathered beside its own products: while the layer before it computes, a step would "
            f"take {shown(self.taken or 0)} of {shown(self.available)} on each device"
        )


def fitting[Step](
    compiled: Callable[[bool], Step],
    taken: Callable[[Step], int | None],
    *,
    available: int,
    agreed: Callable[[bool], bool] = bool,
) -> tuple[Step, Gathering]:
    """The step with weights that are gathered a layer ahead, or, where that does not leave `SPARE`, without.

    Args:
        compiled: Makes the step, with weights gathered ahead or not, and compiles its programs.
        taken: What these take on each device; None if their compiler does not say.
        available: Bytes of each device.
        agreed: Whether it fits in all processes, of whether it does in this one.

    Returns:
        The step, and what was chosen.
    """
    step = compiled(True)
    most = taken(step)
    ahead = agreed(most is None or most <= int(available * (1 - SPARE)))
    return (step if ahead else compiled(False)), Gathering(ahead=ahead, taken=most, available=available)
