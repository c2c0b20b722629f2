"""Objectives of causal students on a mesh, by the command line: their logs are those of one device."""

import os

import pytest

from monarchrt.train.logs import read_log
from tests.train.conftest import CAUSAL

pytestmark = pytest.mark.slow

NETWORK = [f"{name}={value}" for name, value in CAUSAL.items()]


@pytest.mark.parametrize(
    ("objective", "data", "options"),
    [
        ("teacher-forcing", "clips", ["--frames-per-level", "1", "--overrides", *NETWORK]),
        ("ode", "pairs", ["--block", "1", "--overrides", *NETWORK]),
        (
            "consistency",
            "clips",
            ["--block", "1", "--grid", "6", "--attention", "monarch(tile=(1,1,2))"]
            + [word for role in ("student", "teacher") for word in (f"--{role}.overrides", *NETWORK)],
        ),
    ],
)
def test_a_mesh_has_the_log_of_one_device(causal, run, tmp_path, objective, data, options):
    """Gathered weights and tokens exchanged for heads; the second step is of parameters that have changed."""
    roles = ("student.", "teacher.") if objective == "consistency" else ("",)
    begun = [word for role in roles for word in (f"--{role}init-from", causal / "network")]
    learns = "--student.learning-rate" if objective == "consistency" else "--learning-rate"
    command = ["train", "--objective", objective, "--latents", causal / data, "--held-out", "0.34", "--batch", "2"]
    found = {}
    for mesh, devices in (("data=1", 1), ("fsdp=2,heads=2", 4)):
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
        places = ["--mesh", mesh, "--steps", "2", "--folder", tmp_path / mesh, learns, "1e-3"]
        code, stderr = run([*command, *begun, *options, *places], XLA_FLAGS=flags)
        assert code == 0, stderr
        rows = read_log(tmp_path / mesh)  # a level that no sample had has no loss, "nan"
        found[mesh] = [{name: float(x) for name, x in row.items() if name != "seconds"} for row in rows]
    one, split = found.values()
    assert len(one) >= 3
    losses = [value for row in one for name, value in row.items() if name.endswith("loss")]
    assert losses
    assert all(losses)
    for row, right in zip(split, one, strict=True):
        assert row == pytest.approx(right, rel=2e-5, nan_ok=True)
