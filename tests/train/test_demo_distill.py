"""`monarchrt demo --distill`: how its clips are compared, what it says of them, and, slowly, the whole of it."""

import dataclasses
import io
import json
from pathlib import Path
from typing import ClassVar

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from monarchrt.models.errors import UserError
from monarchrt.train.cli import demo, main
from monarchrt.train.data import ClipWindows
from monarchrt.train.demo import distil
from monarchrt.train.demo.config import DemoConfig, dense_run
from monarchrt.train.demo.distances import energy_distance
from monarchrt.train.demo.distil import Row, sampled_with, verdicts
from monarchrt.train.demo.few_steps import distillations
from monarchrt.train.demo.folder import claim_demo, write_settings
from monarchrt.train.demo.run import run_demo
from monarchrt.train.loop import TrainResult
from monarchrt.train.model import build_model
from monarchrt.train.objectives.settings import DMDConfig
from monarchrt.train.run_folder import identity, write_config
from monarchrt.train.sources import open_source
from monarchrt.train.state import create_role, create_state, make_training, split_model

from .conftest import contents
from .three_seeds import SEEDS, conditions, demo_of

SMALL = ("--steps", "2", "--finetune-steps", "2", "--height", "16", "--width", "24", "--tile", "2", "4", "6")
FEW = ("--distill", "--distill-steps", "3", "--clips", "8")


AVERAGE = "average of the parameters, decay 0.98"


def row(distance, drift=0.0, parameters=AVERAGE):
    return Row(
        label="", steps=4, stored=1.0, distance=distance, to_clip=0.0, frames=[0.0, drift], motion=1.0,
        parameters=parameters,
    )  # fmt: skip


class TestEnergyDistance:
    def test_of_two_small_sets_by_hand(self):
        """Points 0, 2 and 1, 5 on a line: 2 * (1 + 5 + 1 + 3) / 4 - 2 - 4, over 4."""
        assert energy_distance(np.array([[0.0], [2.0]]), np.array([[1.0], [5.0]])) == pytest.approx(-1 / 4)

    def test_it_is_zero_for_one_distribution_and_grows_with_what_differs(self):
        rng = np.random.default_rng(0)
        one, other = rng.standard_normal((2, 64, 2, 3, 4))
        same = energy_distance(one, other)
        blurred = [energy_distance(factor * one, other) for factor in (0.9, 0.5)]
        moved = [energy_distance(one + by, other) for by in (0.5, 1.0)]
        assert abs(same) < 0.02
        assert same < blurred[0] < blurred[1]
        assert same < moved[0] < moved[1]


def test_what_is_said_follows_the_numbers():
    """Each claim beside its control; one that does not hold is said not to."""
    rows = {"dense-euler": row(0.4), "dense": row(0.3), "swapped": row(0.5), "dmd": row(0.2), "dmd-dense": row(0.19),
            "causal": row(0.6, 0.3), "self-forcing": row(0.7, -0.1)}  # fmt: skip
    said = verdicts(rows)
    assert [line.partition(":")[0] for line in said] == ["holds", "holds", "holds", "does not hold", "holds"]
    assert "(0.2000 against 0.3000)" in said[0]
    assert "(0.7000 against 0.6000)" in said[3]
    assert all(AVERAGE in said[n] for n in (0, 3))
    rows |= {"causal": row(0.6, -0.3), "self-forcing": row(0.5, 0.1)}  # whose last frame was better than the first
    assert [line.partition(":")[0] for line in verdicts(rows)[3:]] == ["holds", "does not hold"]


def test_which_parameters_are_said_follows_the_networks():
    rows = {"one": row(0.1), "other": row(0.2)}
    assert sampled_with(rows) == AVERAGE
    rows["other"] = row(0.2, parameters="latest parameters")
    assert sampled_with(rows) == f"one: {AVERAGE}; other: latest parameters"


