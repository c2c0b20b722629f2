"""Folders of captioned clips: everything is taken, or named."""

import os

import pytest

from monarchrt.models.errors import UserError
from monarchrt.models.generate.encode import captioned
from monarchrt.models.media.clips import PICTURES, VIDEOS


def names(folder, **options):
    return [path.name for path in captioned(folder, **options)]


def put(folder, *files, caption="a cat"):
    for name in files:
        (folder / name).write_text(caption if name.lower().endswith(".txt") else "")


@pytest.mark.parametrize("ending", VIDEOS + PICTURES)
def test_endings(tmp_path, ending):
    put(tmp_path, f"a{ending}", "a.txt", f"b{ending.upper()}", "b.TXT")
    assert captioned(tmp_path) == {tmp_path / f"a{ending}": "a cat", tmp_path / f"b{ending.upper()}": "a cat"}


@pytest.mark.parametrize("name", ["b.exr", "b.mp4x", "b.zip", "b.mp4.part", "b.mp4.crdownload", "b.safetensors"])
def test_a_caption_of_something_else_is_named(tmp_path, name):
    put(tmp_path, "a.mp4", "a.txt", name, "b.txt")
    with pytest.raises(UserError, match=rf"b\.txt has no clip; {name} is (none that is read|an unfinished download)"):
        captioned(tmp_path)
    said = []
    assert names(tmp_path, skip=said.append) == ["a.mp4"]
    assert len(said) == 1


def test_a_caption_alone(tmp_path):
    put(tmp_path, "a.mp4", "a.txt", "b.txt")
    with pytest.raises(UserError, match=r"b\.txt has no clip; put b\.mp4 there"):
        captioned(tmp_path)
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(UserError, match=r"b\.mp4 is a folder"):
        captioned(tmp_path)


def test_litter_is_no_clip(tmp_path):
    put(tmp_path, "a.mp4", "a.txt", "._a.mp4", "._a.txt", ".DS_Store", "Thumbs.db", "desktop.ini", "~$a.txt", ".b.mp4")
    put(tmp_path, "c.mp4.part", "c.mp4.crdownload")
    assert names(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("other", ["a.mov", "a.MP4", "a.jpg"])
def test_two_clips_of_one_name(tmp_path, other):
    put(tmp_path, "a.mp4", other, "a.txt")
    with pytest.raises(UserError, match=r"two videos named a, .* and .*; their results would be one file"):
        captioned(tmp_path)


def test_two_captions(tmp_path):
    put(tmp_path, "a.mp4", "a.txt", "a.TXT")
    with pytest.raises(UserError, match=r"two captions, a\.TXT and a\.txt"):
        captioned(tmp_path)


def test_accents_of_a_mac(tmp_path):
    """One has é as one letter, the other as two."""
    put(tmp_path, "caf\u00e9.mp4", "cafe\u0301.txt", "b.c.mp4", "b.c.txt")
    assert names(tmp_path) == ["b.c.mp4", "caf\u00e9.mp4"]


@pytest.mark.parametrize(
    "content",
    [
        "eine Kätzin\nspielt".encode(),
        "eine Kätzin\r\nspielt\r\n".encode(),
        "eine Kätzin\rspielt".encode(),
        "\ufeff eine Kätzin\nspielt \n\n".encode(),
        "\ufeffeine Kätzin\r\nspielt".encode("utf-16-le"),
        "\ufeffeine Kätzin\nspielt".encode("utf-16-be"),
        "\ufeffeine Kätzin\nspielt".encode("utf-32-le"),
        "\ufeffeine Kätzin\nspielt".encode("utf-32-be"),
    ],
)
def test_encodings(tmp_path, content):
    put(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_bytes(content)
    assert list(captioned(tmp_path).values()) == ["eine Kätzin\nspielt"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("eine Kätzin".encode("latin-1"), r"not UTF-8 \(byte 7 is 0xe4\), probably cp1252; .*iconv -f CP1252 -t"),
        ("一只猫在墙上".encode("gb18030"), "a.txt is not UTF-8 .*, probably gb18030 or .*; save it as UTF-8"),
        (b"", r"a\.txt is empty; write what a\.mp4 shows"),
        ("\ufeff \r\n".encode(), r"a\.txt is empty"),
        ("\ufeff".encode("utf-16-le"), r"a\.txt is empty"),
        ("a cat".encode("utf-16-le"), "probably utf-16-le; .*iconv -f UTF-16LE"),  # without its mark
        ("a cat".encode("utf-16-be"), "probably utf-16-be; "),
        ("\ufeffa cat".encode("utf-16-le")[:-1], r"is not UTF-16-LE \(ends within a character\); save it as UTF-8"),
        (b"\0\5\26\7\0\2\0\0", r"not UTF-8 \(it has bytes of 0\); save"),
        (b"{\\rtf1\\ansi a cat}", "not plain text"),
    ],
)
def test_what_is_no_caption(tmp_path, content, message):
    put(tmp_path, "a.mp4", "b.mp4", "b.txt")
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        captioned(tmp_path)
    assert names(tmp_path, skip=lambda _: None) == ["b.mp4"]


def test_a_link_to_nothing_is_not_passed_over(tmp_path):
    put(tmp_path, "a.txt")
    os.symlink(tmp_path / "nowhere", tmp_path / "a.mp4")
    assert names(tmp_path) == ["a.mp4"]


def test_clips_in_a_folder_below(tmp_path):
    (tmp_path / "day 1").mkdir()
    put(tmp_path / "day 1", "a.mp4", "a.txt")
    with pytest.raises(UserError, match=r"has no videos .*day 1 has; give that"):
        captioned(tmp_path)
