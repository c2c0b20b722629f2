"""The package as a whole: import directions, what an import needs, the wheel, the README's examples."""

import ast
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import monarch_jax

ROOT = pathlib.Path(__file__).parent.parent
ORDER = {"train": 3, "models": 2, "monarch_jax": 1, "pallas_kernels": 0, "triton_kernels": 0}
KERNELS = ("pallas_kernels", "triton_kernels")
CAN_LOWER = all(importlib.util.find_spec(name) for name in ("triton", "jax_triton", "jax_cuda13_plugin"))
FILES = [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path):
    """Our packages that a file imports, anywhere in it, by the names of their folders."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name.removeprefix("monarchrt.").split(".")[0] for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        if own in KERNELS and name == "monarch_jax":  # what a backend is, and where it runs
            assert set(shared_with_kernels(path)) <= {"monarch_jax.contract", "monarch_jax.devices"}
            continue
        assert name not in ORDER or name == own or ORDER[name] < ORDER[own], f"{own} imports {name}"


def shared_with_kernels(path):
    """What a file of the kernel packages takes of the library."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "monarch_jax":
            yield node.module


def modules():
    """Every module's name and file; packages are named as they are imported."""
    names = {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        names[".".join(parts if parts[0] == "monarch_jax" else ("monarchrt", *parts))] = path
    return names


def imported_modules(path, names):
    """Modules of ours that a file imports, at its top or in a function, but not for the type checker alone."""
    tree = ast.parse(path.read_text())
    unread = {
        node
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and ast.unparse(test.test).endswith("TYPE_CHECKING")
        for node in ast.walk(test)
    }
    for node in ast.walk(tree):
        if node in unread:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield from [x for x in (whole, node.module) if x in names][:1]


def test_modules_do_not_import_in_circles():
    """Not even inside of functions: who reads one module need not read the one that it serves."""
    names = modules()
    graph = {name: set(imported_modules(path, names)) - {name} for name, path in names.items()}
    while leaves := [name for name, needs in graph.items() if not needs]:
        for leaf in leaves:
            del graph[leaf]
        graph = {name: needs - set(leaves) for name, needs in graph.items()}
    while tops := [name for name in graph if not any(name in needs for needs in graph.values())]:
        for top in tops:
            del graph[top]
    assert not graph


def test_modules_stay_short():
    """Longer ones should be two."""
    assert {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 600} == {}


def python(code, *, cwd, **environment):
    env = os.environ | {"JAX_PLATFORMS": "cpu"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_importing_the_library_needs_little(tmp_path):
    """Neither CUDA, Triton, torch, nor anything of the training side, nor jaxtyping; and no device is asked for."""
    code = """
import sys
class Refuse:
    names = {"jaxtyping", "beartype", "tyro", "safetensors", "av", "tensorboardX", "matplotlib", "PIL", "torch",
             "diffusers", "triton", "jax_triton", "monarchrt.models", "monarchrt.train"}
    def find_spec(self, name, path=None, target=None):
        if name in self.names or name.split(".")[0] in self.names:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import monarch_jax
from jax._src import xla_bridge
assert not xla_bridge._backends, "a device was initialised"
import jax.numpy as jnp
print(monarch_jax.monarch_attention(*[jnp.ones((1, 12, 1, 4))] * 3, grid=(1, 3, 4)).shape)
"""
    run = python(code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "(1, 12, 1, 4)"


def installed(path):
    """Where a file of the top level is in a wheel."""
    return str(path if path.parts[0] in ("monarch_jax", "tests", "benchmarks") else "monarchrt" / path)


@pytest.fixture
def source(tmp_path):
    """A copy of what is packaged: setuptools leaves a build folder, whose old modules would be in later wheels."""
    copy = tmp_path / "source"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name in {*ORDER, "monarchrt", "tests", "benchmarks"}:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, copy / path.name, symlinks=True, ignore=ignored)
        elif path.is_file():
            shutil.copy(path, copy)
    return copy


USED = """
import sys
import models, train, pallas_kernels, triton_kernels
import jax, jax.numpy as jnp, monarch_jax, monarchrt
from flax import nnx
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.decoders import PatchDecoder
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.plan import Defaults, make_plan
from monarchrt.models.media.latents import PatchDCT
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.checkpoints import save_checkpoint

assert models.MINE and train.MINE and pallas_kernels.MINE and triton_kernels.MINE
assert all(module.__file__.startswith(sys.argv[1]) for module in (models, monarch_jax, monarchrt))
print(monarch_jax.monarch_attention(*[jnp.ones((1, 12, 1, 4))] * 3, grid=(1, 3, 4)).shape)

for implementation in sys.argv[2:]:
    def attend(q, k, v):
        return monarch_jax.monarch_attention(q, k, v, grid=(1, 8, 8), implementation=implementation)

    x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    if implementation == "triton":
        from monarchrt.triton_kernels import compile_for
        with compile_for(90):
            text = jax.jit(attend).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    else:
        text = jax.jit(attend).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    print(implementation, "kernel" if f"{implementation}_" in text and "custom_call" in text else text[:2000])

model = WanModel(wan_config("tiny", num_layers=1, in_channels=12, out_channels=12), rngs=nnx.Rngs(0))
settings = GenerateConfig(frames=2, height=8, width=16, steps=1, sampler="euler", guidance=1.0)
plan = make_plan(settings, defaults=Defaults(mode="bidirectional"), model=model.config, spatial=2, temporal=1)
frames = VideoPipeline(model, PatchDecoder(PatchDCT(patch=2)))(jnp.zeros((1, 8, 32)), plan=plan)
print([part.shape for part in frames])
save_checkpoint(model, "saved")
"""


def test_the_wheel_works_in_a_folder_with_other_packages_of_the_same_names(source, tmp_path):
    """Installed together with a `models`, a `train` and kernels of somebody else, of which none disturbs the other."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(source)], check=True, capture_output=True)
    (wheel,) = tmp_path.glob(f"monarchrt-{monarch_jax.__version__}-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if not name.startswith("monarchrt-")} == {"monarch_jax", "monarchrt"}
    files = {installed(path.relative_to(source)) for package in ORDER for path in (source / package).rglob("*.*")}
    assert files <= set(names), "modules, py.typed, tuned sizes, the page and the demo's clip"

    site, project = tmp_path / "site", tmp_path / "project"
    project.mkdir()
    for name in ("models", "train", *KERNELS):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("MINE = True\n")
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-compile",
        "--no-deps",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(install, check=True, capture_output=True)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(site)}

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=project, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    lowered = ["mosaic", "triton"] if CAN_LOWER else []
    printed = run("-c", USED, str(site), *lowered).splitlines()
    assert printed == ["(1, 12, 1, 4)", *(f"{name} kernel" for name in lowered), "[(2, 8, 16, 3)]"]
    assert run("-m", "monarchrt", "--version") == f"monarchrt {monarch_jax.__version__}\n"
    assert "dim 96, 1 layers" in run("-m", "monarchrt", "inspect", "saved")


def test_the_source_distribution_holds_what_its_tests_need(source, tmp_path):
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})"
    run = python(code, cwd=source)
    assert run.returncode == 0, run.stderr
    (sdist,) = tmp_path.glob("monarchrt-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = (*ORDER, "tests", "benchmarks")
    files = {installed(path.relative_to(source)) for folder in folders for path in (source / folder).rglob("*.*")}
    files -= {name for name in files if name.startswith("benchmarks/results")}
    assert files | {"Makefile", "README.md", "CHANGELOG.md", "LICENSE"} <= names


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize("script", [None, "exit 1", "exit 127"], ids=["missing", "old", "a shim of none"])
def test_make_asks_for_a_python_that_serves(script, tmp_path):
    for name in ("Makefile", ".python-version"):
        shutil.copy(ROOT / name, tmp_path)
    interpreter = tmp_path / "python"
    if script:
        interpreter.write_text(f"#!/bin/sh\n{script}\n")
        interpreter.chmod(0o755)
    command = ["make", f"PYTHON={interpreter}", "demo"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode
    assert f"error: {interpreter} is not a Python 3.12 or newer; install one" in run.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_readmes_example_runs(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    run = python(block, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    assert run.stdout == "(1, 9360, 2, 64) 97% sparse\n"


def test_the_readmes_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+?)(?:#[\w-]+)?\)", (ROOT / "README.md").read_text())
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 10
    assert [link for link in local if not (ROOT / link).is_file()] == []


def test_in_a_checkout_the_folders_names_are_the_same_modules(tmp_path):
    code = """
import models.errors, train.config, pallas_kernels, triton_kernels
from models.wan.config import WanConfig
import monarchrt.models.wan.config, monarchrt.models.errors, monarchrt.train.config
assert WanConfig is monarchrt.models.wan.config.WanConfig
assert models.errors is monarchrt.models.errors and train.config is monarchrt.train.config
assert monarchrt.pallas_kernels is pallas_kernels and monarchrt.triton_kernels is triton_kernels
assert models.errors.__spec__.name == "monarchrt.models.errors"
"""
    run = python(code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert run.returncode == 0, run.stderr
    for name in ("train", "monarchrt"):
        command = [sys.executable, "-m", name, "--version"]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.stdout == f"monarchrt {monarch_jax.__version__}\n", run.stderr


def test_the_version_is_dated():
    """In the changelog and in what is to be cited."""
    version = monarch_jax.__version__
    (day,) = re.findall(
        rf"^## \[{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {version}" in citation
    assert f"date-released: {day}" in citation
