"""The Mosaic GPU kernels on a Hopper card, against the definition in float64 on the same inputs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import MonarchKVCache, monarch_attention, xla
from monarch_jax.contract import Problem, Residuals
from monarchrt import pallas_kernels
from monarchrt.pallas_kernels.sm90 import tuning
from monarchrt.pallas_kernels.sm90.backward import backward
from monarchrt.pallas_kernels.sm90.config import FusedConfig, LeftBackwardConfig, backward_config, forward_config
from monarchrt.pallas_kernels.sm90.forward import forward
from tests.attention.suite import LAYOUTS, error, inputs, layers_in_one_cache, value_and_grads, with_grads
from tests.untyped import programs, there


def _hopper() -> bool:
    try:
        return str(jax.devices("gpu")[0].compute_capability) == "9.0"
    except RuntimeError:
        return False


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not _hopper(), reason="needs a Hopper GPU")]
BOUNDS = {"bfloat16": 1e-2, "float16": 2e-3}


def single(q, k, v):
    """The same in float32."""
    return q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32)


def compare(*arrays, **options):
    """Output against the reference in float64; two runs agree bit for bit."""
    run = jax.jit(lambda *x: monarch_attention(*x, implementation="mosaic", **options))
    out = run(*arrays)
    with jax.enable_x64(True):
        wide = (x.astype(jnp.float64) for x in arrays)
        expected = jax.jit(lambda *x: monarch_attention(*x, implementation="reference", **options))(*wide)
    assert error(out, expected) <= BOUNDS[arrays[0].dtype.name]
    np.testing.assert_array_equal(np.asarray(out), np.asarray(run(*arrays)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("grid", "tile"),
    [
        ((3, 30, 52), None),
        ((6, 15, 13), (3, 15, 13)),
        ((5, 45, 80), None),
        ((6, 45, 80), (3, 45, 80)),
        ((2, 7, 5), None),
    ],
)
def test_shapes(grid, tile, dim, dtype):
    compare(*inputs(0, grid, dim=dim, dtype=dtype)[:3], grid=grid, tile=tile)


@pytest.mark.parametrize("blocks", LAYOUTS)
def test_layouts(blocks):
    grid = (4, 6, 16)
    compare(*inputs(1, grid, dim=64, dtype="bfloat16")[:3], grid=grid, tile=(4, 6, 8), blocks=blocks)


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
def test_sharp_and_flat_softmaxes(sharpness):
    arrays = inputs(2, (4, 10, 26), dim=128, dtype="bfloat16", sharpness=sharpness)[:3]
    compare(*arrays, grid=(4, 10, 26))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("grid", "tile", "dim"),
    [
        ((3, 30, 52), None, 128),
        ((6, 30, 52), (3, 30, 52), 128),
        ((5, 45, 80), None, 128),
        ((6, 45, 80), (3, 45, 80), 128),
        ((2, 7, 5), None, 64),
    ],
)
def test_intermediates_in_8_bits(grid, tile, dim, dtype):
    """Against XLA, which rounds to the same 8 bits: a few entries round to a neighbour. Two runs agree bit for bit."""
    arrays = inputs(20, grid, dim=dim, dtype=dtype)[:3]
    options = dict(grid=grid, tile=tile, intermediates="e4m3")
    run, expected = (
        jax.jit(lambda *x, n=n: monarch_attention(*x, implementation=n, **options)) for n in ("mosaic", "xla")
    )
    out = run(*arrays)
    assert error(out, expected(*arrays)) <= 1.5e-2
    np.testing.assert_array_equal(np.asarray(out), np.asarray(run(*arrays)))
    half = (grid[0] // 2) * grid[1] * grid[2] if tile is None else tile[0] * grid[1] * grid[2]
    decode = jax.jit(
        lambda q, k, v: monarch_attention(
            q,
            k,
            v,
            implementation="mosaic",
            grid=(q.shape[1] // (grid[1] * grid[2]), *grid[1:]),
            tile=tile,
            intermediates="e4m3",
        )
    )
    assert error(decode(arrays[0][:, -half:], *arrays[1:]), out[:, -half:]) <= 1e-3


def test_intermediates_in_8_bits_with_masks():
    grid = (6, 10, 26)
    arrays = inputs(21, grid, dim=128, dtype="bfloat16")[:3]
    options = dict(grid=grid, tile=(3, 10, 26), causal_block=3, intermediates="e4m3")
    out, expected = (
        jax.jit(lambda *x, n=n: monarch_attention(*x, implementation=n, **options))(*arrays) for n in ("mosaic", "xla")
    )
    assert error(out, expected) <= 1.5e-2


@pytest.mark.parametrize("tile", [None, (3, 10, 26), (1, 5, 13)])
def test_block_causal(tile):
    compare(*inputs(3, (6, 10, 26), dim=64, dtype="bfloat16")[:3], grid=(6, 10, 26), tile=tile, causal_block=3)


def test_traced_kv_frames():
    """One program for every fill; what lies behind it is NaN."""
    grid, total = (3, 10, 26), 9
    q, k, v, _ = inputs(4, grid, key_frames=total, dim=64, dtype="bfloat16")
    run = jax.jit(lambda n, *x: monarch_attention(*x, grid=grid, kv_frames=n, implementation="mosaic"))
    for frames in (3, 6, 9):
        valid = frames * 260
        out = run(jnp.int32(frames), q, *(x.at[:, valid:].set(jnp.nan) for x in (k, v)))
        wide = (x.astype(jnp.float32) for x in (q, k[:, :valid], v[:, :valid]))
        assert error(out, monarch_attention(*wide, grid=grid, implementation="reference")) <= BOUNDS["bfloat16"]
    assert programs(run) == 1


def test_cache_equals_causal():
    grid = (9, 10, 13)
    q, k, v, _ = inputs(5, grid, dim=64, dtype="bfloat16")
    whole = monarch_attention(q, k, v, grid=grid, causal_block=3, implementation="mosaic")
    cache = MonarchKVCache.init(batch=2, frames=9, height=10, width=13, heads=3, head_dim=64, dtype=jnp.bfloat16)
    for block in range(3):
        at = slice(block * 390, (block + 1) * 390)
        cache = cache.append(k[:, at], v[:, at])
        assert error(cache.attend(q[:, at], implementation="mosaic"), whole[:, at]) <= 1e-3


@pytest.mark.parametrize("grid", [(3, 10, 13), (3, 30, 52)])
def test_layers_in_one_cache(grid):
    layers_in_one_cache("mosaic", grid=grid, heads=2, dim=128, dtype=jnp.bfloat16)


@pytest.mark.parametrize(("grid", "dim"), [((3, 10, 13), 64), ((3, 30, 52), 128)])
def test_vmap(grid, dim):
    stacked = [x.reshape(2, 2, *x.shape[1:]) for x in inputs(6, grid, batch=4, dim=dim, dtype="bfloat16")[:3]]

    def run(*x):
        return monarch_attention(*x, grid=grid, implementation="mosaic")

    for one, both in zip(jax.lax.map(lambda x: run(*x), tuple(stacked)), jax.vmap(run)(*stacked), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(both))


@pytest.mark.parametrize("rows", [30, 90])
def test_chunks_change_nothing(rows):
    """Nothing in the numbers, bit for bit."""
    keys = jax.random.split(jax.random.key(7), 3)
    q, k, v = (jax.random.normal(r, (1, 4, rows, 52, 6, 128), jnp.bfloat16) for r in keys)
    visible, config = jnp.full(4, 4, jnp.int32), there(forward_config(rows, 52, 128))
    whole, lse, _ = forward(q, k, v, visible, scale=0.1, masked=False, config=config)
    changed = dataclasses.replace(config, chunk_bytes=2**24)
    out, other, _ = forward(q, k, v, visible, scale=0.1, masked=False, config=changed)
    np.testing.assert_array_equal(np.asarray(out), np.asarray(whole))
    np.testing.assert_array_equal(np.asarray(other), np.asarray(lse))


FUSED = [
    dict(clusters=7),
    dict(clusters=7, resident=True, overlap=True),
    dict(clusters=7, resident=True, overlap=True, direct=True),
    dict(clusters=7, resident=True, overlap=True, direct=True, spread=True),
    dict(clusters=15, blocks=8, columns=8),
    dict(clusters=15, blocks=8, columns=7, resident=True, overlap=True),
    dict(clusters=15, blocks=8, columns=7, resident=True, overlap=True, direct=True),
    dict(clusters=15, blocks=8, columns=7, direct=True, spread=True),
]


@pytest.mark.parametrize(
    ("rows", "cols", "tiles", "key_tiles", "visible", "dtype"),
    [
        (30, 52, 21, 21, None, "bfloat16"),
        (30, 52, 3, 21, [18] * 3, "bfloat16"),
        (30, 52, 6, 6, [3, 3, 3, 6, 6, 6], "float16"),
        (32, 64, 5, 5, None, "bfloat16"),
        (7, 61, 3, 5, [1, 2, 5], "bfloat16"),
        (16, 5, 4, 4, None, "float16"),
        (4, 4, 2, 3, [1, 3], "bfloat16"),  # fewer pairs than a cluster has blocks
        (15, 52, 6, 42, [36] * 6, "bfloat16"),
        (15, 53, 7, 7, None, "float16"),
    ],
)
@pytest.mark.parametrize("form", FUSED, ids=str)
def test_fused(rows, cols, tiles, key_tiles, visible, dtype, form):
    """One kernel as two, for several batch entries and heads; twice the same bits; what is not seen is NaN."""
    form = FusedConfig(**form)
    if not form.serves(rows, cols, 128):
        pytest.skip("tiles that this kernel does not take")
    keys = jax.random.split(jax.random.key(12), 3)
    shapes = ((2, tiles, rows, cols, 5, 128), *[(2, key_tiles, rows, cols, 5, 128)] * 2)
    q, k, v = (jax.random.normal(r, s, dtype) for r, s in zip(keys, shapes, strict=True))
    options = dict(scale=128**-0.5, masked=visible is not None)
    seen = jnp.array(visible or [key_tiles] * tiles, jnp.int32)
    k, v = (x.at[:, int(seen.max()) :].set(jnp.nan) for x in (k, v))
    config = there(forward_config(rows, cols, 128))
    one = jax.jit(lambda *x: forward(*x, config=dataclasses.replace(config, fused=form), **options))
    out, lse, _ = one(q, k, v, seen)
    expected = forward(q, k, v, seen, config=config, **options)
    assert error(out, expected[0]) <= BOUNDS[dtype] / 2
    assert error(lse, expected[1]) <= 1e-4
    for x, y in zip(one(q, k, v, seen)[:2], (out, lse), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.mark.parametrize("sharpness", [0.1, 8.0, 40.0])
def test_fused_sharp_and_flat(sharpness):
    """Scores that outgrow the ones before by far more than 2^8."""
    keys = jax.random.split(jax.random.key(14), 3)
    q, k, v = (jax.random.normal(r, (1, 5, 30, 52, 3, 128), jnp.bfloat16) for r in keys)
    problem, seen = Problem(scale=sharpness * 128**-0.5), jnp.full(5, 5, jnp.int32)
    config = dataclasses.replace(there(forward_config(30, 52, 128)), fused=FusedConfig(clusters=7))
    out, lse, _ = forward(q, k, v, seen, scale=problem.scale, masked=False, config=config)
    with jax.default_matmul_precision("highest"):
        expected, right_lse = xla.forward(problem, *single(q, k, v), seen)
    assert error(out, expected) <= BOUNDS["bfloat16"]
    assert error(lse, right_lse) <= 1e-3


def test_fused_keeps_a_bad_example_to_itself():
    """NaN in one batch entry and head is in no other, though their key rows lie side by side in shared memory."""
    keys = jax.random.split(jax.random.key(13), 3)
    q, k, v = (jax.random.normal(r, (2, 3, 30, 52, 4, 128), jnp.bfloat16) for r in keys)
    problem, visible = Problem(scale=128**-0.5), jnp.full(3, 3, jnp.int32)
    run = jax.jit(lambda q, k, v: pallas_kernels.forward(problem, q, k, v, visible)[0])
    good = run(q, k, v)
    bad = run(q, *(x.at[0, :, :, :, 1].set(jnp.nan) for x in (k, v)))
    assert bool(jnp.isnan(bad[0, ..., 1, :]).all())
    good, bad = (np.asarray(x.at[0, ..., 1, :].set(0)) for x in (good, bad))
    np.testing.assert_array_equal(good, bad)


def test_log_sum_exp():
    keys = jax.random.split(jax.random.key(8), 3)
    q, k, v = (jax.random.normal(r, (1, 2, 30, 52, 2, 128), jnp.bfloat16) for r in keys)
    problem, visible = Problem(scale=128**-0.5), jnp.full(2, 2, jnp.int32)
    _, lse = pallas_kernels.forward(problem, q, k, v, visible)
    with jax.default_matmul_precision("highest"):
        _, expected = xla.forward(problem, *single(q, k, v), visible)
    assert error(lse, expected) <= 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("grid", "tile", "dim", "options"),
    [
        ((3, 10, 13), None, 64, {}),
        ((5, 30, 52), None, 128, {}),  # one block of rows
        ((6, 30, 52), (3, 30, 52), 128, {}),  # two
        ((6, 30, 52), (3, 30, 52), 64, {}),
        ((6, 30, 52), (3, 30, 52), 128, dict(causal_block=3)),
        ((6, 45, 80), (3, 45, 80), 128, {}),  # three; a whole block of columns and shared ones
        ((5, 45, 80), None, 64, {}),
        ((6, 10, 26), (1, 5, 13), 64, dict(causal_block=3)),
        ((6, 30, 52), None, 128, dict(causal_block=3)),
        ((4, 6, 16), (4, 6, 8), 64, dict(blocks="w,fh")),
        ((5, 30, 52), None, 128, dict(num_iters=2)),
        ((6, 30, 52), (3, 30, 52), 128, dict(num_iters=2, causal_block=3)),
        ((4, 15, 20), (2, 15, 20), 64, dict(num_iters=3)),  # columns of two tiles share an item
    ],
)
def test_gradients(grid, tile, dim, options, dtype):
    """Output and gradients against the reference in float64; two runs agree bit for bit."""
    arrays = inputs(9, grid, batch=2, heads=2, dim=dim, dtype=dtype)
    options = dict(options, grid=grid, tile=tile)
    run = with_grads(implementation="mosaic", **options)
    found, again = run(*arrays), run(*arrays)
    with jax.enable_x64(True):
        wide = (x.astype(jnp.float64) for x in arrays)
        expected = value_and_grads(*wide, implementation="reference", **options)
    for name, x, y, z in zip(("out", "dq", "dk", "dv"), found, expected, again, strict=True):
        assert error(x, y) <= BOUNDS[dtype], f"{name}: relative error {error(x, y):.2e}"
        np.testing.assert_array_equal(np.asarray(x), np.asarray(z))


@pytest.mark.parametrize("options", [{}, dict(causal_block=1)])
@pytest.mark.parametrize("rows", [30, 90])
def test_kept_intermediates_change_nothing(rows, options):
    """Also where the backward pass takes them in chunks; but 30 rows go another way where nothing is kept."""
    frames = rows // 30 * 12
    tile = (rows // 30, 30, 52)
    options = {name: x * rows // 30 for name, x in options.items()} | {"grid": (frames, 30, 52), "tile": tile}
    arrays = inputs(11, options["grid"], batch=1, heads=12, dim=128, dtype="bfloat16")
    found = [
        value_and_grads(*arrays, implementation="mosaic", keep_intermediates=keep, **options) for keep in (False, True)
    ]
    for name, x, y in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        if rows == 30:
            assert error(x, y) <= 5e-3
        else:
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=name)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "cols", "count", "steps"),
    [(30, 52, 21, 1), (90, 52, 7, 1), (45, 80, 21, 1), (135, 80, 7, 1), (30, 52, 21, 2), (90, 52, 7, 2)],
)
def test_large_runs_agree_bit_for_bit(rows, cols, count, steps, masked):
    """What goes wrong once in many thousand steps shows in none of the small shapes."""
    pairs = None
    if steps > 1:
        pytest.importorskip("jax_triton")
        from monarchrt.triton_kernels.pairs import Pairs as pairs
    keys = jax.random.split(jax.random.key(12), 4)
    q, k, v, g = (jax.random.normal(r, (1, count, rows, cols, 12, 128), jnp.bfloat16) for r in keys)
    problem = Problem(scale=128**-0.5, masked=masked, num_iters=steps)
    visible = jnp.arange(1, count + 1, dtype=jnp.int32) if masked else jnp.full(count, count, jnp.int32)

    @jax.jit
    def run():
        out, lse = pallas_kernels.forward(problem, q, k, v, visible, pairs=pairs)
        return out, lse, *pallas_kernels.vjp(problem, Residuals(q, k, v, visible, out, lse), g, pairs=pairs)

    first = run()
    for _ in range(7):
        for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), first, run(), strict=True):
            assert not (different := int((x != y).sum())), f"{different} elements of {name} of shape {x.shape}"


@pytest.mark.parametrize("changes", [dict(alternate=True), dict(newest_first=True)], ids=str)
@pytest.mark.parametrize("queries", [1, None])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "cols", "count"), [(30, 52, 21), (90, 52, 7), (45, 80, 21), (135, 80, 7)])
def test_the_order_of_work_changes_no_bit(rows, cols, count, masked, queries, changes):
    """Of stage 2, for a whole clip and for one query tile over it."""
    keys = jax.random.split(jax.random.key(16), 3)
    q, k, v = (jax.random.normal(r, (1, count, rows, cols, 12, 128), jnp.bfloat16) for r in keys)
    q = q[:, :queries]
    visible = jnp.arange(count - q.shape[1], count, dtype=jnp.int32) + 1 if masked else jnp.full(q.shape[1], count)
    options = dict(scale=128**-0.5, masked=masked)

    def compiled(changes):
        sizes = tuning.changed(tuning.forward(rows, cols, 128), {"fused": {"clusters": 0}, "left": changes})
        return jax.jit(lambda *x: forward(*x, config=sizes, **options)[:2])

    expected, run = compiled(dict.fromkeys(changes, False))(q, k, v, visible), compiled(changes)
    for _ in range(7):
        for name, x, y in zip(("out", "lse"), expected, run(q, k, v, visible), strict=True):
            assert not (different := int((x != y).sum())), f"{different} elements of {name}"


@pytest.mark.parametrize("key_block", [64, 128])
@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "cols", "count", "heads"), [(135, 80, 7, 12), (72, 52, 5, 3), (130, 30, 3, 1)])
def test_a_tail_in_transposed_products(rows, cols, count, heads, masked, alternate, key_block):
    """As with another block of rows; the same bits in every run."""
    if rows < 128 and alternate:
        pytest.skip("a single warpgroup beside the tail has none to alternate with")
    keys = jax.random.split(jax.random.key(17), 3)
    q, k, v = (jax.random.normal(r, (1, count, rows, cols, heads, 128), jnp.bfloat16) for r in keys)
    visible = jnp.arange(1, count + 1, dtype=jnp.int32) if masked else jnp.full(count, count)
    options = dict(scale=128**-0.5, masked=masked)

    def compiled(**left):
        sizes = tuning.changed(tuning.forward(rows, cols, 128), {"left": dict(stages=2, columns=1, **left)})
        return jax.jit(lambda *x: forward(*x, config=sizes, **options)[:2])

    blocks = -(-rows // 64)
    expected = compiled(row_blocks=blocks, tail=0, alternate=False, key_block=64)(q, k, v, visible)
    run = compiled(row_blocks=blocks - 1, tail=8, alternate=alternate, key_block=key_block)
    found = [run(q, k, v, visible) for _ in range(5)]
    for name, x, y, *others in zip(("out", "lse"), expected, *found, strict=True):
        assert error(y, x) <= 5e-3, name
        for z in others:
            assert not (different := int((y != z).sum())), f"{different} elements of {name}"


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "cols", "count", "dim"), [(30, 52, 8, 128), (45, 80, 5, 128), (90, 52, 7, 128), (90, 80, 5, 64)]
)
def test_warpgroups_that_take_turns_in_l(rows, cols, count, dim, masked):
    """Gradients as with warpgroups that share each step; the same bits in every run."""
    keys = jax.random.split(jax.random.key(15), 4)
    q, k, v, g = (jax.random.normal(r, (2, count, rows, cols, 4, dim), jnp.bfloat16) for r in keys)
    problem = Problem(scale=dim**-0.5, masked=masked)
    visible = jnp.arange(1, count + 1, dtype=jnp.int32) if masked else jnp.full(count, count, jnp.int32)
    out, lse = pallas_kernels.forward(problem, q, k, v, visible)
    config = there(backward_config(rows, cols, dim))
    shared = dict(columns=1 if rows > 64 else 2, row_blocks=-(-rows // 64), independent=False, stages=2)
    alone = dict(columns=1, row_blocks=1, independent=True, stages=4)
    options = dict(scale=problem.scale, masked=masked, grad_tiles=None)

    def run(left):
        sizes = dataclasses.replace(config, left=LeftBackwardConfig(**left))
        return jax.jit(lambda *x: backward(*x, config=sizes, **options))(q, k, v, visible, out, lse, g)

    found = run(alone)
    for name, x, y in zip(("dq", "dk", "dv"), found, run(shared), strict=True):
        assert error(x, y) <= BOUNDS["bfloat16"] / 2, name
    for _ in range(7):
        for name, x, y in zip(("dq", "dk", "dv"), found, run(alone), strict=True):
            assert not (different := int((x != y).sum())), f"{different} elements of {name}"


def test_gradients_in_chunks_and_of_new_keys_only():
    """Chunks change nothing but the rounding of sums; dk and dv that are not wanted are zero."""
    keys = jax.random.split(jax.random.key(10), 4)
    q, k, v, g = (jax.random.normal(r, (2, 4, 30, 52, 4, 128), jnp.bfloat16) for r in keys)
    visible = jnp.array([2, 2, 4, 4], jnp.int32)
    problem = Problem(scale=128**-0.5, masked=True)
    out, lse = pallas_kernels.forward(problem, q, k, v, visible)
    config = there(backward_config(30, 52, 128))

    def run(config, grad_tiles=None):
        options = dict(scale=problem.scale, masked=True, grad_tiles=grad_tiles, config=config)
        return jax.jit(lambda *x: backward(*x, **options))(q, k, v, visible, out, lse, g)

    whole = run(config)
    for x, y in zip(run(dataclasses.replace(config, chunk_bytes=2**20)), whole, strict=True):
        assert error(x, y) <= 5e-3
    dq, dk, dv = run(config, 2)
    np.testing.assert_array_equal(np.asarray(dq), np.asarray(whole[0]))
    for x, y in ((dk, whole[1]), (dv, whole[2])):
        assert not np.asarray(x[:, :2], np.float32).any()
        np.testing.assert_array_equal(np.asarray(x[:, 2:]), np.asarray(y[:, 2:]))
