"""Small video files to test with."""

from pathlib import Path
from typing import Any

import av
import numpy as np


def make_clip(path: Path, *, frames: int = 24, height: int = 36, width: int = 64, options=None, audio=False) -> Path:
    """A bright square that moves over a gradient; with a sine tone if asked."""
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream("libx264", rate=12)
        stream.height, stream.width, stream.pix_fmt, stream.options = height, width, "yuv420p", {"crf": "12"}
        tone = container.add_stream("aac", rate=16000) if audio else None
        base = np.linspace(40, 160, width, dtype=np.uint8)[None, :, None].repeat(height, 0).repeat(3, 2)
        for index in range(frames):
            picture = base.copy()
            left = 2 * index % (width - 12)
            picture[8:20, left : left + 12] = (240, 200 - 5 * index % 200, 30)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
        if tone is not None:
            container.mux(tone.encode(_sine(frames / 12)))
            container.mux(tone.encode())
    return path


def make_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        container.mux(stream.encode(_sine(0.5)))
        container.mux(stream.encode())
    return path


def _sine(seconds: float) -> av.AudioFrame:
    wave = np.sin(np.arange(int(seconds * 16000)) / 10).astype(np.float32)[None]
    frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
    frame.sample_rate = 16000
    return frame


CORNERS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}


def quarters(order: str = "RGBW", height: int = 96, width: int = 128) -> np.ndarray:
    """A picture of four colours: top left, top right, bottom left, bottom right."""
    picture = np.zeros((height, width, 3), np.uint8)
    for name, (y, x) in zip(order, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        picture[y * height // 2 : (y + 1) * height // 2, x * width // 2 : (x + 1) * width // 2] = CORNERS[name]
    return picture


def order(picture: np.ndarray) -> str:
    """The letters of `quarters` that a picture looks like."""
    height, width = picture.shape[:2]
    places = [(y * height // 4, x * width // 4) for y in (1, 3) for x in (1, 3)]

    def distance(name: str, place: tuple[int, int]) -> float:
        return float(np.square(picture[place].astype(float) - CORNERS[name]).sum())

    return "".join(min(CORNERS, key=lambda name: distance(name, place)) for place in places)


def video_frame(picture: np.ndarray, pix: str) -> av.VideoFrame:
    """A frame of a video of this pixel format; a picture of the format `rgb24`, `rgba` or the same as `pix`."""
    form = {3: "rgb24", 4: "rgba"}[picture.shape[2]] if picture.ndim == 3 else pix
    return av.VideoFrame.from_ndarray(picture, format=form)


def encode_video(
    path: Path, pictures, *, codec="libx264", pix="yuv420p", rate=12, times=None, prepare=None, size=None
) -> Path:
    """Pictures, or whole frames, as a video.

    Args:
        path: The file.
        pictures: RGB or RGBA arrays, or frames.
        codec: The encoder.
        pix: The pixel format.
        rate: Frames per second.
        times: Milliseconds of each frame, instead of a constant rate.
        prepare: Called with the stream before the first frame.
        size: Height and width; those of the first array.
    """
    from fractions import Fraction

    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=1000 if times else rate)
        stream.height, stream.width = size or pictures[0].shape[:2]
        stream.pix_fmt = pix
        if codec.startswith("libx26"):
            stream.options = {"crf": "4"} if codec == "libx264" else {"x265-params": "log-level=none:bframes=0"}
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        if prepare is not None:
            prepare(stream)
        for index, picture in enumerate(pictures):
            frame = video_frame(picture, pix) if isinstance(picture, np.ndarray) else picture
            frame.pts, frame.time_base = (times[index], Fraction(1, 1000)) if times else (index, 1 / Fraction(rate))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
