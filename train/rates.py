"""Compute rates of devices, from which the time of an update is estimated before it has run."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from monarchrt.train.arithmetic import Work

# from data sheets, by device name: FLOP/s of dense products in bfloat16, memory bandwidth in bytes/s
DEVICES = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
}
MEASURED = "NVIDIA H200"
# fractions of these rates that steps reach on an H200, by their measured times, which include everything else
PRODUCTS, ATTENTION, MEMORY = 0.43, 0.60, 0.60
RANGE = (0.8, 1.25)  # range of the times of all measured steps, relative to their estimates
SINGLE = 2.0  # time of a float32 product, as TensorFloat-32, relative to bfloat16
_SIDE = {"cpu": 1024}  # side of the matrices whose product is timed on an unknown device, by platform
_LARGE = 8192  # the same for other platforms


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Compute rates of a device.

    Attributes:
        products: FLOP/s of products with weights in half precision; a multiply-add counts as 2.
        attention: FLOP/s of attention.
        memory: Memory bandwidth in bytes/s; None if it is not known.
        single: Time of a product in float32 relative to half precision.
        low: Smallest time of an update relative to the estimate.
        high: Largest time of an update relative to the estimate; None if it is not known.
        basis: Source of the rates, in words.
    """

    products: float
    attention: float
    memory: float | None
    single: float
    low: float
    high: float | None
    basis: str

    def seconds(self, work: Work) -> float:
        """Estimated seconds of the products."""
        longer = 1.0 + (self.single - 1.0) * work.float32 / work.total if work.total else 1.0
        return longer * (work.products / self.products + work.attended / self.attention)

    def moving(self, size: int) -> float:
        """Estimated seconds to read or write a number of bytes; 0 if the bandwidth is not known."""
        return 0.0 if self.memory is None else size / self.memory


def known_rates(kind: str) -> Rates | None:
    """Rates of a kind of device, based on its data sheet; None if it is not in `DEVICES`.

    Examples:
        >>> known_rates("NVIDIA H200").attention / 1e12, known_rates("cpu")
        (593.4, None)
    """
    if kind not in DEVICES:
        return None
    flops, memory = DEVICES[kind]
    also = "" if kind == MEASURED else f"; only an {MEASURED.removeprefix('NVIDIA ')} was measured, no {kind}"
    shares = f"{PRODUCTS:.0%} and {ATTENTION:.0%} of {flops / 1e12:.0f} TFLOP/s"
    return Rates(
        products=PRODUCTS * flops,
        attention=ATTENTION * flops,
        memory=MEMORY * memory,
        single=SINGLE,
        low=RANGE[0],
        high=RANGE[1],
        basis=f"products and attention at {shares}, as in steps measured on an H200{also}",
    )


def timed_rates(device: Any, *, single: bool) -> Rates:
    """Rates of a device by timing one large product on it. Steps are slower, by an unknown factor.

    Args:
        device: The device.
        single: Whether to multiply in float32 instead of bfloat16.
    """
    side, dtype = _SIDE.get(device.platform, _LARGE), jnp.float32 if single else jnp.bfloat16
    x = jax.device_put(jnp.ones((side, side), dtype), device)
    multiply = jax.jit(jnp.matmul).lower(x, x).compile()
    jax.block_until_ready(multiply(x, x))
    taken = []
    for _ in range(5):
        begun = time.perf_counter()
        jax.block_until_ready(multiply(x, x))
        taken.append(time.perf_counter() - begun)
    rate = 2.0 * side**3 / statistics.median(taken)
    kind = getattr(device, "device_kind", device.platform)
    return Rates(
        products=rate,
        attention=rate,
        memory=None,
        single=1.0,
        low=1.0,
        high=None,
        basis=f"all products at {rate / 1e9:,.0f} GFLOP/s, as one of {side} by {side} numbers of {x.dtype} just now; "
        f"no step has been measured on {kind}",
    )
