"""The benchmarks' options and reports; what they measure needs a GPU."""

import importlib.util
import json
import os
import pathlib
import runpy
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import MonarchSpec, monarch_factors
from monarchrt.models.wan import wan_config
from monarchrt.train.objectives.registry import objective_names, settings_class
from monarchrt.train.studies.approximations import dense_map, error_of

FOLDER = pathlib.Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Loads a benchmark and gives a call of its main with options; results go to tmp_path/results."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)  # as for a script: one benchmark may import another

    def call(name, *options, **replaced):
        spec: Any = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        for attribute, value in replaced.items():
            setattr(module, attribute, value)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", "results", *options])
        module.main()

    return call


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("attention", [], "there is no GPU; --small"),
        ("attention", ["--small", "--implementations", "mosaik"], "invalid choice: 'mosaik'"),
        ("attention", ["--rows", "360p"], "invalid choice: '360p'"),
        ("attention", ["--small", "--published", "missing.py"], "missing.py is not a file"),
        ("attention", ["--small", "--published-backward"], "needs --published"),
        ("model", [], "there is no GPU"),
        ("model", ["--small", "--repeats", "0"], "--repeats 0 must be at least 1"),
        ("model", ["--small", "--implementation", "mosaik"], "invalid choice: 'mosaik'"),
        ("sizes", ["--row", "480p (h,w)", "--work", "forward"], "there is no GPU"),
        ("sizes", ["--row", "360p", "--work", "forward"], "invalid choice: '360p'"),
        ("sizes", ["--row", "480p (h,w)", "--work", "backward", "--rounds", "0"], "--rounds 0 must be at least 1"),
        ("sizes", ["--row", "480p (h,w)", "--work", "decode", "--change", "{"], "--change: Expecting property name"),
        ("sizes", ["--row", "480p (h,w)", "--work", "decode", "--change", '{"ring": 1}'], "argument 'ring'"),
        (
            "sizes",
            ["--row", "480p (h,w)", "--work", "backward", "--change", '{"keys": {"ring": 1}}'],
            "ring=1 is below",
        ),
        ("generate", [], "there is no GPU"),
        ("rollout", [], "there is no GPU"),
        ("rollout", ["--tiny", "--layers", "0"], "--layers 0 must be at least 1"),
        ("decode", [], "there is no GPU"),
        ("generate", ["--tiny", "--repeats", "0"], "--repeats 0 must be at least 1"),
        ("generate", ["--tiny", "--attention", "dens"], "'dens' is not a kind of attention; kinds: dense, monarch"),
        ("model", ["--small", "--attention", "top_k(keep=2)"], "top_k: keep=2"),
        ("scale", ["--meshes", "data=64"], "mesh data=64 needs more devices than there are, "),
        ("scale", ["--meshes", "rows=2"], "mesh is 'rows=2', which has an axis 'rows'"),
        ("scale", ["--meshes", "heads=5"], "mesh is heads=5, but the network has 12 attention heads"),
        ("scale", ["--attention", "dens"], "'dens' is not a kind of attention"),
        ("scale", ["--steps", "0"], "--steps 0 must be at least 1"),
        ("finetuning", ["--steps", "0"], "--steps 0 must be at least 1"),
        ("finetuning", ["--attention", "dens"], "--attention dens: attention='dens': 'dens' is not a kind"),
        ("finetuning", ["--attention", "monarch(tile=(4,{h},5))"], "5 does not divide the 28"),
        ("finetuning", ["--clips", "none.mp4"], "--clips none.mp4 is not a file"),
        ("claims", ["--parts", "ae"], "--parts ae has e; parts are a, b, c, d, and v"),
        ("claims", ["--steps", "0"], "--steps 0 must be at least 1"),
        ("claims", ["--demos", "none"], "--demos none has no dense/checkpoints; give the folder of a demo"),
        ("claims", ["--redraw"], "--out results has no claims.json to draw"),
        ("distill", ["--small", "--attention", "monarch 95"], "a name: dense, monarch 95%, monarch 97%"),
        ("stages", [], "there is no GPU"),
        ("distill", ["--small", "--mesh", "heads=5"], "--mesh heads=5: "),
        ("distill", ["--small", "--mesh", "fsdp=two"], "--mesh fsdp=two: "),
        ("distill", ["--small", "--mesh", "fsdp=64"], "--mesh fsdp=64: "),
        ("distill", [], "there is no GPU"),
        ("stages", ["--small", "--stages", "sampling"], "invalid choice: 'sampling'"),
        ("stages", ["--small", "--seconds", "0"], "--seconds 0.0 must be more than 0"),
        ("stages", ["--small", "--last", "4"], "--last one of 0 to 3"),
        ("distill", ["--published", "missing"], "--published is missing, which has no model/dmd.py; give a checkout"),
    ],
)
def test_options_that_cannot_be_used_end_in_one_line(run, capsys, tmp_path, name, options, said):
    with pytest.raises(SystemExit) as stop:
        run(name, *options)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if "def main(" in path.read_text())


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help_of_every_benchmark(run, capsys, path):
    with pytest.raises(SystemExit) as stop:
        run(path.stem, "--help")
    assert stop.value.code == 0
    assert f"{path.stem}.py [-h]" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["finetune_wan", "stream_client"])
