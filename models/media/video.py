"""Reading and writing of video files with PyAV (FFmpeg).

A clip is a uint8 array [T, H, W, 3] of RGB frames.
"""

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from monarchrt.models.errors import UserError
from monarchrt.models.media.decoding import open_video
from monarchrt.models.media.frames import Shown, at_rate, check_size
from monarchrt.models.media.pictures import open_picture
from monarchrt.models.media.writer import Mp4Writer, VideoWriter, open_writer

_EXAMPLE = "an .mp4 or .webm file with a video track"


def read_clip(
    path: Path | str,
    *,
    height: int,
    width: int,
    stride: int = 1,
    max_frames: int | None = None,
    min_frames: int = 1,
    fps: float | int = 0,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Reads a clip or a picture as players show it, resized to cover `height x width` and cropped in the middle.

    Frames are made upright with square pixels and deinterlaced, transparent parts become white, and HDR and wide gamuts
    are converted for an ordinary screen. Files for which this is not possible are refused.

    Args:
        path: A video file that FFmpeg can decode, or a picture, still or animated.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        stride: Take every `stride`-th frame, beginning with the first.
        max_frames: Stop after this many frames have been taken.
        min_frames: Smallest acceptable number of frames.
        fps: Frames per second to read at, by the file's timestamps, before `stride`. 0 reads the frames as stored,
            regardless of timestamps.

    Returns:
        RGB frames, uint8 [T, height, width, 3].

    Raises:
        UserError: If the file is missing, empty, damaged or truncated, has no video track, is too short, or has
            unsupported properties.

    Examples:
        >>> read_clip("nowhere.mp4", height=64, width=64)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        monarchrt.models.errors.UserError: video nowhere.mp4 does not exist; give an .mp4 or .webm file with a ...
    """
    path = Path(path)
    check_size(height, width)
    if not 0 <= fps <= 1000:
        raise UserError(f"fps is {fps}; it must lie in [0, 1000], for example 16, or 0 for the frames that are stored")
    if not path.exists():
        raise UserError(f"video {path} does not exist; give {_EXAMPLE}")
    if not path.is_file():
        raise UserError(f"video {path} is not a file; give {_EXAMPLE}")
    if path.stat().st_size == 0:
        raise UserError(f"video {path} is empty (0 bytes); give {_EXAMPLE}")
    frames: list[np.ndarray] = []
    with contextlib.closing(_open(path, frames)) as stored:
        for index, frame in enumerate(at_rate(stored, fps, path) if fps else stored):
            if index % stride == 0:
                frames.append(frame.fit(height, width))
            if max_frames is not None and len(frames) == max_frames:
                break
    if len(frames) < min_frames:
        rate = f"{fps:g} frames per second and " if fps else ""
        raise UserError(
            f"video {path} has {len(frames)} frames at {rate}stride {stride}, but at least {min_frames} are needed; "
            f"use a longer video, a smaller stride or fewer frames"
        )
    return np.stack(frames)


def _open(path: Path, frames: Sequence[object]) -> Generator[Shown]:
    """The frames of a video or picture; `frames` are those used so far, for errors."""
    picture = open_picture(path)
    yield from open_video(path, frames) if picture is None else picture


def write_mp4(
    path: Path | str, frames: UInt8[np.ndarray, "t h w 3"], *, fps: float | int = 12.0, quality: int = 16
) -> Path:
    """Writes frames as H.264 in yuv420p, which every player supports.

    Odd sizes are padded by repeating the last row or column, since yuv420p needs even ones. The file appears under its
    name only when it is complete.

    Args:
        path: The file; its folder is created if needed.
        frames: RGB, uint8 [T, H, W, 3].
        fps: Frames per second.
        quality: The encoder's CRF: 16 is visually lossless, 30 is coarse; 0 loses only chroma resolution, which yuv420p
            halves.

    Returns:
        The path.

    Raises:
        UserError: If there are no frames.
        DiskFullError: If the disk is full.
    """
    return _written(Mp4Writer(path, fps=fps, quality=quality), frames)


def write_video(
    path: Path | str, frames: UInt8[np.ndarray, "t h w 3"], *, fps: float | int = 12.0, quality: int = 16
) -> Path:
    """Writes frames in the format that the name ends in, see `open_writer`.

    Args:
        path: The file or folder.
        frames: RGB, uint8 [T, H, W, 3].
        fps: Frames per second.
        quality: As in `write_mp4`, for an .mp4.

    Returns:
        The path.

    Raises:
        UserError: If there are no frames, or the ending is not supported.
        DiskFullError: If the disk is full.
    """
    return _written(open_writer(path, fps=fps, quality=quality), frames)


def _written(writer: VideoWriter, frames: np.ndarray) -> Path:
    if len(frames) == 0:
        raise UserError(f"frames is empty; {writer.path} needs at least 1 frame")
    with writer:
        writer.write(frames)
    return writer.path


def side_by_side(
    clips: Sequence[UInt8[np.ndarray, "t h w 3"]],
    *,
    labels: Sequence[str] = (),
    zoom: int = 1,
    margin: int = 4,
) -> UInt8[np.ndarray, "t H W 3"]:
    """Puts clips of one size next to each other, optionally enlarged and with a label above each.

    Args:
        clips: RGB, uint8 [T, H, W, 3] each, all of one shape.
        labels: One short text for each clip, or none.
        zoom: Enlarge each pixel to zoom x zoom.
        margin: Pixels between the clips.

    Returns:
        RGB, uint8 [T, H', W', 3].

    Raises:
        UserError: If the shapes differ or the number of labels does not match.

    Examples:
        >>> a = np.zeros((2, 4, 6, 3), np.uint8)
        >>> side_by_side([a, a], zoom=2, margin=4).shape
        (2, 8, 28, 3)
    """
    shapes = {clip.shape for clip in clips}
    if len(shapes) != 1:
        raise UserError(f"clips have the shapes {sorted(shapes)}; they must all have one shape")
    if labels and len(labels) != len(clips):
        raise UserError(f"labels has {len(labels)} entries for {len(clips)} clips; give one each, or none")
    columns: list[np.ndarray] = []
    for index, clip in enumerate(clips):
        clip = clip.repeat(zoom, axis=1).repeat(zoom, axis=2)
        if labels:
            head = np.broadcast_to(_caption(labels[index], clip.shape[2]), (len(clip), 18, clip.shape[2], 3))
            clip = np.concatenate([head, clip], axis=1)
        if index:
            columns.append(np.full((*clip.shape[:2], margin, 3), 255, np.uint8))
        columns.append(clip)
    return np.concatenate(columns, axis=2)


def _caption(text: str, width: int) -> np.ndarray:
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, 18), "white")
    ImageDraw.Draw(strip).text((width / 2, 9), text, fill="black", anchor="mm")
    return np.asarray(strip)
