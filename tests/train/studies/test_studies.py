"""Studies: the approximations against forms of their own, and the three commands on a run of seconds."""

import itertools
import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from monarch_jax import MonarchSpec
from monarchrt.models.errors import UserError
from monarchrt.train.cli import main
from monarchrt.train.studies import maps, mass, pictures, tiles
from monarchrt.train.studies.approximations import (
    TOP_K,
    dense_map,
    error_of,
    low_rank,
    misaligned,
    monarch_projection,
    share_for_mass,
    tile_order,
    tiles_of,
)
from monarchrt.train.studies.config import TilesConfig
from monarchrt.train.studies.maps import equation_1, factored
from monarchrt.train.studies.partial import Partial
from tests.untyped import there


@pytest.fixture(scope="module")
def scores():
    return equation_1((2, 4, 3), seed=3)


@pytest.fixture(scope="module")
def attention(scores):
    return dense_map(scores.query, scores.key, scale=1.0)


def test_readings_of_top_k(attention):
    """Against loops: entries of rows, rows that sum to 1, and entries of the whole map."""
    kept, renormalised, whole = (reading(attention, 0.25) for reading in TOP_K.values())
    count = 6
    for row in range(24):
        largest = sorted(attention[row], reverse=True)[:count]
        assert sorted(kept[row][kept[row] > 0], reverse=True) == pytest.approx(largest)
    np.testing.assert_allclose(renormalised.sum(1), 1, rtol=1e-6)
    assert (whole > 0).sum() == (kept > 0).sum() == 144
    assert (TOP_K["top-k, entries kept"](attention, 0.2) > 0).sum(1).tolist() == [5] * 24  # rounded up
    assert whole[whole > 0].min() >= attention[whole == 0].max()
    assert error_of(whole, attention).mse <= error_of(kept, attention).mse < error_of(renormalised, attention).mse


def test_low_rank_is_the_best_of_its_numbers(attention):
    made = there(low_rank(np.linalg.svd(attention), 0.3))
    assert np.linalg.matrix_rank(np.asarray(made), tol=1e-5) == 3
    values = torch.linalg.svdvals(torch.as_tensor(attention, dtype=torch.float64)).numpy()
    assert error_of(made, attention).mse == pytest.approx((values[3:] ** 2).sum() / 24**2, rel=1e-4)
    assert low_rank(np.linalg.svd(attention), 0.05) is None


