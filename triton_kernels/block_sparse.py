"""Block-sparse attention as Triton kernels: what they serve, their sizes, forward and backward.

The contract is `SparseProblem`, `Side` and `SparseResiduals` of `monarch_jax.contract`. Three launches: output; dQ over
the lists of the queries; dK and dV over those of the keys. Both of the latter compute the scores and their gradients,
seven products for a pair of blocks. Where `sparse_query_product` is set, dK and dV come first and keep the scores'
gradients, in the inputs' dtype, for dQ to be one product: five products, for the memory, as many heads at a time as
`scratch_bytes` holds. `sparse.py` has the kernels.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from monarchrt.triton_kernels import missing_packages
from monarchrt.triton_kernels.config import Config, Target, holding, power_of_two, target, tuned
from monarchrt.triton_kernels.plan import Launch

if TYPE_CHECKING:
    from monarch_jax.contract import Side, SparseProblem, SparseResiduals

DTYPES = ("bfloat16", "float16", "float32")
MAX_DIM = 128
FEW = 32  # blocks of keys in a list, at most, whose programs begin and end more than they loop
KERNELS = ("sparse_forward", "sparse_query_backward", "sparse_key_backward")
PRODUCT = "sparse_query_product"  # set, it stands for `sparse_query_backward`


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfigs:
    """A `Config` per kernel: `rows` are queries and `keys` keys that a program has or goes through at a time.

    `sparse_query_product` is for dQ from scores' gradients that are kept, of which `scratch_bytes` may exist at a time.
    None computes them again, and so do lists that are too long for one head to fit.
    """

    sparse_forward: Config
    sparse_query_backward: Config
    sparse_key_backward: Config
    sparse_query_product: Config | None = None
    scratch_bytes: int = 2 * 2**30


_CONFIGS: contextvars.ContextVar[SparseConfigs | None] = contextvars.ContextVar("sparse_configs", default=None)


@contextlib.contextmanager
def use(configs: SparseConfigs) -> Iterator[None]:
    """Traces with these configs whatever the device and the blocks; for tuning and tests."""
    with holding(_CONFIGS, configs):
        yield


def key_of(*, rows: int, columns: int, dim: int, itemsize: int, listed: int | None = None) -> str:
    """Key of a tuned entry; lists of at most `FEW` blocks of keys may have one of their own.

    Args:
        rows: Most queries in a block.
        columns: Most keys in a block.
        dim: Channels per head.
        itemsize: Bytes of a number.
        listed: Most blocks of keys in a list; None: unknown.
    """
    few = " few" if listed is not None and listed <= FEW else ""
    return f"sparse rows={rows} columns={columns} dim={dim} itemsize={itemsize}{few}"


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


def configs(
    where: Target, *, rows: int, columns: int, dim: int, itemsize: int, listed: int | None = None
) -> SparseConfigs:
    """The tuned configs of a device for blocks of so many queries and keys, the user's first; else `heuristic`.

    Of lists of few blocks, what an entry of their own says, over what the one for any says.

    Args:
        where: The device.
        rows: Most queries in a block.
        columns: Most keys in a block.
        dim: Channels per head.
        itemsize: Bytes of a number.
        listed: Most blocks of keys in a list; None: unknown.

    Returns:
        The configs.
    """
    if (chosen := _CONFIGS.get()) is not None:
        return chosen
    best = heuristic(where, rows=rows, columns=columns, dim=dim, itemsize=itemsize)
    sizes = dict(rows=rows, columns=columns, dim=dim, itemsize=itemsize)
    entry = tuned(where, key_of(**sizes)) | tuned(where, key_of(**sizes, listed=listed))
    return dataclasses.replace(best, **{name: _parsed(x) for name, x in entry.items()})


def _parsed(value: Any) -> Any:
    """A number of a tuned entry as it is, None too; else a `Config`."""
    return Config(**value) if isinstance(value, dict) else value


def heuristic(where: Target, *, rows: int, columns: int, dim: int, itemsize: int) -> SparseConfigs:
    """Configs that fit every supported card, from the shape alone.

    Args:
        where: The device.
        rows: Most queries in a block.
        columns: Most keys in a block.
        dim: Channels per head.
        itemsize: Bytes of a number.

    Returns:
        The configs.
    """
    big = where.compute_capability in (80, 90, 100)  # 164 KB of shared memory or more; others have 99
    heavy = itemsize * max(64, power_of_two(dim)) > 256  # a row is longer than 128 halves
    side = 32 if heavy else 64
    m, n = (part(size, side) for size in (rows, columns))
    tall = part(rows, 128) if big and not heavy else m
    deep = 1 if heavy else 3 if big else 2
    four = where.compute_capability == 90 and not heavy  # two programs share a multiprocessor then
    return SparseConfigs(
        sparse_forward=Config(rows=tall, keys=n, warps=8 if tall > 64 else 4, stages=deep),
        sparse_query_backward=Config(rows=tall, keys=n, warps=8 if tall > 64 else 4, stages=min(deep, 2)),
        sparse_key_backward=Config(rows=m, keys=n, warps=4 if four else 8, stages=min(deep, 2)),
    )


def part(size: int, most: int) -> int:
    """Tokens, a power of two from 16 to `most`, to go through a block with: little to spare, and not too small a part.

    Examples:
        >>> part(60, 128), part(128, 64), part(90, 128), part(20, 64), part(3, 64)
        (64, 64, 128, 32, 16)
    """
    sizes = [most >> n for n in range(8) if most >> n >= 16]
    return min(sizes, key=lambda x: -(-size // x) * (x + 32))  # as if each part cost 32 tokens more


def kept(problem: "SparseProblem", q: Any, queries: "Side", chosen: SparseConfigs) -> jax.ShapeDtypeStruct | None:
    """Scores' gradients that exist at a time, [B, heads, slots, keys, queries], or None where they are not kept.

    Slot n of a block of queries is for entry n of its list; a slot holds whole parts of both kernels.

    Args:
        problem: Sizes of blocks.
        q: Queries [B, N, H, D], shape and dtype.
        queries: Lists of blocks of keys, by block of queries.
        chosen: Sizes of the kernels, and the bytes that there are for the gradients.

    Returns:
        Shape and dtype.
    """
    product, other = chosen.sparse_query_product, chosen.sparse_key_backward
    if product is None:
        return None
    batch, heads = q.shape[0], q.shape[2]
    sides = ((problem.columns, max(product.keys, other.keys)), (problem.rows, max(product.rows, other.rows)))
    slot = tuple(-(-size // part) * part for size, part in sides)
    slots = queries.first.shape[2] * queries.first.shape[3]
    fit = chosen.scratch_bytes // (batch * slots * slot[0] * slot[1] * q.dtype.itemsize)
    if not fit:
        return None
    times = -(-heads // fit)
    return jax.ShapeDtypeStruct((batch, -(-heads // times), slots, *slot), q.dtype)


def launches(
    problem: "SparseProblem",
    q: jax.Array | jax.ShapeDtypeStruct,
    k: jax.Array | jax.ShapeDtypeStruct,
    queries: "Side",
    keys: "Side",
    chosen: SparseConfigs,
) -> tuple[Launch, ...]:
    """The calls of the forward pass, the first, and of the backward pass; `chosen` has their sizes.

    Backward: dQ, and dK with dV; or, with scores' gradients that are kept, dK with dV, and dQ, for some heads after the
    others.

    Args:
        problem: Sizes of blocks, scale and band.
        q: Queries [B, Nq, H, D], shape and dtype.
        k: Keys [B, Nk, H, D], likewise.
        queries: Lists of blocks of keys, by block of queries.
        keys: Lists of blocks of queries, by block of keys.
        chosen: Sizes of the kernels.

    Returns:
        The launches.
    """
    batch, tokens, heads, dim = q.shape
    band = problem.width is not None
    scores = kept(problem, q, queries, chosen)
    common = {
        "NQ": tokens,
        "NK": k.shape[1],
        "H": heads,
        "D": dim,
        "DP": power_of_two(dim, 16),
        "ROWS": problem.rows,
        "COLUMNS": problem.columns,
        "BATCH": batch,
        "PRECISION": "tf32x3" if q.dtype == jnp.float32 else "ieee",
    }
    mask = {"BAND": band, "WIDTH": problem.width if band else 0, "SINK": problem.sink if band else 0}
    mask["EVEN"] = problem.even

    def one(
        name: str, config: Config, writes: tuple[str, ...], *, of_queries: bool, heads: int = heads, **more: int
    ) -> Launch:
        side, most, part = (queries, problem.rows, config.rows) if of_queries else (keys, problem.columns, config.keys)
        blocks, listed = side.first.shape[2:]
        sizes = {"BLOCKS": blocks, "LISTED": listed, "M": config.rows, "N": config.keys, "STAGES": config.stages}
        grid = (blocks * -(-most // part), heads, batch)
        return Launch(name, writes, grid, common | sizes | more, config.warps, config.stages, config.registers)

    packed = packed_parts(problem, chosen.sparse_forward)
    first = one(KERNELS[0], chosen.sparse_forward, ("out", "lse"), of_queries=True, **mask, PACKED=packed)
    of_keys, product = chosen.sparse_key_backward, chosen.sparse_query_product
    if scores is None or product is None:
        return (
            first,
            one(KERNELS[1], chosen.sparse_query_backward, ("dq",), of_queries=True, **mask),
            one(KERNELS[2], of_keys, ("dk", "dv"), of_queries=False, **mask, EARLY=of_keys.early),
        )
    _, most, slots, wide, tall = scores.shape
    slot = {"HEADS": most, "WIDE": wide, "TALL": tall}
    key_sizes = mask | slot | {"EARLY": of_keys.early, "SLOTS": slots}
    calls = [first]
    for head in range(0, heads, most):
        n = min(most, heads - head)
        writes = ("d_scores", "dk", "dv")
        calls.append(one("sparse_key_scores", of_keys, writes, of_queries=False, heads=n, **key_sizes))
        calls.append(one(PRODUCT, product, ("dq",), of_queries=True, heads=n, **slot))
    return tuple(calls)


def packed_parts(problem: "SparseProblem", config: Config) -> int:
    """Keys of the parts that shorter blocks go in, several in a step. 0: a block at a time, if there are any."""
    return min(config.packed, config.keys) if problem.width is None and not problem.even else 0


def shorter(queries: "Side", columns: int, part: int) -> jax.Array:
    """Of the blocks that are not whole, how many have a first part, a second and so on; int32 [B, H, blocks, parts]."""
    queries = jax.lax.optimization_barrier(queries)  # as in `slots`
    at = jnp.arange(queries.first.shape[-1], dtype=jnp.int32)[None, None, None]
    listed = (at >= queries.whole[..., None]) & (at < queries.count[..., None])
    lengths = jnp.where(listed, queries.last - queries.first, 0)
    parts = [(lengths > begin).sum(-1, dtype=jnp.int32) for begin in range(0, columns, part)]
    return jnp.stack(parts, -1)


def slots(queries: "Side", keys: "Side", tokens: int) -> jax.Array:
    """The slot of each entry of the keys' lists, int32 [B, H, blocks of keys, L]; -1 if no list of queries has it.

    Args:
        queries: Blocks of queries; entry n of list i has slot i * L + n.
        keys: Blocks of keys.
        tokens: Of queries or keys, what there are more of.

    Returns:
        Slots; those beyond a list's count say nothing.
    """
    queries, keys = jax.lax.optimization_barrier((queries, keys))  # XLA would fold what is known, for minutes
    blocks, listed = queries.first.shape[2:]
    others = keys.first.shape[2]

    def number(starts: jax.Array, first: jax.Array) -> jax.Array:
        """The block that begins at a token and is not empty; [blocks + 1], [blocks, L]."""
        begun = jnp.zeros(tokens + 1, jnp.int32).at[starts[1:]].add(1)
        return jnp.cumsum(begun)[first]

    def of_a_head(queries: "Side", keys: "Side") -> jax.Array:
        there = jnp.arange(listed)[None] < queries.count[:, None]
        at = number(keys.starts, queries.first) * blocks + jnp.arange(blocks)[:, None]
        at = jnp.where(there, at, others * blocks)
        table = jnp.full(others * blocks, -1, jnp.int32)
        table = table.at[at].set(jnp.arange(blocks * listed, dtype=jnp.int32).reshape(at.shape), mode="drop")
        return table[jnp.arange(others)[:, None] * blocks + number(queries.starts, keys.first)]

    return jax.vmap(jax.vmap(of_a_head))(queries, keys)


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
    chosen = _configs(problem, q, queries)
    call = launches(problem, q, k, queries, keys, chosen)[0]
    part = packed_parts(problem, chosen.sparse_forward)
    few = shorter(queries, problem.columns, part) if part else queries.count  # not read
    arrays = {"q": q, "k": k, "v": v, "scale": float(problem.scale), **_lists(queries), "key_places": keys.places}
    arrays["few"] = few
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
    chosen = _configs(problem, r.q, r.queries)
    calls = launches(problem, r.q, r.k, r.queries, r.keys, chosen)[1:]
    arrays: dict[str, Any] = {"q": r.q, "k": r.k, "v": r.v, "lse": r.lse, "delta": delta}
    arrays |= {"d_out": d_out.astype(r.q.dtype), "scale": float(problem.scale)}
    of_queries = _lists(r.queries) | {"key_places": r.keys.places}
    of_keys = _lists(r.keys) | {"query_places": r.queries.places}
    scores = kept(problem, r.q, r.queries, chosen)
    results: dict[str, Any] = {"dq": r.q, "dk": r.k, "dv": r.v}
    if scores is None:
        gradients = _run(calls[0], arrays | of_queries, results) | _run(calls[1], arrays | of_keys, results)
        return gradients["dq"], gradients["dk"], gradients["dv"]
    of_keys["slots"] = slots(r.queries, r.keys, max(r.q.shape[1], r.k.shape[1]))
    results["d_scores"] = scores
    done: dict[str, jax.Array] = {}
    for n, (through_keys, product) in enumerate(zip(calls[::2], calls[1::2], strict=True)):
        arrays["head"] = n * scores.shape[1]
        done |= _run(through_keys, arrays | of_keys | done, results)
        done |= _run(product, arrays | of_queries | done, results)
        done = jax.lax.optimization_barrier(done)  # the next ones write over what the product has read
    return done["dq"], done["dk"], done["dv"]


def _lists(side: "Side") -> dict[str, jax.Array]:
    return side._asdict()


def _configs(problem: "SparseProblem", q: jax.Array, queries: "Side") -> SparseConfigs:
    return configs(
        target(), rows=problem.rows, columns=problem.columns, dim=q.shape[-1], itemsize=q.dtype.itemsize,
        listed=queries.first.shape[3],
    )  # fmt: skip


def _run(call: Launch, arrays: dict, results: dict) -> dict[str, jax.Array]:
    from monarchrt.triton_kernels import launch

    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in results.items()}
    return launch.call(call, arrays, shapes, target().compute_capability)
