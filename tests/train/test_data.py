import hashlib
import json
import os
import shutil
import time

import ml_dtypes
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file, save_file

from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.errors import UserError
from monarchrt.train import data, digests
from monarchrt.train.cli import main
from monarchrt.train.config import DataConfig
from monarchrt.train.data import ClipWindows, LatentFolder, example_order, spread
from monarchrt.train.sources import open_source
from tests.clips import encode_video
from tests.untyped import untyped

from .conftest import NETWORK, history


def numbered(count: int, *, height: int = 8, width: int = 8) -> np.ndarray:
    """Frames whose every pixel is the frame's number."""
    return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3)).copy()


def config(**changes) -> DataConfig:
    return DataConfig(**{"frames": 4, "height": 8, "width": 8, "patch": 4, "held_out": 0.3, "gap": 2} | changes)


def frames_of(windows: ClipWindows, latents: np.ndarray) -> set[int]:
    return {int(frame[0, 0, 0]) for frame in windows.transform.decode(latents).reshape(-1, 8, 8, 3)}


def test_no_frame_is_in_both_parts_and_the_gap_is_in_neither():
    windows = ClipWindows(numbered(40), config())
    trained = set()
    for step in range(20):
        trained |= frames_of(windows, windows.train_batch(step, batch=4, seed=0).latents)
    held_out = frames_of(windows, windows.held_out_batch(range(windows.held_out)).latents)
    assert trained == set(range(28))
    assert held_out == set(range(30, 40))


def test_a_batch_is_a_function_of_seed_and_step_alone():
    first, second = (ClipWindows(numbered(40, height=12, width=12), config(crop=1.5, flip=True)) for _ in range(2))
    for step in (7, 3, 50, 7):
        one, two = first.train_batch(step, batch=3, seed=9), second.train_batch(step, batch=3, seed=9)
        np.testing.assert_array_equal(one.latents, two.latents)
    other_seed = first.train_batch(7, batch=3, seed=10).latents
    assert not np.array_equal(first.train_batch(7, batch=3, seed=9).latents, other_seed)


