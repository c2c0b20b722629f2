"""Conversion of high dynamic range and wide gamuts to the colours of an ordinary screen.

Transfer characteristics, primaries and matrices are numbered as in ITU-T H.273 and FFmpeg.
"""

import functools
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

UNSPECIFIED = 2
PQ, HLG = 16, 18
BT2020, P3 = 9, 12  # primaries
# transfer characteristics that are shown without conversion: BT.709 and similar, gamma 2.2 and 2.8, sRGB
_ORDINARY_TRANSFERS = (0, 1, UNSPECIFIED, 3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
# BT.709, and older primaries of television, which players show like BT.709
_ORDINARY_PRIMARIES = (0, 1, UNSPECIFIED, 3, 4, 5, 6, 7, 22)
_WHITE = (0.3127, 0.3290)  # D65
_PRIMARIES = {  # x, y of red, green and blue
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)),
    BT2020: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    P3: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
_GAMMA = 2.2  # gamma of an ordinary screen
_PAPER_WHITE = 203.0  # cd/m2, reference white of HDR by ITU-R BT.2408
_KNEE = 0.7  # fraction of reference white above which light is compressed


class Colours(NamedTuple):
    """Transfer characteristics and primaries of RGB values."""

    transfer: int = UNSPECIFIED
    primaries: int = UNSPECIFIED

    @property
    def ordinary(self) -> bool:
        """Whether the values can be shown without conversion."""
        return self.transfer in _ORDINARY_TRANSFERS and self.primaries in _ORDINARY_PRIMARIES

    @property
    def problem(self) -> str | None:
        """Description of unsupported colours; None if they can be converted."""
        if self.transfer not in (*_ORDINARY_TRANSFERS, PQ, HLG):
            return f"colours with transfer characteristics {self.transfer} of H.273 (logarithmic, linear or of cinema)"
        if self.primaries not in (*_ORDINARY_PRIMARIES, BT2020, P3):
            return f"colours with primaries {self.primaries} of H.273"
        if self.primaries == BT2020 and self.transfer in (0, UNSPECIFIED, 3):
            return "BT.2020 colours that do not say whether they are HDR (no transfer characteristics)"
        return None


def to_ordinary(rgb: Float32[np.ndarray, "h w 3"], colours: Colours) -> UInt8[np.ndarray, "h w 3"]:
    """Converts colours for an ordinary screen.

    HDR is mapped relative to reference white, 203 cd/m2 (ITU-R BT.2408): light up to 0.7 of it is unchanged, and
    brighter light is compressed towards the screen's white, equally in all channels. HLG is interpreted for a screen of
    1000 cd/m2. Colours outside the screen's gamut are clipped.

    Examples:
        >>> white = np.full((1, 1, 3), 0.58, np.float32)  # reference white
        >>> int(to_ordinary(white, Colours(transfer=PQ, primaries=BT2020))[0, 0, 0])
        241

    Args:
        rgb: Values in [0, 1].
        colours: Transfer characteristics and primaries of the values, which must have no `problem`.

    Returns:
        RGB for an ordinary screen.
    """
    if colours.ordinary:
        return _quantized(rgb)
    linear = _linear(rgb.astype(np.float32), colours.transfer)
    high = colours.transfer in (PQ, HLG)
    primaries = BT2020 if high and colours.primaries in (0, UNSPECIFIED) else colours.primaries
    if primaries in (BT2020, P3):
        linear = linear @ _to_bt709(primaries).T
    linear = np.maximum(linear, 0)
    if high:
        brightest = linear.max(-1, keepdims=True)
        above = np.maximum(brightest - _KNEE, 0) / (1 - _KNEE)
        shown = np.minimum(brightest, _KNEE) + (1 - _KNEE) * (1 - np.exp(-above))
        linear = linear * (shown / np.maximum(brightest, 1e-9))
    return _quantized(np.minimum(linear, 1) ** (1 / _GAMMA))


def _quantized(rgb: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)


def _linear(rgb: np.ndarray, transfer: int) -> np.ndarray:
    """Linear light, with reference white at 1."""
    if transfer == PQ:  # SMPTE ST 2084
        root = np.clip(rgb, 0, 1) ** np.float32(32 / 2523)
        light = np.maximum(root - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * root)
        return light ** np.float32(8192 / 1305) * np.float32(10000 / _PAPER_WHITE)
    if transfer == HLG:  # ITU-R BT.2100
        a, b, c = 0.17883277, 0.28466892, 0.55991073
        scene = np.where(rgb <= 0.5, np.square(rgb) / 3, (np.exp((rgb - c) / a) + b) / 12).astype(np.float32)
        luminance = scene @ np.array([[0.2627], [0.6780], [0.0593]], np.float32)
        return scene * np.maximum(luminance, 1e-9) ** np.float32(0.2) * np.float32(1000 / _PAPER_WHITE)
    return np.clip(rgb, 0, 1) ** np.float32(_GAMMA)


@functools.cache
def _to_bt709(primaries: int) -> np.ndarray:
    return (np.linalg.inv(_to_xyz(1)) @ _to_xyz(primaries)).astype(np.float32)


def _to_xyz(primaries: int) -> np.ndarray:
    """The matrix from linear RGB to CIE XYZ."""

    def xyz(x: float, y: float) -> list[float]:
        return [x / y, 1.0, (1 - x - y) / y]

    columns = np.array([xyz(*point) for point in _PRIMARIES[primaries]]).T
    return columns * np.linalg.solve(columns, xyz(*_WHITE))
