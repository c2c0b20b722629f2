"""Videos are read as a person sees them: shape, orientation, colours, times; or refused by name."""

import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from av.sidedata.sidedata import Type as SideData
from PIL import Image

from monarchrt.models.errors import UserError
from monarchrt.models.media.colour import HLG, PQ, Colours, to_ordinary
from monarchrt.models.media.decoding import orientation_of
from monarchrt.models.media.frames import Orientation
from monarchrt.models.media.video import read_clip
from tests.clips import encode_video, make_clip, order, quarters


def test_pixels_that_are_not_square(tmp_path):
    """Television of 16:9 in 360 x 288: a disc stays round."""
    y, x = np.mgrid[:288, :360]
    disc = np.hypot((x - 179.5) * 64 / 45, y - 143.5) < 100
    path = encode_video(
        tmp_path / "pal.mp4",
        [np.repeat(disc[..., None] * np.uint8(255), 3, 2)] * 2,
        prepare=lambda stream: setattr(stream.codec_context, "sample_aspect_ratio", Fraction(64, 45)),
    )
    seen = read_clip(path, height=288, width=512, max_frames=1)[0, ..., 0] > 128
    assert abs(np.ptp(np.flatnonzero(seen.any(1))) + 1 - 200) <= 3
    assert abs(np.ptp(np.flatnonzero(seen.any(0))) + 1 - 200) <= 3


@pytest.mark.parametrize(
    ("degrees", "seen"), [(0, "RGBW"), (90, "GWRB"), (180, "WBGR"), (-90, "BRWG"), (-180, "WBGR"), (270, "BRWG")]
)
def test_a_phone_held_any_way(tmp_path, degrees, seen):
    """Counterclockwise, as FFmpeg counts."""
    path = encode_video(
        tmp_path / "a.mp4", [quarters()] * 2, prepare=lambda stream: stream.set_display_rotation(degrees)
    )
    height, width = (128, 96) if degrees % 180 else (96, 128)
    assert order(read_clip(path, height=height, width=width)[0]) == seen


