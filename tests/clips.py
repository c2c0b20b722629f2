"""Small video files to test with."""

from pathlib import Path

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
