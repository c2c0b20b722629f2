"""Pictures are read as a person sees them, or refused by name."""

import io
import shutil
import struct
import subprocess
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from monarchrt.models.errors import UserError
from monarchrt.models.media.video import read_clip
from tests.clips import order, quarters


def read(path, height=96, width=128, **options):
    return read_clip(path, height=height, width=width, **options)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "bmp", "gif", "avif", "ppm"])
@pytest.mark.parametrize("name", ["a", "a:1", "a%03d", "-a", "file:a"])
def test_kinds_and_names(tmp_path, monkeypatch, ending, name):
    monkeypatch.chdir(tmp_path)
    with open(f"{name}.{ending}", "wb") as file:
        Image.fromarray(quarters()).save(file, format={"jpg": "jpeg", "tif": "tiff"}.get(ending, ending))
    frames = read(f"{name}.{ending}")
    assert (len(frames), order(frames[0])) == (1, "RGBW")
    assert len(read(f"{name}.{ending}", fps=16)) == 1


def test_the_content_counts_not_the_ending(tmp_path):
    Image.fromarray(quarters()).save(tmp_path / "a.mp4", format="png")
    assert order(read(tmp_path / "a.mp4")[0]) == "RGBW"


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr"])
def test_modes(tmp_path, mode):
    picture = Image.fromarray(quarters()).convert(mode)
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.png")
    picture.save(path, quality=100)
    seen = read(path)[0]
    if mode in ("1", "L"):
        assert (seen[..., 0] == seen[..., 1]).all()
        assert seen[72, 96, 0] == 255
    else:
        assert order(seen) == "RGBW"


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_of_grey(tmp_path, ending):
    ramp = np.linspace(0, 65535, 128).astype(np.uint16)[None].repeat(96, 0)
    Image.fromarray(ramp).save(tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(read(tmp_path / f"a.{ending}")[0, 0, :, 0], np.rint(ramp[0] / 257))


def test_floating_point_is_refused(tmp_path):
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"a\.tif has pixels of the kind F"):
        read(tmp_path / "a.tif")


@pytest.mark.parametrize("ending", ["png", "webp", "tif", "avif"])
def test_transparent_parts_are_white(tmp_path, ending):
    """Hidden red shows neither there nor, when it is scaled, at the edge."""
    picture = np.zeros((96, 128, 4), np.uint8)
    picture[:, :64], picture[:, 64:] = (255, 0, 0, 0), (0, 0, 255, 255)
    options: dict[str, Any] = (
        {"lossless": True} if ending == "webp" else {"quality": 100, "subsampling": "4:4:4"} if ending == "avif" else {}
    )
    Image.fromarray(picture).save(tmp_path / f"a.{ending}", **options)
    seen = read(tmp_path / f"a.{ending}", 48, 64)[0].astype(int)
    assert seen[:, :31].min() >= 253
    assert np.abs(seen[:, 34:] - (0, 0, 255)).max() <= 8
    assert (seen[:, 31:33, 0] - seen[:, 31:33, 1]).max() <= 10


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "LA"])
def test_transparency_of_other_modes(tmp_path, mode):
    grey = np.full((96, 128), 60, np.uint8)
    grey[:, :64] = 10
    if mode == "LA":
        Image.fromarray(np.dstack([grey, np.where(grey == 10, 0, 255).astype(np.uint8)])).save(tmp_path / "a.png")
    else:
        picture = Image.fromarray(grey).convert(mode)
        colour = picture.getpixel((0, 0))
        picture.save(tmp_path / "a.png", transparency=colour)
    seen = read(tmp_path / "a.png")[0]
    assert (seen[:, :64] == 255).all()
    assert (seen[:, 64:] == 60).all()


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize(
    ("orientation", "seen"),
    [(1, "RGBW"), (2, "GRWB"), (3, "WBGR"), (4, "BWRG"), (5, "RBGW"), (6, "BRWG"), (7, "WGBR"), (8, "GWRB")],
)
def test_orientations(tmp_path, ending, orientation, seen):
    exif = Image.Exif()
    exif[0x112] = orientation
    Image.fromarray(quarters()).save(tmp_path / f"a.{ending}", exif=exif)
    height, width = (96, 128) if orientation < 5 else (128, 96)
    assert order(read(tmp_path / f"a.{ending}", height, width)[0]) == seen


