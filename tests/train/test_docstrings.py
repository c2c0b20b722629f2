"""The examples in the docstrings of `train` run."""

import doctest
import importlib
import pkgutil

import pytest

import train

MODULES = ["train." + module.name for module in pkgutil.iter_modules(train.__path__) if module.name != "__main__"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
