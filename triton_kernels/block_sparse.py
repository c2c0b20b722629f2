"""Block-sparse attention as Triton kernels: what they serve, their sizes, forward and backward.

The contract is `SparseProblem`, `Side` and `SparseResiduals` of `monarch_jax.contract`. Three launches: output; dQ over
the lists of the queries; dK and dV over those of the keys. `sparse.py` has the kernels.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from monarchrt.triton_kernels import missing_packages
from monarchrt.triton_kernels.config import Config, Target, power_of_two, target, tuned
from monarchrt.triton_kernels.plan import Launch

if TYPE_CHECKING:
    from monarch_jax.contract import Side, SparseProblem, SparseResiduals

DTYPES = ("bfloat16", "float16", "float32")
MAX_DIM = 128
KERNELS = ("sparse_forward", "sparse_query_backward", "sparse_key_backward")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfigs:
    """A `Config` per kernel: `rows` are queries and `keys` keys that a program has or goes through at a time."""

    sparse_forward: Config
    sparse_query_backward: Config
    sparse_key_backward: Config


_CONFIGS: contextvars.ContextVar[SparseConfigs | None] = contextvars.ContextVar("sparse_configs", default=None)


@contextlib.contextmanager
def use(configs: SparseConfigs) -> Iterator[None]:
    """Traces with these configs whatever the device and the blocks; for tuning and tests."""
    token = _CONFIGS.set(configs)
    try:
        yield
    finally:
        _CONFIGS.reset(token)


def key_of(*, rows: int, columns: int, dim: int, itemsize: int) -> str:
    """Key of a tuned entry."""
    return f"sparse rows={rows} columns={columns} dim={dim} itemsize={itemsize}"


def supports(q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct) -> str | None:
    """Why the kernels cannot serve a call, or None when they can; asks no device.

    Args:
        q: Queries [B, Nq, H, D], shape and dtype.
        k: Keys [B, Nk, H, D], shape and dtype.

    Returns:
        The reason with what to do instead, or None.
    """
    if reason := missing_packages():
        return reason
    if q.dtype.name not in DTYPES:
        return f"dtype {q.dtype.name} is not one of {', '.join(DTYPES)}."
    if q.shape[-1] > MAX_DIM:
        return f"head_dim {q.shape[-1]} is above {MAX_DIM}; use implementation='xla'."
    if 0 in q.shape or 0 in k.shape:
        return f"there is nothing to compute for shapes {q.shape}, {k.shape}."
    return None


def configs(where: Target, *, rows: int, columns: int, dim: int, itemsize: int) -> SparseConfigs:
    """The tuned configs of a device for blocks of so many queries and keys, the user's first; else `heuristic`."""
    if (chosen := _CONFIGS.get()) is not None:
        return chosen
    best = heuristic(where, rows=rows, columns=columns, dim=dim, itemsize=itemsize)
    entry = tuned(where, key_of(rows=rows, columns=columns, dim=dim, itemsize=itemsize))
    return dataclasses.replace(best, **{name: Config(**x) for name, x in entry.items()})


def heuristic(where: Target, *, rows: int, columns: int, dim: int, itemsize: int) -> SparseConfigs:
    """Configs that fit every supported card, from the shape alone."""
    big = where.compute_capability in (80, 90, 100)  # 164 KB of shared memory or more; others have 99
    heavy = itemsize * max(64, power_of_two(dim)) > 256  # a row is longer than 128 halves
    side = 32 if heavy else 64
    m, n = (part(size, side) for size in (rows, columns))
    tall = part(rows, 128) if big and not heavy else m
    deep = 1 if heavy else 3 if big else 2
    return SparseConfigs(
        sparse_forward=Config(rows=tall, keys=n, warps=8 if tall > 64 else 4, stages=deep),
        sparse_query_backward=Config(rows=tall, keys=n, warps=8 if tall > 64 else 4, stages=min(deep, 2)),
        sparse_key_backward=Config(rows=m, keys=n, warps=8, stages=min(deep, 2)),
    )


