"""`monarchrt evaluate` on a run of one layer: numbers by hand, what goes on after a stop, and what is refused."""

import dataclasses
import json
import shutil
from typing import Any

import numpy as np
import pytest
from PIL import Image

from monarchrt.models.attention.notation import parse
from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.load import load_material
from monarchrt.models.media.metrics import fidelity
from monarchrt.train.cli import main
from monarchrt.train.evaluate import held_out_loss
from monarchrt.train.evaluation import compare, metrics
from monarchrt.train.evaluation.subject import open_subject, video_of

SETTINGS = ("monarch(tile=(3,2,4))", "top_k(keep=0.25)")
OPTIONS = ["--steps", "2", "--windows", "2", "--timesteps", "3", "--batch", "2", "--seeds", "1"]


@pytest.fixture(scope="module")
def evaluated(baseline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate") / "out"
    command = ["evaluate", "--checkpoint", str(baseline), "--attention", *SETTINGS, "--out", str(folder), *OPTIONS]
    assert main(command) == 0
    return folder, command


def test_the_report(evaluated, baseline):
    folder, _ = evaluated
    report = json.loads((folder / "report.json").read_text())
    reference, tiled, sparse = report["rows"]
    assert [row["setting"] for row in report["rows"]] == ["dense", *SETTINGS]
    assert sparse["density"] == {"asked": 0.25, "kept": 0.25, "visible": 0.25, "with_warm_up": 0.25}
    assert (reference["psnr"], reference["ssim_gaussian"], reference["latent_error"]) == (100.0, 1.0, 0.0)
    # the loss is the one that training measures, and the difference a mean of pairs
    subject = open_subject(str(baseline))
    model = subject.model.with_attention(parse(SETTINGS[0]))
    options: dict[str, Any] = dict(objective=subject.objective, windows=2, timesteps=3, batch=2)
    assert tiled["loss"] == pytest.approx(held_out_loss(model, subject.source, **options))
    assert tiled["loss_difference"] == pytest.approx(tiled["loss"] - reference["loss"])
    low, high = tiled["loss_interval"]
    assert low <= tiled["loss_difference"] <= high
    assert np.load(folder / "losses" / "1.npy").shape == (6,)
    with Image.open(folder / "report.png") as picture:
        assert picture.width > 1000


def test_another_clip_begins_only_what_begins_with_something(baseline, clip):
    """A network of whole clips is compared on another clip too."""
    whole = GenerateConfig(checkpoint=str(baseline), steps=1)
    assert video_of(whole, clip).initial is None
    windows = dataclasses.replace(whole, mode="windows", frames=5)
    assert video_of(windows, clip).plan.config.condition == str(clip)
    with pytest.raises(UserError, match=r"nowhere\.mp4 is not a file"):
        video_of(windows, clip.parent / "nowhere.mp4")


def test_the_video_is_that_of_generate(evaluated, baseline):
    folder, _ = evaluated
    with (
        np.load(folder / "samples" / "0-1" / "1.npz") as stored,
        np.load(folder / "samples" / "0-1" / "0.npz") as first,
    ):
        config = GenerateConfig(checkpoint=str(baseline), attention=SETTINGS[0], steps=2, seed=1)
        material = load_material(config)
        frames = np.concatenate(list(material.pipeline(material.text, **material.options())))
        np.testing.assert_array_equal(stored["frames"], frames)
        values = json.loads((folder / "samples" / "0-1" / "1.json").read_text())
        assert values["psnr"] == pytest.approx(fidelity(frames, first["frames"]).psnr, abs=1.5)  # mean of frames
        error = np.linalg.norm(stored["latents"] - first["latents"]) / np.linalg.norm(first["latents"])
        assert values["latent_error"] == pytest.approx(error, rel=1e-5)
        steps = list(values["steps"].values())
        assert len(steps) == 2
        assert steps[0] == 0.0 < steps[1]  # the same noise, and then not the same latents
    assert (folder / "samples" / "0-1" / "2.mp4").stat().st_size > 0


def test_what_a_video_begins_with_is_not_measured():
    """It is the same in both, and would count as 100 dB."""
    reference = np.zeros((3, 16, 16, 3), np.uint8)
    made = reference + np.array([0, 16, 64], np.uint8)[:, None, None, None]
    latents = np.ones((3, 2, 2, 4))
    rising = latents * np.array([1, 2, 3])[:, None, None, None]
    samples = [compare.Sample(*both, {}) for both in ((made, rising), (reference, latents))]
    values = compare.compare(*samples, blocks=[1, 1, 1], measures={"psnr": metrics.psnr}, given=1)
    each = metrics.psnr(made, reference)
    assert values["psnr"] == pytest.approx(each[1:].mean())
    assert values["drift"]["psnr"] == pytest.approx(each[1:].tolist())
    assert values["latent_error"] == pytest.approx(np.sqrt((1 + 4) / 2))
    assert values["flicker"] == pytest.approx(1 - (16 + 48) / 2 / 255)
    whole = compare.compare(*samples, blocks=[1, 2], measures={"psnr": metrics.psnr})
    assert whole["drift"]["psnr"] == pytest.approx([100.0, each[1:].mean()])


def test_videos_that_begin_with_the_clip(baseline, tmp_path):
    """Their first frame, the clip's, is not among what is measured."""
    options = {"checkpoint": baseline, "out": tmp_path / "out", "mode": "windows", "frames": 5, "steps": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert main(["evaluate", *words, "--windows", "0", "--attention", SETTINGS[1]]) == 0
    folder = tmp_path / "out" / "samples" / "0-0"
    values = json.loads((folder / "1.json").read_text())
    with np.load(folder / "0.npz") as dense, np.load(folder / "1.npz") as made:
        np.testing.assert_array_equal(dense["frames"][0], made["frames"][0])
        assert len(made["frames"]) == 5
        assert values["psnr"] == pytest.approx(metrics.psnr(made["frames"], dense["frames"])[1:].mean())
        assert len(values["drift"]["psnr"]) == 4


def test_it_goes_on(evaluated, tmp_path, monkeypatch, capsys):
    """What is there is not made again, and the numbers are the same."""
    folder, command = evaluated
    before = json.loads((folder / "report.json").read_text())
    other = tmp_path / "out"
    shutil.copytree(folder, other)
    (other / "samples" / "0-1" / "2.json").unlink()
    (other / "samples" / "0-1" / "2.npz").unlink()
    (other / "losses" / "2.npy").unlink()
    made, terms = [], []
    sample, loss = compare._sample, compare.loss_terms
    monkeypatch.setattr(compare, "_sample", lambda *a: made.append(str(a[1])) or sample(*a))
    monkeypatch.setattr(compare, "loss_terms", lambda *a: terms.append(str(a[1])) or loss(*a))
    again = [str(other) if word == str(folder) else word for word in command]
    assert main(again) == 2
    assert "holds an evaluation already; give --resume" in capsys.readouterr().err
    assert main([*again, "--resume"]) == 0
    assert made == ["dense", SETTINGS[1]]  # the reference comes of its file
    assert terms == [SETTINGS[1]]
    after = json.loads((other / "report.json").read_text())
    assert after["rows"] == before["rows"]
    assert main([*again[:-1], "3", "--resume"]) == 2
    assert "cannot resume: seeds is [3], but the evaluation" in capsys.readouterr().err


def test_fewer_held_out_examples_than_asked_for_are_said(baseline, tmp_path, capsys):
    options = ["--windows", "999", "--timesteps", "1", "--no-videos", "--attention", "dense", "--out", str(tmp_path)]
    assert main(["evaluate", "--checkpoint", str(baseline), *options]) == 0
    count = json.loads((tmp_path / "report.json").read_text())["examples"]
    assert count == len(np.load(tmp_path / "losses" / "0.npy")) < 999
    assert f"note: {count} examples are held out; the loss uses all of them instead of 999" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "no attention was given; give settings to compare"),
        ("--attention dense --windows 0 --no-videos", "there is nothing to measure"),
        ("--attention monarch(tile=(2,2,4))", "2 does not divide the 3 frames"),
        ("--attention sliding_tile(tile=(2,2,4))", "does not divide the grid (3, 2, 4); these do: 1, 3 frames"),
        ("--attention radial(keep=0.001,block=2)", "keep=0.001"),
        ("--attention nothing", "nothing"),
        ("--attention dense --prompts empty.txt", "prompts empty.txt has no prompt; write one on each line"),
        ("--attention dense --prompts none.txt", "prompts none.txt cannot be read"),
        ("--attention dense --lpips a.pth b.pth", "lpips: a.pth is not a file; give torchvision's"),
        ("--attention dense --ffmpeg none", "ffmpeg none has no libvmaf"),
        ("--attention dense --windows 0 --height 15", "height is 15, which is not a multiple of 8"),
        ("--attention dense --seeds", "seeds"),
        ("--attention dense --seeds 0 -1", "seeds has -1; each must lie in [0, 2**32), such as 0 1 2"),
        ("--attention dense --seeds 4294967296", "seeds has 4294967296; each must lie in [0, 2**32)"),
        ("--attention dense --seeds 1 2 1", "seeds has 1 twice; give each once"),
        ("--attention top_k(keep=0.5) top_k(keep=0.50)", "attention has top_k(keep=0.50) twice; give each once"),
        ("--attention dense --timesteps 1001", "timesteps is 1001; it must be at most 1000"),
        ("--attention dense --prompts one.txt", "is a run folder, which takes no text; leave it out"),
        (
            "--attention dense --lpips junk.pth",
            "--lpips cannot be read: input length 1 did",
        ),
        ("--attention dense --lpips junk.pth junk.pth", "lpips: junk.pth is not a zip archive"),
        ("--attention dense --features junk.pth", "features: junk.pth is not a zip archive"),
        ("--attention vsa(keep=0.01)", "vsa: keep=0.01 is out of reach of 1 cube of"),
    ],
)
def test_bad_input(words, says, baseline, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "one.txt").write_text("a cat\n")
    (tmp_path / "junk.pth").write_bytes(b"junk")
    assert main(["evaluate", "--checkpoint", str(baseline), "--out", str(tmp_path / "out"), *words.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert says in error
    assert not (tmp_path / "out").exists()  # so that the same command works once it is mended
