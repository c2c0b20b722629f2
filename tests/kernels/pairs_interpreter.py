"""Runs the kernels of `triton_kernels.pairs` in Triton's interpreter and prints their largest errors as JSON.

Run in a process of its own, as `triton_interpreter`. Expected is `written_pairs` in float64; inputs that are not seen
are NaN, and so is what nobody writes.
"""

import dataclasses
import inspect
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from monarchrt.pallas_kernels.sm90.config import column_blocks
from monarchrt.triton_kernels import launch, pairs, refine_pairs
from monarchrt.triton_kernels.config import Config
from tests.kernels import triton_interpreter  # noqa: F401  makes the interpreter faster
from tests.kernels.written_pairs import Written

jax.config.update("jax_numpy_rank_promotion", "allow")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One chunk: of `heads` heads the second, of `query_tiles` tiles those from `tile` on."""

    query_tiles: int = 2
    key_tiles: int = 3
    tile: int = 0
    b1: int = 5
    b2: int = 7
    heads: int = 2
    dim: int = 16
    visible: tuple[int, ...] | None = None
    sharpness: float = 1.0


CASES = {
    "plain": Case(),
    "packed, sharp": Case(key_tiles=2, b2=9, sharpness=4.0),  # some factors are at their limit
    "causal, one chunk": Case(query_tiles=3, tile=1, key_tiles=14, visible=(1, 4, 13), b2=3),
    "many columns, padded dim": Case(b2=70, dim=12, key_tiles=1),
    "many columns, causal": Case(b2=70, key_tiles=2, visible=(1, 2), heads=1),
}


def call(todo, arrays, shapes, _capability):
    """What `launch.call` does, with torch."""
    kernel = getattr(refine_pairs, todo.kernel)
    made: dict[str, Any] = {name: torch.full(x.shape, float("nan"), dtype=torch.float32) for name, x in shapes.items()}
    held: dict[str, Any] = made | {
        n: x if isinstance(x, float) else torch.tensor(np.asarray(x)) for n, x in arrays.items()
    }
    names = [name for name in inspect.signature(kernel.fn).parameters if not name.isupper()]
    kernel[todo.grid](**{name: held[name] for name in names}, **todo.constants)
    return {name: jnp.asarray(held[name].numpy()) for name in todo.writes}


def worst(found, expected):
    """Largest difference where something is expected, infinity too; infinite where it is not a number."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where(found == expected, 0, np.abs(found - expected) / (1 + np.abs(expected)))
    return float(np.nan_to_num(difference[~np.isnan(expected)], nan=np.inf).max())


def run_case(case: Case) -> dict[str, float]:
    """Of u, factors, log-sum-exp, du, products and delta."""
    rng = np.random.default_rng(0)
    tiles, pairs_count, width = case.query_tiles - case.tile, case.key_tiles * case.b1, 8
    visible = np.array(case.visible or [case.key_tiles] * case.query_tiles, np.int32)
    split = column_blocks(case.b2, tiles, case.visible is not None)

    def random(*shape):
        return rng.standard_normal(shape, np.float32)

    q = random(2, case.query_tiles, case.b1, case.b2, case.heads, case.dim) * case.sharpness
    k = random(2, case.key_tiles, case.b1, case.b2, case.heads, case.dim)
    k[:, visible.max() :] = np.nan
    options: dict[str, Any] = dict(
        q=jnp.asarray(q),
        k=jnp.asarray(k),
        visible=jnp.asarray(visible),
        start=jnp.array([case.heads - 1, case.tile, 0], jnp.int32),
        scale=case.dim**-0.5,
        heads=1,
        tiles=tiles,
        split=(split.items, split.full, split.tail_rows, split.packed),
    )
    config = dataclasses.replace(pairs.pairs_config(5), **dict.fromkeys(("refine", "delta"), Config(rows=0, keys=16)))
    own, plain = pairs.Pairs(**options, config=config), Written(**options)
    launch.call = call
    seen = plain.seen()
    room = -(-pairs_count // 64) * 64
    vectors = random(2, tiles, pairs_count, case.b2, case.dim)
    alpha = jnp.where(seen[None, :, :, None, None], vectors, jnp.nan)
    c = plain.back(
        jnp.where(seen[None, :, None], random(2, tiles, case.b2, pairs_count), jnp.nan),
        jnp.zeros((2, split.items, 64, room)),
    )
    dz = jnp.asarray(random(2, split.items, pairs_count, -(-case.b2 // 8) * 8, split.used))
    found, expected = own.refine(alpha, c, width=width), plain.refine(alpha, c, width=width)
    names = ("u", "factors", "lse")
    stats = [x[2][:, :, :, 0] for x in (found, expected)]
    errors = {n: worst(x, y) for n, x, y in zip(names, (*found[:2], stats[0]), (*expected[:2], stats[1]), strict=True)}
    u, factors, stats = expected
    gradients, wanted = own.query(u, dz, factors), plain.query(u, dz, factors)
    errors |= {n: worst(x, y) for n, x, y in zip(("du", "products"), gradients, wanted, strict=True)}
    rest = (alpha, wanted[0], c, factors, wanted[1], stats)
    errors["delta"] = worst(own.delta(*rest), plain.delta(*rest))
    return errors


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        print(json.dumps({"case": name, **run_case(CASES[name])}), flush=True)
