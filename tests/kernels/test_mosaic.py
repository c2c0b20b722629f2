"""The Mosaic GPU kernels without a card: what they refuse, their sizes, their numbers in the interpreter, lowering."""

import dataclasses
import functools
import itertools
import json
import math
import re
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from monarch_jax import MonarchKVCache, monarch_attention, xla
from monarch_jax.contract import Problem
from monarchrt import pallas_kernels
from monarchrt.pallas_kernels.sm90 import tuning
from monarchrt.pallas_kernels.sm90.config import (
    SHARED_MEMORY,
    ForwardConfig,
    FusedConfig,
    LeftBackwardConfig,
    LeftConfig,
    RightBackwardConfig,
    backward_config,
    column_blocks,
    forward_config,
    left_config,
    right_config,
)
from monarchrt.pallas_kernels.sm90.forward import chunk_sizes, forward
from monarchrt.pallas_kernels.sm90.left import left_role
from monarchrt.pallas_kernels.sm90.left_backward import left_backward_role
from monarchrt.pallas_kernels.sm90.query import query_role
from monarchrt.pallas_kernels.sm90.right import right_role
from monarchrt.pallas_kernels.sm90.right_backward import right_backward_role
from tests.attention.suite import LAYOUTS, error
from tests.kernels.mosaic_interpreter import interpreted
from tests.untyped import there, untyped

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
PAPER = ((30, 52, 21), (90, 52, 7), (45, 80, 21), (135, 80, 7))  # b1, b2, tiles: Tables 5 and 6


def tiles(seed, shape, key_tiles, dtype=jnp.bfloat16):
    """q [B, A, b1, b2, H, D] and k, v with `key_tiles` tiles, standard normal."""
    rng = np.random.default_rng(seed)
    shapes = (shape, (shape[0], key_tiles, *shape[2:]), (shape[0], key_tiles, *shape[2:]))
    return tuple(jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes)


def lower(run, *shapes):
    """The CUDA program's text."""
    return jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


