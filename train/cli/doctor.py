"""`monarchrt doctor`: what runs on this machine, why, and how fast."""

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from monarchrt.models.errors import UserError
from monarchrt.train.cli.parsing import parse
from monarchrt.train.doctor import Case, Choice, Finding, Speed

SMALL = Case(grid=(6, 15, 26), tile=(1, 15, 26), heads=2, head_dim=64)  # seconds on a CPU
MOST_SCORES = 2**30  # bytes of dense attention's scores that are still timed on a CPU
CASES = (Case(grid=(21, 30, 52), tile=(1, 30, 52)), Case(grid=(21, 30, 52), tile=(3, 30, 52)))


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check this machine: versions, driver, devices, which implementation supports which call, folders, and speed.

    Exits with code 1 if something needs fixing.

    monarchrt doctor

    monarchrt doctor --grid 21 45 80 --tile 3 45 80 --num-iters 2
    """

    grid: tuple[int, int, int] | None = None
    """Latent frames, rows and columns of tokens of a case to check. Default: Wan's at 480p."""

    tile: tuple[int, int, int] | None = None
    """Frames, rows and columns of a tile. Default: one frame, (1, h, w)."""

    heads: int = 12
    """Heads of the attention."""

    head_dim: int = 128
    """Channels per head."""

    num_iters: int = 1
    """Refinement steps."""

    speed: bool = True
    """Time the case, which takes about ten seconds."""

    def __post_init__(self) -> None:
        for name in ("heads", "head_dim", "num_iters"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.tile is not None and self.grid is None:
            raise UserError(f"tile is {self.tile}, but no grid was given; give --grid FRAMES ROWS COLUMNS too")


def doctor_command(arguments: Sequence[str]) -> int:
    """`monarchrt doctor`."""
    config = parse(DoctorConfig, arguments, prog="monarchrt doctor")
    cases = _cases(config)
    from monarchrt.train import doctor

    wrong = _show("versions", doctor.versions())
    wrong += _show("machine", [doctor.driver(), doctor.devices()])
    wrong += _show("folders", doctor.folders())
    for case in cases:
        try:
            _show_choice(case, doctor.choice(case))
        except ValueError as error:
            raise UserError(str(error)) from None
    if config.speed:
        case = _timed(config, cases[0])
        _show_speed(case, doctor.speed(case))
        if config.grid is not None and case != cases[0]:
            print(f"  (grid {config.grid} is too large for dense attention without a GPU)")
    print(f"\n{wrong} thing(s) to fix, marked with !" if wrong else "\nnothing to fix")
    return 1 if wrong else 0


def _cases(config: DoctorConfig) -> list[Case]:
    """The cases to check; raises UserError for one that is none."""
    from monarch_jax import MonarchSpec

    cases: Iterable[Case] = CASES
    if config.grid is not None:
        cases = [Case(grid=config.grid, tile=config.tile or (1, *config.grid[1:]))]
    cases = [replace(case, heads=config.heads, head_dim=config.head_dim, num_iters=config.num_iters) for case in cases]
    for case in cases:
        try:
            MonarchSpec(grid=case.grid, tile=case.tile, num_iters=case.num_iters)
        except ValueError as error:
            raise UserError(str(error)) from None
    return cases


def _timed(config: DoctorConfig, case: Case) -> Case:
    """The case that is timed: a small one without a GPU, unless one was given whose dense scores fit the memory."""
    import jax

    scores = 4 * case.heads * math.prod(case.grid) ** 2  # bytes, in float32
    if jax.default_backend() == "gpu" or (config.grid is not None and scores <= MOST_SCORES):
        return case
    return replace(SMALL, num_iters=config.num_iters)


def _show(title: str, findings: Iterable[Finding]) -> int:
    """Prints findings; returns how many need fixing."""
    print(f"\n{title}")
    wrong = 0
    for finding in findings:
        needs_fixing = finding.advice is not None and not finding.optional
        wrong += needs_fixing
        mark = "!" if needs_fixing else " "
        print(f"{mark} {finding.name:<22}{finding.found}{f'  ({finding.advice})' if finding.advice else ''}")
    return wrong


def _call(case: Case) -> str:
    steps = f", {case.num_iters} refinement steps" if case.num_iters > 1 else ""
    return f"grid {case.grid}, tile {case.tile}, {case.heads} heads of {case.head_dim}{steps}"


def _show_choice(case: Case, choice: Choice) -> None:
    print(f"\nattention on {_call(case)}, bfloat16: {choice.chosen}")
    for name, reason in choice.reasons.items():
        print(f"  {name:<22}{'supported' if reason is None else f'not supported: {reason}'}")


def _show_speed(case: Case, speed: Speed) -> None:
    sys.stdout.flush()
    print(f"\nspeed on {_call(case)}, forward")
    print(f"  {'dense':<22}{speed.dense:.2f} ms")
    print(f"  {speed.implementation:<22}{speed.monarch:.2f} ms, {speed.dense / speed.monarch:.1f} times as fast")
    if speed.expected is not None:
        print(f"  {'expected':<22}{speed.expected:.2f} ms on this card, measured here {speed.monarch:.2f}")
