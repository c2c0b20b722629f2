"""Runs before anything is imported: shapes and dtypes in annotations are checked in every test."""

import gc
import json
import os
import pathlib

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if pathlib.Path("/dev/nvidiactl").exists():
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
else:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the CUDA plugin may be installed, for compiling
    # the fusion emitters set up a compiler for each kernel: without them most programs compile in a fourth of the time
    flags = "--xla_backend_optimization_level=0 --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    flags += " --xla_cpu_parallel_codegen_split_count=1"
os.environ.setdefault("XLA_FLAGS", flags)  # tests compile far more than they run
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")  # no axis is added without a word, in processes neither
os.environ.setdefault("OMP_NUM_THREADS", "1")  # PyTorch's threads wait by spinning, where each core has a process
os.environ.setdefault("PJRT_NPROC", "16")  # an interpreted GPU kernel stands still with fewer threads than it has

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jaxtyping import install_import_hook

PACKAGES = ("monarch_jax", "monarchrt")
_hook = install_import_hook(PACKAGES, "beartype.beartype")


# Seconds that each file took when all of them last ran: the longest go first, so that with a file per process at a
# time none is left to run alone at the end. The file is rewritten by `python -m pytest --remember`.
DURATIONS = pathlib.Path(__file__).with_name("durations.json")
_taken: dict[str, float] = {}


def _name(path: pathlib.Path) -> str:
    return os.path.relpath(path, DURATIONS.parent)


def pytest_collection_modifyitems(items):
    """Sorts the tests by file, the longest files first; one that is not known yet counts as the longest."""
    known = json.loads(DURATIONS.read_text())
    items.sort(key=lambda item: -known.get(_name(item.path), float("inf")))


def pytest_collection_finish():
    """What importing made stays to the end: the garbage collector need not look at it again with each few objects."""
    gc.collect()
    gc.freeze()


def pytest_runtest_logreport(report):
    """Adds up what each file takes, in all processes: their reports come to the first."""
    name = report.nodeid.partition("::")[0].removeprefix(f"{DURATIONS.parent.name}/")
    _taken[name] = _taken.get(name, 0.0) + report.duration


def pytest_sessionfinish(session):
    """Writes what was measured, with --remember; of files that did not run, what is known stays."""
    if session.config.getoption("--remember") and not os.environ.get("PYTEST_XDIST_WORKER"):
        known = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
        found = {name: seconds for name, seconds in (known | _taken).items() if (DURATIONS.parent / name).exists()}
        longest = dict(
            sorted(((name, round(seconds)) for name, seconds in found.items()), key=lambda row: (-row[1], row[0]))
        )
        DURATIONS.write_text(json.dumps(longest, indent=0) + "\n")


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
    """Adds --published and --remember."""
    parser.addoption("--remember", action="store_true", help="keep what each file took, for the order of the next run")
    parser.addoption("--published", help="a checkout of Infini-AI-Lab/MonarchRT to compare with")


@pytest.fixture
def published(request):
    """The folder given with --published."""
    path = request.config.getoption("--published")
    if not path:
        pytest.skip("pass --published PATH, a checkout of the published repository, to compare with it")
    return path
