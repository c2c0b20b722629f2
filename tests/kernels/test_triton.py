"""Triton kernels: numbers in the interpreter, compiled resources, lowering; on a card, the whole suite."""

import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

import triton_kernels
from monarch_jax import monarch_attention
from monarch_jax.backends import Problem
from tests.attention.suite import AttentionSuite
from triton_kernels import plan
from triton_kernels.config import KERNELS, Config, Target, configs, heuristic, store, use, user_file
from triton_kernels.tune import neighbours, search

ROOT = Path(__file__).parents[2]
INTERPRETED = (  # a process each: that takes seconds to start
    ("plain", "causal", "half", "keys first", "two parts"),
    ("480p tile", "one pair at a time, a dominant row", "flat"),
    ("blocks of rows and columns", "newest tile", "two parts, keys first", "stream, causal"),
    ("one query tile at a time", "sharp, padded dim", "stream", "stream, sharp", "two parts, newest tile"),
)
SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes a block may have
SETTINGS = {"480p": (21, 30, 52), "480p, 3 frames": (7, 90, 52), "720p": (21, 45, 80), "720p, 3 frames": (7, 135, 80)}


def missing(*packages):
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"needs {', '.join(absent)}")


@missing("triton", "torch")
@pytest.mark.parametrize("cases", INTERPRETED, ids=", ".join)
def test_interpreter_agrees_with_the_reference(cases):
    """In a process of its own, because the interpreter is chosen when the kernels are imported."""
    env = os.environ | {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-W", "ignore", "-m", "tests.kernels.triton_interpreter", *cases]
    done = subprocess.run(script, capture_output=True, text=True, env=env, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {row.pop("case"): row for row in rows}
    assert set(found) == set(cases)
    for case, errors in found.items():
        assert set(errors) == {"out", "dq", "dk", "dv"}
        assert all(x <= (2e-3 if case == "half" else 1e-5) for x in errors.values()), (case, errors)


@missing("triton", "torch")
def test_every_case_is_run():
    source = (ROOT / "tests" / "kernels" / "triton_interpreter.py").read_text()
    named = set(re.findall(r'^    "([^"]+)": Case\(', source, re.MULTILINE))
    assert named == {case for cases in INTERPRETED for case in cases}


def launches(setting, capability, dim=128, itemsize=2):
    """Every distinct launch of forward and backward of one setting."""
    tiles, b1, b2 = SETTINGS[setting]
    shape = plan.Shape(batch=1, query_tiles=tiles, key_tiles=tiles, b1=b1, b2=b2, heads=12, dim=dim, itemsize=itemsize)
    chosen = configs(Target(capability), b1=b1, b2=b2, dim=dim, itemsize=itemsize)
    precision = "tf32x3" if itemsize == 4 else "ieee"
    return plan.forward(shape, chosen, precision).launches + plan.backward(shape, chosen, precision, None).launches


def compile_launch(call, capability, dtype="bf16"):
    """Registers, bytes of spills and of shared memory, from the compiler that Triton carries."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import compiler as nvidia
    from triton.compiler import ASTSource

    from triton_kernels import left, overlapped, right, streamed

    kernel = getattr({"f": overlapped, "l": left, "r": right, "s": streamed}[call.kernel[0]], call.kernel)
    integers = {"step": "*i32", "visible": "*i32", "first_tile": "*i32", "counters": "*i32", "scale": "fp32"}
    floats = dict.fromkeys(("stats", "lse", "delta", "dq_left"), "*fp32")
    signature, constants, attributes = {}, {}, {}
    for n, name in enumerate(inspect.signature(kernel.fn).parameters):
        signature[name] = "constexpr" if name.isupper() else (integers | floats).get(name, f"*{dtype}")
        if name.isupper():
            constants[(n,)] = call.constants[name]
        elif name != "scale":
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
@pytest.mark.parametrize("capability", [80, 90, 100, 120])
def test_kernels_compile_ahead_of_time(capability):
    for call in launches("480p", capability):
        registers, spills, shared = compile_launch(call, capability)
        assert registers <= 255
        # two sums of 64 x 128 fill the registers of right_backward on sm_90: 24 bytes with Triton 3.7.1, 80 with 3.9.0
        assert spills <= (96 if call.kernel == "right_backward" else 64), f"{call.kernel}: {spills} bytes of stack"
        assert shared <= SHARED_MEMORY[capability], f"{call.kernel}: {shared} bytes of shared memory"


@pytest.mark.slow
@missing("triton")
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("setting", list(SETTINGS)[1:])
def test_other_settings_fit_shared_memory(capability, setting):
    for call in launches(setting, capability):
        _, _, shared = compile_launch(call, capability)
        assert shared <= SHARED_MEMORY[capability], f"{call.kernel}: {shared} bytes of shared memory"


@missing("triton", "jax_triton", "jax_cuda13_plugin")
@pytest.mark.parametrize("gradient", [False, True])
def test_lowers_for_cuda_without_a_card(gradient):
    attend = functools.partial(monarch_attention, grid=(21, 30, 52), implementation="triton")
    x = jax.ShapeDtypeStruct((1, 21 * 30 * 52, 12, 128), jnp.bfloat16)

    def run(q, k, v, g):
        out, vjp = jax.vjp(attend, q, k, v)
        return vjp(g) if gradient else out

    with triton_kernels.compile_for(90):
        text = jax.jit(run).trace(x, x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("triton_kernel_call_ffi") >= (5 if gradient else 1)


@missing("triton", "jax_triton", "jax_cuda13_plugin")
def test_vmap_and_a_traced_fill_lower_for_cuda():
    attend = functools.partial(monarch_attention, grid=(2, 6, 8), implementation="triton")
    q = jax.ShapeDtypeStruct((3, 1, 96, 2, 64), jnp.float16)
    k = jax.ShapeDtypeStruct((3, 1, 192, 2, 64), jnp.float16)

    def run(q, k, v, frames):
        return jax.grad(lambda q: jax.vmap(lambda *x: attend(*x, kv_frames=frames))(q, k, v).astype(jnp.float32).sum())(
            q
        )

    lowered = jax.jit(run).trace(q, k, k, jax.ShapeDtypeStruct((), jnp.int32)).lower(lowering_platforms=("cuda",))
    assert "triton_kernel_call_ffi" in lowered.as_text()


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
        ((1, 2, 8, 8, 1, 64), jnp.bfloat16, 2, "num_iters=2"),
    ],
)
def test_says_what_it_cannot_do(shape, dtype, num_iters, word):
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert word in triton_kernels.supports(Problem(scale=1.0, num_iters=num_iters), x, x)


def test_names_the_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    x = tiles((1, 2, 8, 8, 1, 64))
    assert "pip install" in triton_kernels.supports(Problem(scale=1.0), x, x)


@pytest.mark.parametrize("setting", SETTINGS)
def test_scratch_stays_bounded(setting):
    """Intermediates of any number of frames stay under the limit, down to one query tile of one head."""
    _, b1, b2 = SETTINGS[setting]
    chosen = heuristic(Target(90), b1=b1, b2=b2, dim=128, itemsize=2)
    for tiles in (1, 7, 21, 84):
        shape = plan.Shape(batch=2, query_tiles=tiles, key_tiles=tiles, b1=b1, b2=b2, heads=12, dim=128, itemsize=2)
        for todo in (plan.forward(shape, chosen, "ieee"), plan.backward(shape, chosen, "ieee", None)):
            assert todo.pairs * todo.tiles * tiles * b1 * b2 * 512 <= max(chosen.scratch_bytes, tiles * b1 * b2 * 512)
            covered = {(pair, tile) for pair, tile, *_ in todo.steps if pair < shape.pairs}
            assert covered == {(p, t) for p in range(0, shape.pairs, todo.pairs) for t in range(0, tiles, todo.tiles)}


def test_tuned_configs_are_read():
    where = Target(90, "NVIDIA H200")
    for b1, b2 in ((30, 52), (90, 52), (45, 80), (135, 80)):
        chosen = configs(where, b1=b1, b2=b2, dim=128, itemsize=2)
        assert isinstance(chosen.right_forward, Config)
        assert chosen != heuristic(where, b1=b1, b2=b2, dim=128, itemsize=2)


def test_the_users_configs_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = {"b1": 30, "b2": 52, "dim": 128, "itemsize": 2}
    where = Target(90, "NVIDIA H200")
    mine = dataclasses.replace(configs(where, **shape), right_query=Config(rows=16, keys=64, stages=1))
    assert store(where, mine, **shape) == user_file(where)
    assert configs(where, **shape) == mine
    assert configs(where, **shape | {"b2": 80}) != mine
    other = heuristic(Target(80), **shape)
    with use(other):
        assert configs(where, **shape) == other


def test_search_moves_to_the_fastest_neighbours():
    """A made-up cost with one minimum per kernel: the search must find it, and skip what does not run."""
    goal = Config(rows=128, keys=32, warps=8, stages=3, split=2, transposed=True)
    start = heuristic(Target(90), b1=30, b2=52, dim=128, itemsize=2)

    def cost(found, backward):
        if any(getattr(found, name).stages == 4 for name in KERNELS):
            return float("inf")
        steps = 0.0
        for name in KERNELS:
            at = getattr(found, name)
            steps += sum(abs(math.log2(getattr(at, x) / getattr(goal, x))) for x in ("rows", "keys", "warps", "split"))
            steps += abs(at.stages - goal.stages) + (at.transposed != goal.transposed)
        return steps

    best = search(start, cost)
    assert all(getattr(best, name) == goal for name in KERNELS)


def test_neighbours_differ_and_stay_powers_of_two():
    at = Config(rows=16, keys=128, warps=8, stages=1)
    found = list(neighbours(at))
    assert at not in found
    assert len(set(found)) == len(found)
    assert all(x.rows & (x.rows - 1) == 0 and 16 <= x.rows <= 128 for x in found)


@missing("triton", "jax_triton", "jax_cuda13_plugin")
@pytest.mark.parametrize("gradient", [False, True])
def test_lowers_under_shard_map(gradient):
    """Heads over a mesh axis: results must carry the axis they vary on."""
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, None, "heads")
    attend = functools.partial(monarch_attention, grid=(2, 6, 8), implementation="triton")
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)

    def run(q, k, v):
        if not gradient:
            return sharded(q, k, v)
        return jax.grad(lambda *x: sharded(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(q, k, v)

    x = jax.ShapeDtypeStruct((1, 96, 4, 64), jnp.bfloat16)
    assert "triton_kernel_call_ffi" in jax.jit(run).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()


def on_cuda():
    return jax.default_backend() == "gpu"


@pytest.mark.gpu
@pytest.mark.skipif(not on_cuda(), reason="needs an NVIDIA GPU")
class TestOnACard(AttentionSuite):
    implementation = "triton"
    num_iters: ClassVar = (1,)
    bounds: ClassVar = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
    dims: ClassVar = (64, 48)
