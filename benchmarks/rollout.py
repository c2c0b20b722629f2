"""How far a whole video's latents end from those of float32: in bfloat16, and with alpha and Y in 8 bits.

    python benchmarks/rollout.py                                    # 81 frames at 480x832, 1.3B, one GPU
    python benchmarks/rollout.py --attention "monarch 95%" --layers 30 --sharpness 1 3
    python benchmarks/rollout.py --tiny                             # a tiny network; runs without a GPU

The schedule of Self-Forcing as in generate.py, each block made from the ones before, the same noise for all. Weights
are random, rounded to bfloat16 for all; --sharpness multiplies the weights of the keys' norms, so that softmaxes are
sharper. Products of the float32 network are of float32, not of TF32.

A line for each sharpness: relative Frobenius distances of the latents of all blocks and of the last. Eight bits could
be a default if they end no further from bfloat16 than bfloat16 does from float32.
Writes rollout.json into --out.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention_settings import EXACT, NAMED, setting
from flax import nnx
from generate import TINY, TRUE, Sizes, built
from measuring import machine, write_report

from monarchrt.models.attention.base import Attention
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.decoders import WanDecoder
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.plan import Defaults, make_plan
from monarchrt.models.vae import WanVAE, vae_config
from monarchrt.models.wan import WanConfig, WanModel, wan_config

EIGHT = "e4m3"


def main() -> None:
    """Makes each video, prints, writes."""
    args = parse()
    sizes = TINY if args.tiny else TRUE
    frame = sizes.height // 16, sizes.width // 16
    half, eight = (setting(args.attention, *frame, intermediates=kind) for kind in (None, EIGHT))
    config = wan_config(sizes.wan, num_layers=args.layers, dtype="bfloat16", param_dtype="bfloat16")
    rows = []
    for sharpness in args.sharpness:
        model = random_network(config, sharpness)
        single = jax.tree.map(lambda x: x.astype(jnp.float32), nnx.split(model)[1])
        wide = nnx.split(nnx.eval_shape(lambda: WanModel(as_single(config), rngs=nnx.Rngs(0))))[0]
        with jax.default_matmul_precision("highest"):
            right = latents(nnx.merge(wide, single), half, sizes)
        in_half = latents(model, half, sizes)
        row = {"sharpness": sharpness, "bfloat16": distances(in_half, right)}
        in_eight = latents(model, eight, sizes)
        rows.append(row | {EIGHT: distances(in_eight, right), f"{EIGHT} from bfloat16": distances(in_eight, in_half)})
        print(line(rows[-1]), flush=True)
    report = machine() | dataclasses.asdict(sizes)
    report |= {"attention": str(half), "layers": args.layers, "rows": rows}
    write_report(args.out / "rollout.json", report)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sparse = [name for name in NAMED if name != EXACT]
    parser.add_argument("--attention", choices=sparse, default=sparse[-1])
    parser.add_argument("--layers", type=int, default=30, help="of the network")
    parser.add_argument("--sharpness", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--tiny", action="store_true", help="a tiny network and a small clip")
    args = parser.parse_args()
    if args.layers < 1:
        parser.error(f"--layers {args.layers} must be at least 1")
    if not args.tiny and jax.default_backend() == "cpu":
        parser.error("there is no GPU, and a CPU would take hours; --tiny runs anywhere")
    return args


def as_single(config: WanConfig) -> WanConfig:
    """The same network in float32."""
    return dataclasses.replace(config, dtype="float32", param_dtype="float32")


def random_network(config: WanConfig, sharpness: float) -> WanModel:
    """Random weights whose output is not zero."""
    model = built(lambda: WanModel(config, rngs=nnx.Rngs(0)))
    head, norm = model.head.proj.kernel, model.blocks.self_attn.norm_k.scale
    head[...] = jax.random.normal(jax.random.key(1), head.shape, head.dtype) / 8  # as in generate.py's check
    norm[...] = norm[...] * jnp.asarray(sharpness, norm[...].dtype)
    return model


def latents(model: WanModel, attention: Attention, sizes: Sizes) -> list[np.ndarray]:
    """Those of each block, in float64."""
    config = model.config
    given = GenerateConfig(frames=sizes.frames, height=sizes.height, width=sizes.width, attention=str(attention))
    plan = make_plan(given, defaults=Defaults(mode="autoregressive", sampler="few-step"), model=config)
    text = jax.random.normal(jax.random.key(2), (1, config.text_len, config.text_dim), jnp.bfloat16)
    decoder = WanDecoder(built(lambda: WanVAE(vae_config("tiny"), rngs=nnx.Rngs(0))))  # decodes nothing
    parts = VideoPipeline(model.with_attention(plan.attention), decoder).latents(text.astype(jnp.float32), plan=plan)
    return [np.asarray(part, np.float64) for part in parts]


def distances(found: Sequence[np.ndarray], right: Sequence[np.ndarray]) -> dict[str, float]:
    """Relative, of all blocks and of the last."""
    if not all(np.isfinite(part).all() for part in found):
        raise SystemExit("error: latents are not finite")
    pairs = {"all": (np.concatenate([x.ravel() for x in blocks]) for blocks in (found, right))}
    pairs["last"] = (x[-1].ravel() for x in (found, right))
    return {name: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for name, (a, b) in pairs.items()}


def line(row: dict[str, Any]) -> str:
    """One row for the terminal."""
    own, other = row["bfloat16"], row[f"{EIGHT} from bfloat16"]
    within = "within" if other["all"] <= own["all"] else "beyond"
    return (
        f"sharpness {row['sharpness']:g}: bfloat16 from float32 {own['all']:.2%} (last block {own['last']:.2%}); "
        f"{EIGHT} from float32 {row[EIGHT]['all']:.2%}, from bfloat16 {other['all']:.2%} (last {other['last']:.2%}): "
        f"{within} bfloat16's own"
    )


if __name__ == "__main__":
    main()
