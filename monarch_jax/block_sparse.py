"""Block-sparse attention: each block of queries attends to the blocks of keys in its list.

All sparse kinds of attention reduce to this once they have chosen keys: tokens in blocks, a list of key blocks per head
and query block and, for bands that cut through blocks, a predicate on tokens. One set of kernels serves them all.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from monarch_jax._typing import Array, Bool, Float, Int
from monarch_jax.checks import LARGEST, array, brief, natural, positive, softmax_scale
from monarch_jax.contract import SAVED, Side, SparseProblem, SparseResiduals, accumulator_dtype, vary_alike
from monarch_jax.devices import on_cuda
from monarch_jax.partitioning import anywhere, left_to_the_compiler

IMPLEMENTATIONS = ("mosaic", "triton", "xla")
LEAST_SCALE = 1e-8  # kernels take scores that are masked for -1e30 before they are scaled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockLists:
    """For each block of one side, a list of the distinct blocks of the other side that it meets.

    Attributes:
        entries: int32 [B, H, blocks, L], block numbers, of which the first `count` are valid. Whole blocks come first,
            then the others, longest first.
        whole: int32 [B, H, blocks], number of leading entries that are whole: of the largest size, seen without a mask.
        count: int32 [B, H, blocks], number of valid entries.
    """

    entries: Any
    whole: Any
    count: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockMask:
    """The keys that each query sees, by blocks; made by `block_mask`. B and H may be 1, for all samples or heads.

    Arrays are NumPy arrays, which are static while tracing, or JAX arrays.

    Attributes:
        query_starts: int32 [B, H, Qb + 1], the first token of each block of queries, and one past the last token.
        key_starts: int32 [B, H, Kb + 1], likewise for keys; no query sees keys after the last block.
        keys: For each block of queries, its blocks of keys.
        queries: For each block of keys, its blocks of queries; the same pairs as in `keys`.
        rows: Largest number of queries in a block.
        columns: Largest number of keys in a block.
        query_places: int32 [B, H, Nq], position of each query in the order in which the band is defined; None without
            a band.
        key_places: int32 [B, H, Nk], likewise.
        width: In blocks that are not whole, keys within this distance of the query's position are seen; None: all.
        sink: Keys at positions below this one are seen too.
        even: Whether every block is known to be of the largest size or empty, and there is no band.
    """

    query_starts: Any
    key_starts: Any
    keys: BlockLists
    queries: BlockLists
    query_places: Any = None
    key_places: Any = None
    rows: int = dataclasses.field(metadata={"static": True})
    columns: int = dataclasses.field(metadata={"static": True})
    width: int | None = dataclasses.field(default=None, metadata={"static": True})
    sink: int = dataclasses.field(default=0, metadata={"static": True})
    even: bool = dataclasses.field(default=False, metadata={"static": True})


def block_mask(
    seen: Bool[Array, "_ _ Qb Kb"] | np.ndarray,
    *,
    query_starts: Int[Array, "..."] | np.ndarray | Sequence[int],
    key_starts: Int[Array, "..."] | np.ndarray | Sequence[int],
    rows: int | None = None,
    columns: int | None = None,
    most: int | None = None,
    cut: Bool[Array, "_ _ Qb Kb"] | np.ndarray | None = None,
    query_places: Int[Array, "_ _ Nq"] | np.ndarray | None = None,
    key_places: Int[Array, "_ _ Nk"] | np.ndarray | None = None,
    width: int | None = None,
    sink: int = 0,
) -> BlockMask:
    """Builds a mask and its block lists in both directions, with NumPy unless an argument is a JAX array.

    Examples:
        >>> mask = block_mask(np.array([[[[True, True], [False, True]]]]), query_starts=[0, 2, 3], key_starts=[0, 2, 4])
        >>> mask.keys.count.tolist(), mask.queries.count.tolist()
        ([[[2, 1]]], [[[1, 2]]])

    Args:
        seen: bool [B, H, Qb, Kb], which blocks of keys each block of queries sees, at least in part; B and H may be 1.
        query_starts: [Qb + 1] or [B, H, Qb + 1], the first query of each block, from 0, and one past the last query.
            A block may be empty.
        key_starts: [Kb + 1] or [B, H, Kb + 1], likewise for keys; no query sees keys after the last block.
        rows: Largest number of queries in a block; required if `query_starts` is a JAX array.
        columns: Largest number of keys in a block; required if `key_starts` is a JAX array.
        most: Largest number of key blocks that a query block sees, and so the length of the lists if `seen` is a JAX
            array; a query block that sees more then keeps its first ones in the order of `BlockLists`. None: all.
        cut: bool [B, H, Qb, Kb], which pairs of blocks the band may cut through; False asserts that the whole pair is
            in the band or the sink, so that kernels need no predicate. None: any pair may be cut.
        query_places: int32 [B, H, Nq], positions in the order in which the band is defined.
        key_places: int32 [B, H, Nk], likewise for keys.
        width: Within listed blocks, keys up to this distance from the query's position are seen. None: all; no band.
        sink: Keys at positions below this one are seen too.

    Returns:
        The mask.

    Raises:
        ValueError: If an argument is invalid, shapes do not match, sizes are missing, or a part of a band is given
            without the rest. The values of JAX arrays are not checked.
    """
    given = (seen, query_starts, key_starts, cut)
    xp: Any = jnp if any(isinstance(x, jax.Array) for x in given) else np
    seen = _of_kind("seen", seen, np.bool_, "bool [B, H, blocks of queries, of keys]")
    if seen.ndim != 4 or 0 in seen.shape:
        raise ValueError(
            f"seen has shape {seen.shape}; it should be [B, H, blocks of queries, of keys], at least one of each."
        )
    most = None if most is None else positive("most", most)
    starts, sizes = [], []
    for name, x, most_name, size, axis in (
        ("query_starts", query_starts, "rows", rows, 2),
        ("key_starts", key_starts, "columns", columns, 3),
    ):
        size = None if size is None else positive(most_name, size)
        x = _of_kind(name, x, np.integer, "integers [blocks + 1] or [B, H, blocks + 1]")
        x = x[None, None] if x.ndim == 1 else x
        if x.ndim != 3 or x.shape[-1] != seen.shape[axis] + 1:
            raise ValueError(f"{name} has shape {x.shape}; {seen.shape[axis]} blocks have {seen.shape[axis] + 1}.")
        if isinstance(x, np.ndarray):
            lengths = np.diff(x)
            if (x[..., 0] != 0).any() or (lengths < 0).any() or x.max() > LARGEST:
                raise ValueError(
                    f"{name} should begin with 0 and not decrease, up to {LARGEST}: {x.ravel()[:4].tolist()} and so on."
                )
            size = max(1, int(lengths.max()), size or 0)
        if size is None:
            raise ValueError(f"{most_name} is required if {name} is a JAX array: the tokens of the largest block.")
        starts.append(x.astype(np.int32))
        sizes.append(size)
    query_places, key_places, width, sink = _band(query_places, key_places, width, sink)
    if cut is not None:
        cut = _of_kind("cut", cut, np.bool_, "bool [B, H, blocks of queries, of keys]")
        if width is None:
            raise ValueError("cut says where a band may cut through blocks; give width, query_places and key_places.")
        if cut.ndim != 4 or cut.shape[2:] != seen.shape[2:]:
            raise ValueError(f"cut has shape {cut.shape}; seen has {seen.shape}, whose last two sizes it should have.")
    leads = {"seen": seen, "query_starts": starts[0], "key_starts": starts[1], "cut": seen if cut is None else cut}
    for axis, what in ((0, "samples"), (1, "heads")):
        if len({x.shape[axis] for x in leads.values()} - {1}) > 1:
            shown = ", ".join(f"{name} for {x.shape[axis]}" for name, x in leads.items())
            raise ValueError(f"the mask is for several numbers of {what}: {shown}; each should be 1 or the same.")
    seen = xp.broadcast_to(seen, (*np.broadcast_shapes(*(x.shape[:2] for x in leads.values())), *seen.shape[2:]))
    uncut = xp.broadcast_to(width is None if cut is None else ~xp.asarray(cut), seen.shape)
    lengths = [xp.asarray(x)[..., 1:] - xp.asarray(x)[..., :-1] for x in starts]
    seen = seen & (lengths[0] > 0)[..., :, None] & (lengths[1] > 0)[..., None, :]
    shorter = [size - x for size, x in zip(sizes, lengths, strict=True)]  # than a block can be
    keys, seen = _lists(seen, uncut & (shorter[1] == 0)[..., None, :], shorter[1], most)
    across = [xp.swapaxes(x, -1, -2) for x in (seen, uncut & (shorter[0] == 0)[..., :, None])]
    queries, _ = _lists(across[0], across[1], shorter[0], None)
    return BlockMask(
        query_starts=starts[0], key_starts=starts[1], keys=keys, queries=queries, query_places=query_places,
        key_places=key_places, rows=sizes[0], columns=sizes[1], width=width, sink=sink,
        even=width is None and all(_even(x, size) for x, size in zip(starts, sizes, strict=True)),
    )  # fmt: skip


def apart(mask: BlockMask) -> tuple[list[Array], Callable[[list[Array]], BlockMask]]:
    """Splits a mask into its JAX arrays and a function that rebuilds it from them; NumPy arrays stay static.

    Examples:
        >>> mask = block_mask(np.eye(2, dtype=bool)[None, None], query_starts=[0, 4, 8], key_starts=[0, 4, 8])
        >>> given, with_arrays = apart(mask)
        >>> given, with_arrays(given).rows
        ([], 4)
    """
    parts, structure = jax.tree.flatten(mask)
    traced = [isinstance(x, jax.Array) for x in parts]

    def with_arrays(given: list[Array]) -> BlockMask:
        rest = iter(given)
        return jax.tree.unflatten(structure, [next(rest) if at else x for x, at in zip(parts, traced, strict=True)])

    return [x for x, at in zip(parts, traced, strict=True) if at], with_arrays


def _of_kind(name: str, value: Any, kind: Any, form: str) -> "np.ndarray | jax.Array":
    """A JAX array as it is, or a NumPy array of anything else; ValueError unless its entries are of this kind."""
    try:
        x = value if isinstance(value, jax.Array) else np.asarray(value)
    except (ValueError, TypeError, OverflowError):  # such as rows of several lengths
        x = np.asarray(None)
    if not jnp.issubdtype(x.dtype, kind):
        shown = f"of {x.dtype} {x.shape}" if isinstance(value, jax.Array | np.ndarray) else brief(value)
        raise ValueError(f"{name} is {shown}; it should be {form}.")
    return x


def _band(query_places: Any, key_places: Any, width: int | None, sink: int) -> tuple[Any, Any, int | None, int]:
    """The checked arguments of a band."""
    if (width is None) != (query_places is None) or (width is None) != (key_places is None):
        raise ValueError("width, query_places and key_places make up a band: give all of them, or none.")
    sink = natural("sink", sink)
    if width is None:
        if sink:
            raise ValueError(f"sink={sink} without a band; give width, query_places and key_places, or sink=0.")
        return None, None, None, 0
    places = []
    for name, x in (("query_places", query_places), ("key_places", key_places)):
        x = _of_kind(name, x, np.integer, "integers [B, H, tokens]")
        if x.ndim != 3:
            raise ValueError(f"{name} has shape {x.shape}; it should be [B, H, tokens], where B and H may be 1.")
        places.append(x)
    return *places, natural("width", width), sink


def _even(starts: Any, size: int) -> bool:
    """Whether every block is known to hold `size` tokens or none."""
    return isinstance(starts, np.ndarray) and bool(np.isin(np.diff(starts), (0, size)).all())


def _lists(seen: Any, whole: Any, shorter: Any, most: int | None) -> tuple[BlockLists, Any]:
    """Lists of the block numbers along the last axis, and which blocks are listed, at most `most`.

    Whole blocks come first, then others by decreasing length; ties ascending.
    """
    xp, blocks = (jnp, seen.shape[-1]) if isinstance(seen, jax.Array) else (np, seen.shape[-1])
    if xp is np:
        longest = max(1, int(seen.sum(-1).max(initial=0)))
        if most is not None and longest > most:
            raise ValueError(f"most={most} blocks of keys, but a block of queries sees {longest}.")
        most = longest
    numbers = np.arange(blocks, dtype=np.int32)[None, None, None]
    rank = xp.where(whole, numbers, numbers + blocks * (1 + shorter[..., None, :]))
    ranks = xp.where(seen, rank, np.iinfo(np.int32).max)
    listed = xp.sort(ranks, -1)[..., : most or blocks]
    if listed.shape[-1] < blocks:  # kernels would read beyond a list whose count is larger
        seen = seen & (ranks <= listed[..., -1:])
    whole, count = (x.sum(-1).astype(np.int32) for x in (seen & whole, seen))
    return BlockLists(entries=(listed % blocks).astype(np.int32), whole=whole, count=count), seen


def block_sparse_attention(
    query: Float[Array, "B Nq H D"],
    key: Float[Array, "B Nk H D"],
    value: Float[Array, "B Nk H D"],
    mask: BlockMask,
    *,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B Nq H D"]:
    """Softmax attention of each block of queries to the blocks of keys in its list.

    Sparse attention such as SVG, Radial, STA, VSA and SLA reduces to this once it has chosen keys (MonarchRT compares
    with these in Section 5). Softmax and sums are in float32 for half precision. Differentiable in query, key and value
    in reverse mode; the mask has no gradient. Memory is linear in the number of tokens.

    Examples:
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 16))
        >>> diagonal = block_mask(np.eye(2, dtype=bool)[None, None], query_starts=[0, 4, 8], key_starts=[0, 4, 8])
        >>> block_sparse_attention(q, k, v, diagonal).shape
        (1, 8, 2, 16)

    Args:
        query: [B, Nq, H, D], tokens in the order of the mask's blocks.
        key: [B, Nk, H, D], likewise.
        value: [B, Nk, H, D], in the order of `key`.
        mask: The keys that each query sees, made by `block_mask`.
        scale: Softmax scale from 1e-8, below which kernels would not tell hidden keys from others, to 1e6; default
            D**-0.5.
        implementation: "mosaic" (a kernel for Hopper GPUs and masks that are `even`; its gradients are those of
            "triton"), "triton" (kernels for NVIDIA GPUs from Ampere on), "xla" (the definition, block by block), or
            None: the fastest that supports the call on the default device.

    Returns:
        [B, Nq, H, D] in the inputs' dtype; zero for a query that sees no key.

    Raises:
        ValueError: If a shape, a dtype or an argument is invalid, or the mask is for other shapes.
        NotImplementedError: If the requested implementation does not support this call; the message says why.
    """
    query, key, value = (array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    _check(query, key, value, mask)
    factor = softmax_scale(scale, query.shape[-1])
    if factor <= 0:
        raise ValueError(f"scale={brief(scale)} is not a number above 0; leave it out for head_dim ** -0.5.")
    if factor < LEAST_SCALE:
        raise ValueError(
            f"scale={brief(scale)} is too small; use at least {LEAST_SCALE:g}, or multiply query by the rest."
        )
    chosen = choose(implementation, query, key, mask)
    problem = _problem(mask, factor)
    run = functools.partial(_attend if chosen == "xla" else functools.partial(_by_kernels, chosen), problem)
    given, with_arrays = apart(mask)

    def attend(query: Array, key: Array, value: Array, given: list[Array]) -> Array:
        return run(query, key, value, with_arrays(given))

    return left_to_the_compiler(attend, (query, key, value), given)


def choose(implementation: str | None, query: Any, key: Any, mask: BlockMask | None = None) -> str:
    """Selects the implementation of a call: the named one, or the fastest that supports the call; else "xla".

    Args:
        implementation: One of `IMPLEMENTATIONS`, or None.
        query: Has the shape [B, Nq, H, D] and the dtype of the queries.
        key: Has the shape [B, Nk, H, D] and the dtype of the keys.
        mask: The mask of the call; None if it is not known.

    Returns:
        The name of the implementation.

    Raises:
        ValueError: If the name is unknown.
        NotImplementedError: If the named one does not support the call; the message says why.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not None or one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "xla" or (implementation is None and not on_cuda(capability=8)):
        return "xla"
    query, key = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key))
    if implementation is None:
        if _why_not("triton", query, key, mask):
            return "xla"
        return "mosaic" if _prefers_mosaic(query, mask) and not _why_not("mosaic", query, key, mask) else "triton"
    if reason := _why_not(implementation, query, key, mask):
        raise NotImplementedError(f"implementation={implementation!r} cannot run this call: {reason}")
    return implementation