def tokens(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_several_steps_take_the_other_packages_kernels():
    x = jnp.zeros((1, 1, 8, 8, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"num_iters=2 takes pairs=triton_kernels\.pairs\.Pairs, not None"):
        pallas_kernels.forward(Problem(scale=1.0, num_iters=2), x, x, x, jnp.ones(1, jnp.int32))


@pytest.mark.parametrize(
    ("options", "shape", "dtype", "reason"),
    [
        (dict(num_iters=2), (1, 2, 97, 52, 3, 64), jnp.bfloat16, "num_iters=2 with tiles of 97 x 52 .* up to 96 rows"),
        (dict(num_iters=2), (1, 2, 30, 64, 3, 128), jnp.bfloat16, "num_iters=2 with tiles of 30 x 64 and head_dim=128"),
        (
            dict(num_iters=2, intermediates="e4m3"),
            (1, 2, 30, 52, 3, 64),
            jnp.bfloat16,
            "'e4m3'; those are for one step",
        ),
        (dict(), (1, 2, 30, 52, 3, 64), jnp.float32, "float32; the tensor cores take bfloat16 or float16"),
        (dict(), (1, 2, 30, 52, 3, 80), jnp.bfloat16, "head_dim=80 is not 64 or 128"),
        (dict(), (1, 2, 1, 1560, 3, 128), jnp.bfloat16, "b2=1560 columns .* shared memory"),
    ],
)
def test_reasons(options, shape, dtype, reason):
    problem, q = Problem(scale=1.0, **options), jax.ShapeDtypeStruct(shape, dtype)
    assert pallas_kernels.supports(problem, q, q) is not None
    with pytest.raises(NotImplementedError, match=reason):
        pallas_kernels.forward(problem, *[untyped(q)] * 3, visible=jnp.zeros(2, jnp.int32))


def test_configurations_fit_a_block():
    for dim, cols in itertools.product((64, 128), (1, 5, 15, 30, 45, 52, 64, 80, 90, 96, 104)):
        right = right_config(cols, dim)
        assert right is not None
        assert right.shared_memory(cols, dim) <= SHARED_MEMORY
        assert right.query_stages % right.warpgroups == 0
    for dim, rows in itertools.product((64, 128), (1, 30, 52, 64, 80, 90, 135, 1560)):
        assert left_config(rows, dim).shared_memory(dim) <= SHARED_MEMORY


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("cols", [1, 7, 15, 30, 45, 52, 64, 80, 90, 130])
def test_every_column_has_a_place_of_its_own(cols, masked):
    count = 7
    split = column_blocks(cols, count, masked)
    tile, column = np.divmod(np.arange(count * cols, dtype=np.int32), np.int32(cols))
    items, rows = untyped(jax.jit(jax.vmap(split.place))(tile, column))
    places = set(zip(items.tolist(), rows.tolist(), strict=True))
    assert len(places) == count * cols
    assert all(0 <= item < split.items and 0 <= row < 64 for item, row in places)


def test_tuned_sizes_come_before_the_heuristics(monkeypatch, tmp_path):
    entry = {"forward": {"chunk_bytes": 2**20, "left": {"stages": 2}}, "backward": {"keys": {"stages": 2}}}
    few = {"forward": {"left": {"stages": 1}}}
    entries = {tuning.shape_key(30, 52, 128): entry, tuning.shape_key(30, 52, 128, few=True): few}
    entries[tuning.shape_key(30, 52, 128, masked=True)] = {"forward": {"chunk_bytes": 2**21}}
    (tmp_path / "NVIDIA_H200.json").write_text(json.dumps(entries))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    tuning._entries.cache_clear()
    found = tuning.forward(30, 52, 128)
    assert found == dataclasses.replace(
        there(forward_config(30, 52, 128)), chunk_bytes=2**20, left=dataclasses.replace(left_config(30, 128), stages=2)
    )
    assert there(tuning.backward(30, 52, 128)).keys.stages == 2
    decode = there(tuning.forward(30, 52, 128, few=True))
    assert (decode.left.stages, decode.chunk_bytes) == (1, ForwardConfig.chunk_bytes)
    assert there(tuning.forward(30, 52, 128, masked=True)).chunk_bytes == 2**21
    assert there(tuning.forward(30, 52, 128, few=True, masked=True)).chunk_bytes == 2**21
    assert tuning.forward(45, 80, 128, few=True, masked=True) == forward_config(45, 80, 128)
    assert tuning.forward(45, 80, 128, few=True) == forward_config(45, 80, 128)
    assert tuning.forward(45, 80, 128) == forward_config(45, 80, 128)
    tuning._entries.cache_clear()
    with pytest.raises(TypeError, match="unknown"):
        tuning.changed(found, {"unknown": 1})


def test_one_kernel_for_both_stages_is_for_cards_that_it_was_measured_on(monkeypatch):
    """Others take the sizes, but may have no place for clusters of 16 blocks."""
    measured = there(tuning.forward(30, 52, 128))
    assert measured.fused.clusters == 7
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    chosen = (
        ("NVIDIA H200", measured.fused),
        ("NVIDIA H100 80GB HBM3", FusedConfig(clusters=7)),
        ("NVIDIA H20", FusedConfig()),
    )
    for kind, form in chosen:
        monkeypatch.setattr(jax, "devices", lambda kind=kind: [types.SimpleNamespace(device_kind=kind)])
        assert tuning.forward(30, 52, 128) == dataclasses.replace(measured, fused=form)
    with pytest.raises(ValueError, match="clusters=-1 is negative"):
        tuning.changed(measured, {"fused": {"clusters": -1}})
    with pytest.raises(ValueError, match="spread=True with direct=False"):
        tuning.changed(measured, {"fused": {"direct": False, "spread": True}})
    with pytest.raises(ValueError, match="blocks=8 with columns=4 must be 16 with 4, 8 with 8 or 8 with 7"):
        tuning.changed(measured, {"fused": {"blocks": 8}})


def test_clusters_that_cannot_serve_a_tile_are_refused():
    """Two kernels would run instead, and be timed as if they were one."""
    x, seen = jax.ShapeDtypeStruct((1, 2, 30, 52, 1, 128), jnp.bfloat16), jax.ShapeDtypeStruct((2,), jnp.int32)
    config = tuning.changed(forward_config(30, 52, 128), {"fused": dict(clusters=15, blocks=8, columns=8)})
    with pytest.raises(ValueError, match="columns=8 are for tiles of up to 16 x 64 and head_dim=128, not 30 x 52"):
        jax.eval_shape(lambda *a: forward(*a, scale=1.0, masked=False, config=config), x, x, x, seen)


@pytest.mark.parametrize("few", [False, True])
def test_products_under_way_are_for_calls_without_masks(few):
    """With masks the compiler would wait for each: too few registers."""
    plain, masked = (there(tuning.forward(30, 52, 128, few=few, masked=x)).fused for x in (False, True))
    assert (plain.overlap, plain.resident, plain.direct, plain.clusters) == (True, True, True, 7)
    assert plain.spread == few
    assert (masked.overlap, masked.resident, masked.direct, masked.clusters) == (False, False, False, 7)


def test_clusters_of_8_are_for_calls_without_masks():
    """With masks they are right, but have not been timed."""
    plain, masked = (there(tuning.forward(15, 52, 128, few=True, masked=x)).fused for x in (False, True))
    assert (plain.blocks, plain.clusters) == (8, 15)
    assert (masked.blocks, masked.clusters) == (16, 7)
    ran = []
    problem = Problem(scale=1.0, masked=True)
    x = jax.ShapeDtypeStruct((1, 2, 15, 52, 1, 128), jnp.bfloat16)
    original = tuning.forward

    def forward(*args, **options):
        ran.append(options["masked"])
        return original(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "forward", forward)
        seen = jax.ShapeDtypeStruct((2,), jnp.int32)
        jax.eval_shape(lambda *a: pallas_kernels.forward(problem, *a), x, x, x, seen)
    assert ran == [True]


KEY = r"b1=(\d+) b2=(\d+) dim=(\d+)((?: few)?(?: e4m3| masked)?)"


def test_tuned_files_fit_a_block():
    for path in tuning.FOLDER.glob("*.json"):
        for key, entry in json.loads(path.read_text()).items():
            *shape, words = there(re.fullmatch(KEY, key)).groups()
            rows, cols, dim = map(int, shape)
            e4m3 = "e4m3" in words
            forward = tuning.changed(forward_config(rows, cols, dim, e4m3=e4m3), entry.get("forward", {}))
            backward = tuning.changed(backward_config(rows, cols, dim), entry.get("backward", {}))
            assert forward.right.shared_memory(cols, dim, width=1 if e4m3 else 2) <= SHARED_MEMORY
            assert forward.left.shared_memory(dim) <= SHARED_MEMORY
            assert not forward.fused.clusters or forward.fused.serves(rows, cols, dim)
            assert forward.fused.shared_memory() <= SHARED_MEMORY
            assert backward.left.shared_memory(rows, dim) <= SHARED_MEMORY
            assert backward.keys.shared_memory(cols, dim) <= SHARED_MEMORY
            assert backward.query.shared_memory(cols, dim) <= SHARED_MEMORY


def test_chunks_bound_the_intermediates():
    pair = 4 * 630 * 52 * 128  # alpha and Y of one head and query tile, 480p
    assert chunk_sizes(1, 12, 21, pair, 1536 * 2**20) == (4, 21)
    assert chunk_sizes(1, 12, 21, pair, 100 * 2**20) == (1, 3)
    assert chunk_sizes(1, 12, 21, pair, 1) == (1, 1)
    assert chunk_sizes(1, 12, 21, pair, 2**40) == (12, 21)


NUMBERS = [
    ((1, 2, 5, 40, 1, 64), 2, None, {}),  # nothing is a multiple of 8
    ((2, 2, 3, 9, 2, 64), 3, (1, 2), dict(chunk_bytes=2**14)),  # batch, heads, masks, one head and tile at a time
    ((1, 4, 2, 16, 1, 64), 2, None, {}),  # four query tiles share a block
    ((1, 4, 2, 80, 1, 64), 1, None, {}),  # a whole block each and a shared one
    ((1, 1, 70, 35, 1, 64), 1, None, {}),  # two blocks of rows, more than one block of pairs
    ((1, 2, 3, 70, 1, 64), 2, (1, 2), {}),  # two blocks of columns
    ((1, 1, 3, 33, 1, 128), 2, None, {}),
    ((2, 2, 3, 9, 2, 64), 3, (1, 2), dict(left=dict(newest_first=True))),
    ((1, 2, 3, 9, 2, 64), 3, (1, 2), dict(left=dict(alternate=True))),  # a warpgroup to each column
    ((1, 2, 70, 9, 1, 64), 2, (1, 2), dict(left=dict(alternate=True, stages=2))),  # two to a column
    ((1, 1, 130, 35, 1, 64), 1, None, dict(left=dict(alternate=True, stages=2))),  # three
    ((1, 3, 3, 9, 1, 64), 2, (1, 0, 2), dict(left=dict(alternate=True))),  # a query tile that sees nothing
    ((1, 2, 70, 9, 1, 64), 3, (1, 3), dict(left=dict(alternate=True, stages=2, key_block=128))),
    ((1, 1, 130, 35, 1, 64), 1, None, dict(left=dict(row_blocks=2, tail=8, alternate=True, stages=2))),
    ((2, 2, 130, 4, 2, 64), 2, (1, 2), dict(left=dict(row_blocks=2, tail=8, stages=2, key_block=128))),
    ((1, 3, 70, 9, 1, 128), 2, (1, 0, 2), dict(left=dict(row_blocks=1, tail=8, stages=2))),
    ((1, 2, 80, 9, 1, 64), 2, (1, 2), dict(left=dict(row_blocks=1, tail=16, stages=2, key_block=128))),
    ((1, 2, 70, 2, 1, 64), 2, (1, 2), dict(left=dict(columns=1, row_blocks=1, tail=8, stages=2))),
]
QUICK = (1, 17)  # one with masks and one with a tail run by default
QUICK_LAYOUTS = (("fh,w", jnp.float16), ("w,fh", jnp.bfloat16), ("hw,f", jnp.bfloat16))


@pytest.mark.parametrize(
    ("shape", "key_tiles", "visible", "sizes"),
    [pytest.param(*x, marks=[] if n in QUICK else pytest.mark.slow) for n, x in enumerate(NUMBERS)],
)
def test_numbers_in_the_interpreter(monkeypatch, shape, key_tiles, visible, sizes):
    """Against the XLA backend in float32; key tiles that no query sees hold NaN."""
    q, k, v = tiles(0, shape, key_tiles)
    masked = visible is not None
    visible = jnp.array(visible if masked else (key_tiles,) * shape[1], jnp.int32)
    seen = (np.arange(key_tiles) < np.max(visible)).reshape(1, -1, 1, 1, 1, 1)
    k, v = (jnp.asarray(np.where(seen, x, np.nan).astype(x.dtype)) for x in (k, v))
    _, _, rows, cols, _, dim = shape
    problem = Problem(scale=dim**-0.5, masked=masked)
    config = ForwardConfig(
        right=dataclasses.replace(there(right_config(cols, dim)), blocks=2),
        left=dataclasses.replace(left_config(rows, dim), blocks=2),
    )
    config = tuning.changed(config, sizes)
    with interpreted(monkeypatch):
        out, lse, _ = forward(
            q,
            k,
            v,
            visible,
            scale=problem.scale,
            masked=masked,
            config=config,
        )
    wide = (q.astype(jnp.float32), k.astype(jnp.float32), v.astype(jnp.float32))
    expected, expected_lse = xla.forward(problem, *wide, visible)
    assert out.dtype == q.dtype
    sees = np.flatnonzero(visible)
    assert error(out[:, sees], expected[:, sees]) < 1e-2
    assert error(lse[:, sees], expected_lse[:, sees]) < 1e-3


def test_warpgroups_that_alternate_are_several():
    with pytest.raises(
        ValueError, match="alternate=True with warpgroups=1, stages=4 and query_stages=2: one is behind"
    ):
        LeftConfig(columns=1, stages=4, alternate=True)
    with pytest.raises(ValueError, match="stages=4 and query_stages=1: one is behind"):
        LeftConfig(stages=4, query_stages=1, alternate=True)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "key_block", "stages"), [(130, 64, 3), (130, 128, 2), (70, 64, 2)])
