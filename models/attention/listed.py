"""Sparse kinds that keep blocks of keys: an exact form with masks, and lists for `monarch_jax.block_sparse`.

A kind describes its choice by `Blocks`: an order of the tokens in which each block is contiguous, and the mask.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from monarch_jax import block_sparse
from monarch_jax.block_mask import BlockMask, apart
from monarch_jax.block_sparse import block_sparse_attention
from monarch_jax.checks import one_of
from monarch_jax.devices import on_cuda
from monarchrt.models.attention.base import NOT_STORED
from monarchrt.models.attention.masked import Keep, MaskedAttention, Places, masked_attention, warn_exact
from monarchrt.models.sharding import BY_HEADS, on_each_device

IMPLEMENTATIONS = ("exact", *block_sparse.IMPLEMENTATIONS)


class Order(NamedTuple):
    """A permutation of tokens, [N] or [batch, heads, N], and its inverse."""

    to: Any
    back: Any

    @classmethod
    def by(cls, numbers: Any) -> "Order":
        """The order of ascending numbers [N]; a stable sort.

        Examples:
            >>> Order.by(np.array([2, 0, 1])).to.tolist()
            [1, 2, 0]
        """
        if isinstance(numbers, np.ndarray):
            to = np.argsort(numbers, kind="stable").astype(np.int32)
            return cls(to, np.argsort(to).astype(np.int32))
        to = jnp.argsort(numbers).astype(jnp.int32)
        return cls(to, jnp.argsort(to).astype(jnp.int32))

    @classmethod
    def either(cls, condition: Bool[Array, "B n"], one: "Order", other: "Order") -> "Order":
        """Selects between orders by sample and head: `one` where the condition holds, [B, heads]."""
        pairs = zip(one, other, strict=True)
        return cls(*(jnp.where(condition[..., None], a[None, None], b[None, None]) for a, b in pairs))

    def apply(self, x: Float[Array, "B N n d"]) -> Float[Array, "B N n d"]:
        """Tokens in this order."""
        return _permuted(x, jnp.asarray(self.to), jnp.asarray(self.back))

    def undo(self, x: Float[Array, "B N n d"]) -> Float[Array, "B N n d"]:
        """The inverse of `apply`."""
        return _permuted(x, jnp.asarray(self.back), jnp.asarray(self.to))


@jax.custom_vjp
def _permuted(x: Array, to: Array, back: Array) -> Array:
    """A permutation whose gradient is a gather by the inverse, too; JAX's own gradient is a slower scatter-add."""
    if to.ndim == 1:
        return x.at[:, to].get(mode="promise_in_bounds", unique_indices=True)
    return jnp.take_along_axis(x, jnp.moveaxis(to, 1, 2)[..., None], axis=1, mode="promise_in_bounds")