def test_help_of_examples_with_arguments(monkeypatch, name):
    path = FOLDER.parent / "examples" / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit, match=f"python examples/{name}.py"):
        runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize("frames", ["0", "30"])
def test_a_number_of_frames_that_does_not_fit_is_refused_before_anything_runs(run, frames):
    def check(args):
        raise AssertionError("something ran")

    with pytest.raises(SystemExit, match=f"error: frames is {frames}"):
        run("generate", "--tiny", "--frames", frames, check=check)


def test_a_whole_clip_in_four_steps(run):
    """The paper's Table 7."""
    plans = []

    def check(args, places):
        module: Any = sys.modules["benchmark_generate"]
        plans.append(module.plan_of("dense", wan_config("tiny"), module.TINY, args))
        raise SystemExit

    with pytest.raises(SystemExit):
        run("generate", "--tiny", "--mode", "bidirectional", "--attention", "dense", check=check)
    assert plans[0].config.mode == "bidirectional"
    assert plans[0].settings.table().steps == 4


def test_stored_reports_are_printed_and_plotted(run, capsys, tmp_path):
    paths = sorted(map(str, (FOLDER / "h200").glob("attention_*.json")))
    again = json.loads(pathlib.Path(paths[0]).read_text())
    for row in again["rows"]:
        row["implementations"]["mosaic"]["ms"] += 1
    (tmp_path / "again.json").write_text(json.dumps(again))
    paths.append(str(tmp_path / "again.json"))
    run("attention", "--results", *paths)
    rows = [row for path in paths for row in json.loads(pathlib.Path(path).read_text())["rows"]]
    last = {(row["row"], row["work"]): row for row in rows}
    assert len(last) < len(rows)  # several reports have a row: the last one's is shown
    printed = capsys.readouterr().out
    assert printed.count("floors") == len(last)
    for row in last.values():
        assert all(f"{name:10} {result['ms']:8.3f} ms" in printed for name, result in row["implementations"].items())
    assert (tmp_path / "results" / "attention.png").stat().st_size > 10_000


def test_sizes_are_timed_only_where_the_results_stay(run, monkeypatch, capsys, tmp_path):
    def call(work, config):
        if config.left.blocks == 1:
            raise ValueError("too few blocks")
        more = jnp.nan if config.chunk_bytes == 5 else 0
        return lambda q, k, v: {"out": q * (2 if config.left.stages == 3 else 1), "lse": k + more}

    changes = [
        '{"left": {"key_block": 32}}',
        '{"left": {"stages": 3}}',
        '{"chunk_bytes": 5}',
        '{"left": {"blocks": 1}}',
    ]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    row = types.SimpleNamespace(name="tiny", grid=(7, 30, 52), tile_frames=1, decode_frames=3, heads=1, head_dim=128)
    options = ("--row", "tiny", "--work", "decode", "--rounds", "1", "--change", *changes)
    with pytest.raises(SystemExit) as stop:
        run("sizes", *options, ROWS=(row,), call=call)
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("not timed") for line in lines] == [False, False, False, True, True, False]
    assert "the same bits" in lines[2]
    assert "ValueError: too few blocks" in lines[5]
    results = json.loads((tmp_path / "results" / "sizes.json").read_text())["results"]
    assert ["ms" in result for result in results] == [True, True, False, False, False]


