"""What the fused Mosaic kernel does on registers, on a warpgroup in NumPy; the rest of it needs a Hopper GPU."""

import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from monarchrt.pallas_kernels.sm90 import cluster
from tests.kernels.warpgroup import matrix, mlir, registers, run


def attended(monkeypatch, scores, y, dtype):
    """Output and log2-sum-exp of rows [64, n] of scores over y [2, n, 128], of each half's own, 16 at a time."""
    top, total, sums = np.full(64, -np.inf), np.zeros((64, 8)), np.zeros((64, 128))
    tops = []
    for at in range(0, scores.shape[1], 16):
        held = (registers(x) for x in (scores[:, at : at + 16], top, total, sums))
        found = run(monkeypatch, cluster, "softmax_step", *held, dtype)
        weights, top, total, sums = map(matrix, found)
        assert not weights[:32, 16:].any()
        assert not weights[32:, :16].any()
        sums = sums + weights @ y[:, at : at + 16].reshape(32, 128)
        tops.append(top)
    total = total.sum(1)
    return sums / total[:, None], top + np.log2(total), np.array(tops)


def expected(scores, y):
    scores = scores.astype(np.float64)
    shifted = np.exp2(scores - scores.max(1, keepdims=True))
    lse = scores.max(1) + np.log2(shifted.sum(1))
    p = shifted / shifted.sum(1, keepdims=True)
    return np.concatenate([p[:32] @ y[0], p[32:] @ y[1]]), lse


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("scale", "growth"), [(1, 0), (6, 0), (60, 0), (3, 4), (1, 12)])
def test_softmax_over_steps(monkeypatch, dtype, scale, growth):
    """Scores that the first step has seen, and ones that outgrow it by far more than 2^8; some key rows are hidden."""
    rng = np.random.default_rng(0)
    scores = scale * rng.normal(size=(64, 96)) + growth * np.arange(96) / 16 * rng.random((64, 1))
    scores[5:40, 17:23] = -np.inf
    y = rng.normal(size=(2, 96, 128))
    with mlir():
        out, lse, tops = attended(monkeypatch, scores, y, dtype)
    right, right_lse = expected(scores, y)
    assert np.linalg.norm(out - right) <= 4e-3 * np.linalg.norm(right)
    np.testing.assert_allclose(lse, right_lse, atol=1e-4)
    follows = (tops[1:] > tops[:-1]).any()
    assert follows == (max(scale, growth) > 1)  # else the first step's largest score would do


def test_nan_stays_in_its_row(monkeypatch):
    rng = np.random.default_rng(1)
    scores, y = rng.normal(size=(64, 48)), rng.normal(size=(2, 48, 128))
    bad = scores.copy()
    bad[[3, 40], [20, 2]] = np.nan
    with mlir():
        good, _, _ = attended(monkeypatch, scores, y, "bfloat16")
        found, _, _ = attended(monkeypatch, bad, y, "bfloat16")
    assert np.isnan(found[[3, 40]]).all()
    others = np.delete(np.arange(64), [3, 40])
    np.testing.assert_array_equal(found[others], good[others])
