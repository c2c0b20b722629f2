"""`monarchrt bench generate`: times video generation with a checkpoint on this machine."""

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.train.cli.parsing import parse
from monarchrt.train.cli.serve import VideoOptions
from monarchrt.train.cli.tables import say
from monarchrt.train.interrupt import finish_first

_BENCH = """Time video generation block by block: cold and steady, percentiles, stages, and whether playback stalls.

monarchrt bench generate                                   random weights of Wan 2.1 1.3B: how fast is this machine?

monarchrt bench generate --checkpoint self_forcing_dmd.pt --components Wan-AI/Wan2.1-T2V-1.3B --tile 3 30 52 --json"""
LEAST = 4  # blocks, at least: the first ones are not counted as steady


@dataclass(frozen=True, kw_only=True)
class BenchOptions(VideoOptions):
    """Time a Wan 2.1 checkpoint or a run."""

    preset: str | None = None
    """Without a checkpoint: random weights of this preset's sizes. Default, with a GPU: wan2.1-t2v-1.3b."""

    count: int = 28
    """Blocks of the timed stream, at least 4; percentiles need many, such as 2000 for five minutes."""

    rate: float = 16.0
    """Frames per second at which the stream is played."""

    paced: bool = False
    """Also time blocks that are generated at that speed, as sessions do by default, instead of one after the other."""

    priority: Literal["auto", "normal"] = "auto"
    """Priority on the host's cores. auto: with an accelerator raised to nice -10, where that is permitted."""

    json: bool = False
    """Print only JSON to standard output."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count < LEAST:
            raise UserError(f"count is {self.count}; it must be at least {LEAST}")
        if not 0.1 <= self.rate <= 1000:
            raise UserError(f"rate is {self.rate}; it must lie in [0.1, 1000]")


def bench_command(arguments: Sequence[str]) -> int:
    """`monarchrt bench`."""
    given = list(arguments)
    if given[:1] == ["generate"]:
        given = given[1:]
    elif given and not given[0].startswith("-"):
        raise UserError(f"bench {given[0]!r} is unknown; give generate: monarchrt bench generate")
    options = parse(BenchOptions, given, prog="monarchrt bench generate", description=_BENCH)
    if options.checkpoint is not None and options.preset is not None:
        raise UserError(f"preset is {options.preset}, but the checkpoint defines the sizes; give one of the two")
    with finish_first():
        import jax

        from monarchrt.models.serve.bench import Samples, summarize, take_samples
        from monarchrt.models.serve.load import load_engine, random_engine
        from monarchrt.models.serve.priority import set_priority

    preset = options.preset
    if options.checkpoint is None and preset is None:
        if jax.default_backend() == "cpu":
            raise UserError(
                "there is no GPU, and networks of true size would take hours; give --checkpoint, for example "
                "runs/demo/monarch after `monarchrt demo`, or --preset tiny"
            )
        preset = "wan2.1-t2v-1.3b"

    config = GenerateConfig(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(GenerateConfig)}
    )
    begin = time.monotonic()

    make = load_engine if preset is None else partial(random_engine, preset=preset)
    engine = make(config, unroll=options.unroll, report=say)
    loaded = time.monotonic() - begin
    set_priority(options.priority, say)
    samples, stopped = Samples(), None
    try:
        take_samples(engine, samples, blocks=options.count, pace=options.rate if options.paced else None)
    except KeyboardInterrupt as error:  # what was measured by then is printed
        stopped = error
    measured = summarize(engine, samples, fps=options.rate)
    measured["cold"] = {"load": loaded} | measured["cold"]
    measured["weights"] = str(options.checkpoint) if preset is None else f"random, {preset}"
    if stopped is not None:
        measured["stopped"] = True
    print(json.dumps(measured, indent=1) if options.json else "\n".join(_lines(measured, count=options.count)))
    if stopped is not None:
        raise stopped
    return 0


def _lines(measured: dict[str, Any], *, count: int) -> list[str]:
    """The lines of the report; an interrupted measurement lacks those for which it has no values."""
    cold, steady, cadence = measured["cold"], measured["steady"], measured["cadence"]
    size = f"{measured['height']}x{measured['width']}"

    def shares(name: str, part: str = "steady") -> str:
        return ", ".join(f"{share} {value:.1f}" for share, value in measured[part][name].items())

    lines = [f"{measured['device']}, jax {measured['versions']['jax']}; {size}, {measured['attention']}"]
    if measured.get("stopped"):
        lines.append(f"stopped   after {measured['blocks']} of {count} blocks of the stream: not all is measured")
    if "first_frames" in cold:
        lines.append(f"cold      loaded in {cold['load']:.1f} s, first frames {cold['first_frames']:.2f} s later")
    if "first_frames" in steady:
        lines.append(
            f"steady    first frames after {steady['first_frames']:.3f} s (text aside), "
            f"{steady['frames_per_second']:.1f} frames/s"
        )
    if "block_ms" in steady:
        lines.append(f"block     {shares('block_ms')} ms; p99/p50 {steady['p99_over_p50']:.2f}")
    notes = {"text": ", once for each prompt"} | dict.fromkeys(
        measured["formats"], ", while the next block is generated"
    )
    lines += [
        f"{name:<9} {shares(f'{name}_ms')} ms{notes.get(name, '')}"
        for name in ("network", "decoder", "text", *measured["formats"])
        if f"{name}_ms" in steady
    ]
    if "paced" in measured:
        names = [name for name in ("network", "decoder") if f"{name}_ms" in measured["paced"]]
        stages = "; ".join(f"{name} {shares(f'{name}_ms', 'paced')} ms" for name in names)
        lines.append(f"paced     at {cadence['fps']:g} frames/s: {stages}")
    if "underruns" in cadence:
        lines.append(
            f"play      at {cadence['fps']:g} frames/s: {cadence['deadlines_met']:.0%} of blocks in time, stalled "
            f"{cadence['underruns']} times, {cadence['stood']:.2f} s"
        )
    memory = (f"{name.replace('_', ' ')} {size / 2**30:.2f} GiB" for name, size in measured["memory"].items())
    return [*lines, f"memory    {', '.join(memory)}"]
