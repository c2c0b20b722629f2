"""Frechet and kernel distances against SciPy's root and sums over pairs; features against PyTorch; their report."""

import itertools
import json

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F

from monarchrt.models.errors import UserError
from monarchrt.models.media.video import write_mp4
from monarchrt.train.cli import main
from monarchrt.train.evaluation import compare, features, sets
from monarchrt.train.evaluation.distances import frechet_distance, kernel_distance
from monarchrt.train.evaluation.features import FeatureNetwork, read_features

MEAN, SCALE = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]


def drawn(n, channels, seed):
    """Correlated samples, as features are."""
    draw = np.random.default_rng(seed)
    mixed = draw.standard_normal((n, channels)) @ draw.standard_normal((channels, channels))
    return mixed + draw.standard_normal(channels)


class TestFrechet:
    def test_against_the_root_of_the_product(self):
        x, y = drawn(60, 7, 0), drawn(50, 7, 1)
        sx, sy = np.cov(x.T), np.cov(y.T)
        root = scipy.linalg.sqrtm(sx @ sy)
        expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(sx + sy - 2 * np.real(root))
        assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)
        assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
        assert frechet_distance(x.astype(np.float32), y.astype(np.float32)) == pytest.approx(expected, rel=1e-5)

    def test_channels_that_never_change(self):
        """Singular covariances, whose product's root scipy.linalg.sqrtm fails at: then only what varies counts."""
        x, y = drawn(40, 3, 0), drawn(40, 3, 1)
        still = np.full((40, 2), 5.0)
        wide = [np.concatenate([part, still, part[:, :1]], 1) for part in (x, y)]  # and one that is there twice
        alone = frechet_distance(np.concatenate([x, x[:, :1]], 1), np.concatenate([y, y[:, :1]], 1))
        assert frechet_distance(*wide) == pytest.approx(alone, rel=1e-9)
        assert frechet_distance(x + 1e6, y + 1e6) == pytest.approx(frechet_distance(x, y), rel=1e-6)

    def test_too_few(self):
        with pytest.raises(ValueError, match=r"y has 7 samples of 7 channels; a covariance .* needs 8 samples"):
            frechet_distance(drawn(8, 7, 0), drawn(7, 7, 1))
        with pytest.raises(ValueError, match=r"x has shape \(1, 2\) and y \(8, 2\)"):
            frechet_distance(drawn(1, 2, 0), drawn(8, 2, 1))


def pairs(x, y, keep):
    """The mean kernel over pairs, one by one."""
    return np.mean([
        (x[i] @ y[j] / x.shape[1] + 1) ** 3 for i, j in itertools.product(range(len(x)), range(len(y))) if keep(i, j)
    ])  # fmt: skip


class TestKernel:
    def test_against_sums_over_pairs(self):
        x, y = drawn(9, 4, 0), drawn(7, 4, 1)
        apart, all_of = (lambda i, j: i != j), (lambda i, j: True)
        expected = pairs(x, x, apart) + pairs(y, y, apart) - 2 * pairs(x, y, all_of)
        assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-12)

    def test_pairs_of_one_group_are_left_out(self):
        x, y = drawn(6, 4, 0), drawn(6, 4, 1)
        of = np.array([0, 0, 1, 1, 2, 2])
        apart = lambda i, j: of[i] != of[j]  # noqa: E731
        expected = pairs(x, x, apart) + pairs(y, y, apart) - 2 * pairs(x, y, apart)
        assert kernel_distance(x, y, x_groups=of, y_groups=of) == pytest.approx(expected, rel=1e-12)
        assert kernel_distance(x, x, x_groups=of, y_groups=of) == pytest.approx(0.0, abs=1e-12)
        with pytest.raises(ValueError, match="all samples are of one group"):
            kernel_distance(x, y, x_groups=0 * of, y_groups=0 * of)
        with pytest.raises(ValueError, match="go together"):
            kernel_distance(x, y, x_groups=of)

    def test_it_has_no_bias(self):
        """Of sets of one distribution, it is above and below 0, and subsets leave it where it is."""
        draw = np.random.default_rng(0)
        found = [kernel_distance(*draw.standard_normal((2, 12, 5))) for _ in range(150)]
        assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(150)
        x, y = draw.standard_normal((2, 300, 5))
        y = y[:280] * 1.3
        parts = [kernel_distance(x, y, subsets=60, size=80, seed=seed) for seed in (0, 0, 1)]
        assert parts[0] == parts[1] != parts[2]
        assert parts[0] == pytest.approx(kernel_distance(x, y), rel=0.25)