def test_every_epoch_has_each_example_once_in_a_new_order():
    orders = [[i for step in range(5) for i, _ in example_order(5 * e + step, 2, seed=4, count=10)] for e in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
    # an epoch need not be a whole number of steps
    draws = [draw for step in range(7) for _, draw in example_order(step, 3, seed=4, count=10)]
    assert draws == list(range(21))


def test_flip_and_crop():
    frames = np.zeros((40, 12, 12, 3), np.uint8)
    frames[:, :, :, 0] = 10 * np.arange(12)[:, None]
    frames[:, :, :, 1] = 10 * np.arange(12)
    windows = ClipWindows(frames, config(crop=1.5, flip=True))
    seen = set()
    for step in range(40):
        for window in windows.transform.decode(windows.train_batch(step, 1, seed=0).latents):
            corner, right = window[0, 0, 0], window[0, 0, 7]
            assert abs(int(right[1]) - int(corner[1])) == 70
            seen.add((int(corner[0]), min(int(corner[1]), int(right[1])), bool(corner[1] > right[1])))
    assert len({top for top, _, _ in seen}) == len({left for _, left, _ in seen}) == 5
    assert {flipped for _, _, flipped in seen} == {True, False}
    held_out = windows.held_out_window(0)
    assert (held_out[0, 0, 0] == (20, 20, 0)).all()


def test_parts_too_short_are_named():
    with pytest.raises(UserError, match="held-out part has 1, fewer than one window of frames 4"):
        ClipWindows(numbered(10), config())
    with pytest.raises(UserError, match="training part has 2"):
        ClipWindows(numbered(20), config(held_out=0.9))


def test_fingerprint_follows_the_content():
    frames = numbered(40)
    before = ClipWindows(frames, config()).fingerprint
    assert before == ClipWindows(frames.copy(), config()).fingerprint
    frames[3, 2, 1, 0] += 1
    assert before != ClipWindows(frames, config()).fingerprint


def test_open_source_reads_a_clip_at_the_size_of_the_crop(clip):
    source = open_source(config(video=clip, height=16, width=32, crop=1.25), text_shape=(2, 5))
    assert isinstance(source, ClipWindows)
    assert source.frames.shape == (24, 20, 40, 3)
    assert source.latent_shape == (4, 4, 8, 48)
    batch = source.train_batch(0, 2, 0)
    assert batch.latents.shape == (2, 4, 4, 8, 48)
    assert batch.text.shape == (2, 2, 5)


def test_exactly_one_source_must_be_named(clip, tmp_path):
    with pytest.raises(UserError, match="neither was given"):
        open_source(config())
    with pytest.raises(UserError, match="both were given"):
        open_source(config(video=clip, latents=tmp_path))


@pytest.fixture
def latents(tmp_path):
    for index in range(10):
        tensors = {
            "latents": np.full((3, 4, 6, 16), index, np.float16),
            "text": np.full((5, 32), -index, np.float32),
        }
        save_file(tensors, tmp_path / f"{index:02d}.safetensors")
    return tmp_path


def test_latent_folder(latents):
    folder = open_source(DataConfig(latents=latents, held_out=0.3))
    assert isinstance(folder, LatentFolder)
    assert (folder.latent_shape, folder.text_shape, folder.held_out) == ((3, 4, 6, 16), (5, 32), 3)
    batches = [folder.train_batch(step, 7, seed=1) for step in range(2)]
    assert all(sorted(batch.latents[:, 0, 0, 0, 0]) == list(range(7)) for batch in batches)
    assert batches[0].latents.dtype == batches[0].text.dtype == np.float32
    np.testing.assert_array_equal(batches[0].text[:, 0, 0], -batches[0].latents[:, 0, 0, 0, 0])
    assert sorted(folder.held_out_batch([0, 1, 2]).latents[:, 0, 0, 0, 0]) == [7, 8, 9]


def test_a_listing_follows_names_and_contents(latents):
    """It is what processes compare, of which all but the first read no more than their own part."""
    before = LatentFolder(latents, config()).listing
    first, *_, last = sorted(latents.glob("*.safetensors"))
    shutil.copy(first, latents / "9.safetensors")
    more = LatentFolder(latents, config()).listing
    (latents / "9.safetensors").unlink()
    assert LatentFolder(latents, config()).listing == before != more
    size, arrays = last.stat().st_size, load_file(last)
    save_file(arrays | {"latents": arrays["latents"] + np.float16(1)}, last)
    assert last.stat().st_size == size
    assert LatentFolder(latents, config()).listing not in (before, more)


def test_latent_folder_fingerprint_follows_the_content(latents):
    before = LatentFolder(latents, config()).fingerprint
    save_file({"latents": np.ones((3, 4, 6, 16), np.float16), "text": np.ones((5, 32), np.float32)},
              latents / "04.safetensors")  # fmt: skip
    assert LatentFolder(latents, config()).fingerprint != before


def test_latents_of_every_float_type_are_read(tmp_path):
    """Files of BF16 too; the fingerprint stays what runs have stored."""
    values = np.random.default_rng(0).normal(size=(3, 2, 4, 4, 16))
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        folder, stored = tmp_path / np.dtype(dtype).name, values.astype(dtype)
        for index in range(3):
            arrays = {"latents": stored[index], "text": stored[index, 0, 0]}
            write_arrays(folder / f"{index}.safetensors", arrays, metadata={})
        source = LatentFolder(folder, config())
        (latents, text), expected = source.held_out_batch([0]), stored[2:].astype(np.float32)
        np.testing.assert_array_equal(latents, expected)
        np.testing.assert_array_equal(text, expected[:, 0, 0])
        assert {latents.dtype, text.dtype, source.train_batch(0, 2, 0).latents.dtype} == {np.dtype(np.float32)}
        digest = hashlib.sha256()
        for path in sorted(folder.iterdir()):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        assert source.fingerprint == digest.hexdigest()


def test_other_tensors_in_a_file_of_latents_are_left_alone(tmp_path):
    arrays = {"latents": np.ones((2, 4, 4, 16)), "text": np.ones((3, 8)), "length": np.array(3)}
    for index in range(2):
        save_file(arrays, tmp_path / f"{index}.safetensors")
    source = LatentFolder(tmp_path, config())
    assert len(source.fingerprint) == 64
    assert source.held_out_batch([0]).text.shape == (1, 3, 8)


@pytest.fixture
def read(monkeypatch):
    """Names of the files that are read for a fingerprint; files made just now count as settled."""
    names: list[str] = []
    check = data._check_finite
    monkeypatch.setattr(data, "_check_finite", lambda path: names.append(path.name) or check(path))
    monkeypatch.setattr(digests, "_SETTLED", 0)
    return names


def test_a_resume_reads_only_the_files_that_changed(latents, read, tmp_path):
    def fingerprint():
        source = LatentFolder(latents, config(), digests=kept)
        found = source.fingerprint
        source.keep_digests()
        return found, sorted(read.pop() for _ in list(read))

    kept = tmp_path / "data.json"
    time.sleep(0.05)
    everything = sorted(path.name for path in latents.glob("*.safetensors"))
    before, names = fingerprint()
    assert (names, before) == (everything, LatentFolder(latents, config()).fingerprint)
    read.clear()
    assert fingerprint() == (before, [])

    # other content of the same size, under the old time
    path = latents / "04.safetensors"
    whole, times = path.read_bytes(), path.stat()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    time.sleep(0.05)
    after, names = fingerprint()
    assert names == [path.name]
    assert after == LatentFolder(latents, config()).fingerprint != before
    read.clear()
    for damaged in ("[", "[]", json.dumps({name: [1, 2, 3] for name in everything})):
        kept.write_text(damaged)
        assert fingerprint() == (after, everything)


def test_files_that_may_still_change_are_read_again(latents, read, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "_SETTLED", 10**12)
    for _ in range(2):
        source = LatentFolder(latents, config(), digests=tmp_path / "data.json")
        assert source.fingerprint
        source.keep_digests()
        assert len(read) == 10
        read.clear()


def test_a_run_on_bf16_latents_reads_all_of_them_once(read, tmp_path, capsys):
    values = np.random.default_rng(0).normal(size=(4, 3, 4, 6, 16)).astype(ml_dtypes.bfloat16)
    for index, value in enumerate(values):
        arrays = {"latents": value, "text": np.ones((5, 32), ml_dtypes.bfloat16)}
        write_arrays(tmp_path / f"latents/{index}.safetensors", arrays, metadata={})
    time.sleep(0.05)
    run = ["--latents", str(tmp_path / "latents"), "--folder", str(tmp_path / "run")]
    run += [*NETWORK, "--tile", "1", "2", "3", "--batch", "2", "--eval-windows", "2", "--eval-timesteps", "1"]
    # what is quick to check comes before the data is read
    assert main(["train", *run, "--steps", "1", "--tile", "2", "2", "3"]) == 2
    assert "tile=(2, 2, 3): 2 does not divide the 3" in capsys.readouterr().err
    assert read == []
    assert main(["train", *run, "--steps", "1"]) == 0
    assert "note: only 1 example is held out, so the held-out loss uses 1" in capsys.readouterr().err
    assert sorted(read) == [f"{index}.safetensors" for index in range(4)]
    assert main(["train", *run, "--steps", "2", "--resume"]) == 0
    assert len(read) == 4
    assert [record["step"] for record in history(tmp_path / "run") if "loss" in record] == [1, 2]
    path = tmp_path / "latents/2.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert main(["train", *run, "--steps", "3", "--resume"]) == 2
    assert "other frames or latents" in capsys.readouterr().err
    assert read[4:] == [path.name]


def test_bad_latent_folders(latents, tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        LatentFolder(tmp_path / "nowhere", config())
    path = latents / "03.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    with pytest.raises(UserError, match=r"03\.safetensors is cut off or damaged"):
        LatentFolder(latents, config())
    save_file({"latents": np.ones((3, 4, 6, 8)), "text": np.ones((5, 32))}, path)
    with pytest.raises(UserError, match="all must agree"):
        LatentFolder(latents, config())
    text = np.ones((5, 32), np.float32)
    save_file({"latents": np.ones((3, 4, 6, 16), np.int32), "text": text}, path)
    with pytest.raises(UserError, match="dtypes I32 and F32; they must be floats"):
        LatentFolder(latents, config())
    save_file({"latents": np.full((3, 4, 6, 16), np.nan, np.float16), "text": text}, path)
    with pytest.raises(UserError, match=r"03\.safetensors has latents that are NaN or infinite"):
        _ = LatentFolder(latents, config()).fingerprint  # what a run begins with
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"03\.safetensors cannot be read"):
        LatentFolder(latents, config())
    path.rmdir()
    path.symlink_to("nowhere")
    with pytest.raises(UserError, match=r"03\.safetensors cannot be read"):
        LatentFolder(latents, config())
    path.unlink()
    save_file({"x": np.ones(3)}, path)
    with pytest.raises(UserError, match="needs 'latents' and 'text'"):
        LatentFolder(latents, config())
    for file in latents.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UserError, match="at least 2"):
        LatentFolder(latents, config())


