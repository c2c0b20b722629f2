"""Approximations of attention maps that store fewer numbers, computed in NumPy on whole maps, for small cases.

The density of an approximation is the number of its stored numbers relative to the entries of the map.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from monarch_jax import MonarchSpec

type Grid = tuple[int, int, int]
type Map = Float[np.ndarray, "N K"]


class Error(NamedTuple):
    """The error of an approximation of a map.

    Attributes:
        mse: Mean squared difference over all N^2 entries, as in the paper's Figure 1a.
        relative: Frobenius norm of the difference relative to that of the map.
        variation: Mean over rows of half the sum of absolute differences, the total variation of probabilities.
    """

    mse: float
    relative: float
    variation: float


def error_of(approximation: Map, exact: Map) -> Error:
    """Computes the error of an approximation.

    Examples:
        >>> error_of(np.eye(2), np.full((2, 2), 0.5))
        Error(mse=0.25, relative=1.0, variation=0.5)
    """
    difference = np.asarray(approximation, np.float64) - exact
    square = np.square(difference).sum()
    return Error(
        mse=float(square / difference.size),
        relative=float(np.sqrt(square / np.square(np.asarray(exact, np.float64)).sum())),
        variation=float(np.abs(difference).sum(1).mean() / 2),
    )


def dense_map(query: Float[np.ndarray, "N d"], key: Float[np.ndarray, "K d"], *, scale: float | None = None) -> Map:
    """The attention map of one head, softmax(scale * query key^T).

    Args:
        query: Queries [N, d].
        key: Keys [K, d].
        scale: Scale of the scores; None for d ** -0.5.

    Returns:
        The map [N, K], float32.

    Examples:
        >>> dense_map(np.zeros((2, 4)), np.zeros((2, 4))).tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    scores = query.astype(np.float32) @ key.astype(np.float32).T
    scores *= query.shape[-1] ** -0.5 if scale is None else scale
    scores -= scores.max(1, keepdims=True)
    np.exp(scores, out=scores)
    return scores / scores.sum(1, keepdims=True)


# Top-k, in three variants


def top_k_kept(attention: Map, density: float) -> Map:
    """Keeps the largest entries of each row unchanged: the best approximation with as many entries per row.

    Examples:
        >>> top_k_kept(np.array([[0.6, 0.3, 0.1]] * 2), 0.34).tolist()
        [[0.6, 0.3, 0.0], [0.6, 0.3, 0.0]]
    """
    count = min(attention.shape[1], math.ceil(density * attention.shape[1] - 1e-9))
    order = np.argsort(-attention, axis=1, kind="stable")[:, :count]
    out = np.zeros_like(attention)
    np.put_along_axis(out, order, np.take_along_axis(attention, order, 1), 1)
    return out


def top_k_renormalised(attention: Map, density: float) -> Map:
    """Keeps the largest entries of each row, scaled to sum 1, as attention to these keys alone does."""
    kept = top_k_kept(attention, density)
    return kept / kept.sum(1, keepdims=True)


def top_k_of_map(attention: Map, density: float) -> Map:
    """Keeps the largest entries of the whole map: the best approximation with as many entries (paper, Section 2.2)."""
    count = min(attention.size, math.ceil(density * attention.size - 1e-9))
    order = np.argsort(-attention, axis=None, kind="stable")[:count]
    out = np.zeros_like(attention)
    out.flat[order] = attention.flat[order]
    return out


TOP_K = {
    "top-k, entries kept": top_k_kept,
    "top-k, rows renormalised": top_k_renormalised,
    "top-k of the whole map": top_k_of_map,
}


# Low rank


def low_rank(factors: tuple[np.ndarray, np.ndarray, np.ndarray], density: float) -> Map | None:
    """The best approximation of rank r = density * N / 2, which stores 2rN numbers; None if r < 1.

    Args:
        factors: Result of `numpy.linalg.svd` for the map.
        density: Density of the approximation.
    """
    left, values, right = factors
    rank = int(density * len(values) / 2)
    return (left[:, :rank] * values[:rank]) @ right[:rank] if rank else None


# Monarch


