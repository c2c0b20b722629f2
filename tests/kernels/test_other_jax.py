"""The kernels lowered for CUDA by the next version of JAX, which is put into a folder of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = "0.12.0.1"  # what the library has been seen on
PARTS = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt")


@pytest.fixture(scope="module")
def next_jax(tmp_path_factory):
    """A folder with it, or a skip where it cannot be had."""
    folder = tmp_path_factory.mktemp("jax")
    wanted = [f"{part}=={VERSION}" for part in PARTS]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"jax {VERSION} cannot be installed: {done.stderr.strip().splitlines()[-1][:200]}")
    return folder


@pytest.mark.slow
def test_kernels_lower_and_agree(next_jax):
    """What is lowered in the default tests, and the tests of the definition."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(next_jax), str(ROOT)]),
        "JAX_PLATFORMS": "cpu",
        "EXPECTED_JAX": VERSION,
    }
    program = "import jax, os, sys, pytest; assert jax.__version__ == os.environ['EXPECTED_JAX'], jax.__version__; "
    program += "sys.exit(pytest.main(sys.argv[1:]))"
    names = ("mosaic", "mosaic_backward", "triton", "triton_calls")
    tests = [f"tests/kernels/test_{name}.py" for name in names]
    chosen = ["-q", "-p", "no:cacheprovider", "-k", "lower or one_text", *tests]
    command = [sys.executable, "-c", program, *chosen]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
