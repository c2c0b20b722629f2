import jaxtyping
import pytest


@pytest.fixture
def x64():
    """float64 for one test."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked():
    """Annotations are not checked, as in a user's program: the library's own errors show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
