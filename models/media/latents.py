"""A fixed, invertible map between pixels and latents.

The pretrained Wan VAE is not part of this project, so training on videos uses a transform without weights: each patch x
patch block of pixels becomes one latent position, whose channels are the coefficients of an orthonormal colour
transform and an orthonormal 2-D cosine transform (DCT-II). Unlike a VAE it is lossless and does not compress: a latent
has as many numbers as its pixels. Being orthonormal, it maps unit Gaussian noise to unit Gaussian noise.

Natural images have most of their variance in the low frequencies. A fixed gain for each channel, the inverse of a
typical standard deviation raised to the power `whitening`, reduces these differences.
"""

import functools
from dataclasses import dataclass

import numpy as np
from einops import rearrange
from jaxtyping import Float32, UInt8

from monarchrt.models.errors import UserError

# rows: brightness, red against blue, green against both; orthonormal
_COLOUR = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]]) / np.sqrt([[3], [2], [6]])


def _cosine_basis(size: int) -> np.ndarray:
    """DCT-II matrix, orthonormal: row u is the cosine of frequency u."""
    u, x = np.mgrid[:size, :size]
    basis = np.sqrt(2 / size) * np.cos(np.pi * u * (2 * x + 1) / (2 * size))
    basis[0] /= np.sqrt(2)
    return basis


@functools.lru_cache(maxsize=8)
def _analysis(patch: int) -> np.ndarray:
    """Orthonormal [3*p*p, 3*p*p]: pixels (y, x, rgb) of a block -> coefficients (colour, u, v)."""
    basis = _cosine_basis(patch)
    matrix = np.einsum("cr,uy,vx->cuvyxr", _COLOUR, basis, basis)
    return matrix.reshape(3 * patch * patch, 3 * patch * patch)


@functools.lru_cache(maxsize=8)
def _typical_std(patch: int) -> np.ndarray:
    """Typical standard deviation of each coefficient [3*p*p] for pixels in [-1, 1]: it falls as 1/frequency."""
    u, v = np.mgrid[:patch, :patch]
    frequency = np.hypot(u, v)
    # (mean, first frequency) of brightness and of the two colour differences, measured on ordinary footage
    levels = [(0.7, 0.13), (0.3, 0.05), (0.2, 0.05)]
    by_colour = [np.where(frequency == 0, dc, ac / np.maximum(frequency, 1)) * patch for dc, ac in levels]
    return np.stack(by_colour).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class PatchDCT:
    """The transform for one patch size.

    Attributes:
        patch: Side of a pixel block; 4 and 8 are usual.
        whitening: 0 keeps the transform orthonormal, 1 gives channels of about unit variance.

    Examples:
        >>> dct = PatchDCT(patch=4)
        >>> video = np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3)
        >>> dct.encode(video).shape
        (2, 2, 2, 48)
        >>> bool((dct.decode(dct.encode(video)) == video).all())
        True
    """

    patch: int = 8
    whitening: float = 0.0

    @property
    def channels(self) -> int:
        """Number of latent channels, 3 * patch**2."""
        return 3 * self.patch**2

    @property
    def gain(self) -> Float32[np.ndarray, "c"]:
        """Factor of each coefficient."""
        return (_typical_std(self.patch) ** -self.whitening).astype(np.float32)

    @property
    def synthesis(self) -> Float32[np.ndarray, "c c"]:
        """The matrix from latents to the pixels of a block in [-1, 1], in the order (row, column, rgb)."""
        return (_analysis(self.patch) / self.gain[:, None].astype(np.float64)).astype(np.float32)

    def encode(self, video: UInt8[np.ndarray, "*f H W 3"]) -> Float32[np.ndarray, "*f h w c"]:
        """Maps RGB pixels to latents.

        Args:
            video: uint8 [..., H, W, 3]; H and W multiples of the patch.

        Returns:
            float32 [..., H/patch, W/patch, 3*patch**2], channels in the order (colour, vertical frequency, horizontal
            frequency).

        Raises:
            UserError: If H or W is not a multiple of the patch.
        """
        return self.encode_float(video.astype(np.float32) / 127.5 - 1)

    def decode(self, latents: Float32[np.ndarray, "*f h w c"]) -> UInt8[np.ndarray, "*f H W 3"]:
        """Maps latents to RGB pixels: the inverse of `encode`, rounded and clipped to 0...255."""
        video = np.nan_to_num(self.decode_float(latents), nan=-1.0)
        return np.clip(np.rint((video + 1) * 127.5), 0, 255).astype(np.uint8)

    def encode_float(self, video: Float32[np.ndarray, "*f H W 3"]) -> Float32[np.ndarray, "*f h w c"]:
        """As `encode`, for pixels as float32 in [-1, 1]."""
        height, width = video.shape[-3:-1]
        if height % self.patch or width % self.patch:
            raise UserError(
                f"video has {height} x {width} pixels, which are not multiples of patch {self.patch}; "
                f"crop it to {height - height % self.patch} x {width - width % self.patch}"
            )
        p = self.patch
        blocks = rearrange(video, "... (h py) (w px) rgb -> ... h w (py px rgb)", py=p, px=p)
        return (blocks @ _analysis(p).T.astype(np.float32)) * self.gain

    def decode_float(self, latents: Float32[np.ndarray, "*f h w c"]) -> Float32[np.ndarray, "*f H W 3"]:
        """The inverse of `encode_float`, to float32 rounding."""
        blocks = (latents / self.gain) @ _analysis(self.patch).astype(np.float32)
        p = self.patch
        return rearrange(blocks, "... h w (py px rgb) -> ... (h py) (w px) rgb", py=p, px=p)
