"""What functions of the kernels take and give is said in their signatures, those that run on the device too."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = [path for name in ("pallas_kernels", "triton_kernels") for path in sorted((ROOT / name).rglob("*.py"))]


def functions(body: list[ast.stmt], outer: str = "") -> Iterator[tuple[str, ast.FunctionDef, bool]]:
    """Name and definition of every function and method, and whether the first argument is what it is a method of."""
    for node in body:
        if isinstance(node, ast.ClassDef):
            yield from functions(node.body, f"{outer}{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            static = any(isinstance(x, ast.Name) and x.id == "staticmethod" for x in node.decorator_list)
            yield outer + node.name, node, bool(outer) and not static


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_argument_and_result_has_a_type(path):
    for name, node, bound in functions(ast.parse(path.read_text()).body):
        listed = node.args
        several = [argument for argument in (listed.vararg, listed.kwarg) if argument]
        arguments = [*listed.posonlyargs, *listed.args, *listed.kwonlyargs, *several][bound:]
        assert not [argument.arg for argument in arguments if argument.annotation is None], name
        assert node.returns is not None, name