def _prefers_mosaic(query: Any, mask: BlockMask | None) -> bool:
    """Whether blocks are of a size for which the Mosaic kernel is the faster one, on Hopper."""
    from monarchrt.pallas_kernels import block_sparse

    return mask is not None and on_cuda(capability=9) and block_sparse.preferred(_problem(mask), query)


def _why_not(name: str, query: Any, key: Any, mask: BlockMask | None) -> str | None:
    """Why kernels do not support a call, or None; the gradients of "mosaic" are those of "triton"."""
    from monarchrt.pallas_kernels import block_sparse as mosaic
    from monarchrt.triton_kernels import block_sparse as triton

    if name == "mosaic":
        reason = "nothing is known of the mask." if mask is None else mosaic.supports(_problem(mask), query, key)
        if reason:
            return reason
    return triton.supports(query, key)


def _problem(mask: BlockMask, scale: float = 1.0) -> SparseProblem:
    """The static part of a call."""
    return SparseProblem(
        scale=scale, rows=mask.rows, columns=mask.columns, width=mask.width, sink=mask.sink, even=mask.even
    )


def _check(query: Array, key: Array, value: Array, mask: BlockMask) -> None:
    """Raises ValueError if shapes or dtypes are inconsistent."""
    if not isinstance(mask, BlockMask):
        raise ValueError(f"mask is a {type(mask).__name__}; it should be a BlockMask, made by block_mask.")
    for name, x in {"query": query, "key": key, "value": value}.items():
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} has shape {x.shape}; it should be [B, tokens, H, D], each at least 1.")
        if x.dtype != query.dtype:
            raise ValueError(f"{name} is {x.dtype.name}, query {query.dtype.name}; use one dtype for all three.")
    batch, _, heads, dim = query.shape
    for name, x in {"key": key, "value": value}.items():
        if x.shape != (batch, key.shape[1], heads, dim):
            raise ValueError(f"{name} has shape {x.shape}; with query {query.shape} it should be [B, Nk, H, D].")
    for name, x, tokens in (("query_starts", mask.query_starts, query), ("key_starts", mask.key_starts, key)):
        ends = x[..., -1] if isinstance(x, np.ndarray) else tokens.shape[1]
        if np.any(ends > tokens.shape[1]) or (name == "query_starts" and np.any(ends != tokens.shape[1])):
            raise ValueError(f"the mask's {name} end with {np.max(ends)}; there are {tokens.shape[1]} tokens.")
    for name, x, size in (
        ("query_starts", mask.query_starts, mask.rows),
        ("key_starts", mask.key_starts, mask.columns),
    ):
        if mask.even and (mask.width is not None or (isinstance(x, np.ndarray) and not _even(x, size))):
            raise ValueError(f"the mask says even=True, but it has a band, or blocks of {name} hold fewer than {size}.")
    for x in jax.tree.leaves(mask):
        if x.shape[0] not in (1, batch) or x.shape[1] not in (1, heads):
            raise ValueError(
                f"the mask is for {x.shape[:2]} samples and heads; the call has {(batch, heads)}, or use 1."
            )
    for name, x, tokens in (("query_places", mask.query_places, query), ("key_places", mask.key_places, key)):
        if x is not None and x.shape[-1] != tokens.shape[1]:
            raise ValueError(f"the mask's {name} has {x.shape[-1]} places; there are {tokens.shape[1]} tokens.")


