"""Kinds are known by their own files alone: everything else goes through the protocol."""

import ast
import pathlib

import pytest

from monarchrt.models.attention.registry import kind_named, names

ROOT = pathlib.Path(__file__).parents[3]
OWN = ROOT / "models" / "attention"
# names that people import, the registry's rows, and where a program names settings in the notation
ALLOWED = {"models/wan/__init__.py", "train/demo/config.py", "train/demo/run.py", "train/demo/pictures.py",
           "train/cli/doctor.py"}  # fmt: skip
FILES = [
    path
    for folder in ("models", "train")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if OWN not in path.parents and str(path.relative_to(ROOT)) not in ALLOWED
]
SHARED = {"__init__", "base", "registry", "notation", "softmax", "masked"}  # by kinds
CLASSES = {kind_named(name).__name__ for name in names()}
KEYS = {"OWN_KEY", "demo"}  # the name under which our settings lie in other programs' files is that of the project


def documentation(tree):
    """Strings that are statements, which say something to people."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_knows_a_kind(path):
    tree = ast.parse(path.read_text())
    said, found = documentation(tree), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(x, ast.Name) and x.id in KEYS for x in node.targets):
            said |= {id(part) for part in ast.walk(node.value)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute | ast.alias):
            name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", getattr(node, "name", ""))
            found += [name] * (name.split(".")[-1] in CLASSES)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            found += [node.value] * (node.value.partition("(")[0] in names())
    assert not found


def test_kinds_do_not_know_each_other():
    kinds = {path.stem for path in OWN.glob("*.py")} - SHARED
    assert {"dense", "monarch", "schedule", "vsa"} <= kinds
    for name in kinds:
        tree = ast.parse((OWN / f"{name}.py").read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        others = {f"monarchrt.models.attention.{other}" for other in kinds}
        assert not imported & others
