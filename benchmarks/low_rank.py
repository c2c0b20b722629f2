"""Attention by the best matrix of low rank, for analysis: a kind that programs here can name, not one for use.

It computes the whole map and its singular vectors, so it saves nothing and is for small grids, all keys visible. A
program that imports this module can write `low_rank(keep=0.1)` where it writes other settings.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from monarchrt.models.attention.base import NO_CONTEXT, Attention, Cache, Clip, Context, Density, Grid, Layer, Tokens
from monarchrt.models.attention.registry import register

MORE, ROUNDS = 8, 6  # directions beyond the rank, and steps, of the iteration


def best_of_rank(attention: Float[Array, "*b N N"], value: Float[Array, "*b N d"], rank: int) -> Array:
    """The product of the best approximation of such a rank, in the Frobenius norm, with values.

    Its right singular vectors are found by subspace iteration from a fixed start, with a few directions more than are
    kept; the truncation within them is exact.

    Examples:
        >>> x = jnp.eye(3) * jnp.array([3.0, 2.0, 1.0])
        >>> best_of_rank(x, jnp.eye(3), 2).round(3).diagonal().tolist()
        [3.0, 2.0, 0.0]

    Args:
        attention: Maps.
        value: Values.
        rank: Of the approximation.

    Returns:
        [*b, N, d].
    """
    tokens = attention.shape[-1]
    start = jax.random.normal(jax.random.key(0), (*attention.shape[:-2], tokens, min(tokens, rank + MORE)))
    basis = jnp.linalg.qr(start)[0]
    for _ in range(ROUNDS):
        basis = jnp.linalg.qr(attention.mT @ (attention @ basis))[0]
    within = attention @ basis
    _, vectors = jnp.linalg.eigh(within.mT @ within)  # ascending
    best = vectors[..., -rank:]
    return within @ (best @ (best.mT @ (basis.mT @ value)))


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRankAttention(Attention):
    """The map's best approximation of rank r = keep * N / 2, which stores 2rN numbers, as in the paper's Figure 1a.

    Examples:
        >>> print(LowRankAttention(keep=0.1).density((4, 8, 14)))
        9.8% of the map (asked for: 10.0%)

    Attributes:
        keep: Share of the map's N^2 numbers, above 0 and at most 1.
    """

    name = "low_rank"
    keep: float | int = 0.1

    def __post_init__(self):
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 < self.keep <= 1:
            raise ValueError(f"low_rank: keep={self.keep!r} is not a number above 0 and at most 1.")

    def check(self, grid: Grid | None, *, causal_block: int | None = None) -> None:
        """A rank of 1 at least, and every key visible."""
        if causal_block is not None:
            raise ValueError("low_rank is for clips in which every frame sees all, and this network is block-causal.")
        if grid is not None and self._rank(grid) < 1:
            least = 2 / math.prod(grid)
            raise ValueError(
                f"low_rank: keep={self.keep:g} is below one rank of grid {grid}; the least is {least:.3g}."
            )

    def _rank(self, grid: Grid) -> int:
        return int(self.keep * math.prod(grid) / 2 + 1e-9)

    def attend_clip(self, query: Tokens, key: Tokens, value: Tokens, clip: Clip) -> Tokens:
        """See `Attention`."""
        scores = jnp.einsum("bqnd,bknd->bnqk", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
        values = value.swapaxes(1, 2).astype(jnp.float32)
        out = best_of_rank(jax.nn.softmax(scores), values, self._rank(clip.grid))
        return out.swapaxes(1, 2).astype(query.dtype)

    def attend_cache(self, cache: Cache, query: Tokens, *, layer: Layer = None, context: Context = NO_CONTEXT):
        """Raises ValueError: this kind is for the analysis of whole clips."""
        raise ValueError("low_rank is for analysis of whole clips; it reads no cache.")

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """What it stores."""
        self.check(grid, causal_block=causal_block)
        share = 2 * self._rank(grid) / math.prod(grid)
        return Density(self.keep, share, share)