def test_no_races_with_a_tail(monkeypatch, rows, key_block, stages):
    """A stage for every step: c_L is read as other data is, which the interpreter wants fenced from copies after it."""
    q, k, v = tiles(3, (1, 2, rows, 3, 1, 64), 1)
    left = dict(columns=1, row_blocks=rows // 64, tail=8, stages=stages, key_block=key_block)
    config = tuning.changed(forward_config(rows, 3, 64), {"left": left})
    with interpreted(monkeypatch, detect_races=True) as races:
        out = forward(q, k, v, jnp.ones(2, jnp.int32), scale=0.125, masked=True, config=config)[0]
        assert np.isfinite(np.asarray(out, np.float32)).all()
        assert not races()


def test_a_tail_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="tail=12 with columns=1 is not 0, nor 8 or 16 of one column"):
        LeftConfig(columns=1, tail=12)
    with pytest.raises(ValueError, match="tail=8 with columns=2 is not 0"):
        LeftConfig(columns=2, tail=8)
    q = jax.ShapeDtypeStruct((1, 2, 140, 3, 1, 64), jnp.bfloat16)
    config = LeftConfig(columns=1, row_blocks=2, tail=8)
    with pytest.raises(ValueError, match="tail=8 with row_blocks=2 is for 9 to 136 rows, not 140"):
        left_role(q, 280, scale=0.125, heads=1, tiles=2, masked=False, config=config)


