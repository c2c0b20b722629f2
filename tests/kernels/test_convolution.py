"""The causal convolution for Hopper: its numbers in the interpreter, what it serves, and how the VAE calls it."""

import os
import re
import subprocess
import sys
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from monarchrt.models.vae import WanVAE, causal, vae_config
from monarchrt.models.vae.layers import ChannelNorm, Conv, FoldedConv
from monarchrt.pallas_kernels.sm90 import convolution as kernel
from monarchrt.pallas_kernels.sm90.convolution import ConvConfig, convolution, supports
from tests.kernels.mosaic_interpreter import interpreted
from tests.kernels.test_mosaic_compile import H200, NEEDED, missing_wheels
from tests.untyped import there


class _Copied:
    """The copy engine's view of rows: a place that plain loads and stores go to."""

    def __init__(self, ref, place=()):
        self.ref, self.place = ref, place

    at = property(lambda self: self)

    def __getitem__(self, place):
        return _Copied(self.ref, place if isinstance(place, tuple) else (place,))

    def transpose(self, axes):
        """As the kernel asks for: columns and segments change places."""
        assert axes == (1, 0, 2)
        return self


def _load_row(frames, place, target, barrier):
    """The copy engine's zeros beyond a frame, which the interpreter has not."""
    time, segments, row, columns, channels = place
    (slot, number), count = target.place, columns.size
    whole = jnp.pad(frames[time, :, row, :, channels], ((1, 1), (1, count), (0, 0)))
    box = lax.dynamic_slice(whole, (segments.start + 1, columns.start + 1, 0), (8, count, whole.shape[2]))
    rows = box.transpose(1, 0, 2).reshape(8 * count, -1)
    target.ref[slot, pl.ds(number * 8 * count, 8 * count)] = rows
    plgpu.barrier_arrive(barrier)


def _copies(copy_in, copy_out):
    def load(source, target, barrier):
        if isinstance(target, _Copied) and len(target.place) == 3:
            target.ref[target.place] = source[...].transpose(1, 0, 2).reshape(64, -1)
            return plgpu.barrier_arrive(barrier)
        return copy_in(source, target.ref.at[target.place] if isinstance(target, _Copied) else target, barrier)

    def store(source, target):
        target[...] = source.ref[source.place].reshape(8, 8, -1).transpose(1, 0, 2)

    return load, store


@pytest.fixture
def interpreter(monkeypatch):
    def views(scratch):
        return scratch, _Copied(scratch)

    monkeypatch.setattr(kernel, "two_views", lambda multiplied, copied, dtype: plgpu.SMEM(tuple(multiplied), dtype))
    monkeypatch.setattr(kernel, "views", views)
    monkeypatch.setattr(kernel, "load_row", _load_row)
    with interpreted(monkeypatch):
        load, store = _copies(plgpu.copy_gmem_to_smem, plgpu.copy_smem_to_gmem)
        monkeypatch.setattr(plgpu, "copy_gmem_to_smem", load)
        monkeypatch.setattr(plgpu, "copy_smem_to_gmem", store)
        yield


def arrays(frames, height, width, channels, out, dtype=jnp.bfloat16):
    rng = np.random.default_rng(0)
    shapes = (2, height, width, channels), (frames, height, width, channels), (3, 3, 3, channels, out), (out,)
    made = [jnp.asarray(rng.standard_normal(s), dtype) for s in (*shapes, (frames, height, width, out))]
    made[2] = made[2] / 30
    return made


def expected(past, x, weights, bias, added: Any = 0.0, gamma: Any = None):
    """In float64, step by step of the kernel."""
    past, x, weights, bias, added = (np.asarray(y, np.float64) for y in (past, x, weights, bias, added))
    height, width = x.shape[1:3]
    padded = np.pad(np.concatenate([past, x]), ((0, 0), (1, 1), (1, 1), (0, 0)))
    steps = [(t, i, j) for t in range(3) for i in range(3) for j in range(3)]
    parts = (padded[t : t + len(x), i : i + height, j : j + width] @ weights[t, i, j] for t, i, j in steps)
    y = sum(parts) + bias + added
    if gamma is not None:
        y = y / np.linalg.norm(y, axis=-1, keepdims=True) * y.shape[-1] ** 0.5 * np.asarray(gamma, np.float64)
        y = y / (1 + np.exp(-y))
    return y