def test_a_colour_profile_is_followed(tmp_path):
    """Of a profile whose red and green are exchanged; a damaged one is passed over."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green = srgb.index(b"rXYZ"), srgb.index(b"gXYZ")
    exchanged = bytearray(srgb)
    exchanged[red : red + 4], exchanged[green : green + 4] = b"gXYZ", b"rXYZ"
    # another name than sRGB's: that one is taken at its word
    exchanged = bytes(exchanged).replace("sRGB".encode("utf-16-be"), "xRGB".encode("utf-16-be"))
    for name, profile, expected in (("own", exchanged, "GRBW"), ("srgb", srgb, "RGBW"), ("bad", b"no", "RGBW")):
        Image.fromarray(quarters()).save(tmp_path / f"{name}.png", icc_profile=profile)
        assert order(read(tmp_path / f"{name}.png")[0]) == expected


class TestAnimated:
    FRAMES = tuple(Image.fromarray(quarters(order)) for order in ("RGBW", "GRWB", "WBGR"))

    @pytest.mark.parametrize("ending", ["gif", "png", "webp"])
    def test_frames_and_times(self, tmp_path, ending):
        first, *others = self.FRAMES
        path = tmp_path / f"a.{ending}"
        first.save(path, save_all=True, append_images=others, duration=[100, 300, 200], loop=0, lossless=True)
        assert [order(frame) for frame in read(path)] == ["RGBW", "GRWB", "WBGR"]
        at_ten = ["RGBW", "GRWB", "GRWB", "GRWB", "WBGR", "WBGR"]
        assert [order(frame) for frame in read(path, fps=10)] == at_ten

    def test_a_gif_is_composed(self, tmp_path):
        """Later frames hold what changes; the rest is transparent."""
        picture, dot = quarters(), quarters()
        dot[:8, :8] = 0
        images = [Image.fromarray(frame) for frame in (picture, dot)]
        images[0].save(tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100)
        frames = read(tmp_path / "a.gif")
        assert [order(frame) for frame in frames] == ["RGBW", "RGBW"]
        assert frames[1, 2, 2].max() < 9

    @pytest.mark.parametrize("ending", ["tif", "mpo"])
    def test_pages_are_no_frames(self, tmp_path, ending):
        first, *others = self.FRAMES
        first.save(tmp_path / f"a.{ending}", save_all=True, append_images=others)
        assert [order(frame) for frame in read(tmp_path / f"a.{ending}")] == ["RGBW"]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tif", "bmp", "gif", "avif"])
@pytest.mark.parametrize("kept", [0.2, 0.6, 0.95])
def test_cut_off(tmp_path, ending, kept):
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / f"whole.{ending}")
    content = (tmp_path / f"whole.{ending}").read_bytes()
    path = tmp_path / f"cut.{ending}"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=r"cut\.\w+ is cut off"):
        read(path)


@pytest.mark.parametrize(("name", "content"), [("a.png", b"\x89PNG\r\n\x1a\n\0\0\0"), ("a.svg", b"<svg xmlns='x'/>")])
def test_what_is_no_whole_picture_of_a_known_kind(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is cut off, damaged or (not|of an unsupported kind)"):
        read(tmp_path / name)


@pytest.mark.skipif(shutil.which("avifenc") is None, reason="avifenc makes the picture")
def test_a_picture_of_tiles_is_read_whole(tmp_path):
    parts = []
    for number, colour in enumerate("RGBW"):
        parts.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(quarters(colour * 4, 256, 256)).save(parts[-1])
    command = ["avifenc", "-s", "10", "--grid", "2x2", *parts, str(tmp_path / "grid.avif")]
    subprocess.run(command, check=True, capture_output=True)
    assert order(read(tmp_path / "grid.avif", 128, 128)[0]) == "RGBW"


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_a_picture_that_is_too_large_is_said_to_be(tmp_path):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    with pytest.raises(
        UserError, match=r"a\.png has 900 megapixels, more than the 179 that are read; make it smaller$"
    ):
        read(tmp_path / "a.png")


def test_an_hdr_png(tmp_path):
    """Its cICP chunk says PQ and BT.2020: 58% is paper white."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (148, 148, 148)).save(file, format="png")
    content = file.getvalue()
    (tmp_path / "a.png").write_bytes(content[:33] + chunk(b"cICP", bytes([9, 16, 0, 1])) + content[33:])
    assert 235 <= read(tmp_path / "a.png", 32, 32)[0].mean() <= 250


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"crx "])
def test_phones_photos_are_refused_by_name(tmp_path, brand):
    """FFmpeg would give one tile of them, or a preview."""
    (tmp_path / "a.heic").write_bytes(struct.pack(">I", 24) + b"ftyp" + brand + bytes(4) + b"mif1heic" + bytes(64))
    with pytest.raises(UserError, match=rf"a\.heic is of the kind {brand.decode().strip()} .* save it as PNG or JPEG"):
        read(tmp_path / "a.heic")


def test_a_raw_photo_is_refused_by_name(tmp_path):
    """Its first picture is a preview of the size of a stamp."""
    for name, tags in (("a.dng", {50706: bytes([1, 4, 0, 0])}), ("a.tif", {254: 1}), ("a.nef", {})):
        Image.fromarray(quarters()).save(tmp_path / name, format="tiff", tiffinfo=tags)
        with pytest.raises(UserError, match=rf"{name} is a raw photo"):
            read(tmp_path / name)
