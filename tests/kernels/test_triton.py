"""Triton kernels: numbers in the interpreter, compiled resources, lowering; on a card, the whole suite."""

import dataclasses
import functools
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import monarch_attention, reference, xla
from monarch_jax.contract import Problem, differentiable
from monarchrt import triton_kernels
from monarchrt.triton_kernels import config, plan
from monarchrt.triton_kernels.config import KERNELS, Config, Stream, Target, configs, heuristic, use
from tests.attention.suite import AttentionSuite, error, inputs
from tests.untyped import there

ROOT = Path(__file__).parents[2]
INTERPRETED = (  # a process each: that takes seconds to start
    (
        "plain", "causal", "half", "newest tile", "two parts, apart", "two parts, keys first", "stream, causal",
        "sharp, padded dim", "split", "two steps", "three steps, causal, chunks", "two steps, half, sharp",
        "sparse: ragged", "sparse: short blocks", "sparse: band, ragged", "sparse: two parts, padded dim",
    ),
)  # fmt: skip
INTERPRETED_SLOWLY = (
    ("480p tile", "one pair at a time, a dominant row", "flat"),
    ("one query tile at a time", "stream", "stream, sharp", "two parts, newest tile"),
    ("blocks of rows and columns", "keys first", "two parts", "more columns than alpha and Y have numbers"),
    ("two steps, blocks of rows and columns", "two steps, a dominant row, two parts", "two steps, newest tile, blocks"),
    ("three steps, blocks of columns", "two steps, one query tile at a time", "two steps, 480p tile"),
    ("few rows, many columns", "two steps, few rows, many columns"),
)
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes a block may have
SETTINGS = {"480p": (21, 30, 52), "480p, 3 frames": (7, 90, 52), "720p": (21, 45, 80), "720p, 3 frames": (7, 135, 80)}
SETTINGS |= {"480p, f,hw": (1, 21, 1560)}


def missing(*packages):
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)}")