def _side(lists: BlockLists, starts: Any, others: Any, places: Any, batch: int, heads: int) -> Side:
    """The lists in the form that kernels read, [B, H, ...]: the first and last token of each entry, not its number."""
    lead = np.broadcast_shapes(lists.entries.shape[:2], others.shape[:2])
    xp: Any = np if isinstance(others, np.ndarray) and isinstance(lists.entries, np.ndarray) else jnp
    entries = xp.broadcast_to(lists.entries, (*lead, *lists.entries.shape[2:]))
    flat = entries.reshape(*lead, -1)
    begins = xp.broadcast_to(others, (*lead, others.shape[-1]))
    first, last = (xp.take_along_axis(begins, flat + n, -1).reshape(entries.shape) for n in (0, 1))
    places = np.zeros((1, 1, 1), np.int32) if places is None else places
    arrays = (starts, first, last, lists.whole, lists.count, places)
    return Side(*(jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch, heads, *x.shape[2:])) for x in arrays))


def kernel_sides(mask: BlockMask, *, batch: int, heads: int) -> tuple[Side, Side]:
    """Converts a mask to the form that the kernels read: blocks of queries with their blocks of keys, and the reverse.

    Examples:
        >>> mask = block_mask(np.eye(2, dtype=bool)[None, None], query_starts=[0, 4, 8], key_starts=[0, 4, 8])
        >>> queries, keys = kernel_sides(mask, batch=1, heads=3)
        >>> queries.first.shape
        (1, 3, 2, 1)
    """
    queries = _side(mask.keys, mask.query_starts, mask.key_starts, mask.query_places, batch, heads)
    keys = _side(mask.queries, mask.key_starts, mask.query_starts, mask.key_places, batch, heads)
    return queries, keys