_permuted.defvjp(
    lambda x, to, back: (_permuted(x, to, back), (to, back)),
    lambda saved, g: (_permuted(g, saved[1], saved[0]), None, None),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """The keys that a kind keeps in one call, by blocks.

    Attributes:
        mask: Blocks and lists, of tokens in the following orders.
        queries: The order of the queries; None: as they are.
        keys: The order of the keys; None: as they are.
    """

    mask: BlockMask
    queries: Order | None = None
    keys: Order | None = None

    def attend(
        self,
        query: Array,
        key: Array,
        value: Array,
        *,
        implementation: str | None,
        stack: tuple[Array, Array, Array] | None = None,
    ) -> Array:
        """Attention with this mask.

        Args:
            query: [B, Q, heads, head_dim], tokens in their own order.
            key: [B, K, heads, head_dim], likewise.
            value: As `key`.
            implementation: As in `block_sparse_attention`.
            stack: As in `Places`, for kernels that read keys and values in place.

        Returns:
            An array like `query`.

        Raises:
            NotImplementedError: If the requested implementation does not support this call.
        """
        if stack is not None and self.keys is None and self.mask.width is None:
            query = query if self.queries is None else self.queries.apply(query)
            out = _attend_stack(query, key, value, self.mask, stack, implementation)
            return out if self.queries is None else self.queries.undo(out)
        queries, keys = self.queries, self.keys
        if queries is not None and keys is not None:  # heads first, so that a block is contiguous in memory
            query, key, value = (
                jnp.moveaxis(x, 2, 1) for x in (queries.apply(query), keys.apply(key), keys.apply(value))
            )
            out = _on_each_device(query, key, value, self.mask, implementation=implementation, heads_first=True)
            return queries.undo(jnp.moveaxis(out, 1, 2))
        if queries is not None:
            query = queries.apply(query)
        if keys is not None:
            key, value = keys.apply(key), keys.apply(value)
        out = _on_each_device(query, key, value, self.mask, implementation=implementation)
        return out if queries is None else queries.undo(out)


def _on_each_device(
    query: Array, key: Array, value: Array, mask: BlockMask, *, implementation: str | None, heads_first: bool = False
) -> Array:
    """`block_sparse_attention` of each device's samples and heads, on a mesh; `heads_first` for [B, n, N, d]."""
    parts, structure = jax.tree.flatten(mask)  # [B, H, ...] each; B and H may be 1

    def attend(_: None, query: Array, key: Array, value: Array, *parts: Any) -> Array:
        if not heads_first:
            mask = jax.tree.unflatten(structure, parts)
            return block_sparse_attention(query, key, value, mask, implementation=implementation)
        mask = jax.tree.unflatten(structure, [by_head(x, query.shape[:2]) for x in parts])
        q, k, v = (x.reshape(-1, x.shape[2], 1, x.shape[3]) for x in (query, key, value))
        return block_sparse_attention(q, k, v, mask, implementation=implementation).reshape(query.shape)

    names = [("batch", "heads", *(None,) * (x.ndim - 2)) for x in parts]
    tokens = ("batch", "heads", None, None) if heads_first else BY_HEADS
    return on_each_device(attend, None, (query, key, value, *parts), (*(tokens,) * 3, *names))


def by_head(x: Any, lead: tuple[int, ...]) -> Any:
    """Reshapes a mask's array [B, H, ...], where B and H may be 1, to [B * H, 1, ...]: each head becomes a sample.

    Examples:
        >>> by_head(np.array([[[3], [5]]]), (2, 2)).tolist()
        [[[3]], [[5]], [[3]], [[5]]]
    """
    if x.shape[:2] == (1, 1):
        return x
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    return xp.broadcast_to(x, (*lead, *x.shape[2:])).reshape(-1, 1, *x.shape[2:])


def _attend_stack(
    query: Array, key: Array, value: Array, mask: BlockMask, stack: tuple[Array, Array, Array], implementation: Any
) -> Array:
    """Attention that reads keys and values in the stack; gradients are computed from those of the one layer."""
    arrays, whole = apart(mask)

    @jax.custom_vjp
    def attend(query, key, value, given, stack):
        keys, values, first = stack
        mask = whole(given)
        mask = dataclasses.replace(mask, key_starts=mask.key_starts + first)
        return _on_each_device(query, keys, values, mask, implementation=implementation)

    def forward(query, key, value, given, stack):
        attend = functools.partial(_on_each_device, mask=whole(given), implementation=implementation)
        return jax.vjp(attend, query, key, value)

    attend.defvjp(forward, lambda pull, g: (*pull(g), None, None))
    return attend(query, key, value, arrays, stack)


def either(condition: Bool[Array, "B n"], one: BlockMask, other: BlockMask) -> BlockMask:
    """Selects between masks by sample and head; both have the same number of blocks, of the same sizes.

    Args:
        condition: bool [B, heads], True for `one`.
        one: A mask.
        other: A mask.

    Returns:
        The mask.
    """

    def choose(a: Any, b: Any) -> Array:
        longest = max(a.shape[-1], b.shape[-1])  # lists are padded; kernels do not read the padding
        a, b = (jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, longest - x.shape[-1])]) for x in (a, b))
        return jnp.where(condition.reshape(*condition.shape, *[1] * (a.ndim - 2)), a, b)

    return jax.tree.map(choose, one, other)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListedAttention(MaskedAttention):
    """A kind that keeps blocks of keys, or a band, and can skip the others.

    Attributes:
        implementation: "exact" (masks, in the time of dense attention), "triton" (the block-sparse kernels), "xla" (the
            same lists in plain JAX), or None: "triton" on an NVIDIA GPU from Ampere on if it supports the call, else
            "exact".
    """

    implementation: str | None = dataclasses.field(default=None, metadata=NOT_STORED)

    def __post_init__(self):
        if self.implementation is not None:
            one_of("implementation", self.implementation, IMPLEMENTATIONS)

    def attend_kept(
        self,
        query: Array,
        key: Array,
        value: Array,
        places: Places,
        *,
        keep: Keep,
        blocks: Callable[[], Blocks],
    ) -> Array:
        """Attention to the kept keys, by the requested implementation.

        Args:
            query: [B, Q, heads, head_dim].
            key: [B, K, heads, head_dim].
            value: [B, K, heads, width]; if the width is not head_dim, as for a map, the implementation is "exact".
            places: Positions of queries and keys in the video.
            keep: The exact mask, see `masked_attention`.
            blocks: Returns the same choice by blocks; called only if needed.

        Returns:
            [B, Q, heads, width].

        Raises:
            NotImplementedError: If the requested implementation does not support this call; the message says why.
        """
        if self.implementation != "exact" and value.shape[-1] == query.shape[-1]:
            why_not = _why_not(query, key) if self.implementation is None else None
            if why_not is None:
                return blocks().attend(query, key, value, implementation=self.implementation, stack=places.stack)
            if why_not:
                warn_exact(self.name, why_not)
        return masked_attention(query, key, value, keep=keep, visible=places.visible)


def _why_not(query: Array, key: Array) -> str | None:
    """Why the kernels do not support a call; None if they do, an empty string without an NVIDIA GPU."""
    if not on_cuda():
        return ""
    if not on_cuda(capability=8):
        return "the kernels need an NVIDIA GPU from Ampere on."
    from monarchrt.triton_kernels import block_sparse as kernels

    return kernels.supports(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key)))


def is_known(places: Places) -> bool:
    """Whether all positions are static, as without a cache."""
    return isinstance(places.first, int) and isinstance(places.key_frames, np.ndarray)


def frames_of(places: Places) -> tuple[Any, Any]:
    """The frame of each frame of queries and of keys (negative if not valid), NumPy arrays if `is_known`."""
    return places.first + np.arange(places.frames), places.key_frames


def even_starts(tokens: int, block: int, *, end: Any = None) -> Any:
    """The first token of each block of a fixed size, and one past the last token; blocks after `end` are empty.

    Examples:
        >>> even_starts(10, 4).tolist(), even_starts(10, 4, end=5).tolist()
        ([0, 4, 8, 10], [0, 4, 5, 5])
    """
    starts = np.minimum(np.arange(-(-tokens // block) + 1) * block, tokens)
    if end is None:
        return starts
    return np.minimum(starts, end) if isinstance(end, int) else jnp.minimum(starts, end)
