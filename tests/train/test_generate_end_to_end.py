"""`monarchrt generate` from the command to the file, for what other tests only plan."""

import json
import re
import shutil

import av
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from PIL import Image

from monarchrt.models.media.video import read_clip
from monarchrt.models.media.writer import read_settings
from monarchrt.models.vae import TinyVAEConfig
from tests.untyped import there

from .conftest import generate

SMALL = ["--height", "32", "--width", "64", "--zoom", "1", "--steps", "2", "--quiet"]
CAT = ["--prompt", "a cat on a wall"]
FLOW = {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
TINY = TinyVAEConfig(encoder=4, decoder=(8, 6, 4, 4))
RUN = ["--mode", "windows", "--zoom", "1", "--steps", "1", "--quiet"]


class TestSchedulerConfig:
    @pytest.fixture
    def folder(self, wan_folder, tmp_path):
        for part in wan_folder.iterdir():
            (tmp_path / part.name).symlink_to(part)
        (tmp_path / "scheduler").mkdir()
        return tmp_path

    def write(self, folder, **values):
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(values))

    def test_its_shift_is_the_default_and_is_said(self, folder, said):
        self.write(folder, **FLOW, flow_shift=3.0)
        assert generate("--checkpoint", folder, *CAT, "--frames", "5", "--out", folder / "a.mp4", *SMALL) == 0
        text = said()
        assert "sampler unipc: 2 steps, shift 3 (of scheduler_config.json), guidance 5; noise levels on Wan's" in text
        assert read_settings(folder / "a.mp4")["shift"] == 3.0
        assert (
            generate("--checkpoint", folder, *CAT, "--frames", "5", "--out", folder / "b.mp4", *SMALL, "--shift", "7")
            == 0
        )
        assert "shift 7, guidance 5" in said()
        one, other = (read_clip(folder / name, height=32, width=64) for name in ("a.mp4", "b.mp4"))
        assert (one != other).any()

    def test_one_that_we_have_not_is_said(self, folder, said):
        self.write(folder, _class_name="LCMScheduler")
        assert generate("--checkpoint", folder, *CAT, "--frames", "5", "--out", folder / "a.mp4", *SMALL) == 0
        text = said()
        assert "_class_name='LCMScheduler' is not supported" in text
        assert "Wan's own sampler and shift are used" in text
        assert read_settings(folder / "a.mp4")["shift"] == 5.0


def test_an_empty_negative_prompt_is_not_wans_own(wan_folder, tmp_path):
    """It is encoded as an empty text, and stored as one."""
    made = {}
    for name, negative in (("own", []), ("empty", ["--negative-prompt", ""]), ("dog", ["--negative-prompt", "a dog"])):
        out = tmp_path / f"{name}.mp4"
        options = [*CAT, *negative, "--frames", "5", "--out", out, *SMALL, "--save-latents", tmp_path / name]
        assert generate("--checkpoint", wan_folder, *options) == 0
        made[name] = safetensors.numpy.load_file(tmp_path / name)["latents"]
    assert read_settings(tmp_path / "empty.mp4")["negative_prompt"] == ""
    assert read_settings(tmp_path / "own.mp4")["negative_prompt"] != ""
    assert np.abs(made["own"] - made["empty"]).max() > 1e-6
    assert np.abs(made["dog"] - made["empty"]).max() > 1e-6
    again = ["--from", tmp_path / "empty.mp4", "--trust", "--out", tmp_path / "again.mp4", "--quiet"]
    assert generate(*again, "--save-latents", tmp_path / "again") == 0
    np.testing.assert_allclose(safetensors.numpy.load_file(tmp_path / "again")["latents"], made["empty"], atol=1e-5)


def advice(error):
    """The options of the settings that a message says to give."""
    pairs = there(re.search(r"; give (.*), or another tile", error))[1].split(" and ")
    return [word for pair in pairs for word in f"--{pair}".split()]


