"""The examples in docstrings of the library and of both kernel packages run; other packages have their own test."""

import doctest
import importlib
import importlib.util
import pkgutil

import jaxtyping
import pytest

import monarch_jax
from monarchrt import pallas_kernels, triton_kernels

PACKAGES = {"monarch_jax": monarch_jax, "monarchrt.pallas_kernels": pallas_kernels}
PACKAGES["monarchrt.triton_kernels"] = triton_kernels
MODULES = [x.name for name, package in PACKAGES.items() for x in pkgutil.walk_packages(package.__path__, f"{name}.")]
NEED_TRITON = ("jit", "launch", "left", "operation", "overlapped", "right", "sparse", "streamed")
NEED_TRITON += ("refine", "refine_backward")


@pytest.mark.parametrize("name", [*PACKAGES, *MODULES])
def test_examples(name):
    if name.startswith("monarchrt.triton_kernels") and name.rpartition(".")[2] in NEED_TRITON:
        pytest.importorskip("triton")
        pytest.importorskip("jax_triton")
    jaxtyping.config.update("jaxtyping_disable", True)  # the library's own errors show
    try:
        assert doctest.testmod(importlib.import_module(name)).failed == 0
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    names = [name for name in MODULES if name.startswith("monarch_jax.")]
    assert sum(len(test.examples) for name in names for test in finder.find(importlib.import_module(name))) > 30
