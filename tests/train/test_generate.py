"""`monarchrt generate` from the outside: a run folder, and a Wan folder with every part, all tiny."""

import dataclasses
import signal
import time

import av
import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from monarchrt.models.checkpoints.tensor_files import SafetensorsFile, write_arrays
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.media.video import read_clip, write_mp4
from monarchrt.models.media.writer import Mp4Writer, read_settings
from monarchrt.models.umt5 import load_embeddings
from monarchrt.models.wan import MonarchAttention, WanModel, wan_config
from monarchrt.models.wan.checkpoints import load_checkpoint, save_checkpoint
from monarchrt.train.cli import main

from .conftest import generate

SMALL = ["--height", "32", "--width", "64", "--zoom", "1", "--steps", "2", "--quiet"]
CAT = ["--prompt", "a cat on a wall"]


class TestWan:
    def test_from_a_prompt_to_a_video(self, wan_folder, tmp_path, capsys):
        out, saved = tmp_path / "cat.mp4", tmp_path / "cat.safetensors"
        long = "a cat on a wall " * 5
        arguments = ["--checkpoint", wan_folder, "--frames", "5", "--prompt", long, "--save-embeddings", saved]
        assert generate(*arguments, "--out", out, *SMALL) == 0
        said = capsys.readouterr().err
        assert "has 26 tokens and is cut to 16" in said
        assert "5 frames in" in said
        assert read_clip(out, height=32, width=64).shape == (5, 32, 64, 3)
        stored = read_settings(out)
        assert (stored["mode"], stored["sampler"], stored["guidance"], stored["prompt"]) == (
            "bidirectional",
            "unipc",
            5.0,
            long,
        )
        assert len(load_embeddings(saved)) == 2

        # the same from the file's own settings, and from saved embeddings without the text encoder
        again = tmp_path / "again.mp4"
        assert generate("--from", out, "--trust", "--out", again, "--embeddings", saved, "--quiet") == 0
        np.testing.assert_array_equal(read_clip(again, height=32, width=64), read_clip(out, height=32, width=64))
        assert read_settings(again)["seed"] == stored["seed"]

    @pytest.mark.slow
    def test_block_by_block(self, wan_folder, causal_folder, tmp_path, capsys):
        """A causal network finds the other parts with --components; a dense comparison beside it."""
        out = tmp_path / "cat.mp4"
        arguments = ["--checkpoint", causal_folder, "--components", wan_folder, *CAT, "--compare-dense"]
        assert generate(*arguments, "--out", out, "--frames", "21", *SMALL) == 0
        assert len(read_clip(out, height=32, width=64)) == 21
        assert (read_settings(out)["mode"], read_settings(out)["sampler"]) == ("autoregressive", "few-step")
        assert "next to dense attention; PSNR" in capsys.readouterr().err
        assert len(read_clip(tmp_path / "cat-compare.mp4", height=32, width=64)) == 21

    def test_self_forcings_file(self, wan_folder, tmp_path):
        """A .pt file with the averaged generator only: causal and few-step, and a clip is continued."""
        torch = pytest.importorskip("torch")
        from safetensors.torch import load_file

        config = wan_config("tiny", dim=128, num_heads=1, num_layers=1, text_len=512)
        folder = save_checkpoint(WanModel(config, rngs=nnx.Rngs(0)), tmp_path / "official")
        tensors = load_file(next(folder.glob("*.safetensors")))
        file = tmp_path / "self_forcing_dmd.pt"
        torch.save({"generator_ema": {f"model.{name}": tensor for name, tensor in tensors.items()}}, file)
        clip = write_mp4(tmp_path / "clip.mp4", np.full((12, 32, 64, 3), 99, np.uint8))
        out = tmp_path / "cat.mp4"
        arguments = ["--checkpoint", file, "--components", wan_folder, *CAT, "--condition", clip, "--out", out]
        assert generate(*arguments, "--frames", "21", *SMALL) == 0
        stored = read_settings(out)
        assert (stored["mode"], stored["sampler"], stored["attention"]) == ("autoregressive", "few-step", "stored")
        assert len(read_clip(out, height=32, width=64)) == 21

    def test_a_causal_model_that_was_not_distilled(self, wan_folder, tmp_path):
        """Block by block, with the sampler and the guidance of other models."""
        config = wan_config("tiny", num_layers=1, text_len=16, causal_block=1)
        folder = save_checkpoint(WanModel(config, rngs=nnx.Rngs(0)), tmp_path / "causal")
        out = tmp_path / "cat.mp4"
        arguments = ["--checkpoint", folder, "--components", wan_folder, *CAT, "--frames", "5", "--out", out]
        assert generate(*arguments, *SMALL) == 0
        stored = read_settings(out)
        assert (stored["mode"], stored["sampler"], stored["guidance"]) == ("autoregressive", "unipc", 5.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{wan}", *CAT, "--height", "40"], "height is 40, which is not a multiple of 16; the nearest"),
        (["--checkpoint", "{wan}", *CAT, "--frames", "6"], "frames is 6; it must be 1 + 4 k; the nearest: 5 or 9"),
        (["--checkpoint", "{causal}", *CAT, "--frames", "13"], "whole blocks of 3 latent frames; the nearest: 9 or 21"),
        (["--checkpoint", "{causal}", *CAT, "--frames", "9", "--tile", "1", "30", "7"], "7 does not divide the 52"),
        (["--checkpoint", "{wan}"], "no prompt was given; describe what the video shows"),
        (["--checkpoint", "{wan}", "--prompt", " "], "prompt is empty"),
        (
            ["--checkpoint", "{causal}", *CAT, "--frames", "9"],
            "checkpoint lacks: VAE (Wan2.1_VAE.pth or vae); text encoder (models_t5_umt5-xxl-enc-bf16.pth or "
            "text_encoder); tokenizer (google/umt5-xxl or tokenizer); looked in {causal}",
        ),
        (["--checkpoint", "{wan}/vae", *CAT], "is not a Wan transformer but an autoencoder (VAE): it holds decoder"),
        (["--checkpoint", "nowhere", *CAT], "path='nowhere' does not exist"),
        ([*CAT], "no checkpoint was given; give --checkpoint"),
        (["--checkpoint", "{wan}", *CAT, "--out", "{file}/below.mp4"], "cannot be written"),
        (["--checkpoint", "{wan}", *CAT, "--out", "{file}"], "exists already; give another --out, or --overwrite"),
        (["--from", "{tiled}", "--trust", "--attention", "dense"], "path='nowhere' does not exist"),
        (["--from", "{file}"], "holds no settings; it was not made by monarchrt generate"),
        (["--checkpoint", "{wan}", *CAT, "--embeddings", "{file}"], "is not a file of text embeddings"),
        (["--checkpoint", "{causal}", *CAT, "--frames", "9", "--condition", "{file}"], "do not make whole blocks"),
        (["--checkpoint", "{wan}", *CAT, "--condition", "{file}"], "condition needs --mode autoregressive or windows"),
        (
            ["--checkpoint", "{wan}", *CAT, "--save-embeddings", "{file}/e"],
            "save_embeddings {file}/e cannot be written",
        ),
        (["--checkpoint", "{wan}", *CAT, "--stream", "--host", "no.such.host.invalid"], "cannot be listened on"),
        (
            [
                "--checkpoint",
                "{causal}",
                *CAT,
                *SMALL,
                "--frames",
                "9",
                "--tile",
                "1",
                "2",
                "4",
                "--condition",
                "no.png",
            ],
            "condition no.png is not a file; give an image or a video, or 'none'",
        ),
        (["--checkpoint", "{wan}", "--colour", "red"], "--colour"),
        (["--checkpoint", "{wan}", *CAT, "--fps", "inf"], "fps is inf; it must be at most 1000"),
        (["--checkpoint", "{wan}", *CAT, "--fps", "1e6"], "fps is 1000000.0; it must be at most 1000"),
        (["--checkpoint", "{wan}", *CAT, "--guidance", "nan"], "guidance is nan; it must lie in [0, 1000]"),
        (["--checkpoint", "{wan}", "--frames", "x"], "error: --frames cannot be read: invalid literal for int()"),
        (
            [
                "--checkpoint",
                "{causal}",
                *CAT,
                *SMALL,
                "--frames",
                "9",
                "--tile",
                "1",
                "2",
                "4",
                "--implementation",
                "q",
            ],
            "implementation='q' is not None or one of 'mosaic'",
        ),
    ],
)
def test_bad_input_ends_in_one_line(wan_folder, causal_folder, tmp_path, capsys, monkeypatch, arguments, message):
    file = write_mp4(tmp_path / "file.mp4", np.zeros((2, 32, 48, 3), np.uint8))
    tiled = tmp_path / "tiled"  # a video's settings; its checkpoint is gone
    settings = GenerateConfig(checkpoint="nowhere", tile=(1, 2, 4), num_iters=2).stored()
    with Mp4Writer(tiled, settings=settings) as writer:
        writer.write(np.zeros((2, 32, 48, 3), np.uint8))
    names = {"wan": wan_folder, "causal": causal_folder, "file": file, "tiled": tiled}
    monkeypatch.chdir(tmp_path)
    if "{causal}" in arguments and "checkpoint lacks" not in message:
        arguments = [*arguments, "--components", "{wan}"]
    assert generate(*(argument.format(**names) for argument in arguments)) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, captured.err
    assert message.format(**names) in errors[0]
    assert sorted(path.name for path in tmp_path.rglob("*.mp4*")) == ["file.mp4"]


