"""VMAF by libvmaf, either that of PyAV or that of an ffmpeg program."""

import functools
import gc
import importlib.util
import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import numpy as np
from av.filter.context import FilterContext
from jaxtyping import UInt8

from monarchrt.models.errors import UserError
from monarchrt.models.media.writer import open_writer
from monarchrt.train.evaluation.metrics import check_same

type Video = UInt8[np.ndarray, "t h w 3"]
type Measure = Callable[[Video, Video], list[float]]

SMALLEST = 17  # least height and width in pixels; libvmaf crashes on smaller frames
RATE = Fraction(16)  # frames per second, which does not affect the values
ADVICE = "give --ffmpeg, one that was built with libvmaf, such as that of the package imageio-ffmpeg"


def find_vmaf(given: Path | None = None) -> Measure | None:
    """Finds a VMAF implementation: the given ffmpeg, else PyAV, else an installed ffmpeg; None if there is none.

    Raises:
        UserError: If the given ffmpeg has no libvmaf, or cannot be run.
    """
    if given is None and "libvmaf" in av.filter.filters_available:
        return vmaf_by_pyav
    ffmpeg = find_ffmpeg(given)
    return None if ffmpeg is None else functools.partial(vmaf, ffmpeg=ffmpeg)


def find_ffmpeg(given: Path | None = None) -> Path | None:
    """Finds an ffmpeg with libvmaf: the given one, else that of imageio-ffmpeg or of the system; None if none has it.

    Raises:
        UserError: If the given one has no libvmaf, or cannot be run.
    """
    if given is not None:
        if not _has_vmaf(given):
            raise UserError(f"ffmpeg {given} has no libvmaf, or cannot be run; {ADVICE}")
        return given
    candidates: list[Path] = []
    if importlib.util.find_spec("imageio_ffmpeg") is not None:
        folder = Path(importlib.util.find_spec("imageio_ffmpeg").origin or "").parent / "binaries"  # type: ignore[union-attr]
        candidates += sorted(folder.glob("ffmpeg*"))
    if (system := shutil.which("ffmpeg")) is not None:
        candidates.append(Path(system))
    return next((path for path in candidates if _has_vmaf(path)), None)


def _has_vmaf(path: Path) -> bool:
    try:
        done = subprocess.run([str(path), "-hide_banner", "-filters"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    return done.returncode == 0 and " libvmaf " in done.stdout


def _check(video: Video, reference: Video) -> None:
    check_same(video, reference)
    height, width = video.shape[1:3]
    if min(height, width) < SMALLEST:
        raise UserError(
            f"vmaf: frames are {height} x {width}, but libvmaf needs at least {SMALLEST} pixels per side; leave "
            f"--ffmpeg out"
        )


def vmaf_by_pyav(video: Video, reference: Video) -> list[float]:
    """Computes VMAF, from 0 to 100, of each frame by PyAV, with libvmaf's default model.

    Args:
        video: RGB frames.
        reference: RGB frames of the same shape.

    Returns:
        The value of each frame.

    Raises:
        UserError: If frames are too small, or libvmaf fails.
        ValueError: If the videos have different sizes or lengths.
    """
    _check(video, reference)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.json"
        _filter(video, reference, log)
        gc.collect()  # the log is written when the graph is freed, which has reference cycles
        if not log.is_file():
            raise UserError("PyAV's libvmaf did not compute VMAF; give --ffmpeg, one that was built with libvmaf")
        return _values(log)


def _filter(video: Video, reference: Video, log: Path) -> None:
    """Runs both videos through libvmaf, whose first input is the video and whose second is the reference."""
    graph = av.filter.Graph()
    path = str(log).translate({ord(c): f"\\{c}" for c in "\\':"})
    judge, sink = graph.add("libvmaf", f"log_fmt=json:log_path={path}"), graph.add("buffersink")
    judge.link_to(sink)
    height, width = video.shape[1:3]
    inputs = []
    for number in range(2):
        source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=1 / RATE)
        planes = graph.add("format", "yuv420p")
        source.link_to(planes)
        planes.link_to(judge, 0, number)
        inputs.append(source)
    graph.configure()
    for time, pictures in enumerate(zip(video, reference, strict=True)):
        for source, picture in zip(inputs, pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts, frame.time_base = time, 1 / RATE
            source.push(frame)
        _drain(sink)
    for source in inputs:
        source.push(None)
    _drain(sink)


def _drain(sink: FilterContext) -> None:
    while True:
        try:
            sink.pull()
        except (BlockingIOError, EOFError):
            return


def vmaf(video: Video, reference: Video, *, ffmpeg: Path) -> list[float]:
    """Computes VMAF of each frame by an ffmpeg program.

    Args:
        video: RGB frames.
        reference: RGB frames of the same shape.
        ffmpeg: An ffmpeg with libvmaf.

    Returns:
        The value of each frame, from 0 to 100.

    Raises:
        UserError: If frames are too small, or ffmpeg fails; with its message.
        ValueError: If the videos have different sizes or lengths.
    """
    _check(video, reference)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for name, frames in (("video", video), ("reference", reference)):
            with open_writer(Path(folder) / f"{name}.mkv", fps=16.0) as writer:
                writer.write(frames)
            files.append(f"{name}.mkv")
        graph = "[0:v]format=yuv420p[a];[1:v]format=yuv420p[b];[a][b]libvmaf=log_fmt=json:log_path=log.json"
        inputs = [word for name in files for word in ("-i", name)]
        command = [
            str(ffmpeg.absolute()),
            "-hide_banner",
            "-loglevel",
            "error",
            *inputs,
            "-lavfi",
            graph,
            "-f",
            "null",
            "-",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        log = Path(folder) / "log.json"
        if done.returncode or not log.is_file():
            said = " ".join(done.stderr.split())[-200:] or f"it ended with {done.returncode} and said nothing"
            raise UserError(f"ffmpeg {ffmpeg} did not compute VMAF: {said}")
        return _values(log)


def _values(log: Path) -> list[float]:
    return [float(frame["metrics"]["vmaf"]) for frame in json.loads(log.read_text())["frames"]]