def test_no_races_in_the_interpreter(monkeypatch):
    q, k, v = tiles(1, (1, 3, 2, 33, 1, 64), 2)
    with interpreted(monkeypatch, detect_races=True) as races:
        out, _ = pallas_kernels.forward(Problem(scale=0.125), q, k, v, jnp.full(3, 2, jnp.int32))
        assert np.isfinite(np.asarray(out, np.float32)).all()
        assert not races()


@pytest.mark.parametrize(
    ("rows", "cols", "count", "masked"),
    [
        pytest.param(*x, masked, marks=[pytest.mark.slow] * (masked == n % 2))  # one of the two by default
        for n, x in enumerate(PAPER)
        for masked in (False, True)
    ],
)
def test_lowers_for_cuda_without_a_card(rows, cols, count, masked):
    x = tokens(1, count, rows, cols, 12, 128)
    problem = Problem(scale=0.1, masked=masked)
    assert (
        lower(
            functools.partial(pallas_kernels.forward, problem), x, x, x, jax.ShapeDtypeStruct((count,), jnp.int32)
        ).count("mosaic_gpu")
        >= 2
    )


@pytest.mark.parametrize(
    ("blocks", "dtype"),
    [
        pytest.param(blocks, dtype, marks=[pytest.mark.slow] * ((blocks, dtype) not in QUICK_LAYOUTS))
        for blocks in LAYOUTS
        for dtype in (jnp.bfloat16, jnp.float16)
    ],
)
def test_layouts_lower(blocks, dtype):
    x = tokens(1, 3 * 6 * 8, 2, 64, dtype=dtype)
    options = dict(grid=(3, 6, 8), tile=(3, 6, 8), blocks=blocks, implementation="mosaic")
    assert "mosaic_gpu" in lower(lambda *x: monarch_attention(*x, **options), x, x, x)


