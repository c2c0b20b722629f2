"""Writing of videos frame by frame, with their settings as metadata; an interrupted video keeps its frames so far.

The ending of the name determines the format: .mp4 for every player; .mkv, or a folder of PNG files, for exact frames.
"""

import contextlib
import json
import os
import re
import tempfile
import warnings
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import av
import av.error
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import UInt8

from monarchrt.models.checkpoints.json_files import parse_json
from monarchrt.models.errors import UserError, report_full_disk
from monarchrt.models.files import growing, is_litter, remove_abandoned, unfinished

KEY = "monarchrt"  # key of the settings in the JSON of the comment
FREE = "free some space"  # advice for a full disk


def check_writable(path: Path, *, overwrite: bool = False) -> None:
    """Checks, before any computation, that a video can be written; creates at most its folder.

    Args:
        path: The file; its folder is created if needed.
        overwrite: Whether it may exist.

    Raises:
        UserError: If it exists, or cannot be written; the message says why.
    """
    names = _frame_names(path)
    if names is not None:
        _check_frames_writable(path, names, overwrite)
        return
    if path.is_dir():
        raise UserError(f"out {path} is a folder; give the name of a file, for example {path / 'video.mp4'}")
    if path.suffix.lower() not in _WRITERS:
        raise UserError(
            f"out {path} does not end in .mp4, nor in .mkv for exact frames; give {path.with_suffix('.mp4')}, or for "
            f"exact frames as PNG {path.with_suffix('')} or {path.with_suffix('') / '%05d.png'}"
        )
    if path.exists() and not overwrite:
        raise UserError(f"out {path} exists already; give another --out, or --overwrite")
    check_folder("out", path)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"out {path} exists and cannot be written to")


def _check_frames_writable(path: Path, names: Path, overwrite: bool) -> None:
    folder = names.parent
    if folder.exists() and not folder.is_dir():
        raise UserError(f"out {path} cannot be written: {folder} is a file")
    old = _frames_there(names)
    if old and not overwrite:
        raise UserError(f"out {path} exists already, with {len(old)} frames; give another --out, or --overwrite")
    if path.is_dir() and any(entry not in old and not is_litter(entry) for entry in path.iterdir()):
        raise UserError(
            f"out {path} is a folder with other files; give a new one, or a file such as {path / 'video.mp4'}"
        )
    check_folder("out", folder / "00000.png")


def _frame_names(path: Path) -> Path | None:
    """The pattern of a video's PNG files, with %05d for the number; None if the path is not a folder or pattern."""
    if re.fullmatch(r"[^%]*%(0\d)?d[^%]*\.png", path.name, re.IGNORECASE):
        return path
    return path / "%05d.png" if not path.suffix or (path.is_dir() and path.suffix.lower() not in _WRITERS) else None


def _frames_there(names: Path) -> list[Path]:
    """Existing files that match the pattern."""
    head, _, tail = re.split(r"%(0\d)?d", names.name)
    pattern = re.compile(rf"{re.escape(head)}\d+{re.escape(tail)}")
    entries = sorted(names.parent.iterdir()) if names.parent.is_dir() else []
    return [path for path in entries if pattern.fullmatch(path.name) and path.is_file()]


