"""Figures of the log that show early that a training collapses, and the warning that names them."""

import collections
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from monarchrt.models.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Check:
    """A figure that should stay near where it was.

    Attributes:
        figure: Name in the log, such as `student/motion`, or a pattern, whose figures are averaged.
        what: What the figure is, in words.
        means: What it means if it leaves its bounds, and what to do.
        below: Least share of the reference.
        above: Largest multiple of the reference.
        least: Nothing is said of values that are not above it.
        reference: Mean of the first window, or of the lowest so far.
        window: Updates that are averaged.

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
    """One check over the records of a run."""

    def __init__(self, check: Check):
        self.check = check
        self._values: dict[str, collections.deque[float]] = {}
        self._seen = 0
        self._reference: float | None = None
        self._warned = False

    def add(self, record: Mapping[str, float]) -> tuple[float, float] | None:
        """The value and the reference, if the figure has just left its bounds."""
        check, figures = self.check, fnmatch.filter(record, self.check.figure)
        if not figures:
            return None
        self._seen += 1
        for name in figures:
            if math.isfinite(value := float(record[name])):
                self._values.setdefault(name, collections.deque(maxlen=check.window)).append(value)
        if self._seen < check.window or not self._values:
            return None
        # each figure of a pattern counts as much, however often it is there
        means = [math.fsum(values) / len(values) for values in self._values.values()]
        value = math.fsum(means) / len(means)
        if self._reference is None or (check.reference == "lowest" and value < self._reference):
            self._reference = value
        high = value > check.above * self._reference and value > check.least
        outside = high or value < check.below * self._reference
        news, self._warned = outside and not self._warned, outside
        return (value, self._reference) if news else None


class Watch:
    """Follows the log of a run.

    Args:
        checks: What to look at.

    Examples:
        >>> check = Check(figure="motion", what="the motion", means="the video stands still", below=0.5, window=1)
        >>> watch = Watch([check])
        >>> [watch.add(step, {"motion": value}) for step, value in enumerate((1.0, 0.8, 0.2))]
        [[], [], ['step 2: the motion (motion) is 0.2, it was 1: the video stands still']]
    """

    def __init__(self, checks: Sequence[Check]):
        self._followers = [_Follower(check) for check in checks]

    def add(self, step: int, record: Mapping[str, float]) -> list[str]:
        """What is to be warned of, once each until the figure is back within its bounds.

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
        """Takes in the log that a resumed run goes on with; what it warned of is not said again."""
        for record in records:
            self.add(record["step"], {name: float(x) for name, x in record.items() if _is_number(x)})


def _is_number(value: object) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("nan", "inf", "-inf")
