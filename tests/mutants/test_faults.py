"""The faults of `make mutants` can be put in; whether they are noticed takes minutes, and is asked for."""

import pathlib

import pytest

from tests.mutants.faults import FAULTS

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file}: {fault.before.strip()}")
def test_a_faults_place_is_there_once(fault):
    assert (ROOT / fault.file).read_text().count(fault.before) == 1
    assert fault.before != fault.after
    assert all((ROOT / name).exists() for name in fault.tests)
