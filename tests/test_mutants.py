"""The faults that `make mutants` injects: each fits the code and names tests that are there."""

import ast
from pathlib import Path

from tests.mutants.faults import FAULTS

ROOT = Path(__file__).parent.parent


def test_each_fault_changes_text_that_is_there_once():
    """Else a change of that text has left the fault behind, and nobody tries it."""
    assert len(FAULTS) > 200
    unfit = [x for x in FAULTS if (ROOT / x.file).read_text().count(x.before) != 1 or x.before == x.after]
    assert unfit == []


def test_each_fault_leaves_a_program():
    """A file that cannot be read fails every test, and shows nothing."""
    for fault in FAULTS:
        if fault.file.endswith(".py"):
            ast.parse((ROOT / fault.file).read_text().replace(fault.before, fault.after, 1), filename=repr(fault))


def test_the_tests_that_faults_name_are_there():
    missing = {test for fault in FAULTS for test in fault.tests if not (ROOT / test).exists()}
    assert missing == set()
