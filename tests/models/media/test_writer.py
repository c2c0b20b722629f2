import errno
import os
import re
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace

from monarchrt.models.errors import DiskFullError, UserError
from monarchrt.models.files import unfinished
from monarchrt.models.media.metrics import fidelity
from monarchrt.models.media.video import read_clip, write_mp4
from monarchrt.models.media.writer import Mp4Writer, check_folder, check_writable, open_writer, read_settings

FRAMES = np.random.default_rng(0).integers(0, 255, (4, 32, 48, 3), np.uint8)


class TestWriter:
    def test_settings_come_back(self, tmp_path):
        settings = {"prompt": "色 \"quoted\" 'x' = ; #\n", "seed": 3, "tile": [1, 2, 3], "steps": None}
        path = tmp_path / "new" / "clip.mp4"
        with Mp4Writer(path, fps=16.0, settings=settings, title="a title") as writer:
            writer.write(FRAMES[:1])
            writer.write(FRAMES[1:])
        assert read_settings(path) == settings
        assert read_clip(path, height=32, width=48).shape == FRAMES.shape
        with av.open(str(path)) as container:
            assert container.metadata["title"] == "a title"
            assert container.streams.video[0].codec_context.colorspace == Colorspace.ITU601
            assert container.streams.video[0].average_rate == 16

    def test_what_is_no_settings(self, tmp_path):
        with av.open(str(tmp_path / "a.mp4"), "w") as container:
            container.metadata["comment"] = '{"monarchrt": ["not", "by", "name"]}'
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height = 48, 32
            container.mux(stream.encode(av.VideoFrame.from_ndarray(FRAMES[0], format="rgb24")))
            container.mux(stream.encode())
        with pytest.raises(UserError, match="holds no settings"):
            read_settings(tmp_path / "a.mp4")

    def test_ctrl_c_keeps_the_frames_so_far(self, tmp_path):
        path = tmp_path / "clip.mp4"

        def stopped():
            with Mp4Writer(path, fps=8.0) as writer:
                writer.write(FRAMES[:3])
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stopped()
        assert len(read_clip(path, height=32, width=48)) == 3
        assert os.listdir(tmp_path) == ["clip.mp4"]

    def test_without_frames_there_is_no_file(self, tmp_path):
        with Mp4Writer(tmp_path / "clip.mp4", fps=8.0):
            pass
        assert os.listdir(tmp_path) == []

    def test_a_full_disk_leaves_nothing(self, tmp_path, monkeypatch):
        """FFmpeg says so when a frame is written and again when the file is closed."""

        class Full:
            metadata: ClassVar = {}

            def fail(self, *_):
                raise OSError(errno.ENOSPC, "No space left on device")

            mux = close = fail

        out = tmp_path / "a.mp4"
        writer = Mp4Writer(out)
        unfinished(out).write_bytes(b"begun")
        monkeypatch.setattr(writer, "_open", lambda *_: Full())
        writer._stream = SimpleNamespace(encode=lambda *_: [])
        with pytest.raises(DiskFullError, match=r"cannot write .*a\.mp4: the disk is full; free some space$"), writer:
            writer.write(np.zeros((1, 16, 16, 3), np.uint8))
        assert not list(tmp_path.iterdir())

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
    def test_a_disk_that_is_full_from_the_first_byte_on(self, tmp_path, name):
        """In a process of its own: FFmpeg crashed, where its header could not be written."""
        program = (
            "import contextlib, sys; from pathlib import Path; import numpy as np\n"
            "from monarchrt.models.media import writer\n"
            "writer.growing = lambda path: contextlib.nullcontext(Path('/dev/full'))\n"
            "rng = np.random.default_rng(0)\n"
            "with writer.open_writer(Path(sys.argv[1])) as video:\n"
            "    for _ in range(8): video.write(rng.integers(0, 255, (3, 64, 64, 3), np.uint8))\n"
        )
        done = subprocess.run([sys.executable, "-c", program, tmp_path / name], capture_output=True, text=True)
        assert done.returncode == 1, done
        assert re.search(
            r"DiskFullError: cannot write .*a\.m..: the disk is full; free some space$", done.stderr.strip()
        )
        assert not list(tmp_path.iterdir())

    def test_nothing_under_the_name_before_it_is_complete(self, tmp_path):
        path = tmp_path / "clip.mp4"
        with Mp4Writer(path) as writer:
            writer.write(FRAMES)
            assert not path.exists()
        assert path.exists()

    def test_a_file_that_has_appeared_meanwhile_stays(self, tmp_path):
        """Both videos are kept, whole."""
        path = tmp_path / "clip.mp4"

        def write(overwrite):
            with Mp4Writer(path, overwrite=overwrite) as writer:
                writer.write(FRAMES)
                path.write_bytes(b"another's")

        with pytest.raises(UserError, match=rf"clip-{os.getpid()}\.mp4$"):
            write(overwrite=False)
        assert path.read_bytes() == b"another's"
        assert sorted(os.listdir(tmp_path)) == [f"clip-{os.getpid()}.mp4", "clip.mp4"]
        assert len(read_clip(tmp_path / f"clip-{os.getpid()}.mp4", height=32, width=48)) == 4
        write(overwrite=True)
        assert len(read_clip(path, height=32, width=48)) == 4

    def test_settings_of_other_files(self, tmp_path):
        plain = write_mp4(tmp_path / "plain.mp4", FRAMES)
        with pytest.raises(UserError, match="holds no settings"):
            read_settings(plain)
        (tmp_path / "broken.mp4").write_bytes(b"no video")
        with pytest.raises(UserError, match="damaged or not a video"):
            read_settings(tmp_path / "broken.mp4")
        with pytest.raises(
            UserError, match=r"does not exist; give an \.mp4, an \.mkv or a folder of PNG files, made by"
        ):
            read_settings(tmp_path / "nowhere.mkv")

    def test_a_picture_of_more_pixels_than_there_is_memory(self, tmp_path):
        """By its header alone, which is all that is read."""

        def chunk(name, data):
            return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
        path = tmp_path / "large.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b""))
        with pytest.raises(UserError, match="holds no settings"):
            read_settings(path)


