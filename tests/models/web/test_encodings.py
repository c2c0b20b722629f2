"""Ways in which frames go out: decoded again, they are the frames, at their time."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from monarchrt.models.web.encodings import ENCODINGS, fragment, jpeg

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200], [220, 220, 40]], np.uint8)


def frames(first=0, count=4):
    return np.broadcast_to(COLOURS[(first + np.arange(count)) % 4, None, None], (count, 32, 48, 3))


def decoded(data):
    """Times and mean colours."""
    with av.open(io.BytesIO(data), "r") as container:
        found = [(frame.time, frame.to_ndarray(format="rgb24").mean((0, 1))) for frame in container.decode(video=0)]
    return [time for time, _ in found], np.array([colour for _, colour in found])


def boxes(data):
    names, at = [], 0
    while at < len(data):
        names.append(data[at + 4 : at + 8].decode())
        at += int.from_bytes(data[at : at + 4], "big")
    return names


def test_a_jpeg():
    picture = np.asarray(Image.open(io.BytesIO(jpeg(frames()[1]))))
    assert np.abs(picture.astype(int) - COLOURS[1]).max() < 12
    assert ENCODINGS["jpeg"].encode(frames()[1:2], 5, 16.0) == jpeg(frames()[1])


@pytest.mark.parametrize("fps", [8.0, 16.0, 30.0, 24000 / 1001])
def test_a_piece_stands_alone_and_knows_its_time(fps):
    piece = fragment(frames(8), 8, fps)
    assert boxes(piece) == ["ftyp", "moov", "moof", "mdat"]
    times, colours = decoded(piece)
    np.testing.assert_allclose(times, (8 + np.arange(4)) / fps, atol=1e-3)
    assert np.abs(colours - COLOURS).max() < 16


def test_pieces_are_one_video_also_if_some_are_missing():
    pieces = [fragment(frames(n, 3), n, 8.0) for n in (0, 3, 6, 9)]
    headers = {piece[: piece.index(b"moof")] for piece in pieces}
    assert len(headers) == 1
    times, colours = decoded(b"".join(pieces))
    np.testing.assert_allclose(times, np.arange(12) / 8)
    assert np.abs(colours - COLOURS[np.arange(12) % 4]).max() < 16
    times, _ = decoded(pieces[0] + pieces[2] + pieces[3])
    np.testing.assert_allclose(times, [0, 1 / 8, 2 / 8, *np.arange(6, 12) / 8])


def test_what_a_browser_is_told():
    mime = ENCODINGS["mp4"].mime(32, 48, 16.0)
    piece = fragment(frames(), 0, 16.0)
    record = piece.index(b"avcC") + 4  # version, then profile, constraints and level: ISO 14496-15, 5.3.3.1
    assert mime == f'video/mp4; codecs="avc1.{piece[record + 1 : record + 4].hex()}"'
    assert ENCODINGS["mp4"].mime(33, 48, 16.0) is None
    assert ENCODINGS["jpeg"].mime(33, 48, 16.0) == "image/jpeg"
