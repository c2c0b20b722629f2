"""Measures of videos against PyTorch and formulas of their own; LPIPS of random weights; VBench's scores."""

import contextlib
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from monarchrt.models.errors import UserError
from monarchrt.models.generate import load, make
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.train.cli import main
from monarchrt.train.evaluation import compare, metrics, vbench
from monarchrt.train.evaluation.config import EvaluateConfig
from monarchrt.train.evaluation.lpips import NETWORKS, read_lpips
from monarchrt.train.evaluation.vbench import (
    DIMENSIONS,
    QUALITY,
    SEMANTIC,
    VBenchConfig,
    read_tasks,
    scores,
    video_name,
    write_videos,
)
from monarchrt.train.evaluation.vmaf import find_ffmpeg, find_vmaf, vmaf, vmaf_by_pyav


@pytest.fixture(scope="module")
def clips():
    draw = np.random.default_rng(0)
    reference = draw.integers(0, 256, (3, 24, 20, 3), dtype=np.uint8)
    reference[1:] = (reference[1:] // 3 + 90).astype(np.uint8)
    noise = draw.integers(-20, 21, reference.shape)
    return np.clip(reference + noise, 0, 255).astype(np.uint8), reference


def pixels(video):
    return torch.as_tensor(video, dtype=torch.float64).permute(0, 3, 1, 2) / 255


def ssim(video, reference, window):
    """By its formula, with PyTorch's convolution, which pads with zeros."""
    kernel = (window[:, None] * window[None])[None, None].repeat(3, 1, 1, 1)
    mean = lambda x: F.conv2d(x, kernel, padding=5, groups=3)  # noqa: E731
    x, y = pixels(video), pixels(reference)
    mx, my = mean(x), mean(y)
    sx, sy, sxy = mean(x**2) - mx**2, mean(y**2) - my**2, mean(x * y) - mx * my
    values = (2 * mx * my + 1e-4) * (2 * sxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (sx + sy + 9e-4))
    return values.mean((1, 2, 3)).numpy()


def test_psnr_and_both_ssims(clips):
    errors = ((pixels(clips[0]) - pixels(clips[1])) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(metrics.psnr(*clips), (10 * torch.log10(1 / errors)).numpy(), rtol=1e-12)
    places = torch.arange(11, dtype=torch.float64) - 5
    gauss = torch.exp(-(places**2) / 4.5)
    np.testing.assert_allclose(metrics.ssim_gaussian(*clips), ssim(*clips, window=gauss / gauss.sum()), rtol=1e-9)
    np.testing.assert_allclose(
        metrics.ssim_box(*clips), ssim(*clips, window=torch.full((11,), 1 / 11, dtype=torch.float64)), rtol=1e-9
    )
    assert np.abs(metrics.ssim_box(*clips) - metrics.ssim_gaussian(*clips)).max() > 0.01
    assert metrics.psnr(clips[0], clips[0]).tolist() == [100.0] * 3
    with pytest.raises(ValueError, match=r"video has shape \(2, 24, 20, 3\) and reference \(3, 24, 20, 3\)"):
        metrics.psnr(clips[0][:2], clips[1])


def test_flicker_and_drift(clips):
    moved = np.abs(np.diff(clips[1].astype(int), axis=0)).mean()
    assert metrics.flicker(clips[1]) == pytest.approx(1 - moved / 255)
    with pytest.raises(ValueError, match="flicker needs at least two"):
        metrics.flicker(clips[1][:1])
    with pytest.raises(ValueError, match="are 4, and there are 3"):
        metrics.drift(np.zeros(3), [2, 2])


def test_the_paired_interval_covers():
    """Of means of 40 normal differences: 95% intervals miss the truth in about one of twenty."""
    draw = np.random.default_rng(1)
    missed = 0
    for number in range(100):
        low, high = metrics.paired_interval(draw.normal(0.3, 1, 40), draws=400, seed=number)
        missed += not low <= 0.3 <= high
    assert 1 <= missed <= 14
    values = np.arange(1001) / 1000  # of means that are normal: mean -+ 1.96 standard errors, or 0.674
    error = np.std(values) / np.sqrt(1001)
    for confidence, reach in ((0.95, 1.96), (0.5, 0.674)):
        low, high = metrics.paired_interval(values, confidence=confidence, draws=2000)
        assert (high - low) / 2 == pytest.approx(reach * error, rel=0.1)


class TestLPIPS:
    """Random weights in files as torchvision and the package lpips write them, against modules of PyTorch."""

    @pytest.fixture(scope="class", params=["alex", pytest.param("vgg", marks=pytest.mark.slow)])
    def network(self, request, tmp_path_factory):
        torch.manual_seed(0)
        conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
        if request.param == "alex":
            parts = [conv(3, 64, 11, 4, 2), relu(), pool(3, 2), conv(64, 192, 5, padding=2), relu(), pool(3, 2)]
            parts += [conv(192, 384, 3, padding=1), relu(), conv(384, 256, 3, padding=1), relu()]
            parts += [conv(256, 256, 3, padding=1), relu(), pool(3, 2)]
            taps, widths = [1, 4, 7, 9, 11], [64, 192, 384, 256, 256]
        else:
            parts, taps, before, widths = [], [], 3, [64, 128, 256, 512, 512]
            for stage, width in enumerate(widths):
                for _ in range(2 if stage < 2 else 3):
                    parts += [conv(before, width, 3, padding=1), relu()]
                    before = width
                taps.append(len(parts) - 1)
                parts.append(pool(2, 2))
        features = torch.nn.Sequential(*parts)
        folder = tmp_path_factory.mktemp("lpips")
        state = {f"features.{name}": value for name, value in features.state_dict().items()}
        torch.save(state | {"classifier.1.weight": torch.zeros(2, 2)}, folder / "net.pth")
        heads = [torch.rand(1, width, 1, 1) for width in widths]
        torch.save({f"lin{n}.model.1.weight": head for n, head in enumerate(heads)}, folder / "lin.pth")
        return request.param, features, taps, heads, folder

    def test_it_is_the_definition(self, network):
        name, features, taps, heads, folder = network
        video, reference = np.random.default_rng(0).integers(0, 256, (2, 2, 40, 36, 3), dtype=np.uint8)
        found = read_lpips(folder / "net.pth", folder / "lin.pth")
        assert found.network == name
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        expected = torch.zeros(2)
        both = [(2 * pixels(x).float() - 1 - shift[:, None, None]) / scale[:, None, None] for x in (video, reference)]
        with torch.no_grad():
            for number, part in enumerate(features[: taps[-1] + 1]):
                both = [part(x) for x in both]
                if number in taps:
                    a, b = (x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in both)
                    expected += F.conv2d((a - b) ** 2, heads[taps.index(number)]).mean((1, 2, 3))
        np.testing.assert_allclose(found(video, reference), expected.numpy(), rtol=2e-4)
        assert found(video, video).tolist() == [0.0, 0.0]
        smallest = {"alex": 31, "vgg": 16}[name]
        with pytest.raises(UserError, match=f"lpips: frames are 8 x 36, but {name} needs at least {smallest}"):
            found(video[:, :8], reference[:, :8])

    def test_files_that_do_not_fit(self, network, tmp_path):
        name, _, _, heads, folder = network
        state = torch.load(folder / "net.pth")
        for change in (
            {"features.0.bias": None},
            {"features.0.weight": torch.zeros(11)},
            {"features.0.bias": torch.zeros(3)},
        ):
            torch.save({key: x for key, x in (state | change).items() if x is not None}, tmp_path / "net.pth")
            with pytest.raises(UserError, match=r"nor its vgg16 .* with the shapes they have there"):
                read_lpips(tmp_path / "net.pth", folder / "lin.pth")
        for part, file in ((state, "net.pth"), (torch.load(folder / "lin.pth"), "lin.pth")):
            first = next(iter(part))
            damaged = part[first].clone()
            damaged.view(-1)[-1] = torch.nan  # one number
            torch.save(part | {first: damaged}, tmp_path / file)
            given = {"net.pth": folder / "net.pth", "lin.pth": folder / "lin.pth"} | {file: tmp_path / file}
            with pytest.raises(UserError, match=f"{file} is damaged: {first} has numbers that are not finite"):
                read_lpips(given["net.pth"], given["lin.pth"])
        with pytest.raises(UserError, match="is not a file; give torchvision's"):
            read_lpips(folder / "net.pth", tmp_path / "none.pth")
        with pytest.raises(UserError, match="holds neither torchvision's alexnet nor its vgg16"):
            read_lpips(folder / "lin.pth", folder / "lin.pth")
        other = {f"lin{n}.model.1.weight": torch.ones(1, 3, 1, 1) for n, _ in enumerate(heads)}
        torch.save(other, tmp_path / "other.pth")
        with pytest.raises(UserError, match=f"give the v0.1 file of {name}"):
            read_lpips(folder / "net.pth", tmp_path / "other.pth")
        assert name in NETWORKS


def test_vmaf_is_asked_of_the_video_first(clips, tmp_path):
    """A program in ffmpeg's place writes what it was asked, and of which files."""
    ffmpeg = tmp_path / "ffmpeg"
    ffmpeg.write_text(
        f"#!{sys.executable}\nimport json, sys\nfiles = [x for x in sys.argv if x.endswith('.mkv')]\n"
        "rows = [{'metrics': {'vmaf': float(x == 'video.mkv')}} for x in files]\n"
        "json.dump({'frames': rows}, open('log.json', 'w'))\n"
    )
    ffmpeg.chmod(0o755)
    assert vmaf(*clips, ffmpeg=ffmpeg) == [1.0, 0.0]  # the first of libvmaf's inputs is the distorted one
    with pytest.raises(UserError, match="vmaf: frames are 24 x 16, but libvmaf needs at least 17 pixels per side"):
        vmaf(*(clip[:, :, :16] for clip in clips), ffmpeg=ffmpeg)
    ffmpeg.write_text(f"#!{sys.executable}\nraise SystemExit(3)\n")
    with pytest.raises(UserError, match="did not compute VMAF: it ended with 3 and said nothing"):
        vmaf(*clips, ffmpeg=ffmpeg)


@pytest.mark.parametrize("given", [None, "ffmpeg"])
def test_vmaf_of_small_videos_is_left_out_unless_asked_for(clips, given, monkeypatch):
    monkeypatch.setattr(compare, "find_vmaf", lambda path: partial(vmaf, ffmpeg=path or Path("found")))
    config = EvaluateConfig(checkpoint="a", attention=("dense",), ffmpeg=given and Path(given))
    measure = compare._measures(config)["vmaf"]
    if given is None:
        assert measure(*(clip[:, :16] for clip in clips)) is None
    else:
        with pytest.raises(UserError, match="frames are 16 x 20"):
            measure(*(clip[:, :16] for clip in clips))


@pytest.fixture(scope="module")
def sharp_and_blurred():
    """Pictures of edges that move, and the same with neighbours averaged."""
    x, y = np.meshgrid(np.arange(96), np.arange(64))
    sharp = np.stack([np.where((x + y + 3 * t) // 8 % 2, 200, 50) for t in range(4)]).astype(np.uint8)
    sharp = np.repeat(sharp[..., None], 3, axis=-1)
    return sharp, ((sharp + np.roll(sharp.astype(int), 1, 2) + np.roll(sharp.astype(int), 2, 2)) // 3).astype(np.uint8)


@pytest.mark.skipif("libvmaf" not in av.filter.filters_available, reason="PyAV has no libvmaf here")
def test_vmaf(sharp_and_blurred):
    sharp, blurred = sharp_and_blurred
    judge: Any = find_vmaf()
    assert judge is vmaf_by_pyav
    others = [] if (ffmpeg := find_ffmpeg()) is None else [partial(vmaf, ffmpeg=ffmpeg)]
    same, lost, won = (np.array(judge(*pair)) for pair in ((sharp, sharp), (blurred, sharp), (sharp, blurred)))
    assert same.shape == lost.shape == (4,)
    assert same.min() > 90 > lost.max()
    assert won.mean() > lost.mean() + 10  # the second is what the first is judged by: sharper than that costs less
    for route in others:
        np.testing.assert_allclose(route(blurred, sharp), lost, atol=1.0)  # with another version of libvmaf


def test_vmaf_by_pyav_refuses_what_it_cannot_take(clips):
    with pytest.raises(UserError, match="vmaf: frames are 24 x 16, but libvmaf needs at least 17 pixels per side"):
        vmaf_by_pyav(*(clip[:, :, :16] for clip in clips))


def test_vmaf_where_pyav_has_no_libvmaf(monkeypatch):
    monkeypatch.setattr(av.filter, "filters_available", frozenset({"scale"}))
    monkeypatch.setattr("monarchrt.train.evaluation.vmaf.find_ffmpeg", lambda given: None)
    assert find_vmaf() is None
    monkeypatch.setattr("monarchrt.train.evaluation.vmaf.find_ffmpeg", lambda given: Path("found"))
    judge: Any = find_vmaf()
    assert judge.keywords == {"ffmpeg": Path("found")}


def test_an_ffmpeg_without_vmaf_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no libvmaf, or cannot be run; give --ffmpeg"):
        find_ffmpeg(tmp_path / "ffmpeg")
    with pytest.raises(UserError, match="has no libvmaf"):
        find_ffmpeg(type(tmp_path)(sys.executable))


# columns of the paper's Tables 9 to 12: dimensions in the order here, then quality, semantic and total; in thousandths
PAPER = {
    "9, dense": "959 960 990 985 650 680 653 946 859 966 872 776 580 205 244 265 844 804 836",
    "9, Monarch 95%": "954 956 991 984 640 672 747 949 855 968 884 776 575 202 245 266 846 805 838",
    "10, 4 steps, dense": "955 949 982 984 644 684 775 966 872 966 853 774 548 200 244 266 846 800 837",
    "10, 4 steps, VSA 90%": "975 948 979 977 576 634 803 957 814 910 930 798 509 220 234 254 828 793 821",
    "10, 4 steps, Monarch 95%": "952 957 991 985 624 664 744 950 850 934 874 739 563 199 236 261 843 788 832",
    "10, 50 steps, dense": "959 975 996 984 656 663 633 946 851 960 883 779 568 217 248 270 846 810 839",
    "10, 50 steps, VSA 90%": "927 973 996 979 644 619 619 921 791 966 872 735 515 218 243 264 827 785 819",
    "10, 50 steps, Monarch 95%": "955 974 996 984 653 659 597 930 862 972 879 795 569 217 248 269 841 812 835",
    "11, dense": "959 960 990 985 650 680 653 946 859 966 872 776 580 205 244 265 844 804 836",
    "11, SVG 85%": "855 935 972 976 398 608 097 026 004 084 848 022 000 206 035 047 715 214 615",
    "11, Radial 85%": "970 963 993 988 632 701 539 846 718 808 897 817 319 192 235 244 841 718 816",
    "11, top-k 85%": "942 935 985 981 595 675 806 809 558 748 916 683 213 199 224 234 834 658 799",
    "11, Monarch 90%": "949 954 986 983 643 698 753 963 878 960 880 829 563 196 241 264 847 808 839",
    "12, dense": "955 949 982 984 644 684 775 966 872 966 853 774 548 200 244 266 846 800 837",
    "12, SVG 85%": "901 949 976 972 526 532 853 524 357 900 733 376 231 213 202 218 792 563 746",
    "12, SVG2 85%": "946 949 986 986 623 654 742 921 741 952 860 669 537 201 238 264 837 765 823",
    "12, SVG2 90%": "934 945 985 984 598 625 742 896 655 928 865 654 510 205 234 260 824 743 808",
    "12, Radial 85%": "832 881 979 982 539 545 361 757 534 954 805 463 408 222 236 252 738 681 727",
    "12, Monarch 90%": "952 960 991 988 622 686 653 956 884 964 893 821 549 198 240 263 841 807 834",
}


@dataclasses.dataclass
class Planned:
    config: GenerateConfig


@dataclasses.dataclass
class Loaded:
    """As much of a material as is asked for."""

    plan: Planned
    pipeline: None = None
    text: None = None

    def options(self):
        return {"plan": self.plan}


class TestVBench:
    @pytest.mark.parametrize("name", PAPER)
    def test_the_papers_scores(self, name):
        *values, quality, semantic, total = (int(number) / 1000 for number in PAPER[name].split())
        found = scores(dict(zip(DIMENSIONS, values, strict=True))).scores
        assert found["quality"] == pytest.approx(quality, abs=1e-3)
        assert found["semantic"] == pytest.approx(semantic, abs=1e-3)
        assert found["total"] == pytest.approx(total, abs=1e-3)

    def test_what_is_missing_is_said(self, tmp_path, capsys):
        values = {name: [0.9, []] for name in QUALITY}
        (tmp_path / "a_eval_results.json").write_text(json.dumps(values))
        assert main(["evaluate", "scores", "--results", str(tmp_path)]) == 0
        captured = capsys.readouterr()
        assert (
            f"{tmp_path.name}: dimensions without results, whose scores are left out: {', '.join(SEMANTIC)}"
            in captured.err
        )
        assert "quality" in captured.out

    def test_columns_side_by_side(self, tmp_path, capsys):
        """Folders of one file or of two that complete each other; files count to their folder."""
        whole = {name: [0.5, []] for name in DIMENSIONS}
        for folder, files in (("a", [QUALITY, SEMANTIC]), ("b", [DIMENSIONS]), ("c/b", [["scene"]])):
            (tmp_path / folder).mkdir(parents=True)
            for number, names in enumerate(files):
                (tmp_path / folder / f"{number}_eval_results.json").write_text(json.dumps({n: whole[n] for n in names}))
        given = [str(tmp_path / "b"), *map(str, sorted((tmp_path / "a").iterdir()))]
        assert main(["evaluate", "scores", "--results", *given]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[1].replace("┃", "").split() == ["dimension", "or", "score", "b", "a"]
        rows = [line.replace("│", "").split() for line in lines[3:-1]]
        assert [row[0] for row in rows] == [*DIMENSIONS, "quality", "semantic", "total"]
        assert {tuple(row[1:]) for row in rows[:-3]} == {("0.5000", "0.5000")}
        assert all(first == second for _, first, second in rows)

        several = [str(tmp_path / "b"), str(tmp_path / "c" / "b")]
        assert main(["evaluate", "scores", "--json", "--results", *several]) == 0
        found = json.loads(capsys.readouterr().out)
        assert list(found) == [str(Path(path).resolve()) for path in several]  # two of one name
        one, other = found.values()
        assert one == {"dimensions": dict.fromkeys(DIMENSIONS, 0.5), **scores(one["dimensions"])._asdict()}
        assert other["dimensions"] == {"scene": 0.5}
        assert other["scores"] == dict.fromkeys(("quality", "semantic", "total"))
        assert other["missing"] == [name for name in DIMENSIONS if name != "scene"]

        (tmp_path / "b" / "1_eval_results.json").write_text(json.dumps({"scene": [0.25, []]}))
        assert main(["evaluate", "scores", "--results", *several]) == 2
        assert "scene is 0.25, and 0.5 in another file beside it; leave one of them, or give" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, "holds no *eval_results.json; give the folder"),
            ("{", "is not JSON"),
            ('{"beauty": [1]}', "'beauty' is not a dimension"),
            ('{"color": ["a"]}', "'color' is not a dimension with a number"),
            ("{}", "has no dimension"),
            ("[" * 100_000, "is not JSON"),
            (f'{{"color": [1{"0" * 400}]}}', "color is inf"),
            ('{"color": 65.2}', "color is 65.2, and VBench's values lie in [-1, 1]"),
            ("[]", "has no dimension"),
        ],
    )
    def test_bad_results(self, content, says, tmp_path, capsys):
        if content is not None:
            (tmp_path / "a_eval_results.json").write_text(content)
        assert main(["evaluate", "scores", "--results", str(tmp_path)]) == 2
        assert says in capsys.readouterr().err

    def test_prompts_and_names(self, tmp_path):
        path = tmp_path / "info.json"
        long = "a person " + "walks " * 30
        entries = [
            {"prompt_en": "a cat", "dimension": ["temporal_flickering"]},
            {"prompt_en": long, "dimension": ["color", "scene"]},
            {"prompt_en": "a cat", "dimension": ["scene"]},
        ]
        path.write_text(json.dumps(entries))
        assert read_tasks(path) == [("a cat", 5), (long, 5)]
        assert read_tasks(path, dimensions=("color",)) == [(long, 5)]
        assert read_tasks(path, still=True) == [("a cat", 25), (long, 5)]
        assert video_name(long, 4) == f"{long}-4.mp4"  # not cut at 100 characters
        with pytest.raises(UserError, match="has no prompt of the dimensions object_class"):
            read_tasks(path, dimensions=("object_class",))
        path.write_text(json.dumps([{"prompt_en": "a/b", "dimension": []}]))
        with pytest.raises(UserError, match="no file can have the name of the prompt 'a/b'"):
            read_tasks(path)
        path.write_text("[]")
        with pytest.raises(UserError, match="has no prompt"):
            read_tasks(path)
        path.write_text("[" * 100_000)
        with pytest.raises(UserError, match="is not JSON"):
            read_tasks(path)
        path.write_bytes(json.dumps(entries[:1]).encode("utf-16"))
        assert read_tasks(path) == [("a cat", 5)]

    @pytest.mark.parametrize("seed", [-1, 2**32 - 24])
    def test_seeds_that_do_not_reach(self, seed):
        with pytest.raises(UserError, match=rf"seed is {seed}; it must lie in \[0, 2\*\*32 - 25\]"):
            VBenchConfig(seed=seed)
        assert VBenchConfig(seed=2**32 - 25).seed == 2**32 - 25

    def test_each_part_makes_its_own(self, tmp_path, monkeypatch):
        """What is not there, each with a seed of its own; of three prompts, two of three parts."""
        path, out, made = tmp_path / "info.json", tmp_path / "out", []
        path.write_text(json.dumps([{"prompt_en": prompt, "dimension": ["scene"]} for prompt in "abc"]))
        out.mkdir()
        (out / "b-3.mp4").touch()

        monkeypatch.setattr(load, "load_material", lambda config: Loaded(plan=Planned(config=config)))
        monkeypatch.setattr(make, "make_video", lambda *_, plan: made.append(plan.config))
        for part, counts in (((1, 3), (4, 1)), ((2, 3), (5, 0))):
            config = VBenchConfig(full_info=path, checkpoint="wan", out=out, seed=7, part=part)
            assert write_videos(config) == counts
        asked = [(config.prompt, config.seed, config.out.name) for config in made]
        of_b = [("b", 7 + n, f"b-{n}.mp4") for n in (0, 1, 2, 4)]
        assert asked == of_b + [("c", 7 + n, f"c-{n}.mp4") for n in range(5)]
        other = VBenchConfig(full_info=path, checkpoint="wan", out=out, seed=7, attention="monarch")
        with pytest.raises(
            UserError, match=r"attention is 'monarch', but the set of videos in .* was started with None"
        ):
            write_videos(other)
        other = VBenchConfig(full_info=path, checkpoint="wan", out=out, seed=7, components=Path("wan14b"))
        with pytest.raises(
            UserError, match=r"components is 'wan14b', but the set of videos in .* was started with None"
        ):
            write_videos(other)

    @pytest.mark.parametrize("quiet", [False, True])
    def test_a_bar_of_all_videos(self, quiet, tmp_path, monkeypatch, capsys):
        """On a terminal, those that are there at once; no line for a prompt."""
        path, out, shown = tmp_path / "info.json", tmp_path / "out", []
        path.write_text(json.dumps([{"prompt_en": prompt, "dimension": ["scene"]} for prompt in "ab"]))
        out.mkdir()
        (out / "a-3.mp4").touch()

        @contextlib.contextmanager
        def bar(label, total, *, quiet):
            shown.append((label, total, quiet))
            yield lambda done=1, words=None: shown.append((done, words))

        monkeypatch.setattr(vbench, "progress", bar)
        monkeypatch.setattr(load, "load_material", lambda config: Loaded(plan=Planned(config=config)))
        monkeypatch.setattr(make, "make_video", lambda *_, plan: None)
        assert write_videos(VBenchConfig(full_info=path, checkpoint="wan", out=out, quiet=quiet)) == (9, 1)
        assert shown == [("videos", 10, quiet), (1, "a"), *4 * [(1, None)], (0, "b"), *5 * [(1, None)]]
        assert capsys.readouterr() == ("", "")

    def test_nothing_is_left_of_what_could_not_begin(self, tmp_path, monkeypatch):
        """So that the same folder takes the command once it is mended."""
        path, out = tmp_path / "info.json", tmp_path / "out"
        path.write_text(json.dumps([{"prompt_en": "a", "dimension": ["scene"]}]))

        def refuse(config):
            raise UserError("attention does not fit")

        monkeypatch.setattr(load, "load_material", refuse)
        config = VBenchConfig(full_info=path, checkpoint="wan", out=out, seed=7)
        with pytest.raises(UserError, match="does not fit"):
            write_videos(config)
        assert not out.exists()
        (tmp_path / "run" / "checkpoints").mkdir(parents=True)
        with pytest.raises(UserError, match="is a run folder, which takes no text; give one that takes prompts"):
            write_videos(dataclasses.replace(config, checkpoint=str(tmp_path / "run")))
