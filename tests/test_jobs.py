"""The job scripts: what they would run, with stand-ins for job managers, are commands that are understood."""

import os
import subprocess
import textwrap
from pathlib import Path

import pytest

from monarchrt.models.processes.place import find_place
from monarchrt.train.cli.train import parse_train
from monarchrt.train.config import TrainConfig
from monarchrt.train.model import model_settings

JOBS = Path(__file__).parent.parent / "examples" / "jobs"


@pytest.fixture
def commands(tmp_path):
    """Runs a script of bash with stand-ins, and gives the arguments of each call of `monarchrt`."""
    # srun and mpirun run what comes after their own options
    start = '#!/bin/bash\nwhile [ "$1" != monarchrt ]; do shift; done\nexec "$@"\n'
    record = '#!/bin/bash\nprintf "%s\\n" "$@" > "$OUT/$$"\n'
    for name, text in {"srun": start, "mpirun": start, "monarchrt": record}.items():
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()

    def run(script: str, *arguments: str, **variables: str) -> list[list[str]]:
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(out)} | variables
        subprocess.run(["bash", "-c", script, "script", *arguments], env=environment, check=True)
        return [path.read_text().splitlines() for path in sorted(out.iterdir())]

    return run


def parsed(command: list[str]) -> TrainConfig:
    assert command[0] == "train"
    return parse_train(command[1:])


def test_slurm(commands, tmp_path):
    text = (JOBS / "slurm.sh").read_text()
    [command] = commands(text, str(tmp_path / "run"))
    config = parsed(command)
    assert config.run.coordinator is None  # srun says it
    assert config.run.mesh == "data=2,fsdp=8"
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    assert any("--resume" in command for command in commands(text, str(tmp_path / "old")))


def test_open_mpi(commands):
    [command] = commands((JOBS / "open_mpi.sh").read_text(), "node1", "node2")
    assert parsed(command).run.coordinator == "node1:4567"


def test_kubernetes(commands):
    text = (JOBS / "kubernetes.yaml").read_text()
    script = textwrap.dedent(text.partition("args:\n")[2].partition("- |\n")[2].partition("          resources:")[0])
    [command] = commands(script, JOB_COMPLETION_INDEX="1")
    run = parsed(command).run
    place = find_place(run.coordinator, run.processes, run.process, environment={})
    assert place is not None
    assert (place.host, place.process) == ("monarchrt-0.monarchrt", 1)
    service = text.partition("name: ")[2].split()[0]
    assert f"subdomain: {service}" in text


def test_by_hand(commands):
    found = commands((JOBS / "by_hand.sh").read_text(), "clip.mp4", "runs/two")
    runs = [parsed(command).run for command in found]
    assert sorted(run.process or 0 for run in runs) == [0, 1]
    assert {(run.coordinator, run.processes, run.mesh) for run in runs} == {("localhost:4567", 2, "fsdp=2,heads=2")}
    config = parsed(found[0])
    network = model_settings(config.model, channels=3 * config.data.patch**2)
    assert network.patch_features <= network.dim  # else noise does not fit through, of which there is a warning
