"""Splitting of videos into windows for training and held-out windows."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from monarchrt.models.errors import UserError
from monarchrt.models.files import listed
from monarchrt.models.media.clips import VIDEOS
from monarchrt.models.media.video import read_clip

_MOVING = (*VIDEOS, ".gif", ".apng", ".webp")


class Starts(NamedTuple):
    """First frames of the windows that are trained on and of those that are held out."""

    train: Sequence[int]
    held_out: Sequence[int]


class Frames(NamedTuple):
    """Concatenated frames of clips, uint8 [T, H, W, 3], and the number of frames of each clip."""

    frames: UInt8[np.ndarray, "T H W 3"]
    lengths: tuple[int, ...]


def window_starts(lengths: Sequence[int], *, window: int, held_out: float, gap: int) -> Starts:
    """Splits concatenated clips into windows for training and held-out windows, which share no frames.

    A single clip is split in time, and `gap` frames between the parts belong to neither. Of several clips, the last
    ones are held out. A window lies within one clip.

    Examples:
        >>> window_starts([12], window=3, held_out=0.4, gap=1)
        Starts(train=range(0, 5), held_out=range(8, 10))

    Args:
        lengths: Number of frames of each clip.
        window: Number of frames of a window.
        held_out: Fraction of the frames or clips, at the end, that is held out.
        gap: Number of frames between the parts of a single clip.

    Returns:
        First frames of the windows; a part that is shorter than a window has none.
    """
    if len(lengths) > 1:
        starts = [_starts(first, length, window) for first, length in _placed(lengths)]
        count = held_out_count(len(lengths), held_out)
        return Starts([at for clip in starts[:-count] for at in clip], [at for clip in starts[-count:] for at in clip])
    n_train = lengths[0] - round(lengths[0] * held_out)
    return Starts(range(0, n_train - window + 1), range(n_train + gap, lengths[0] - window + 1))


def held_out_count(count: int, share: float) -> int:
    """Number of held-out files: about this fraction, at least one, and not all.

    Examples:
        >>> held_out_count(10, 0.25), held_out_count(2, 0.01)
        (2, 1)
    """
    return min(count - 1, max(1, round(count * share)))


def read_videos(video: Path, *, height: int, width: int, stride: int, fps: float, window: int) -> Frames:
    """Reads a video, or all videos of a folder in order of their names, by `monarchrt.models.media.video.read_clip`.

    Args:
        video: A file, or a folder of files.
        height: Height in pixels.
        width: Width in pixels.
        stride: As in `read_clip`.
        fps: As in `read_clip`.
        window: Least number of frames of each video in a folder.

    Returns:
        The frames.

    Raises:
        UserError: If a video cannot be read, or the folder has none.
    """
    files = _videos(video) if video.is_dir() else [video]
    least = window if len(files) > 1 else 1
    clips = [read_clip(x, height=height, width=width, stride=stride, fps=fps, min_frames=least) for x in files]
    return Frames(clips[0] if len(clips) == 1 else np.concatenate(clips), tuple(map(len, clips)))


def cut(frames: UInt8[np.ndarray, "T H W 3"], start: int, *, window: int, height: int, width: int) -> np.ndarray:
    """Returns one window, cropped in the middle, uint8 [window, height, width, 3].

    Args:
        frames: The clip.
        start: Index of the window's first frame.
        window: Number of frames.
        height: Height in pixels, at most the clip's.
        width: Width in pixels, likewise.
    """
    top, left = (frames.shape[1] - height) // 2, (frames.shape[2] - width) // 2
    return frames[start : start + window, top : top + height, left : left + width]


def _videos(folder: Path) -> list[Path]:
    """The videos of a folder, by name, without litter."""
    files = [path for path in listed(folder) if path.suffix.lower() in _MOVING and not path.is_dir()]
    if not files:
        raise UserError(
            f"video {folder} is a folder without videos ({', '.join(_MOVING)}); give a video, or such a folder"
        )
    return files


def _placed(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First frame and length of each of several concatenated clips."""
    return zip(np.cumsum([0, *lengths[:-1]]).tolist(), lengths, strict=True)


def _starts(first: int, length: int, window: int) -> range:
    return range(first, first + max(0, length - window + 1))
