"""What the fused Mosaic kernel does on registers, on a warpgroup in NumPy; the rest of it needs a Hopper GPU."""

import types
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from monarchrt.pallas_kernels.sm90 import cluster, cluster_store, fused
from monarchrt.pallas_kernels.sm90.config import FusedConfig
from tests.kernels.warpgroup import BLOCK_BYTES, matrix, mlir, number, registers, run

FORMS = [FusedConfig(), FusedConfig(blocks=8, columns=8), FusedConfig(blocks=8, columns=7)]
forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.blocks}x{form.columns}")


def attended(monkeypatch, scores, y, dtype):
    """Output and log2-sum-exp of rows [64, n] of scores over y [columns, n, 128], of each column's own, by steps."""
    together = len(y)
    depth, height = 32 // together, 64 // together
    top, total, sums = np.full(64, -np.inf), np.zeros((64, 8)), np.zeros((64, 128))
    tops = []
    for at in range(0, scores.shape[1], depth):
        held = (registers(x) for x in (scores[:, at : at + depth], top, total, sums))
        found = run(monkeypatch, cluster, "softmax_step", *held, dtype)
        weights, top, total, sums = map(matrix, found)
        own = np.kron(np.eye(together, dtype=bool), np.ones((height, depth), bool))
        assert not weights[~own].any()
        sums = sums + weights @ y[:, at : at + depth].reshape(32, 128)
        tops.append(top)
    total = total.sum(1)
    return sums / total[:, None], top + np.log2(total), np.array(tops)


def expected(scores, y):
    scores = scores.astype(np.float64)
    shifted = np.exp2(scores - scores.max(1, keepdims=True))
    lse = scores.max(1) + np.log2(shifted.sum(1))
    p = shifted / shifted.sum(1, keepdims=True)
    return np.concatenate([a @ b for a, b in zip(np.split(p, len(y)), y, strict=True)]), lse


