"""What `monarchrt generate` reads and writes beside its video, and what a stranger's video may not make it do."""

import numpy as np
import pytest
import safetensors.numpy

from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.load import load_material
from monarchrt.models.media.video import read_clip
from monarchrt.models.media.writer import Mp4Writer

from .conftest import generate

QUICK = ["--mode", "windows", "--frames", "5", "--steps", "2", "--zoom", "1", "--quiet"]


def stored(path, **settings):
    """A video with these settings in it, whoever wrote them."""
    with Mp4Writer(path, settings=GenerateConfig().stored() | settings) as writer:
        writer.write(np.zeros((2, 32, 48, 3), np.uint8))
    return path


@pytest.fixture
def error(capsys):
    def error():
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1].startswith("error: "), lines
        return lines[-1]

    return error


class TestSettingsOfAFile:
    @pytest.mark.parametrize("name", ["checkpoint", "lora", "components", "embeddings", "condition", "noise"])
    def test_what_it_names_is_read_only_if_confirmed(self, baseline, tmp_path, error, name):
        given = {"checkpoint": str(baseline)} if name != "checkpoint" else {}
        value = ["someone/else"] if name == "lora" else "someone/else"
        video = stored(tmp_path / "video.mp4", **given, **{name: value})
        typed = ["--checkpoint", baseline] if name != "checkpoint" else []
        assert generate("--from", video, *typed, "--out", tmp_path / "a.mp4") == 2
        said = error()
        assert f"names {name} 'someone/else'; what a video names is read only if you say so: add --trust" in said
        assert f"give --{name} yourself" in said
        assert not (tmp_path / "a.mp4").exists()

    @pytest.mark.parametrize(
        ("name", "word"), [("checkpoint", "tiny"), ("checkpoint", "none"), ("condition", "exact"), ("decoder", "none")]
    )
    def test_words_that_another_setting_has_are_names(self, baseline, tmp_path, monkeypatch, error, name, word):
        """`exact` and `tiny` are decoders, and `none` is no clip to begin with; elsewhere they are files like any."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / word).touch()
        video = stored(tmp_path / "video.mp4", **{name: word})
        typed = ["--checkpoint", baseline] if name != "checkpoint" else []
        assert generate("--from", video, *typed, "--out", "a.mp4") == 2
        assert f"names {name} '{word}'; what a video names is read only if you say so" in error()

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("out", "b.mp4"),
            ("overwrite", True),
            ("stream", True),
            ("host", "0.0.0.0"),
            ("save_noise", "b"),
            ("save_latents", "b"),
            ("compare", "b"),
            ("trust", True),
            ("from_", "b"),
        ],
    )
    def test_it_never_says_where_to_write_or_who_may_watch(self, baseline, tmp_path, error, name, value):
        video = stored(tmp_path / "video.mp4", **{name: value})
        assert generate("--from", video, "--checkpoint", baseline, "--out", tmp_path / "a.mp4") == 2
        assert f"made by another version: it has the settings {name}" in error()

    def test_what_was_stored_once_is_passed_over(self, baseline, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "mine").write_text("mine")
        video = stored(tmp_path / "video.mp4", save_embeddings="mine", compare_dense=True)
        assert generate("--from", video, "--checkpoint", baseline, *QUICK, "--out", "a.mp4") == 0
        assert (tmp_path / "mine").read_text() == "mine"
        assert not (tmp_path / "a-compare.mp4").exists()

    def test_letters_that_command_a_terminal_are_not_printed(self, baseline, tmp_path, error):
        video = stored(tmp_path / "video.mp4", checkpoint="a\x1b[2Jb", **{"x\x1b[2J": 1})
        assert generate("--from", video, "--out", tmp_path / "a.mp4") == 2
        assert "\x1b" not in error()
        video = stored(tmp_path / "other.mp4", checkpoint="a\x1b[2Jb")
        for trust in ([], ["--trust"]):
            assert generate("--from", video, "--out", tmp_path / "a.mp4", *trust) == 2
            assert "\x1b" not in error()


class TestFiles:
    @pytest.mark.parametrize("lora", ["style.safetensors:nan", ":0.8", "style.safetensors:-inf"])
    def test_a_lora_without_a_file_or_strength(self, baseline, tmp_path, error, lora):
        """It ended in a traceback."""
        assert generate("--checkpoint", baseline, *QUICK, "--out", tmp_path / "a.mp4", "--lora", lora) == 2
        assert f"lora {lora!r} has no file or no finite strength; write FILE or FILE:0.8" in error()

    @pytest.mark.parametrize("option", ["--save-noise", "--save-latents"])
    def test_nothing_is_replaced_unasked(self, baseline, tmp_path, error, option):
        mine = tmp_path / "mine"
        mine.write_text("mine")
        arguments = ["--checkpoint", baseline, *QUICK, "--out", tmp_path / "a.mp4", option, mine]
        assert generate(*arguments) == 2
        assert f"{option[2:].replace('-', '_')} {mine} exists already; give another name, or --overwrite" in error()
        assert mine.read_text() == "mine"
        assert generate(*arguments, "--overwrite") == 0
        assert safetensors.numpy.load_file(mine)

    def test_embeddings_are_not_replaced_unasked(self, tmp_path, error):
        mine = tmp_path / "mine"
        mine.write_text("mine")
        arguments = ["--checkpoint", "nowhere", "--prompt", "a", "--out", tmp_path / "a.mp4", "--save-embeddings", mine]
        assert generate(*arguments) == 2
        assert f"save_embeddings {mine} exists already" in error()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--save-noise", "{a}", "--save-latents", "{a}"], "save_latents {a} is the file of save_noise, too"),
            (["--out", "{a}.mp4", "--save-latents", "{here}/../{name}/a.mp4"], "is the file of out, too"),
            (["--linger", "5"], "linger is 5.0, but there is no page without stream; add --stream, or leave it out"),
            (["--port", "1"], "port is 1, but there is no page"),
            (["--host", "::1"], "host is ::1, but there is no page"),
            (["--condition", "{clip}", "--out", "{clip}", "--overwrite"], "out {clip} is the file of condition {clip}"),
            (["--noise", "{clip}", "--save-noise", "{clip}", "--overwrite"], "save_noise {clip} is the file of noise"),
            (
                ["--save-latents", "{run}/config.json", "--overwrite"],
                "save_latents {run}/config.json is a file of checkpoint {run}, which is read",
            ),
            (["--from", "{clip}", "--out", "{clip}", "--overwrite"], "out {clip} is the file of from {clip}"),
            (["--out", "{here}/b.mp4", "--save-noise", "{here}/b-compare.mp4", "--compare", "{run}"], "is the file of"),
        ],
    )
    def test_files_that_collide(self, baseline, tmp_path, error, options, message):
        clip = stored(tmp_path / "clip.mp4")
        before = clip.read_bytes()
        names = {"a": tmp_path / "a", "here": tmp_path, "name": tmp_path.name, "clip": clip, "run": baseline}
        out = [] if "--out" in options else ["--out", tmp_path / "new.mp4"]
        assert generate("--checkpoint", baseline, *out, *(part.format(**names) for part in options)) == 2
        assert message.format(**names) in error()
        assert clip.read_bytes() == before

    def test_noise_and_latents_go_out_and_come_in(self, baseline, tmp_path):
        noise, latents, other = (tmp_path / name for name in ("noise", "latents", "other"))
        common = ["--checkpoint", baseline, *QUICK, "--overwrite"]
        assert generate(*common, "--out", tmp_path / "a.mp4", "--save-noise", noise, "--save-latents", latents) == 0
        taken = safetensors.numpy.load_file(noise)
        assert taken["noise"].ndim == 4
        made = safetensors.numpy.load_file(latents)["latents"]
        assert made.shape[0] == 5
        again = [*common, "--out", tmp_path / "b.mp4", "--seed", "7", "--save-latents", other]
        assert generate(*again, "--noise", noise) == 0
        np.testing.assert_allclose(safetensors.numpy.load_file(other)["latents"], made, atol=1e-5)
        safetensors.numpy.save_file({"noise": -taken["noise"]}, noise)
        assert generate(*again, "--noise", noise) == 0
        assert np.abs(safetensors.numpy.load_file(other)["latents"] - made).max() > 0.1

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda noise: {"noise": noise.transpose(3, 0, 1, 2)}, "its channels are not last, as in PyTorch"),
            (lambda noise: {"noise": noise[1:]}, "and [4, 4, 8, 48] is needed"),
            (lambda noise: {"noise": noise * np.nan}, "noise is NaN or infinite"),
            (lambda noise: {"latents": noise}, "holds latents, but no tensor named noise"),
            (
                lambda noise: {"noise": noise, "fresh": noise[None]},
                "holds fresh noise, which the sampler euler does not",
            ),
        ],
    )
    def test_noise_that_does_not_fit(self, baseline, tmp_path, error, change, message):
        noise = tmp_path / "noise"
        changed = {name: np.ascontiguousarray(a) for name, a in change(np.ones((4, 4, 8, 48), np.float32)).items()}
        safetensors.numpy.save_file(changed, noise)
        arguments = ["--checkpoint", baseline, *QUICK, "--sampler", "euler", "--out", tmp_path / "a.mp4"]
        assert generate(*arguments, "--noise", noise) == 2
        assert message in error()


def test_a_comparison_with_another_checkpoint(baseline, tmp_path, capsys):
    out = tmp_path / "a.mp4"
    assert generate("--checkpoint", baseline, *QUICK, "--compare", baseline, "--out", out) == 0
    said = capsys.readouterr().err
    assert f"{tmp_path / 'a-compare.mp4'}: next to {baseline}; PSNR inf dB, SSIM 1.0000" in said
    assert len(read_clip(tmp_path / "a-compare.mp4", height=32, width=64)) == 5


def test_sampling_that_does_not_suit_the_checkpoint_is_said(baseline, tmp_path, capsys):
    few = ["--sampler", "few-step", "--steps", "1000", "500", "--out", tmp_path / "a.mp4"]
    assert generate("--checkpoint", baseline, *QUICK[:4], "--zoom", "1", *few) == 0
    said = capsys.readouterr().err
    assert "sampler few-step: 2 steps (1000 500), shift" in said
    assert "note: this checkpoint does not seem to be distilled" in said


def test_one_call_loads_what_generation_needs(baseline):
    """In Python: paths in, frames out."""
    config = GenerateConfig(checkpoint=str(baseline), mode="windows", frames=3, steps=1, condition="none")
    material = load_material(config)
    (frames,) = material.pipeline(material.text, **material.options())
    assert frames.shape == (3, 16, 32, 3)
