"""Times a video from prompt to frames: text, transformer, VAE and end to end, with random weights at true size.

    python benchmarks/generate.py                                   # 81 frames at 480x832, on one GPU
    python benchmarks/generate.py --attention dense "monarch 97%"
    python benchmarks/generate.py --implementation triton           # a Monarch backend by name
    python benchmarks/generate.py --places one heads=2 heads=1,decoder     # on two GPUs, beside one of them
    python benchmarks/generate.py --wan wan2.1-t2v-14b --places one heads=2 one,unrolled,fp8 --network
    python benchmarks/generate.py --size 720 1280 --attention dense 'vsa(keep=0.15)'       # any size and kind
    python benchmarks/generate.py --mode bidirectional --attention dense "monarch 95%" 'vsa(keep=0.15)'   # Table 7
    python benchmarks/generate.py --tiny                            # tiny networks; runs without a GPU

Batch 1, bfloat16, the schedule of Self-Forcing: blocks of 3 latent frames, 4 calls with fresh noise each and one that
rewrites the cache; with --mode bidirectional 4 calls of the whole clip (paper, Table 7). "monarch 95%" has tiles of a
frame, (1, 30, 52), "monarch 97%" of three. Weights are random, which changes no time.

For each attention: the transformer alone (all blocks, latents only), and end to end (embeddings in, frames in the
host's memory out, VAE included) with the time to the first frames; medians over --repeats after one run that compiles.
A place is a mesh for the network as `monarchrt generate --mesh` takes it, "decoder" if the last GPU decodes and is none
of the mesh, "unrolled" for layers with arrays of their own, "passes" for kernels of few passes between their products,
and "fp8" for products in 8 bits; the small clip of each must be that of one GPU (in 8 bits it may be 0.1 from it).
--network times the transformer alone.
Text is one prompt of 512 tokens through umT5-XXL, without the tokenizer; it is in no other time but "with_text". VAE is
all latents, block by block as streamed. What is compiled after the first frames are there is counted and, of a stream,
must be nothing. Before anything is timed, a small clip with the timed Monarch backend is compared with its XLA path.
Writes generate.json into --out.
"""

import argparse
import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_settings import CHECKED, NAMED, name_or_notation, setting
from flax import nnx
from measuring import clock, heading, machine, median_seconds, write_report

from monarch_jax.backends import IMPLEMENTATIONS
from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.decoders import WanDecoder
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.places import Places, find_places
from monarchrt.models.generate.plan import Defaults, Plan, make_plan
from monarchrt.models.umt5 import UMT5Encoder, umt5_config
from monarchrt.models.vae import WanVAE, vae_config
from monarchrt.models.wan import WanConfig, WanModel, wan_config
from monarchrt.models.wan.fp8 import fp8_products
from monarchrt.models.wan.unrolled import unroll_layers

