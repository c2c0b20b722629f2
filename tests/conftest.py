"""Runs before anything is imported: shapes and dtypes in annotations are checked in every test."""

import os
import pathlib

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if pathlib.Path("/dev/nvidiactl").exists():
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
else:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the CUDA plugin may be installed, for compiling
    flags = "--xla_backend_optimization_level=0"
os.environ.setdefault("XLA_FLAGS", flags)  # tests compile far more than they run
os.environ.setdefault("PJRT_NPROC", "16")  # an interpreted GPU kernel stands still with fewer threads than it has

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

PACKAGES = ("monarch_jax", "monarchrt")
_hook = install_import_hook(PACKAGES, "beartype.beartype")


# Files that take longest, first of all: with a file per process at a time, none is left to run alone at the end.
LONGEST = (
    "train/test_reliability.py",
    "kernels/test_mosaic_backward.py",
    "kernels/test_mosaic.py",
    "kernels/test_triton.py",
    "attention/test_definition.py",
    "attention/test_backends.py",
    "models/test_causal.py",
    "models/test_wan.py",
    "vae/test_vae.py",
    "train/test_sharding.py",
    "train/test_generate.py",
    "train/test_demo.py",
    "sampling/test_rollout.py",
    "models/test_checkpoints.py",
    "models/test_docstrings.py",
    "generate/test_pipeline.py",
)


def pytest_collection_modifyitems(items):
    """Sorts the tests by file, the longest files first."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get("/".join(item.path.parts[-2:]), len(order)))


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> pathlib.Path:
    """A folder that all test processes of this session share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def compiled(shared) -> str:
    """The folder of programs that all test processes of this session have compiled, or the one in the environment."""
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(shared / "compiled")


@pytest.fixture(scope="module", autouse=True)
def compile_once(request, compiled):
    """What one test compiles serves the others. Not so for GPU kernels: their tests look at what compiling prints."""
    folder = None if "kernels" in request.path.parts else compiled
    if jax.config.jax_compilation_cache_dir != folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()


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
