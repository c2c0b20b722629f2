"""Reading and writing video files with PyAV (FFmpeg).

A clip is a uint8 array [T, H, W, 3] of RGB frames.
"""

from collections.abc import Sequence
from pathlib import Path

import av
import av.container
import av.error
import numpy as np
from jaxtyping import UInt8

from monarchrt.models.errors import UserError
from monarchrt.models.media.writer import Mp4Writer

_EXAMPLE = "an .mp4 or .webm file with a video track"


def read_clip(
    path: Path | str,
    *,
    height: int,
    width: int,
    stride: int = 1,
    max_frames: int | None = None,
    min_frames: int = 1,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Reads a clip, upright, resized to cover `height x width` with its shape kept, then cropped in the middle.

    Args:
        path: A video file that FFmpeg can decode.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        stride: Take every `stride`-th frame, beginning with the first.
        max_frames: Stop after this many frames have been taken.
        min_frames: Fewest frames that will do.

    Returns:
        RGB frames, uint8 [T, height, width, 3].

    Raises:
        UserError: If the file is missing, empty, damaged or cut off, has no video track, or is too short.

    Example:
        >>> read_clip("nowhere.mp4", height=64, width=64)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        monarchrt.models.errors.UserError: video nowhere.mp4 does not exist; give an .mp4 or .webm file with a ...
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"video {path} does not exist; give {_EXAMPLE}")
    if not path.is_file():
        raise UserError(f"video {path} is not a file; give {_EXAMPLE}")
    if path.stat().st_size == 0:
        raise UserError(f"video {path} is empty (0 bytes); give {_EXAMPLE}")
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                kinds = sorted({stream.type for stream in container.streams}) or ["nothing"]
                maybe = "" if "audio" in kinds else " (it may be cut off)"
                raise UserError(f"video {path} has no video track, only {', '.join(kinds)}{maybe}; give {_EXAMPLE}")
            for index, frame in enumerate(_decode(container, path)):
                if index % stride == 0:
                    frames.append(_fit(frame, height, width))
                if max_frames is not None and len(frames) == max_frames:
                    break
    except PermissionError as error:
        raise UserError(f"video {path} may not be read: {error.strerror}") from error
    except av.error.FFmpegError as error:
        raise UserError(
            f"video {path} is cut off, damaged or not a video ({error.strerror or error}) after "
            f"{len(frames)} good frames; give {_EXAMPLE}"
        ) from error
    if len(frames) < min_frames:
        raise UserError(
            f"video {path} has {len(frames)} frames at stride {stride}, but at least {min_frames} are needed; "
            f"use a longer video, a smaller stride or fewer frames"
        )
    return np.stack(frames)


def _decode(container: "av.container.InputContainer", path: Path):
    """Yields decoded frames; a file that ends before its own index says so is an error."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    packets, end = 0, None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise UserError(f"video {path} is cut off or damaged: packet {packets} is incomplete; give a whole file")
        if packet.size:
            packets += 1
            if packet.pts is not None:
                last = packet.pts + (packet.duration or 0)
                end = last if end is None else max(end, last)
        yield from packet.decode()
    # fewer packets than the index lists is fine if an edit list hides some, not if the end is missing
    if stream.frames and packets < stream.frames and stream.duration and end is not None:
        missing = (stream.start_time or 0) + stream.duration - end
        if missing > 1.5 * stream.duration / stream.frames:
            raise UserError(
                f"video {path} is cut off: {packets} of the {stream.frames} frames it announces; give a whole file"
            )


def _fit(frame: "av.VideoFrame", height: int, width: int) -> np.ndarray:
    turns = round(frame.rotation / 90) % 4  # counterclockwise; a phone stores what it saw, and how it was held
    if turns % 2:
        height, width = width, height
    scale = max(height / frame.height, width / frame.width)
    scaled_h, scaled_w = max(height, round(frame.height * scale)), max(width, round(frame.width * scale))
    picture = frame.reformat(width=scaled_w, height=scaled_h, format="rgb24", interpolation="AREA").to_ndarray()
    top, left = (scaled_h - height) // 2, (scaled_w - width) // 2
    return np.rot90(picture[top : top + height, left : left + width], turns)


def write_mp4(path: Path | str, frames: UInt8[np.ndarray, "t h w 3"], *, fps: float = 12.0, quality: int = 16) -> Path:
    """Writes frames as H.264 in yuv420p, which every player shows.

    Odd sizes are padded by repeating the last row or column, since yuv420p needs even ones. The file appears under its
    name only once it is complete.

    Args:
        path: The file to write; its folder is made if needed.
        frames: RGB, uint8 [T, H, W, 3].
        fps: Frames per second.
        quality: The encoder's CRF: 0 is lossless, 16 looks the same as the input, 30 is coarse.

    Returns:
        The path.

    Raises:
        UserError: If there are no frames.
        DiskFullError: If there is no room.
    """
    if len(frames) == 0:
        raise UserError(f"frames is empty; {path} needs at least 1 frame")
    with Mp4Writer(path, fps=fps, quality=quality) as writer:
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

    Example:
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
