"""Documentation and examples: every Python block of the pages and every script in examples/ runs."""

import os
import re
from pathlib import Path

import pytest

from tests import forks

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
CLIENT = ROOT / "examples" / "stream_client.py"  # needs a server: it runs in tests/models/serve
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {CLIENT})
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT / 'docs')}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


@pytest.fixture(scope="module")
def run(compiled):
    """Runs a program in a process of its own: what it prints."""

    def run(program, folder):
        own = {name: value for name, value in os.environ.items() if name != "JAX_NUMPY_RANK_PROMOTION"}  # as users have
        cache = {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        environment = own | cache | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        process = forks.start(program, environment=environment, folder=folder, imports=("jax", "flax.nnx"))
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        return out

    return run


def script(path):
    """A program that is the script."""
    return f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')"


@pytest.mark.parametrize("block", BLOCKS)
def test_the_pages_code_runs(block, run, tmp_path):
    assert run(block, tmp_path).strip(), "a block that prints nothing shows nothing"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_run(path, run, tmp_path):
    assert len(path.read_text().splitlines()) < 100
    assert f"python examples/{path.name}" in path.read_text()
    assert run(script(path), tmp_path).strip()


@pytest.mark.slow
def test_the_mesh_example_splits_the_batch(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert "on 4 device(s)" in run(script(ROOT / "examples" / "train_mesh.py"), tmp_path)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in PAGES if str(page.relative_to(ROOT / "docs")) not in navigation] == []


def test_what_pages_include_is_whole():
    """A file, or a section with a beginning and an end; lines by their numbers move when others are written."""
    included = [found for page in PAGES for found in re.findall(r'^--8<-- "(.*)"$', page.read_text(), re.MULTILINE)]
    assert "models/attention/README.md:kinds" in included
    for found in included:
        name, _, section = found.partition(":")
        text = (ROOT / name).read_text()
        if section:
            marks = re.findall(rf"--8<-- \[(start|end):{re.escape(section)}\]", text)
            assert marks == ["start", "end"], found


def test_the_pictures_are_drawn_by_a_command(tmp_path):
    """The script draws those that the pages show."""
    script = (ROOT / "docs" / "pictures.py").read_text()
    found = (re.findall(r"(?<!demo/)assets/([\w.]+)", page.read_text()) for page in PAGES)
    shown = {name for names in found for name in names} | {"demo.webp"}
    assert shown
    assert all(f'"{name}"' in script and (ROOT / "docs" / "assets" / name).is_file() for name in shown)