@pytest.mark.parametrize("text", [None, "{", "[]", '{"device": "a", "rows": []}'])
def test_a_report_that_is_none_is_named(run, tmp_path, text):
    path = tmp_path / "report.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=r"error: report\.json is not an attention\.json of this script"):
        run("attention", "--results", path.name)
    assert not (tmp_path / "results").exists()


def test_what_was_measured_is_kept_when_a_later_measurement_fails(run, tmp_path):
    def measure(row, work, *rest, **options):
        if work == "decode":
            raise KeyboardInterrupt
        return {"row": row.name, "work": work, "floor_flops_ms": 1.0, "floor_bytes_ms": 1.0, "implementations": {}}

    replaced = {"gate": lambda *row: {"out": 0.0}, "ceilings": lambda small: {}, "measure": measure}
    with pytest.raises(KeyboardInterrupt):
        run("attention", "--small", "--implementations", "xla", **replaced)
    report = json.loads((tmp_path / "results" / "attention.json").read_text())
    assert [row["work"] for row in report["rows"]] == ["forward"]


def test_one_row_of_the_table_can_be_measured_alone(run, monkeypatch, tmp_path):
    def measure(row, work, *rest, **options):
        return {"row": row.name, "work": work, "floor_flops_ms": 1.0, "floor_bytes_ms": 1.0, "implementations": {}}

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    replaced = {"gate": lambda *row: {"out": 0.0}, "ceilings": lambda small: {}, "measure": measure}
    run("attention", "--rows", "720p (3h,w)", **replaced)
    report = json.loads((tmp_path / "results" / "attention.json").read_text())
    assert {row["row"] for row in report["rows"]} == {"720p (3h,w)"}


def test_a_sweep_times_what_it_says(monkeypatch):
    """Settings are read while tracing: each candidate is traced, and one whose program is another's is not timed."""
    monkeypatch.syspath_prepend(FOLDER)
    spec: Any = importlib.util.spec_from_file_location("benchmark_sparse", FOLDER / "sparse.py")
    sparse = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sparse)
    monkeypatch.setattr(sparse, "clocked", lambda *rest: 1.0)
    setting = {"stages": 2}

    def like_a_kernel(x):
        return x * jnp.full((2,), setting["stages"], x.dtype)[:1] / setting["stages"]

    programs, given = set(), (jnp.ones(4),)
    _, right = sparse.candidate(like_a_kernel, given, None, programs)
    setting["stages"] = 3
    assert sparse.candidate(like_a_kernel, given, right, programs)[0] == 1.0
    assert len(programs) == 2
    with pytest.raises(ValueError, match="the same program as with other settings"):
        sparse.candidate(like_a_kernel, given, right, programs)
    with pytest.raises(ValueError, match="other results, by"):
        sparse.candidate(lambda x: 2 * x, given, right, programs)


