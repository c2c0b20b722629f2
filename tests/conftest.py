"""Runs before anything is imported: shapes and dtypes in annotations are checked in every test."""

import os
import pathlib

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if not pathlib.Path("/dev/nvidiactl").exists():
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the CUDA plugin may be installed, for compiling
os.environ.setdefault("PJRT_NPROC", "16")  # an interpreted GPU kernel stands still with fewer threads than it has
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # tests compile far more than they run

import pytest
from jaxtyping import install_import_hook

PACKAGES = ("monarch_jax", "pallas_kernels", "triton_kernels", "models", "train")
_hook = install_import_hook(PACKAGES, "beartype.beartype")


def pytest_addoption(parser):
    """Adds --published."""
    parser.addoption("--published", help="a checkout of Infini-AI-Lab/MonarchRT to compare with")


@pytest.fixture
def published(request):
    """The folder given with --published."""
    path = request.config.getoption("--published")
    if not path:
        pytest.skip("pass --published PATH, a checkout of the published repository, to compare with it")
    return path