CASES = [
    # one frame, two rows of patches in a segment, and both edges of the frame
    pytest.param((1, 16, 8, 32, 32), ConvConfig(rows=1, out=32, groups=1, blocks=1), True),
    pytest.param((1, 16, 8, 32, 32), ConvConfig(rows=1, out=32, groups=1, blocks=2), False),  # and a norm
    pytest.param((3, 32, 16, 32, 64), ConvConfig(rows=3, out=32, blocks=5), True, marks=pytest.mark.slow),
    pytest.param((1, 16, 8, 32, 3), ConvConfig(rows=1, out=32, groups=1, blocks=2), False, marks=pytest.mark.slow),
    pytest.param(
        (2, 16, 32, 64, 64), ConvConfig(rows=2, columns=16, out=64, groups=2, kernels=2, blocks=3), True,
        marks=pytest.mark.slow,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "config", "adds"), CASES)
def test_is_a_causal_convolution(interpreter, shape, config, adds):
    """With frames of the past, rows that go on in another segment, and patches that reach beyond a frame."""
    *others, added = arrays(*shape)
    added = added if adds else None
    normed = not adds and shape[-1] == config.out
    gamma = jnp.asarray(np.random.default_rng(1).standard_normal(shape[-1]), jnp.float32) if normed else None
    (out,) = jax.jit(lambda *x: convolution(*x, config=config))(*others, added, gamma)
    wanted = expected(*others, added=added if adds else 0.0, gamma=gamma)
    assert np.abs(np.asarray(out, np.float64) - wanted).max() < 2**-7 * np.abs(wanted).max()


def test_frames_by_themselves(interpreter):
    """A kernel of one step in time, few channels out of two slabs; a past is then no more taken than it is left out."""
    past, x, weights, bias, _ = arrays(2, 16, 8, 64, 9)
    config = ConvConfig(rows=1, out=32, groups=1, blocks=2)
    (found,) = jax.jit(lambda *x: convolution(None, *x, config=config))(x, weights[:1], bias)
    whole = np.zeros(weights.shape)
    whole[2] = weights[0]  # the frame's own step
    wanted = expected(past, x, whole, bias)
    assert np.abs(np.asarray(found, np.float64) - wanted).max() < 2**-7 * np.abs(wanted).max()
    for wrong in ((past, x, weights[:1], bias), (None, x, weights, bias)):
        with pytest.raises(ValueError, match="give past with 3, None with 1"):
            convolution(*wrong, config=config)


def test_hands_out_what_it_normalises(interpreter):
    """With what is added, and more than one slab of channels."""
    *others, added = arrays(2, 16, 8, 32, 64)
    gamma = jnp.asarray(np.random.default_rng(1).standard_normal(64), jnp.float32)
    config = ConvConfig(rows=1, out=64, groups=1, kernels=3, blocks=3)
    found = jax.jit(lambda *x: convolution(*x, both=True, config=config))(*others, added, gamma)
    for out, weights in zip(found, (None, gamma), strict=True):
        wanted = expected(*others, added=added, gamma=weights)
        assert np.abs(np.asarray(out, np.float64) - wanted).max() < 2**-7 * np.abs(wanted).max()
    with pytest.raises(ValueError, match="give gamma"):
        convolution(*others, added, both=True, config=config)