def test_causal_gradient_vmap_and_x64_lower():
    options = dict(grid=(6, 10, 13), causal_block=3, implementation="mosaic")

    def loss(*x):
        return monarch_attention(*x, **options).astype(jnp.float32).sum()

    x, stacked = tokens(1, 780, 2, 128), tokens(2, 1, 780, 2, 128)
    assert "mosaic_gpu" in lower(jax.grad(loss, (0, 1, 2)), x, x, x)
    assert "mosaic_gpu" in lower(jax.vmap(loss), stacked, stacked, stacked)
    with jax.enable_x64(True):
        assert "mosaic_gpu" in lower(loss, x, x, x)


def test_cache_with_a_traced_fill_lowers():
    def step(q, k, v, start):
        cache = MonarchKVCache.init(batch=1, frames=9, height=10, width=13, heads=2, head_dim=64, dtype=jnp.bfloat16)
        return cache.append(k, v, frame=start).attend(q, implementation="mosaic")

    x = tokens(1, 390, 2, 64)
    assert "mosaic_gpu" in lower(step, x, x, x, jax.ShapeDtypeStruct((), jnp.int32))


def scratch_bytes(role, *, reductions: bool = True) -> int:
    """What a block of a role takes, from its scratch alone: every array from a multiple of 1,024 bytes on; barriers."""
    arrays, barriers = [role.reduction_bytes] * reductions, 0

    def size(ref):
        return math.prod(ref.inner_aval.shape) * ref.inner_aval.dtype.itemsize

    for scratch in jax.tree.leaves(role.scratch):
        if isinstance(scratch, plgpu.Barrier):
            barriers += math.prod(untyped(scratch.num_barriers))
        elif isinstance(scratch, plgpu.RefUnion):
            (together,) = {sum(map(size, view)) for view in scratch.refs}  # views of the same bytes
            arrays.append(together)
        else:
            arrays.append(size(scratch))
    return sum(-(-n // 1024) * 1024 for n in arrays) + 8 * barriers


LEFT_CONFIGS = [
    {},
    dict(stages=5, query_stages=3, key_block=128),
    dict(columns=1, row_blocks=3, stages=4),
    dict(columns=1, row_blocks=2, tail=8, key_block=128),
    dict(columns=1, row_blocks=1, tail=16),
]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("sizes", LEFT_CONFIGS, ids=str)
def test_shared_memory_of_left_is_its_scratch(sizes, dim):
    config = LeftConfig(**sizes)
    q = jax.ShapeDtypeStruct((1, 2, config.row_blocks * 64 + config.tail, 9, 1, dim), jnp.bfloat16)
    role = left_role(q, 2 * q.shape[2], scale=0.1, heads=1, tiles=2, masked=False, config=config)
    assert scratch_bytes(role) == config.shared_memory(dim)


@pytest.mark.parametrize(("rows", "cols", "dim"), [(30, 52, 128), (90, 52, 128), (135, 80, 128), (52, 30, 64)])
def test_shared_memory_is_the_scratch(rows, cols, dim):
    """Of the other kernels, with the sizes that are chosen and those that are not."""
    q = jax.ShapeDtypeStruct((1, 3, rows, cols, 2, dim), jnp.bfloat16)
    shapes = ((*q.shape[:5], dim // 64, 64), (1, 3 * rows, cols, 2, dim // 64, 64))
    query, keys = (jax.ShapeDtypeStruct(x, q.dtype) for x in shapes)
    options: dict[str, Any] = dict(heads=2, tiles=3, masked=False)
    right = there(right_config(cols, dim))
    role = right_role(query, keys, scale=0.1, key_block=64, config=right, **options)
    assert scratch_bytes(role) == right.shared_memory(cols, dim)
    backward = there(backward_config(rows, cols, dim))
    lefts = [backward.left]
    if rows <= 96:
        lefts.append(LeftBackwardConfig(columns=1, independent=True, stages=4))
    for left in lefts:
        role = left_backward_role(q, 3 * rows, scale=0.1, config=left, **options)
        assert scratch_bytes(role) == left.shared_memory(rows, dim)
    for config in (backward.keys, RightBackwardConfig(stages=2), RightBackwardConfig(independent=True, ring=6)):
        role = right_backward_role(query, keys, scale=0.1, config=config, **options)
        assert scratch_bytes(role) == config.shared_memory(cols, dim)
    width = backward.left.width(rows)
    role = query_role(query, keys, left_width=width, config=backward.query, **options)
    assert scratch_bytes(role, reductions=False) == backward.query.shared_memory(cols, dim)  # it sums in no other way
