"""Collectives of a compiled program: their kinds, sizes and number, parsed from its HLO text."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8}
_BYTES |= {"bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-~]+)\s*\(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-~]+ = (.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-~]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective of a program.

    Attributes:
        kind: One of `KINDS`.
        shapes: Shapes of its results, on one device.
        bytes: Bytes of its results, on one device.
        times: Number of executions in one run of the program, where loops of unknown length count as one iteration.
        loops: Number of loops around it.
    """

    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int
    times: int
    loops: int


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program.

    Args:
        text: The HLO text, `compiled.as_text()`.

    Returns:
        Each collective instruction once.

    Examples:
        >>> collectives('''
        ... %body (p: f32[2]) -> f32[4] {
        ...   ROOT %g = f32[4]{0} all-gather(%p), dimensions={0}
        ... }
        ... ENTRY %main (p: f32[2]) -> f32[4] {
        ...   ROOT %w = f32[4]{0} while(%p), body=%body, backend_config={"known_trip_count":{"n":"3"}}
        ... }''')
        [Collective(kind='all-gather', shapes=((4,),), bytes=16, times=3, loops=1)]
    """
    bodies, entry = _computations(text)
    exchanges: list[Collective] = []

    def walk(name: str, times: int, loops: int) -> None:
        for line in bodies.get(name, ()):
            result, _, _ = line.partition(", metadata=")
            kind = next((kind for kind in KINDS if re.search(rf"[\s)}}\]]{kind}(-start)?\(", result)), None)
            if kind is not None:
                exchanges.append(_collective(kind, result, times, loops))
                continue  # the computation that it applies to pairs of numbers has no collectives
            inner = " while(" in result
            trips = _TRIPS.search(line)
            count = int(trips[1]) if inner and trips else 1
            for called in _CALLED.findall(result):
                for each in re.findall(r"[\w.\-~]+", called):
                    walk(each, times * count, loops + inner)

    walk(entry, 1, 0)
    return exchanges


def summary(collectives: Iterable[Collective]) -> dict[str, tuple[int, int]]:
    """Number of executions per run and total bytes of results, for each kind that occurs.

    Examples:
        >>> summary([Collective("all-gather", ((4,),), 16, 3, 1), Collective("all-gather", ((2,),), 8, 1, 0)])
        {'all-gather': (4, 56)}
    """
    number: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for item in collectives:
        number[item.kind] += item.times
        size[item.kind] += item.times * item.bytes
    return {kind: (number[kind], size[kind]) for kind in KINDS if number[kind]}


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if (start := _COMPUTATION.match(line)) is not None and " = " not in line.partition("(")[0]:
            current = bodies.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif current is not None and (instruction := _INSTRUCTION.match(line)) is not None:
            current.append(instruction[1])
    return bodies, entry


def _collective(kind: str, result: str, times: int, loops: int) -> Collective:
    before, _, after = result.partition(f"{kind}-start(")
    started = bool(after)
    if not started:
        before = result.partition(f"{kind}(")[0]
    _, apart, results = before.partition("), ") if before.startswith("((") else ("", "", before)
    arrays = [(dtype, tuple(int(n) for n in sizes.split(",") if n)) for dtype, sizes in _ARRAY.findall(results)]
    if started and not apart and kind != "all-reduce" and len(arrays) > 1:  # operands come first
        arrays = arrays[len(arrays) // 2 :]
    size = sum(math.prod(shape) * _BYTES.get(dtype, 1) for dtype, shape in arrays)
    return Collective(kind, tuple(shape for _, shape in arrays), size, times, loops)
