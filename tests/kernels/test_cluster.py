"""What the fused Mosaic kernel does on registers, on a warpgroup in NumPy; the rest of it needs a Hopper GPU."""

import collections
import types
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest
from jaxlib.mlir import ir

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")

from monarchrt.pallas_kernels.sm90 import cluster, cluster_store, fused, fused_sizes
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


@pytest.mark.parametrize("wide", [False, True], ids=["16 bits", "float32"])
@pytest.mark.parametrize(("together", "rows", "count"), [(2, 30, 2), (2, 32, 1), (4, 15, 4), (4, 7, 3), (4, 16, 0)])
def test_output_and_numbers_are_stored_in_their_place(monkeypatch, together, rows, count, wide):
    """Every row of the columns that there are, from the order of Y's columns, and nothing else."""
    values = np.arange(64 * 128, dtype=np.float32).reshape(64, 128)
    height, steps, place = 64 // together, (640, 12), 17
    lse, memory, numbers = np.arange(64, dtype=np.float32), {}, {}
    with mlir():
        held = registers(values)
        held.mlir_dtype = ir.F32Type.get() if wide else ir.BF16Type.get()
        options = {"rows": rows, "steps": steps, "together": together}
        run(monkeypatch, cluster_store, "output", 4096, number(place), number(count), held, memory=memory, **options)
        args = 1024, number(place), number(count), registers(lse)
        run(monkeypatch, cluster_store, "numbers", *args, memory=numbers, together=together)
    right = values.reshape(64, 4, 4, 4, 2).transpose(0, 1, 3, 2, 4).reshape(64, 128)  # of 32, [n, p, 2] as [p, n, 2]
    for column in range(count):
        for row in range(rows):
            at = 4096 + (place + row * steps[0] + column * steps[1]) * 128 * (4 if wide else 2)
            found = [memory.pop(at + 4 * n) for n in range(128 if wide else 64)]
            np.testing.assert_array_equal(np.array(found).reshape(128), right[column * height + row])
        for row in range(height):
            assert numbers.pop(1024 + 4 * (place + column * height + row)) == lse[column * height + row]
    assert not memory
    assert not numbers


@pytest.mark.parametrize(("batch", "tiles", "heads", "clusters"), [(1, 42, 12, 15), (1, 6, 12, 15), (2, 3, 5, 7)])
def test_parts_of_keys_are_put_together(batch, tiles, heads, clusters):
    """Items that are left over, of several heads and of the end of a batch: attention over all keys from its parts."""
    rows, cols = 3, 2
    form = FusedConfig(clusters=clusters, blocks=8, columns=7, direct=True, spread=True)
    count = batch * tiles
    sizes = fused_sizes.Sizes(
        tiles=tiles,
        rows=rows,
        cols=cols,
        heads=heads,
        pairs=120,
        items=count * heads,
        form=form,
        scale=1.0,
        masked=False,
        dtype=jnp.dtype(jnp.float32),
    )
    left, parts = sizes.left
    rng = np.random.default_rng(5)
    scores = 4 * rng.normal(size=(parts, left, cols, form.rows, 6))
    y = rng.normal(size=(parts, left, cols, 6, 128))
    top = np.exp(scores)
    means = np.einsum("pljik,pljkd->plijd", top / top.sum(-1, keepdims=True), y)[:, :, :rows]
    numbers = np.log(top.sum(-1))
    weights = top / top.sum((0, -1))[None, ..., None]
    right = np.einsum("pljik,pljkd->lijd", weights, y)[:, :rows]
    out = jnp.zeros((count, rows, cols * heads, 2, 64))
    lse = jnp.zeros((count, heads, cols, form.rows))
    out, lse = fused_sizes.put_together(sizes, out, lse, jnp.float32(means), jnp.float32(numbers))
    out = np.asarray(out).reshape(batch, tiles, rows, cols, heads, 128).transpose(0, 4, 1, 2, 3, 5)
    out, lse = out.reshape(-1, rows, cols, 128), np.asarray(lse).reshape(batch, tiles, heads, cols, -1)
    lse = lse.transpose(0, 2, 1, 3, 4).reshape(-1, cols, form.rows)
    assert not out[:-left].any()
    assert not lse[:-left].any()
    np.testing.assert_allclose(out[-left:], right, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse[-left:], np.log(top.sum((0, -1))), rtol=1e-5)


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
@pytest.mark.parametrize("parts", [1, 3])
def test_every_key_row_is_made_once(form, resident, rows, seen, parts):
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
            part = next(n for n in range(parts) if i < (n + 1) * steps // parts)
            low, high = (n * steps // parts for n in (part, part + 1))
            span = (low, high - low)
            if block.anew(i, -2, limit, steps, span):
                assert free[i % 2]
                held[i % 2], free[i % 2] = k, False
                loads += 1
            assert held[i % 2] == k
            free[i % 2] = free[i % 2] or bool(block.anew(i, 2, limit, steps, span))
            found += [pair] * live
        assert free == [True, True]
    assert sorted(found) == list(range(limit))
    assert not resident or loads <= form.blocks * 2 * min(steps, parts + -(-steps // seen))


@pytest.mark.parametrize(
    ("items", "clusters", "seen"), [(504, 15, 42), (72, 15, 42), (9, 15, 4), (20, 15, 1), (45, 15, 4)]
)
@pytest.mark.parametrize("resident", [False, True])
def test_items_left_over_are_spread(items, clusters, seen, resident):
    """Every cluster has as many turns, of nearly as many steps, and every pair of every item is made in one of them."""
    rows, heads = 15, 3
    form = FusedConfig(clusters=clusters, blocks=8, columns=7, direct=True, spread=True, resident=resident)
    sizes = fused_sizes.Sizes(
        tiles=items // heads,
        rows=rows,
        cols=52,
        heads=heads,
        pairs=rows * seen,
        items=items,
        form=form,
        scale=1.0,
        masked=False,
        dtype=jnp.dtype(jnp.bfloat16),
    )
    found, parts, lengths = collections.Counter(), collections.Counter(), set()
    for unit in range(clusters):
        block = object.__new__(fused._Block)
        block.form, block.sizes, block.unit = form, sizes, jnp.int32(unit)
        block.count_turns()
        length = 0
        for r in range(int(block.rounds)):
            tile, _, head, _limit, whole = (int(x) for x in block.place(jnp.int32(r)))
            first, count = (int(x) for x in block.span(jnp.int32(r), jnp.int32(whole)))
            length += count
            steps = range(first, first + count)
            if block.left and r >= block.full:
                item, part = (int(x) for x in block.piece(jnp.int32(r)))
                assert (head * sizes.tiles + tile) == items - block.left + item
                parts[item, part] += 1
            found.update((tile, head, step) for step in steps)
        lengths.add(length)
    left, count = sizes.left
    assert set(found.values()) == {1}
    assert len(found) == items * -(-rows * seen // form.blocks)
    assert sorted(parts) == [(item, part) for item in range(left) for part in range(count)]
    assert set(parts.values()) <= {1}
    if left:
        assert max(lengths) - min(lengths) <= left * count // clusters
    else:
        assert items % clusters == 0 or count == 1