def frames_of(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct((1, 3, *shape), dtype)


@pytest.mark.parametrize(
    ("frames", "weights", "reason"),
    [
        (frames_of(480, 832, 96), (3, 3, 3, 96, 96), None),
        (frames_of(120, 208, 192), (3, 3, 3, 192, 384), None),
        (frames_of(480, 832, 96, dtype=jnp.float32), (3, 3, 3, 96, 96), "the frames are float32"),
        (frames_of(480, 832, 96), (3, 1, 1, 96, 192), "a kernel of"),
        (frames_of(480, 832, 96), (3, 3, 3, 96, 3), None),
        (frames_of(480, 832, 96), (1, 3, 3, 96, 9), None),
        (frames_of(480, 832, 96), (3, 3, 3, 96, 64), "no multiples"),
        (frames_of(480, 832, 96), (3, 3, 3, 3, 96), "no multiples"),
        (frames_of(60, 104, 384), (3, 3, 3, 384, 384), "equal segments"),
        (frames_of(40, 104, 96), (3, 3, 3, 96, 96), "equal segments"),
    ],
)
def test_what_it_serves(frames, weights, reason):
    said = supports(frames, weights)
    assert said is None if reason is None else reason in said


def test_the_vae_calls_it(monkeypatch):
    """Each entry of a batch with its past, the bias and what is added; and the gradient is that of XLA's way."""
    monkeypatch.setattr(kernel, "convolution", causal.plain)
    options = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv = Conv(2, 3, (3, 3, 3), **options)
    there(conv.bias)[...] = jnp.array([1.0, 2.0, 3.0])
    rng = np.random.default_rng(0)
    past, x, added = (
        jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 2, 4, 5, 2), (2, 3, 4, 5, 2), (2, 3, 4, 5, 3))
    )
    graph, state = nnx.split(conv)

    norm = ChannelNorm(3, param_dtype=jnp.float32, rngs=nnx.Rngs(0))

    def run(state, past, x, added, taken):
        y, new = nnx.merge(graph, state).after(past, x, added=added)
        last, _ = nnx.merge(graph, state).after_normed(past, x, norm, both=False)
        pair, _ = nnx.merge(graph, state).after_normed(past, x, norm, added=added)
        assert (last[1] is None) == (pair[1] is None) == (not taken)
        normed, second = (norm(y, silu=True) if z is None else z for y, z in (last, pair))
        pair = pair[0], second
        return sum((jnp.sin(out) ** 2).sum() for out in (y, normed, *pair)), (y, normed, pair, new)

    results = []
    monkeypatch.setattr("monarchrt.models.vae.layers.norms", lambda *_: True)
    for taken in (False, True):
        monkeypatch.setattr("monarchrt.models.vae.layers.by_kernel", lambda *_, taken=taken: taken)
        both = jax.jit(jax.value_and_grad(partial(run, taken=taken), argnums=(0, 1, 2, 3), has_aux=True))
        results.append(jax.tree.leaves(both(state, past, x, added)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        results[1][1][1], expected(past[1], x[1], conv.kernel[...], there(conv.bias)[...], added[1]), atol=1e-4
    )


@pytest.mark.parametrize("taken", [False, True])
def test_the_last_convolution_folds_its_steps(monkeypatch, taken):
    """A clip in pieces of 1, 3 and 2 frames is what a plain convolution makes of it, and so is the gradient."""
    monkeypatch.setattr(kernel, "convolution", causal.plain)
    options = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    plain, folded = (of(16, 3, (3, 3, 3), rngs=nnx.Rngs(0), **options) for of in (Conv, FoldedConv))
    for conv in (plain, folded):
        there(conv.bias)[...] = jnp.array([1.0, 2.0, 3.0])
        assert conv.empty_past(2, 4, 5).shape == (2, 2, 4, 5, 16)  # who is not told to does as any
    folded.implementation = "mosaic"
    assert folded.empty_past(2, 4, 5).shape == (2, 2, 4, 5, 9)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 6, 4, 5, 16)), jnp.float32)

    def run(state, x, graph):
        conv, frames = nnx.merge(graph, state), []
        past = conv.empty_past(2, 4, 5)
        for piece in (x[:, :1], x[:, 1:4], x[:, 4:]):
            y, past = conv.after(past, piece, first=not frames)
            frames.append(y)
        y = jnp.concatenate(frames, axis=1)
        return (jnp.sin(y) ** 2).sum(), y

    results = []
    for conv, way in ((plain, False), (folded, taken)):
        monkeypatch.setattr("monarchrt.models.vae.layers.by_kernel", lambda *_, way=way: way)
        graph, state = nnx.split(conv)
        both = jax.jit(jax.value_and_grad(partial(run, graph=graph), argnums=(0, 1), has_aux=True))
        results.append(jax.tree.leaves(both(state, x)))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_decoder_is_the_same_with_norms_in_its_convolutions(monkeypatch):
    """Where a block hands the next one what it would normalise, and where it hands on nothing else."""
    vae = WanVAE(vae_config("tiny"), rngs=nnx.Rngs(0))
    norms = [module for _, module in nnx.iter_modules(vae) if isinstance(module, ChannelNorm)]
    rng = np.random.default_rng(0)
    for norm in norms:
        norm.gamma[...] = jnp.asarray(rng.uniform(0.5, 1.5, norm.gamma.shape), jnp.float32)
    graph, state = nnx.split(vae)
    latents = jnp.asarray(rng.standard_normal((1, 3, 2, 3, 16)), jnp.float32)

    def decode():
        return jax.jit(lambda state, latents: nnx.merge(graph, state).decode(latents))(state, latents)

    wanted, asked = decode(), []

    def convolution(*arguments, both):
        asked.append((arguments[4] is not None, arguments[5] is not None, both))
        return causal.plain(*arguments, both=both)

    monkeypatch.setattr(kernel, "convolution", convolution)
    monkeypatch.setattr("monarchrt.models.vae.layers.by_kernel", lambda way, x, shape: shape[:3] == (3, 3, 3))
    monkeypatch.setattr("monarchrt.models.vae.layers.norms", lambda *_: True)
    np.testing.assert_allclose(decode(), wanted, atol=1e-5)
    # the first of a block; the second before another, before the head and before anything else; first and last layer
    assert set(asked) == {
        (False, True, False),
        (True, True, True),
        (True, True, False),
        (True, False, False),
        (False,) * 3,
    }


