"""VMAF by an ffmpeg that was built with libvmaf, where there is one."""

import importlib.util
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from monarchrt.models.errors import UserError
from monarchrt.models.media.writer import open_writer
from monarchrt.train.evaluation.metrics import check_same

SMALLEST = 17  # pixels a side, or libvmaf crashes
ADVICE = "give --ffmpeg, one that was built with libvmaf, such as that of the package imageio-ffmpeg"


def find_ffmpeg(given: Path | None = None) -> Path | None:
    """An ffmpeg with libvmaf: the given one, that of imageio-ffmpeg, or the system's; None if none has it.

    Raises:
        UserError: If the given one has not, or is none.
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


def vmaf(video: UInt8[np.ndarray, "t h w 3"], reference: UInt8[np.ndarray, "t h w 3"], *, ffmpeg: Path) -> list[float]:
    """VMAF of each frame, 0 to 100, with the model that is built in.

    Args:
        video: RGB frames.
        reference: Of the same shape.
        ffmpeg: With libvmaf.

    Returns:
        A value per frame.

    Raises:
        UserError: If frames are too small for it, or ffmpeg fails; says what it said.
        ValueError: If the videos are of other sizes or lengths.
    """
    check_same(video, reference)
    height, width = video.shape[1:3]
    if min(height, width) < SMALLEST:
        raise UserError(
            f"vmaf: frames are {height} x {width}, and libvmaf needs {SMALLEST} pixels a side; leave --ffmpeg out"
        )
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
        frames = json.loads(log.read_text())["frames"]
    return [float(frame["metrics"]["vmaf"]) for frame in frames]
