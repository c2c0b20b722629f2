"""Encodings of frames for clients: a JPEG each, or a block at a time as H.264 in a fragmented mp4."""

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import av
import av.error
import numpy as np
from jaxtyping import UInt8
from PIL import Image

JPEG_QUALITY = 88
_H264 = {"preset": "veryfast", "tune": "zerolatency", "crf": "20"}
_FRAGMENTED = {"movflags": "empty_moov+default_base_moof+skip_trailer"}


@dataclass(frozen=True)
class Encoding:
    """An encoding of frames.

    Attributes:
        name: Name by which clients ask for it.
        by_block: Whether a message holds a whole block instead of one frame.
        encode: (frames [t, H, W, 3], index of the first in the video, frames per second) -> bytes.
        mime: (height, width, frames per second) -> MIME type with the codec; None if such frames cannot be encoded.
    """

    name: str
    by_block: bool
    encode: Callable[[UInt8[np.ndarray, "t H W 3"], int, float], bytes]
    mime: Callable[[int, int, float], str | None]


def jpeg(frame: UInt8[np.ndarray, "H W 3"], *, quality: int = JPEG_QUALITY) -> bytes:
    """A frame as JPEG."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def fragment(frames: UInt8[np.ndarray, "t H W 3"], index: int, fps: float) -> bytes:
    """Encodes frames as a fragmented mp4: a header, and one fragment that starts with a key frame.

    Each piece can be decoded alone. Pieces that follow each other form one video, even with gaps, since each contains
    its time. All pieces of one size and rate have the same header.

    Examples:
        >>> piece = fragment(np.zeros((3, 16, 32, 3), np.uint8), 6, 8.0)
        >>> with av.open(io.BytesIO(piece)) as video:
        ...     [frame.time for frame in video.decode(video=0)]
        [0.75, 0.875, 1.0]

    Args:
        frames: Frames [t, H, W, 3]; H and W must be even.
        index: Index of the first frame in the video, which determines the time.
        fps: Frames per second of playback.

    Returns:
        The boxes `ftyp`, `moov`, `moof` and `mdat`.
    """
    buffer, rate = io.BytesIO(), Fraction(fps).limit_denominator(1000)
    with av.open(buffer, "w", format="mp4", options=_FRAGMENTED) as container:
        stream = container.add_stream("libx264", rate=rate, options=_H264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # several blocks are encoded at once, a thread each
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return _begun_at(bytearray(buffer.getvalue()), index, rate)


def _begun_at(piece: bytearray, index: int, rate: Fraction) -> bytes:
    """Sets a piece's time in the video: `tfdt` in ticks of `mdhd`, and `mfhd` counted from 1 (ISO 14496-12)."""
    media, sequence, time = (piece.index(name) + 8 for name in (b"mdhd", b"mfhd", b"tfdt"))
    ticks = int.from_bytes(piece[media + 8 : media + 12], "big")
    piece[sequence : sequence + 4] = (index + 1).to_bytes(4, "big")
    piece[time : time + 8] = int(index * ticks / rate).to_bytes(8, "big")
    return bytes(piece)


@functools.cache
def h264_mime(height: int, width: int, fps: float) -> str | None:
    """MIME type of `fragment`'s pieces for Media Source Extensions; None without an encoder, or for odd sizes."""
    if height % 2 or width % 2:
        return None
    try:
        piece = fragment(np.zeros((1, height, width, 3), np.uint8), 0, fps)
    except (av.error.FFmpegError, ValueError):
        return None
    profile = piece.index(b"avcC") + 5  # profile, constraints and level
    return f'video/mp4; codecs="avc1.{piece[profile : profile + 3].hex()}"'


_ALL = (
    Encoding("jpeg", False, lambda frames, index, fps: jpeg(frames[0]), lambda height, width, fps: "image/jpeg"),
    Encoding("mp4", True, fragment, h264_mime),
)
ENCODINGS = {encoding.name: encoding for encoding in _ALL}