class TestRun:
    def test_begins_with_the_runs_own_clip(self, baseline, tmp_path, capsys):
        """Frames of the held-out part first, then the network's; the whole is enlarged to be seen."""
        out = tmp_path / "run.mp4"
        assert generate("--checkpoint", baseline, "--out", out, "--mode", "windows", "--frames", "7", "--quiet") == 0
        with av.open(str(out)) as video:
            assert video.streams.video[0].width == 320
        assert len(read_clip(out, height=160, width=320)) == 7
        stored = read_settings(out)
        assert (stored["steps"], stored["sampler"], stored["window"]) == (20, "unipc", 3)

    def test_an_image_to_begin_with(self, baseline, tmp_path):
        picture = np.zeros((40, 80, 3), np.uint8)
        picture[:, :40] = (250, 250, 0)
        Image.fromarray(picture).save(tmp_path / "picture.png")
        arguments = ["--checkpoint", baseline, "--mode", "windows", "--frames", "3", "--steps", "1", "--zoom", "1"]
        out = tmp_path / "a.mp4"
        assert generate(*arguments, "--condition", tmp_path / "picture.png", "--out", out, "--quality", "0") == 0
        first = read_clip(out, height=16, width=32)[0]
        assert first[8, 4].tolist() == pytest.approx([250, 250, 0], abs=12)
        assert first[8, 28].max() < 12

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--components", "x"], "components is x, but checkpoint {run} is a run folder, which needs no other"),
            (["--weights", "generator"], "weights is generator, but checkpoint {run} is a run folder, which has one"),
            (["--save-embeddings", "e"], "save_embeddings is e, but checkpoint {run} is a run folder, which was"),
            (["--embeddings", "nowhere"], "embeddings is nowhere, but checkpoint {run} is a run folder, which was"),
            (["--guidance", "7"], "guidance is 7.0, but checkpoint {run} is a run folder, which was trained without"),
        ],
    )
    def test_what_a_run_has_no_use_for(self, baseline, tmp_path, capsys, monkeypatch, options, message):
        monkeypatch.chdir(tmp_path)
        assert generate("--checkpoint", baseline, *options) == 2
        error = capsys.readouterr().err
        assert message.format(run=baseline) in error
        assert error.endswith("; leave it out\n")
        assert not list(tmp_path.iterdir())

    def test_a_runs_video_from_its_own_settings(self, baseline, tmp_path):
        one, other = tmp_path / "one.mp4", tmp_path / "other.mp4"
        arguments = ["--mode", "windows", "--frames", "3", "--steps", "1", "--guidance", "1", "--quiet"]
        assert generate("--checkpoint", baseline, *arguments, "--out", one) == 0
        assert generate("--from", one, "--trust", "--out", other, "--quiet") == 0
        assert read_settings(one) == read_settings(other)

    def test_the_folder_above_the_runs(self, baseline, tmp_path, capsys):
        (tmp_path / "demo").mkdir()
        (tmp_path / "demo" / "dense").symlink_to(baseline)
        assert generate("--checkpoint", tmp_path / "demo", "--out", tmp_path / "a.mp4") == 2
        assert f"holds runs; give one of them: {tmp_path / 'demo' / 'dense'}" in capsys.readouterr().err

    @pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
    def test_stopped(self, baseline, tmp_path, start, number):
        """Whatever frames were ready are a playable file."""
        out = tmp_path / "a.mp4"
        arguments = ["--checkpoint", baseline, "--out", out, "--mode", "windows", "--frames", "20001", "--steps", "8"]
        process = start(["generate", *arguments, "--zoom", "1"])
        begin = time.monotonic()
        while not any(unfinished.stat().st_size > 2000 for unfinished in tmp_path.glob("a.mp4.*.part")):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() - begin < 300
            time.sleep(0.1)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 128 + number, stderr
        kept = len(read_clip(out, height=16, width=32))
        assert 1 < kept < 20001
        assert f"stopped; {kept} of 20001 frames are kept in {out}" in stderr
        assert not list(tmp_path.glob("*.part"))
        assert "Traceback" not in stderr


