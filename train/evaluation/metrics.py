"""Measures of videos against a reference, per frame, and of single videos; in NumPy."""

import itertools
import math

import numpy as np
from jaxtyping import Float, UInt8
from scipy.ndimage import correlate1d

type Video = UInt8[np.ndarray, "_ _ _ 3"]
type PerFrame = Float[np.ndarray, "_"]

LARGEST_PSNR = 100.0  # dB of equal frames, since squared errors are at least 1e-10
_C1, _C2 = 0.01**2, 0.03**2


def check_same(video: Video, reference: Video) -> None:
    """Raises ValueError unless both are videos [T, H, W, 3] of the same shape."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.shape != reference.shape:
        raise ValueError(
            f"video has shape {video.shape} and reference {reference.shape}; they must be equal [T, H, W, 3]."
        )


def psnr(video: Video, reference: Video) -> PerFrame:
    """Peak signal-to-noise ratio of each frame in dB, on pixels in [0, 1]; 100 for equal frames.

    Published tools report the mean over frames: they average decibels, not squared errors.

    Examples:
        >>> black = np.zeros((1, 16, 16, 3), np.uint8)
        >>> psnr(black, black + 128).round(2).tolist(), psnr(black, black).tolist()
        ([5.99], [100.0])
    """
    check_same(video, reference)
    errors = [np.mean(np.square(a / 255.0 - b / 255.0)) for a, b in zip(video, reference, strict=True)]
    return np.array([-10 * math.log10(max(error, 1e-10)) for error in errors])


def ssim_gaussian(video: Video, reference: Video) -> PerFrame:
    """SSIM of each frame with a Gaussian window of 11 x 11 pixels, sigma 1.5, and zero padding; mean over channels.

    This is the form of FastVideo's evaluation; scikit-image's default differs from it and from `ssim_box`.

    Examples:
        >>> ssim_gaussian(np.full((1, 16, 16, 3), 9, np.uint8), np.full((1, 16, 16, 3), 9, np.uint8)).round(6).tolist()
        [1.0]
    """
    places = np.arange(11) - 5
    window = np.exp(-(places**2) / (2 * 1.5**2))
    return _ssim(video, reference, window / window.sum())


def ssim_box(video: Video, reference: Video) -> PerFrame:
    """SSIM of each frame with a uniform window of 11 x 11 pixels and zero padding; mean over channels.

    This is the form of Sparse VideoGen's evaluation.
    """
    return _ssim(video, reference, np.full(11, 1 / 11))


def _ssim(video: Video, reference: Video, window: Float[np.ndarray, "n"]) -> PerFrame:
    check_same(video, reference)

    def mean(x: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(x, window, axis=0, mode="constant"), window, axis=1, mode="constant")

    values = []
    for ours, theirs in zip(video, reference, strict=True):
        x, y = ours / 255.0, theirs / 255.0
        mx, my = mean(x), mean(y)
        xx, yy, xy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        top = (2 * mx * my + _C1) * (2 * xy + _C2)
        values.append(float((top / ((mx**2 + my**2 + _C1) * (xx + yy + _C2))).mean()))
    return np.array(values)


def flicker(video: Video) -> float:
    """VBench's temporal flickering: 1 - mean absolute difference of consecutive frames / 255; 1 for a still video.

    Examples:
        >>> flicker(np.zeros((3, 2, 2, 3), np.uint8))
        1.0

    Raises:
        ValueError: If there are fewer than two frames.
    """
    if len(video) < 2:
        raise ValueError(f"video has {len(video)} frame; flicker needs at least two.")
    differences = [np.abs(b.astype(np.float64) - a).mean() for a, b in itertools.pairwise(video)]
    return float(1 - np.mean(differences) / 255)


def drift(per_frame: PerFrame, frames: list[int]) -> list[float]:
    """Mean of a measure over each block of frames, which shows how errors grow over the blocks.

    Examples:
        >>> drift(np.array([40.0, 38.0, 30.0, 20.0]), [2, 2])
        [39.0, 25.0]

    Args:
        per_frame: Values of the measure, one per frame.
        frames: Number of frames of each block.

    Raises:
        ValueError: If the blocks do not add up to all frames.
    """
    if sum(frames) != len(per_frame):
        raise ValueError(f"blocks of {frames} frames are {sum(frames)}, and there are {len(per_frame)}.")
    ends = np.cumsum(frames)
    return [float(per_frame[end - count : end].mean()) for end, count in zip(ends, frames, strict=True)]


def relative_error(made: Float[np.ndarray, "..."], reference: Float[np.ndarray, "..."]) -> float:
    """||made - reference|| / ||reference||, in float64.

    Raises:
        ValueError: If the shapes differ.
    """
    if np.shape(made) != np.shape(reference):
        raise ValueError(f"made has shape {np.shape(made)} and reference {np.shape(reference)}; they must be equal.")
    made, reference = np.asarray(made, np.float64), np.asarray(reference, np.float64)
    return float(np.linalg.norm(made - reference) / np.linalg.norm(reference))


def paired_interval(
    differences: Float[np.ndarray, "n"], *, confidence: float = 0.95, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of paired differences (Efron 1979).

    Examples:
        >>> low, high = paired_interval(np.array([0.9, 1.0, 1.1, 1.0]))
        >>> 0.9 <= low < 1.0 < high <= 1.1
        True

    Args:
        differences: Difference of each pair.
        confidence: Confidence level of the interval.
        draws: Number of bootstrap samples.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end of the interval.

    Raises:
        ValueError: If there are no differences.
    """
    if not len(differences):
        raise ValueError("differences are empty; give one or more.")
    draw = np.random.default_rng(seed)
    means = np.array([differences[draw.integers(len(differences), size=len(differences))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
