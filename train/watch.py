"""Checks of logged figures that show early that a training collapses, and their warnings."""

import collections
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from monarchrt.models.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Check:
    """Bounds of a logged figure, relative to an earlier value.

    Attributes:
        figure: Name in the log, such as `student/motion`, or a pattern, whose figures are averaged.
        what: Description of the figure.
        means: Meaning of a figure out of bounds, and what to do.
        below: Warn if the figure is below this multiple of the reference.
        above: Warn if the figure is above this multiple of the reference, and above `least`.
        least: Value that the figure must exceed for a warning by `above`.
        reference: "first" for the mean of the first window, "lowest" for the lowest mean so far.
        window: Number of updates over which the figure is averaged.

    Examples:
        >>> Check(figure="student/motion", what="motion", means="it stands still", below=0.5).window
        20
    """

    figure: str
    what: str
    means: str
    below: float = 0.0
    above: float = math.inf
    least: float = -math.inf
    reference: Literal["first", "lowest"] = "first"
    window: int = 20

    def __post_init__(self) -> None:
        if self.window < 1 or not 0 <= self.below < self.above:
            raise UserError(f"window is {self.window}, below {self.below}, above {self.above}; give 0 <= below < above")


class _Follower:
    """The state of one check over the records of a run."""

    def __init__(self, check: Check):
        self.check = check
        self._values: dict[str, collections.deque[float]] = {}
        self._seen = 0
        self._reference: float | None = None
        self._warned = False

    def add(self, record: Mapping[str, float]) -> tuple[float, float] | None:
        """Adds a record; returns the value and the reference if the figure has just left its bounds."""
        check, figures = self.check, fnmatch.filter(record, self.check.figure)
        if not figures:
            return None
        self._seen += 1
        for name in figures:
            if math.isfinite(value := float(record[name])):
                self._values.setdefault(name, collections.deque(maxlen=check.window)).append(value)
        if self._seen < check.window or not self._values:
            return None
        # all figures of a pattern have the same weight, however often each is logged
        means = [math.fsum(values) / len(values) for values in self._values.values()]
        value = math.fsum(means) / len(means)
        if self._reference is None or (check.reference == "lowest" and value < self._reference):
            self._reference = value
        high = value > check.above * self._reference and value > check.least
        outside = high or value < check.below * self._reference
        news, self._warned = outside and not self._warned, outside
        return (value, self._reference) if news else None


class Watch:
    """Applies checks to the log of a run.

    Args:
        checks: The checks.

    Examples:
        >>> check = Check(figure="motion", what="the motion", means="the video stands still", below=0.5, window=1)
        >>> watch = Watch([check])
        >>> [watch.add(step, {"motion": value}) for step, value in enumerate((1.0, 0.8, 0.2))]
        [[], [], ['step 2: the motion (motion) is 0.2, it was 1: the video stands still']]
    """

    def __init__(self, checks: Sequence[Check]):
        self._followers = [_Follower(check) for check in checks]

    def add(self, step: int, record: Mapping[str, float]) -> list[str]:
        """Adds a record; returns the warnings, each once until its figure is back within the bounds.

        Args:
            step: Step of the record.
            record: Scalars by their names in the log.
        """
        lines = []
        for follower in self._followers:
            alarm = follower.add(record)
            if alarm is not None:
                check, (value, reference) = follower.check, alarm
                lines.append(
                    f"step {step}: {check.what} ({check.figure}) is {value:.3g}, it was {reference:.3g}: {check.means}"
                )
        return lines

    def replay(self, records: Iterable[Mapping]) -> None:
        """Adds the records of a resumed run's log; its warnings are not returned again."""
        for record in records:
            self.add(record["step"], {name: float(x) for name, x in record.items() if _is_number(x)})


def _is_number(value: object) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf")