def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit) as stopped:
        generate("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    from monarchrt.train.cli.generate import GenerateOptions

    for name in (field.name for field in dataclasses.fields(GenerateOptions)):
        assert f"--{name.strip('_').replace('_', '-')} " in text or f"--{name.replace('_', '-')}, " in text, name
    assert "monarchrt generate --from cat.mp4 --trust" in text


class TestEncode:
    """`monarchrt encode`: captioned clips to what `monarchrt train --latents` takes."""

    SIZES = ("--height", "32", "--width", "64", "--frames", "5", "--rows", "16")

    @pytest.fixture
    def clips(self, tmp_path):
        folder = tmp_path / "clips"
        folder.mkdir()
        for number, caption in enumerate(["a cat", "a dog on a wall", "a cat"]):
            frames = np.random.default_rng(number).integers(0, 255, (6, 32, 64, 3), np.uint8)
            write_mp4(folder / f"{number}.mp4", frames)
            (folder / f"{number}.txt").write_text(caption + "\n")
        return folder

    def encode(self, clips, out, *arguments):
        return main(["encode", "--clips", str(clips), "--out", str(out), *self.SIZES, *map(str, arguments)])

    def test_what_training_reads(self, wan_folder, clips, tmp_path, capsys):
        from monarchrt.models.generate.decoders import WanDecoder
        from monarchrt.models.vae import load_vae
        from monarchrt.train.config import DataConfig
        from monarchrt.train.data import LatentFolder

        out = tmp_path / "latents"
        assert self.encode(clips, out, "--components", wan_folder) == 0
        assert "3/3" in capsys.readouterr().err
        source = LatentFolder(out, DataConfig())
        assert (source.latent_shape, source.text_shape) == ((2, 4, 8, 16), (16, 32))
        batch = source.train_batch(0, batch=2, seed=0)
        size = {"height": 32, "width": 64, "max_frames": 5}
        frames = np.stack([read_clip(clips / f"{n}.mp4", fps=16, **size) for n in (0, 1)])
        expected = np.asarray(WanDecoder(load_vae(wan_folder / "vae")).encode(frames))
        order = [int(np.abs(expected - latents).mean((1, 2, 3, 4)).argmin()) for latents in batch.latents]
        assert sorted(order) == [0, 1]
        np.testing.assert_allclose(batch.latents, expected[order], atol=1e-4)
        assert np.abs(batch.text[0] - batch.text[1]).max() > 1e-3  # "a cat" and "a dog on a wall"
        last = source.held_out_batch([0])
        np.testing.assert_array_equal(last.text[0], batch.text[order.index(0)])  # "a cat" again

    @pytest.mark.slow
    def test_from_clips_to_a_finetuned_video(self, wan_folder, clips, tmp_path, capsys):
        """encode, train from a Wan model, convert the run, generate from that."""
        latents, run, made = tmp_path / "latents", tmp_path / "run", tmp_path / "made"
        assert self.encode(clips, latents, "--components", wan_folder) == 0
        sizes = ["--overrides", "num_layers=1", "text_len=16", "--batch", "1", "--eval-windows", "1"]
        data = ["--latents", str(latents), "--held-out", "0.3", "--tile", "2", "2", "4"]
        start = ["--init-from", str(wan_folder), "--steps", "1", "--eval-timesteps", "1", "--folder", str(run)]
        assert main(["train", *data, *sizes, *start]) == 0
        capsys.readouterr()

        assert generate("--checkpoint", run, *CAT, "--out", tmp_path / "a.mp4") == 2
        assert f"`monarchrt convert {run} NEW`" in capsys.readouterr().err
        assert main(["inspect", str(run)]) == 0
        assert f"monarchrt convert {run} NEW " in capsys.readouterr().out
        assert main(["convert", str(run), str(made), "--weights", "generator"]) == 2
        assert "is a run folder; leave it out" in capsys.readouterr().err
        assert main(["convert", str(run), str(made)]) == 0
        assert capsys.readouterr().out.strip() == str(made)
        config = load_checkpoint(made).config
        assert (config.attention, config.dim) == (MonarchAttention(tile=(2, 2, 4)), 96)
        out = tmp_path / "cat.mp4"
        arguments = ["--checkpoint", made, "--components", wan_folder, *CAT, "--frames", "5", "--out", out]
        assert generate(*arguments, *SMALL) == 0
        assert read_clip(out, height=32, width=64).shape == (5, 32, 64, 3)

    def test_goes_on_where_it_was_stopped(self, wan_folder, clips, tmp_path, capsys):
        out = tmp_path / "latents"
        write_mp4(clips / "1.mp4", np.zeros((3, 32, 64, 3), np.uint8))
        assert self.encode(clips, out, "--components", wan_folder) == 2
        assert (
            "1.mp4 has 4 frames at 16 frames per second and stride 1, but at least 5 are needed"
            in capsys.readouterr().err
        )
        assert [path.name for path in out.iterdir()] == ["0.safetensors"]
        before = (out / "0.safetensors").stat().st_mtime_ns
        write_mp4(clips / "1.mp4", np.zeros((5, 32, 64, 3), np.uint8))
        assert self.encode(clips, out, "--components", wan_folder) == 0
        assert "1 of 3 clips are in" in capsys.readouterr().err
        assert sorted(path.name for path in out.iterdir()) == [f"{n}.safetensors" for n in range(3)]
        assert (out / "0.safetensors").stat().st_mtime_ns == before
        header = SafetensorsFile(out / "0.safetensors").metadata
        sizes = {"frames": "5", "height": "32", "width": "64", "fps": "16", "stride": "1", "rows": "16"}
        assert header == {"caption": "a cat", "clip": "0.mp4"} | sizes

    @pytest.mark.parametrize(
        ("change", "arguments", "message"),
        [
            ({"caption": "a dog"}, [], "0.safetensors already exists, with caption 'a dog' instead of 'a cat'; delete"),
            ({"clip": "0.webm"}, [], "with clip '0.webm' instead of '0.mp4'"),
            ({}, ["--width", "48"], "with width '64' instead of '48'; delete it, or give another --out"),
            ({}, ["--height", "16", "--frames", "9"], "with frames '5' instead of '9', height '32' instead of '16'; "),
            ({}, ["--rows", "8"], "with rows '16' instead of '8'"),
            ({"stride": "2", "fps": "16"}, [], "with stride '2' instead of '1'"),
            ({"stride": "1"}, [], "with fps '0' instead of '16'"),  # made before there was a rate
            ({"stride": "1", "fps": "16"}, ["--fps", "24"], "with fps '16' instead of '24'"),
            ({"frames": "7"}, [], "with frames '7' instead of '5'"),  # of a VAE of another factor
            ({"latents": (2, 4, 8)}, [], "0.safetensors holds no latents and text of a clip; delete it"),
            ({"damage": True}, [], "0.safetensors is truncated: "),
            ({}, [], "checkpoint lacks: VAE"),  # no complaint
        ],
    )
    def test_files_that_are_there_already_are_looked_at(self, clips, tmp_path, capsys, change, arguments, message):
        out = tmp_path / "latents"
        metadata = {"caption": "a cat", "clip": "0.mp4"} | {k: v for k, v in change.items() if isinstance(v, str)}
        shapes = {"latents": change.get("latents", (2, 4, 8, 16)), "text": (16, 32)}
        arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        write_arrays(out / "0.safetensors", arrays, metadata=metadata)
        if "damage" in change:
            (out / "0.safetensors").write_bytes((out / "0.safetensors").read_bytes()[:-8])
        before = (out / "0.safetensors").read_bytes()
        assert self.encode(clips, out, "--components", clips, *arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("error: ") == 1
        assert (out / "0.safetensors").read_bytes() == before

    def test_captions_are_encoded_once_and_leave_the_device(self, wan_folder, clips, tmp_path, monkeypatch):
        from monarchrt.models.umt5 import text

        encode, seen = text._encode, []

        def counted(*arguments):
            seen.append(sum(array.shape[-2:] == (16, 32) for array in jax.live_arrays()))
            if len(seen) == stop:
                raise KeyboardInterrupt
            return encode(*arguments)

        monkeypatch.setattr(text, "_encode", counted)
        (clips / "2.txt").write_text("a dog")
        out, stop = tmp_path / "latents", 3
        assert self.encode(clips, out, "--components", wan_folder) == 130
        assert (len(seen), max(seen)) == (3, min(seen))
        assert len(list((tmp_path / "latents.texts").iterdir())) == 2
        assert self.encode(clips, out, "--components", wan_folder) == 0
        assert len(seen) == 4  # the one that was missing
        assert not (tmp_path / "latents.texts").exists()
        stop, again = None, tmp_path / "again"
        assert self.encode(clips, again, "--components", wan_folder) == 0
        for path in out.iterdir():
            assert path.read_bytes() == (again / path.name).read_bytes()

    @pytest.mark.parametrize(
        ("change", "arguments", "message"),
        [
            (lambda clips: (clips / "1.txt").unlink(), [], "1.mp4 has no caption; write what it shows into"),
            (lambda clips: (clips / "1.txt").write_text(" \n"), [], "1.txt is empty; write what 1.mp4 shows"),
            (lambda clips: (clips / "1.txt").write_bytes(b"\xff\xfe\xfa"), [], "1.txt is not UTF-16-LE"),
            (lambda clips: (clips / "1.webm").touch(), [], "two videos named 1"),
            (lambda clips: [path.unlink() for path in clips.glob("*.mp4")], [], "has no videos (.mp4, .webm"),
            (lambda clips: None, [], "no components were given; give --components"),
            (lambda clips: None, ["--components", "{clips}"], "checkpoint lacks: VAE"),
            (lambda clips: None, ["--frames", "6"], "frames is 6; it must be 1 + 4 k, for example 5"),
            (lambda clips: None, ["--rows", "100000000000"], "rows is 100000000000; it must be at most 100000"),
            (lambda clips: None, ["--height", "40"], "height is 40; it must be a multiple of 16, for example 32"),
            (lambda clips: None, ["--stride", "0"], "stride is 0; it must be 1 or more"),
            (
                lambda clips: None,
                ["--height", "1000000"],
                "height is 1000000; it must be at most 8192",
            ),
            (lambda clips: None, ["--fps", "-1"], "fps is -1.0; it must lie in"),
            (lambda clips: (clips / "3.txt").touch(), [], "3.txt has no clip; put 3.mp4 there"),
        ],
    )
    def test_bad_input(self, clips, tmp_path, capsys, change, arguments, message):
        change(clips)
        assert self.encode(clips, tmp_path / "latents", *(str(x).format(clips=clips) for x in arguments)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "latents").exists()

    def test_keep_going_leaves_out_what_cannot_be_used(self, wan_folder, clips, tmp_path, capsys, monkeypatch):
        """A damaged clip, one without a caption, one whose latents are NaN: they are listed, the rest is encoded."""
        from monarchrt.models.generate.decoders import WanDecoder

        encode = WanDecoder.encode
        (clips / "1.mp4").write_bytes((clips / "1.mp4").read_bytes()[:-100])
        write_mp4(clips / "3.mp4", np.full((6, 32, 64, 3), 255, np.uint8))
        (clips / "3.txt").write_text("white")
        (clips / "4.mp4").touch()
        monkeypatch.setattr(
            WanDecoder, "encode", lambda self, video: encode(self, video) * (np.nan if video.min() > 250 else 1)
        )
        out = tmp_path / "latents"
        assert self.encode(clips, out, "--components", wan_folder) == 2
        assert "4.mp4 has no caption" in capsys.readouterr().err
        (clips / "1.txt").rename(clips / "aside")
        (clips / "1.mp4").rename(clips / "1")
        (clips / "4.mp4").unlink()
        assert self.encode(clips, out, "--components", wan_folder) == 2
        assert "3.mp4 produces latents that are NaN or infinite" in capsys.readouterr().err
        assert not (out / "3.safetensors").exists()
        (clips / "aside").rename(clips / "1.txt")
        (clips / "1").rename(clips / "1.mp4")
        (clips / "4.mp4").touch()
        assert self.encode(clips, out, "--components", wan_folder, "--keep-going") == 0
        error = capsys.readouterr().err
        left_out = [line for line in error.splitlines() if line.startswith("left out: ")]
        assert [next(n for n in "134" if f"{n}.mp4" in line) for line in left_out] == ["4", "1", "3"]
        assert "2 clips are in" in error
        assert sorted(path.name for path in out.iterdir()) == ["0.safetensors", "2.safetensors"]

    def test_two_at_once_are_told_at_once(self, wan_folder, clips, tmp_path, capsys):
        from monarchrt.models.files import locked

        out = tmp_path / "latents"
        out.mkdir()
        with locked(out, name="out"):
            assert self.encode(clips, out, "--components", wan_folder) == 2
            assert "latents is being written to by another process; wait" in capsys.readouterr().err
            assert not list(out.iterdir())

    def test_a_file_where_the_folder_should_be(self, clips, tmp_path, capsys):
        out = tmp_path / "latents"
        out.touch()
        assert self.encode(clips, out, "--components", clips) == 2
        assert "latents is not a folder that can be written to" in capsys.readouterr().err
