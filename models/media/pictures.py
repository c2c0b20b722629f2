"""Reading of still and animated pictures with Pillow: upright, in sRGB, without transparency."""

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path

import av
import av.error
import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from monarchrt.models.errors import UserError
from monarchrt.models.media.colour import Colours, to_ordinary
from monarchrt.models.media.containers import missing_bytes, still_brand
from monarchrt.models.media.frames import Shown, fit_rgb, on_white

_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "TIFF", "BMP", "AVIF", "PPM", "JPEG2000")
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")  # in others, further pictures are pages or belong to the first one
_RAW = (".dng", ".nef", ".nrw", ".arw", ".sr2", ".cr2", ".pef", ".orf", ".rw2", ".3fr", ".iiq")
_SUBFILE, _DNG_VERSION, _ORIENTATION = 254, 50706, 274
_DEFAULT_SECONDS = 0.1  # duration that browsers use for frames without one
_SAVE = "save it as PNG or JPEG"


def open_picture(path: Path) -> Iterator[Shown] | None:
    """Opens a picture; returns its frames, or None if the file is not a picture.

    Transparent parts become white. Colours are converted to sRGB by the picture's profile, and HDR by `to_ordinary`.

    Args:
        path: An existing file.

    Returns:
        An iterator over the frames, or None.

    Raises:
        UserError: If it is a picture that is damaged, too large, or cannot be read as viewers show it.
    """
    with _said(path), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        Image.init()
        try:
            image = Image.open(path, formats=[name for name in _FORMATS if name in Image.OPEN])
        except UnidentifiedImageError:
            if brand := still_brand(path):
                if missing := missing_bytes(path):
                    raise UserError(
                        f"picture {path} is cut off: {missing} bytes are missing; give a whole file"
                    ) from None
                raise UserError(
                    f"picture {path} is of the kind {brand} (HEIC, HEIF or raw), which is not supported; {_SAVE}"
                ) from None
            return None
        if problem := _problem(image, path):
            image.close()
            raise UserError(f"picture {path} {problem}")
    return _frames(image, path)


def _problem(image: Image.Image, path: Path) -> str | None:
    """Description of an unsupported property of a picture; None if there is none."""
    if image.mode in ("F", "LAB") or (image.mode == "I" and image.format == "TIFF"):
        return f"has pixels of the kind {image.mode}, which have no one look; {_SAVE}"
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        if path.suffix.lower() in _RAW or _DNG_VERSION in tags or tags.get(_SUBFILE, 0) & 1:
            return f"is a raw photo, of which only a preview would be read; {_SAVE}"
    if image.format == "WEBP" and (missing := missing_bytes(path)):
        return f"is cut off: {missing} bytes are missing; give a whole file"
    if image.format == "GIF":
        with path.open("rb") as file:
            file.seek(-min(64, path.stat().st_size), io.SEEK_END)
            if not file.read().rstrip(b"\0\r\n").endswith(b";"):
                return "is cut off: its end is missing; give a whole file"
    return None


def _frames(image: Image.Image, path: Path) -> Iterator[Shown]:
    time, index = 0.0, 0
    with image, _said(path):
        colours = _signalled(path) if image.format in ("AVIF", "PNG") else Colours()
        if problem := colours.problem:
            raise UserError(f"picture {path} has {problem}; {_SAVE}")
        if image.info.get("default_image"):  # a still picture for readers that do not support animations
            index = 1
        animated = image.format in _ANIMATED and getattr(image, "is_animated", False)
        while True:
            try:
                image.seek(index)
            except EOFError:
                return
            picture = _seen(image, colours)
            seconds = image.info.get("duration", 0) / 1000
            # like browsers, treats implausibly short durations as missing
            seconds = seconds if seconds > 0.01 else _DEFAULT_SECONDS
            yield Shown(time, seconds if animated else None, lambda h, w, picture=picture: fit_rgb(picture, h, w))
            if not animated:
                return
            time, index = time + seconds, index + 1


def _seen(image: Image.Image, colours: Colours) -> np.ndarray:
    """The pixels of a picture in RGB."""
    if image.mode.startswith("I"):  # 16 bits of grey
        levels = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        grey = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
        grey.info.update(image.info)
        if orientation := image.getexif().get(_ORIENTATION):
            grey.getexif()[_ORIENTATION] = orientation
        image = grey
    image = ImageOps.exif_transpose(image)
    transparent = image.has_transparency_data
    profile = image.info.get("icc_profile")
    alpha = image.convert("RGBA").getchannel("A") if transparent else None
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGBA").convert("RGB") if transparent else image.convert("RGB")
    image = _by_profile(image, profile) if profile else image.convert("RGB")
    pixels = np.asarray(image)
    if not profile and not colours.ordinary:
        pixels = to_ordinary(pixels.astype(np.float32) / 255, colours)
    return pixels if alpha is None else on_white(np.dstack([pixels, np.asarray(alpha)]))


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts colours to sRGB by a profile; like viewers, ignores a profile that is damaged or for other channels."""
    with contextlib.suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if not ImageCms.getProfileDescription(source).startswith("sRGB"):
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            return image if converted is None else converted
    return image.convert("RGB")


def _signalled(path: Path) -> Colours:
    """Transfer characteristics and primaries of an AVIF or a PNG, which Pillow does not provide."""
    try:
        with path.open("rb") as file, av.open(file, "r", options={"protocol_whitelist": "none"}) as container:
            frame = next(container.decode(video=0))
            return Colours(frame.color_trc, frame.color_primaries)
    except (av.error.FFmpegError, StopIteration, IndexError):
        return Colours()


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Turns errors of Pillow into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        pixels = next((int(word.strip("(")) for word in str(error).split() if word.strip("(").isdigit()), 0)
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UserError(
            f"picture {path} has {pixels / 1e6:.0f} megapixels, more than the {most / 1e6:.0f} that are read; make it "
            f"smaller"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        if isinstance(error, PermissionError):
            raise UserError(f"picture {path} cannot be read: {error.strerror}") from error
        raise UserError(f"picture {path} is cut off or damaged ({error}); give a whole file") from error