def test_a_vae_says_how(monkeypatch):
    """The kernel is taken by who is told to, and on the GPU that it is for where it was measured."""
    vae = nnx.eval_shape(lambda: WanVAE(vae_config("wan21"), rngs=nnx.Rngs(0), implementation="mosaic"))
    asked = [module for _, module in nnx.iter_modules(vae) if isinstance(module, Conv)]
    assert {conv.implementation for conv in asked} == {"mosaic"}
    ways: tuple[Any, ...] = ("mosaic", "xla", None)
    frames = frames_of(480, 832, 96)

    def taken(out, times=3):
        return [causal.by_kernel(way, frames, (times, 3, 3, 96, out)) for way in ways]

    assert taken(96) == taken(384) == [True, False, False]
    monkeypatch.setattr("monarchrt.models.vae.causal.on_cuda", lambda: True)
    assert taken(96) == taken(192) == [True, False, True]
    assert taken(3) == [True, False, True]
    assert taken(9, times=1) == [True, False, True]
    assert taken(96, times=1) == [True, False, False]
    last = [conv for conv in asked if isinstance(conv, FoldedConv)]
    assert len(last) == 1
    last[0].dtype = jnp.dtype(jnp.bfloat16)
    assert [last[0].folds(480, 832), last[0].folds(480, 4)] == [True, True]
    last[0].implementation = None
    assert [last[0].folds(480, 832), last[0].folds(480, 4)] == [True, False]
    last[0].implementation = "xla"
    assert not last[0].folds(480, 832)
    assert taken(384) == [True, False, False]
    assert [causal.norms(way, frames, (3, 3, 3, 96, 96)) for way in ways] == [True, False, True]
    assert not causal.norms("mosaic", frames, (3, 3, 3, 96, 192))
    monkeypatch.setattr(kernel, "cuda_capability", lambda: 8.0)
    assert taken(96) == [False, False, False]


PROGRAM = """
import sys
import jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from monarchrt.pallas_kernels.sm90.convolution import convolution

channels, out, adds, norm, times = map(int, sys.argv[1:])
topology = topologies.get_topology_desc(platform="cuda", target_config=sys.stdin.read(), topology="1x1x1")
sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())

def half(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

frames = half(12, 240, 416, channels), half(12, 240, 416, out) if adds else None, half(out) if norm else None
x, added, gamma = frames
past = half(2, *x.shape[1:]) if times == 3 else None
inputs = past, x, half(times, 3, 3, channels, out), half(out), added, gamma
jax.jit(convolution).trace(*inputs).lower().compile()
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(missing_wheels()), reason=f"needs {', '.join(NEEDED)}")
@pytest.mark.parametrize(
    ("channels", "out", "adds", "norm", "times"),
    [(192, 192, 1, 0, 3), (96, 96, 0, 1, 3), (96, 3, 0, 0, 3), (96, 9, 0, 0, 1)],
)
def test_compiles_for_sm_90a(tmp_path, channels, out, adds, norm, times):
    """In the shared memory that a block has, with few spilled numbers and the products left as they are."""
    dump = {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_PLATFORMS": "cpu"}
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", PROGRAM, *map(str, (channels, out, adds, norm, times))]
    done = subprocess.run(
        command, input=H200, env=os.environ | dump | path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (report,) = [path.read_text() for path in tmp_path.glob("*.ptxas")]
    assert "wgmma" not in report.lower()
    assert int(there(re.search(r"(\d+) bytes spill stores", report))[1]) <= 250
