"""Times the exact decoder and its 3x3x3 convolutions, XLA's and the kernel's for Hopper in one process.

    python benchmarks/decode.py                    # 12 frames at 480x832, on one GPU
    python benchmarks/decode.py --parts layers     # convolutions alone

Random weights at true size in bfloat16, the Wan 2.1 decoder continuing a stream by 3 latent frames. Numbers come first:
what differs from float32 by more than 1e-2 of the values' size, and frames of the two ways by more than that, is not
timed. Medians over --repeats of calls that are sent without waiting for each other.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import clocked, machine, write_report

from monarch_jax.devices import on_cuda
from monarchrt.models.vae import WanVAE, vae_config
from monarchrt.models.vae.causal import norms, plain
from monarchrt.models.vae.layers import ChannelNorm, Conv
from monarchrt.pallas_kernels.sm90.convolution import ConvConfig, convolution, supports

MAX_ERROR = 1e-2
LATENTS = 3
WAYS: dict[str, Any] = {"xla": "xla", "default": None, "mosaic": "mosaic"}
PARTS = ("layers", "decoder")
LAYERS = ((4, 6, 384, 384), (2, 12, 192, 192), (1, 12, 96, 96))  # pixels across one, frames, channels in and out
OTHERS = (
    ConvConfig(rows=4, columns=8, groups=2, kernels=3, registers=(216, 40)),
    ConvConfig(rows=3, columns=16, kernels=3),
    ConvConfig(kernels=3),
)


def main() -> None:
    """Checks, times, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--others", action="store_true", help="other sizes of the kernel too")
    parser.add_argument("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    if not on_cuda(capability=9):
        parser.error("there is no GPU of the kind that the kernel is for, Hopper; this times nothing else")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be at least 1")
    report: dict[str, Any] = {**machine(), "layers": []}
    for scale, frames, features, out in LAYERS if "layers" in args.parts else ():
        row = layer((frames, args.height // scale, args.width // scale, features), out, args.repeats, args.others)
        print(json.dumps(row), flush=True)
        report["layers"].append(row)
    if "decoder" in args.parts:
        report["decoder"] = decoder(args.height, args.width, args.repeats)
        print(json.dumps(report["decoder"]))
    if args.out:
        write_report(args.out, report)


def error(found: jax.Array, wanted: jax.Array) -> float:
    """Relative, by the root of mean squares."""
    found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
    return float(jnp.linalg.norm((found - wanted).ravel()) / jnp.linalg.norm(wanted.ravel()))


def layer(shape: tuple[int, ...], out: int, repeats: int, others: bool) -> dict[str, Any]:
    """A convolution with its past and what is added, both ways."""
    features = shape[-1]
    keys = jax.random.split(jax.random.key(0), 4)
    half = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    conv = nnx.jit(
        lambda: Conv(features, out, (3, 3, 3), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    )()
    assert conv.bias is not None
    conv.bias[...] = half(keys[3], (out,))
    past, x = half(keys[0], (1, 2, *shape[1:])), half(keys[1], (1, *shape))
    added = half(keys[2], (1, *shape[:3], out))
    row: dict[str, Any] = {"shape": [*shape, out], "tflop": round(54 * np.prod(shape) * out / 1e12, 3)}
    with jax.default_matmul_precision("highest"):
        precise = [y.astype(jnp.float32) for y in (past[0], x[0, :2], conv.kernel[...], conv.bias[...], added[0, :2])]
        (wanted,) = jax.jit(plain)(*precise)
    calls: dict[str, Callable[[], Any]] = {}
    for name in ("xla", "mosaic"):
        conv.implementation = name
        graph, state = nnx.split(conv)
        run = jax.jit(lambda state, *a, graph=graph: nnx.merge(graph, state).after(a[0], a[1], added=a[2])[0])
        calls[name] = functools.partial(run, state, past, x, added)
        row[f"{name}_error"] = error(calls[name]()[0, :2], wanted)
    row["apart"] = error(calls["mosaic"](), calls["xla"]())
    if norms("mosaic", x, conv.kernel.shape):  # with the norm and SiLU that follow, and with what they are of
        norm = ChannelNorm(out, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

        def normed(state, past, x, added, both, graph=graph):
            return nnx.merge(graph, state).after_normed(past, x, norm, added=added, both=both)[0]

        run = jax.jit(normed, static_argnums=4)
        calls["mosaic_norm"] = lambda: run(state, past, x, None, False)[1]
        calls["mosaic_added_norm"] = lambda: run(state, past, x, added, False)[1]
        calls["mosaic_both"] = lambda: run(state, past, x, added, True)
        bare = jax.jit(lambda state, *a, graph=graph: nnx.merge(graph, state).after(*a)[0])(state, past, x)
        after = jax.jit(lambda y: norm(y, silu=True))
        raw, last = calls["mosaic_both"]()
        pairs = [(calls["mosaic_norm"](), after(bare)), (raw, calls["mosaic"]()), (last, after(raw))]
        pairs.append((calls["mosaic_added_norm"](), last))
        row["norm_apart"] = max(error(*pair) for pair in pairs)
        calls["norm"] = lambda: after(raw)
    if why := supports(x, conv.kernel.shape):
        row["mosaic"] = why
    if not max(row.get(name, 0.0) for name in ("xla_error", "mosaic_error", "apart", "norm_apart")) <= MAX_ERROR:
        sys.exit(f"error: the numbers are wrong: {json.dumps(row)}")
    for number, config in enumerate(OTHERS if others else ()):
        run = jax.jit(lambda *a, config=config: convolution(*a, config=config)[0])
        calls[f"mosaic_{number}"] = functools.partial(run, past[0], x[0], conv.kernel[...], conv.bias[...], added[0])
        if error(calls[f"mosaic_{number}"](), calls["mosaic"]()[0]) > MAX_ERROR:
            sys.exit(f"error: the numbers of {config} are wrong")
    for name, call in calls.items():
        row[f"{name}_ms"] = round(clocked(call, (), repeats), 3)
        row[f"{name}_tflops"] = round(row["tflop"] / row[f"{name}_ms"] * 1000)
    return row


def decoder(height: int, width: int, repeats: int) -> dict[str, Any]:
    """Three latent frames after the first: XLA's way, as it is by default, and with all that the kernel can do."""
    row: dict[str, Any] = {"frames": 4 * LATENTS}
    half: dict[str, Any] = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    latents = jax.random.normal(jax.random.key(1), (1, 1 + LATENTS, height // 8, width // 8, 16))
    made, calls = {}, {}
    for name, implementation in WAYS.items():
        vae = nnx.jit(lambda: WanVAE(vae_config("wan21"), rngs=nnx.Rngs(0), **half))()
        vae = nnx.merge(nnx.split(nnx.eval_shape(functools.partial(_vae, implementation)))[0], nnx.split(vae)[1])
        cache = vae.init_decoder_cache(1, height, width)
        graph, state = nnx.split(vae)
        first = jax.jit(lambda state, *a, graph=graph: nnx.merge(graph, state).decode_first(*a))
        following = jax.jit(lambda state, *a, graph=graph: nnx.merge(graph, state).decode_next(*a))
        _, cache = first(state, latents[:, :1], cache)
        calls[name] = functools.partial(following, state, latents[:, 1:], cache)
        began = time.perf_counter()
        made[name] = calls[name]()[0]
        jax.block_until_ready(made[name])
        row[f"{name}_compiled_s"] = round(time.perf_counter() - began, 1)
    row["apart"] = max(error(made[name], made["xla"]) for name in made)
    if not row["apart"] <= 5 * MAX_ERROR:  # some 30 layers, each rounded
        sys.exit(f"error: the frames differ: {json.dumps(row)}")
    for name, call in calls.items():
        row[f"{name}_ms"] = round(clocked(call, (), repeats), 3)
    return row


def _vae(implementation: Any) -> WanVAE:
    half: dict[str, Any] = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return WanVAE(vae_config("wan21"), rngs=nnx.Rngs(0), implementation=implementation, **half)


if __name__ == "__main__":
    main()
