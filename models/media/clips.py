"""Reading of folders of clips with captions."""

import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

from monarchrt.models.errors import UserError
from monarchrt.models.files import decoded, is_litter, listed

VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".qt", ".mpg", ".mpeg", ".m2v", ".ts", ".mts", ".m2ts",
          ".wmv", ".asf", ".flv", ".f4v", ".3gp", ".3g2", ".ogv", ".vob", ".mxf", ".dv", ".y4m")  # fmt: skip
PICTURES = (".gif", ".apng", ".webp", ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")


def captioned(folder: Path, *, skip: Callable[[str], None] | None = None) -> dict[Path, str]:
    """The clips of a folder, by name, with their captions.

    Hidden files, files of the operating system and unfinished downloads are ignored (`is_litter`).

    Args:
        folder: Folder of videos or pictures with a text file of the same name for each. The case of endings and the
            Unicode composition of names do not matter.
        skip: Called with the error of a clip or caption, which is then left out; None: the error is raised.

    Returns:
        Captions without surrounding space.

    Raises:
        UserError: If there is no clip, two share a name, or a caption is missing, empty, not text, or has no clip.
    """
    if not folder.is_dir():
        raise UserError(
            f"clips {folder} is not a folder; give one with videos and a caption for each, cat.mp4, cat.txt"
        )

    def refuse(message: str) -> None:
        if skip is None:
            raise UserError(message)
        skip(message)

    files = [path for path in listed(folder) if not path.is_dir()]
    clips, captions = (_by_stem(files, endings) for endings in ((*VIDEOS, *PICTURES), (".txt",)))
    if not clips:
        raise UserError(f"clips {folder} has no videos ({', '.join(VIDEOS)}), no pictures; {_instead(folder, files)}")
    pairs: dict[Path, str] = {}
    for stem, same in clips.items():
        texts = captions.get(stem, [])
        if len(same) > 1:
            names = " and ".join(path.name for path in same)
            refuse(f"clips {folder} has two videos named {stem}, {names}; their results would be one file")
        elif not texts:
            refuse(f"clip {same[0]} has no caption; write what it shows into {same[0].with_suffix('.txt')}")
        elif len(texts) > 1:
            refuse(f"clip {same[0]} has two captions, {texts[0].name} and {texts[1].name}; leave one")
        else:
            try:
                pairs[same[0]] = read_caption(texts[0], clip=same[0].name)
            except UserError as error:
                refuse(str(error))
    for stem, texts in captions.items():
        if stem not in clips:
            refuse(f"caption {texts[0]} has no clip; {_other_than_clip(folder, stem)}")
    return pairs


def read_caption(path: Path, *, clip: str) -> str:
    """Reads a caption: UTF-8, or UTF-16 or UTF-32 with a byte order mark; any line endings.

    Args:
        path: The file.
        clip: Name of its clip, for errors.

    Raises:
        UserError: If it cannot be read, is empty, or is not text in these encodings.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"caption {path} cannot be read: {error.strerror or error}") from error
    text = decoded(content, name=f"caption {path}")
    if text.startswith("{\\rtf"):
        raise UserError(f"caption {path} is not plain text; save it as plain text in UTF-8")
    text = re.sub(r"\r\n?", "\n", text).strip()
    if not text:
        raise UserError(f"caption {path} is empty; write what {clip} shows into it")
    return text


def _by_stem(files: list[Path], endings: tuple[str, ...]) -> dict[str, list[Path]]:
    """Files with some endings, by their names without the ending in normalised Unicode."""
    by_stem: dict[str, list[Path]] = {}
    for path in files:
        if path.suffix.lower() in endings:
            by_stem.setdefault(unicodedata.normalize("NFC", path.stem), []).append(path)
    return by_stem


def _other_than_clip(folder: Path, stem: str) -> str:
    """The files beside a caption whose clip is missing, for the error."""
    for path in sorted(folder.iterdir()):
        name = unicodedata.normalize("NFC", path.name)
        if not name.startswith(f"{stem}.") or path.suffix.lower() == ".txt":
            continue
        if path.is_dir():
            return f"{path.name} is a folder"
        if is_litter(path):
            return f"{path.name} is an unfinished download"
        return f"{path.name} is none that is read; its ending would be one of {' '.join(VIDEOS + PICTURES)}"
    return f"put {stem}.mp4 there, or the text elsewhere"


def _instead(folder: Path, files: list[Path]) -> str:
    inner = next((path for path in listed(folder) if path.is_dir() and _by_stem(listed(path), VIDEOS)), None)
    if inner is not None:
        return f"{inner} has; give that"
    return f"it has {files[0].name}" if files else "it is empty"
