"""The benchmarks' options and reports; what they measure needs a GPU."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

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
        ("generate", ["--tiny", "--repeats", "0"], "--repeats 0 must be at least 1"),
        ("generate", ["--tiny", "--attention", "dens"], "'dens' is not a kind of attention; kinds: dense, monarch"),
        ("model", ["--small", "--attention", "top_k(keep=2)"], "top_k: keep=2"),
        ("scale", ["--meshes", "data=64"], "mesh data=64 needs more devices than there are, "),
        ("scale", ["--meshes", "rows=2"], "mesh is 'rows=2', which has an axis 'rows'"),
        ("scale", ["--meshes", "heads=5"], "mesh is heads=5, but the network has 12 attention heads"),
        ("scale", ["--attention", "dens"], "'dens' is not a kind of attention"),
        ("scale", ["--steps", "0"], "--steps 0 must be at least 1"),
        ("distill", ["--small", "--attention", "monarch 95"], "a name: dense, monarch 95%, monarch 97%"),
        ("distill", ["--published", "missing"], "--published is missing, which has no model/dmd.py; give a checkout"),
    ],
)
def test_options_that_cannot_be_used_end_in_one_line(run, capsys, tmp_path, name, options, said):
    with pytest.raises(SystemExit) as stop:
        run(name, *options)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frames", ["0", "30"])
def test_a_number_of_frames_that_does_not_fit_is_refused_before_anything_runs(run, frames):
    def check(args):
        raise AssertionError("something ran")

    with pytest.raises(SystemExit, match=f"error: frames is {frames}"):
        run("generate", "--tiny", "--frames", frames, check=check)


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
    assert all(f"mosaic     {row['implementations']['mosaic']['ms']:8.3f} ms" in printed for row in last.values())
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
