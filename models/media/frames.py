"""Frames of videos and pictures in a common form, with orientation and scaling."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from jaxtyping import UInt8

from monarchrt.models.errors import UserError

LARGEST = 8192  # limit on height and width in pixels
_JITTER = 1.5e-3  # tolerance in seconds; containers round times to milliseconds
_LONGEST_HOLD = 10_000  # limit on repetitions of a frame


class Orientation(NamedTuple):
    """The operation that makes a stored picture upright: transposition, then mirroring.

    Examples:
        >>> picture = np.array([[1, 2], [3, 4]])
        >>> Orientation(transposed=True, across=True).apply(picture).tolist()  # a quarter turn clockwise
        [[3, 1], [4, 2]]
    """

    transposed: bool = False
    across: bool = False  # left to right
    down: bool = False  # top to bottom

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """The upright picture, a view."""
        if self.transposed:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.down else 1, :: -1 if self.across else 1]


class Shown(NamedTuple):
    """A frame of a file.

    Attributes:
        time: Time at which it appears in seconds; None if the file has none.
        duration: Duration in seconds; None if the file has none.
        fit: Returns the RGB picture of a given height and width, uint8.
    """

    time: float | None
    duration: float | None
    fit: Callable[[int, int], UInt8[np.ndarray, "h w 3"]]


def at_rate(frames: Iterable[Shown], fps: float | int, path: Path) -> Iterator[Shown]:
    """Samples the frames shown at the times 0, 1/fps, 2/fps, ... after the first appears, until the last ends.

    Args:
        frames: Frames in order of time.
        fps: Frames per second.
        path: The file, for errors.

    Yields:
        The sampled frames.

    Raises:
        UserError: If a frame has no time, or the times have too long a gap.
    """
    jitter = min(_JITTER, 0.25 / fps)
    seen: Shown | None = None
    begin = gap = 0.0
    count = 0
    for frame in frames:
        if frame.time is None:
            raise UserError(f"video {path} has no timestamps; read every frame of it with fps 0")
        if seen is None or seen.time is None:
            begin = frame.time
        else:
            gap = frame.time - seen.time
            if gap * fps > _LONGEST_HOLD:
                raise UserError(f"video {path} has a gap of {gap:.0f} seconds in its timestamps; cut it out")
            while begin + count / fps < frame.time - jitter:
                yield seen
                count += 1
        seen = frame
    if seen is not None and seen.time is not None:
        end = max(seen.time + (seen.duration or gap or 1 / fps) - jitter, seen.time + jitter)
        while begin + count / fps < end:
            yield seen
            count += 1


def check_size(height: int, width: int) -> None:
    """Raises UserError unless frames can have this size."""
    for name, value in (("height", height), ("width", width)):
        if not 1 <= value <= LARGEST:
            raise UserError(f"{name} is {value}; it must lie in [1, {LARGEST}] pixels, for example 480")


def covering(
    stored: tuple[int, int], wanted: tuple[int, int], *, orientation: Orientation, aspect: float = 1.0
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes for scaling a stored picture to cover a size, keeping its aspect ratio, and cropping it in the middle.

    Examples:
        >>> covering((288, 360), (288, 512), orientation=Orientation(), aspect=64 / 45)  # television of 16:9
        ((288, 512), (288, 512))

    Args:
        stored: Height and width in the file.
        wanted: Height and width of the upright result.
        orientation: Orientation of the stored picture.
        aspect: Width of a stored pixel divided by its height.

    Returns:
        Height and width to scale to and to crop to, both before it is made upright.
    """
    target = (wanted[1], wanted[0]) if orientation.transposed else wanted
    shape = stored[0], stored[1] * aspect
    scale = max(target[0] / shape[0], target[1] / shape[1])
    scaled = max(target[0], round(shape[0] * scale)), max(target[1], round(shape[1] * scale))
    return scaled, target


def cropped(picture: np.ndarray, target: tuple[int, int], orientation: Orientation) -> np.ndarray:
    """Crops a scaled picture in the middle to `target`, (height, width) as stored, and makes it upright."""
    (height, width), (free_h, free_w) = target, np.subtract(picture.shape[:2], target) // 2
    return orientation.apply(picture[free_h : free_h + height, free_w : free_w + width])


def fit_rgb(picture: UInt8[np.ndarray, "h w 3"], height: int, width: int) -> UInt8[np.ndarray, "H W 3"]:
    """Scales an upright picture by area to cover a size, and crops it in the middle."""
    scaled, target = covering(picture.shape[:2], (height, width), orientation=Orientation())
    if scaled != picture.shape[:2]:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        picture = frame.reformat(width=scaled[1], height=scaled[0], interpolation="AREA").to_ndarray()
    return cropped(picture, target, Orientation())


def on_white(rgba: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h w 3"]:
    """Composes a transparent picture on white.

    Examples:
        >>> on_white(np.array([[[9, 9, 9, 0], [9, 9, 9, 255]]], np.uint8)).tolist()
        [[[255, 255, 255], [9, 9, 9]]]
    """
    alpha = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