MAX_ERROR = 3e-2  # relative, bfloat16 over all steps of the small check
MAX_FP8_ERROR = 0.1  # of products in 8 bits
COMPILED = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is timed: networks and the clip."""

    wan: str
    vae: str
    umt5: str
    height: int
    width: int
    frames: int


TRUE = Sizes(wan="wan2.1-t2v-1.3b", vae="wan21", umt5="xxl", height=480, width=832, frames=81)
TINY = Sizes(wan="tiny", vae="tiny", umt5="tiny", height=32, width=64, frames=33)


def main() -> None:
    """Checks, times, prints, writes."""
    args = parse()
    sizes = TINY if args.tiny else TRUE
    given = {"frames": args.frames, "wan": args.wan}
    if args.size is not None:
        given |= {"height": args.size[0], "width": args.size[1]}
    sizes = dataclasses.replace(sizes, **{name: value for name, value in given.items() if value is not None})
    try:
        config = wan_config(sizes.wan, dtype="bfloat16", param_dtype="bfloat16")
        plans = {attention: plan_of(attention, config, sizes, args) for attention in args.attention}
        places = {place: Place.of(place, heads=config.num_heads) for place in args.places}
    except (UserError, ValueError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{heading()}; {sizes.frames} frames at {sizes.height}x{sizes.width}")
    error = check(args, places)
    print(f"{CHECKED} by {args.implementation or 'the default'} against XLA: relative error {error:.1e}")
    if not error <= MAX_ERROR:
        sys.exit(f"the error is above {MAX_ERROR:.0e}; nothing is timed")
    report: dict[str, Any] = {**machine(), **dataclasses.asdict(sizes)}
    report |= {
        "implementation": args.implementation,
        "mode": args.mode,
        "error": error,
        "repeats": args.repeats,
        "rows": [],
    }
    vae = None
    if not args.network:
        report["text"] = time_text(sizes, args.repeats)
        print(f"text    {report['text'] * 1e3:8.1f} ms")
        vae = built(lambda: WanVAE(vae_config(sizes.vae), **half()))
        report["vae"] = time_vae(WanDecoder(vae), sizes, args.repeats)
        print(f"VAE     {report['vae'] * 1e3:8.1f} ms   {sizes.frames / report['vae']:.1f} frames/s")
    model = built(lambda: WanModel(config, rngs=nnx.Rngs(0)))
    for place, where in places.items():
        for attention, plan in plans.items():
            pipeline = where.pipeline(model.with_attention(plan.attention), vae)
            row = {"attention": attention, "place": place} | time_video(pipeline, plan, args.repeats)
            if not args.network:
                row["with_text"] = report["text"] + row["end_to_end"]
            report["rows"].append(row)
            print(line(row), flush=True)
            write_report(args.out / "generate.json", report)
    compare(report["rows"])
    # a whole clip has no stream that would wait: its later frames are decoded by a program of their own
    if args.mode == "autoregressive" and any(row.get("compiled_later") for row in report["rows"]):
        sys.exit("something was compiled after the first block")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", nargs="+", type=name_or_notation, default=tuple(NAMED))
    parser.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        help="backend of the named settings that have several; default: the library's choice",
    )
    parser.add_argument("--wan", help="sizes of the network, a preset; default: wan2.1-t2v-1.3b, or tiny with --tiny")
    parser.add_argument(
        "--places", nargs="+", default=["one"], help="one, or meshes, with ,decoder ,unrolled ,passes or ,fp8"
    )
    parser.add_argument("--mode", choices=("autoregressive", "bidirectional"), default="autoregressive")
    parser.add_argument("--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="in pixels; default: 480 832")
    parser.add_argument("--frames", type=int, help="1 + 4 k in whole blocks; default: 81, or 33 with --tiny")
    parser.add_argument("--network", action="store_true", help="the transformer alone")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tiny", action="store_true", help="tiny networks and a small clip")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be at least 1")
    if not args.tiny and jax.default_backend() == "cpu":
        parser.error("there is no GPU, and a CPU would take hours; --tiny runs anywhere")
    return args


def half() -> dict[str, Any]:
    """Options of a module in bfloat16."""
    return dict(rngs=nnx.Rngs(0), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


def built[Module](make: Callable[[], Module]) -> Module:
    """A module with random weights, made by one program."""
    return nnx.jit(make)()


def plan_of(
    attention: str, config: WanConfig, sizes: Sizes, args: argparse.Namespace, *, implementation: str | None = None
) -> Plan:
    """What `monarchrt generate` would make."""
    frame = sizes.height // 16, sizes.width // 16
    given = GenerateConfig(
        frames=sizes.frames,
        height=sizes.height,
        width=sizes.width,
        attention=str(setting(attention, *frame, implementation=implementation or args.implementation)),
    )
    return make_plan(given, defaults=Defaults(mode=args.mode, sampler="few-step"), model=config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where a video is made, and of which form of the network."""

    devices: Places
    unrolled: bool
    passes: bool
    fp8: bool

    @classmethod
    def of(cls, notation: str, *, heads: int) -> "Place":
        """That of a notation."""
        words = notation.split(",")
        mesh = ",".join(word for word in words if word not in ("one", "decoder", "unrolled", "passes", "fp8"))
        decoder = len(jax.devices()) - 1 if "decoder" in words else None
        given = GenerateConfig(mesh=mesh or ("heads=1" if "decoder" in words else None), decoder_device=decoder)
        forms = {word: word in words for word in ("unrolled", "passes", "fp8")}
        if forms["passes"] and not forms["unrolled"]:
            raise ValueError(f"place {notation!r} has passes, which are of layers that are unrolled; add ,unrolled.")
        return cls(devices=find_places(given, heads=heads), **forms)

    def pipeline(self, model: WanModel, vae: WanVAE | None) -> VideoPipeline:
        """What makes it; without a decoder for latents alone."""
        model = self.devices.moved(model)
        model = fp8_products(model) if self.fp8 else model
        network = unroll_layers(model, passes="triton" if self.passes else None) if self.unrolled else model
        decoder: Any = None if vae is None else WanDecoder(vae, device=self.devices.decoder)
        return VideoPipeline(network, decoder, mesh=self.devices.mesh)


