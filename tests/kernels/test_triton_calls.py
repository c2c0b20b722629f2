"""Triton kernels lowered for CUDA without a card: which kernels a program calls, and that its text is always one."""

import dataclasses
import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from monarch_jax import monarch_attention
from monarchrt import triton_kernels
from monarchrt.triton_kernels.config import Stream, Target, heuristic, use
from tests.kernels.test_triton import ROOT, missing


@pytest.mark.parametrize(
    ("lacking", "said"),
    [
        ((), None),
        (("triton",), "triton is not installed: pip install 'monarchrt[cuda]'."),
        (("jax_triton",), "jax-triton is not installed: pip install 'monarchrt[cuda]'."),
        (("triton", "jax_triton"), "triton and jax-triton are not installed: pip install 'monarchrt[cuda]'."),
    ],
)
def test_packages_that_are_missing(lacking, said, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in lacking else name)
    assert triton_kernels.missing_packages() == said


@missing("triton", "jax_triton", "jax_cuda13_plugin")
@pytest.mark.parametrize("gradient", [pytest.param(False, marks=pytest.mark.slow), True])
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
@pytest.mark.parametrize("lowered", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_more_steps_lower_for_cuda_without_a_card(lowered):
    """Two steps are four kernels forward and nine back; to lower them is to compile them."""
    attend = functools.partial(monarch_attention, grid=(3, 6, 8), num_iters=2, implementation="triton")
    x = jax.ShapeDtypeStruct((1, 144, 2, 64), jnp.bfloat16)

    def run(q, k, v, g):
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(g)

    with triton_kernels.compile_for(90):
        traced = jax.jit(run).trace(x, x, x, x)
        if lowered:
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert text.count("@triton_kernel_call_ffi") == 4 + 9
    called = {"right_forward", "left_refine", "left_last"}
    called |= {"right_further", "left_backward", "right_further_backward", "right_further_query"}
    called |= {"left_refine_backward", "right_backward", "right_query"}
    assert set(re.findall(r"triton_kernels\.\w+:(\w+)", str(traced.jaxpr))) == called


@missing("triton", "jax_triton", "jax_cuda13_plugin")
def test_decoding_as_a_stream_is_one_kernel():
    q, k = (jax.ShapeDtypeStruct((1, frames * 1560, 12, 128), jnp.bfloat16) for frames in (3, 21))
    attend = functools.partial(monarch_attention, grid=(3, 30, 52), implementation="triton")
    chosen = heuristic(Target(90), b1=30, b2=52, dim=128, itemsize=2)
    with triton_kernels.compile_for(90), use(dataclasses.replace(chosen, stream=Stream(rows=52, tiles=7))):
        text = jax.jit(attend).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call_ffi") == 1


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


LAYERS = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from monarch_jax import monarch_attention
from monarchrt import triton_kernels

topology = topologies.get_topology_desc(platform="cuda", target_config=sys.stdin.read(), topology="1x1x1")
sharding = jax.NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), jax.P())
x = jax.ShapeDtypeStruct((3, 1, 48, 2, 64), jnp.float16, sharding=sharding)
layer = lambda *x: monarch_attention(*x, grid=(2, 4, 6), implementation="triton")

def run(q, k, v, g):
    out, vjp = jax.vjp(lambda *x: jax.lax.scan(lambda _, x: (None, layer(*x)), None, x)[1], q, k, v)
    return out, *vjp(g)

with triton_kernels.compile_for(90):
    print(jax.jit(run).trace(x, x, x, x).lower().compile().as_text())
"""


@missing("triton", "jax_triton", "jax_cuda13_plugin")
def test_a_scan_over_layers_keeps_slices_apart_from_the_kernels():
    """XLA's fusions of slices with kernels lose what the kernels change in place."""
    from tests.kernels.test_mosaic_compile import H200

    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    script = [sys.executable, "-W", "ignore", "-c", LAYERS]
    done = subprocess.run(script, input=H200, capture_output=True, text=True, env=env, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [line for line in done.stdout.splitlines() if 'custom_call_target="triton_kernel_call_ffi"' in line]
    assert len(kernels) == 6
    assert sum("output_to_operand_aliasing" in line for line in kernels) >= 3
    assert '"name":"dynamic_slice_fusion"' not in done.stdout


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


def lowered_texts(grids):
    """What the cache of compiled programs goes by, of the kernels for each grid."""
    texts = {}
    for grid in grids:
        x = jax.ShapeDtypeStruct((1, grid[0] * grid[1] * grid[2], 2, 64), jnp.bfloat16)

        def attend(*x, grid=grid):
            return monarch_attention(*x, grid=grid, implementation="triton")

        with triton_kernels.compile_for(90):
            texts[grid] = jax.jit(attend).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
        assert "triton_kernel_call_ffi" in texts[grid]
    return texts


@missing("triton", "jax_triton", "jax_cuda13_plugin")
def test_a_kernel_has_one_text():
    assert lowered_texts([(3, 6, 8)]) == lowered_texts([(3, 6, 8)])


@pytest.mark.slow
@missing("triton", "jax_triton", "jax_cuda13_plugin")
def test_a_kernel_has_one_text_in_every_process():
    """Whatever was traced before, and whatever the seed of hashes: a later process finds what an earlier compiled."""
    program = (
        "import hashlib, sys\nfrom tests.kernels.test_triton_calls import lowered_texts\n"
        "grids = [(3, 6, 8), (2, 4, 8)][:: int(sys.argv[1])]\n"
        "for grid, text in lowered_texts(grids).items():\n"
        "    print(grid, hashlib.sha256(text.encode()).hexdigest())\n"
    )
    found = []
    for order in ("1", "-1"):
        seed = str(2 + int(order))
        env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", program, order], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(sorted(done.stdout.splitlines()))
    assert found[0] == found[1]
    assert len(found[0]) == 2
