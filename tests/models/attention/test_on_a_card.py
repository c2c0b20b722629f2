"""The exact forms of the kinds, at the size of 480p, on a GPU and on a CPU: XLA has made wrong programs of masks."""

import jax
import numpy as np
import pytest

from monarchrt.models.attention.notation import parse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize(
    ("text", "grid"),
    [
        ("sliding_tile(implementation=exact)", (21, 30, 52)),
        ("sliding_tile(tile=(1,5,4), window=(5,3,9), implementation=exact)", (21, 30, 52)),
        ("radial(keep=0.15, implementation=exact)", (21, 30, 52)),
        ("svg(keep=0.15, implementation=exact)", (21, 30, 52)),
        ("vsa(keep=0.1, gate=False, implementation=exact)", (21, 30, 52)),
        ("sla(keep=0.15, linear=False, implementation=exact)", (21, 30, 52)),
        ("svg2", (21, 15, 52)),
        ("top_k(keep=0.1)", (21, 15, 52)),
    ],
)
def test_a_gpu_has_the_numbers_of_a_cpu(text, grid):
    x = np.random.default_rng(0).standard_normal((3, 1, int(np.prod(grid)), 1, 32)).astype(np.float32)
    setting = parse(text)
    with jax.default_matmul_precision("highest"):
        attend = jax.jit(lambda *x: setting(*x, grid=grid))
        found, expected = (np.asarray(attend(*jax.device_put(x, jax.devices(name)[0]))) for name in ("gpu", "cpu"))
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)