class TestNetworks:
    @pytest.mark.slow
    def test_lite0_is_the_definition(self, tmp_path):
        """Random weights as the package's file has them, through PyTorch's operations; TensorFlow's SAME padding."""
        draw = np.random.default_rng(0)
        state, blocks = {}, []

        def convolution(name, out, into, kernel):
            size = (into * kernel**2) ** -0.5
            state[f"{name}.weight"] = torch.tensor(size * draw.standard_normal((out, into, kernel, kernel)))

        def norm(name, width):
            for key, low in (("weight", 0.5), ("bias", -0.5), ("running_mean", -0.5), ("running_var", 0.5)):
                state[f"{name}.{key}"] = torch.tensor(draw.uniform(low, 1.5, width))
            state[f"{name}.num_batches_tracked"] = torch.tensor(3)

        convolution("_conv_stem", 32, 3, 3)
        norm("_bn0", 32)
        stages = [(1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80)]
        stages += [(3, 5, 1, 6, 112), (4, 5, 2, 6, 192), (1, 3, 1, 6, 320)]
        into = 32
        for repeats, kernel, stride, expand, out in stages:
            for n in range(repeats):
                name, wide = f"_blocks.{len(blocks)}", into * expand
                if expand > 1:
                    convolution(f"{name}._expand_conv", wide, into, 1)
                    norm(f"{name}._bn0", wide)
                convolution(f"{name}._depthwise_conv", wide, 1, kernel)
                norm(f"{name}._bn1", wide)
                convolution(f"{name}._project_conv", out, wide, 1)
                norm(f"{name}._bn2", out)
                blocks.append((name, expand, stride if n == 0 else 1, into == out and n > 0, n == repeats - 1))
                into = out
        convolution("_conv_head", 1280, 320, 1)
        norm("_bn1", 1280)
        state["_fc.weight"] = torch.zeros(3, 1280)
        torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=False)  # as the package's file is

        def layer(x, name, bn, stride=1):
            weight = state[f"{name}.weight"]
            sides = [max(0, (-(-side // stride) - 1) * stride + weight.shape[-1] - side) for side in x.shape[2:]]
            x = F.pad(x, [sides[1] // 2, sides[1] - sides[1] // 2, sides[0] // 2, sides[0] - sides[0] // 2])
            x = F.conv2d(x, weight, stride=stride, groups=x.shape[1] if weight.shape[1] == 1 else 1)
            mean, variance = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
            return F.batch_norm(x, mean, variance, state[f"{bn}.weight"], state[f"{bn}.bias"], eps=1e-3)

        video = draw.integers(0, 256, (1, 64, 112, 3), dtype=np.uint8)
        found = read_features(tmp_path / "a.pth")
        assert (found.name, found.widths) == ("lite0", (16, 24, 40, 80, 112, 192, 320, 1280))
        x = torch.tensor(video).permute(0, 3, 1, 2).double() / 255
        x = F.interpolate(x, size=(224, 392), mode="bilinear", align_corners=False)
        x = (x - MEAN) / SCALE
        x, expected = F.relu6(layer(x, "_conv_stem", "_bn0", 2)), []
        for name, expand, stride, skip, ends in blocks:
            y = F.relu6(layer(x, f"{name}._expand_conv", f"{name}._bn0")) if expand > 1 else x
            y = F.relu6(layer(y, f"{name}._depthwise_conv", f"{name}._bn1", stride))
            y = layer(y, f"{name}._project_conv", f"{name}._bn2")
            x = x + y if skip else y
            if ends:
                expected.append(x)
        expected.append(F.relu6(layer(x, "_conv_head", "_bn1")))
        for mine, theirs in zip(found(video), expected, strict=True):
            np.testing.assert_allclose(mine, theirs.mean((2, 3)).numpy(), rtol=2e-4, atol=2e-4)
        for name, other in (("_bn1.bias", None), ("_blocks.3._expand_conv.weight", torch.zeros(144, 7, 1, 1))):
            kept = {key: x for key, x in (state | {name: other}).items() if x is not None}
            torch.save(kept, tmp_path / "b.pth", _use_new_zipfile_serialization=False)
            with pytest.raises(UserError, match=r"b.pth is not a supported network; give Efficient"):
                read_features(tmp_path / "b.pth")

    def test_alexnet_sees_what_lpips_looks_at(self, tmp_path, monkeypatch):
        monkeypatch.setattr(features, "SIDE", 40)
        torch.manual_seed(0)
        conv, relu, pool = torch.nn.Conv2d, torch.nn.ReLU, torch.nn.MaxPool2d
        parts = [conv(3, 64, 11, 4, 2), relu(), pool(3, 2), conv(64, 192, 5, padding=2), relu(), pool(3, 2)]
        parts += [conv(192, 384, 3, padding=1), relu(), conv(384, 256, 3, padding=1), relu()]
        parts += [conv(256, 256, 3, padding=1), relu()]
        network = torch.nn.Sequential(*parts)
        state = {f"features.{name}": value for name, value in network.state_dict().items()}
        torch.save(state, tmp_path / "alex.pth")
        video = np.random.default_rng(0).integers(0, 256, (2, 40, 48, 3), dtype=np.uint8)
        found = read_features(tmp_path / "alex.pth")
        x = torch.tensor(video).permute(0, 3, 1, 2).float() / 255
        x = (x - MEAN) / SCALE
        expected = []
        with torch.no_grad():
            for number, part in enumerate(network):
                x = part(x)
                if number in (1, 4, 7, 9, 11):
                    expected.append(x.mean((2, 3)).numpy())
        for mine, theirs in zip(found(video), expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
        assert found.widths == tuple(x.shape[1] for x in expected)

    def test_files_that_are_none(self, tmp_path):
        with pytest.raises(UserError, match=r"none\.pth is not a file; give EfficientNet-Lite0's weights"):
            read_features(tmp_path / "none.pth")
        torch.save({"_conv_stem.weight": torch.zeros(2)}, tmp_path / "a.pth")
        with pytest.raises(UserError, match=r"a\.pth is not a supported network; give"):
            read_features(tmp_path / "a.pth")


class Colours(FeatureNetwork):
    """Instead of a network: mean colours of a frame, and of 8 strips."""

    def __call__(self, video):
        strips = video.reshape(len(video), 8, -1).astype(np.float64).mean(2)
        return [video.mean((1, 2)), strips]


COLOURS = Colours("colours", (3, 8), {})


class TestSets:
    def test_the_depth_follows_from_the_frames(self):
        assert sets.plan_sets(COLOURS, videos=2, frames=4).name == "colours_3"
        assert sets.plan_sets(COLOURS, videos=3, frames=3).name == "colours_8"
        with pytest.raises(UserError, match="each setting makes 1; give two --seeds at least"):
            sets.plan_sets(COLOURS, videos=1, frames=80)
        with pytest.raises(UserError, match=r"2 videos of 1 frames are 2 frames.*needs more than 3; make 4 videos"):
            sets.plan_sets(COLOURS, videos=2, frames=1)

    def test_real_videos_are_cut_into_clips(self, tmp_path):
        draw = np.random.default_rng(0)
        for name, frames in (("a", 9), ("b", 13)):
            write_mp4(tmp_path / f"{name}.mp4", draw.integers(0, 256, (frames, 16, 24, 3), dtype=np.uint8), fps=8.0)
        plan = sets.Sets(COLOURS, 0, videos=3, frames=4)
        clips = sets.real_windows(tmp_path, plan, height=16, width=24)
        assert [clip.shape for clip in clips] == [(4, 16, 24, 3)] * 5  # two of 9 frames, three of 13
        with pytest.raises(UserError, match=r"a\.mp4 makes 2 clips of 4 frames, and distances in colours_8 need 3"):
            sets.real_windows(tmp_path / "a.mp4", sets.Sets(COLOURS, 1, videos=3, frames=4), height=16, width=24)


def test_evaluate_reports_them(baseline, tmp_path, monkeypatch, capsys):
    """Against the reference's videos, which are of the same noise, or real ones; kept, and not computed again."""
    seen = []

    class Counted(Colours):
        def __call__(self, video):
            seen.append(len(video))
            return super().__call__(video)

    def sample(material, setting, seed, path):
        draw = np.random.default_rng([seed, len(str(setting))])
        frames = draw.integers(0, 256, (3, 16, 24, 3), dtype=np.uint8)
        np.savez(path, frames=frames)
        return compare.Sample(frames, np.ones((3, 2, 2, 1)), {})

    monkeypatch.setattr(compare, "_sample", sample)  # nothing is compiled
    monkeypatch.setattr(compare, "read_features", lambda path: Counted("colours", (3, 8), {}))
    folder = tmp_path / "out"
    command = ["evaluate", "--checkpoint", str(baseline), "--attention", "top_k(keep=0.25)", "--steps", "1"]
    command += ["--windows", "0", "--seeds", "0", "1", "2", "--features", "net.pth", "--out", str(folder)]
    assert main(command) == 0
    first = json.loads((folder / "report.json").read_text())["rows"]
    videos = [
        [np.load(folder / "samples" / f"0-{seed}" / f"{index}.npz")["frames"] for seed in range(3)] for index in (0, 1)
    ]
    frames = len(videos[0][0])
    both = [np.concatenate([Colours("", (3, 8), {})(video)[1] for video in of]) for of in videos]
    of = np.repeat(np.arange(3), frames)
    both.reverse()  # the setting's, and the reference's
    assert first[1]["frechet_colours_8"] == pytest.approx(frechet_distance(*both))
    assert first[1]["kernel_colours_8"] == pytest.approx(kernel_distance(*both, x_groups=of, y_groups=of))
    changes = [np.concatenate([np.diff(x, axis=0) for x in np.split(part, 3)]) for part in both]
    of_changes = np.repeat(np.arange(3), frames - 1)
    expected = kernel_distance(*changes, x_groups=of_changes, y_groups=of_changes)
    assert first[1]["kernel_colours_8_change"] == pytest.approx(expected)
    assert "frechet_colours_8_change" not in first[1]  # 6 changes are too few for 8 channels
    assert "frechet_colours_8" not in first[0]
    assert len(seen) == 6
    assert main([*command, "--resume"]) == 0
    assert len(seen) == 6
    assert json.loads((folder / "report.json").read_text())["rows"] == first
    assert "frechet_colours_8" in capsys.readouterr().out
    real = np.random.default_rng(0).integers(0, 256, (8 * frames, *videos[0][0].shape[1:]), dtype=np.uint8)
    write_mp4(tmp_path / "real.mp4", real, fps=8.0)
    again = [str(tmp_path / "real") if word == str(folder) else word for word in command]
    assert main([*again, "--real", str(tmp_path / "real.mp4")]) == 0
    rows = json.loads((tmp_path / "real" / "report.json").read_text())["rows"]
    assert all(row["frechet_colours_8"] > 0 for row in rows)  # the reference's too
    for words, says in (
        (["--real", "a.mp4"], "real is a.mp4, which is for distances in features; give --features too"),
        (["--features", "a.pth", "--no-videos"], "features are of videos, and videos is false"),
    ):
        bad = ["evaluate", "--checkpoint", str(baseline), "--attention", "dense", "--out", str(tmp_path / "x"), *words]
        assert main(bad) == 2
        assert says in capsys.readouterr().err
    at = again.index("--seeds")
    assert main([*again[:at], "--seeds", "4", *again[at + 4 : -1], str(tmp_path / "y")]) == 2
    assert "each setting makes 1; give two --seeds at least" in capsys.readouterr().err
    assert not (tmp_path / "y").exists()
