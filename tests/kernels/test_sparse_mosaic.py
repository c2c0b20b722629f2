"""The Mosaic kernel of block-sparse attention: in the interpreter, compiled for sm_90a, and what it serves."""

import dataclasses
import os
import re
import subprocess
import sys
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import devices
from monarch_jax.block_mask import block_mask, kernel_sides
from monarch_jax.block_sparse import block_sparse_attention, choose
from monarch_jax.contract import SparseProblem
from monarchrt.pallas_kernels import block_sparse
from monarchrt.pallas_kernels.sm90.block_sparse import SparseForwardConfig, forward
from monarchrt.pallas_kernels.sm90.config import SHARED_MEMORY
from tests.kernels.mosaic_interpreter import interpreted
from tests.kernels.sparse_cases import Case, error
from tests.kernels.test_block_sparse import results
from tests.kernels.test_mosaic_compile import H200, NEEDED, linked, missing_wheels
from tests.kernels.test_mosaic_gpu import pytestmark as hopper
from tests.untyped import there

# two persistent blocks of three warpgroups, so that a warpgroup has several items; lists of none to all blocks
CASES = {
    "cubes of 60": (Case(rows=60, columns=60, query_blocks=5, key_blocks=6, dim=128, rest=20, keep=0.3), {}),
    "five tiles": (Case(rows=60, columns=60, query_blocks=5, key_blocks=6, dim=64), {"tiles": 5}),
    "whole tiles": (Case(rows=64, columns=64, query_blocks=4, key_blocks=5, heads=1, batch=2, dim=64), {}),
    "short blocks": (Case(rows=32, columns=40, query_blocks=7, key_blocks=6, heads=1, dim=64, rest=9), {"tiles": 2}),
    "sharp, half": (Case(rows=60, columns=60, heads=1, dim=64, sharpness=20.0, half=True), {"tiles": 4}),
    "one list": (Case(rows=60, columns=60, query_blocks=9, heads=2, dim=64, shared=True, keep=0.9), {}),
}


def problem_of(case):
    """The mask, the static part, and arrays; keys that lie in no block are no numbers."""
    query_starts, key_starts = case.starts()
    mask = block_mask(case.seen(), query_starts=query_starts, key_starts=key_starts, **case.options())
    q, k, v, _ = (jnp.asarray(x, jnp.float16 if case.half else jnp.bfloat16) for x in case.arrays())
    if case.rest:
        k, v = (x.at[:, -case.rest :].set(jnp.nan) for x in (k, v))
    problem = SparseProblem(scale=case.dim**-0.5, rows=mask.rows, columns=mask.columns, even=mask.even)
    return mask, problem, (q, k, v)


def log_sum_exp(case, q, k):
    """To the base 2 in float64, of what the kernel gets."""
    q, k = (np.moveaxis(np.nan_to_num(np.asarray(x, np.float64)), 2, 1) for x in (q, k))
    scores = q @ np.swapaxes(k, -1, -2) * (case.dim**-0.5 * np.log2(np.e))
    scores = np.where(case.tokens(), scores, -np.inf)
    top = scores.max(-1)
    none = np.isinf(top)
    sums = np.exp2(scores - np.where(none, 0.0, top)[..., None]).sum(-1)
    return np.where(none, np.inf, top + np.log2(np.where(none, 1.0, sums)))


def computed(monkeypatch, case, changes, **options):
    """Output and log-sum-exp in the interpreter, and whether a race was seen."""
    mask, problem, arrays = problem_of(case)
    queries, _ = kernel_sides(mask, batch=case.batch, heads=case.heads)
    with interpreted(monkeypatch, **options) as races:
        out, lse = forward(problem, *arrays, queries, config=SparseForwardConfig(blocks=2, **changes))
        return np.asarray(out, np.float64), np.asarray(lse), bool(options and races())


