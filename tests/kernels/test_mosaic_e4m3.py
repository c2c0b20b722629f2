"""The Mosaic GPU kernels with alpha and Y in 8 bits, without a card: sizes, refusals, numbers in the interpreter."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import monarch_attention, xla
from monarch_jax.contract import Problem
from monarchrt import pallas_kernels
from monarchrt.pallas_kernels.sm90 import tuning
from monarchrt.pallas_kernels.sm90.config import (
    SHARED_MEMORY,
    LeftE4M3Config,
    forward_config,
    left_e4m3_config,
    right_config,
)
from monarchrt.pallas_kernels.sm90.forward import forward
from tests.attention.suite import error
from tests.kernels.mosaic_interpreter import interpreted
from tests.untyped import there

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")


def test_sizes_fit_a_block_and_registers_its_threads():
    for dim, rows in itertools.product((64, 128), (1, 30, 64, 65, 90, 135, 1560)):
        config = left_e4m3_config(rows, dim)
        assert config.shared_memory(dim) <= SHARED_MEMORY
        compute, _, load = config.registers
        assert 128 * (2 * compute + config.converting + load) <= 65536
    for cols in (30, 52, 80):
        right = there(right_config(cols, 128))
        assert right.shared_memory(cols, 128, width=1) < right.shared_memory(cols, 128)
    tuned, plain = there(tuning.forward(45, 80, 128, e4m3=True)), there(tuning.forward(45, 80, 128))
    assert tuned.right == plain.right  # what was measured of stage 1, unless 8 bits have an entry
    assert isinstance(tuned.left, LeftE4M3Config)
    assert there(tuning.forward(90, 52, 128, e4m3=True)).right != there(tuning.forward(90, 52, 128)).right
    assert not there(tuning.forward(30, 52, 128, e4m3=True)).fused.clusters
    with pytest.raises(ValueError, match="columns=1, row_blocks=3, tail=0: alpha and Y in 8 bits"):
        LeftE4M3Config(columns=1, row_blocks=3)
    with pytest.raises(ValueError, match="raw=3, cells=1: at least 1 and 2"):
        LeftE4M3Config(cells=1)


def test_the_forward_pass_is_taken_and_the_gradient_is_not():
    q = jax.ShapeDtypeStruct((1, 2, 30, 52, 3, 64), jnp.bfloat16)
    problem = Problem(scale=1.0, intermediates="e4m3")
    assert pallas_kernels.supports(problem, q, q) is None
    assert "intermediates='e4m3'; the gradients take" in there(pallas_kernels.supports_vjp(problem, q, q))


CASES = [
    ((1, 1, 2, 3, 1, 64), 1, (1,), dict(left=dict(blocks=1), right=dict(blocks=1))),
    ((1, 2, 2, 3, 1, 64), 2, (1, 2), {}),
    ((1, 2, 5, 40, 1, 64), 2, None, {}),
    ((2, 2, 3, 9, 2, 64), 3, (1, 2), dict(chunk_bytes=2**13)),  # one head and tile at a time
    ((1, 4, 2, 16, 1, 64), 2, None, {}),  # four query tiles share a block
    ((1, 1, 70, 35, 1, 128), 2, None, dict(left=dict(raw=3, cells=3))),  # steps of 128 pairs, rings in turns
    ((1, 3, 70, 9, 1, 64), 2, (1, 0, 2), dict(left=dict(raw=2, cells=2))),  # a query tile that sees nothing
    ((1, 1, 130, 3, 1, 64), 1, (1,), {}),  # two groups of rows
    ((1, 2, 3, 33, 1, 128), 2, (1, 2), dict(right=dict(query_stages=2, together=True))),
]


def run(monkeypatch, shape, key_tiles, visible, sizes, *, detect_races=False, factors=(1.0, 1.0)):
    """What the kernels give in the interpreter, and what XLA does; key tiles that no query sees hold NaN.

    Queries and values are multiplied by `factors`.
    """
    rng = np.random.default_rng(0)
    batch, tiles, rows, cols, heads, dim = shape
    shapes = [(batch, n, rows, cols, heads, dim) for n in (tiles, key_tiles, key_tiles)]
    q, k, v = (jnp.asarray(rng.standard_normal(s, np.float32), jnp.bfloat16) for s in shapes)
    q, v = (x * jnp.asarray(y, x.dtype) for x, y in zip((q, v), factors, strict=True))
    masked = visible is not None
    visible = jnp.array(visible if masked else (key_tiles,) * tiles, jnp.int32)
    seen = (np.arange(key_tiles) < np.max(visible)).reshape(1, -1, 1, 1, 1, 1)
    k, v = (jnp.asarray(np.where(seen, x, np.nan).astype(x.dtype)) for x in (k, v))
    config = tuning.changed(forward_config(rows, cols, dim, e4m3=True), {"right": {"blocks": 2}, "left": {"blocks": 2}})
    config = tuning.changed(config, sizes)
    with interpreted(monkeypatch, detect_races=detect_races) as races:
        found = forward(q, k, v, visible, scale=dim**-0.5, masked=masked, config=config)[:2]
        found = [np.asarray(x.astype(jnp.float32)) for x in found]
        if detect_races:
            assert not races()
    problem = Problem(scale=dim**-0.5, masked=masked, intermediates="e4m3")
    expected = xla.forward(problem, q, k, v, visible)
    sees = np.flatnonzero(visible)
    return [x[:, sees] for x in found], [np.asarray(x.astype(jnp.float32))[:, sees] for x in expected]


@pytest.mark.parametrize(
    ("shape", "key_tiles", "visible", "sizes"),
    [pytest.param(*x, marks=[pytest.mark.slow] * (n > 0)) for n, x in enumerate(CASES)],
)
def test_numbers_in_the_interpreter(monkeypatch, shape, key_tiles, visible, sizes):
    (out, lse), (expected, expected_lse) = run(monkeypatch, shape, key_tiles, visible, sizes)
    assert error(out, expected) < 1.5e-2  # 2.5e-2 is what 8 bits cost; sums in another order round to a neighbour
    assert error(lse, expected_lse) < 1e-3


@pytest.mark.parametrize(
    ("queries", "values"),
    [
        (1.0, 1e-20),
        pytest.param(1e-3, 1e15, marks=pytest.mark.slow),
        # of each key row, zeros beside 1e6
        pytest.param(8.0, np.array([0.0, 1e6, 1.0, 1e-9]).reshape(1, 2, 2, 1, 1, 1), marks=pytest.mark.slow),
    ],
)
def test_scales_far_apart(monkeypatch, queries, values):
    """The weights that meet Y in 8 bits have its scales in them, and a range of their own."""
    shape, factors = (1, 1, 2, 40, 1, 64), (queries, values)
    (out, lse), (expected, expected_lse) = run(monkeypatch, shape, 2, None, {}, factors=factors)
    assert error(out, expected) < 1.5e-2
    assert error(lse, expected_lse) < 1e-3


@pytest.mark.slow
def test_no_races(monkeypatch):
    """A place for every half step: c_L is read as other data is, which the interpreter wants fenced from copies."""
    (out, _), _ = run(monkeypatch, (1, 2, 70, 3, 1, 64), 1, (1, 1), dict(left=dict(raw=2, cells=2)), detect_races=True)
    assert np.isfinite(out).all()


@pytest.mark.slow
def test_lowers_with_both_kernels_and_gradients_by_xla():
    x = jax.ShapeDtypeStruct((1, 2 * 10 * 12, 2, 64), jnp.bfloat16)

    def attend(q, k, v):
        out = monarch_attention(q, k, v, grid=(2, 10, 12), intermediates="e4m3", implementation="mosaic")
        return out.astype(jnp.float32).sum()

    for program in (attend, jax.grad(attend, (0, 1, 2))):
        text = jax.jit(program).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
        assert len(re.findall("custom_call @mosaic_gpu", text)) == 2
        assert "f8E4M3FN" in text
