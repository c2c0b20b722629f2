"""Block-sparse attention: the definition, the kernels in the interpreter, compiled, lowered, and on a card."""

import dataclasses
import functools
import importlib
import json
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from monarch_jax.block_mask import block_mask, kernel_sides
from monarch_jax.block_sparse import IMPLEMENTATIONS, block_sparse_attention, choose
from monarch_jax.contract import Side, SparseProblem, SparseResiduals
from monarchrt import triton_kernels
from monarchrt.triton_kernels import block_sparse
from monarchrt.triton_kernels.block_sparse import SparseConfigs
from monarchrt.triton_kernels.config import Config, Target, user_file
from tests.kernels.sparse_cases import CASES, Case, error
from tests.kernels.test_triton import SHARED_MEMORY, compile_launch, gpu, interpreted, missing, poisoned  # noqa: F401

ROOT = Path(__file__).parents[2]
BAND: dict[str, Any] = {"width": 3, "query_places": np.zeros((1, 1, 4), int), "key_places": np.zeros((1, 1, 4), int)}


@pytest.fixture
def unchecked():
    """The library's own errors show, not those of the annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def mask_of(case):
    query_starts, key_starts = case.starts()
    return block_mask(case.seen(), query_starts=query_starts, key_starts=key_starts, **case.options())


def attention(mask, implementation):
    return lambda q, k, v: block_sparse_attention(q, k, v, mask, implementation=implementation)


def results(case, implementation, dtype=None, traced=False):
    """Output, dq, dk, dv; the map and where blocks begin are traced, or known."""
    q, k, v, g = (jnp.asarray(x, dtype) for x in case.arrays())
    query_starts, key_starts = case.starts()

    @jax.jit
    def run(q, k, v, g, seen, query_starts, key_starts):
        mask = mask_of(case)
        if traced:
            mask = block_mask(seen, query_starts=query_starts, key_starts=key_starts, **case.options())
        out, vjp = jax.vjp(attention(mask, implementation), q, k, v)
        return out, *vjp(g)

    return run(q, k, v, g, case.seen(), query_starts, key_starts)


class TestDefinition:
    @pytest.mark.parametrize("traced", [True, pytest.param(False, marks=pytest.mark.slow)])
    @pytest.mark.parametrize(
        "name", ["band, ragged", *(pytest.param(x, marks=pytest.mark.slow) for x in CASES if x != "band, ragged")]
    )
    def test_against_whole_maps(self, name, traced):
        case = CASES[name]
        bound = 2e-3 if case.half else 1e-5
        with jax.default_matmul_precision("highest"):  # a GPU's own is that of TF32
            found = results(case, "xla", traced=traced)
        for x, right in zip(found, case.expected(), strict=True):
            assert error(x, right) <= bound

    @pytest.mark.parametrize("sharpness", [1.0, 10.0])
    def test_sums_of_bfloat16_are_wider(self, sharpness):
        """Gradients of sharp maps: neither those of the weights nor the sums over blocks of queries are rounded."""
        case = dataclasses.replace(CASES["ragged"], sharpness=sharpness)
        rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in case.arrays()]
        found = results(case, "xla", jnp.bfloat16)
        for x, right in zip(found, case.expected(rounded), strict=True):
            assert error(np.asarray(x, np.float64), right) <= 3e-3

    def test_a_case_has_it_all(self):
        """Queries that see nothing, keys that nobody sees, blocks that are empty, seen whole, and cut."""
        case = CASES["band, ragged"]
        tokens, mask = case.tokens(), mask_of(case)
        assert not tokens.any(-1).all()
        assert not tokens.any(-2).all()
        assert (np.diff(case.starts()[1]) == 0).any() or (np.diff(case.starts()[0]) == 0).any()
        assert (mask.keys.count == 0).any()
        assert (mask.keys.whole > 0).any()
        assert (mask.keys.whole < mask.keys.count).any()
        assert (mask.queries.whole > 0).any()
        assert ((case.near() & ~tokens).any(), (tokens & ~case.near()).any()) == (True, False)

    def test_traced_lists_are_the_known_ones(self):
        """The same for a map that is known and one that is not, to the end of each list."""
        case = CASES["ragged"]
        known, (query_starts, key_starts) = mask_of(case), case.starts()
        made = jax.jit(
            lambda seen, *starts: block_mask(
                seen, query_starts=starts[0], key_starts=starts[1], most=4, **case.options()
            )
        )(case.seen(), query_starts, key_starts)
        for name in ("keys", "queries"):
            mine, theirs = getattr(known, name), getattr(made, name)
            np.testing.assert_array_equal(mine.count, theirs.count)
            np.testing.assert_array_equal(mine.whole, theirs.whole)
            for at in np.ndindex(*mine.count.shape):
                listed = mine.count[at]
                np.testing.assert_array_equal(mine.entries[at][:listed], theirs.entries[at][:listed])

    def test_traced_lists_that_are_too_short(self):
        """They hold the first blocks in order, of both sides the same pairs, and no count is above their length."""
        seen = np.ones((1, 1, 2, 3), bool)
        seen[0, 0, 1, 1] = False
        made = jax.jit(
            lambda seen: block_mask(seen, query_starts=[0, 4, 8], key_starts=[0, 3, 7, 11], columns=4, most=2)
        )(seen)
        assert made.keys.entries.tolist() == [[[[1, 2], [2, 0]]]]  # whole ones first
        assert made.keys.count.tolist() == [[[2, 2]]]
        assert made.keys.whole.tolist() == [[[2, 1]]]
        assert made.queries.count.tolist() == [[[1, 1, 2]]]

    @pytest.mark.parametrize(
        ("changes", "word"),
        [
            (dict(query_starts=[1, 2, 4]), "query_starts should begin with 0"),
            (dict(key_starts=[0, 5, 4]), "key_starts should begin with 0 and not decrease"),
            (dict(key_starts=[0, 4]), r"key_starts has shape \(1, 1, 2\); it should be \[3\] or \[B, H, 3\] for 2"),
            (dict(seen=np.ones((1, 1, 2, 2))), "it should be bool"),
            (dict(width=3), "make up a band"),
            (dict(most=1), "a block of queries sees 2"),
            (dict(most=0), "most=0 is not a positive integer"),
            (dict(seen=np.ones((1, 1, 2, 0), bool), key_starts=[0]), r"seen has shape \(1, 1, 2, 0\); .* at least one"),
            (dict(seen=np.ones((1, 1, 0, 2), bool), query_starts=[0]), r"seen has shape \(1, 1, 0, 2\)"),
            (dict(seen=[[[[True], [True, False]]]]), "seen is .*; it should be bool"),
            (dict(query_starts=[0, 2.5, 4]), r"query_starts is \[0, 2.5, 4\]; it should be integers"),
            (dict(key_starts=None), "key_starts is None; it should be integers"),
            (dict(key_starts=jnp.asarray([0.0, 2, 4]), columns=2), r"key_starts is of float32 \(3,\)"),
            (dict(key_starts=[0, 2, 2**40]), "key_starts should .* up to 2147483647"),
            (dict(rows=0), "rows=0 is not a positive integer"),
            (dict(columns="4"), "columns='4' is not a positive integer"),
            (dict(sink=1), "sink=1 without a band"),
            (BAND | dict(width=-1), "width=-1 is not an integer from 0"),
            (BAND | dict(width=1.5), "width=1.5 is not an integer from 0"),
            (BAND | dict(sink=-1), "sink=-1 is not an integer from 0"),
            (BAND | dict(query_places=np.arange(4)), r"query_places has shape \(4,\)"),
            (BAND | dict(key_places=np.ones((1, 1, 4))), r"key_places is of float64 \(1, 1, 4\)"),
            (BAND | dict(cut=np.ones((1, 1, 2, 2), int)), "cut is of int64 .*; it should be bool"),
            (BAND | dict(cut=np.ones((1, 1, 2, 1), bool)), r"cut has shape \(1, 1, 2, 1\); seen has"),
            (dict(cut=np.ones((1, 1, 2, 2), bool)), "cut says where a band may cut"),
            (dict(seen=np.ones((1, 2, 2, 2), bool), key_starts=np.zeros((1, 3, 3), int)), "several numbers of heads"),
            (dict(key_starts=np.array([0, 4, 2], np.uint8)), "key_starts should begin with 0 and not decrease"),
            (dict(query_starts=np.zeros((0, 1, 3), int)), r"query_starts has shape \(0, 1, 3\); it should be \[3\] or"),
            (dict(rows=2**31 - 1), "rows=2147483647 is too large for 2 blocks; it should be at most 1073741821"),
            (BAND | dict(query_places=np.full((1, 1, 4), -1)), "query_places are from -1 to -1; they should be from 0"),
            (BAND | dict(key_places=np.full((1, 1, 4), 2**31)), "key_places are from 2147483648 to 2147483648; they"),
        ],
    )
    def test_what_is_wrong_with_a_mask(self, unchecked, changes, word):
        options: dict[str, Any] = dict(seen=np.ones((1, 1, 2, 2), bool), query_starts=[0, 2, 4], key_starts=[0, 2, 4])
        options |= changes
        with pytest.raises(ValueError, match=word):
            block_mask(options.pop("seen"), **options)

    @pytest.mark.parametrize(
        ("changes", "even"),
        [
            ({}, True),
            (dict(key_starts=[0, 2, 2]), True),  # an empty block is in no list
            (dict(key_starts=[0, 2, 3]), False),
            (dict(query_starts=[0, 1, 4]), False),
            (dict(rows=3), False),
            (dict(key_starts=jnp.asarray([0, 2, 4]), columns=2), False),
            (BAND, False),
        ],
    )
    def test_what_needs_no_mask(self, changes, even):
        """The kernels leave out the loop over blocks that do; a mask that only says so is an error."""
        options: dict[str, Any] = dict(query_starts=[0, 2, 4], key_starts=[0, 2, 4]) | changes
        mask = block_mask(np.ones((1, 1, 2, 2), bool), **options)
        assert mask.even is even
        x = jnp.ones((1, 4, 1, 8))
        if not even and not isinstance(mask.key_starts, jax.Array):
            with pytest.raises(ValueError, match=r"even=True, but it has a band, or blocks of (query|key)_starts hold"):
                block_sparse_attention(x, x, x, dataclasses.replace(mask, even=True))

    @pytest.mark.parametrize("starts", [[0, 4, 8], [0, 3, 8]])
    def test_keys_that_are_not_listed_may_be_nan(self, starts):
        """In the output and in the gradients; 0 * NaN would be NaN."""
        mask = block_mask(np.array([[[[1, 0], [1, 0]]]], bool), query_starts=starts, key_starts=starts)
        q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 1, 8, 1, 4)), jnp.float32)
        unseen = (np.arange(8) >= starts[1])[None, :, None, None]

        @jax.jit
        def run(q, k, v):
            out, vjp = jax.vjp(attention(mask, "xla"), q, k, v)
            return out, *vjp(jnp.ones_like(out))

        found = run(q, *(jnp.where(unseen, jnp.nan, x) for x in (k, v)))
        for x, y in zip(found, run(q, k, v), strict=True):
            np.testing.assert_array_equal(x, y)

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.uint64, np.int8])
    @pytest.mark.parametrize("traced", [False, True])
    def test_places_of_any_integer_dtype(self, unchecked, dtype, traced):
        """A difference of two unsigned places below 0 was a large one."""
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 4, 1, 8)), jnp.float32)

        @jax.jit
        def run(places, other):
            places = places if traced else np.array([[[0, 1, 2, 3]]], dtype)
            mask = block_mask(
                np.ones((1, 1, 1, 1), bool),
                query_starts=[0, 4],
                key_starts=[0, 4],
                width=1,
                query_places=places,
                key_places=other,
            )
            return block_sparse_attention(x, x, x, mask, implementation="xla")

        places = np.arange(4, dtype=np.int32)[None, None]
        np.testing.assert_array_equal(run(places.astype(dtype), places.astype(dtype)), run(places, places))

    def test_what_is_wrong_with_a_call(self, unchecked):
        mask = block_mask(np.ones((1, 3, 1, 1), bool), query_starts=[0, 4], key_starts=[0, 4])
        x, y = jnp.zeros((1, 4, 3, 8)), jnp.zeros((1, 4, 2, 8))
        calls: tuple[tuple[tuple, dict[str, Any], str], ...] = (
            ((y, y, y), {}, r"for \(1, 3\) samples and heads; the call has \(1, 2\)"),
            ((x, x, y), {}, "value has shape"),
            ((x[:, :3], x, x), {}, "query_starts end with 4; there are 3"),
            ((x, x[:, :3], x[:, :3]), {}, "key_starts end with 4; there are 3"),
            ((x, x, x.astype(jnp.bfloat16)), {}, "value is bfloat16, query float32"),
            ((x[:0], x[:0], x[:0]), {}, r"query has shape \(0, 4, 3, 8\); .* each at least 1"),
            ((x, x[:, :0], x[:, :0]), {}, r"key has shape \(1, 0, 3, 8\); .* each at least 1"),
            ((x, x, x), dict(scale=0.0), "scale=0.0 is not a number above 0"),
            ((x, x, x), dict(scale="1"), "scale='1' is not a finite number"),
            ((x, x, x), dict(scale=1e-9), r"scale=1e-09 is too small; use at least 1e-08, or multiply query by"),
            ((x, x, x), dict(scale=1e38), r"scale=1e\+38 is too large for a softmax in float32"),
            ((x, x, x), dict(scale=10**400), r"scale=1000.* is too large for a softmax in float32"),
            ((x, x, x), dict(implementation="pallas"), "is not None or one of mosaic, triton, xla"),
            ((x, x, x), dict(implementation=np.array(["xla", "triton"])), "implementation=array.* is not None or one"),
        )
        for arrays, options, word in calls:
            with pytest.raises(ValueError, match=word):
                block_sparse_attention(arrays[0], arrays[1], arrays[2], mask, **options)
        one_short = block_mask(
            np.ones((1, 3, 1, 1), bool), query_starts=np.array([[[0, 4], [0, 2], [0, 4]]]), key_starts=[0, 4]
        )
        with pytest.raises(ValueError, match="query_starts end with 2; there are 4"):
            block_sparse_attention(x, x, x, one_short)
        with pytest.raises(ValueError, match="mask is a ndarray; it should be a BlockMask"):
            block_sparse_attention(x, x, x, np.ones((4, 4), bool))  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
@missing("triton", "torch")
def test_interpreter_agrees_with_whole_maps():
    """Some of the cases are in `test_triton.py`, by default."""
    rows = interpreted("sparse_interpreter")
    found = {row.pop("case"): row for row in rows}
    assert set(found) == set(CASES)
    for name, errors in found.items():
        assert all(x <= (2e-3 if CASES[name].half else 1e-5) for x in errors.values()), (name, errors)


def launches(capability, rows, columns, *, band=False, dim=128, dtype=jnp.bfloat16, changes=None):
    """The calls for 480p, with some sizes changed."""
    tokens, heads = 21 * 30 * 52, 12
    problem = SparseProblem(scale=0.1, rows=rows, columns=columns, width=2560 if band else None, sink=1560)
    x = jax.ShapeDtypeStruct((1, tokens, heads, dim), dtype)

    def side(size):
        blocks = -(-tokens // size)
        shapes = ((blocks + 1,), (blocks, blocks), (blocks, blocks), (blocks,), (blocks,), (tokens,))
        arrays: Any = [jax.ShapeDtypeStruct((1, heads, *shape), jnp.int32) for shape in shapes]
        return Side(*arrays)

    sizes = dict(rows=rows, columns=columns, dim=dim, itemsize=x.dtype.itemsize)
    chosen = dataclasses.replace(block_sparse.configs(Target(capability), **sizes), **(changes or {}))
    return block_sparse.launches(problem, x, x, side(rows), side(columns), chosen)


@pytest.mark.slow  # what is lowered below is compiled too
@missing("triton")
@pytest.mark.parametrize(
    ("capability", "rows", "columns", "band"),
    [
        (90, 128, 64, True),
        *((capability, 60, 60, False) for capability in (80, 90, 100, 120)),
    ],
)
def test_kernels_compile_ahead_of_time(capability, rows, columns, band):
    for call in launches(capability, rows, columns, band=band):
        registers, spills, shared = compile_launch(call, capability)
        assert registers <= 255
        assert spills <= 64, f"{call.kernel}: {spills} bytes of stack"
        assert shared <= SHARED_MEMORY[capability], f"{call.kernel}: {shared} bytes of shared memory"


@pytest.mark.slow
@missing("triton")
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize(("rows", "columns", "band"), [(60, 60, False), (128, 64, True)])
def test_kept_gradients_compile_ahead_of_time(capability, rows, columns, band):
    """The sum of a block of keys is the larger part of the registers: four warps hold it, and little else."""
    keys = Config(rows=32 if capability == 120 else 64, keys=64, warps=4)
    product = Config(rows=min(128, 64 * (rows // 60)), keys=64, warps=4 * (rows // 60), stages=2)
    changes = {"sparse_key_backward": keys, "sparse_query_product": product, "scratch_bytes": 2**40}
    calls = launches(capability, rows, columns, band=band, changes=changes)
    assert [call.kernel for call in calls] == ["sparse_forward", "sparse_key_scores", "sparse_query_product"]
    for call in calls[1:]:
        registers, spills, shared = compile_launch(call, capability)
        print(capability, rows, columns, call.kernel, registers, spills, shared)
        assert registers <= 255
        assert spills <= 320, f"{call.kernel}: {spills} bytes of stack"
        assert shared <= SHARED_MEMORY[capability], f"{call.kernel}: {shared} bytes of shared memory"


class TestKeptGradients:
    CASE = Case(rows=16, columns=16, dim=16, heads=3, ragged=True, query_blocks=7, key_blocks=9)

    def sides(self):
        mask = mask_of(self.CASE)
        return mask, *kernel_sides(mask, batch=1, heads=self.CASE.heads)

    def test_slots_are_places_in_the_lists_of_queries(self):
        """Pair by pair, with blocks that are empty or not whole."""
        mask, queries, keys = self.sides()
        tokens = sum(self.CASE.starts()[n][-1] for n in (0, 1))
        found = np.asarray(jax.jit(block_sparse.slots, static_argnums=2)(queries, keys, int(tokens)))
        listed = queries.first.shape[-1]
        pairs = 0
        for at in np.ndindex(*mask.queries.count.shape):
            for n in range(mask.queries.count[at]):
                block = mask.queries.entries[(*at, n)]  # of queries
                row = mask.keys.entries[(*at[:2], block)][: mask.keys.count[(*at[:2], block)]]
                assert found[(*at, n)] == block * listed + row.tolist().index(at[2])
                pairs += 1
        assert pairs == mask.keys.count.sum() > 40
        assert (mask.keys.whole < mask.keys.count).any()

    @pytest.mark.parametrize(("heads_that_fit", "calls"), [(3, 1), (2, 2), (1, 3), (0, None)])
    def test_memory_is_bounded(self, heads_that_fit, calls):
        """As many heads at a time as fit; where one does not, the scores' gradients are not kept."""
        _, queries, keys = self.sides()
        plain = Config(rows=16, keys=16)
        chosen = SparseConfigs(**dict.fromkeys((*block_sparse.KERNELS, block_sparse.PRODUCT), plain))
        problem = SparseProblem(scale=0.25, rows=16, columns=16)
        q, k = (jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in self.CASE.arrays()[:2])
        one_head = queries.first[0, 0].size * 16 * 16 * 4
        chosen = dataclasses.replace(chosen, scratch_bytes=heads_that_fit * one_head)
        made = block_sparse.launches(problem, q, k, queries, keys, chosen)
        scores = block_sparse.kept(problem, q, queries, chosen)
        if calls is None:
            assert scores is None
            assert [call.kernel for call in made] == list(block_sparse.KERNELS)
            return
        assert scores is not None
        assert scores.size * 4 <= chosen.scratch_bytes
        assert [call.kernel for call in made[1:]] == ["sparse_key_scores", "sparse_query_product"] * calls
        assert sum(call.grid[1] for call in made[1::2]) == sum(call.grid[1] for call in made[2::2]) == 3