@pytest.mark.parametrize(
    "name", ["cubes of 60", *(pytest.param(x, marks=pytest.mark.slow) for x in CASES if x != "cubes of 60")]
)
def test_against_whole_maps(name, monkeypatch):
    """Blocks that see nothing, lists of one block, and keys in no block, which are not read."""
    case, changes = CASES[name]
    mask, _, (q, k, _) = problem_of(case)
    assert mask.even
    assert len(set(mask.keys.count.ravel().tolist())) > 1 + (name == "cubes of 60")
    out, lse, _ = computed(monkeypatch, case, changes)
    expected = log_sum_exp(case, q, k)
    none = np.isinf(expected)
    assert error(out, case.expected()[0]) <= (2e-3 if case.half else 1e-2)
    np.testing.assert_array_equal(lse[none], np.inf)
    np.testing.assert_allclose(lse[~none], expected[~none], atol=1e-4 * case.sharpness)
    assert not out[np.moveaxis(none, 1, 2)].any()
    assert none.any()


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [2, 3])
def test_no_race(tiles, monkeypatch):
    case = Case(rows=60, columns=60, query_blocks=8, heads=1, dim=64)
    assert not computed(monkeypatch, case, {"tiles": tiles}, detect_races=True)[2]


def test_empty_blocks(monkeypatch):
    """Nothing is written for blocks of queries that hold none, at the end neither, and none is in a list of keys."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, n, 2, 64)), jnp.bfloat16) for n in (120, 180, 180))
    mask = block_mask(np.ones((1, 1, 4, 4), bool), query_starts=[0, 60, 60, 120, 120], key_starts=[0, 60, 60, 120, 180])
    queries, _ = kernel_sides(mask, batch=1, heads=2)
    assert mask.even
    with interpreted(monkeypatch, detect_races=True) as races:
        out, lse = forward(
            SparseProblem(scale=0.125, rows=60, columns=60, even=True), q, k, v, queries,
            config=SparseForwardConfig(blocks=1),
        )  # fmt: skip
        assert not races()
    expected = jax.nn.dot_product_attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert error(out.astype(jnp.float32), expected) < 1e-2
    assert np.isfinite(lse).all()


PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from monarch_jax.contract import Side, SparseProblem
from monarchrt.pallas_kernels import block_sparse

size, dim = (int(x) for x in sys.argv[1:])
topology = topologies.get_topology_desc(platform="cuda", target_config=sys.stdin.read(), topology="1x1x1")
sharding = SingleDeviceSharding(topology.devices[0])

def struct(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

blocks, x = 546, struct(12, 546 * size, 1, dim, dtype=jnp.bfloat16)
side = Side(*(struct(12, 1, *n) for n in ((blocks + 1,), (blocks, 11), (blocks, 11), (blocks,), (blocks,), (1,))))
problem = SparseProblem(scale=0.1, rows=size, columns=size, even=True)
jax.jit(lambda *x: block_sparse.forward(problem, *x)).trace(x, x, x, side).lower().compile()
"""