def _by_kernels(name: str, problem: SparseProblem, query: Array, key: Array, value: Array, mask: BlockMask) -> Array:
    """`block_sparse_attention` by "mosaic" or "triton", with rules for vmap and for several devices."""
    batch, heads = query.shape[0], query.shape[2]
    queries, keys = kernel_sides(mask, batch=batch, heads=heads)
    flat = vary_alike(query, key, value, *queries, *keys)
    return _kernels(name)(problem, *flat[:3], Side(*flat[3:9]), Side(*flat[9:]))


@functools.cache  # the same function in every call, so that JAX reuses what it has traced
def _kernels(name: str) -> Any:
    """The kernels, differentiable, under vmap and on split operands."""
    from monarchrt.pallas_kernels import block_sparse as mosaic
    from monarchrt.triton_kernels import block_sparse as triton

    queries, keys = ("bnhd", "bmhd", "bmhd"), ("bh1", "bh11", "bh11", "bh1", "bh1", "bh1")

    def forward(problem, q, k, v, of_queries, of_keys):
        def fn(q, k, v, *lists):
            if name == "mosaic":
                return mosaic.forward(problem, q, k, v, Side(*lists[:6]))
            return triton.forward(problem, q, k, v, Side(*lists[:6]), Side(*lists[6:]))

        return anywhere(fn, (*queries, *keys, *keys), ("bnhd", "bhn"))(q, k, v, *of_queries, *of_keys)

    def attend(problem, q, k, v, of_queries, of_keys):
        return forward(problem, q, k, v, of_queries, of_keys)[0]

    def fwd(problem, q, k, v, of_queries, of_keys):
        out, lse = (checkpoint_name(x, SAVED) for x in forward(problem, q, k, v, of_queries, of_keys))
        return out, SparseResiduals(q, k, v, out, lse, of_queries, of_keys)

    def bwd(problem, r, d_out):
        def fn(q, k, v, out, d_out, lse, *lists):
            return triton.vjp(problem, SparseResiduals(q, k, v, out, lse, Side(*lists[:6]), Side(*lists[6:])), d_out)

        axes = (*queries, "bnhd", "bnhd", "bhn", *keys, *keys)
        return *anywhere(fn, axes, queries)(r.q, r.k, r.v, r.out, d_out, r.lse, *r.queries, *r.keys), None, None

    op = jax.custom_vjp(attend, nondiff_argnums=(0,))
    op.defvjp(fwd, bwd)
    return op