@pytest.mark.parametrize("aspect", [2, Fraction(1, 2)])
def test_turned_and_not_square(tmp_path, aspect):
    def prepare(stream):
        stream.set_display_rotation(90)
        stream.codec_context.sample_aspect_ratio = aspect

    path = encode_video(tmp_path / "a.mp4", [quarters(height=96, width=96)] * 2, prepare=prepare)
    height, width = (192, 96) if aspect == 2 else (96, 192)
    picture = read_clip(path, height=height, width=width)[0]  # the shape fits: nothing is cut off
    assert order(picture) == "GWRB"
    assert picture[1, 1, 1] > 200 > 60 > picture[1, 1, 0]


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), "RGBW"),
        ((-1, 0, 0, 1), "GRWB"),  # a front camera
        ((1, 0, 0, -1), "BWRG"),
        ((0, 1, -1, 0), "BRWG"),
        ((0, -1, 1, 0), "GWRB"),
        ((0, 1, 1, 0), "RBGW"),
        ((0, -1, -1, 0), "WGBR"),
        ((-1, 0, 0, -1), "WBGR"),
    ],
)
def test_display_matrices(tmp_path, matrix, expected):
    """Also mirrored ones, which no angle tells."""

    class Frame:
        a, b, c, d = (65536 * number for number in matrix)
        side_data = {SideData.DISPLAYMATRIX: struct.pack("<9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)}  # noqa: RUF012

    assert order(orientation_of(Frame, tmp_path).apply(quarters())) == expected
    Frame.side_data = {SideData.DISPLAYMATRIX: struct.pack("<9i", 50000, 42000, 0, -42000, 50000, 0, 0, 0, 1 << 30)}
    with pytest.raises(UserError, match="rotation that is not supported"):
        orientation_of(Frame, tmp_path)
    Frame.side_data = {}
    assert orientation_of(Frame, tmp_path) == Orientation()


NAMES = [
    "take:1.mp4",
    "-x.mp4",
    "pipe:0",
    "file:a.mp4",
    "a%03d.mp4",
    "concat:a|b.mp4",
    "http:x",
    "猫 é.MP4",
    "no ending",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_that_mean_something_to_ffmpeg(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.rename(encode_video(tmp_path / "plain.mp4", [quarters()] * 3), name)
    assert len(read_clip(name, height=32, width=32)) == 3


def test_a_playlist_reads_no_other_file(tmp_path):
    make_clip(tmp_path / "clip.mp4")
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:10", "#EXTINF:10,", "clip.mp4", "#EXT-X-ENDLIST"]
    (tmp_path / "list.m3u8").write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"list\.m3u8 is "):
        read_clip(tmp_path / "list.m3u8", height=32, width=32)


def yuv(values, pix, *, matrix=2, transfer=2, primaries=2, colour_range=0, size=64):
    """A frame of one colour, given as it is stored."""
    frame = av.VideoFrame(size, 64, pix)
    kind = np.uint16 if "10" in pix else np.uint8
    for plane, value in zip(frame.planes, values, strict=True):
        plane.update(np.full(plane.buffer_size // kind().itemsize, value, kind).tobytes())
    frame.colorspace, frame.color_trc, frame.color_primaries = matrix, transfer, primaries
    frame.color_range = colour_range
    return frame


def coloured(path, values, *, pix="yuv420p", codec="libx264", size=64, **tags):
    def prepare(stream):
        context = stream.codec_context
        context.colorspace, context.color_trc = tags.get("matrix", 2), tags.get("transfer", 2)
        context.color_primaries, context.color_range = tags.get("primaries", 2), tags.get("colour_range", 1)

    frames = [yuv(values, pix, size=size, **tags) for _ in range(2)]
    return encode_video(path, frames, pix=pix, codec=codec, prepare=prepare, size=(64, size))


def colour(path):
    return read_clip(path, height=32, width=32)[0].reshape(-1, 3).mean(0)


@pytest.mark.parametrize(("name", "transfer", "signal"), [("pq", PQ, 0.58), ("hlg", HLG, 0.75)])
def test_hdr_paper_white_is_white(tmp_path, name, transfer, signal):
    """203 cd/m2, ITU-R BT.2408; twice as bright is brighter still, and black is black."""

    def level(signal):
        values = (round(64 + 876 * signal), 512, 512)
        path = tmp_path / f"{name}{signal}.mp4"
        coloured(path, values, pix="yuv420p10le", codec="libx265", matrix=9, transfer=transfer, primaries=9)
        return colour(path).mean()

    white = level(signal)
    assert 225 <= white <= 250
    assert white < level(signal + 0.1) <= 255
    assert level(0) < 2


def test_hdr_curves():
    """Against ITU-R BT.2100's formulas as numbers: 26 cd/m2 of grey are 12.8% of paper white."""
    for transfer, code in ((PQ, 0.3804), (HLG, 0.3792)):
        grey = to_ordinary(np.full((1, 1, 3), code, np.float32), Colours(transfer=transfer, primaries=9))
        assert abs(int(grey[0, 0, 0]) - round(255 * (26.1 / 203) ** (1 / 2.2))) <= 2


def test_wide_gamuts():
    """White and grey stay; a BT.709 red that was written in BT.2020 or P3 comes back."""
    for primaries, red in ((9, (0.6274, 0.0691, 0.0164)), (12, (0.8225, 0.0332, 0.0171))):
        colours = Colours(transfer=14, primaries=primaries)
        for value in (0.0, 0.5, 1.0):
            grey = to_ordinary(np.full((1, 1, 3), value, np.float32), colours)
            assert np.abs(grey.astype(int) - round(255 * value)).max() <= 1
        seen = to_ordinary((np.array([[red]]) ** (1 / 2.2)).astype(np.float32), colours)[0, 0].astype(int)
        assert seen[0] >= 253
        assert seen[1:].max() <= 14


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"matrix": 9, "primaries": 9}, "BT.2020 colours that do not say whether they are HDR"),
        ({"matrix": 10, "primaries": 9, "transfer": 14}, "colour matrix, number 10"),
        ({"matrix": 14, "primaries": 9, "transfer": PQ}, "colour matrix, number 14"),
        ({"matrix": 8}, "colour matrix, number 8"),
        ({"matrix": 1, "primaries": 1, "transfer": 8}, "transfer characteristics 8"),
        ({"matrix": 1, "primaries": 1, "transfer": 9}, "transfer characteristics 9"),
        ({"matrix": 1, "primaries": 10, "transfer": 1}, "primaries 10"),
    ],
)
def test_colours_that_are_refused(tmp_path, tags, message):
    path = coloured(tmp_path / "a.mp4", (500, 400, 600), pix="yuv420p10le", codec="libx265", **tags)
    with pytest.raises(UserError, match=message) as caught:
        colour(path)
    assert "a.mp4" in str(caught.value)


# red of 200 and the rest 40, as ITU-R BT.601 and BT.709 encode it
RED_601, RED_709 = (91, 104, 198), (80, 112, 198)


@pytest.mark.parametrize(
    ("values", "tags"),
    [
        (RED_601, {"matrix": 5}),
        (RED_601, {"matrix": 6}),
        (RED_601, {}),  # small and untagged: as players show it
        (RED_709, {"matrix": 1}),
        (RED_709, {"size": 1280}),  # high definition and untagged
        (RED_601, {"matrix": 5, "size": 1280}),
    ],
)
def test_colour_matrices(tmp_path, values, tags):
    path = coloured(tmp_path / "a.mp4", values, **tags)
    assert np.abs(colour(path) - (200, 40, 40)).max() <= 4


@pytest.mark.parametrize(("luma", "colour_range", "pix"), [(235, 1, "yuv420p"), (255, 2, "yuv420p")])
def test_full_and_limited_range(tmp_path, luma, colour_range, pix):
    path = coloured(tmp_path / "a.mp4", (luma, 128, 128), pix=pix, matrix=1, colour_range=colour_range)
    assert colour(path).min() >= 253
    path = coloured(tmp_path / "b.mp4", (100, 128, 128), pix=pix, matrix=1, colour_range=colour_range)
    assert abs(colour(path).mean() - (100 if colour_range == 2 else (100 - 16) * 255 / 219)) <= 2


def numbered(count):
    """Frame k has the brightness 3 k."""
    return [np.full((32, 32, 3), 3 * index, np.uint8) for index in range(count)]


def numbers(path, **options):
    return [round(float(frame.mean()) / 3) for frame in read_clip(path, height=32, width=32, **options)]


class TestRates:
    @pytest.mark.parametrize("rate", [8, 15, 16, 24, 25, Fraction(30000, 1001), 30, 50, 60])
    @pytest.mark.parametrize("ending", ["mp4", "mkv"])
    def test_what_is_seen_at_each_time(self, tmp_path, rate, ending):
        if (rate, ending) == (Fraction(30000, 1001), "mkv"):
            pytest.skip("frame 45 appears 1.5 ms late, and Matroska rounds to 1 ms")
        path = encode_video(tmp_path / f"a.{ending}", numbered(48), rate=rate)
        expected = [int((k / 16 + 1.5e-3) * rate) for k in range(100)]
        expected = [frame for frame in expected if frame < 48]
        assert numbers(path, fps=16) == expected
        assert numbers(path) == list(range(48))

    def test_a_rate_that_varies(self, tmp_path):
        times = [0, 40, 80, 120, 620, 660, 1000, 1500, 1501, 1502]
        path = encode_video(tmp_path / "a.mkv", numbered(len(times)), times=times)
        shown = numbers(path, fps=10)
        at = [k * 100 for k in range(len(shown))]
        assert shown == [max(n for n, time in enumerate(times) if time <= t + 1.5) for t in at]
        assert len(shown) == 16

    def test_it_begins_with_the_first_frame(self, tmp_path):
        path = encode_video(tmp_path / "a.mkv", numbered(4), times=[5000, 5100, 5200, 5300])
        assert numbers(path, fps=10) == [0, 1, 2, 3]

    def test_stride_counts_among_them(self, tmp_path):
        path = encode_video(tmp_path / "a.mp4", numbered(24), rate=24)
        assert numbers(path, fps=12, stride=2) == [0, 4, 8, 12, 16, 20]
        assert numbers(path, fps=12, stride=2, max_frames=3) == [0, 4, 8]
        with pytest.raises(UserError, match="12 frames at 12 frames per second and stride 1, but at least 13"):
            read_clip(path, height=32, width=32, fps=12, min_frames=13)

    def test_no_timestamps(self, tmp_path):
        path = encode_video(tmp_path / "a.h264", numbered(4))
        assert len(read_clip(path, height=32, width=32)) == 4

    @pytest.mark.parametrize("fps", [-1, float("nan"), float("inf"), 1e9])
    def test_what_is_no_rate(self, tmp_path, fps):
        with pytest.raises(UserError, match="fps is"):
            read_clip(encode_video(tmp_path / "a.mp4", numbered(2)), height=32, width=32, fps=fps)

    def test_a_hole(self, tmp_path):
        path = encode_video(tmp_path / "a.mkv", numbered(2), times=[0, 10**8])
        with pytest.raises(UserError, match="gap of 100000 seconds"):
            read_clip(path, height=32, width=32, fps=16)


def test_fields_become_whole_frames(tmp_path):
    """A bar that jumps between the two fields of a frame is no comb."""
    frames = []
    for index in range(6):
        top, bottom = np.zeros((96, 128, 3), np.uint8), np.zeros((96, 128, 3), np.uint8)
        top[:, 16 * index : 16 * index + 16], bottom[:, 16 * index + 8 : 16 * index + 24] = 255, 255
        woven = top.copy()
        woven[1::2] = bottom[1::2]
        frames.append(woven)

    def prepare(stream):
        stream.options = {"crf": "4", "flags": "+ildct+ilme", "x264-params": "tff=1"}

    path = encode_video(tmp_path / "a.mp4", frames, pix="yuv422p", prepare=prepare)
    with av.open(str(path)) as container:
        assert all(frame.interlaced_frame for frame in container.decode(video=0))
    seen = read_clip(path, height=96, width=128)
    assert len(seen) == 6
    combs = np.abs(np.diff(seen[1:5, ::1, :, 0].astype(int), axis=1)).mean()
    assert combs < 0.35 * np.abs(np.diff(np.stack(frames)[1:5, ..., 0].astype(int), axis=1)).mean()


def test_transparent_parts_are_white(tmp_path):
    """Hidden red under the transparent half shows neither there nor at the edge."""
    picture = np.zeros((96, 128, 4), np.uint8)
    picture[:, :64], picture[:, 64:] = (255, 0, 0, 0), (0, 0, 255, 255)
    path = encode_video(tmp_path / "a.mov", [picture] * 2, codec="qtrle", pix="argb")
    seen = read_clip(path, height=48, width=64)[0]
    assert (seen[:, :31] == 255).all()
    assert (seen[:, 33:] == (0, 0, 255)).all()
    assert seen[:, 31:33, 1].min() == seen[:, 31:33, 0].min()  # between white and blue


def test_webm_with_transparency_is_refused(tmp_path):
    def prepare(stream):
        stream.metadata["alpha_mode"] = "1"

    path = encode_video(tmp_path / "a.webm", [quarters()] * 2, codec="libvpx-vp9", prepare=prepare)
    with pytest.raises(UserError, match="transparency, which is not supported"):
        read_clip(path, height=32, width=32)


@pytest.mark.parametrize("kind", ["video", "picture", "turned"])
def test_scaling_averages(tmp_path, kind):
    """A chess board of single pixels, at half the size, is grey; at a third, its squares of nine nearly are."""
    board = (255 * (np.indices((96, 144)).sum(0) % 2)).astype(np.uint8)
    board = np.repeat(board[..., None], 3, 2)
    if kind == "picture":
        path = tmp_path / "a.png"
        Image.fromarray(board).save(path)
    else:
        turn = (lambda stream: stream.set_display_rotation(180)) if kind == "turned" else None
        name, codec, pix = ("a.mov", "qtrle", "rgb24") if turn else ("a.mkv", "ffv1", "bgr0")
        path = encode_video(tmp_path / name, [board] * 2, codec=codec, pix=pix, prepare=turn)
    half, third = (read_clip(path, height=96 // n, width=144 // n)[0].astype(int) for n in (2, 3))
    assert np.abs(half - 127.5).max() <= 2
    assert np.abs(third - 127.5).max() <= 255 / 18 + 3


@pytest.mark.parametrize("ending", ["mp4", "mov", "mkv", "webm", "avi", "wmv", "ts", "m2ts"])
@pytest.mark.parametrize("kept", [0.3, 0.7, 0.97])
def test_cut_off_downloads(tmp_path, ending, kept):
    codec = {"webm": "libvpx-vp9", "wmv": "wmv2"}.get(ending, "libx264")
    rng = np.random.default_rng(0)
    whole = encode_video(
        tmp_path / f"whole.{ending}", list(rng.integers(0, 255, (12, 64, 64, 3), np.uint8)), codec=codec
    )
    assert len(read_clip(whole, height=32, width=32)) == 12
    content = whole.read_bytes()
    cut = tmp_path / f"cut.{ending}"
    cut.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=r"cut\.\w+ is cut off"):
        read_clip(cut, height=32, width=32)


def test_a_fragmented_mp4_that_is_cut_off(tmp_path):
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    whole = make_clip(tmp_path / "whole.mp4", options=options)
    assert len(read_clip(whole, height=16, width=32)) == 24
    (tmp_path / "cut.mp4").write_bytes(whole.read_bytes()[:-2000])
    with pytest.raises(UserError, match="is cut off: "):
        read_clip(tmp_path / "cut.mp4", height=16, width=32)


@pytest.mark.parametrize(("height", "width", "message"), [(10**6, 32, "height is 1000000"), (32, 0, "width is 0")])
def test_sizes_that_are_none_do_not_blame_the_clip(clip, height, width, message):
    with pytest.raises(UserError, match=message) as caught:
        read_clip(clip, height=height, width=width)
    assert str(clip) not in str(caught.value)


def test_a_preview_in_another_file_is_no_video(tmp_path):
    """FFmpeg finds a JPEG, or a stream without a container, anywhere in a file: a raw photo, a document."""
    Image.fromarray(quarters()).save(tmp_path / "a.jpg", quality=95)
    picture = (tmp_path / "a.jpg").read_bytes()
    bare = encode_video(tmp_path / "a.h264", [quarters()] * 3).read_bytes()
    assert order(read_clip(tmp_path / "a.h264", height=96, width=128)[0]) == "RGBW"
    (tmp_path / "a.mjpg").write_bytes(2 * picture)
    assert order(read_clip(tmp_path / "a.mjpg", height=96, width=128)[0]) == "RGBW"
    heads = {"raf": b"FUJIFILMCCD-RAW 0201", "pdf": b"%PDF-1.4\n", "docx": b"PK\3\4", "bin": b"junk"}
    for ending, head in heads.items():
        for inside in (picture, bare):
            path = tmp_path / f"b.{ending}"
            path.write_bytes(head + bytes(120) + inside + bytes(3000))
            with pytest.raises(UserError, match=r"is not a video, but has pictures somewhere|damaged or not a video"):
                read_clip(path, height=96, width=128)
