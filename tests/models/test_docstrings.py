"""The examples in docstrings run."""

import doctest
import importlib
import pkgutil

import pytest

from monarchrt import models

MODULES = [module.name for module in pkgutil.walk_packages(models.__path__, "monarchrt.models.")]


SLOW = ("monarchrt.models.generate.decoders", "monarchrt.models.vae.tiny", "monarchrt.models.vae.vae")  # VAEs


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in MODULES])
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    examples = sum(len(test.examples) for name in MODULES for test in finder.find(importlib.import_module(name)))
    assert examples > 30
