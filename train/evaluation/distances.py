"""Distances between two sets of features: the Frechet distance of their Gaussians, and the kernel distance (MMD).

They are the distances of FID and KID, but their values are comparable only for features of the same network, and not
with published FID, KID or FVD, which use other networks.
"""

import numpy as np
from jaxtyping import Float, Int

type Features = Float[np.ndarray, "_ C"]


def frechet_distance(x: Float[np.ndarray, "n C"], y: Float[np.ndarray, "m C"]) -> float:
    """Squared Frechet (2-Wasserstein) distance of the Gaussians with the means and covariances of two sets.

    |mx - my|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)), with unbiased covariances, in float64. The trace of the square root is
    computed as the sum of the singular values of Sx^(1/2) Sy^(1/2), which needs no square root of a non-symmetric
    matrix and is also exact for singular ones (Dowson and Landau 1982; used for FID by Heusel et al. 2017).

    Examples:
        >>> x = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
        >>> round(frechet_distance(x, x + [3.0, 4.0]), 6), round(frechet_distance(x, 2 * x - 1), 6)
        (25.0, 2.666667)

    Args:
        x: Features, one sample per row, with more samples than channels.
        y: Features of the other set, likewise.

    Returns:
        The distance, at least 0.

    Raises:
        ValueError: If a set has no more samples than channels: its covariance would be singular, and the distance would
            mostly depend on the number of samples.
    """
    _check(x, y)
    for name, samples in (("x", x), ("y", y)):
        if len(samples) <= samples.shape[1]:
            raise ValueError(
                f"{name} has {len(samples)} samples of {samples.shape[1]} channels; a covariance of so many channels "
                f"needs {samples.shape[1] + 1} samples at least."
            )
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    roots, spread = [], 0.0
    for samples in (x, y):
        covariance = np.cov(samples, rowvar=False, ddof=1).reshape(samples.shape[1], samples.shape[1])
        values, vectors = np.linalg.eigh(covariance)
        values = np.maximum(values, 0.0)
        roots.append((vectors * np.sqrt(values)) @ vectors.T)
        spread += values.sum()
    overlap = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    return float(max(0.0, np.square(x.mean(0) - y.mean(0)).sum() + spread - 2 * overlap))


def kernel_distance(
    x: Float[np.ndarray, "n C"],
    y: Float[np.ndarray, "m C"],
    *,
    x_groups: Int[np.ndarray, "n"] | None = None,
    y_groups: Int[np.ndarray, "m"] | None = None,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x . y / C + 1)^3 (Binkowski et al. 2018, KID).

    For two sets of the same distribution its expectation is 0, so it can be negative. It can be used with fewer samples
    than channels. Dependent samples, such as frames of one video, or videos that two networks generate from the same
    noise, belong to one group; pairs within a group, in one set or across both, are left out.

    Examples:
        >>> draw = np.random.default_rng(0)
        >>> x, y = draw.standard_normal((2, 500, 4))
        >>> abs(kernel_distance(x, y)) < 0.05 < kernel_distance(x, y + 1)
        True

    Args:
        x: Features, one sample per row.
        y: Features of the other set, likewise.
        x_groups: Group of each sample of `x`; None if all samples of both sets are independent.
        y_groups: Group of each sample of `y`; equal numbers denote the same group.
        subsets: Number of random subsets over which the distance is averaged if a set is larger than `size`.
        size: Size of these subsets.
        seed: Seed of the subsets.

    Returns:
        The distance.

    Raises:
        ValueError: If all samples of a set, or of both, belong to one group, so that no pair is left.
    """
    _check(x, y)
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    x_of = np.arange(len(x)) if x_groups is None else np.asarray(x_groups)
    y_of = np.arange(len(y)) if y_groups is None else np.asarray(y_groups)
    if (x_groups is None) != (y_groups is None):
        raise ValueError("x_groups and y_groups go together; give both or neither.")
    across = x_groups is not None

    def between(a: np.ndarray, b: np.ndarray, a_of: np.ndarray, b_of: np.ndarray, apart: bool) -> float:
        values = (a @ b.T / a.shape[1] + 1.0) ** 3
        if not apart:
            return float(values.mean())
        pairs = a_of[:, None] != b_of[None]
        if not pairs.any():
            raise ValueError("all samples are of one group, so that no independent pair is left; give two groups.")
        return float(values[pairs].mean())

    def once(i: np.ndarray, j: np.ndarray) -> float:
        own = between(x[i], x[i], x_of[i], x_of[i], True) + between(y[j], y[j], y_of[j], y_of[j], True)
        return own - 2 * between(x[i], y[j], x_of[i], y_of[j], across)

    if max(len(x), len(y)) <= size:
        return once(np.arange(len(x)), np.arange(len(y)))
    draw, count = np.random.default_rng(seed), min(size, len(x), len(y))
    drawn = [
        once(draw.choice(len(x), count, replace=False), draw.choice(len(y), count, replace=False))
        for _ in range(subsets)
    ]
    return float(np.mean(drawn))


def _check(x: np.ndarray, y: np.ndarray) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(f"x has shape {x.shape} and y {y.shape}; both must be [samples, C], two samples or more.")
