"""Decoding of videos with PyAV (FFmpeg), frame by frame, as players show them."""

import functools
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import av.container
import av.error
import av.filter
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import Colorspace

from monarchrt.models.errors import UserError
from monarchrt.models.media.colour import BT2020, HLG, PQ, UNSPECIFIED, Colours, to_ordinary
from monarchrt.models.media.containers import missing_bytes
from monarchrt.models.media.frames import Orientation, Shown, covering, cropped, on_white

_EXAMPLE = "an .mp4 or .webm file with a video track"
_OFFLINE = {"protocol_whitelist": "none"}  # playlists cannot open other files
_START = (b"\0\0\0\1", b"\0\0\1")
# streams without a container, which FFmpeg finds anywhere in a file, and the first bytes of a genuine one
_BARE = {"mjpeg": (b"\xff\xd8",)} | dict.fromkeys(("h264", "hevc", "vvc", "m4v", "mpegvideo"), _START)
_LARGEST = 2**28  # limit on the pixels of a scaled frame
_MATRICES = (1, 4, 5, 6, 7, 9)  # matrices that FFmpeg converts, numbered as in ITU-T H.273


def open_video(path: Path, taken: Sequence[object]) -> Iterator[Shown]:
    """Iterates over the frames of a video file.

    FFmpeg gets the open file rather than its name, which it could interpret as a protocol or pattern (`take:1.mp4`,
    `a%03d`).

    Args:
        path: An existing file.
        taken: The frames that the caller has used so far; their number is for errors.

    Yields:
        The frames.

    Raises:
        UserError: If it has no video track, is damaged or truncated, or cannot be read as players show it.
    """
    try:
        if missing := missing_bytes(path):
            raise UserError(f"video {path} is cut off: {missing} bytes of it are missing; give a whole file")
        with path.open("rb") as file, av.open(file, "r", options=_OFFLINE) as container:
            yield from _shown(container, path)
    except PermissionError as error:
        raise UserError(f"video {path} cannot be read: {error.strerror}") from error
    except av.error.FFmpegError as error:
        raise UserError(
            f"video {path} is cut off, damaged or not a video ({error.strerror or error}) after {len(taken)} good "
            f"frames; give {_EXAMPLE}"
        ) from error


def _shown(container: "av.container.InputContainer", path: Path) -> Iterator[Shown]:
    stream = _video_stream(container, path)
    aspect = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    if not 1 / 8 <= aspect <= 8:
        raise UserError(f"video {path} has pixels {aspect:g} times as wide as high; its header is damaged")
    for frame in _progressive(_decoded(container, stream, path), stream):
        duration = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else None
        yield Shown(frame.time, duration, functools.partial(_fit, frame, path, aspect))


def _video_stream(container: "av.container.InputContainer", path: Path) -> Any:
    kind = container.format.name
    if kind.endswith("_pipe") or kind == "image2":
        raise UserError(
            f"picture {path} is cut off, damaged or of an unsupported kind ({kind}); save it as PNG or JPEG"
        )
    if beginnings := _BARE.get(kind):
        with path.open("rb") as file:
            if not file.read(4).startswith(beginnings):
                raise UserError(
                    f"video {path} is not a video, but has pictures somewhere in it ({kind}), as documents and raw "
                    f"photos have; give {_EXAMPLE}"
                )
    if kind in ("hls", "dash", "concat"):
        raise UserError(f"video {path} is a list of other files ({kind}), which is not supported; give {_EXAMPLE}")
    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not moving:
        kinds = sorted({stream.type for stream in container.streams if stream.type != "video"}) or ["nothing"]
        maybe = "" if "audio" in kinds else " (it may be cut off)"
        raise UserError(f"video {path} has no video track, only {', '.join(kinds)}{maybe}; give {_EXAMPLE}")
    best = container.streams.best("video")
    stream: Any = best if best in moving else moving[0]
    if any(name.lower() == "alpha_mode" and value != "0" for name, value in stream.metadata.items()):
        raise UserError(f"video {path} has transparency, which is not supported (WebM's); put it on a background")
    return stream


