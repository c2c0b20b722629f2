"""Kinds are known by their own files alone: everything else goes through the protocol."""

import ast
import pathlib
import re

import pytest

from monarchrt.models.attention.registry import kind_named, names

ROOT = pathlib.Path(__file__).parents[3]
OWN = ROOT / "models" / "attention"
FILES = [
    path
    for folder in ("benchmarks", "examples", "models", "monarch_jax", "pallas_kernels", "train", "triton_kernels")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if OWN not in path.parents
]
CLASSES_IN = {"models/wan/__init__.py", "examples/finetune_wan.py"}  # names that people import, and how
DATA = {  # programs that choose settings by notation, or say in a label what was measured: as data, without a branch
    "benchmarks/attention.py",
    "benchmarks/attention_settings.py",
    "benchmarks/claims.py",
    "benchmarks/stages.py",
    "benchmarks/finetuning.py",
    "benchmarks/distill.py",
    "benchmarks/scale.py",
    "train/cli/doctor.py",
    "train/demo/config.py",
    "train/demo/distil.py",
    "train/demo/few_steps.py",
    "train/demo/pictures.py",
    "train/demo/run.py",
}
SHARED = {"__init__", "base", "registry", "notation", "softmax", "masked", "listed"}  # by kinds
KINDS = {name for name in names() if kind_named(name).__module__.startswith("monarchrt.")}  # not those of other tests
CLASSES = {kind_named(name).__name__ for name in KINDS}
KEYS = {"OWN_KEY"}  # the name under which our settings lie in other programs' files is that of the project


def kind_in(node):
    """The kind that a piece of a program names, by its class or in a text, or None."""
    if isinstance(node, ast.Name | ast.Attribute | ast.alias):
        name = node.id if isinstance(node, ast.Name) else getattr(node, "attr", getattr(node, "name", ""))
        return name if name.split(".")[-1] in CLASSES else None
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value if re.split(r"\W", node.value)[0] in KINDS else None
    return None


def ignored(tree):
    """Strings that are statements, which say something to people, and names of our settings in other files."""
    strings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and any(isinstance(x, ast.Name) and x.id in KEYS for x in node.targets):
            strings |= {id(part) for part in ast.walk(node.value)}
    return strings


def asks(node):
    """Whether a program decides something here: a comparison, a case, or a question about a type or a text."""
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return name in {"isinstance", "issubclass", "startswith", "endswith", "removeprefix", "match", "fullmatch"}
    return isinstance(node, ast.Compare | ast.match_case)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_knows_a_kind(path):
    tree, name = ast.parse(path.read_text()), str(path.relative_to(ROOT))
    skipped = ignored(tree)
    named = [node for node in ast.walk(tree) if kind_in(node) and id(node) not in skipped]
    if name in CLASSES_IN:
        named = [node for node in named if isinstance(node, ast.Constant)]
        named = [node for node in named if node.value not in CLASSES]
    if name in DATA:
        named = [node for node in named if not isinstance(node, ast.Constant)]
    assert not [kind_in(node) for node in named]


@pytest.mark.parametrize("name", sorted(DATA | CLASSES_IN))
def test_no_other_file_branches_on_a_kind(name):
    tree = ast.parse((ROOT / name).read_text())
    pieces = [piece for node in ast.walk(tree) if asks(node) for piece in ast.walk(node)]
    assert not [kind_in(piece) for piece in pieces if kind_in(piece)]
    assert any(kind_in(node) for node in ast.walk(tree)), "names no kind: it need not be in the list"


@pytest.mark.parametrize(
    "program",
    [
        'if attention == "dense":\n    pass',
        'rows = [row for row in rows if row["attention"] in ("dense", "monarch 95%")]',
        "tile = setting.tile if isinstance(setting, MonarchAttention) else None",
        "isinstance(setting, wan.DenseAttention)",
        'match kind:\n    case "monarch":\n        pass',
        'text.startswith("monarch")',
    ],
)
def test_what_counts_as_a_branch(program):
    assert any(kind_in(piece) for node in ast.walk(ast.parse(program)) if asks(node) for piece in ast.walk(node))


def test_kinds_do_not_know_each_other():
    kinds = {path.stem for path in OWN.glob("*.py")} - SHARED
    assert {"dense", "monarch", "schedule", "vsa"} <= kinds
    for name in kinds:
        tree = ast.parse((OWN / f"{name}.py").read_text())
        imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        others = {f"monarchrt.models.attention.{other}" for other in kinds}
        assert not imported & others