@pytest.mark.parametrize("sizes", [["--height", "48", "--width", "80"], ["--height", "32", "--width", "80"]])
def test_the_advice_for_a_tile_can_be_followed(wan_folder, tmp_path, said, sizes):
    common = ["--checkpoint", wan_folder, *CAT, *SMALL[4:], "--out", tmp_path / "a.mp4", "--tile", "2", "2", "4"]
    assert generate(*common, "--frames", "17", *sizes) == 2
    given = dict(zip(sizes[::2], sizes[1::2], strict=True)) | {"--frames": "17"}
    found = advice(said())
    given |= dict(zip(found[::2], found[1::2], strict=True))
    assert generate(*common, *(word for pair in given.items() for word in pair)) == 0
    assert (tmp_path / "a.mp4").exists()


class TestBlockByBlock:
    """`--mode autoregressive` of a network that was trained otherwise."""

    def test_a_run(self, baseline, tmp_path):
        options = ["--mode", "autoregressive", *RUN[2:], "--out", tmp_path / "a.mp4", "--condition", "none"]
        assert generate("--checkpoint", baseline, *options) == 0
        frames = read_settings(tmp_path / "a.mp4")["frames"]
        assert frames % 3 == 0
        assert len(read_clip(tmp_path / "a.mp4", height=16, width=32)) == frames

    @pytest.mark.parametrize("tile", [[], pytest.param(["--tile", "2", "2", "4"], marks=pytest.mark.slow)])
    def test_what_is_suggested_works(self, baseline, tmp_path, said, tile):
        options = ["--checkpoint", baseline, "--mode", "autoregressive", *RUN[2:], "--condition", "none"]
        assert generate(*options, *tile, "--frames", "7", "--out", tmp_path / "a.mp4") == 2
        nearest = there(re.search(r"the nearest: (\d+)(?: or (\d+))?", said()))
        for number, frames in enumerate(filter(None, nearest.groups())):
            assert generate(*options, *tile, "--frames", frames, "--out", tmp_path / f"{number}.mp4") == 0

    def test_a_block_that_the_tile_does_not_divide(self, baseline, tmp_path, said):
        options = ["--checkpoint", baseline, "--mode", "autoregressive", *RUN[2:], "--condition", "none"]
        options += ["--tile", "2", "2", "4", "--out", tmp_path / "a.mp4"]
        assert generate(*options, "--block", "3", "--frames", "9") == 2
        assert generate(*options, *advice(said())) == 0


def test_few_step_noise_goes_out_and_comes_in(baseline, tmp_path):
    """The first noise and what each step adds, which another seed would not give."""
    few = ["--mode", "windows", "--frames", "5", "--sampler", "few-step", "--steps", "1000", "750", "500"]
    few += ["--zoom", "1", "--quiet", "--condition", "none", "--checkpoint", baseline]
    noise, files = tmp_path / "noise", [tmp_path / f"{n}.latents" for n in range(3)]
    assert generate(*few, "--out", tmp_path / "0.mp4", "--save-noise", noise, "--save-latents", files[0]) == 0
    held = safetensors.numpy.load_file(noise)
    assert held["noise"].shape == (5, 4, 8, 48)
    assert held["fresh"].shape == (2, 5, 4, 8, 48)
    given = [*few, "--seed", "9", "--noise", noise]
    assert generate(*given, "--out", tmp_path / "1.mp4", "--save-latents", files[1]) == 0
    assert generate(*few, "--seed", "9", "--out", tmp_path / "2.mp4", "--save-latents", files[2]) == 0
    first, same, other = (safetensors.numpy.load_file(file)["latents"] for file in files)
    np.testing.assert_array_equal(same, first)  # to the last bit, so that frames are the same too
    assert np.abs(other - first).max() > 0.1


def test_exact_frames(baseline, tmp_path):
    """An .mkv and PNG files hold the same frames, to the last bit; so does the mp4 about."""
    common = ["--checkpoint", baseline, *RUN, "--frames", "5"]
    for out in ("a.mkv", "frames", "named/%03d.png", "a.mp4"):
        assert generate(*common, "--out", tmp_path / out) == 0
    with av.open(str(tmp_path / "a.mkv")) as video:
        assert video.streams.video[0].codec_context.name == "ffv1"
        exact = np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])
    assert exact.shape == (5, 16, 32, 3)
    for folder in ("frames", "named"):
        files = sorted((tmp_path / folder).glob("*.png"))
        np.testing.assert_array_equal(np.stack([np.asarray(Image.open(file)) for file in files]), exact)
    lossy = read_clip(tmp_path / "a.mp4", height=16, width=32).astype(float)
    assert 0 < np.abs(lossy - exact).mean() < 20
    assert read_settings(tmp_path / "a.mkv")["frames"] == 5