@pytest.mark.slow
@missing("triton")
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("sizes", [(384, 384), (20, 20), (3, 100)], ids=str)
def test_other_sizes_fit_shared_memory(capability, sizes):
    for dtype, name in ((jnp.bfloat16, "bf16"), (jnp.float32, "fp32")):
        for call in launches(capability, *sizes, dtype=dtype):
            assert compile_launch(call, capability, name)[2] <= SHARED_MEMORY[capability]


@missing("triton", "jax_triton", "jax_cuda13_plugin")
class TestLowering:
    """For CUDA, without a card."""

    def lowered(self, run, *arrays):
        with triton_kernels.compile_for(90):
            return jax.jit(run).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()

    def test_three_kernels_under_vmap(self):
        case = Case(rows=16, columns=16, dim=64, heads=2)
        mask = mask_of(case)
        q, k, v, g = (jax.ShapeDtypeStruct((3, *x.shape), jnp.bfloat16) for x in case.arrays())

        def run(q, k, v, g):
            attend = jax.vmap(attention(mask, "triton"))
            out, vjp = jax.vjp(attend, q, k, v)
            return out, *vjp(g)

        text = self.lowered(run, q, k, v, g)
        assert text.count("@triton_kernel_call_ffi") == 3

    @pytest.mark.slow
    def test_under_shard_map(self):
        """Heads over a mesh axis, one mask for all of them."""
        mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
        spec = jax.sharding.PartitionSpec(None, None, "heads")
        case = Case(rows=16, columns=16, dim=64, heads=2, shared=True)
        mask = mask_of(case)
        sharded = jax.shard_map(attention(mask, "triton"), mesh=mesh, in_specs=spec, out_specs=spec)
        arrays = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in case.arrays()[:3]]
        text = self.lowered(jax.grad(lambda *x: sharded(*x).astype(jnp.float32).sum(), (0, 1, 2)), *arrays)
        assert "triton_kernel_call_ffi" in text