class TestFinetuning:
    """Networks that are not trained, and one tiny run."""

    SMALL = ("--size", "4", "6", "--dense-steps", "2", "--steps", "2", "--windows", "2", "--levels", "2")

    def packed(self, frames=(20, 30)):
        draw = np.random.default_rng(0)
        first, second = (draw.integers(0, 256, (count, 16, 24, 3), dtype=np.uint8) for count in frames)
        np.savez("clips.npz", first=first, second=second)
        return ["--clips", "clips.npz", *self.SMALL]

    def test_ends_of_all_clips_are_held_out(self, run):
        """No frame is in both parts, none of the gap is in one, and a window lies in one clip."""
        kept = []

        def stop(args, clips):
            benchmark = sys.modules["benchmark_finetuning"]
            settings = benchmark.dense_run(benchmark.DemoConfig(height=16, width=24))
            kept.append((clips, benchmark.windows_of(clips, settings, 8)))
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run("finetuning", *self.packed((50, 60)), run=stop)
        clips, windows = kept[0]
        of = [{frame.tobytes(): (n, at) for at, frame in enumerate(clip)} for n, clip in enumerate(clips)]
        places = of[0] | of[1]
        for starts, wanted in (
            (windows.train_starts, {(0, at) for at in range(40)} | {(1, at) for at in range(48)}),
            (windows.held_out_starts, {(0, at) for at in range(44, 50)} | {(1, at) for at in range(52, 60)}),
        ):
            found = [[places[windows.frames[at + n].tobytes()] for n in range(4)] for at in starts]
            assert {place for window in found for place in window} == wanted
            assert all(window == [(window[0][0], window[0][1] + n) for n in range(4)] for window in found)

    def test_the_table(self, run, monkeypatch, capsys):
        """Differences are in pairs with dense attention's, and what was won back is of what the swap had cost."""
        draw = np.random.default_rng(1)
        dense = [draw.normal(1.0, 0.3, 4) for _ in range(2)]
        terms = {"dense": [(x + 0.5, x) for x in dense]}
        terms["monarch(tile=(4,4,6))"] = [(x + 0.4, x + 0.1 * (1 + n)) for n, x in enumerate(dense)]
        options = [*self.packed(), "--seeds", "0", "1", "--attention", "monarch(tile=(4,{h},{w}))"]
        run("finetuning", *options, run=lambda args, clips: terms)
        rows = json.loads(pathlib.Path("results/finetuning.json").read_text())["rows"]
        assert [row["attention"] for row in rows] == list(terms)
        assert rows[1]["more_by_seed"] == pytest.approx([0.1, 0.2])
        low, high = rows[1]["interval"]
        assert 0.0999 <= low < rows[1]["more"] < high <= 0.2001
        assert rows[1]["more"] == pytest.approx(0.15)
        assert rows[1]["won_back"] == pytest.approx(1 - 0.15 / 0.4)
        said = capsys.readouterr()
        assert "(+0.1" in said.out
        assert not said.err
        with pytest.raises(SystemExit, match="holds results of other settings"):
            run("finetuning", *options, "--steps", "3")

    def test_a_cpu_is_told_what_it_can_do(self, run, capsys):
        class Stopped(Exception):
            pass

        def stop(args, clips):
            raise Stopped

        with pytest.raises(Stopped):
            run("finetuning", *self.packed(), "--dense-steps", "3000", run=stop)
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("note: there is no GPU; what a CPU does in minutes is --size 8 14 --dense-steps 400")

    @pytest.mark.slow
    def test_a_run_goes_on(self, run, capsys):
        """What is there is not trained again; dense attention without a step more is what it was."""
        options = [*self.packed((40, 50)), "--seeds", "0", "--attention", "vsa(keep=0.2, cube=(2,2,2))"]
        run("finetuning", *options)
        first = json.loads(pathlib.Path("results/finetuning.json").read_text())["rows"]
        for path in pathlib.Path("results").glob("vsa*.npy"):
            path.unlink()
        before = pathlib.Path("results/trained-0.npy").stat().st_mtime_ns
        run("finetuning", *options)
        assert json.loads(pathlib.Path("results/finetuning.json").read_text())["rows"] == first
        assert pathlib.Path("results/trained-0.npy").stat().st_mtime_ns == before
        assert first[0]["before"] != first[0]["after"] != first[1]["after"] != first[1]["before"]


def test_every_objective_is_timed(monkeypatch):
    """As a stage, or by `distill.py`, and every role of it that trains."""
    monkeypatch.syspath_prepend(FOLDER)
    spec: Any = importlib.util.spec_from_file_location("benchmark_stages", FOLDER / "stages.py")
    stages = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, stages)
    spec.loader.exec_module(stages)
    timed = {(row.settings.name, row.role) for row in stages.STAGES.values() if row.settings is not None}
    # those of the library, as other tests register objectives of their own
    ours = [name for name in objective_names() if settings_class(name).__module__.startswith("monarchrt.")]
    wanted = {(name, role) for name in ours for role in settings_class(name).roles}
    frozen = {(name, role) for name, role in wanted if not settings_class(name).roles[role].trains}
    assert timed == {row for row in wanted - frozen if row[0] != "self-forcing"}


