"""Documentation and examples: every Python block of the pages and every script in examples/ runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
CLIENT = ROOT / "examples" / "stream_client.py"  # needs a server: it runs in tests/models/serve
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {CLIENT})
BLOCKS = [
    pytest.param(block, id=f"{page.relative_to(ROOT / 'docs')}-{number}")
    for page in PAGES
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]


def run(*arguments, folder):
    own = {name: value for name, value in os.environ.items() if name != "JAX_NUMPY_RANK_PROMOTION"}  # as users have it
    environment = own | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("block", BLOCKS)
def test_the_pages_code_runs(block, tmp_path):
    assert run("-c", block, folder=tmp_path).strip(), "a block that prints nothing shows nothing"


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_run(script, tmp_path):
    assert len(script.read_text().splitlines()) < 100
    assert f"python examples/{script.name}" in script.read_text()
    assert run(script, folder=tmp_path).strip()


@pytest.mark.slow
def test_the_mesh_example_splits_the_batch(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert "on 4 device(s)" in run(ROOT / "examples" / "train_mesh.py", folder=tmp_path)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in PAGES if str(page.relative_to(ROOT / "docs")) not in navigation] == []


def test_the_pictures_are_drawn_by_a_command(tmp_path):
    """The script draws those that the pages show."""
    script = (ROOT / "docs" / "pictures.py").read_text()
    shown = {name for page in PAGES for name in re.findall(r"assets/([\w.]+)", page.read_text())} | {"demo.webp"}
    assert shown
    assert all(f'"{name}"' in script and (ROOT / "docs" / "assets" / name).is_file() for name in shown)
