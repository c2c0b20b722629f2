"""Small clips, a small network, and a run of the command line that several tests compare with."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clips import make_clip

ROOT = Path(__file__).parents[2]

# one layer, 2 x 4 tokens per frame: seconds to compile, milliseconds per step
NETWORK = ["--overrides", "num_layers=1", "dim=24", "num_heads=2", "ffn_dim=48"]
DATA = ["--frames", "3", "--height", "16", "--width", "32", "--patch", "4", "--gap", "1", "--held-out", "0.3"]
EVERY = [
    "--batch",
    "2",
    "--steps",
    "30",
    "--checkpoint-every",
    "4",
    "--eval-every",
    "6",
    "--eval-windows",
    "1",
    "--eval-timesteps",
    "2",
    "--keep",
    "3",
]


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="session")
def environment(compiled) -> dict[str, str]:
    """The environment of a subprocess: on a CPU, compiled programs shared between the processes."""
    inherited = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}  # for interpreters only
    return inherited | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": compiled,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture(scope="session")
def arguments(clip) -> list[str]:
    """The training command that the tests share, less the run folder."""
    return ["train", "--video", str(clip), *NETWORK, *DATA, *EVERY]


@pytest.fixture(scope="session")
def start(environment):
    """Starts the command line in a process of its own."""

    def start(arguments, before: str = "pass", **variables: str) -> subprocess.Popen:
        program = f"{before}; import sys; from monarchrt.train.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", program, *map(str, arguments)]
        environ = environment | variables
        return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.fixture(scope="session")
def run(start):
    """Runs the command line in a process of its own: (exit code, stderr)."""

    def run(arguments, **options: str) -> tuple[int, str]:
        process = start(arguments, **options)
        try:
            _, stderr = process.communicate(timeout=900)
        finally:
            process.kill()
        return process.returncode, stderr

    return run


@pytest.fixture(scope="session")
def baseline(shared, run, arguments) -> Path:
    """Run folder of the command, uninterrupted; made once however many test processes there are."""
    folder = shared / "baseline"
    with (shared / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            unfinished = shared / "baseline.part"
            code, stderr = run([*arguments, "--folder", unfinished])
            assert code == 0, stderr
            unfinished.rename(folder)
    return folder


def history(folder: Path) -> list[dict]:
    """The log of a run without the wall-clock times, exactly as written."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, byte for byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
