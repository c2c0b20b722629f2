"""Times the Wan 2.1 1.3B transformer at its true size with random weights: dense attention against tiled Monarch.

    python benchmarks/model.py                                  # every case, on one GPU
    python benchmarks/model.py --cases training --attention dense "monarch 97%" "vsa(keep=0.1)"
    python benchmarks/model.py --profile                        # and where the time of each case goes
    python benchmarks/model.py --small                          # a tiny network; runs without a GPU

Cases, batch 1, bfloat16, 81 frames (21 latent): the bidirectional forward at 480p and 720p, and of 3 latent frames at
480p without a cache; one forward of the causal model for the 7th chunk of 3 latent frames, with 18 in the cache; a
training step at 480p (forward, backward with every block recomputed, AdamW in bfloat16). "monarch 95%" has tiles of a
frame, "monarch 97%" of three. Before anything is timed, the network's output with the timed Monarch backend is compared
with its XLA path on a small clip.

A line gives the median, the device memory that the compiled program needs (arguments, results and temporaries), the
arithmetic rate of its matrix products and its share of a large product's rate measured in the same run, and the time to
compile. Recomputation is not counted as arithmetic. Writes model.json into --out.
"""

import argparse
import collections
import dataclasses
import functools
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from attention_settings import CHECKED, NAMED, name_or_notation, setting
from flax import nnx
from measuring import heading, machine, median_seconds, write_report

from monarch_jax.backends import IMPLEMENTATIONS
from monarchrt.models.attention.registry import exact
from monarchrt.models.compiling import LIBRARY_PRODUCTS
from monarchrt.models.memory import memory
from monarchrt.models.wan import WanConfig, WanModel, wan_config
from monarchrt.models.wan.causal import cached_forward, init_cache
from monarchrt.models.wan.config import REMAT
from monarchrt.models.wan.unrolled import merged
from monarchrt.models.wan.unrolled import unroll_layers as unrolled_model
from monarchrt.train.config import OptimizerConfig
from monarchrt.train.data import Batch
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.objectives.settings import FlowConfig
from monarchrt.train.state import create_role, create_state, make_training, split_model
from monarchrt.train.step import make_train_step

CASES = ("forward 480p", "forward 720p", "forward 3 frames", "cached chunk", "training")
MAX_ERROR = 3e-2  # relative, bfloat16 through all layers of the small check


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """Latent frames, height and width."""

    frames: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.frames, self.height, self.width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timed:
    """A compiled program and how to call it: `call` runs it once and returns something to wait for."""

    call: Callable[[], Any]
    compiled: Any
    compile_seconds: float
    flops: float


def main() -> None:
    """Checks, times, prints, writes."""
    args = parse()
    args.out.mkdir(parents=True, exist_ok=True)
    peak = product_rate(args.small)
    print(f"{heading()}; a large product runs at {peak / 1e12:.0f} TFLOP/s")
    error = check(args)
    print(f"{CHECKED} by {args.implementation or 'the default'} against XLA: relative error {error:.1e}")
    if not error <= MAX_ERROR:
        sys.exit(f"the error is above {MAX_ERROR:.0e}; nothing is timed")
    results: list[dict[str, Any]] = []
    for case in args.cases:
        for attention in args.attention:
            results.append({"case": case, "attention": attention} | measure(case, attention, args, peak))
            print(line(results[-1]), flush=True)
            report = machine() | {"product_rate": peak, "error": error}
            report |= {"implementation": args.implementation, "keep_intermediates": args.keep_intermediates}
            report |= {"remat": args.remat, "unroll_layers": args.unroll_layers, "passes": args.passes}
            report |= {"repeats": args.repeats, "rows": results}
            write_report(args.out / "model.json", report)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--attention", nargs="+", type=name_or_notation, default=tuple(NAMED))
    parser.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        help="backend of the named settings that have several; default: the library's choice",
    )
    parser.add_argument("--keep-intermediates", action="store_true", help="of those settings, for the backward pass")
    parser.add_argument("--remat", choices=REMAT, default="full", help="what the training step recomputes per block")
    parser.add_argument(
        "--unroll-layers", action="store_true", help="of training step and cached chunk, instead of a loop over them"
    )
    parser.add_argument("--passes", action="store_true", help="with that, kernels of few passes in the cached chunk")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="also list where the time goes, by kind of kernel")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--small", action="store_true", help="a tiny network and clip")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be at least 1")
    if args.passes and not args.unroll_layers:
        parser.error("--passes is for layers that are unrolled; add --unroll-layers")
    if not args.small and jax.default_backend() == "cpu":
        parser.error("there is no GPU, and a CPU would take hours; --small runs anywhere")
    return args


def configuration(args: argparse.Namespace, **changes) -> WanConfig:
    """The network's sizes."""
    return wan_config("tiny" if args.small else "wan2.1-t2v-1.3b", dtype="bfloat16", param_dtype="bfloat16", **changes)


def clip_of(case: str, small: bool) -> Clip:
    """Size in latents."""
    frames = 3 if case == "forward 3 frames" else 6 if small else 21
    if small:
        return Clip(frames=frames, height=8, width=16)
    return Clip(frames=frames, height=90, width=160) if "720p" in case else Clip(frames=frames, height=60, width=104)