def part(size: int, most: int) -> int:
    """Tokens, a power of two from 16 to `most`, to go through a block with: little to spare, and not too small a part.

    Examples:
        >>> part(60, 128), part(128, 64), part(90, 128), part(20, 64), part(3, 64)
        (64, 64, 128, 32, 16)
    """
    sizes = [most >> n for n in range(8) if most >> n >= 16]
    return min(sizes, key=lambda x: -(-size // x) * (x + 32))  # as if each part cost 32 tokens more


def launches(
    problem: "SparseProblem",
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    queries: "Side",
    keys: "Side",
    chosen: SparseConfigs,
) -> tuple[Launch, Launch, Launch]:
    """The calls of forward, dQ, and dK with dV; `chosen` has their sizes."""
    batch, tokens, heads, dim = q.shape
    band = problem.width is not None
    common = {
        "NQ": tokens,
        "NK": k.shape[1],
        "H": heads,
        "D": dim,
        "DP": power_of_two(dim, 16),
        "ROWS": problem.rows,
        "COLUMNS": problem.columns,
        "BAND": band,
        "WIDTH": problem.width if band else 0,
        "SINK": problem.sink if band else 0,
        "BATCH": batch,
        "PRECISION": "tf32x3" if q.dtype == jnp.float32 else "ieee",
    }

    def one(name: str, writes: tuple[str, ...], side: "Side", most: int, of_queries: bool) -> Launch:
        config: Config = getattr(chosen, name)
        blocks, listed = side.first.shape[2:]
        parts = -(-most // (config.rows if of_queries else config.keys))
        sizes = {"BLOCKS": blocks, "LISTED": listed, "M": config.rows, "N": config.keys, "STAGES": config.stages}
        sizes |= {} if of_queries else {"EARLY": config.early}
        grid = (blocks * parts, heads, batch)
        return Launch(name, writes, grid, common | sizes, config.warps, config.stages, config.registers)

    return (
        one(KERNELS[0], ("out", "lse"), queries, problem.rows, True),
        one(KERNELS[1], ("dq",), queries, problem.rows, True),
        one(KERNELS[2], ("dk", "dv"), keys, problem.columns, False),
    )


def forward(
    problem: "SparseProblem", q: jax.Array, k: jax.Array, v: jax.Array, queries: "Side", keys: "Side"
) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp.

    Args:
        problem: The static part.
        q: [B, Nq, H, D], bfloat16, float16 or float32.
        k: [B, Nk, H, D].
        v: [B, Nk, H, D].
        queries: Blocks of queries and their lists.
        keys: Blocks of keys; only their places are read.

    Returns:
        out [B, Nq, H, D] in q's dtype and lse float32 [B, H, Nq], to the base 2, infinite where no key is seen.
    """
    batch, tokens, heads, _ = q.shape
    call, _, _ = launches(problem, q, k, queries, keys, _configs(problem, q))
    arrays = {"q": q, "k": k, "v": v, "scale": float(problem.scale), **_lists(queries), "key_places": keys.places}
    shapes = {"out": q, "lse": jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32)}
    results = _run(call, arrays, shapes)
    return results["out"], results["lse"]


def vjp(
    problem: "SparseProblem", residuals: "SparseResiduals", d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients, the same bits in every run.

    Args:
        problem: The static part.
        residuals: Of the forward pass.
        d_out: [B, Nq, H, D].

    Returns:
        dq [B, Nq, H, D], dk and dv [B, Nk, H, D]; zero for keys in no block.
    """
    r = residuals
    delta = jnp.einsum("bnhd,bnhd->bhn", d_out, r.out, preferred_element_type=jnp.float32)
    _, of_queries, of_keys = launches(problem, r.q, r.k, r.queries, r.keys, _configs(problem, r.q))
    arrays: dict[str, Any] = {"q": r.q, "k": r.k, "v": r.v, "lse": r.lse, "delta": delta}
    arrays |= {"d_out": d_out.astype(r.q.dtype), "scale": float(problem.scale)}
    gradients = _run(of_queries, arrays | _lists(r.queries) | {"key_places": r.keys.places}, {"dq": r.q})
    gradients |= _run(of_keys, arrays | _lists(r.keys) | {"query_places": r.queries.places}, {"dk": r.k, "dv": r.v})
    return gradients["dq"], gradients["dk"], gradients["dv"]


def _lists(side: "Side") -> dict[str, jax.Array]:
    return side._asdict()


def _configs(problem: "SparseProblem", q: jax.Array) -> SparseConfigs:
    return configs(target(), rows=problem.rows, columns=problem.columns, dim=q.shape[-1], itemsize=q.dtype.itemsize)


def _run(call: Launch, arrays: dict, results: dict) -> dict[str, jax.Array]:
    from monarchrt.triton_kernels import launch

    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in results.items()}
    return launch.call(call, arrays, shapes, target().compute_capability)
