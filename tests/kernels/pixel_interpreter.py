"""Runs the kernels over pixels in Triton's interpreter, in place of the calls, and prints errors as JSON;
with `decoder` also of all frames of a small decoder.

In a process of its own: TRITON_INTERPRET=1 counts when the kernels are imported. What they make starts as NaN.
"""

import inspect
import json
import sys
from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

from monarchrt.models.vae import WanVAE, causal, layers, vae_config
from monarchrt.triton_kernels import pixel_passes, pixels
from monarchrt.triton_kernels.pixel_passes import PixelConfig

TAPS = causal.normed_taps, causal.plain_normed_taps


def run(call: Any, arrays: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """`pixel_passes.call_kernel` in the interpreter; on the host, as the call may be traced."""

    def interpret(*values: Any) -> tuple[np.ndarray, ...]:
        tensors = {name: torch.tensor(np.asarray(x)) for name, x in zip(arrays, values, strict=True)}
        for name, x in made.items():
            tensors[name] = torch.full(x.shape, float("nan"), dtype=torch.float32)
        kernel = getattr(pixels, call.kernel)
        names = [name for name in inspect.signature(kernel.fn).parameters if not name.isupper()]
        kernel[call.grid](**{name: tensors[name] for name in names}, **call.constants)
        return tuple(tensors[name].numpy() for name in call.writes)

    shapes = tuple(made[name] for name in call.writes)
    results = jax.pure_callback(interpret, shapes, *arrays.values())
    return dict(zip(call.writes, results, strict=True))


def error(found: Any, right: Any) -> float:
    """The largest difference; infinite where something is not a number."""
    difference = float(np.abs(np.asarray(found) - np.asarray(right)).max())
    return difference if np.isfinite(difference) else float("inf")


def normal(number: int, *shape: int) -> jax.Array:
    """Random numbers."""
    return jax.random.normal(jax.random.key(number), shape)


def decoded() -> list[jax.Array]:
    """Nine frames of a small decoder, the first by itself."""
    vae = WanVAE(vae_config("tiny"), rngs=nnx.Rngs(0))
    latents = normal(3, 1, 3, 2, 4, vae.config.z_dim)
    first, past = vae.decode_first(latents[:, :1], vae.init_decoder_cache(1, 16, 32))
    return [first, vae.decode_next(latents[:, 1:], past)[0]]


def whole_decoder() -> tuple[float, list[str]]:
    """How far its frames by the kernels are from XLA's, and which kernels it took."""
    plain, taken = decoded(), []

    def call(call: Any, arrays: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
        taken.append(call.kernel)
        return run(call, arrays, made)

    pixel_passes.call_kernel = call
    layers.norm_by_kernel = lambda implementation, x: True
    return max(map(error, decoded(), plain)), sorted(set(taken))


if __name__ == "__main__":
    pixel_passes.call_kernel = run
    pixel_passes.SIZES = {name: PixelConfig(numbers=64, warps=4) for name in pixel_passes.SIZES}
    gamma = 1 + normal(0, 24) / 8
    x = normal(1, 2, 3, 4, 24).at[1, 2].set(0.0)  # pixels without a length too
    y = normal(2, 3, 5, 4, 4 * 24)  # frames of 4 x 3
    taps = [(normal(4, 2, 2, 3, 4, 24), normal(5, 2, frames, 3, 4, 24), gamma) for frames in (1, 2, 3)]
    found: dict[str, Any] = {
        "norm": error(causal.norm_silu(x, gamma), causal.plain_norm_silu(x, gamma)),
        "doubled": max(map(error, causal.doubled_norm_silu(y, gamma), causal.plain_doubled_norm_silu(y, gamma))),
        "taps": max(error(*pair) for x in taps for pair in zip(*(of(*x) for of in TAPS), strict=True)),
    }
    if sys.argv[1:] == ["decoder"]:
        found["decoder"], found["taken"] = whole_decoder()
    print(json.dumps(found))