@pytest.mark.parametrize("together", [2, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("scale", "growth"), [(1, 0), (6, 0), (60, 0), (3, 4), (1, 12)])
def test_softmax_over_steps(monkeypatch, dtype, scale, growth, together):
    """Scores that the first step has seen, and ones that outgrow it by far more than 2^8; some key rows are hidden."""
    rng = np.random.default_rng(0)
    scores = scale * rng.normal(size=(64, 96)) + growth * np.arange(96) / 16 * rng.random((64, 1))
    scores[5:40, 17:23] = -np.inf
    y = rng.normal(size=(together, 96, 128))
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


@forms
@pytest.mark.parametrize("cols", [52, 5])
def test_every_vector_is_sent_where_it_is_summed(monkeypatch, form, cols):
    """alpha, whose columns of D travel in another order, and c_L: each byte that an owner waits for, and no other."""
    owners, stage, target, barriers, entropies = -(-cols // form.columns), 1, 4096, 256, 65536
    values = np.arange(64 * 128, dtype=np.float32).reshape(64, 128)
    memory = {}
    with mlir():
        for block in range(form.blocks):
            mine = values + 10_000 * block
            for slab in range(2):
                rows = registers(mine[:, 64 * slab : 64 * slab + 64])
                options = dict(stage=number(stage), slab=slab, form=form, memory=memory)
                run(monkeypatch, cluster, "send", barriers, 3, target, number(block), owners, rows, **options)
            options = dict(stage=number(stage), form=form, memory=memory)
            numbers = registers(mine[:, 0])
            args = (barriers, 2, entropies, number(block), owners, numbers)
            run(monkeypatch, cluster, "send_entropies", *args, **options)
    for owner in range(owners):
        for column in range(form.columns):
            group, place = divmod(column, form.together)
            for block in range(form.blocks):
                row = place * form.blocks + block
                right = values[owner * form.columns + column] + 10_000 * block
                sent = right.reshape(4, 4, 4, 2).transpose(0, 2, 1, 3).reshape(128)  # of 32, [n, p, 2] as [p, n, 2]
                found = np.empty(128, np.float32)
                for chunk in range(16):
                    slab, inside = divmod(chunk, 8)
                    at = (stage * 2 + group) * 2 * 4096 + slab * 4096 + row * 128 + (inside ^ row % 8) * 16
                    for word in range(4):
                        barrier, pair = memory.pop(owner * BLOCK_BYTES + target + at + 4 * word)
                        assert barrier == owner * BLOCK_BYTES + barriers + 8 * 3
                        found[8 * chunk + 2 * word : 8 * chunk + 2 * word + 2] = pair
                np.testing.assert_array_equal(found, sent)
                barrier, number_ = memory.pop(owner * BLOCK_BYTES + entropies + 4 * ((stage * 2 + group) * 32 + row))
                assert barrier == owner * BLOCK_BYTES + barriers + 8 * 2
                assert number_ == right[0]
    assert not memory


@pytest.mark.parametrize(("together", "rows", "count"), [(2, 30, 2), (2, 32, 1), (4, 15, 4), (4, 7, 3), (4, 16, 0)])
def test_output_and_numbers_are_stored_in_their_place(monkeypatch, together, rows, count):
    """Every row of the columns that there are, from the order of Y's columns, and nothing else."""
    values = np.arange(64 * 128, dtype=np.float32).reshape(64, 128)
    height, steps, place = 64 // together, (640, 12), 17
    lse, memory, numbers = np.arange(64, dtype=np.float32), {}, {}
    with mlir():
        held = registers(values)
        options = {"rows": rows, "steps": steps, "together": together}
        run(monkeypatch, cluster_store, "output", 4096, number(place), number(count), held, memory=memory, **options)
        args = 1024, number(place), number(count), registers(lse)
        run(monkeypatch, cluster_store, "numbers", *args, memory=numbers, together=together)
    right = values.reshape(64, 4, 4, 4, 2).transpose(0, 1, 3, 2, 4).reshape(64, 128)  # of 32, [n, p, 2] as [p, n, 2]
    for column in range(count):
        for row in range(rows):
            at = 4096 + (place + row * steps[0] + column * steps[1]) * 256
            found = [memory.pop(at + 4 * n) for n in range(64)]
            np.testing.assert_array_equal(np.array(found).reshape(128), right[column * height + row])
        for row in range(height):
            assert numbers.pop(1024 + 4 * (place + column * height + row)) == lse[column * height + row]
    assert not memory
    assert not numbers


@pytest.mark.parametrize("together", [2, 4])
def test_logits_are_of_a_rows_column(monkeypatch, together):
    rng = np.random.default_rng(2)
    products, c = rng.normal(size=(64, 32)).astype(np.float32), rng.normal(size=32).astype(np.float32)
    memory = {1024 + 4 * n: x for n, x in enumerate(c)}
    with mlir():
        args = (registers(products), 1000, number(24), 3.0, together)
        found = matrix(run(monkeypatch, cluster, "logits", *args, memory=memory))
    column = np.arange(64) // (64 // together)
    right = [3 * np.split(x, together)[n] - np.split(c, together)[n] for x, n in zip(products, column, strict=True)]
    np.testing.assert_allclose(found, right, rtol=1e-6)


@forms
@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize(("rows", "seen"), [(15, 42), (15, 1), (4, 1), (7, 5), (16, 2)])
def test_every_key_row_is_made_once(form, resident, rows, seen):
    """And with the query row of its k: the one that the warpgroup has, or that is loaded for it."""
    limit = rows * seen
    steps = -(-limit // form.blocks)
    found, loads = [], 0
    for rank in range(form.blocks):
        block = object.__new__(fused._Block)
        block.form = FusedConfig(blocks=form.blocks, columns=form.columns, resident=resident)
        block.sizes, block.block = cast(Any, types.SimpleNamespace(rows=rows)), jnp.int32(rank)
        held, free = [-1, -1], [True, True]  # of the two warpgroups that make key rows in turn
        for i in range(steps):
            pair, k, live = (int(x) for x in block.pair(jnp.int32(i), jnp.int32(limit), steps))
            assert pair % rows == k
            if block.anew(i, -2, limit, steps):
                assert free[i % 2]
                held[i % 2], free[i % 2] = k, False
                loads += 1
            assert held[i % 2] == k
            free[i % 2] = free[i % 2] or bool(block.anew(i, 2, limit, steps))
            found += [pair] * live
        assert free == [True, True]
    assert sorted(found) == list(range(limit))
    assert not resident or loads <= form.blocks * 2 * min(steps, 1 + -(-steps // seen))