def check(args: argparse.Namespace, places: dict[str, Place]) -> float:
    """Largest relative error of a small clip's latents, with the timed backend in each place that is not in 8 bits."""
    # sides of a tile below 4 are refused by the kernels
    sizes = (
        dataclasses.replace(TINY, frames=21)
        if args.tiny
        else dataclasses.replace(TINY, frames=21, height=96, width=128)
    )
    base = wan_config("tiny" if args.tiny else TRUE.wan, num_layers=2, dtype="bfloat16", param_dtype="bfloat16")
    model = built(lambda: WanModel(base, rngs=nnx.Rngs(0)))
    # the head starts at zero, which would make every output equal; scaled so that small errors do not grow
    head = model.head.proj.kernel
    head[...] = jax.random.normal(jax.random.key(1), head.shape, head.dtype) / 8
    text = jnp.zeros((1, base.text_len, base.text_dim))

    def latents(implementation: str | None, where: Place) -> np.ndarray:
        plan = plan_of(CHECKED, base, sizes, args, implementation=implementation)
        parts = where.pipeline(model.with_attention(plan.attention), None).latents(text, plan=plan)
        return np.concatenate([np.asarray(part, np.float64) for part in parts])

    right = latents("xla", Place.of("one", heads=base.num_heads))
    errors = {True: [0.0], False: [0.0]}  # in 8 bits or not
    for where in places.values():
        error = np.linalg.norm(latents(args.implementation, where) - right) / np.linalg.norm(right)
        errors[where.fp8].append(float(error))
    if not all(error <= MAX_FP8_ERROR for error in errors[True]):
        sys.exit(f"in 8 bits the error is {max(errors[True]):.1e}, above {MAX_FP8_ERROR:.0e}; nothing is timed")
    return max(errors[False])


def time_text(sizes: Sizes, repeats: int) -> float:
    """Seconds for one prompt of 512 tokens; the encoder is let go of afterwards."""
    encoder = built(lambda: UMT5Encoder(umt5_config(sizes.umt5), **half()))
    graph, arrays = nnx.split(encoder)
    ids, mask = jnp.ones((1, 512), jnp.int32), jnp.ones((1, 512), bool)
    encode = jax.jit(lambda arrays: nnx.merge(graph, arrays)(ids, mask))
    return median_seconds(lambda: encode(arrays).block_until_ready(), repeats)


def time_vae(decoder: WanDecoder, sizes: Sizes, repeats: int) -> float:
    """Seconds for all frames, in blocks of 3 latents, in the host's memory."""
    count, height, width = 1 + (sizes.frames - 1) // decoder.temporal, *latent_size(decoder, sizes)
    block = jax.random.normal(jax.random.key(0), (1, 3, height, width, decoder.channels))

    def decode() -> None:
        state = decoder.start(1, height, width)
        parts = []
        for _ in range(count // 3):
            frames, state = decoder.decode(block, state)
            parts.append(frames)
        jax.device_get(parts)

    return median_seconds(decode, repeats)


def latent_size(decoder: WanDecoder, sizes: Sizes) -> tuple[int, int]:
    """Rows and columns of latents."""
    return sizes.height // decoder.spatial, sizes.width // decoder.spatial


def time_video(pipeline: VideoPipeline, plan: Plan, repeats: int) -> dict[str, Any]:
    """The transformer alone, and end to end if there is a decoder."""
    config = pipeline.model.config
    text = jax.random.normal(jax.random.key(1), (1, config.text_len, config.text_dim))
    made = 1 + 4 * (plan.latents[0] - 1)  # frames of a video
    firsts, later = [], []

    def transformer() -> None:
        jax.block_until_ready(list(pipeline.latents(text, plan=plan)))

    def end_to_end() -> None:
        begin = time.perf_counter()
        parts = pipeline(text, plan=plan)
        next(parts)
        firsts.append(time.perf_counter() - begin)
        with counted() as programs:
            list(parts)
        later.append(len(programs))

    if pipeline.decoder is None:
        return {"transformer": median_seconds(transformer, repeats), "tile": plan.config.tile}
    _, compile_seconds = clock(end_to_end)
    whole = median_seconds(end_to_end, repeats)
    alone = median_seconds(transformer, repeats)
    return {
        "transformer": alone,
        "end_to_end": whole,
        "frames_per_second": made / whole,
        "first_frames": statistics.median(firsts[-repeats:]),
        "compiled_later": sum(later),
        "compile_seconds": compile_seconds - whole,
        "tile": plan.config.tile,
    }


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The programs that are compiled meanwhile."""
    programs: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILED:
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield programs
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    network = f"{row['attention']:<12} {row['place']:<16} transformer {row['transformer']:7.3f} s   "
    if "end_to_end" not in row:
        return network
    return network + (
        f"end to end {row['end_to_end']:7.3f} s "
        f"({row['frames_per_second']:6.1f} frames/s)   first frames {row['first_frames']:6.3f} s   "
        f"compiled later {row['compiled_later']}, before in {row['compile_seconds']:.0f} s"
    )


def compare(rows: list[dict[str, Any]]) -> None:
    """The first over each of the others."""
    first, *others = rows
    for row in others:
        named, beside = (f"{x['attention']} ({x['place']})" for x in (row, first))
        parts = {"transformer": "transformer", "end to end": "end_to_end"}
        ratios = [f"{name} {first[part] / row[part]:.2f}x" for name, part in parts.items() if part in row]
        print(f"{named}: {', '.join(ratios)} of {beside}")


if __name__ == "__main__":
    main()
