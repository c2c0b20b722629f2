import numpy as np
import pytest
from PIL import Image

from monarchrt.models.errors import UserError
from monarchrt.models.media.video import read_clip, side_by_side, write_mp4
from tests.clips import make_audio, make_clip


def test_reads_what_was_written(tmp_path):
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    for index in range(5):
        frames[index, :, 8 * index : 8 * index + 16] = (250, 128, 20)
    path = write_mp4(tmp_path / "new" / "clip.mp4", frames, quality=4)
    again = read_clip(path, height=32, width=48)
    assert again.shape == frames.shape
    assert again.dtype == np.uint8
    assert np.abs(again.astype(int) - frames).mean() < 6
    assert not list(path.parent.glob("*.part"))


def test_odd_sizes_are_padded_to_even(tmp_path):
    path = write_mp4(tmp_path / "odd.mp4", np.full((2, 31, 45, 3), 200, np.uint8))
    assert abs(int(read_clip(path, height=32, width=46)[0, -1, -1, 0]) - 200) < 6


def test_covers_and_crops_in_the_middle(tmp_path):
    wide = np.zeros((2, 32, 96, 3), np.uint8)
    wide[:, :, 32:64] = 255  # the middle third
    path = write_mp4(tmp_path / "wide.mp4", wide, quality=4)
    square = read_clip(path, height=32, width=32)
    assert square[:, 4:-4, 4:-4].mean() > 240


@pytest.mark.parametrize(("orientation", "red"), [(1, "left"), (3, "right"), (6, "top"), (8, "bottom")])
def test_pictures_are_upright(tmp_path, orientation, red):
    """As a camera was held: EXIF's orientation."""
    picture, exif = Image.new("RGB", (64, 48)), Image.Exif()
    picture.paste((250, 0, 0), (0, 0, 32, 48))
    exif[0x112] = orientation
    picture.save(tmp_path / "a.jpg", exif=exif, quality=95)
    height, width = (64, 48) if red in ("top", "bottom") else (48, 64)
    upright = read_clip(tmp_path / "a.jpg", height=height, width=width)[0, ..., 0].astype(int)
    halves = {
        "left": upright[:, : width // 2 - 4],
        "right": upright[:, width // 2 + 4 :],
        "top": upright[: height // 2 - 4],
        "bottom": upright[height // 2 + 4 :],
    }
    opposite = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[red]
    assert halves[red].min() > 200
    assert halves[opposite].max() < 60


def test_stride_and_limit(clip):
    every, third = read_clip(clip, height=16, width=32), read_clip(clip, height=16, width=32, stride=3)
    assert len(every) == 24
    np.testing.assert_array_equal(third, every[::3])
    assert len(read_clip(clip, height=16, width=32, max_frames=5)) == 5


def test_a_clip_with_sound_is_fine(tmp_path):
    assert len(read_clip(make_clip(tmp_path / "sound.mp4", audio=True), height=16, width=16)) == 24


def _failure(path, **options) -> str:
    with pytest.raises(UserError) as caught:
        read_clip(path, height=16, width=32, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_missing_empty_folder_text_and_audio(tmp_path):
    assert "does not exist" in _failure(tmp_path / "missing.mp4")
    assert "not a file" in _failure(tmp_path)
    (tmp_path / "empty.mp4").touch()
    assert "is empty" in _failure(tmp_path / "empty.mp4")
    (tmp_path / "text.mp4").write_text("this is not a video\n" * 99)
    assert "not a video" in _failure(tmp_path / "text.mp4")
    assert "no video track, only audio" in _failure(make_audio(tmp_path / "sound.m4a"))


def test_too_short(clip):
    assert "24 frames at stride 1, but at least 25 are needed" in _failure(clip, min_frames=25)
    assert "12 frames at stride 2" in _failure(clip, min_frames=13, stride=2)


@pytest.mark.parametrize("layout", ["index last", "index first"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.8, 0.95])
def test_cut_off_anywhere(tmp_path, layout, kept):
    options = {"movflags": "faststart"} if layout == "index first" else {}
    whole = make_clip(tmp_path / "whole.mp4", options=options)
    content = whole.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: int(len(content) * kept)])
    assert "cut off" in _failure(path)


def test_side_by_side_keeps_each_clip():
    left, right = np.full((2, 10, 30, 3), 10, np.uint8), np.full((2, 10, 30, 3), 90, np.uint8)
    both = side_by_side([left, right], labels=["a", "b"], zoom=2, margin=3)
    assert both.shape == (2, 18 + 20, 60 + 3 + 60, 3)
    assert (both[:, 18:, :60] == 10).all()
    assert (both[:, 18:, 63:] == 90).all()
    assert both[:, :18].min() < 128 < both[:, :18].max()  # dark text on white
    with pytest.raises(UserError, match="one shape"):
        side_by_side([left, right[:, :5]])
    with pytest.raises(UserError, match="1 entries for 2 clips"):
        side_by_side([left, right], labels=["a"])


def test_writing_no_frames(tmp_path):
    with pytest.raises(UserError, match="at least 1 frame"):
        write_mp4(tmp_path / "none.mp4", np.zeros((0, 8, 8, 3), np.uint8))
    assert not list(tmp_path.iterdir())
