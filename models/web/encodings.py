"""Ways in which frames go out: a JPEG each, or a block at a time as H.264 in a fragmented mp4."""

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
    """A way for frames to go out.

    Attributes:
        name: As clients ask for it.
        by_block: Whether a message holds a whole block, not one frame.
        encode: Bytes of frames, of which the first has an index, at a rate of play.
        mime: MIME type with the codec, of frames of a height and a width at a rate; None: cannot be done here.
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
    """Frames as a fragmented mp4 of its own: header, and one fragment that begins with a key frame.

    It can be decoded alone; after each other, such pieces are one video, also if some are left out, since each knows
    its time. Any encoder makes the same header for frames of one size and rate.

    Examples:
        >>> piece = fragment(np.zeros((3, 16, 32, 3), np.uint8), 6, 8.0)
        >>> with av.open(io.BytesIO(piece)) as video:
        ...     [frame.time for frame in video.decode(video=0)]
        [0.75, 0.875, 1.0]

    Args:
        frames: Of even height and width.
        index: Of the first, which tells the time.
        fps: Frames per second of play.

    Returns:
        `ftyp`, `moov`, `moof` and `mdat`.
    """
    buffer, rate = io.BytesIO(), Fraction(fps).limit_denominator(1000)
    with av.open(buffer, "w", format="mp4", options=_FRAGMENTED) as container:
        stream = container.add_stream("libx264", rate=rate, options=_H264)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # blocks are encoded beside each other
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return _begun_at(bytearray(buffer.getvalue()), index, rate)


def _begun_at(piece: bytearray, index: int, rate: Fraction) -> bytes:
    """The piece with its place in the video: ISO 14496-12, `tfdt` in ticks of `mdhd`, and `mfhd` counted from 1."""
    media, sequence, time = (piece.index(name) + 8 for name in (b"mdhd", b"mfhd", b"tfdt"))
    ticks = int.from_bytes(piece[media + 8 : media + 12], "big")
    piece[sequence : sequence + 4] = (index + 1).to_bytes(4, "big")
    piece[time : time + 8] = int(index * ticks / rate).to_bytes(8, "big")
    return bytes(piece)


@functools.cache
def h264_mime(height: int, width: int, fps: float) -> str | None:
    """What Media Source Extensions are told of `fragment`'s pieces; None without an encoder, or for odd sizes."""
    if height % 2 or width % 2:
        return None
    try:
        piece = fragment(np.zeros((1, height, width, 3), np.uint8), 0, fps)
    except (av.error.FFmpegError, ValueError):
        return None
    profile = piece.index(b"avcC") + 5  # profile, what it keeps to, and level
    return f'video/mp4; codecs="avc1.{piece[profile : profile + 3].hex()}"'


_ALL = (
    Encoding("jpeg", False, lambda frames, index, fps: jpeg(frames[0]), lambda height, width, fps: "image/jpeg"),
    Encoding("mp4", True, fragment, h264_mime),
)
ENCODINGS = {encoding.name: encoding for encoding in _ALL}