@linked
@pytest.mark.skipif(bool(missing_wheels()), reason=f"needs {', '.join(NEEDED)}")
@pytest.mark.parametrize(("size", "dim"), [(60, 128), pytest.param(64, 64, marks=pytest.mark.slow)])
def test_compiles_for_sm_90a(tmp_path, size, dim):
    """Nothing on the stack, products that are not serialised, and the shared memory that its sizes say."""
    dumps = {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTXAS": "1"}
    environment = os.environ | dumps | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", PROGRAM, str(size), str(dim)]
    done = subprocess.run(command, input=H200, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    [path] = tmp_path.glob("*.ptxas")
    report = path.read_text()
    assert "wgmma" not in report.lower(), "the compiler serialised the matrix products"
    assert "Used 80 registers" in report  # of the launch, six warpgroups
    assert " 0 bytes spill stores" in report
    launch = (tmp_path / f"{path.stem}.before_layout_inference.txt").read_text()
    used = int(there(re.search(r"dynamic_shared_memory_size %c(\d+)_i32", launch))[1])
    assert used == SparseForwardConfig().shared_memory(dim) <= SHARED_MEMORY


class TestChoice:
    X = jax.ShapeDtypeStruct((1, 120, 2, 128), jnp.bfloat16)

    def mask(self, size=60, blocks=2, **changes):
        starts = np.arange(blocks + 1) * size
        return dataclasses.replace(
            block_mask(np.ones((1, 1, blocks, blocks), bool), query_starts=starts, key_starts=starts), **changes
        )

    @pytest.mark.parametrize(
        ("mask", "shape", "dtype", "word"),
        [
            ({"even": False}, {}, "bfloat16", "a band, or blocks of several sizes"),
            ({"size": 72}, {}, "bfloat16", "blocks of 72 queries and 72 keys; each may hold up to 64"),
            ({"size": 30}, {}, "bfloat16", "blocks of 30 queries; copies are of a multiple of 4"),
            ({}, {}, "float32", "the inputs are float32"),
            ({}, {"dim": 96}, "bfloat16", "head_dim=96 is not 64 or 128"),
            ({}, {"tokens": 40}, "bfloat16", "40 queries and 40 keys are no whole block"),
        ],
    )
    def test_says_what_it_cannot_do(self, mask, shape, dtype, word):
        x = jax.ShapeDtypeStruct((1, shape.get("tokens", 120), 2, shape.get("dim", 128)), jnp.dtype(dtype))
        with pytest.raises(NotImplementedError, match=f"implementation='mosaic' cannot run this call: .*{word}"):
            choose("mosaic", x, x, self.mask(**mask))

    def test_other_cards(self, monkeypatch):
        monkeypatch.setattr(block_sparse, "cuda_capability", lambda: 10.0)
        with pytest.raises(NotImplementedError, match=r"compute capability 10.0; the kernel is for Hopper's 9.0 alone"):
            choose("mosaic", self.X, self.X, self.mask())

    def test_of_nothing_known(self):
        with pytest.raises(NotImplementedError, match="nothing is known of the mask"):
            choose("mosaic", self.X, self.X)

    @pytest.mark.parametrize(
        ("capability", "mask", "expected"),
        [
            (9.0, {}, "mosaic"),
            (9.0, {"heads": 2}, "mosaic"),
            (9.0, {"dtype": jnp.float16}, "mosaic"),
            (9.0, {"dtype": jnp.float32}, "triton"),
            (9.0, {"size": 64}, "triton"),
            (9.0, {"even": False}, "triton"),
            (8.0, {}, "triton"),
            (10.0, {}, "triton"),
            (7.5, {}, "xla"),
        ],
    )
    def test_the_default(self, monkeypatch, capability, mask, expected):
        """Where it was measured to be faster."""
        pytest.importorskip("jax_triton")
        monkeypatch.setattr(devices, "cuda_capability", lambda: capability)
        monkeypatch.setattr(block_sparse, "cuda_capability", lambda: capability)
        heads, dtype = mask.get("heads", 1), mask.get("dtype", jnp.bfloat16)
        mask = self.mask(**{name: x for name, x in mask.items() if name not in ("heads", "dtype")})
        x: Any = jax.ShapeDtypeStruct((1, int(mask.key_starts[..., -1].max()), heads, 128), dtype)
        assert choose(None, x, x, mask) == expected


def test_gradients_are_those_of_triton():
    """Lowered for CUDA: one Mosaic kernel, and two Triton kernels for the gradients."""
    triton_kernels = pytest.importorskip("monarchrt.triton_kernels")
    pytest.importorskip("jax_triton")
    case = Case(rows=60, columns=60, dim=64, heads=2)
    mask, _, arrays = problem_of(case)

    def run(*x):
        attend = jax.vmap(lambda q, k, v: block_sparse_attention(q, k, v, mask, implementation="mosaic"))
        return jax.vjp(attend, *x)[1](x[0])

    batched = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in arrays]
    with triton_kernels.compile_for(90):
        text = jax.jit(run).trace(*batched).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu") == 1
    assert text.count("@triton_kernel_call_ffi") == 2


class TestOnACard:
    pytestmark: ClassVar = hopper

    @pytest.mark.parametrize("name", [*CASES, "many items"])
    def test_numbers(self, name):
        """Output and gradients against whole maps in float64; the same bits every time."""
        many = Case(rows=60, columns=60, query_blocks=150, key_blocks=20, heads=3, dim=128, rest=20, keep=0.3)
        case = many if name == "many items" else CASES[name][0]
        dtype = jnp.float16 if case.half else jnp.bfloat16
        found, again = (results(case, "mosaic", dtype) for _ in range(2))
        for x, y, right in zip(found, again, case.expected(), strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
            assert error(x, right) <= 1e-2