class TestStages:
    """Steps of the stages of a distillation, of a tiny network."""

    def rows(self):
        return json.loads(pathlib.Path("results/stages.json").read_text())["rows"]

    @pytest.mark.slow
    @pytest.mark.timeout(1200)
    def test_each_is_a_step_of_its_own(self, run, capsys):
        run("stages", "--small", "--repeats", "1", "--attention", "monarch 97%")
        rows = self.rows()
        assert [row["stage"] for row in rows] == [
            "teacher forcing", "consistency", "diffusion forcing", "ode", "pairs", "dmd student", "dmd critic"
        ]  # fmt: skip
        assert all(row["finite"] and row["seconds"] > 0 and row["memory_gb"] >= row["state_gb"] > 0 for row in rows)
        held = {row["stage"]: row["state_gb"] for row in rows}
        # parameters, two moments and an average; beside them a teacher, or a critic without an average and a teacher
        assert held["consistency"] == pytest.approx(held["teacher forcing"] * 4.5 / 4, rel=0.05)
        assert held["dmd student"] == pytest.approx(held["teacher forcing"] * 7.5 / 4, rel=0.05)
        assert "gradients agree to" in capsys.readouterr().out

    def test_what_was_measured_is_kept(self, run, monkeypatch, capsys):
        """When memory does not suffice for a row, another ends the run, or the time is over."""
        done = []

        def measure(name, attention, args):
            done.append((name, attention))
            if name == "consistency":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no")
            if name == "ode":
                raise KeyboardInterrupt
            return {"stage": name, "attention": attention, "error": "none"}

        replaced = {"check": lambda args: 0.0, "measure": measure}
        with pytest.raises(KeyboardInterrupt):
            run("stages", "--small", "--stages", "pairs", "consistency", "ode", **replaced)
        assert [row["error"] for row in self.rows()] == ["none", "out of memory"]
        done.clear()
        run("stages", "--small", "--stages", "pairs", "diffusion forcing", **replaced)
        assert done == [("pairs", "monarch 97%"), ("diffusion forcing", "monarch 97%"), ("diffusion forcing", "dense")]
        done.clear()
        run("stages", "--small", "--stages", "pairs", "--seconds", "1e-9", **replaced)
        assert not done
        assert "pairs, monarch 97%: not begun" in capsys.readouterr().out

    def test_a_report_is_gone_on_with(self, run, tmp_path):
        """Without its check or its rows, but for those that memory did not suffice for; not one of another run."""
        done = []

        def measure(name, attention, args):
            done.append((name, attention))
            return {"stage": name, "attention": "dense" if name == "pairs" else attention, "seconds": 1.0}

        shown = {"measure": measure, "line": lambda row: ""}
        run("stages", "--small", "--stages", "pairs", "ode", "--attention", "dense", check=lambda args: 0.01, **shown)
        rows = self.rows()
        before = json.loads(pathlib.Path("results/stages.json").read_text())
        before["rows"] = [{"stage": "consistency", "attention": "dense", "error": "out of memory"}, *rows]
        (tmp_path / "before.json").write_text(json.dumps(before))
        done.clear()

        def check(args):
            raise AssertionError("the check stands")

        options = ("--small", "--stages", "pairs", "ode", "consistency", "--after", "before.json")
        run("stages", *options, "--attention", "dense", "monarch 97%", check=check, **shown)
        kinds = ("consistency", "dense"), ("ode", "monarch 97%"), ("consistency", "monarch 97%")
        assert done == list(kinds)
        assert self.rows()[:2] == rows
        assert json.loads(pathlib.Path("results/stages.json").read_text())["gradient_error"] == 0.01
        with pytest.raises(SystemExit, match=r"--after before\.json has .*'last': 2.* but this run .*'last': 1"):
            run("stages", *options, "--last", "1", check=check, **shown)
        (tmp_path / "before.json").write_text("[]")
        with pytest.raises(SystemExit, match=r"--after before\.json is not a stages\.json of this script"):
            run("stages", *options, check=check, **shown)


@pytest.mark.slow
def test_meshes_are_measured_beside_one_device(tmp_path):
    """On two devices of the CPU: equal losses, and the collectives that each mesh takes."""
    options = ["--preset", "tiny", "--attention", "dense", "--latents", "2", "4", "8", "--steps", "1"]
    command = [sys.executable, str(FOLDER / "scale.py"), *options, "--out", "scale.json", "--meshes"]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    environment = os.environ | flags | {"PYTHONPATH": str(FOLDER.parent)}
    subprocess.run([*command, "data=1", "data=2", "fsdp=2", "heads=2"], cwd=tmp_path, env=environment, check=True)
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    assert [(row["mesh"], row["devices"], row["clips"]) for row in rows] == [
        ("data=1", 1, 1), ("data=2", 2, 2), ("fsdp=2", 2, 2), ("heads=2", 2, 1)
    ]  # fmt: skip
    assert rows[0]["rate"] == 1
    assert all(row["ms"] > 0 and row["rate"] > 0 and row["in_loops_in_a_block"] == 0 for row in rows)
    assert rows[3]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-2)  # the same clip, in bfloat16
    assert rows[2]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-2)
    assert rows[0]["collectives"] != rows[1]["collectives"] != rows[3]["collectives"]
    assert rows[2]["planned_bytes"]["total"] < rows[1]["planned_bytes"]["total"]


