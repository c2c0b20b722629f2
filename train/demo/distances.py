"""The energy distance between the distributions of two sets of clips (Szekely and Rizzo 2013)."""

import numpy as np
from jaxtyping import Float


def energy_distance(x: Float[np.ndarray, "n *shape"], y: Float[np.ndarray, "m *shape"]) -> float:
    """(2 E|X - Y| - E|X - X'| - E|Y - Y'|) / E|Y - Y'|, which is 0 only for equal distributions.

    The estimate of the numerator is unbiased, so it can be negative for sets of the same distribution.

    Args:
        x: Samples, at least 2.
        y: Samples to compare with, at least 2, whose own spread is the unit.

    Returns:
        The distance.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> x, y = rng.standard_normal((2, 200, 3))
        >>> abs(energy_distance(x, y)) < 0.02, energy_distance(x + 1, y) > 0.2, energy_distance(x / 2, y) > 0.05
        (True, True, True)
    """
    x, y = (samples.reshape(len(samples), -1).astype(np.float64) for samples in (x, y))
    own = _between(y, y)
    return (2 * _between(x, y) - _between(x, x) - own) / own


def _between(x: np.ndarray, y: np.ndarray) -> float:
    """Mean Euclidean distance of pairs; for a set with itself, of pairs of distinct samples."""
    squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
    distances = np.sqrt(np.maximum(squares, 0.0))
    if x is y:
        np.fill_diagonal(distances, 0.0)
        return float(distances.sum() / (len(x) * (len(x) - 1)))
    return float(distances.mean())
