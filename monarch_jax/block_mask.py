"""Masks of block-sparse attention: which blocks of keys each block of queries sees, as lists in both directions."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from monarch_jax._typing import Array, Bool, Int
from monarch_jax.checks import LARGEST, brief, natural, positive
from monarch_jax.contract import Side


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
        query_places: Integers [B, H, Nq], positions from 0 on in the order in which the band is defined.
        key_places: Integers [B, H, Nk], likewise for keys.
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
    query_starts, rows = _starts("query_starts", query_starts, seen.shape[2], "rows", rows)
    key_starts, columns = _starts("key_starts", key_starts, seen.shape[3], "columns", columns)
    query_places, key_places, width, sink = _band(query_places, key_places, width, sink)
    if cut is not None:
        cut = _of_kind("cut", cut, np.bool_, "bool [B, H, blocks of queries, of keys]")
        if width is None:
            raise ValueError("cut says where a band may cut through blocks; give width, query_places and key_places.")
        if cut.ndim != 4 or cut.shape[2:] != seen.shape[2:]:
            raise ValueError(f"cut has shape {cut.shape}; seen has {seen.shape}, whose last two sizes it should have.")
    lead = _lead(seen=seen, query_starts=query_starts, key_starts=key_starts, cut=seen if cut is None else cut)
    seen = xp.broadcast_to(seen, (*lead, *seen.shape[2:]))
    uncut = xp.broadcast_to(width is None if cut is None else ~xp.asarray(cut), seen.shape)
    starts, sizes = (query_starts, key_starts), (rows, columns)
    lengths = [xp.asarray(x)[..., 1:] - xp.asarray(x)[..., :-1] for x in starts]
    seen = seen & (lengths[0] > 0)[..., :, None] & (lengths[1] > 0)[..., None, :]
    shorter = [size - x for size, x in zip(sizes, lengths, strict=True)]  # than a block can be
    keys, seen = _lists(seen, uncut & (shorter[1] == 0)[..., None, :], shorter[1], most)
    across = [xp.swapaxes(x, -1, -2) for x in (seen, uncut & (shorter[0] == 0)[..., :, None])]
    queries, _ = _lists(across[0], across[1], shorter[0], None)
    return BlockMask(
        query_starts=query_starts,
        key_starts=key_starts,
        keys=keys,
        queries=queries,
        query_places=query_places,
        key_places=key_places,
        rows=rows,
        columns=columns,
        width=width,
        sink=sink,
        even=width is None and all(is_even(x, size) for x, size in zip(starts, sizes, strict=True)),
    )


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


def _starts(name: str, starts: Any, blocks: int, size_name: str, size: int | None) -> tuple[Any, int]:
    """The checked starts of so many blocks, int32 [B, H, blocks + 1], and the tokens of the largest one."""
    size = None if size is None else positive(size_name, size)
    x = _of_kind(name, starts, np.integer, "integers [blocks + 1] or [B, H, blocks + 1]")
    x = x[None, None] if x.ndim == 1 else x
    if x.ndim != 3 or x.shape[-1] != blocks + 1 or 0 in x.shape:
        raise ValueError(
            f"{name} has shape {x.shape}; it should be [{blocks + 1}] or [B, H, {blocks + 1}] for {blocks} blocks."
        )
    if isinstance(x, np.ndarray):
        if (x[..., 0] != 0).any() or (x[..., 1:] < x[..., :-1]).any() or x.max() > LARGEST:
            raise ValueError(
                f"{name} should begin with 0 and not decrease, up to {LARGEST}: {x.ravel()[:4].tolist()} and so on."
            )
        size = max(1, int(np.diff(x).max()), size or 0)
    if size is None:
        raise ValueError(f"{size_name} is required if {name} is a JAX array: the tokens of the largest block.")
    if blocks * (size + 2) > LARGEST:  # indices of tokens in blocks of this size, and keys to sort blocks by
        raise ValueError(
            f"{size_name}={size} is too large for {blocks} blocks; it should be at most {LARGEST // blocks - 2}."
        )
    return x.astype(np.int32), size


def _lead(**arrays: Any) -> tuple[int, ...]:
    """The samples and heads [B, H] of the arrays together, where 1 is for any number."""
    for axis, what in ((0, "samples"), (1, "heads")):
        if len({x.shape[axis] for x in arrays.values()} - {1}) > 1:
            shown = ", ".join(f"{name} for {x.shape[axis]}" for name, x in arrays.items())
            raise ValueError(f"the mask is for several numbers of {what}: {shown}; each should be 1 or the same.")
    return np.broadcast_shapes(*(x.shape[:2] for x in arrays.values()))


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
        if isinstance(x, np.ndarray) and ((x < 0) | (x > LARGEST)).any():
            raise ValueError(f"{name} are from {x.min()} to {x.max()}; they should be from 0 to {LARGEST}.")
        places.append(x.astype(np.int32))  # unsigned ones could not be subtracted
    return *places, natural("width", width), sink


def is_even(starts: Sequence[int] | np.ndarray | jax.Array, size: int) -> bool:
    """Whether every block is known to hold `size` tokens or none.

    Examples:
        >>> is_even(np.array([0, 4, 4, 8]), 4), is_even(jnp.array([0, 4, 8]), 4)
        (True, False)

    Args:
        starts: [..., blocks + 1], as in `BlockMask`; the entries of a JAX array are not known.
        size: Number of tokens.
    """
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