@pytest.mark.parametrize(("tile", "blocks"), [((2, 4, 3), "fh,w"), ((1, 2, 3), "h,fw"), ((2, 2, 1), "hw,f")])
def test_projection(scores, attention, tile, blocks):
    """The best rank 1 of every slice, slice by slice in PyTorch; never further off than factors of as many numbers."""
    spec = MonarchSpec(grid=(2, 4, 3), tile=tile, blocks=blocks)
    made = monarch_projection(attention, spec)
    letters = dict(zip("fhw", range(3), strict=True))
    place = np.stack(np.meshgrid(*map(np.arange, (2, 4, 3)), indexing="ij"), -1).reshape(-1, 3)

    def numbers(dims):
        inside = place % np.array(tile)
        out = np.zeros(len(place), int)
        for letter in dims:
            out = out * tile[letters[letter]] + inside[:, letters[letter]]
        return out

    rows, columns = map(numbers, blocks.split(","))
    of_tile = np.ravel_multi_index(tuple((place // np.array(tile)).T), np.array((2, 4, 3)) // np.array(tile))
    expected = np.zeros_like(attention)
    for query_tile, key_tile in itertools.product(range(of_tile.max() + 1), repeat=2):
        for j, k in itertools.product(range(columns.max() + 1), range(rows.max() + 1)):
            i = np.flatnonzero((of_tile == query_tile) & (columns == j))
            other = np.flatnonzero((of_tile == key_tile) & (rows == k))
            part = torch.as_tensor(attention[np.ix_(i, other)], dtype=torch.float64)
            left, values, right = torch.linalg.svd(part)
            expected[np.ix_(i, other)] = (values[0] * torch.outer(left[:, 0], right[0])).numpy()
    np.testing.assert_allclose(made, expected, atol=1e-6)
    if blocks == "fh,w":
        factors = factored(scores, spec.grid, tile, 2)
        assert error_of(made, attention).mse <= error_of(factors, attention).mse
    assert sorted(tile_order(spec).ravel()) == list(range(24))


def test_aligned_blocks_keep_what_separates_and_others_do_not():
    """Paper, Section 4.1: without semantic entries and noise, an aligned map is exact."""
    scores = equation_1((2, 4, 3), pairs=0, noise=0.0)
    attention = dense_map(scores.query, scores.key, scale=1.0)
    for tile in tiles_of((2, 4, 3)):
        assert (
            error_of(monarch_projection(attention, MonarchSpec(grid=(2, 4, 3), tile=tile)), attention).relative < 1e-5
        )
    assert misaligned((2, 4, 3)) == [(12, 2), (6, 4), (4, 6), (3, 8)]
    for rows, columns in misaligned((2, 4, 3)):
        made = monarch_projection(attention, MonarchSpec(grid=(1, rows, columns)))
        assert error_of(made, attention).relative > 0.05


def test_share_for_mass():
    draw = np.random.default_rng(0)
    query, key = draw.standard_normal((2, 40, 8)).astype(np.float32)
    attention = torch.softmax(torch.as_tensor(query @ key.T / 8**0.5, dtype=torch.float64), 1)
    total = [int((torch.sort(row, descending=True).values.cumsum(0) < 0.8).sum()) + 1 for row in attention]
    assert share_for_mass(query, key, 0.8, rows=7) == pytest.approx(np.mean(total) / 40)
    assert share_for_mass(query, key, 1.0) == 1.0


class TestCommands:
    """On a run of one layer and 96 tokens."""

    @pytest.mark.slow
    def test_map(self, baseline, tmp_path, capsys):
        options = [
            "--levels",
            "0.5",
            "--grid",
            "1",
            "2",
            "2",
            "--crop",
            "1",
            "2",
            "2",
            "--steps",
            "1",
            "--densities",
            "0.3",
            "1",
        ]
        command = ["study", "map", "--checkpoint", str(baseline), "--out", str(tmp_path), "--heads", "1", *options]
        assert main(command) == 0
        assert "top-k, rows renormalised" in capsys.readouterr().out
        result = json.loads((tmp_path / "map.json").read_text())
        assert [item["name"] for item in result["maps"]] == ["equation 1", "layer 0, head 1, sigma 0.5, example 0"]
        methods = {point["method"] for point in result["means"]}
        assert {*TOP_K, "low rank", "Monarch, T=1", "tiled Monarch, projection"} <= methods
        assert all(np.isfinite(point["mse"]) for point in result["points"])
        with Image.open(tmp_path / "map.png") as picture:
            assert picture.width > 600
        assert main(command) == 2
        assert f"error: out {tmp_path} has map.json already; give another --out, or --ov" in capsys.readouterr().err

    def test_mass(self, baseline, tmp_path, capsys):
        command = ["study", "mass", "--checkpoint", str(baseline), "--out", str(tmp_path), "--sample-steps", "2"]
        assert main(command) == 0
        assert "layer 0, head 0" in capsys.readouterr().out
        result = json.loads((tmp_path / "mass.json").read_text())
        assert all(0 < share <= 1 for values in result["shares"].values() for share in values)
        assert result["blocks"] == [0]

    def test_a_block_that_was_given_has_no_share(self, baseline, tmp_path, capsys):
        """The clip's first frames are block 0, and the first that is made is block 1."""
        options = ["--sample-steps", "1", "--mode", "autoregressive", "--frames", "6", "--quiet"]
        assert main(["study", "mass", "--checkpoint", str(baseline), "--out", str(tmp_path), *options]) == 0
        assert "block 1" in (printed := capsys.readouterr().out)
        assert "block 0" not in printed
        assert json.loads((tmp_path / "mass.json").read_text())["blocks"] == [1]

    def test_mass_that_was_stopped_goes_on(self, baseline, tmp_path, monkeypatch, capsys):
        """Blocks that were counted are not counted again, and numbers are those of a study that was not stopped."""
        command = ["study", "mass", "--checkpoint", str(baseline), "--sample-steps", "2", "--quiet"]
        command += ["--mode", "windows", "--frames", "5", "--out"]
        counted = []

        def count(query, *_):  # heads of a network that hardly trained need as many keys
            return float(np.abs(query).sum())

        monkeypatch.setattr(mass, "share_for_mass", count)
        assert main([*command, str(tmp_path / "whole")]) == 0

        def stop(query, *rest):
            counted.append(query.tobytes())
            if len(counted) == 2:
                raise KeyboardInterrupt
            return count(query, *rest)

        monkeypatch.setattr(mass, "share_for_mass", stop)
        command.append(str(tmp_path / "out"))
        assert main(command) == 130
        assert main(command) == 2
        assert "holds a study that was stopped; give --resume to continue it" in capsys.readouterr().err
        assert main([*command, "--resume", "--mass", "0.9"]) == 2
        assert "cannot resume: mass is 0.9, but the study in" in capsys.readouterr().err
        assert main([*command, "--resume"]) == 0
        assert len(set(counted)) == len(counted) - 1
        assert counted[1] == counted[2]
        whole, mine = (json.loads((tmp_path / name / "mass.json").read_text()) for name in ("whole", "out"))
        assert mine == whole
        assert len(set(itertools.chain(*whole["shares"].values()))) == 4  # two heads, two blocks
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mass.json", "mass.png"]

    @pytest.mark.slow
    def test_tiles(self, baseline, tmp_path, capsys):
        options = ["--levels", "0.5", "--tiles", "3,2,4", "1,2,4", "--videos", "1", "--sample-steps", "2"]
        assert main(["study", "tiles", "--checkpoint", str(baseline), "--out", str(tmp_path), *options]) == 0
        assert f"monarchrt generate --checkpoint {baseline} --tile 3 2 4" in capsys.readouterr().err
        first, second = json.loads((tmp_path / "tiles.json").read_text())["points"]
        assert (first["label"], second["label"]) == ("3,2,4", "1,2,4")
        assert first["time"] < second["time"]
        assert first["density"] == pytest.approx(1 / 6 + 1 / 4)
        assert first["error"] > 0
        assert first["psnr"] > 5
        assert (first["video_front"], "video_front" in second) == (True, False)
        with Image.open(tmp_path / "tiles.png") as picture:
            assert picture.width > 600

    @pytest.mark.slow
    def test_tiles_that_were_stopped_go_on(self, baseline, tmp_path, monkeypatch, capsys):
        """What was measured is not measured again, and the numbers are those of a study that was not stopped."""
        options = ["--checkpoint", str(baseline), "--levels", "0.5", "--tiles", "3,2,4", "1,2,4", "--videos", "1"]
        options += ["--sample-steps", "2", "--quiet", "--out"]
        assert main(["study", "tiles", *options, str(tmp_path / "whole")]) == 0
        attend, tried = tiles.Layers.attend, []

        def stop(layers, setting):
            tried.append(str(setting))
            if len(tried) == 3:
                raise KeyboardInterrupt
            return attend(layers, setting)

        monkeypatch.setattr(tiles.Layers, "attend", stop)
        command = ["study", "tiles", *options, str(tmp_path / "out")]
        assert main(command) == 130
        assert main(command) == 2
        assert "holds a study that was stopped; give --resume to continue it" in capsys.readouterr().err
        assert main([*("0.6" if word == "0.5" else word for word in command), "--resume"]) == 2
        assert "cannot resume: levels is [0.6], but the study in" in capsys.readouterr().err
        assert main([*command, "--resume"]) == 0
        assert tried[3:] == ["dense", tried[2]]
        whole, mine = (json.loads((tmp_path / name / "tiles.json").read_text()) for name in ("whole", "out"))
        assert mine == whole
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["tiles.json", "tiles.png"]


def test_what_a_video_begins_with_is_not_measured():
    """Four latents of four frames each but the first, two given: frames 5 to 12, latents 2 and 3."""
    frames, latents = np.full((13, 4, 4, 3), 100, np.uint8), np.ones((1, 4, 2, 2, 3))
    other, further = frames.copy(), latents.copy()
    other[:5], other[5:9], other[9:] = 0, 110, 120  # in the given ones too
    further[:, :2], further[:, 2] = 7.0, 1.5
    found = tiles.apart((other, further), (frames, latents), given=2)
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / np.array([100, 400])).mean())
    assert found["latent_error"] == pytest.approx(np.sqrt(0.25 / 2))
    assert tiles.apart((frames, latents), (frames, latents)) == {"psnr": 100.0, "latent_error": 0.0}


def test_both_fronts_are_printed_and_drawn(tmp_path, monkeypatch, capsys):
    """A setting that is behind by its layers' error and not by its video has its command too; the picture has a line
    for each front, and names what is on it."""
    errors, decibels = {"a": 0.4, "b": 0.5, "c": 0.2, "d": 0.3}, {"a": 20.0, "b": 26.0, "d": 25.0}
    points = [
        {"label": name, "time": place + 1.0, "density": 0.1, "error": error, "command": f"command {name}"}
        | ({"psnr": decibels[name]} if name in decibels else {"no_video": "why not"})
        for place, (name, error) in enumerate(errors.items())
    ]
    tiles.mark_front(points)
    tiles.mark_video_front(points)
    monkeypatch.setattr(tiles, "study_tiles", lambda config: {"points": points, "unit": "unit"})
    assert main(["study", "tiles", "--checkpoint", "run", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    rows = [line.strip("│").split("│") for line in (said.out + said.err).splitlines() if line.startswith("│")]
    marks = {label.strip(): mark.strip() for mark, label, *_ in rows}
    assert marks == {"a": "*+", "b": "+", "c": "*", "d": ""}
    assert [line.split()[-1] for line in said.err.splitlines() if "command" in line] == ["a", "b", "c"]
    assert "c: no video: why not" in said.err
    assert "; +: likewise for time and PSNR of the videos. To generate" in said.err
    drawn = []
    monkeypatch.setattr(pictures, "_saved", lambda figure, path: drawn.append(figure) or path)
    pictures.draw_front(tmp_path / "a.png", points, unit="unit")
    lines = [
        [line.get_xydata().tolist() for line in axis.lines if line.get_label() == "Pareto front"]
        for axis in drawn[0].axes
    ]
    assert lines == [[[[1, 0.4], [3, 0.2]]], [[[1, 20], [2, 26]]]]
    assert [[text.get_text() for text in axis.texts] for axis in drawn[0].axes] == [["a", "c"], ["a", "b"]]


def test_more_videos_than_the_front_has(tmp_path, monkeypatch):
    """Those of the front, then the fastest others."""
    points = [{"setting": str(n), "label": str(n), "front": n in (0, 3)} for n in range(5)]
    monkeypatch.setattr(tiles, "video_material", lambda config: None)
    asked: list[str] = []
    monkeypatch.setattr(Partial, "of", lambda self, name, make: asked.append(name) or {})
    partial = Partial(tmp_path / "part.json", {}, resume=False)
    for count, chosen in ((1, [0]), (2, [0, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3, 4])):
        asked.clear()
        tiles._add_videos(points, TilesConfig(videos=count, quiet=True), partial)
        assert sorted(asked) == [f"video of {n}" for n in chosen]


def test_maps_that_were_stopped_go_on(tmp_path, monkeypatch, capsys):
    """Two maps of one name, as those of two levels that are written alike, stay apart."""
    monkeypatch.setattr(maps, "open_subject", lambda *_, **__: None)
    monkeypatch.setattr(maps, "captured_scores", lambda *_: [equation_1((1, 2, 2), seed=n) for n in (1, 2)])
    command = ["study", "map", "--checkpoint", "run", "--grid", "1", "2", "2", "--quiet", "--out"]

    def approximate(scores, exact, config):
        for method, reading in TOP_K.items():
            yield maps.Point(scores.name, method, "0.3", 0.3, error_of(reading(exact, 0.3), exact))

    monkeypatch.setattr(maps, "approximations", approximate)
    assert main([*command, str(tmp_path / "whole")]) == 0
    studied = []

    def stop(scores, *rest):
        studied.append(scores.query.tobytes())
        if len(studied) == 3:
            raise KeyboardInterrupt
        return approximate(scores, *rest)

    monkeypatch.setattr(maps, "approximations", stop)
    command.append(str(tmp_path / "out"))
    assert main(command) == 130
    assert main([*command, "--resume", "--steps", "2"]) == 2
    assert "cannot resume: steps is [2], but the study in" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert studied[3:] == studied[2:3]
    whole, mine = (json.loads((tmp_path / name / "map.json").read_text()) for name in ("whole", "out"))
    assert mine == whole
    assert len({point["mse"] for point in whole["points"]}) == 9
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["map.json", "map.png", "structure.png"]


class TestPartial:
    SETTINGS: ClassVar = {"levels": [0.5], "out": "a", "resume": False}

    def test_it_goes_on(self, tmp_path):
        path, measured = tmp_path / "part.json", []
        first = Partial(path, self.SETTINGS, resume=False)
        assert first.of("a", lambda: (1.5, 2)) == (1.5, 2)
        again = Partial(path, self.SETTINGS | {"out": "b", "resume": True}, resume=True)
        assert again.of("a", lambda: measured.append("a")) == [1.5, 2]
        assert again.of("b", lambda: 3) == 3
        again.done()
        assert not measured
        assert not path.exists()

    def test_what_it_refuses(self, tmp_path):
        path = tmp_path / "part.json"
        Partial(path, self.SETTINGS, resume=False).of("a", lambda: 1)
        with pytest.raises(UserError, match="give --resume to continue it, or --overwrite"):
            Partial(path, self.SETTINGS, resume=False)
        with pytest.raises(UserError, match=r"cannot resume: levels is \[0.6\], but the study .* with \[0.5\]"):
            Partial(path, {"levels": [0.6]}, resume=True)
        assert Partial(path, self.SETTINGS, resume=False, overwrite=True).of("a", lambda: 2) == 2
        for text, says in (("{", "is damaged"), ("{}", "is not of a study")):
            path.write_text(text)
            with pytest.raises(UserError, match=says):
                Partial(path, self.SETTINGS, resume=True)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", None),
        ("shape", "study 'shape' is unknown; choose from map, mass, tiles"),
        ("map --layers 0", "layers, heads and crop are of captured maps; give --checkpoint too"),
        ("map --densities 0 0.1", "densities has 0; each must be above 0 and at most 1"),
        ("map --grid 21 30 52", "a map of 32760 tokens (21, 30, 52) has 1.1 billion entries; give --grid"),
        ("map --levels 1.5", "levels has 1.5"),
        ("map --seed -1", "seed is -1; it must lie in [0, 2**32)"),
        ("map --seed 4294967296", "seed is 4294967296; it must lie in [0, 2**32)"),
        ("mass --checkpoint run --seed 4294967296", "seed is 4294967296; it must lie in [0, 2**32)"),
        ("tiles --checkpoint run --seed -1", "seed is -1; it must lie in [0, 2**32)"),
        ("map --windows 0", "windows is 0; it must be at least 1"),
        ("tiles", "no checkpoint was given; give a run folder"),
        ("mass --mass 2", "mass has 2; each must be above 0 and at most 1"),
        ("mass --checkpoint nowhere", "nowhere"),
    ],
)
def test_bad_input(words, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["study", *words.split()]) == 2
    assert not list(tmp_path.iterdir())
    if says is not None:
        error = capsys.readouterr().err
        assert says in error
        assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("map --layers 3", "layers has 3, but the network has 1 layers; use 0 to 0"),
        ("map --heads 7", "heads has 7, but the network has 2 heads; use 0 to 1"),
        ("map --crop 4 2 4", "crop is (4, 2, 4), but an example has 3 frames of tokens (grid (3, 2, 4))"),
        ("map --windows 99", "examples are held out; use at most"),
        ("tiles --tiles 2,2,4", "2 does not divide the 3 frames"),
        ("tiles --tiles 3x4x8", "tiles has '3x4x8'; write frames,rows,columns, such as 3,30,52"),
        ("tiles --layouts wh,f", "layouts has 'wh,f'; choose from"),
        ("tiles --most 0.01", "all tiles of the token grid (3, 2, 4) have a larger density; give a larger one"),
        ("mass --step 99 --sample-steps 2", "step is 99, but the sampler has 2 steps; use 0 to 1"),
        ("map --latents nowhere", "latents nowhere is not a folder"),
    ],
)
def test_bad_input_for_a_checkpoint(words, says, baseline, tmp_path, capsys):
    assert main(["study", *words.split(), "--checkpoint", str(baseline), "--out", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]