class TestSampled:
    """What is sampled, without training or sampling: networks whose parameters and averages differ."""

    @pytest.fixture
    def sampled(self, tmp_path, monkeypatch):
        """What `run_distillation` measures: {name: (parameter of the network, what is said of it)}; what it prints and
        stores."""
        config = DemoConfig(folder=tmp_path, distill=True)
        runs = distillations(config)
        values = {run.run.folder.name: 10.0 * n for n, run in enumerate(runs.values(), 1)}
        seen = {}

        model = build_model(dense_run(config).model, channels=4, seed=0)
        graph, params, frozen = split_model(model)
        filled = lambda value: jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params)  # noqa: E731

        class Recorded:
            rows: ClassVar = {}

            def __init__(self, *_, **__):
                pass

            def add(self, name, label, network, sampling, *, parameters, **_):
                value = float(jax.tree.leaves(split_model(network)[1])[0].ravel()[0])
                seen[name] = value, parameters
                self.rows[name] = row(value, parameters=parameters)
                return self.rows[name]

            def film(self, path):
                return path

        def trained(run):
            value, training = values[run.run.folder.name], make_training(run.optimizer, updates=1)
            role = create_role(filled(value), frozen, training)
            if role.average is not None:
                role = dataclasses.replace(role, average=filled(value + 1))
            state = create_state({"student": role}, seed=0)
            graphs = {"student": graph}
            return TrainResult(state=state, graphs=graphs, held_out={}, exported="student", folder=run.run.folder)

        monkeypatch.setattr(distil, "Measured", Recorded)
        monkeypatch.setattr(distil, "draw_curves", lambda path, *_: path)
        source, printed = open_source(dense_run(config).data, text_shape=(1, 8)), io.StringIO()
        assert isinstance(source, ClipWindows)
        distil.run_distillation(config, runs, model, source, trained, Console(file=printed, width=400), begun=0.0)
        return seen, printed.getvalue(), json.loads((tmp_path / "distillation.json").read_text())

    def test_it_is_the_average_of_every_network(self, sampled):
        """A student's parameters jump from one update to the next; what is claimed is claimed of their average."""
        seen, printed, stored = sampled
        wanted = {"dmd": 11.0, "dmd-dense": 21.0, "causal": 31.0, "self-forcing": 41.0}
        assert {name: seen[name] for name in wanted} == {name: (value, AVERAGE) for name, value in wanted.items()}
        assert f"sampled with the {AVERAGE}" in printed
        assert {network["parameters"] for network in stored["networks"].values()} == {AVERAGE}


def test_how_long_each_is_trained(tmp_path):
    """DMD as many steps as are given, Self-Forcing a third; its last is the one that is evaluated."""
    for given, forced in ((450, 150), (2, 1)):
        runs = distillations(DemoConfig(folder=tmp_path, distill=True, distill_steps=given))
        steps = {name: run.run.steps for name, run in runs.items()}
        assert steps == {"dmd": given, "dmd-dense": given, "causal": 250, "self-forcing": forced}
        assert all(run.run.eval_every == run.run.steps for run in runs.values())


def test_the_dense_student_differs_in_attention_alone(tmp_path):
    runs = distillations(DemoConfig(folder=tmp_path, distill=True))
    one, other = (identity(runs[name], fingerprint="") for name in ("dmd", "dmd-dense"))
    assert {name for name in one if one[name] != other.get(name)} == {"attention", "tile"}
    assert runs["self-forcing"].run.init_from == runs["causal"].run.folder
    assert runs["self-forcing"].origin("teacher") == runs["dmd"].origin("teacher") == tmp_path / "dense"
    assert all(run.role("teacher").model.attention == "dense" for name, run in runs.items() if name != "causal")


@pytest.mark.parametrize("options", [(), ("--resume",)])
@pytest.mark.parametrize("distils", [True, False])
def test_neither_demo_is_begun_in_the_folder_of_the_other(distils, options, tmp_path, capsys):
    """A demo that is done, all of whose runs are there: none of them is said to be gone, nor to be gone on with."""
    config = DemoConfig(folder=tmp_path / "demo", distill=distils)
    write_settings(config)
    (config.folder / ("distillation.json" if distils else "results.json")).write_text("{}")
    before = contents(config.folder)
    assert main(["demo", "--folder", str(config.folder), "--no-distill" if distils else "--distill", *options]) == 2
    there, here = ("with", "without") if distils else ("without", "with")
    assert capsys.readouterr().err == (
        f"error: folder {config.folder} is that of a demo {there} --distill, and this one is {here} --distill; give "
        f"another --folder\n"
    )
    assert contents(config.folder) == before


@pytest.mark.parametrize(
    ("options", "folder"),
    [
        ((), "runs/demo"),
        (("--distill",), "runs/distil"),
        (("--distill", "--no-distill"), "runs/demo"),
        (("--distill", "--folder", "other"), "other"),
        (("--distill", "--resume"), "runs/distil"),
        (("--resume",), "runs/demo"),
    ],
)
def test_each_demo_has_a_folder_of_its_own(options, folder, tmp_path, monkeypatch):
    claimed = []

    def claim(config):
        claimed.append(config)
        raise UserError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "claim_demo", claim)
    for name in ("demo", "distil"):
        write_settings(DemoConfig(folder=Path("runs") / name, distill=name == "distil", seed=7))
    assert main(["demo", *options]) == 2
    assert str(claimed[0].folder) == folder
    assert claimed[0].seed == (7 if "--resume" in options else 0)