CHANNELS_FIRST = [(16, 5, 8, 13), (5, 16, 8, 13), (16, 5, 13, 60), (48, 5, 8, 14)]


@pytest.mark.parametrize("shape", CHANNELS_FIRST)
def test_latents_with_channels_first_are_refused(tmp_path, shape):
    for index in range(2):
        save_file({"latents": np.ones(shape), "text": np.ones((3, 8))}, tmp_path / f"{index}.safetensors")
    with pytest.raises(UserError, match=r"0\.safetensors .*which look like \[(C, F|F, C), h, w\], PyTorch's order"):
        LatentFolder(tmp_path, config())


@pytest.mark.parametrize("order", ["f h w c", "c f h w", "f c h w"])
@pytest.mark.parametrize(("frames", "width", "channels"), [(16, 16, 16), (16, 12, 16), (4, 16, 16), (16, 16, 48)])
def test_where_the_shape_leaves_the_order_open_the_numbers_tell(tmp_path, order, frames, width, channels):
    """Smooth along height and width, nothing in common between channels."""
    y, x, c = np.mgrid[:9, :width, :channels]
    phase = np.random.default_rng(0).uniform(0, 6, channels)
    picture = np.sin(x / 4 + y / 5 + phase[c]) * (1 + c % 3)
    latents = rearrange(np.stack([picture] * frames), f"f h w c -> {order}")
    for index in range(2):
        save_file(
            {"latents": np.ascontiguousarray(latents), "text": np.ones((3, 8))}, tmp_path / f"{index}.safetensors"
        )
    if order == "f h w c":
        assert LatentFolder(tmp_path, config()).latent_shape == (frames, 9, width, channels)
    else:
        with pytest.raises(UserError, match="PyTorch's order"):
            LatentFolder(tmp_path, config())


