import pytest


@pytest.fixture
def x64():
    """float64 for one test."""
    import jax

    with jax.enable_x64(True):
        yield