def test_that_of_another_version_is_not_gone_on_with(tmp_path, capsys):
    """Whose student was updated at every second step; it is said before anything is computed, and nothing changes."""
    config = DemoConfig(folder=tmp_path / "demo", distill=True)
    write_settings(config)
    run = distillations(config)["dmd"]
    run.run.folder.mkdir()
    resume = ["demo", "--folder", str(config.folder), "--resume"]
    write_config(dataclasses.replace(run, objective=DMDConfig(shift=3.0, student_every=2)), latents=(4, 8, 14))
    (run.run.folder / "checkpoints" / "300").mkdir(parents=True)
    before = contents(config.folder)
    assert main(resume) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"dmd/ of the demo in {config.folder} was started by another version (student_every 2, now 4); give" in said
    assert contents(config.folder) == before
    write_config(run, latents=(4, 8, 14))
    claim_demo(dataclasses.replace(config, resume=True))  # of this one, it is


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_what_it_leaves(tmp_path, capsys):
    """All runs, a table, a picture, a film, numbers; gone on with, nothing is made otherwise; it does not become the
    other demo."""
    folder = tmp_path / "demo"
    arguments = ["demo", "--folder", str(folder), *SMALL, *FEW]
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "self-forcing" in printed.lower()
    assert "hold" in printed
    values = json.loads((folder / "distillation.json").read_text())
    names = ["teacher", "dense-euler", "dense", "swapped", "dmd", "dmd-dense", "causal", "self-forcing"]
    assert list(values["networks"]) == names
    assert f"sampled with the {AVERAGE}" in printed
    for network in values["networks"].values():
        assert network["parameters"] == AVERAGE
        assert np.isfinite([network["distance"], network["to_clip"], network["drift"], network["motion"]]).all()
        assert len(network["frames"]) == 4
    assert len({network["distance"] for network in values["networks"].values()}) == len(names)
    assert len(values["claims"]) == 5
    with av.open(str(folder / "students.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) >= 8 * 4
    assert (folder / "distillation.png").stat().st_size > 10_000
    logs = {path: path.read_bytes() for path in folder.rglob("log.jsonl")}
    assert {path.parent.name for path in logs} == {"dense", "dmd", "dmd-dense", "causal", "self-forcing"}
    assert main(["demo", "--folder", str(folder), "--resume"]) == 0
    assert json.loads((folder / "distillation.json").read_text())["networks"] == values["networks"]
    assert {path: path.read_bytes() for path in folder.rglob("log.jsonl")} == logs
    before = contents(folder)
    assert main(["demo", "--folder", str(folder), "--resume", "--no-distill"]) == 2
    assert f"{folder} is that of a demo with --distill, and this one is without" in capsys.readouterr().err
    assert main(["demo", "--folder", str(folder), "--resume", "--clips", "9"]) == 2
    assert "clips is 9, but the demo in" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)  # three demos
def test_what_holds_for_three_seeds(tmp_path):
    """On clips of noise that no training saw, by a distance that no training minimises, of the averages of the
    parameters. The spread is what three seeds differ by, in the network that is claimed to be better and the one that
    it is compared with. The demo's settings were chosen with other seeds, 3, 4 and 5.

    Measured and stored, but not asked for, as it does not hold in miniature: that the causal student drifts less than
    before, over four frames, and that any student is nearer than the dense teacher in four steps of Euler's method."""
    stored = []
    for seed in SEEDS:
        config = demo_of(tmp_path, seed)
        run_demo(config, quiet=True)
        stored.append(json.loads((config.folder / "distillation.json").read_text()))
    shown = {name: [round(one["networks"][name]["distance"], 4) for one in stored] for name in stored[0]["networks"]}
    found = conditions(stored)
    assert all(found.values()), (found, shown)


# distances on the seeds, stored share and motion of the first
MEASURED = {
    "swapped": (0.178, 0.225, 0.217), "dmd": (0.026, 0.044, 0.058), "dmd-dense": (0.028, 0.049, 0.091),
    "causal": (0.027, 0.041, 0.028), "self-forcing": (0.012, 0.014, 0.019),
}  # fmt: skip
MOTION = {"swapped": 0.6, "dmd": 0.95, "dmd-dense": 0.9, "causal": 0.65, "self-forcing": 0.8}


@pytest.mark.parametrize(
    ("changed", "figure", "values", "fails"),
    [
        (None, "distance", (), []),
        ("swapped", "distance", (0.178, 0.13, 0.217), ["each Monarch student nearer by 3", "the mean gain"]),
        ("swapped", "distance", (0.178, 0.35, 0.217), ["the mean gain"]),
        ("dmd-dense", "distance", (0.028, 0.049, 0.020), ["within the spread"]),
        ("dmd", "stored", (0.1, 0.1, 0.2), ["11%"]),
        ("self-forcing", "distance", (0.012, 0.042, 0.019), ["each causal student nearer"]),
        ("dmd", "motion", (0.95, 1.5, 0.95), ["dmd brings back"]),
        ("self-forcing", "motion", (0.8, 0.8, 0.6), ["self-forcing brings back"]),
    ],
)
def test_what_is_asked_of_three_seeds_can_fail(changed, figure, values, fails):
    """By what was measured all of it holds; each part fails by itself."""
    stored = [
        {
            "networks": {
                name: {"distance": of[n], "stored": 0.1, "motion": MOTION[name]} for name, of in MEASURED.items()
            }
        }
        for n in range(3)
    ]
    for one, value in zip(stored, values, strict=False):
        one["networks"][changed][figure] = value
    found = conditions(stored)
    assert len(found) == 7
    wrong = [what for what, holds in found.items() if not holds]
    assert len(wrong) == len(fails)
    assert all(part in what for part, what in zip(fails, wrong, strict=True))