class TestNames:
    @pytest.mark.parametrize(
        "name", ["10:30.mp4", "-x.mp4", "pipe:0.mp4", "file:a.mp4", "a%d.mp4", "a?b#c.mp4", "10:30.mkv"]
    )
    def test_any_name_is_written_and_read(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        check_writable(Path(name))
        with open_writer(name, fps=8, settings={"seed": 3}) as writer:
            writer.write(FRAMES)
        assert os.listdir() == [name]
        assert len(read_clip(name, height=32, width=48)) == 4
        assert read_settings(name) == {"seed": 3}

    @pytest.mark.parametrize("name", ["a.avi", "a.webm", "a.png", "a%d%d.png", "a%s.png"])
    def test_what_has_no_writer(self, tmp_path, name):
        with pytest.raises(UserError, match=r"does not end in \.mp4"):
            check_writable(tmp_path / name)
        with pytest.raises(UserError, match=r"does not end in \.mp4"):
            open_writer(tmp_path / name)


KILLED = """
import os, signal, sys
import numpy as np
from monarchrt.models.media.writer import open_writer
writer = open_writer(sys.argv[1])
for _ in range(30):
    writer.write(np.random.default_rng(0).integers(0, 255, (4, 32, 48, 3), np.uint8))
os.kill(os.getpid(), signal.SIGKILL)
"""


class TestKilled:
    @pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
    def test_what_it_left_goes_when_the_file_is_to_be_written_again(self, tmp_path, name):
        process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], check=False)
        assert process.returncode == -signal.SIGKILL
        (left,) = tmp_path.iterdir()
        assert re.fullmatch(rf"{name}\.\d+\.part", left.name)
        check_writable(tmp_path / f"other-{name}")
        assert left.exists()  # another file's
        check_writable(tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_one_that_is_being_written_stays(self, tmp_path, monkeypatch):
        """Also where its process, of another machine or container, has no number here."""
        path, number = tmp_path / "a.mp4", subprocess.Popen([sys.executable, "-c", ""])
        number.wait()
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: number.pid)
            writer = Mp4Writer(path)
            writer.write(FRAMES)
        check_writable(path)
        with Mp4Writer(path) as other:
            other.write(FRAMES)
        assert len(list(tmp_path.glob("*.part"))) == 1
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: number.pid)
            writer.close()
        assert os.listdir(tmp_path) == ["a.mp4"]


