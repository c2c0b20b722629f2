"""PSNR and SSIM between videos of 8-bit frames."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8


class Fidelity(NamedTuple):
    """PSNR in dB of the whole clip, infinite if equal, and SSIM, the mean over frames, at most 1."""

    psnr: float
    ssim: float


def fidelity(video: UInt8[np.ndarray, "t h w 3"], reference: UInt8[np.ndarray, "t h w 3"]) -> Fidelity:
    """Compares a clip with a reference.

    SSIM with the Gaussian window of Wang et al. 2004 (sigma 1.5), as scikit-image computes it; frames below 11 pixels
    use the largest window that fits.

    Examples:
        >>> clip = np.arange(2 * 16 * 16 * 3, dtype=np.uint8).reshape(2, 16, 16, 3)
        >>> fidelity(clip, clip)
        Fidelity(psnr=inf, ssim=1.0)

    Args:
        video: RGB frames.
        reference: RGB frames of the same shape.

    Returns:
        PSNR and SSIM.

    Raises:
        ValueError: If the shapes differ.
    """
    from skimage.metrics import structural_similarity

    if video.shape != reference.shape:
        raise ValueError(f"video has shape {video.shape}, reference {reference.shape}; they must be equal.")
    error = np.mean([np.mean(np.square(a.astype(np.float64) - b)) for a, b in zip(video, reference, strict=True)])
    psnr = float("inf") if error == 0 else float(10 * np.log10(255**2 / error))
    smallest = min(video.shape[1:3])
    window = {} if smallest >= 11 else {"win_size": smallest - 1 + smallest % 2}
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False} if not window else {}
    ssim = [
        structural_similarity(a, b, channel_axis=2, data_range=255, **gaussian, **window)
        for a, b in zip(video, reference, strict=True)
    ]
    return Fidelity(psnr, float(np.mean(ssim)))
