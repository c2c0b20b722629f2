"""SVG2: clusters of queries attend to the clusters of keys whose centroids have the largest softmax weights."""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from monarch_jax.checks import positive
from monarch_jax.devices import on_cuda
from monarchrt.models.attention.base import Context, Density, Grid
from monarchrt.models.attention.masked import (
    MaskedAttention,
    Places,
    check_seed,
    check_share,
    masked_attention,
    warn_exact,
)

TOLERANCE = 1e-4  # k-means stops when no centroid moves farther
MOST_ITERATIONS = 10_000  # far above practical values
ROWS = 2048  # tokens whose distances to all centroids are computed at a time


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVG2Attention(MaskedAttention):
    """Semantic clusters (Sparse VideoGen 2, 2025): k-means of queries and keys, and a map of clusters by top-p.

    For each head, with n_j keys in cluster j, p_ij is the softmax of the centroids' scores with weights n_j. A cluster
    of queries keeps the clusters of keys with the largest p until these sum to `top_p`, including the one that reaches
    it, and at least the fraction `min_keep` of all clusters. Queries attend to all keys of the kept clusters. Neither
    k-means nor the map has a gradient.

    The kept fraction depends on the data: `density` is NaN, and `measure` counts it for given queries and keys. It was
    published for whole clips, where later sampling steps start from the centroids of the previous step and iterate
    twice; here each call starts from scratch. In block-causal attention each block clusters its queries and all keys
    that it sees.

    Examples:
        >>> x = jax.random.normal(jax.random.key(0), (1, 8, 2, 4))
        >>> SVG2Attention(query_clusters=2, key_clusters=4)(x, x, x, grid=(2, 2, 2)).shape
        (1, 8, 2, 4)

    Attributes:
        query_clusters: Number of clusters of queries, at most the number of queries of a call.
        key_clusters: Number of clusters of keys, at most the number of keys; some may stay empty.
        top_p: Sum of softmax weights to reach, above 0 and at most 1.
        min_keep: Least fraction of the key clusters to keep, from 0 to 1; the number of clusters is rounded down.
        iterations: Largest number of k-means iterations.
        seed: Seed for drawing the tokens at which centroids start, with replacement; the same in every call.
    """

    name = "svg2"
    query_clusters: int = 200
    key_clusters: int = 1000
    top_p: float | int = 0.9
    min_keep: float | int = 0.1
    iterations: int = 50
    seed: int = 0

    def __post_init__(self):
        for name in ("query_clusters", "key_clusters"):
            self._set(**{name: positive(name, getattr(self, name))})
        self._set(iterations=positive("iterations", self.iterations, most=MOST_ITERATIONS))
        self._set(top_p=check_share(self.name, "top_p", self.top_p))
        least = self.min_keep
        if isinstance(least, bool) or not isinstance(least, int | float | np.floating) or not 0 <= least <= 1:
            raise ValueError(f"svg2: min_keep={least!r} is not a number from 0 to 1, such as 0.1.")
        self._set(min_keep=float(least))
        self._set(seed=check_seed(self.name, self.seed))

    def check(self, grid: Grid | None, *, causal_block: int | None = None) -> None:
        """Raises ValueError if there are more clusters than tokens."""
        if grid is None:
            return
        first = min(causal_block or grid[0], grid[0])
        last = first if causal_block is None else (grid[0] % causal_block or first)
        for name, frames in (("query_clusters", min(first, last)), ("key_clusters", first)):
            tokens, clusters = frames * grid[1] * grid[2], getattr(self, name)
            if clusters > tokens:
                raise ValueError(f"svg2: {name}={clusters} is more than the tokens of a call; use at most {tokens}.")

    def clusters(
        self, query: Array, key: Array, places: Places
    ) -> tuple[Int[Array, "B n Q"], Int[Array, "B n K"], Bool[Array, "B n QC KC"]]:
        """Cluster of each query and key, and the clusters of keys that each cluster of queries keeps.

        Arguments are as in `MaskedAttention.attend`.
        """
        query, key = (jnp.moveaxis(lax.stop_gradient(x), 2, 1) for x in (query, key))
        query_start, key_start = jax.random.split(jax.random.key(self.seed))
        visible = places.visible
        queries, keys = query.shape[2], key.shape[2]
        slots = jnp.arange(keys)
        if visible is not None:
            slots = jnp.argsort(~visible)  # valid ones first, in order
        seen = places.seen * places.per_frame

        def draw(start: Array, clusters: int, count: Any) -> Int[Array, "clusters"]:
            uniform = jax.random.uniform(start, (clusters,))
            return jnp.minimum((uniform * count).astype(jnp.int32), count - 1)

        run = functools.partial(kmeans, iterations=self.iterations)
        of_query = run(query, query[:, :, draw(query_start, self.query_clusters, queries)], jnp.ones(queries, bool))
        first = key[:, :, slots[draw(key_start, self.key_clusters, seen)]]
        of_key = run(key, first, jnp.ones(keys, bool) if visible is None else visible)
        kept = cluster_map(of_query.centroids, of_key.centroids, of_key.sizes, top_p=self.top_p, min_keep=self.min_keep)
        return of_query.labels, of_key.labels, kept

    def attend(self, query: Array, key: Array, value: Array, places: Places, context: Context) -> Array:
        """See `MaskedAttention`."""
        of_query, of_key, kept = self.clusters(query, key, places)

        def keep(rows, scores):
            of_rows = jnp.take_along_axis(kept, of_query[:, :, rows][..., None], axis=2)  # [B, n, C, KC]
            return jnp.take_along_axis(of_rows, of_key[:, :, None], axis=3)

        if on_cuda() and value.shape[-1] == query.shape[-1]:
            warn_exact(self.name, "its clusters have any size and change in every call.")
        return masked_attention(query, key, value, keep=keep, visible=places.visible)

    def measure(
        self,
        query: Float[Array, "B N n d"],
        key: Float[Array, "B N n d"],
        *,
        grid: Grid,
        causal_block: int | None = None,
    ) -> Density:
        """The density for given queries and keys, the mean over samples and heads.

        Arguments are as in the call.

        Examples:
            >>> x = jax.random.normal(jax.random.key(0), (1, 8, 2, 4))
            >>> SVG2Attention(query_clusters=2, key_clusters=4, top_p=1.0).measure(x, x, grid=(2, 2, 2)).kept
            1.0
        """
        per_frame, step = grid[1] * grid[2], causal_block or grid[0]
        self.check(grid, causal_block=causal_block)
        kept = seen = 0.0
        for start in range(0, grid[0], step):
            end = min(start + step, grid[0])
            places = Places(grid=grid, first=start, frames=end - start, key_frames=jnp.arange(end), seen=end)
            part, keys = query[:, start * per_frame : end * per_frame], key[:, : end * per_frame]
            of_query, of_key, blocks = self.clusters(part, keys, places)
            sizes = (
                jax.nn.one_hot(labels, count).sum(2)
                for labels, count in ((of_query, self.query_clusters), (of_key, self.key_clusters))
            )
            kept += float(jnp.einsum("bnij,bni,bnj->bn", blocks.astype(jnp.float32), *sizes).mean())
            seen += (end - start) * end * per_frame**2
        return Density(self.top_p, kept / (grid[0] * per_frame) ** 2, kept / seen)

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """NaN, since it depends on the data; see `measure`."""
        self.check(grid, causal_block=causal_block)
        return Density(math.nan, math.nan, math.nan)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Clusters:
    """The result of k-means.

    Attributes:
        labels: [B, n, N], nearest of the centroids before the last update.
        centroids: [B, n, C, d] in float32, after the last update, unless they had converged before it.
        sizes: int32 [B, n, C], number of tokens with each label.
    """

    labels: Any
    centroids: Any
    sizes: Any