def test_the_same_file_twice(baseline, tmp_path):
    """More frames than the encoder looks ahead; from the video's own settings."""
    one, other = tmp_path / "one.mp4", tmp_path / "other.mp4"
    assert generate("--checkpoint", baseline, *RUN, "--frames", "45", "--out", one) == 0
    assert generate("--from", one, "--trust", "--out", other, "--quiet") == 0
    assert one.read_bytes() == other.read_bytes()
    shutil.copy(one, tmp_path / "moved.mp4")
    assert generate("--from", tmp_path / "moved.mp4", "--trust", "--out", tmp_path / "third.mp4", "--seed", "1") == 0
    assert (tmp_path / "third.mp4").read_bytes() != one.read_bytes()


class TestTinyDecoder:
    """`--decoder`: the tiny autoencoder beside the checkpoint, or a file."""

    @pytest.fixture
    def folder(self, wan_folder, tmp_path):
        from monarchrt.models.vae import TinyVAE
        from monarchrt.models.vae.tiny_checkpoint import tiny_entries

        for part in wan_folder.iterdir():
            (tmp_path / part.name).symlink_to(part)
        state = dict(nnx.to_flat_state(nnx.state(TinyVAE(TINY, rngs=nnx.Rngs(0)), nnx.Param)))
        arrays = {tuple(map(str, path)): np.asarray(leaf[...]) for path, leaf in state.items()}
        torch_order = {entry.names["official"]: arrays[entry.path] for entry in tiny_entries()}
        tensors = {
            name: np.ascontiguousarray(array[0].transpose(3, 2, 0, 1)) if array.ndim == 5 else array
            for name, array in torch_order.items()
        }
        safetensors.numpy.save_file(tensors, tmp_path / "taew2_1.safetensors")
        return tmp_path

    @pytest.mark.slow
    def test_a_video_and_its_stream(self, folder, said):
        common = ["--checkpoint", folder, *CAT, *SMALL, "--frames", "9", "--save-latents"]
        tiny = ["--decoder", "tiny", "--stream", "--port", "0", "--linger", "0"]
        assert generate(*common, folder / "l1", *tiny, "--out", folder / "a.mkv") == 0
        assert "frames are shown while they are generated at http://127.0.0.1:" in said()
        assert generate(*common, folder / "l2", "--out", folder / "b.mkv") == 0
        by_name = ["--decoder", folder / "taew2_1.safetensors", "--out", folder / "c.mkv"]
        assert generate(*common, folder / "l3", *by_name) == 0
        a, b, c = (read_clip(folder / name, height=32, width=64) for name in ("a.mkv", "b.mkv", "c.mkv"))
        assert a.shape == b.shape == (9, 32, 64, 3)
        np.testing.assert_array_equal(a, c)
        assert (a != b).any()
        one, other = (safetensors.numpy.load_file(folder / name)["latents"] for name in ("l1", "l2"))
        np.testing.assert_array_equal(one, other)  # it decodes, and no more
        assert read_settings(folder / "a.mkv")["decoder"] == "tiny"
        common = ["--from", folder / "c.mkv", "--quiet", "--out", folder / "d.mkv"]
        said()
        assert generate(*common) == 2
        assert "decoder" in said()  # which the video names, and is not read unless it is trusted
        assert generate(*common, "--trust") == 0
        np.testing.assert_array_equal(read_clip(folder / "d.mkv", height=32, width=64), a)

    def test_bad_input(self, wan_folder, baseline, tmp_path, said):
        common = ["--checkpoint", wan_folder, *CAT, "--out", tmp_path / "a.mp4", "--decoder"]
        assert generate(*common, "tiny") == 2
        assert "lacks: tiny decoder (taew2_1.safetensors or taew2_1.pth)" in said()
        assert generate(*common, "small") == 2
        assert "decoder is small, which is not a file; give exact or tiny, or the file of a tiny one" in said()
        assert generate("--checkpoint", baseline, "--decoder", "tiny", "--out", tmp_path / "a.mp4") == 2
        assert "which has its own; leave it out" in said()