@functools.cache
def built(config: WanConfig) -> tuple[Any, Any]:
    """Structure and arrays of the network with random weights."""
    return nnx.split(nnx.jit(lambda: WanModel(config, rngs=nnx.Rngs(0)))())


def check(args: argparse.Namespace) -> float:
    """Relative error of the network's output with the timed backend, a shallow network on a small clip."""
    config = configuration(args, num_layers=2)
    graph, arrays = built(config)
    model = nnx.merge(graph, arrays)
    # the head starts at zero, which would make every output equal
    model.head.proj.kernel[...] = jax.random.normal(jax.random.key(1), model.head.proj.kernel.shape, jnp.bfloat16)
    clip = Clip(frames=3, height=16, width=16)
    x = jax.random.normal(jax.random.key(2), (1, *clip.shape, config.in_channels), jnp.bfloat16)
    text = jax.random.normal(jax.random.key(3), (1, config.text_len, config.text_dim), jnp.bfloat16)
    _, *frame = config.token_grid(*clip.shape)
    outputs = []
    for implementation in (args.implementation, "xla"):
        swapped = model.with_attention(setting(CHECKED, *frame, implementation=implementation))
        outputs.append(np.asarray(nnx.jit(swapped)(x, jnp.array([500.0]), text), np.float64))
    return float(np.linalg.norm(outputs[0] - outputs[1]) / np.linalg.norm(outputs[1]))


def measure(case: str, attention: str, args: argparse.Namespace, peak: float) -> dict[str, Any]:
    """Times one case."""
    clip = clip_of(case, args.small)
    config = configuration(args)
    _, *frame = config.token_grid(*clip.shape)
    how = {"implementation": args.implementation, "keep": args.keep_intermediates}
    config = dataclasses.replace(config, attention=setting(attention, *frame, **how))
    training = functools.partial(training_step, remat=args.remat, unroll_layers=args.unroll_layers)
    cached = functools.partial(cached_chunk, unroll_layers=args.unroll_layers, passes=args.passes)
    build = {"cached chunk": cached, "training": training}.get(case, forward)
    timed = build(config, clip)
    result: dict[str, Any] = {
        "ms": 1e3 * median_seconds(timed.call, args.repeats, uncounted=2),
        "memory_gb": memory(timed.compiled).arrays / 1e9,
        "compile_seconds": timed.compile_seconds,
        "tflop": timed.flops / 1e12,
    }
    result["tflop_per_second"] = result["tflop"] / result["ms"] * 1e3
    result["share_of_product"] = result["tflop_per_second"] * 1e12 / peak
    if args.profile:
        result["profile"] = profile(timed.call)
    return result


def forward(config: WanConfig, clip: Clip) -> Timed:
    """The bidirectional forward of a whole clip."""
    graph, arrays = built_like(config)
    inputs = example(config, clip.shape)

    @jax.jit
    def run(arrays, latents, timesteps, text):
        return nnx.merge(graph, arrays)(latents, timesteps, text)

    compiled, seconds = compile_timed(run, arrays, *inputs)
    return Timed(
        call=lambda: compiled(arrays, *inputs),
        compiled=compiled,
        compile_seconds=seconds,
        flops=forward_flops(config, clip, clip.frames),
    )


def cached_chunk(config: WanConfig, clip: Clip, *, unroll_layers: bool, passes: bool) -> Timed:
    """One forward of the last 3 frames, all earlier ones in the cache, as generation does it."""
    graph, arrays = built_like(config)
    if unroll_layers:
        unrolled = unrolled_model(nnx.merge(graph, arrays), passes="triton" if passes else None)
        graph, arrays = unrolled.graph, unrolled.params
    latents, timesteps, text = example(config, (3, *clip.shape[1:]))
    frame = jnp.asarray(clip.frames - 3, jnp.int32)

    @jax.jit
    def empty(arrays, text):
        model, layers = merged(graph, arrays)
        return init_cache(model, text, frames=clip.frames, height=clip.height, width=clip.width, layers=layers)

    cache = dataclasses.replace(empty(arrays, text), length=jnp.copy(frame))  # donated, and frame is not

    @functools.partial(jax.jit, donate_argnums=1, compiler_options=LIBRARY_PRODUCTS if unroll_layers else None)
    def run(arrays, cache, latents, timesteps, frame):
        model, layers = merged(graph, arrays)
        return cached_forward(model, latents, timesteps, cache, frame=frame, in_place=True, layers=layers)

    compiled, seconds = compile_timed(run, arrays, cache, latents, timesteps, frame)
    held = [cache]

    def call():
        flow, held[0] = compiled(arrays, held[0], latents, timesteps, frame)
        return flow

    return Timed(
        call=call, compiled=compiled, compile_seconds=seconds, flops=forward_flops(config, clip, 3, cached=True)
    )