@pytest.mark.slow
def test_how_far_a_roll_out_ends_from_float32(run, capsys, tmp_path):
    run("rollout", "--tiny", "--layers", "1", "--sharpness", "1", "10")
    rows = json.loads((tmp_path / "results/rollout.json").read_text())["rows"]
    assert [row["sharpness"] for row in rows] == [1.0, 10.0]
    for row in rows:
        assert all(1e-4 < row[name]["all"] < 0.1 for name in ("bfloat16", "e4m3", "e4m3 from bfloat16"))
    flat, sharp = (row["e4m3 from bfloat16"]["all"] for row in rows)
    assert sharp > flat  # where alpha errs
    assert capsys.readouterr().out.count("bfloat16's own") == 2


def test_attention_of_low_rank(monkeypatch):
    """Against the map's singular values, on maps with structure and on one of noise, whose values fall slowly."""
    monkeypatch.syspath_prepend(FOLDER)
    kind = importlib.import_module("low_rank").LowRankAttention
    grid, setting = (4, 4, 6), kind(keep=0.25)
    q, k, v = (np.array(jax.random.normal(jax.random.key(n), (1, 96, 3, 16))) for n in range(3))
    place = np.arange(96) / 96
    q[0, :, 0, :4] = k[0, :, 0, :4] = 6 * np.stack([np.cos(place), np.sin(place), place, place**2], -1)
    q[:, :, 1] *= 3
    found = np.asarray(setting(*map(jnp.asarray, (q, k, v)), grid=grid))
    for head in range(3):
        exact = dense_map(q[0, :, head], k[0, :, head])
        left, values, right = np.linalg.svd(exact)
        best = (left[:, :12] * values[:12]) @ right[:12]
        nearest = np.sqrt((values[12:] ** 2).sum())
        made = np.asarray(setting.attention_map(*map(jnp.asarray, (q, k)), grid=grid))[0, head]
        assert np.linalg.norm(made - exact) < 1.01 * nearest
        if head == 0:
            np.testing.assert_allclose(found[0, :, head], best @ v[0, :, head], atol=1e-3)
    assert setting.density(grid).kept == 0.25
    with pytest.raises(ValueError, match=r"keep=0.01 is below one rank of grid \(4, 4, 6\); the least is 0.0208"):
        kind(keep=0.01).check(grid)
    with pytest.raises(ValueError, match="this network is block-causal"):
        setting.check(grid, causal_block=2)


def test_claims_are_printed_and_drawn_again(run, capsys, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "claims.json").write_text((FOLDER / "claims" / "demo.json").read_text())
    run("claims", "--redraw")
    said = capsys.readouterr().out
    assert "| 32 x 14 | aligned | 10.3% | 0.543 (0.442 to 0.642) | 0.298 |" in said
    assert "| (2, 8, 14) | 13.4% | 0.5384 | +0.0018 (+0.0013 to +0.0022) |" in said
    assert "On maps, nested, from each form to each denser one (6 pairs): 6 surely nearer, 0 surely farther." in said
    assert "| `monarch(tile=(4,4,14))` | 9 | 25.4 (25.0 to 25.8) | +3.1 (+2.5 to +3.7) |" in said
    assert "| `monarch(tile=(4,4,14))` | 13.4% | 0.4192 | 0.3471 | +0.0043 (+0.0038 to +0.0049) |" in said
    assert (tmp_path / "results" / "claims.md").read_text() == said
    assert (tmp_path / "results" / "claims.png").stat().st_size > 10_000