def _attend(problem: SparseProblem, query: Array, key: Array, value: Array, mask: BlockMask) -> Array:
    """The definition of `block_sparse_attention`, one block of queries at a time, differentiated by JAX."""
    batch, tokens, heads, _ = query.shape
    dtype = accumulator_dtype(query.dtype)
    lead = (batch, heads)
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (query, key, value))  # [B, H, N, D]
    starts, begins = (jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in (mask.query_starts, mask.key_starts))
    lists = jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape[2:])), mask.keys)
    pick = jax.vmap(jax.vmap(lambda x, at: x[at]))  # [B, H, N, ...] at [B, H, n]

    def place_of(places, at):
        return pick(jnp.broadcast_to(places, (*lead, places.shape[-1])), at)

    @jax.checkpoint
    def block(number: Array) -> Array:
        rows = starts[..., number][..., None] + jnp.arange(mask.rows)[None, None]  # [B, H, rows]
        rows = jnp.minimum(rows, tokens - 1)
        entries = lists.entries[:, :, number]  # [B, H, L]
        first, last = pick(begins, entries), pick(begins, entries + 1)
        columns = first[..., None] + jnp.arange(mask.columns)[None, None, None]  # [B, H, L, columns]
        listed = jnp.arange(entries.shape[-1])[None, None]
        there = (columns < last[..., None]) & (listed < lists.count[:, :, number][..., None])[..., None]
        columns = jnp.minimum(columns, key.shape[1] - 1).reshape(*lead, -1)
        seen = there.reshape(*lead, 1, -1)
        # what is not listed may be NaN, and 0 * NaN is NaN
        keys, values = (jnp.where(jnp.swapaxes(seen, -1, -2), pick(x, columns), 0) for x in (k, v))
        if mask.width is not None:
            mine, theirs = (
                place_of(mask.query_places, rows)[..., None],
                place_of(mask.key_places, columns)[..., None, :],
            )
            near = (jnp.abs(mine - theirs) <= mask.width) | (theirs < mask.sink)
            whole = (listed < lists.whole[:, :, number][..., None])[..., None]
            seen &= near | jnp.broadcast_to(whole, there.shape).reshape(*lead, 1, -1)
        scores = jnp.einsum("bhqd,bhkd->bhqk", pick(q, rows), keys, preferred_element_type=dtype)
        scores = jnp.where(seen, scores * problem.scale, -jnp.inf)
        top = lax.stop_gradient(scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))  # 0 where a row sees nothing
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), values, preferred_element_type=dtype)
        return (out / jnp.where(total == 0.0, 1.0, total)).astype(query.dtype)

    out = lax.map(block, jnp.arange(starts.shape[-1] - 1))  # [Qb, B, H, rows, D]
    at = jnp.arange(tokens)
    of = jax.vmap(jax.vmap(lambda edges: jnp.searchsorted(edges, at, side="right") - 1))(starts)
    of = jnp.minimum(of, starts.shape[-1] - 2)
    flat = jnp.moveaxis(out, 0, 2).reshape(*lead, -1, out.shape[-1])
    picked = pick(flat, of * mask.rows + at[None, None] - pick(starts, of))
    return jnp.moveaxis(picked, 1, 2)