def training_step(config: WanConfig, clip: Clip, **how) -> Timed:
    """Forward, backward and AdamW, as `monarchrt train` does them, with parameters and moments in bfloat16."""
    config = dataclasses.replace(config, **how)
    graph, params, fixed = split_model(nnx.merge(*built_like(config)))
    # the step overwrites its state; the parameters serve other cases too
    params = jax.tree.map(jnp.copy, params)
    training = make_training(OptimizerConfig(learning_rate=1e-6, ema_decay=None), updates=1000)
    step = make_train_step(
        make_objective(FlowConfig()), {"student": graph}, {"student": training}, configs={"student": config}
    )
    state = create_state({"student": create_role(params, fixed, training)}, seed=0)
    latents, _, text = example(config, clip.shape)
    batches = {"student": Batch(cast(Any, latents), cast(Any, text))}  # on the device already
    compiled, seconds = compile_timed(step, state, batches, due=("student",))
    held = [state]

    def call():
        held[0], metrics = compiled(held[0], batches)
        return metrics

    # a product costs one more for each of its two inputs' gradients
    return Timed(
        call=call,
        compiled=compiled,
        compile_seconds=seconds,
        flops=3 * forward_flops(config, clip, clip.frames),
    )


def built_like(config: WanConfig) -> tuple[Any, Any]:
    """The cached arrays, under this configuration's attention."""
    plain = dataclasses.replace(config, attention=exact(), remat="none", unroll_layers=False)
    how = {"remat": config.remat, "unroll_layers": config.unroll_layers}
    model = nnx.merge(*built(plain)).with_config(attention=config.attention, **how)
    return nnx.split(model)


def example(config: WanConfig, size: tuple[int, int, int]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Latents, timesteps and text."""
    latents = jax.random.normal(jax.random.key(0), (1, *size, config.in_channels), jnp.bfloat16)
    text = jax.random.normal(jax.random.key(1), (1, config.text_len, config.text_dim), jnp.bfloat16)
    return latents, jnp.full((1,), 500.0), text


def forward_flops(config: WanConfig, clip: Clip, frames: int, *, cached: bool = False) -> float:
    """Multiply-adds, counted as 2, in the matrix products of one forward of `frames` frames."""
    grid = config.token_grid(frames, *clip.shape[1:])
    tokens, dim = grid[0] * grid[1] * grid[2], config.dim
    # q, k, v, o and the cross-attention's q and o, then the feed-forward; text keys and values once per layer
    per_token = 2 * (6 * dim * dim + 2 * dim * config.ffn_dim) + 4 * config.text_len * dim
    text = 0 if cached else config.text_len * 4 * dim * dim
    sizes = {"heads": config.num_heads, "head_dim": config.head_dim, "key_frames": clip.frames if cached else None}
    attention = sum(layer.flops(grid, **sizes) for layer in config.layer_attention)
    return config.num_layers * (per_token * tokens + text) + attention


def compile_timed(function, *arguments, **static) -> tuple[Any, float]:
    """The compiled program and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    compiled = function.lower(*arguments, **static).compile()
    return compiled, time.perf_counter() - start


def product_rate(small: bool) -> float:
    """Arithmetic rate of a large bfloat16 matrix product, in FLOP/s."""
    n = 512 if small else 8192
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)

    @jax.jit
    def chain(x):
        return jax.lax.fori_loop(0, 10, lambda _, y: (x @ y) * n**-0.5, x)

    return 10 * 2 * n**3 / median_seconds(lambda: chain(x), 5, uncounted=2)


KINDS = (
    # the Triton kernels' names are forward, right_query, left_backward, ...
    ("attention", r"fmha|flash|sdpa|attention|monarch|mosaic|^(right_|left_)?(forward|backward|query)(_|$)"),
    ("matrix products", r"gemm|nvjet|cutlass|cublas|xmma|dot"),
    ("copies", r"memcpy|memset|copy|transpose"),
)


def profile(call: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds of one call on the device by kind of kernel, and its 100 longest kernels."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        traces = sorted(Path(folder).rglob("*.xplane.pb"))
        data = jax.profiler.ProfileData.from_file(str(traces[-1]))
        kernels: collections.Counter[str] = collections.Counter()
        for plane in data.planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for track in plane.lines:
                if track.name.startswith("Stream"):
                    for event in track.events:
                        kernels[event.name] += event.duration_ns / 1e6
    kinds: collections.Counter[str] = collections.Counter()
    for name, ms in kernels.items():
        kinds[next((kind for kind, pattern in KINDS if re.search(pattern, name, re.I)), "everything else, fused")] += ms
    return {"kinds": dict(kinds.most_common()), "kernels": dict(kernels.most_common(100))}


def line(row: dict[str, Any]) -> str:
    """One line of the table, and the profile if there is one."""
    text = (
        f"{row['case']:16s} {row['attention']:12s} {row['ms']:8.1f} ms  {row['memory_gb']:5.1f} GB  "
        f"{row['tflop_per_second']:5.0f} TFLOP/s ({row['share_of_product']:.0%})  "
        f"compiled in {row['compile_seconds']:.0f} s"
    )
    for kind, ms in row.get("profile", {}).get("kinds", {}).items():
        text += f"\n    {ms:8.1f} ms  {kind}"
    return text


if __name__ == "__main__":
    main()