def test_claims_take_the_videos_that_are_there(monkeypatch, tmp_path):
    """Of two models and two noises: in pairs with those that both settings have, whatever their numbers then were."""
    monkeypatch.syspath_prepend(FOLDER)
    claims = importlib.import_module("claims")

    def model(seed, made, attention=("svg(keep=0.3)", "top_k(keep=0.15)"), **changes):
        folder = tmp_path / str(seed)
        settings = {"attention": attention, "frames": 31, "steps": None, "reference": "dense", "mode": "auto"} | changes
        for (noise, number), psnr in made.items():
            at = folder / "videos" / "samples" / f"0-{noise}"
            at.mkdir(parents=True, exist_ok=True)
            drift = {name: [psnr, psnr - 2] for name in ("psnr", "ssim_gaussian", "ssim_box")}
            record = {"drift": drift, "latent_error": 0.5, "flicker": psnr / 100}
            (at / f"{number}.json").write_text(json.dumps(record))
        (folder / "videos").mkdir(parents=True, exist_ok=True)
        (folder / "videos" / "settings.json").write_text(json.dumps(settings))
        return types.SimpleNamespace(folder=folder, subject=types.SimpleNamespace(grid=(16, 8, 28)))

    first = model(0, {(0, 0): 90.0, (0, 1): 30.0, (0, 2): 21.0, (1, 1): 40.0})
    second = model(1, {(0, 0): 91.0, (0, 2): 50.0, (2, 0): 80.0}, attention=("top_k(keep=0.15)", "svg(keep=0.3)"))
    made = [claims.videos_there(x, ["top_k(keep=0.15)", "svg(keep=0.3)"], (0, 1)) for x in (first, second)]
    assert [[(r["seed"], r["setting"]) for r in records] for records in made] == [
        [(0, 0), (0, 2), (0, 1), (1, 2)],
        [(0, 0), (0, 2)],
    ]
    found = claims.of_videos(made, 2, 1)
    assert (found["count"], found["psnr"][0]) == (3, pytest.approx((30 + 40 + 50) / 3 - 1))
    assert found["psnr_more_than_oracle"] == pytest.approx([9.0] * 3)  # of the one pair
    assert found["flicker_more_than_dense"][0] == pytest.approx(((0.3 - 0.9) + (0.5 - 0.91)) / 2)
    assert claims.of_videos(made[1:], 1, 1) == {}
    (first.folder / "videos" / "samples" / "0-0" / "0.json").unlink()
    without = claims.of_videos([claims.videos_there(first, ["svg(keep=0.3)"], (0,))], 1, 1)
    assert (without["count"], "flicker_more_than_dense" in without) == (1, False)
    with pytest.raises(SystemExit, match="videos with steps=1, not None"):
        claims.videos_there(model(2, {}, steps=1), [], (0,))


def test_errors_of_maps_and_the_order_of_claims(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    claims = importlib.import_module("claims")
    query, key = jax.random.normal(jax.random.key(0), (2, 24, 8)) * 2
    exact = dense_map(np.asarray(query), np.asarray(key))
    found = []
    for grid, tile in (((2, 3, 4), (2, 3, 4)), ((1, 6, 4), None), ((2, 3, 4), (1, 3, 2)), ((1, 8, 3), None)):
        spec = MonarchSpec(grid=grid, tile=tile)
        made = monarch_factors(query[None, :, None], key[None, :, None], grid=grid, tile=tile or grid, num_iters=1)
        expected = error_of(np.asarray(made.attention[0, 0]), exact).relative
        found.append(float(claims.apart(query, key, exact, spec=spec)))
        assert found[-1] == pytest.approx(expected, rel=1e-5)
    assert found[0] == pytest.approx(found[1], rel=1e-5) != found[2]  # untiled blocks are one tile of all tokens
    settings = tuple("abcdef")
    orders = [claims.turned(settings, [types.SimpleNamespace(seed=seed)]) for seed in range(4)]
    assert orders == [tuple("abcdef"), tuple("cdefab"), tuple("efabcd"), tuple("abcdef")]
    errors = {"4,4": np.full(5, 0.5), "2,4": np.full(5, 0.3), "4,3": np.full(5, 0.6), "8 x 2": np.full(5, 0.1)}
    of = {"4,4": ("tiled", 0.1), "2,4": ("tiled", 0.2), "4,3": ("tiled", 0.3), "8 x 2": ("aligned", 0.4)}
    rows = {name: {"family": family, "density": density} for name, (family, density) in of.items()}
    steps = {kind: claims.steps_of(rows, errors, kind) for kind in ("nested", "tiled", "untiled")}
    assert [(step["from"], step["to"]) for step in steps["tiled"]] == [("4,4", "2,4"), ("4,4", "4,3"), ("2,4", "4,3")]
    assert steps["untiled"] == []
    (nested,) = steps["nested"]  # from the tile that holds the other
    assert (nested["from"], nested["to"], nested["change"]) == ("4,4", "2,4", pytest.approx([-0.2] * 3))
