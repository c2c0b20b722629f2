"""`monarchrt doctor`: what it finds, on this machine and on others that are stood in for."""

import importlib.metadata
import json
import subprocess
import tomllib
from pathlib import Path

import pytest

from monarchrt.models.errors import UserError
from monarchrt.train import cli, doctor
from monarchrt.train.cli.doctor import DoctorConfig
from monarchrt.train.doctor import Case
from tests.untyped import there

ROOT = Path(__file__).parents[2]
SMALL = ("--grid", "2", "4", "6", "--tile", "1", "4", "6", "--heads", "1", "--head-dim", "16")


def test_a_machine_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_FREE", 0)
    monkeypatch.setattr(doctor, "driver", lambda: doctor.Finding(name="NVIDIA driver", found="none"))
    assert cli.main(["doctor", *SMALL]) == 0
    out = capsys.readouterr().out
    assert f"jax                   {importlib.metadata.version('jax')}" in out
    assert "(cpu)" in out
    assert "attention on grid (2, 4, 6), tile (1, 4, 6), 1 heads of 16, bfloat16: xla" in out
    assert "triton                not supported: it needs an NVIDIA GPU, where it would support the call" in out
    assert "times as fast" in out
    assert out.endswith("nothing to fix\n")


def test_what_is_to_be_mended_is_marked_and_counts(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "LEAST_FREE", 0)
    lacking = {"einops": None, "optax": "0.0.1", "triton": None}
    version = importlib.metadata.version

    def installed(name):
        if name in lacking and lacking[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return lacking.get(name) or version(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert cli.main(["doctor", "--no-speed", *SMALL]) == 1
    out = capsys.readouterr().out
    assert "! einops                not installed  (pip install 'monarchrt')" in out
    assert "! optax                 0.0.1  (needs >=0.2.8" in out
    assert "  triton                not installed  (pip install 'monarchrt[cuda]', for NVIDIA GPUs only)" in out
    assert "2 thing(s) to fix" in out


@pytest.mark.parametrize(
    ("versions", "wrong"),
    [
        ({"jax": "0.12.0.1", "jaxlib": "0.12.0.1"}, []),  # on CPUs
        ({"jax": "0.12.0.1", "jaxlib": "0.11.2", "jax-cuda13-plugin": "0.11.2"}, []),
        (dict.fromkeys(("jax", "jaxlib", "jax-cuda13-plugin"), "0.12.0.1"), ["jaxlib", "jax-cuda13-plugin"]),
        ({"jax": "0.13.0", "jaxlib": "0.13.0"}, ["jax"]),
    ],
)
def test_versions_of_jax_and_its_parts(monkeypatch, versions, wrong):
    """By what pyproject.toml asks for; without a CUDA plugin any jaxlib is right."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = [f"{text}; extra == 'cuda'" for text in project["optional-dependencies"]["cuda"]]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: project["dependencies"] + extra)

    def installed(name):
        if name in versions:
            return versions[name]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", installed)
    findings = [x for x in doctor.versions() if x.name in versions and x.advice]
    assert [x.name for x in findings] == wrong
    assert all("needs" in there(x.advice) for x in findings)


@pytest.mark.parametrize(
    ("printed", "code", "found", "advice"),
    [
        ("NVIDIA H200, 580.159.03, 143771 MiB\n", 0, "580.159.03; NVIDIA H200 (143771 MiB)", None),
        ("NVIDIA A100, 550.54, 81920 MiB\n", 0, "550.54; NVIDIA A100 (81920 MiB)", "needs version 580"),
        ("couldn't communicate with the NVIDIA driver\n", 9, "nvidia-smi fails: couldn't communicate", "driver first"),
        ("", 0, "nvidia-smi fails", "driver first"),
    ],
)
def test_the_driver(monkeypatch, printed, code, found, advice):
    done = subprocess.CompletedProcess([], code, printed, "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    finding = doctor.driver()
    assert found in finding.found
    assert (finding.advice is None) == (advice is None)
    assert advice is None or advice in finding.advice


def test_a_gpu_that_jax_does_not_use(monkeypatch):
    monkeypatch.setattr(doctor, "driver", lambda: doctor.Finding(name="NVIDIA driver", found="580.1; NVIDIA H200"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "JAX_PLATFORMS is 'cpu'" in there(doctor.devices().advice)


def test_every_stored_speed_is_that_of_a_report():
    stored = json.loads((ROOT / "train" / "speeds.json").read_text())
    reports = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks").glob("h?00/attention*.json"))]
    for card, rows in stored.items():
        times = {
            (row["row"], round(row["implementations"]["mosaic"]["ms"], 2))
            for report in reports
            if report["device"] == card
            for row in report["rows"]
            if row["work"] == "forward" and "mosaic" in row["implementations"]
        }
        assert rows
        for row in rows:
            size = {30: "480p", 45: "720p"}[row["grid"][1]]
            tile = {1: "(h,w)", 3: "(3h,w)"}[row["tile"][0]]
            assert (f"{size} {tile}", row["ms"]) in times


def test_wrong_numbers_are_not_timed(monkeypatch):
    import monarch_jax

    right = monarch_jax.monarch_attention

    def wrong(*arrays, implementation=None, **options):
        out = right(*arrays, implementation=implementation, **options)
        return out if implementation else 1.1 * out

    monkeypatch.setattr(monarch_jax, "monarch_attention", wrong)
    with pytest.raises(ArithmeticError, match=r"off by 1\.0e-01"):
        doctor.speed(Case(grid=(2, 4, 6), tile=(1, 4, 6), heads=1, head_dim=16), seconds=0.0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--heads", "0"], "heads is 0"),
        (["--tile", "1", "4", "6"], "--grid"),
        (["--grid", "2", "4", "6", "--tile", "1", "3", "6", "--no-speed"], "does not divide"),
        (["--grid", "2", "0", "6"], "grid[1]=0 is not a positive integer"),
        (["--num-iters", "101"], "num_iters=101 is too large"),
    ],
)
def test_bad_options(capsys, arguments, word):
    """They are noticed before anything is printed."""
    assert cli.main(["doctor", *arguments]) == 2
    printed = capsys.readouterr()
    assert word in printed.err
    assert not printed.out


def test_what_is_too_large_for_a_cpu_is_not_timed(capsys, monkeypatch):
    timed = []
    speed = doctor.Speed(implementation="xla", monarch=1.0, dense=2.0, expected=None)
    monkeypatch.setattr(doctor, "speed", lambda case: timed.append(case.grid) or speed)
    cli.main(["doctor", "--grid", "21", "45", "80"])
    assert "(grid (21, 45, 80) is too large for dense attention without a GPU)" in capsys.readouterr().out
    cli.main(["doctor", *SMALL])
    assert "too large" not in capsys.readouterr().out
    assert timed == [(6, 15, 26), (2, 4, 6)]


def test_options_without_a_grid_are_of_the_default_cases(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "speed", lambda case: pytest.fail("not timed"))
    cli.main(["doctor", "--heads", "3", "--head-dim", "64", "--num-iters", "2", "--no-speed"])
    out = capsys.readouterr().out
    for frames in (1, 3):
        assert f"tile ({frames}, 30, 52), 3 heads of 64, 2 refinement steps, bfloat16: xla" in out


def test_settings_are_checked_in_python_too():
    with pytest.raises(UserError, match="num_iters is 0"):
        DoctorConfig(num_iters=0)
