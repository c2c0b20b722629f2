"""The sizes of a call of `fused`, which items are left over, and how their parts are put together."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels.sm90.config import SLAB, FusedConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the whole call: query tiles of a batch entry, rows and columns of a tile, heads, pairs, items; clusters."""

    tiles: int
    rows: int
    cols: int
    heads: int
    pairs: int
    items: int
    form: FusedConfig
    scale: float
    masked: bool
    dtype: jnp.dtype

    @property
    def left(self) -> tuple[int, int]:
        """Items after as many as the clusters can take at a time, and the parts of keys that each is cut into."""
        left, clusters = self.items % self.form.clusters, self.form.clusters
        parts = clusters // math.gcd(left, clusters)
        if not self.form.spread or not left or parts > -(-self.pairs // self.form.blocks):
            return 0, 1
        return left, parts

    @property
    def owners(self) -> int:
        """Blocks of a cluster that have columns."""
        return -(-self.cols // self.form.columns)

    @property
    def width(self) -> int:
        """Columns of keys in a product."""
        return -(-self.cols // 8) * 8


def put_together(
    sizes: Sizes, out: jax.Array, lse: jax.Array, means: jax.Array, numbers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Puts the items that clusters made parts of into the output and log-sum-exp."""
    left, _ = sizes.left
    whole = jax.nn.logsumexp(numbers, axis=0)  # [left, b2, b1 or more]
    shares = jnp.exp(numbers - whole[None])[..., : sizes.rows].transpose(0, 1, 3, 2)
    sums = (means * shares[..., None]).sum(axis=0).astype(out.dtype)  # [left, b1, b2, D]
    first = sizes.items - left
    shape = out.shape
    out = out.reshape(*shape[:2], sizes.cols, sizes.heads, 2 * SLAB)
    while first < sizes.items:  # of one head at a time
        lane, tile = divmod(first, sizes.tiles)
        entry, head = divmod(lane, sizes.heads)
        count = min(sizes.tiles - tile, sizes.items - first)
        at, those = entry * sizes.tiles + tile, slice(first - sizes.items + left, first - sizes.items + left + count)
        out = lax.dynamic_update_slice(out, sums[those][:, :, :, None], (at, 0, 0, head, 0))
        lse = lax.dynamic_update_slice(lse, whole[those][:, None], (at, head, 0, 0))
        first += count
    return out.reshape(shape), lse