def kmeans(
    tokens: Float[Array, "B n N d"], centroids: Float[Array, "B n C d"], there: Bool[Array, "N"], *, iterations: int
) -> Clusters:
    """Euclidean k-means per head, until no centroid of a sample moves by more than 1e-4.

    An empty cluster keeps its centroid. Memory is linear in the number of tokens.

    Examples:
        >>> x = jnp.array([0.0, 1.0, 10.0, 11.0]).reshape(1, 1, 4, 1)
        >>> clusters = kmeans(x, x[:, :, :2], jnp.ones(4, bool), iterations=10)
        >>> clusters.labels[0, 0], clusters.centroids.ravel()
        (Array([0, 0, 1, 1], dtype=int32), Array([ 0.5, 10.5], dtype=float32))

    Args:
        tokens: [B, heads, N, d].
        centroids: [B, heads, C, d], initial centroids.
        there: bool [N], which tokens are valid.
        iterations: Largest number of iterations, at least 1.

    Returns:
        Labels, centroids and sizes.
    """
    count, rows = tokens.shape[2], min(ROWS, tokens.shape[2])
    chunks = -(-count // rows)
    clusters = centroids.shape[2]
    weight = there.astype(jnp.float32)

    def nearest(x: Float[Array, "n N d"], centres: Float[Array, "n C d"]) -> Int[Array, "n N"]:
        norms = jnp.square(centres).sum(-1)[:, None]

        def of_rows(part):
            products = jnp.einsum("nrd,ncd->nrc", part, centres, precision=lax.Precision.HIGHEST)
            squares = jnp.square(part).sum(-1, keepdims=True) + norms - 2.0 * products
            return jnp.maximum(squares, 0.0).argmin(-1).astype(jnp.int32)

        parts = jnp.pad(x, ((0, 0), (0, chunks * rows - count), (0, 0)))
        labels = lax.map(of_rows, jnp.moveaxis(parts.reshape(x.shape[0], chunks, rows, -1), 1, 0))
        return jnp.moveaxis(labels, 0, 1).reshape(x.shape[0], -1)[:, :count]

    def sums(x: Float[Array, "N d"], labels: Int[Array, "N"]) -> tuple[Array, Array]:
        add = functools.partial(jax.ops.segment_sum, segment_ids=labels, num_segments=clusters)
        return add(jnp.where(there[:, None], x, 0.0)), add(weight)

    def of_sample(x: Float[Array, "n N d"], start: Float[Array, "n C d"]):
        def go_on(state):
            return (state[0] < iterations) & ~state[1]

        def once(state):
            number, _, centres, _, _ = state
            labels = nearest(x, centres)
            total, sizes = jax.vmap(sums)(x, labels)
            filled = (sizes > 0.0)[..., None]
            moved = jnp.where(filled, total / jnp.maximum(sizes, 1.0)[..., None], centres)
            done = jnp.linalg.norm(moved - centres, axis=-1).max() < TOLERANCE
            return number + 1, done, jnp.where(done, centres, moved), labels, sizes

        heads = x.shape[0]
        none = jnp.zeros((heads, count), jnp.int32), jnp.zeros((heads, clusters))
        _, _, centres, labels, sizes = lax.while_loop(go_on, once, (0, jnp.array(False), start, *none))
        return Clusters(labels, centres, sizes.astype(jnp.int32))

    return jax.vmap(of_sample)(tokens.astype(jnp.float32), centroids.astype(jnp.float32))


def cluster_map(
    query: Float[Array, "B n QC d"],
    key: Float[Array, "B n KC d"],
    sizes: Int[Array, "B n KC"],
    *,
    top_p: float,
    min_keep: float,
) -> Bool[Array, "B n QC KC"]:
    """The clusters of keys that each cluster of queries keeps.

    Args:
        query: [B, heads, QC, d], centroids of queries.
        key: [B, heads, KC, d], centroids of keys.
        sizes: int32 [B, heads, KC], number of keys in each cluster; empty clusters have no weight.
        top_p: A cluster is kept if the weights of all larger ones sum to at most this.
        min_keep: Fraction of the clusters to keep in any case.

    Returns:
        bool [B, heads, QC, KC].
    """
    scores = jnp.einsum("bnqd,bnkd->bnqk", query, key, precision=lax.Precision.HIGHEST) * query.shape[-1] ** -0.5
    weights = sizes[:, :, None].astype(jnp.float32) * jnp.exp(scores - scores.max(-1, keepdims=True))
    shares = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-12)
    order = jnp.argsort(-shares, axis=-1)  # a stable sort
    reached = jnp.cumsum(jnp.take_along_axis(shares, order, -1), -1)
    before = jnp.concatenate([jnp.zeros_like(reached[..., :1]), reached[..., :-1]], -1)
    least = math.floor(Fraction(str(min_keep)) * key.shape[2])
    kept = (before <= top_p) | (jnp.arange(key.shape[2]) < least)[None, None, None]
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), -1)
