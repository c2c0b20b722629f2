"""Exact top-k attention, the paper's oracle: every query attends to the keys with its largest scores."""

import dataclasses
import math

from jaxtyping import Array

from monarch_jax.devices import on_cuda
from monarchrt.models.attention.base import ALWAYS_WRITTEN, Context, Density, Grid, visible_share
from monarchrt.models.attention.masked import (
    MaskedAttention,
    Places,
    ceil_share,
    check_reach,
    check_share,
    largest,
    masked_attention,
    seen_frames,
    warn_exact,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopKAttention(MaskedAttention):
    """Softmax over the k largest scores of each query and head (MonarchRT paper, Section 2.2: "oracle top-k").

    k is `keep` times the number of visible keys, rounded up; of equal scores the first are taken, so that there are
    exactly k. All scores are computed: this shows the quality that a choice of keys can reach, not its speed. The
    choice has no gradient.

    Examples:
        >>> import jax.numpy as jnp
        >>> x = jnp.ones((1, 8, 2, 4))
        >>> TopKAttention(keep=0.25)(x, x, x, grid=(2, 2, 2)).shape
        (1, 8, 2, 4)
        >>> print(TopKAttention(keep=0.15).density((21, 30, 52), causal_block=3))
        8.6% of the map, 15.0% of what is visible

    Attributes:
        keep: Fraction of the visible keys to keep, above 0 and at most 1.
    """

    name = "top_k"
    keep: float | int = dataclasses.field(default=0.1, metadata=ALWAYS_WRITTEN)

    def __post_init__(self):
        self._set(keep=check_share(self.name, "keep", self.keep))

    def check(self, grid: Grid | None, *, causal_block: int | None = None) -> None:
        """Raises ValueError if a single key is more than twice the requested fraction."""
        if grid is not None:
            tokens = math.prod(grid)
            check_reach(self.name, self.keep, 1 / tokens, f"{tokens} keys")

    def attend(self, query: Array, key: Array, value: Array, places: Places, context: Context) -> Array:
        """See `MaskedAttention`."""
        visible = places.visible
        among = None if visible is None else visible[None, None, None]
        count = places.by_seen(lambda frames: ceil_share(self.keep, frames * places.per_frame))
        if on_cuda() and value.shape[-1] == query.shape[-1]:
            warn_exact(self.name, "each query keeps different keys.")
        return masked_attention(
            query, key, value, keep=lambda rows, scores: largest(scores, count, among=among), visible=visible
        )

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """Exact."""
        self.check(grid, causal_block=causal_block)
        per_frame = grid[1] * grid[2]
        kept = sum(ceil_share(self.keep, int(seen) * per_frame) for seen in seen_frames(grid[0], causal_block))
        kept /= grid[0] ** 2 * per_frame
        return Density(self.keep, kept, kept / visible_share(grid, causal_block))
