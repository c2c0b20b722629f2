"""Sparse-linear attention (SLA): softmax attention to selected blocks plus linear attention to all keys."""

import dataclasses
import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float

from monarch_jax.block_mask import block_mask
from monarch_jax.checks import flag, positive
from monarchrt.models.attention.base import ALWAYS_WRITTEN, Context, Density, Grid, Sizes, zero_linear
from monarchrt.models.attention.listed import Blocks, ListedAttention, even_starts
from monarchrt.models.attention.masked import Places, check_share, largest, seen_frames


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLAttention(ListedAttention):
    """Trainable sparse attention with a linear branch, out = sparse + proj(linear) (SLA, 2025).

    Sparse branch: blocks of consecutive queries attend to the k blocks of keys with the largest products of means, with
    ties resolved in favour of earlier ones. Linear branch, over all keys, with phi the softmax over channels:
    phi(q) (phi(k)^T v) / (1e-5 + phi(q) . sum phi(k)). proj is a linear layer on the channels of a head, shared by all
    heads and initialized to zero, so that a model starts as with `linear=False`, which needs no training. Gradients are
    exact; the choice of blocks has none.

    k is `keep` times the number of visible blocks, rounded down as published. In block-causal attention, blocks of
    queries start at their block of frames, and the last block of keys holds the tokens so far.

    Examples:
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> SLAttention(keep=0.5, block=2, linear=False)(x, x, x, grid=(2, 2, 2)).shape
        (1, 8, 2, 4)

    Attributes:
        keep: Fraction of the blocks of keys to keep, above 0 and at most 1.
        block: Tokens of a block.
        linear: Whether to add the linear branch with its projection, head_dim x head_dim and a bias per layer.
    """

    name = "sla"
    keep: float | int = dataclasses.field(default=0.1, metadata=ALWAYS_WRITTEN)
    block: int = 64
    linear: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._set(keep=check_share(self.name, "keep", self.keep))
        self._set(block=positive("block", self.block))
        flag("linear", self.linear)

    def check(self, grid: Grid | None, *, causal_block: int | None = None) -> None:
        """Raises ValueError unless at least one block is kept."""
        if grid is None:
            return
        blocks = self._blocks(min(causal_block or grid[0], grid[0]) * grid[1] * grid[2])
        if not self.blocks_kept(blocks):
            least = f"the least is {1 / blocks:.4f}, or less with a smaller block"
            raise ValueError(f"sla: keep={self.keep} of {blocks} blocks keeps no block; {least}.")

    def init(self, sizes: Sizes, *, rngs: nnx.Rngs) -> nnx.Module | None:
        """The projection: [head_dim, head_dim] and a bias, zeros."""
        if not self.linear:
            return None
        return zero_linear(sizes.head_dim, sizes.head_dim, sizes, rngs=rngs)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block)

    def blocks_kept(self, seen: int) -> int:
        """Number of blocks that a block attends to, of those that it sees."""
        return math.floor(Fraction(str(self.keep)) * seen)

    def attend(self, query: Array, key: Array, value: Array, places: Places, context: Context) -> Array:
        """See `MaskedAttention`. Values whose width is not head_dim, as for a map, use the sparse branch only."""
        visible = places.visible
        there = jnp.ones(key.shape[1], bool) if visible is None else visible
        queries, _ = self._means(query, jnp.ones(query.shape[1], bool))
        keys, filled = self._means(key, there)
        scores = jnp.einsum("bcnd,bknd->bnck", queries, keys, precision=lax.Precision.HIGHEST)
        count = places.by_seen(lambda frames: self.blocks_kept(self._blocks(frames * places.per_frame)))
        chosen = largest(lax.stop_gradient(scores), count, among=filled[None, None, None])
        of_key = jnp.arange(key.shape[1]) // self.block

        def blocks() -> Blocks:
            starts = even_starts(query.shape[1], self.block)
            ends = even_starts(key.shape[1], self.block, end=places.seen * places.per_frame)  # valid keys come first
            most = self.blocks_kept(len(ends) - 1)
            mask = block_mask(
                chosen, query_starts=starts, key_starts=ends, columns=min(self.block, key.shape[1]), most=most
            )
            return Blocks(mask=mask)

        def keep(rows, scores):
            return chosen[:, :, rows // self.block][..., of_key]

        out = self.attend_kept(query, key, value, places, keep=keep, blocks=blocks)
        if not self.linear or value.shape[-1] != query.shape[-1]:
            return out
        linear = context.own(self)(self._linear(query, key, value, there).astype(out.dtype))
        return out + linear.astype(out.dtype)

    def _means(self, tokens: Float[Array, "B N n d"], there: Bool[Array, "N"]) -> tuple[Array, Bool[Array, "C"]]:
        """The mean of each block's valid tokens, in float32 or wider, and which blocks have any."""
        blocks, block = self._blocks(tokens.shape[1]), min(self.block, tokens.shape[1])
        rest = blocks * block - tokens.shape[1]
        dtype = jnp.promote_types(tokens.dtype, jnp.float32)
        x = jnp.where(there[None, :, None, None], tokens.astype(dtype), 0.0)
        x = jnp.pad(x, ((0, 0), (0, rest), (0, 0), (0, 0))).reshape(x.shape[0], blocks, block, *x.shape[2:]).sum(2)
        count = jnp.pad(there, (0, rest)).reshape(blocks, block).sum(-1)
        return x / jnp.maximum(count, 1)[None, :, None, None], count > 0

    def _linear(self, query: Array, key: Array, value: Array, there: Bool[Array, "K"]) -> Float[Array, "B Q n d"]:
        """The linear branch in float32 or wider; operands of matrix products are in the inputs' dtype."""
        dtype, narrow = jnp.promote_types(query.dtype, jnp.float32), query.dtype
        product = functools.partial(jnp.einsum, preferred_element_type=dtype)
        query, key = (jax.nn.softmax(x.astype(dtype), axis=-1) for x in (query, key))
        key = jnp.where(there[None, :, None, None], key, 0.0)
        total = product("bknd,bkne->bnde", key.astype(narrow), value)
        norm = 1e-5 + jnp.einsum("bqnd,bnd->bqn", query, key.sum(1))
        return product("bqnd,bnde->bqne", query.astype(narrow), total.astype(narrow)) / norm[..., None]

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """The density of the sparse branch, assuming blocks of equal size."""
        self.check(grid, causal_block=causal_block)
        seen = seen_frames(grid[0], causal_block)
        blocks = [self._blocks(int(frames) * grid[1] * grid[2]) for frames in seen]
        kept = sum(self.blocks_kept(count) / count * int(frames) for count, frames in zip(blocks, seen, strict=True))
        return Density(self.keep, kept / grid[0] ** 2, kept / int(seen.sum()))