def _decoded(container: "av.container.InputContainer", stream: Any, path: Path) -> Iterator[Any]:
    """Yields decoded frames; raises UserError if the file ends before its index does."""
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
    # fewer packets than in the index are valid if an edit list hides some, but not if the end is missing
    if stream.frames and packets < stream.frames and stream.duration and end is not None:
        missing = (stream.start_time or 0) + stream.duration - end
        if missing > 1.5 * stream.duration / stream.frames:
            raise UserError(
                f"video {path} is cut off: {packets} of the {stream.frames} frames it announces; give a whole file"
            )


def _progressive(frames: Iterator[Any], stream: Any) -> Iterator[Any]:
    """Deinterlaces interlaced frames; passes on others unchanged."""
    graph = None
    for frame in frames:
        if graph is None and frame.interlaced_frame:
            graph = av.filter.Graph()
            source, sink = graph.add_buffer(template=stream), graph.add("buffersink")
            graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), sink).configure()
        if graph is None:
            yield frame
        else:
            graph.vpush(frame)
            yield from _ready(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _ready(graph)


def _ready(graph: "av.filter.Graph") -> Iterator[Any]:
    while True:
        try:
            yield graph.vpull()
        except (BlockingIOError, EOFError):
            return


def _fit(frame: Any, path: Path, aspect: float, height: int, width: int) -> np.ndarray:
    orientation, colours = orientation_of(frame, path), _colours(frame, path)
    size = frame.height, frame.width
    scaled, target = covering(size, (height, width), orientation=orientation, aspect=aspect)
    if scaled[0] * scaled[1] > _LARGEST:
        raise UserError(f"video {path} has {size[0]} x {size[1]} pixels, too long and thin to fill {height} x {width}")
    matrix = _matrix(frame, colours)
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        # before scaling, which would mix hidden colours into the edges
        opaque = on_white(frame.reformat(format="rgba", src_colorspace=matrix).to_ndarray())
        frame, matrix = av.VideoFrame.from_ndarray(np.ascontiguousarray(opaque), format="rgb24"), None
    form = "rgb24" if colours.ordinary else "rgb48le"
    picture = frame.reformat(
        width=scaled[1], height=scaled[0], format=form, interpolation="AREA", src_colorspace=matrix
    ).to_ndarray()
    picture = cropped(picture, target, orientation)
    return picture if colours.ordinary else to_ordinary(picture.astype(np.float32) / 65535, colours)


def orientation_of(frame: Any, path: Path) -> Orientation:
    """The orientation by the display matrix, x' = a x + c y, y' = b x + d y: rotation of the camera, and mirroring."""
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return Orientation()
    a, b, _, c, d, *_ = struct.unpack("<9i", bytes(data)[:36])
    transposed = abs(a) + abs(d) < abs(b) + abs(c)
    along, across = ((c, b), (a, d)) if transposed else ((a, d), (c, b))
    if max(map(abs, across)) > 0.02 * min(map(abs, along)):
        raise UserError(f"video {path} has a rotation that is not supported; rotate it upright")
    return Orientation(transposed, across=along[0] < 0, down=along[1] < 0)


def _colours(frame: Any, path: Path) -> Colours:
    colours = Colours(frame.color_trc, frame.color_primaries)
    problem, matrix = colours.problem, frame.colorspace
    if not frame.format.is_rgb and matrix not in (*_MATRICES, 0, UNSPECIFIED, 3):
        problem = f"a colour matrix, number {matrix} of H.273,"
    elif colours.transfer == UNSPECIFIED and matrix == UNSPECIFIED and SideData.DOVI_METADATA in frame.side_data:
        problem = "Dolby Vision colours"
    if problem:
        raise UserError(f"video {path} has {problem} that cannot be converted to RGB correctly; convert it to BT.709")
    return colours


def _matrix(frame: Any, colours: Colours) -> Colorspace | None:
    """The matrix to RGB that players assume if the file names none; None if it does."""
    if frame.format.is_rgb or frame.colorspace in _MATRICES:
        return None
    if colours.transfer in (PQ, HLG) or colours.primaries == BT2020:
        return Colorspace.BT2020
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601
