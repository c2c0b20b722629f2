"""What functions of the Triton kernels take and give is said in their signatures, those of the device too."""

import ast
import pathlib

import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "triton_kernels"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_every_argument_and_result_has_a_type(path):
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        listed = node.args
        several = [argument for argument in (listed.vararg, listed.kwarg) if argument]
        arguments = [*listed.posonlyargs, *listed.args, *listed.kwonlyargs, *several]
        assert not [argument.arg for argument in arguments if argument.annotation is None], node.name
        assert node.returns is not None, node.name