def tile_order(spec: MonarchSpec) -> Int[np.ndarray, "tiles b1 b2"]:
    """Index of the token at each row and column of each tile.

    Examples:
        >>> tile_order(MonarchSpec(grid=(1, 2, 4), tile=(1, 2, 2))).tolist()
        [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]
    """
    tile = spec.tile_shape
    counts = [size // side for size, side in zip(spec.grid, tile, strict=True)]
    tokens = np.arange(math.prod(spec.grid)).reshape([n for pair in zip(counts, tile, strict=True) for n in pair])
    rows, columns = spec.blocks.split(",")
    inside = ["fhw".index(letter) * 2 + 1 for letter in rows + columns]
    ordered = tokens.transpose(0, 2, 4, *inside)
    return ordered.reshape(math.prod(counts), spec.block_rows, spec.block_cols)


def monarch_projection(attention: Map, spec: MonarchSpec) -> Map:
    """The tiled Monarch matrix nearest to a map in Frobenius norm (paper, Section 2.1).

    It is the best rank-1 approximation of every slice; a slice has the b1 x b2 entries of one column of a query tile
    and one row of a key tile. Rows need not sum to 1.

    Examples:
        >>> attention = dense_map(np.eye(8), np.eye(8))
        >>> exact = monarch_projection(attention, MonarchSpec(grid=(1, 2, 4), tile=(1, 1, 1)))
        >>> bool(np.allclose(exact, attention))
        True
    """
    order = tile_order(spec)
    out = np.zeros_like(attention)
    for tile in range(len(order)):
        queries = order[tile].T[:, :, None, None, None]  # [j, i, 1, 1, 1]
        slices = attention[queries, order[None, None]]  # [j, i, key tile, k, l]
        slices = slices.transpose(0, 2, 3, 1, 4)  # [j, key tile, k, i, l]
        left, values, right = np.linalg.svd(slices, full_matrices=False)
        best = left[..., :, :1] * values[..., None, :1] * right[..., :1, :]
        out[queries, order[None, None]] = best.transpose(0, 3, 1, 2, 4)
    return out


def tiles_of(grid: Grid, *, causal_block: int | None = None) -> Iterator[tuple[int, int, int]]:
    """The tiles of more than one token that divide a grid and lie in one causal block, largest sides first.

    Examples:
        >>> list(tiles_of((2, 1, 3)))
        [(2, 1, 3), (2, 1, 1), (1, 1, 3)]
    """
    frames = grid[0] if causal_block is None else math.gcd(grid[0], causal_block)
    for sides in itertools.product(*([n for n in range(size, 0, -1) if size % n == 0] for size in (frames, *grid[1:]))):
        if math.prod(sides) > 1:
            yield sides[0], sides[1], sides[2]


def misaligned(grid: Grid) -> list[tuple[int, int]]:
    """Block sizes (b1, b2), b1 * b2 = N, of untiled Monarch matrices that are not aligned with the axes of a grid.

    Token n is in row n div b2 and column n mod b2, so only (f, hw) and (fh, w) are aligned (paper, Section 4.1).

    Examples:
        >>> misaligned((2, 2, 3))
        [(6, 2), (3, 4)]
    """
    frames, height, width = grid
    total = frames * height * width
    aligned = {1, total, frames, frames * height}
    return [(rows, total // rows) for rows in range(total, 0, -1) if total % rows == 0 and rows not in aligned]


# Figure 4a


def share_for_mass(
    query: Float[np.ndarray, "N d"], key: Float[np.ndarray, "K d"], mass: float, *, rows: int = 512
) -> float:
    """Mean fraction of the keys that are needed for probabilities that sum to `mass` (paper, Figure 4a).

    Examples:
        >>> share_for_mass(np.zeros((2, 4)), np.zeros((8, 4)), 0.5)
        0.5

    Args:
        query: Queries of one head.
        key: Keys of one head.
        mass: Sum of probabilities to reach, from 0 to 1.
        rows: Number of queries that are processed at once.

    Returns:
        The smallest number of such keys, averaged over queries, relative to the number of keys.
    """
    counts = []
    for start in range(0, len(query), rows):
        attention = np.asarray(dense_map(query[start : start + rows], key), np.float64)
        below = np.cumsum(-np.sort(-attention, axis=1), axis=1) < mass - 1e-7
        counts.append(np.minimum(below.sum(1) + 1, len(key)))
    return float(np.concatenate(counts).mean() / len(key))
