"""Writing an mp4 frame by frame, with the settings that made it; what was written is kept if it must end early."""

import json
import os
import tempfile
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import av
import av.error
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import UInt8

from monarchrt.models.checkpoints.json_files import parse_json
from monarchrt.models.errors import UserError, report_full_disk
from monarchrt.models.files import unfinished

KEY = "monarchrt"  # in the JSON of the comment
FREE = "free some space"  # what to do about a full disk


def check_writable(path: Path, *, overwrite: bool = False) -> None:
    """Finds out before anything is computed whether a file can be written; leaves nothing behind.

    Args:
        path: The file; its folder is made if needed.
        overwrite: Whether it may exist.

    Raises:
        UserError: If it exists, or cannot be written, with the reason.
    """
    if path.is_dir():
        raise UserError(f"out {path} is a folder; give the name of a file, for example {path / 'video.mp4'}")
    if path.suffix.lower() != ".mp4":
        raise UserError(f"out {path} does not end in .mp4, the only format there is; give {path.with_suffix('.mp4')}")
    if path.exists() and not overwrite:
        raise UserError(f"out {path} exists already; give another --out, or --overwrite")
    check_folder("out", path)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"out {path} exists and may not be written")


def check_folder(name: str, path: Path) -> None:
    """Raises UserError unless a file can be made there; makes its folder, and no file.

    Args:
        name: What the error calls it.
        path: The file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a new name, as another process may be writing there; as long as the one that the file will grow under
        with (
            report_full_disk(path, then=FREE),
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".part"),
        ):
            pass
    except OSError as error:
        raise UserError(f"{name} {path} cannot be written: {error.strerror or error}") from error


class Mp4Writer:
    """Writes H.264 in yuv420p, which every player shows; the file appears under its name when it is complete.

    As a context manager, it completes the file on leaving, also when Ctrl-C or an error ends it early: the frames so
    far are kept. Without any frame there is no file.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "clip.mp4"
        >>> with Mp4Writer(path, fps=8.0, settings={"seed": 3}) as writer:
        ...     writer.write(np.zeros((2, 32, 48, 3), np.uint8))
        >>> read_settings(path)
        {'seed': 3}

    Args:
        path: The file; its folder is made if needed.
        fps: Frames per second.
        quality: The encoder's CRF: 0 is lossless, 16 looks the same as the input, 30 is coarse.
        settings: JSON values to store in the metadata, under `comment`.
        title: For the metadata.
        overwrite: Whether a file that has appeared under the name by the end is replaced; if not, this one gets another
            name.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        fps: float | int = 12.0,
        quality: int = 16,
        settings: dict[str, Any] | None = None,
        title: str | None = None,
        overwrite: bool = True,
    ):
        self.path = Path(path)
        self._overwrite = overwrite
        self.frames = 0
        self._fps, self._quality = Fraction(fps).limit_denominator(1000), quality
        self._metadata = {} if settings is None else {"comment": json.dumps({KEY: settings}, ensure_ascii=False)}
        if title:
            self._metadata["title"] = title
        self._container: Any = None
        self._stream: Any = None

    def write(self, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        """Appends frames. Odd sizes are padded by repeating the last row or column, since yuv420p needs even ones.

        Raises:
            DiskFullError: If there is no room.
        """
        frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
        with report_full_disk(self.path, then=FREE):
            for picture in frames:
                if self._container is None:
                    self._container = self._open(*picture.shape[:2])
                self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                self.frames += 1

    def _open(self, height: int, width: int) -> Any:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        container = av.open(str(unfinished(self.path)), "w", format="mp4")
        container.metadata.update(self._metadata)
        self._stream = container.add_stream("libx264", rate=self._fps)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        # untagged, players take 720 rows and more for BT.709, and colours shift
        self._stream.codec_context.colorspace = Colorspace.ITU601
        self._stream.codec_context.color_range = ColorRange.MPEG
        self._stream.options = {"crf": str(self._quality), "preset": "medium"}
        return container

    def close(self) -> None:
        """Completes the file.

        Raises:
            DiskFullError: If there is no room.
            UserError: If there is a file by now that may not be replaced; says which name this one has.
        """
        container, self._container = self._container, None
        if container is None:
            return
        with report_full_disk(self.path, then=FREE):
            try:
                container.mux(self._stream.encode())
                container.close()
                self._take_name()
            finally:
                try:
                    container.close()  # fails again on a full disk
                finally:
                    unfinished(self.path).unlink(missing_ok=True)

    def _take_name(self) -> None:
        if self._overwrite or not self.path.exists():
            unfinished(self.path).replace(self.path)
            return
        other = self.path.with_stem(f"{self.path.stem}-{os.getpid()}")
        unfinished(self.path).replace(other)
        raise UserError(f"out {self.path} exists by now, of another process; this video is kept as {other}")

    def __enter__(self) -> "Mp4Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_settings(path: Path | str) -> dict[str, Any]:
    """The settings that `Mp4Writer` stored in a video.

    Args:
        path: The mp4.

    Returns:
        JSON values.

    Raises:
        UserError: If the file cannot be read, or holds none.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"video {path} does not exist; give an .mp4 made by monarchrt generate")
    try:
        with av.open(str(path)) as container:
            return dict(parse_json(container.metadata["comment"], "its comment")[KEY].items())
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"video {path} is damaged or not a video ({error.strerror or error})") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"video {path} holds no settings; it was not made by monarchrt generate") from error