def test_litter_is_no_example(latents):
    for name in ("._00.safetensors", ".DS_Store", "x.safetensors.crdownload", "Thumbs.db", "~$a.safetensors"):
        (latents / name).write_bytes(b"\0\5\26\7")
    source = LatentFolder(latents, config())
    assert len(source.train_files + source.held_out_files) == 10


class TestFolderOfVideos:
    @pytest.fixture
    def videos(self, tmp_path):
        """Frames of the clip c of n are 100 c + k."""
        for index, count in enumerate((5, 9, 7)):
            frames = [np.full((16, 32, 3), 80 * index + 4 * k, np.uint8) for k in range(count)]
            encode_video(tmp_path / f"{index}.MP4", frames, rate=12)
        (tmp_path / "._0.MP4").write_bytes(b"\0\5\26\7")
        (tmp_path / "notes.txt").write_text("notes")
        return tmp_path

    def test_whole_clips_are_held_out_and_no_window_crosses(self, videos):
        options = config(video=videos, frames=3, height=16, width=32, patch=8, held_out=0.3)
        source = untyped(open_source(options))
        assert (list(source.train_starts), source.held_out) == ([0, 1, 2, *range(5, 12)], 5)
        for start in source.train_starts:
            window = source.frames[start : start + 3, 0, 0, 0].astype(int)
            assert (np.abs(np.diff(window) - 4) <= 3).all()
        assert abs(int(source.held_out_window(0)[0, 0, 0, 0]) - 160) <= 2
        assert len(source.train_batch(0, 4, seed=0).latents) == 4

    def test_the_fingerprint_knows_where_clips_end(self, videos):
        frames = np.zeros((12, 16, 32, 3), np.uint8)
        options = config(frames=3, height=16, width=32, gap=0)
        prints = {ClipWindows(frames, options, lengths=lengths).fingerprint for lengths in ((6, 6), (5, 7), (12,))}
        assert len(prints) == 3
        assert ClipWindows(frames, options, lengths=(12,)).fingerprint == ClipWindows(frames, options).fingerprint

    def test_one_clip_is_split_by_time(self, videos):
        for name in ("0.MP4", "2.MP4"):
            (videos / name).unlink()
        options = {"frames": 2, "height": 16, "width": 32, "gap": 1}
        one, folder = (
            untyped(open_source(config(video=videos / "1.MP4", **options))),
            untyped(open_source(config(video=videos, **options))),
        )
        assert (one.fingerprint, one.train_starts) == (folder.fingerprint, folder.train_starts)

    def test_a_short_or_damaged_clip_is_named(self, videos):
        with pytest.raises(UserError, match=r"0\.MP4 has 5 frames at stride 1, but at least 6 are needed"):
            open_source(config(video=videos, frames=6))
        (videos / "1.MP4").write_bytes(b"no video")
        with pytest.raises(UserError, match=r"1\.MP4 is cut off, damaged or not a video"):
            open_source(config(video=videos, frames=3))

    def test_without_videos(self, tmp_path):
        with pytest.raises(UserError, match=r"is a folder without videos \(\.mp4"):
            open_source(config(video=tmp_path))

    def test_a_rate(self, videos):
        source = untyped(open_source(config(video=videos / "1.MP4", fps=6.0, frames=1, gap=0, height=16, width=32)))
        assert len(source.frames) == 5
        with pytest.raises(UserError, match="fps is -1"):
            config(fps=-1.0)


def test_spread_has_no_repeats():
    assert spread(3, 10) == [0, 1, 2]
    assert spread(100, 1) == [0]
    assert len(spread(100, 7)) == 7