def check_folder(name: str, path: Path) -> None:
    """Raises UserError unless a file can be created; creates its folder, but no file.

    Args:
        name: Name of its option, for the error.
        path: The file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, name=path.name)
        # a new name, as another process may be writing there; as long as the temporary name of the file
        with (
            report_full_disk(path, then=FREE),
            tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", suffix=".part"),
        ):
            pass
    except OSError as error:
        raise UserError(f"{name} {path} cannot be written: {error.strerror or error}") from error


@runtime_checkable
class VideoWriter(Protocol):
    """A writer of frames, and a context manager that completes the video at the end of the block."""

    path: Path
    frames: int

    def write(self, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        """Appends frames, all of one size."""
        ...

    def close(self) -> None:
        """Completes the video."""
        ...

    def __enter__(self) -> "VideoWriter": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_writer(path: Path | str, **options: Any) -> VideoWriter:
    """Creates the writer for a name: .mp4, .mkv for exact frames, a folder or `frames/%05d.png` for exact PNG frames.

    Examples:
        >>> [type(open_writer(name)).__name__ for name in ("a.mp4", "a.mkv", "a", "a/%05d.png")]
        ['Mp4Writer', 'MkvWriter', 'PngWriter', 'PngWriter']

    Args:
        path: The file or folder.
        **options: As in `Mp4Writer`.

    Returns:
        The writer.

    Raises:
        UserError: If the ending is not supported.
    """
    path = Path(path)
    if _frame_names(path) is not None:
        return PngWriter(path, **options)
    if path.suffix.lower() not in _WRITERS:
        raise UserError(f"out {path} does not end in .mp4 or .mkv; give {path.with_suffix('.mp4')}")
    return _WRITERS[path.suffix.lower()](path, **options)


class Mp4Writer:
    """Writes H.264 in yuv420p, which every player supports; the file appears under its name when it is complete.

    As a context manager, it completes the file at the end of the block, also after Ctrl-C or an error, and keeps the
    frames so far. Without frames there is no file.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "clip.mp4"
        >>> with Mp4Writer(path, fps=8.0, settings={"seed": 3}) as writer:
        ...     writer.write(np.zeros((2, 32, 48, 3), np.uint8))
        >>> read_settings(path)
        {'seed': 3}

    Args:
        path: The file; its folder is created if needed.
        fps: Frames per second.
        quality: The encoder's CRF: 16 is visually lossless, 30 is coarse; 0 loses only chroma resolution, which yuv420p
            halves.
        settings: JSON values to store in the metadata, under `comment`.
        title: Title in the metadata.
        overwrite: Whether to replace a file that exists when the video is complete; if not, the video gets another
            name.
    """

    _format, _multiple = "mp4", 2

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
        self._growing = contextlib.ExitStack()
        self._container: Any = None
        self._stream: Any = None
        self._failed = False  # whether writing failed; FFmpeg crashes if it then writes more without its header

    def write(self, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        """Appends frames. Odd sizes are padded by repeating the last row or column, since yuv420p needs even ones.

        Raises:
            DiskFullError: If there is no room.
        """
        odd = frames.shape[1] % self._multiple, frames.shape[2] % self._multiple
        frames = np.pad(frames, ((0, 0), (0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")
        with report_full_disk(self.path, then=FREE):
            for picture in frames:
                if self._container is None:
                    self._container = self._open(*picture.shape[:2])
                try:
                    self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
                except (OSError, av.error.FFmpegError):
                    self._failed = True
                    raise
                self.frames += 1

    def _open(self, height: int, width: int) -> Any:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self._growing.enter_context(growing(self.path))
        # an absolute path, since FFmpeg takes the text before a colon as a protocol
        # reproducible files: by default Matroska gives each file a random number
        exact = {"fflags": "+bitexact"} if self._format == "matroska" else {}
        container = av.open(f"file:{part.absolute()}", "w", format=self._format, options=exact)
        container.metadata.update(self._metadata)
        self._stream = self._add_stream(container)
        self._stream.width, self._stream.height = width, height
        return container

    def _add_stream(self, container: Any) -> Any:
        stream = container.add_stream("libx264", rate=self._fps)
        stream.pix_fmt = "yuv420p"
        # without a tag, players assume BT.709 for 720 rows or more, and colours shift
        stream.codec_context.colorspace = Colorspace.ITU601
        stream.codec_context.color_range = ColorRange.MPEG
        # reproducible files: one thread, and no macroblock tree
        stream.options = {"crf": str(self._quality), "preset": "medium", "threads": "1", "x264-params": "mbtree=0"}
        return stream

    def close(self) -> None:
        """Completes the file; if it cannot be written completely, it is removed.

        Raises:
            DiskFullError: If the disk is full.
            UserError: If a file with this name has been created meanwhile and may not be replaced; the message says
                under which name the video was kept.
        """
        container, self._container = self._container, None
        if container is None:
            return
        if self._failed:
            self._stream = None
            with contextlib.suppress(OSError, av.error.FFmpegError):
                container.close()
            self._growing.close()
            unfinished(self.path).unlink(missing_ok=True)
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
                    self._growing.close()
                    unfinished(self.path).unlink(missing_ok=True)

    def _take_name(self) -> None:
        if self._overwrite or not self.path.exists():
            unfinished(self.path).replace(self.path)
            return
        other = self.path.with_stem(f"{self.path.stem}-{os.getpid()}")
        unfinished(self.path).replace(other)
        raise UserError(f"out {self.path} was created by another process meanwhile; this video is kept as {other}")

    def __enter__(self) -> "Mp4Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class MkvWriter(Mp4Writer):
    """Writes lossless FFV1 in Matroska; otherwise as `Mp4Writer`, and `quality` is not used."""

    _format, _multiple = "matroska", 1

    def _add_stream(self, container: Any) -> Any:
        stream = container.add_stream("ffv1", rate=self._fps)
        stream.pix_fmt = "bgr0"
        stream.options = {"threads": "1"}
        return stream


class PngWriter:
    """Writes a lossless PNG file per frame, numbered from 0, into a folder or by a pattern such as `frames/%05d.png`.

    Each file appears complete when its frame is written. The settings are in the first file.

    Args:
        path: The folder, or the pattern with `%05d` for the number.
        fps: Not used; for the same interface as `Mp4Writer`.
        quality: Not used.
        settings: JSON values to store in the first file, under `comment`.
        title: Title in the first file.
        overwrite: Whether to replace existing frames; if not, an existing frame is an error.
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
        self.path, self.frames = Path(path), 0
        names = _frame_names(self.path)
        if names is None:
            raise UserError(f"out {path} is neither a folder nor a pattern for PNG files such as frames/%05d.png")
        self._names, self._overwrite = names, overwrite
        self._texts = {} if settings is None else {"comment": json.dumps({KEY: settings}, ensure_ascii=False)}
        if title:
            self._texts["Title"] = title

    def write(self, frames: UInt8[np.ndarray, "t h w 3"]) -> None:
        """Writes a file for each frame.

        Raises:
            DiskFullError: If the disk is full.
            UserError: If a file exists and may not be replaced.
        """
        from PIL import Image, PngImagePlugin

        with report_full_disk(self.path, then=FREE):
            for picture in frames:
                if self.frames == 0:
                    self._names.parent.mkdir(parents=True, exist_ok=True)
                    for old in _frames_there(self._names) if self._overwrite else ():
                        old.unlink()
                file = self._names.with_name(self._names.name % self.frames)
                if file.exists():
                    raise UserError(
                        f"out {file} was created by another process meanwhile; {self.frames} frames are kept"
                    )
                texts = PngImagePlugin.PngInfo()
                for name, text in self._texts.items() if self.frames == 0 else ():
                    texts.add_itxt(name, text)
                with growing(file) as part:
                    Image.fromarray(picture).save(part, format="PNG", pnginfo=texts, compress_level=3)
                    part.replace(file)
                self.frames += 1

    def close(self) -> None:
        """Does nothing: the files are complete."""

    def __enter__(self) -> "PngWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_WRITERS = {".mp4": Mp4Writer, ".mkv": MkvWriter}