class TestSameFile:
    def test_the_same_frames_give_the_same_file(self, tmp_path):
        """On any number of cores: the encoder has one thread, and says so in the file."""
        y, x = np.mgrid[:96, :160]
        clip = np.stack([np.stack([(x + 3 * t) % 256, (y * x // 9 + t) % 256, (y - t) % 256], -1) for t in range(70)])
        files = [write_mp4(tmp_path / f"{n}.mp4", clip.astype(np.uint8)).read_bytes() for n in range(3)]
        assert files[0] == files[1] == files[2]
        assert b" threads=1 " in files[0]


class TestExact:
    NOISE = np.random.default_rng(1).integers(0, 256, (7, 31, 45, 3), np.uint8)  # odd sizes

    def test_matroska(self, tmp_path):
        path = tmp_path / "a.mkv"
        check_writable(path)
        with open_writer(path, fps=12.0, settings={"seed": 3}, title="a cat") as writer:
            writer.write(self.NOISE[:2])
            writer.write(self.NOISE[2:])
        np.testing.assert_array_equal(read_clip(path, height=31, width=45), self.NOISE)
        assert (read_settings(path), writer.frames, os.listdir(tmp_path)) == ({"seed": 3}, 7, ["a.mkv"])
        with pytest.raises(UserError, match="exists already"):
            check_writable(path)
        with open_writer(tmp_path / "b.mkv", fps=12.0, settings={"seed": 3}, title="a cat") as writer:
            writer.write(self.NOISE)
        assert (tmp_path / "b.mkv").read_bytes() == path.read_bytes()

    @pytest.mark.parametrize(("name", "files"), [("frames", "frames/{:05d}.png"), ("x/f:%03d.png", "x/f:{:03d}.png")])
    def test_png(self, tmp_path, name, files):
        check_writable(tmp_path / name)
        with open_writer(tmp_path / name, settings={"seed": 3}) as writer:
            writer.write(self.NOISE[:2])
            writer.write(self.NOISE[2:])
        for index, frame in enumerate(self.NOISE):
            np.testing.assert_array_equal(read_clip(tmp_path / files.format(index), height=31, width=45)[0], frame)
        assert (writer.frames, writer.path, len(list(tmp_path.rglob("*.*g")))) == (7, tmp_path / name, 7)
        assert read_settings(tmp_path / name) == read_settings(tmp_path / files.format(0)) == {"seed": 3}
        with pytest.raises(UserError, match="exists already, with 7 frames; give another --out, or --overwrite"):
            check_writable(tmp_path / name)
        check_writable(tmp_path / name, overwrite=True)
        with open_writer(tmp_path / name) as writer:  # a shorter one leaves nothing of the longer
            writer.write(self.NOISE[:3])
        assert len(list(tmp_path.rglob("*.png"))) == 3

    def test_other_files_stay(self, tmp_path):
        (tmp_path / "mine.png").touch()
        with pytest.raises(UserError, match="is a folder with other files"):
            check_writable(tmp_path, overwrite=True)
        check_writable(tmp_path / "%05d.png")
        with open_writer(tmp_path / "%05d.png") as writer:
            writer.write(self.NOISE[:1])
        assert sorted(os.listdir(tmp_path)) == ["00000.png", "mine.png"]
        with (
            pytest.raises(UserError, match="was created by another process meanwhile"),
            open_writer(tmp_path / "%05d.png", overwrite=False) as writer,
        ):
            writer.write(self.NOISE)

    def test_quality_0_loses_only_resolution_of_colour(self, tmp_path):
        grey = np.repeat(self.NOISE[:, :30, :44, :1], 3, -1)
        path = write_mp4(tmp_path / "a.mp4", grey, quality=0)
        assert np.abs(read_clip(path, height=30, width=44).astype(int) - grey).max() <= 2


class TestWritable:
    def test_leaves_nothing(self, tmp_path):
        check_writable(tmp_path / "new" / "clip.mp4")
        assert list(tmp_path.rglob("*.*")) == []

    def test_disturbs_no_file_that_grows(self, tmp_path):
        """A second process that is refused, or that only looks, leaves the first one's video whole."""
        path = tmp_path / "clip.mp4"
        with Mp4Writer(path) as writer:
            for _ in range(30):  # until the encoder gives something to write
                writer.write(FRAMES)
            assert unfinished(path).exists()
            check_writable(path)
            check_folder("out", path)
            writer.write(FRAMES)
        assert len(read_clip(path, height=32, width=48)) == 124
        assert os.listdir(tmp_path) == ["clip.mp4"]

    def test_two_processes_write_apart(self, tmp_path, monkeypatch):
        """Each has a file of its own until it is complete; a killed one's ends in .part."""
        path = tmp_path / "clip.mp4"
        names = [unfinished(path)]
        monkeypatch.setattr(os, "getpid", lambda: 4_194_304)
        names.append(unfinished(path))
        assert names[0] != names[1]
        assert {name.suffix for name in names} == {".part"}

    def test_a_name_that_is_too_long(self, tmp_path):
        with pytest.raises(UserError, match="cannot be written: File name too long"):
            check_writable(tmp_path / ("long" * 61 + ".mp4"))  # fits itself, but not while it grows

    def test_reasons(self, tmp_path):
        path = write_mp4(tmp_path / "clip.mp4", FRAMES)
        with pytest.raises(UserError, match="exists already; give another --out, or --overwrite"):
            check_writable(path)
        check_writable(path, overwrite=True)
        with pytest.raises(UserError, match="is a folder"):
            check_writable(tmp_path)
        with pytest.raises(UserError, match=r"does not end in \.mp4"):
            check_writable(tmp_path / "clip.avi")
        with pytest.raises(UserError, match="cannot be written"):
            check_writable(path / "below" / "clip.mp4")


class TestFidelity:
    def test_psnr(self):
        other = FRAMES.copy()
        other[0, 0, 0, 0] ^= 16
        error = 16**2 / FRAMES.size
        assert fidelity(FRAMES, other).psnr == pytest.approx(10 * np.log10(255**2 / error))
        assert fidelity(FRAMES, FRAMES) == (float("inf"), 1.0)

    def test_ssim_sees_structure(self):
        """A constant shift costs little, noise of the same energy much; small frames work too."""
        smooth = np.broadcast_to(np.linspace(40, 200, 48)[None, None, :, None], FRAMES.shape).astype(np.uint8)
        noise = np.random.default_rng(1).choice([-20, 20], FRAMES.shape)
        noisy, shifted = (smooth + noise).astype(np.uint8), smooth + np.uint8(20)
        assert fidelity(shifted, smooth).psnr == pytest.approx(fidelity(noisy, smooth).psnr, abs=0.01)
        assert fidelity(shifted, smooth).ssim > 0.9 > 0.5 > fidelity(noisy, smooth).ssim
        assert fidelity(smooth[:, :8, :8], smooth[:, :8, :8]).ssim == 1.0


@pytest.mark.parametrize("comment", ["[" * 100_000, '{"monarchrt": {"shift": NaN}}', '{"a":' * 50_000, "[1]", "1e999"])
def test_settings_that_are_no_json(tmp_path, comment):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        container.mux(stream.encode())
    with pytest.raises(UserError, match="holds no settings"):
        read_settings(tmp_path / "a.mp4")
