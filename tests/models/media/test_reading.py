"""What a stranger sent is read in a process with limits."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from monarchrt.models.errors import UserError
from monarchrt.models.media.reading import read_stranger
from monarchrt.models.media.video import write_mp4

SIZE = dict(height=16, width=32)


def clip(path, count):
    frames = np.zeros((count, 16, 32, 3), np.uint8)
    frames += (10 * np.arange(count, dtype=np.uint8))[:, None, None, None]
    return write_mp4(path, frames, fps=8.0)


def test_as_many_frames_as_fit(tmp_path):
    path = clip(tmp_path / "upload.mp4", 8)
    found = read_stranger(path, counts=(3, 6, 9), **SIZE)
    assert (found.shape, found.dtype) == ((6, 16, 32, 3), np.uint8)
    assert np.abs(found[5].astype(int) - 50).max() <= 3


def test_errors_name_the_file_and_nothing_of_this_machine(tmp_path):
    path = tmp_path / "upload"
    path.write_bytes(b"\xff\xd8\xff\xe0 nothing")
    with pytest.raises(UserError) as caught:
        read_stranger(path, counts=(1,), **SIZE)
    assert str(caught.value).startswith("picture upload is cut off")
    assert str(tmp_path) not in str(caught.value)
    Image.new("RGB", (8, 8)).save(path, "PNG")
    with pytest.raises(UserError, match="upload is a single image, and 6 or 9 are needed"):
        read_stranger(path, counts=(9, 6), **SIZE)
    with pytest.raises(UserError, match="frames is 7; it must be 6 or 9"):
        read_stranger(path, counts=(9, 6), frames=7, **SIZE)


def bomb(path, side, *, rows=None):
    """A PNG that says it has side x side pixels, black ones, in a few bytes per thousand of them."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 + side // 8)) for _ in range(rows or side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b""))


@pytest.mark.slow
def test_what_takes_too_much_is_given_up(tmp_path):
    path = tmp_path / "upload"
    bomb(path, 12000)  # 144 megapixels, which would be read
    with pytest.raises(
        UserError, match=r"^upload could not be read within 20 s and 0\.5 GiB of memory; give a smaller"
    ):
        read_stranger(path, counts=(1,), memory=2**29, **SIZE)
    with pytest.raises(UserError, match=r"^upload could not be read within 1 s"):
        read_stranger(path, counts=(1,), seconds=1, **SIZE)


def test_a_picture_of_too_many_pixels(tmp_path):
    path = tmp_path / "upload"
    bomb(path, 64000, rows=1)
    with pytest.raises(UserError, match=r"picture upload has 4096 megapixels, more than the 179 that are read"):
        read_stranger(path, counts=(1,), **SIZE)