def interpreted(program, *cases):
    """What a program beside this file prints, line by line; it has a process of its own, as the interpreter is chosen
    when the kernels are imported."""
    env = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-W", "ignore", "-m", f"tests.kernels.{program}", *cases]
    done = subprocess.run(script, capture_output=True, text=True, env=env, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@missing("triton", "torch")
@pytest.mark.parametrize(
    "cases", [*INTERPRETED, *(pytest.param(x, marks=pytest.mark.slow) for x in INTERPRETED_SLOWLY)], ids=", ".join
)
def test_interpreter_agrees_with_the_reference(cases):
    rows = interpreted("triton_interpreter", *cases)
    found = {row.pop("case"): row for row in rows}
    assert set(found) == set(cases)
    for case, errors in found.items():
        assert set(errors) == {"out", "dq", "dk", "dv"}
        assert all(x <= (2e-3 if "half" in case else 1e-5) for x in errors.values()), (case, errors)


@missing("triton", "jax_triton", "torch")
@pytest.mark.parametrize("cases", [("packed, sharp", "causal, one chunk"), pytest.param((), marks=pytest.mark.slow)])
def test_kernels_between_steps_agree_with_what_they_are(cases):
    """Those that Hopper's kernels call for several refinement steps, on a chunk of a call; slowly all cases."""
    rows = interpreted("pairs_interpreter", *cases)
    assert len(rows) == (len(cases) or 5)
    for row in rows:
        case = row.pop("case")
        assert set(row) == {"u", "factors", "lse", "du", "products", "delta"}
        assert all(x <= 2e-5 for x in row.values()), (case, row)


@missing("triton", "torch")
def test_every_case_is_run():
    source = (ROOT / "tests" / "kernels" / "triton_interpreter.py").read_text()
    named = set(re.findall(r'^    "([^"]+)": Case\(', source, re.MULTILINE))
    run = {case for cases in (*INTERPRETED, *INTERPRETED_SLOWLY) for case in cases if not case.startswith("sparse: ")}
    assert named == run


def launches(setting, capability, dim=128, itemsize=2, card=None, gradient_of=1):
    """Every distinct launch of forward and backward of one setting, or of the gradient of more steps."""
    tiles, b1, b2 = SETTINGS[setting]
    shape = plan.Shape(batch=1, query_tiles=tiles, key_tiles=tiles, b1=b1, b2=b2, heads=12, dim=dim, itemsize=itemsize)
    chosen = configs(Target(capability, card), b1=b1, b2=b2, dim=dim, itemsize=itemsize)
    precision = "tf32x3" if itemsize == 4 else "ieee"
    forward, backward = plan.forward(shape, chosen, precision), plan.backward(shape, chosen, precision, None)
    todos = [forward, backward, plan.refined(shape, chosen, precision, 3)]
    if gradient_of > 1:
        todos = [plan.refined_backward(shape, chosen, precision, newest, gradient_of) for newest in (None, 1)]
    found = [x for todo in todos for n in {0, 1, len(todo.steps) - 1} for x in todo.launches_of(n)]
    return tuple({(x.kernel, x.warps, x.stages, str(x.constants)): x for x in found}.values())


def compile_launch(call, capability, dtype="bf16"):
    """Registers, bytes of spills and of shared memory, from the compiler that Triton carries."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler as nvidia
    from triton.compiler import ASTSource

    # not by `launch.KERNELS`, which needs jax-triton
    from monarchrt.triton_kernels import (
        left,
        overlapped,
        pixels,
        refine,
        refine_backward,
        refine_pairs,
        right,
        rows,
        sparse,
        streamed,
    )

    modules = (left, overlapped, pixels, refine, refine_backward, refine_pairs, right, rows, sparse, streamed)
    kernel = next(found for module in modules if (found := getattr(module, call.kernel, None)))
    listed = (
        "starts",
        "first",
        "last",
        "whole",
        "count",
        "places",
        "key_places",
        "query_places",
        "slots",
        "few",
        "layer",
        "at",
    )
    integers = dict.fromkeys(("step", "start", "visible", "first_tile", "counters", "layer", "at", *listed), "*i32")
    integers |= {"scale": "fp32", "head": "i32"}
    sums = ("dk", "dv") * bool(call.constants.get("ACCUMULATE"))
    floats = ("stats", "further_stats", "lse", "delta", "dq_left", "cos", "sin", "time", "c", "factors", "products")
    floats = dict.fromkeys((*floats, *sums), "*fp32")
    signature, constants, attributes = {}, {}, {}
    for n, name in enumerate(inspect.signature(kernel.fn).parameters):
        signature[name] = "constexpr" if name.isupper() else (integers | floats).get(name, f"*{dtype}")
        if name.isupper():
            constants[(n,)] = call.constants[name]
        elif name not in ("scale", "head"):
            attributes[(n,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": call.warps, "num_stages": call.stages, "maxnreg": call.registers, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout + report.stderr)
    assert usage, report.stdout + report.stderr
    return int(usage[1]), int(usage[2]), made.metadata.shared


@missing("triton")
@pytest.mark.parametrize("capability", [80, 90, pytest.param(100, marks=pytest.mark.slow), 120])
def test_kernels_compile_ahead_of_time(capability):
    for call in launches("480p", capability):
        registers, spills, shared = compile_launch(call, capability)
        assert registers <= 255
        # two sums of 64 x 128 fill the registers of right_backward on sm_90: 24 bytes with Triton 3.7.1, 80 with 3.9.0
        assert spills <= (96 if call.kernel == "right_backward" else 64), f"{call.kernel}: {spills} bytes of stack"
        assert shared <= SHARED_MEMORY[capability], f"{call.kernel}: {shared} bytes of shared memory"


@missing("triton")
@pytest.mark.parametrize("capability", [90, *(pytest.param(x, marks=pytest.mark.slow) for x in (80, 100, 120))])
def test_the_gradient_of_two_steps_compiles_ahead_of_time(capability):
    calls = launches("480p", capability, card="NVIDIA H200" if capability == 90 else None, gradient_of=2)
    further = [x for x in calls if x.kernel in ("right_further_query", "left_refine_backward")]
    for call in further if capability == 90 else calls:  # the others are as the ones of one step, or slow to compile
        registers, spills, shared = compile_launch(call, capability)
        assert registers <= 255
        assert spills <= (96 if "right" in call.kernel else 0), f"{call.kernel}: {spills} bytes of stack"
        assert shared <= SHARED_MEMORY[capability], f"{call.kernel}: {shared} bytes of shared memory"


@missing("triton", "jax_triton")
@pytest.mark.parametrize(("b1", "tiles"), [(90, 7), pytest.param(30, 21, marks=pytest.mark.slow)])
def test_kernels_between_steps_compile_for_hopper(monkeypatch, b1, tiles):
    """As `Pairs` launches them for half of the heads."""
    from monarchrt.triton_kernels import launch, pairs

    calls = []

    def call(todo, arrays, new, capability):
        calls.append(todo)
        return {name: jnp.zeros(x.shape, x.dtype) for name, x in new.items()}

    monkeypatch.setattr(launch, "call", call)

    def run(q, visible, start, vectors, numbers, dz):
        made = pairs.Pairs(
            q=q, k=q, visible=visible, start=start, scale=0.1, heads=6, tiles=tiles, split=(tiles, 1, 64, 1)
        )
        _, factors, stats = made.refine(vectors, numbers, width=-(-b1 // 8) * 8)
        du, products = made.query(vectors, dz, factors)
        return made.delta(vectors, du, numbers, factors, products, stats)

    count, room = tiles * b1, -(-tiles * b1 // 64) * 64
    shapes = ((1, tiles, b1, 52, 12, 128), (tiles,), (3,), (6, tiles, count, 52, 2, 64), (6, tiles, 64, room))
    dtypes = (jnp.bfloat16, jnp.int32, jnp.int32, jnp.bfloat16, jnp.float32, jnp.bfloat16)
    structs = map(jax.ShapeDtypeStruct, (*shapes, (6, tiles, count, 56, 56)), dtypes)
    jax.eval_shape(run, *structs)
    assert [x.kernel for x in calls] == ["refine_pairs", "query_pairs", "delta_pairs"]
    for todo in calls:
        registers, spills, shared = compile_launch(todo, 90)
        assert registers <= 255  # two programs of 4 warps on a multiprocessor, also by shared memory
        assert spills == 0
        assert shared <= SHARED_MEMORY[90] // 2


@pytest.mark.slow
@missing("triton")
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_gradient_of_three_steps_compiles_for_an_h200(setting):
    for call in launches(setting, 90, card="NVIDIA H200", gradient_of=3):
        registers, spills, shared = compile_launch(call, 90)
        assert registers <= 255
        assert spills <= 320, f"{call.kernel}: {spills} bytes of stack"
        assert shared <= SHARED_MEMORY[90], f"{call.kernel}: {shared} bytes of shared memory"


@missing("triton")
@pytest.mark.parametrize("setting", [pytest.param(x, marks=[pytest.mark.slow] * (x != "480p")) for x in SETTINGS])
def test_the_gradient_of_the_newest_tile_fits_an_h200(setting):
    """What is tuned for scores' gradients that are read is not what makes them again."""
    key_tiles, b1, b2 = SETTINGS[setting]
    shape = plan.Shape(batch=1, query_tiles=1, key_tiles=key_tiles, b1=b1, b2=b2, heads=12, dim=128, itemsize=2)
    chosen = configs(Target(90, "NVIDIA H200"), b1=b1, b2=b2, dim=128, itemsize=2, few=True)
    (call,) = (x for x in plan.backward(shape, chosen, "ieee", 1).launches if x.kernel == "right_query")
    assert compile_launch(call, 90)[2] <= SHARED_MEMORY[90]


@missing("triton", "jax_triton")
@pytest.mark.parametrize("scratch", [1, 2**30])
def test_arrays_that_a_kernel_creates_are_its_last(scratch):
    """jax-triton hands out the buffers of what is there before those of what is not, whatever the parameters' order."""
    from monarchrt.triton_kernels import launch

    shape = plan.Shape(batch=1, query_tiles=3, key_tiles=3, b1=8, b2=8, heads=2, dim=64, itemsize=2)
    chosen = dataclasses.replace(heuristic(Target(90), b1=8, b2=8, dim=64, itemsize=2), scratch_bytes=scratch)
    todos = [plan.forward(shape, chosen, "ieee"), plan.backward(shape, chosen, "ieee", None)]
    todos += [plan.refined(shape, chosen, "ieee", n) for n in (2, 3)]
    todos += [plan.refined_backward(shape, chosen, "ieee", tiles, n) for n in (2, 3) for tiles in (None, 1)]
    for todo in todos:
        calls = [call for n in range(len(todo.steps)) for call in todo.launches_of(n)]
        written = {call.arrays.get(name, name) for call in calls for name in call.writes}
        there = set()
        for n in range(min(2, len(todo.steps))):
            for call in todo.launches_of(n):
                arrays = [call.arrays.get(x, x) for x in launch.parameters(call.kernel) if x != "scale"]
                writes = {call.arrays.get(x, x) for x in call.writes}
                places = [arrays.index(x) for x in writes - there]
                assert not places or min(places) == len(arrays) - len(places), (call.kernel, call.writes)
                assert set(arrays) & written <= there | writes, f"{call.kernel} reads what nobody wrote"
                there |= writes


@missing("triton", "jax_triton")
@pytest.mark.parametrize("newest", [None, 1])
def test_what_is_changed_in_place_needs_no_copy(newest):
    """XLA copies an array that one kernel changes and another, which need not come before it, reads as it was."""
    from monarchrt.triton_kernels import launch

    shape = plan.Shape(batch=1, query_tiles=3, key_tiles=3, b1=8, b2=8, heads=2, dim=64, itemsize=2)
    chosen = heuristic(Target(90), b1=8, b2=8, dim=64, itemsize=2)
    before: list[set[int]] = []  # of each launch, those that come before it whatever the schedule
    readers: dict[str, set[int]] = {}  # of what each array holds now
    writer: dict[str, int] = {}
    for n, call in enumerate(plan.refined_backward(shape, chosen, "ieee", newest, 3).launches):
        arrays = {call.arrays.get(x, x) for x in launch.parameters(call.kernel)}
        direct = {writer[x] for x in arrays if x in writer}
        before.append(direct.union(*(before[m] for m in direct)))
        for name in (call.arrays.get(x, x) for x in call.writes):
            assert readers.get(name, set()) <= before[n], f"{call.kernel}: a copy of {name}"
            readers[name], writer[name] = set(), n
        for name in arrays - {call.arrays.get(x, x) for x in call.writes}:
            readers.setdefault(name, set()).add(n)


@missing("triton")
def test_two_parts_of_rows_do_no_work_twice():
    """Back through L as an H200 runs it, with 128 + 16 rows and 8 warps."""
    call = next(x for x in launches("720p, 3 frames", 90, card="NVIDIA H200") if x.kernel == "left_backward")
    assert call.constants["I2"]
    assert call.constants["APART"]
    _, spills, shared = compile_launch(call, 90)
    chained = dataclasses.replace(call, constants=call.constants | {"APART": False})
    assert spills <= compile_launch(chained, 90)[1] / 2  # 104 and 488 bytes with Triton 3.7.1
    assert shared <= SHARED_MEMORY[90]


@missing("triton")
@pytest.mark.parametrize("setting", ["480p", pytest.param("480p, 3 frames", marks=pytest.mark.slow), "720p, 3 frames"])
def test_the_stream_compiles_ahead_of_time(setting):
    """As decoding would run it on sm_90: plain, with 8 warps of 128 registers, with blocks in two parts."""
    key_tiles, b1, b2 = SETTINGS[setting]
    shape = plan.Shape(batch=1, query_tiles=1, key_tiles=key_tiles, b1=b1, b2=b2, heads=12, dim=128, itemsize=2)
    chosen = dataclasses.replace(
        heuristic(Target(90), b1=b1, b2=b2, dim=128, itemsize=2), stream=Stream(rows=b2, tiles=7)
    )
    if b1 == 90:
        right = Config(rows=64, keys=64, warps=8, stages=2)
        left, stream = Config(rows=128, keys=32, stages=3), Stream(rows=b2, tiles=7, lag=3, slots=6, registers=128)
        chosen = dataclasses.replace(chosen, right_forward=right, left_forward=left, stream=stream)
    if b2 == 80:
        right = Config(rows=64, keys=64, more_keys=16, warps=8, stages=2)
        left = Config(rows=128, keys=32, more_rows=16, stages=2)
        chosen = dataclasses.replace(chosen, right_forward=right, left_forward=left)
    (call,) = plan.forward(shape, chosen, "ieee").launches
    assert call.kernel == "streamed"
    registers, spills, shared = compile_launch(call, 90)
    assert registers <= (there(chosen.stream).registers or 255)
    assert spills <= 96
    assert shared <= SHARED_MEMORY[90] // 2, "two blocks do not fit a multiprocessor"


@pytest.mark.slow
@missing("triton")
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("setting", list(SETTINGS)[1:])
def test_other_settings_compile_ahead_of_time(capability, setting):
    for call in launches(setting, capability):
        registers, spills, shared = compile_launch(call, capability)
        assert registers <= 255
        assert spills <= 512, f"{call.kernel}: {spills} bytes of stack"  # 480 in one on sm_80, 96 at most on sm_89
        assert shared <= SHARED_MEMORY[capability], f"{call.kernel}: {shared} bytes of shared memory"


def tiles(shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@missing("triton", "jax_triton")
@pytest.mark.parametrize(
    ("shape", "dtype", "num_iters", "word"),
    [
        ((1, 2, 3, 8, 1, 64), jnp.bfloat16, 1, "3 x 8"),
        ((1, 2, 8, 3, 1, 64), jnp.bfloat16, 1, "8 x 3"),
        ((1, 2, 8, 8, 1, 256), jnp.bfloat16, 1, "head_dim 256"),
        ((1, 2, 8, 8, 1, 64), jnp.float64, 1, "float64"),
    ],
)
def test_says_what_it_cannot_do(shape, dtype, num_iters, word):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert word in triton_kernels.supports(Problem(scale=1.0, num_iters=num_iters), x, x)
    assert word in triton_kernels.supports_vjp(Problem(scale=1.0, num_iters=num_iters), x, x)


@missing("triton", "jax_triton")
def test_takes_any_number_of_steps():
    x = tiles((1, 2, 8, 8, 1, 64))
    problem = Problem(scale=1.0, num_iters=7, grad_tiles=1)
    assert triton_kernels.supports(problem, x, x) is None
    assert triton_kernels.supports_vjp(problem, x, x) is None


def test_names_the_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x = tiles((1, 2, 8, 8, 1, 64))
    assert "pip install" in there(triton_kernels.supports(Problem(scale=1.0), x, x))


def on_cuda():
    return jax.default_backend() == "gpu"


SERVED = {  # tiles with a side below 4 are refused: others as odd, divided in the same way
    ((4, 6, 9), (2, 3, 3)): ((4, 10, 15), (2, 5, 5)),
    ((6, 4, 6), (1, 2, 6)): ((6, 10, 6), (1, 5, 6)),
    ((6, 3, 5), None): ((6, 5, 7), None),
}
gpu = [pytest.mark.gpu, pytest.mark.skipif(not on_cuda(), reason="needs an NVIDIA GPU")]


@pytest.fixture
def poisoned():
    """Memory that was used before holds NaN: a kernel that reads what nobody wrote shows."""
    block = jnp.full(2**29, jnp.nan, jnp.float32)
    block.block_until_ready()
    del block


@pytest.mark.usefixtures("poisoned")
class TestOnACard(AttentionSuite):
    pytestmark: ClassVar = gpu
    implementation = "triton"
    bounds: ClassVar = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
    dims: ClassVar = (64, 48)
    instead: ClassVar = SERVED

    @pytest.mark.parametrize(("grid", "served"), [((2, 4, 6), True), ((2, 3, 6), False), ((2, 6, 3), False)])
    def test_the_default_leaves_small_tiles_to_xla(self, grid, served):
        q, k, v, _ = inputs(19, grid, dim=64)
        text = jax.jit(functools.partial(monarch_attention, grid=grid)).lower(q, k, v).as_text()
        assert ("triton_kernel_call" in text) == served
        if not served:
            with pytest.raises(NotImplementedError, match="has a side below 4"):
                monarch_attention(q, k, v, grid=grid, implementation="triton")


@pytest.mark.usefixtures("poisoned")
class TestStreamOnACard(AttentionSuite):
    """The suite once more with the forward pass as a stream and blocks in two parts."""

    pytestmark: ClassVar = gpu
    implementation = "triton"
    bounds: ClassVar = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
    dims: ClassVar = (64, 48)
    instead: ClassVar = SERVED

    @pytest.fixture(autouse=True)
    def streamed(self, monkeypatch):
        plain = config.heuristic

        def heuristic(where, **shape):
            chosen = plain(where, **shape)
            parts = {
                name: dataclasses.replace(getattr(chosen, name), more_rows=16) for name in KERNELS if "left" in name
            } | {name: dataclasses.replace(getattr(chosen, name), more_keys=16) for name in KERNELS if "right" in name}
            return dataclasses.replace(chosen, **parts, stream=Stream(rows=shape["b2"] + 3, tiles=2))

        monkeypatch.setattr(config, "heuristic", heuristic)


def tile_arrays(setting, query_tiles, key_tiles, heads, sharpness=1.0, dtype=jnp.bfloat16):
    """q, k, v, d_out of a setting's tiles."""
    _, b1, b2 = SETTINGS[setting]
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (query_tiles, key_tiles, key_tiles, query_tiles)
    q, k, v, g = (jax.random.normal(r, (1, n, b1, b2, heads, 128)) for r, n in zip(keys, counts, strict=True))
    return [x.astype(dtype) for x in (q * sharpness, k, v, g)]


def results(attend, problem):
    """A compiled function of q, k, v and g: output and gradients where every query tile sees all keys."""

    @jax.jit
    def run(q, k, v, g):
        visible = jnp.full(q.shape[1], k.shape[1], jnp.int32)
        out, vjp = jax.vjp(lambda *x: attend(problem, *x, visible), q, k, v)
        return out, *vjp(g)

    return run


class TestTunedOnACard:
    """The configs that this card is tuned for, at the sizes that they are for."""

    pytestmark: ClassVar = gpu

    @pytest.mark.usefixtures("poisoned")
    @pytest.mark.parametrize("sharpness", [0.1, 1.0, 10.0])
    @pytest.mark.parametrize("query_tiles", [1, 2])
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_numbers(self, setting, query_tiles, sharpness):
        """Against float64; sharp softmaxes magnify the rounding of alpha, and do so on every backend."""
        arrays = tile_arrays(setting, query_tiles, 2, 1, sharpness)
        problem = Problem(scale=128**-0.5)
        run = results(differentiable(triton_kernels.forward, triton_kernels.vjp), problem)
        found, again = run(*arrays), run(*arrays)
        theirs = results(xla.attend, problem)(*arrays)
        with jax.enable_x64(True):
            expected = results(reference.attend, problem)(*(x.astype(jnp.float64) for x in arrays))
        for name, x, y, other, right in zip(("out", "dq", "dk", "dv"), found, again, theirs, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))
            assert error(x, right) <= max(1e-2, 1.5 * error(other, right)), name

    @pytest.mark.parametrize("setting", SETTINGS)
    def test_a_stream_gives_the_same_bits_every_time(self, setting):
        """A block that read before another had written would show sooner or later."""
        key_tiles, b1, b2 = SETTINGS[setting]
        q, k, v, _ = tile_arrays(setting, max(1, key_tiles // 7), key_tiles, 12)
        problem, visible = Problem(scale=128**-0.5), jnp.full(q.shape[1], key_tiles, jnp.int32)
        chosen = configs(config.target(), b1=b1, b2=b2, dim=128, itemsize=2)
        results = []
        for stream in (None, Stream(rows=b2, tiles=key_tiles, slots=2), Stream(rows=64, tiles=3, lag=2, slots=4)):
            with use(dataclasses.replace(chosen, stream=stream)):
                run = jax.jit(lambda *x: triton_kernels.forward(problem, *x)).lower(q, k, v, visible).compile()
            first = run(q, k, v, visible)
            for _ in range(30 if stream else 2):
                for x, y in zip(run(q, k, v, visible), first, strict=True):
                    assert (x == y).all()
            results.append(first)
        for x, y in zip(results[1:], results[:1] * 2, strict=True):
            assert error(x[0], y[0]) <= 5e-3
            assert error(x[1], y[1]) <= 1e-4
