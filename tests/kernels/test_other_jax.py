"""The default tests of kernels, and of what calls them, with the next version of JAX in a folder of its own.

Once with all of its parts, and once with the installed jaxlib and CUDA plugin, which that version of JAX takes too.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
VERSION = "0.12.0.1"  # what the library has been seen on
PARTS = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt")
NETWORK = ("models/test_wan.py", "models/test_stacks.py", "models/test_mesh.py", "train/test_compiled_step.py")


@pytest.fixture(scope="module")
def install(tmp_path_factory):
    """Puts packages of that version into a folder, or skips where they cannot be had."""
    folders = {}

    def put(parts):
        if parts not in folders:
            folder = tmp_path_factory.mktemp("jax")
            wanted = [f"{part}=={VERSION}" for part in parts]
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *wanted]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"jax {VERSION} cannot be installed: {done.stderr.strip().splitlines()[-1][:200]}")
            folders[parts] = folder
        return folders[parts]

    return put


@pytest.mark.slow
@pytest.mark.parametrize("parts", [PARTS, PARTS[:1]], ids=["all", "jax alone"])
@pytest.mark.parametrize("tests", [("kernels",), ("attention", *NETWORK)], ids=["kernels", "network"])
def test_default_tests(install, parts, tests):
    """Numbers in interpreters, kernels lowered and compiled ahead of time, programs and meshes on CPUs."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(install(parts)), str(ROOT)]),
        "JAX_PLATFORMS": "cpu",
        "EXPECTED_JAX": VERSION,
    }
    program = "import jax, os, sys, pytest; assert jax.__version__ == os.environ['EXPECTED_JAX'], jax.__version__; "
    program += "sys.exit(pytest.main(sys.argv[1:]))"
    chosen = ["-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)]
    command = [sys.executable, "-c", program, *chosen]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=850)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
