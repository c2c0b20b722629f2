"""Whether devices that share weights gather those of a layer while the previous one computes, if memory allows it."""

from collections.abc import Callable
from dataclasses import dataclass

from monarchrt.models.memory import shown
from monarchrt.train.remat import SPARE


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """The choice.

    Attributes:
        ahead: Whether a layer's weights are gathered while the previous layer computes; otherwise during its own
            computation.
        taken: Bytes on each device of a step that gathers ahead; None if its compiler does not report them.
        available: Bytes of memory of each device.
    """

    ahead: bool
    taken: int | None
    available: int

    def __str__(self) -> str:
        if self.ahead:
            return "a layer's weights are gathered while the layer before it computes"
        return (
            f"a layer's weights are gathered when it computes: gathered while the layer before it computes, a step "
            f"would take {shown(self.taken or 0)} of {shown(self.available)} on each device"
        )


def fitting[Step](
    compiled: Callable[[bool], Step],
    taken: Callable[[Step], int | None],
    *,
    available: int,
    agreed: Callable[[bool], bool] = bool,
) -> tuple[Step, Gathering]:
    """Compiles the step that gathers weights a layer ahead, or, if that does not leave `SPARE`, the one that does not.

    Args:
        compiled: Makes the step and compiles its programs, gathering ahead or not.
        taken: Bytes of a step on each device; None if its compiler does not report them.
        available: Bytes of memory of each device.
        agreed: Maps whether the step fits in this process to whether it fits in all processes.

    Returns:
        The step, and the choice.
    """
    step = compiled(True)
    most = taken(step)
    ahead = agreed(most is None or most <= int(available * (1 - SPARE)))
    return (step if ahead else compiled(False)), Gathering(ahead=ahead, taken=most, available=available)