def read_settings(path: Path | str) -> dict[str, Any]:
    """Reads the settings that a writer stored in a video.

    Args:
        path: The video file, a folder of PNG files, or the first of these.

    Returns:
        JSON values by name.

    Raises:
        UserError: If the file cannot be read, or has no settings.
    """
    path = Path(path)
    names = _frame_names(path)
    if names is not None and (frames := _frames_there(names)):
        path = frames[0]
    if not path.is_file():
        raise UserError(
            f"video {path} does not exist; give an .mp4, an .mkv or a folder of PNG files, made by monarchrt generate"
        )
    try:
        return dict(parse_json(_comment(path), "its comment")[KEY].items())
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"video {path} is damaged or not a video ({error.strerror or error})") from error
    except (AttributeError, KeyError, StopIteration, TypeError, ValueError) as error:
        raise UserError(f"video {path} holds no settings; it was not made by monarchrt generate") from error


def _comment(path: Path) -> str:
    if path.suffix.lower() == ".png":
        from PIL import Image

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # no pixel is decoded
            try:
                with Image.open(path, formats=["PNG"]) as image:
                    return image.info["comment"]
            except Image.DecompressionBombError as error:
                raise ValueError(f"it has more pixels than any frame: {error}") from error
    with path.open("rb") as file, av.open(file, "r", options={"protocol_whitelist": "none"}) as container:
        # Matroska writes names in capitals
        return next(text for name, text in container.metadata.items() if name.lower() == "comment")
