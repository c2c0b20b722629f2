"""Times the products of a cached call of Wan 1.3B, by cuBLASLt, on one GPU: bfloat16 and FP8, together and apart.

    python benchmarks/products.py

Tokens of a block (3 x 30 x 52 = 4,680) by the weights of a layer: query, key and value in one, output, and both of the
feed-forward network. Three forms: bfloat16 (of query, key and value also as three products); e4m3 with both sides ready
(what a product could take at best); and from bfloat16 activations, of which each row is scaled by its largest number
and rounded, with weights ready that were scaled by column. 8 products with weights of their own in each call. Errors
are relative, to float32 products of the bfloat16 numbers. Whether XLA took its FP8 route is read from the compiled
program and said.
"""

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from measuring import clocked, heading

from monarch_jax.devices import on_cuda
from monarchrt.models.compiling import LIBRARY_PRODUCTS
from monarchrt.models.wan.fp8 import rounded

TOKENS = 4680
SHAPES = {"qkv": (1536, 4608), "out": (1536, 1536), "up": (1536, 8960), "down": (8960, 1536)}
COPIES = 8


def half(x: Array, w: Array) -> Array:
    """In bfloat16."""
    return x @ w


def thirds(x: Array, *ws: Array) -> list[Array]:
    """In bfloat16, as three products."""
    return [x @ w for w in ws]


def ready(x: Array, w: Array) -> Array:
    """In e4m3, nothing scaled."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


def scaled(x: Array, w: Array, columns: Array) -> Array:
    """From bfloat16 activations."""
    x, rows = rounded(x)
    return (ready(x, w).astype(jnp.float32) * rows[:, None] * columns).astype(jnp.bfloat16)


def main() -> None:
    """Prints a line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    if not on_cuda(capability=9):
        parser.error("there is no GPU with FP8 products, Hopper or later; this times nothing else")
    print(heading())
    for name, (inner, outer) in SHAPES.items():
        keys = jax.random.split(jax.random.key(0), 2)
        x = jax.random.normal(keys[0], (TOKENS, inner), jnp.bfloat16)
        ws = [jax.random.normal(key, (inner, outer), jnp.bfloat16) for key in jax.random.split(keys[1], COPIES)]
        eights = [rounded(w.T) for w in ws]
        row: dict[str, Any] = {"product": name, "shape": [TOKENS, inner, outer]}
        x8 = rounded(x)[0]
        arguments = {
            "bf16": (half, x, [(w,) for w in ws]),
            "fp8_ready": (ready, x8, [(w,) for w, _ in eights]),
            "fp8": (scaled, x, [(w, s[None]) for w, s in eights]),
        }
        if name == "qkv":
            arguments["bf16_apart"] = (thirds, x, [tuple(jnp.split(w, 3, axis=1)) for w in ws])
        wanted = jax.jit(functools.partial(jnp.matmul, precision="highest"))(
            *(y.astype(jnp.float32) for y in (x, ws[0]))
        )
        for kind, (product, left, rights) in arguments.items():
            run = compiled(product, left, rights)
            row[f"{kind}_ms"] = clocked(run, (left, rights), 5) / COPIES
            row[f"{kind}_route"] = "f8" if "cublas$lt$matmul$f8" in run.as_text() else "other"
            if kind in ("bf16", "fp8"):
                found = run(left, rights)[0].astype(jnp.float32)
                row[f"{kind}_error"] = float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))
        print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}), flush=True)


def compiled(product: Callable[..., Any], left: Any, rights: Any) -> Any:
    """A program of all products of a shape."""

    def run(left: Array, rights: Any) -> list[Any]:
        return [product(left, *right) for right in rights]

    return jax.jit(run, compiler_options=LIBRARY_PRODUCTS).lower(left, rights).compile()


if __name__ == "__main__":
    main()
