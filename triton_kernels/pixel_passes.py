"""Passes over pixels as Triton kernels, those of `pixels.py`: what they serve, their sizes, and the calls."""

import dataclasses
import math
from typing import Any

import jax

from monarchrt.triton_kernels import missing_packages
from monarchrt.triton_kernels.config import power_of_two
from monarchrt.triton_kernels.one_kernel import call_kernel
from monarchrt.triton_kernels.plan import Launch

DTYPES = ("bfloat16", "float16")
MOST = 1024  # channels


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelConfig:
    """Numbers that a program takes at once, a power of two, and its warps."""

    numbers: int
    warps: int

    def rows(self, channels: int) -> int:
        """Pixels of so many channels."""
        return max(1, self.numbers // power_of_two(channels, 16))


SIZES = {
    "channel_norm": PixelConfig(numbers=2048, warps=4),
    "doubled_norm": PixelConfig(numbers=4096, warps=4),
    "normed_taps": PixelConfig(numbers=4096, warps=4),
}


def supports(x: jax.Array | jax.ShapeDtypeStruct) -> str | None:
    """Why the kernels cannot make pixels [..., C], or None when they can; asks no device."""
    if reason := missing_packages():
        return reason
    if x.dtype.name not in DTYPES:
        return f"dtype {x.dtype.name} is not one of {', '.join(DTYPES)}."
    *pixels, channels = x.shape
    if channels > MOST or channels % 8:
        return f"{channels} channels are above {MOST}, or not a multiple of 8."
    if math.prod(pixels) % (rows := max(config.rows(channels) for config in SIZES.values())):
        return f"{math.prod(pixels)} pixels are not a multiple of {rows}."
    return None


def channel_norm(x: jax.Array, gamma: jax.Array) -> jax.Array:
    """Norm over channels, with weights [C], and SiLU of pixels [..., C]."""
    *pixels, channels = x.shape
    grid, sizes = _sizes("channel_norm", channels, math.prod(pixels))
    return _run("channel_norm", {"x": x, "gamma": gamma}, {"normed": x.shape}, grid, sizes)["normed"]


def doubled_norm(y: jax.Array, gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Frames of twice the size out of [n, H + 1, W + 1, 4 C], see `pixels.doubled_norm`; and their norm and SiLU."""
    frames, height, width, channels = y.shape[0], y.shape[1] - 1, y.shape[2] - 1, y.shape[3] // 4
    shape = frames, 2 * height, 2 * width, channels
    grid, sizes = _sizes("doubled_norm", channels, math.prod(shape[:3]))
    sizes |= {"HEIGHT": height, "WIDTH": width}
    results = _run("doubled_norm", {"y": y, "gamma": gamma}, dict.fromkeys(("x", "normed"), shape), grid, sizes)
    return results["x"], results["normed"]


def normed_taps(past: jax.Array, x: jax.Array, gamma: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Norm and SiLU of frames x, and what a kernel of three steps in time meets, see `pixels.normed_taps`.

    Args:
        past: [B, 2, H, W, C], the frames before, normalised.
        x: [B, T, H, W, C].
        gamma: Weights [C].

    Returns:
        [B, T, H, W, 3 C], of each frame the two before it and itself; and the past of the frames after x.
    """
    batch, frames, height, width, channels = x.shape
    (pixels, *_), sizes = _sizes("normed_taps", channels, height * width)
    sizes |= {"FRAMES": frames, "PIXELS": height * width}
    made = {"taps": (*x.shape[:4], 3 * channels), "latest": past.shape}
    arrays = {"past": past, "x": x, "gamma": gamma}
    results = _run("normed_taps", arrays, made, (pixels, batch * (frames + 2), 1), sizes)
    return results["taps"], results["latest"]


def _sizes(kernel: str, channels: int, pixels: int) -> tuple[tuple[int, int, int], dict[str, Any]]:
    """Programs for so many pixels, and a kernel's constants."""
    rows = SIZES[kernel].rows(channels)
    return (pixels // rows, 1, 1), {"C": channels, "CP": power_of_two(channels, 16), "ROWS": rows}


def _run(
    kernel: str,
    arrays: dict[str, jax.Array],
    made: dict[str, tuple[int, ...]],
    grid: tuple[int, int, int],
    constants: dict[str, Any],
) -> dict[str, jax.Array]:
    """The arrays that a kernel makes, of the first operand's dtype."""
    launch = Launch(kernel, tuple(made), grid, constants, SIZES[kernel].warps, 1)
    dtype = next(iter(arrays.values())).dtype
    return call_kernel(launch, arrays, {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in made.items()})
