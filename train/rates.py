"""How fast a device computes, to reckon what an update takes before it has been tried."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from monarchrt.train.arithmetic import Work

# by their names, data sheets: dense products in bfloat16, FLOP/s; memory, bytes/s
DEVICES = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.04e12),
}
MEASURED = "NVIDIA H200"
# shares of the above that training steps on an H200 reach, by their own time: what is no product is done meanwhile
PRODUCTS, ATTENTION, MEMORY = 0.43, 0.60, 0.60
RANGE = (0.8, 1.25)  # of the estimate, between which all steps lie that were measured there
SINGLE = 2.0  # as long as in bfloat16: TensorFloat-32
_SIDE = {"cpu": 1024}  # of the matrices that are multiplied where the device is not known
_LARGE = 8192


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of a device.

    Attributes:
        products: Multiply-adds a second, counted as 2, of products with weights in half precision.
        attention: Of attention.
        memory: Bytes a second; None: not known.
        single: How many times as long products of float32 take.
        low: The least that an update takes of what is reckoned.
        high: The most; None: there is no saying.
        basis: Where that is from.
    """

    products: float
    attention: float
    memory: float | None
    single: float
    low: float
    high: float | None
    basis: str

    def seconds(self, work: Work) -> float:
        """What so many products take."""
        longer = 1.0 + (self.single - 1.0) * work.float32 / work.total if work.total else 1.0
        return longer * (work.products / self.products + work.attended / self.attention)

    def moving(self, size: int) -> float:
        """Seconds to read or write so many bytes; none where that is not known."""
        return 0.0 if self.memory is None else size / self.memory


def known_rates(kind: str) -> Rates | None:
    """Rates of a kind of device, from its data sheet; None if it is not in the table.

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
    """Rates of a device by one large product, which is computed there: steps are slower, by how much is not known.

    Args:
        device: Where.
        single: Whether most of the products are of float32.
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
