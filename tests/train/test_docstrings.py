"""The examples in the docstrings of `train` run."""

import doctest
import importlib
import pkgutil

import pytest

from monarchrt import train

FOUND = pkgutil.walk_packages(train.__path__, "monarchrt.train.")
MODULES = [module.name for module in FOUND if not module.name.endswith("__main__")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