@pytest.mark.slow
@missing("triton", "jax_triton", "jax_cuda13_plugin")
def test_every_candidate_of_the_sweep_is_a_program_of_its_own(monkeypatch):
    """`benchmarks/sparse.py --sweep` times what it says: the settings reach the kernels, each time it asks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    sweep = importlib.import_module("sparse")
    case = Case(rows=60, columns=60, query_blocks=3, key_blocks=3, dim=64, ragged=True)
    q, k, v, g = (jnp.asarray(x, jnp.bfloat16) for x in case.arrays())
    problem, queries, keys = sweep.parts_of(mask_of(case), q)
    saved = (q, k, v, g, jnp.zeros((1, 2, q.shape[1])), queries, keys)

    def backward(*x):
        return block_sparse.vjp(problem, SparseResiduals(*x[:-1]), x[-1])

    plain = block_sparse.configs(Target(90), rows=60, columns=60, dim=64, itemsize=2)
    with triton_kernels.compile_for(90):
        for kernel, candidates in sweep.CHANGES.items():
            ahead, programs, tried = kernel == block_sparse.KERNELS[0], set(), set()
            run = functools.partial(block_sparse.forward, problem) if ahead else backward
            given = (q, k, v, queries, keys) if ahead else (*saved, g)
            for changes in ({}, *candidates):
                one = sweep.changed(plain, kernel, changes)
                if "scratch_bytes" in changes:  # one head's, as it counts for so small a case
                    both = block_sparse.kept(problem, q, queries, one)
                    assert both is not None
                    one = dataclasses.replace(one, scratch_bytes=both.size * both.dtype.itemsize // 2)
                with block_sparse.use(one):
                    lowered = jax.jit(lambda *x, run=run: run(*x)).trace(*given).lower(lowering_platforms=("cuda",))
                tried.add(one)
                programs.add(lowered.as_text())
            assert len(programs) == len(tried) > 4, kernel


class TestChoice:
    def test_the_default(self):
        x = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
        assert choose(None, x, x) == ("triton" if jax.default_backend() == "gpu" else "xla")
        assert IMPLEMENTATIONS == ("mosaic", "triton", "xla")

    @missing("triton", "jax_triton")
    @pytest.mark.parametrize(
        ("shape", "dtype", "word"),
        [
            ((1, 64, 2, 256), jnp.bfloat16, "head_dim 256"),
            ((1, 64, 2, 64), jnp.float64, "float64"),
            ((0, 1, 1, 8), jnp.float16, "nothing"),
        ],
    )
    def test_says_what_it_cannot_do(self, shape, dtype, word):
        x = jax.ShapeDtypeStruct(shape, dtype)
        with pytest.raises(NotImplementedError, match=word):
            choose("triton", x, x)

    def test_the_users_sizes_come_first(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        where, sizes = Target(90, "a card"), dict(rows=60, columns=60, dim=128, itemsize=2)
        path = user_file(where)
        path.parent.mkdir(parents=True)
        entry = {"sparse_forward": {"rows": 128, "keys": 32, "warps": 8}}
        path.write_text(json.dumps({"sparse rows=60 columns=60 dim=128 itemsize=2": entry}))
        chosen = block_sparse.configs(where, **sizes)
        assert (chosen.sparse_forward.rows, chosen.sparse_forward.keys, chosen.sparse_forward.warps) == (128, 32, 8)
        assert chosen.sparse_key_backward == block_sparse.heuristic(where, **sizes).sparse_key_backward
        # of short lists what is said of them comes before what is said of any
        few = {"sparse_forward": {"rows": 64, "keys": 32, "warps": 4}}
        key = "sparse rows=60 columns=60 dim=128 itemsize=2"
        path.write_text(json.dumps({key: entry | {"scratch_bytes": 5}, f"{key} few": few}))
        found = [block_sparse.configs(where, **sizes, listed=n) for n in (None, 11, block_sparse.FEW, 33)]
        assert [x.sparse_forward.rows for x in found] == [128, 64, 64, 128]
        assert [x.scratch_bytes for x in found] == [5] * 4


BIG = {  # like the real ones: a block of queries sees tens of blocks of keys
    "cubes": Case(rows=60, columns=60, query_blocks=40, key_blocks=60, heads=2, dim=128, keep=0.3),
    "ragged cubes": Case(rows=64, columns=64, query_blocks=40, key_blocks=60, heads=2, dim=128, ragged=True, rest=100),
    "band": Case(rows=128, columns=64, query_blocks=12, key_blocks=24, band=(500, 200), heads=2, dim=128, keep=0.9),
}


@pytest.mark.usefixtures("poisoned")
class TestOnACard:
    pytestmark: ClassVar = gpu

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            ("ragged", "float32"),
            ("band, ragged", "float32"),
            ("band, ragged", "bfloat16"),
            ("blocks of odd sizes", "bfloat16"),
            ("two parts, padded dim", "float16"),
            ("two parts, ragged, band", "float32"),
            ("sharp", "float32"),
            *((name, "bfloat16") for name in BIG),
        ],
    )
    def test_numbers(self, name, dtype):
        """Against whole maps in float64 of the rounded inputs; the same bits every time."""
        case = (CASES | BIG)[name]
        found, again = (results(case, "triton", jnp.dtype(dtype), traced=traced) for traced in (False, True))
        bound = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
        for x, y, right in zip(found, again, case.expected(), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
            assert error(x, right) <= bound

    @pytest.mark.parametrize("name", ["ragged", "band, ragged", "two parts, padded dim", *BIG])
    def test_kept_gradients(self, name, monkeypatch):
        """With scores' gradients that are kept, of one head at a time."""
        case, configs, kept = (CASES | BIG)[name], block_sparse._configs, block_sparse.kept

        def with_product(*call):
            chosen = configs(*call)
            product = dataclasses.replace(chosen.sparse_query_backward, stages=2)
            return dataclasses.replace(chosen, sparse_query_product=product, scratch_bytes=2**40)

        def of_one_head(*call):
            scores = kept(*call)
            assert scores is not None
            batch, _, *slots = scores.shape
            return jax.ShapeDtypeStruct((batch, 1, *slots), jnp.bfloat16)

        monkeypatch.setattr(block_sparse, "_configs", with_product)
        monkeypatch.setattr(block_sparse, "kept", of_one_head)
        jax.clear_caches()  # of what was traced with other settings
        try:
            found, again = (results(case, "triton", jnp.bfloat16, traced=traced) for traced in (False, True))
        finally:
            jax.clear_caches()
        for x, y, right in zip(found, again, case.expected(), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
            assert error(x, right) <= 1e-2

    @pytest.mark.parametrize(
        "text",
        [
            "vsa(keep=0.15, cube=(4,4,4), gate=False)",
            "vsa(keep=0.1, gate=False)",
            "svg(keep=0.15)",
            "radial(keep=0.35)",
            "sla(keep=0.15, linear=False)",
            "sliding_tile(tile=(3,5,4), window=(1,3,5))",
        ],
    )
    def test_kinds(self, text):
        """The default is the kernel, with the numbers of the exact form, in 6 frames of 480p."""
        from monarchrt.models.attention.notation import parse

        grid, name = (6, 30, 52), text.split("(")[0]
        q, k, v, g = jax.random.normal(jax.random.key(0), (4, 1, 6 * 1560, 2, 128), jnp.bfloat16)

        def run(setting):
            def fn(q, k, v, g):
                out, vjp = jax.vjp(lambda *x: setting(*x, grid=grid), q, k, v)
                return out, *vjp(g)

            return jax.jit(fn).lower(q, k, v, g).compile()

        kernels, exact = run(parse(text)), run(parse(f"{text[:-1]}, implementation=exact)"))
        text, of_kernels = str(kernels.as_text()), ("triton_kernel_call", "mosaic_gpu")
        assert sum(map(text.count, of_kernels)) >= 3, name
        assert not any(x in str(exact.as_text()) for x in of_kernels)
        for x, right in zip(kernels(q, k, v, g), exact(q, k, v, g), strict=True):
            assert error(x.astype(jnp.float32), np.asarray(right, np.float32)) <= 1e-2
