"""Kernels over pixels of the autoencoder: against XLA in the interpreter, compiled ahead of time, who takes them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.vae import causal, layers
from monarchrt.models.vae.layers import ChannelNorm, Upsample
from monarchrt.triton_kernels import compile_for, pixel_passes
from tests.kernels.test_triton import SHARED_MEMORY, compile_launch, interpreted, missing


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


PIXELS = [struct(6, 120, 208, 384), struct(12, 240, 416, 192), struct(12, 480, 832, 96), struct(3, 90, 160, 384)]


@missing("triton", "torch")
@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["kernels", "decoder"])
def test_interpreter_agrees_with_xla(whole):
    """Each kernel, and all frames of a small decoder."""
    (found,) = interpreted("pixel_interpreter", *["decoder"] * whole)
    if whole:
        assert found.pop("taken") == ["channel_norm", "doubled_norm", "normed_taps"]
    assert set(found) == {"norm", "doubled", "taps"} | ({"decoder"} if whole else set())
    assert found.pop("decoder", 0.0) <= 1e-5, found
    assert all(error <= 2e-6 for error in found.values()), found


@missing("triton")
@pytest.mark.parametrize("x", PIXELS, ids=str)
def test_compiled_ahead_of_time(monkeypatch, x):
    """Pixels stay in registers, four programs or more on a multiprocessor."""
    assert pixel_passes.supports(x) is None
    calls = []

    def keep(call, arrays, made):
        calls.append(call)
        return {name: jnp.zeros(y.shape, y.dtype) for name, y in made.items()}

    monkeypatch.setattr(pixel_passes, "call_kernel", keep)
    frames, height, width, channels = x.shape
    y = struct(frames, height // 2 + 1, width // 2 + 1, 4 * channels)
    jax.eval_shape(causal.norm_silu, x, struct(channels))
    jax.eval_shape(causal.doubled_norm_silu, y, struct(channels))
    jax.eval_shape(causal.normed_taps, struct(1, 2, *x.shape[1:]), struct(1, *x.shape), struct(channels))
    assert [call.kernel for call in calls] == ["channel_norm", "doubled_norm", "normed_taps"]
    for call in calls:
        seen = frames + 2 * (call.kernel == "normed_taps")  # the past's two frames too
        assert math.prod(call.grid) * call.constants["ROWS"] == seen * height * width
        registers, spills, shared = compile_launch(call, 90)
        assert (registers <= 128, spills, shared <= SHARED_MEMORY[90] // 8) == (True, 0, True), call.kernel


@missing("triton", "jax_triton")
def test_lowered():
    """One kernel each."""
    gamma = struct(96)
    for what, *arrays in (
        (causal.norm_silu, struct(64, 96)),
        (causal.doubled_norm_silu, struct(1, 5, 9, 384)),
        (causal.normed_taps, struct(1, 2, 8, 8, 96), struct(1, 3, 8, 8, 96)),
    ):
        with compile_for(90):
            text = jax.jit(what).trace(*arrays, gamma).lower(lowering_platforms=("cuda",)).as_text()
            several = jax.jit(jax.vmap(what, (*[0] * len(arrays), None)))
            several = several.trace(*(struct(2, *x.shape) for x in arrays), gamma)
            looped = several.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("stablehlo.custom_call @triton_kernel_call") == 1
        assert looped.count("stablehlo.custom_call @triton_kernel_call") == 1


@pytest.mark.parametrize(
    ("name", "own", "plain", "shapes"),
    [
        ("channel_norm", causal.norm_silu, causal.plain_norm_silu, [(2, 3, 5, 32)]),
        ("doubled_norm", causal.doubled_norm_silu, causal.plain_doubled_norm_silu, [(2, 3, 5, 128)]),
        ("normed_taps", causal.normed_taps, causal.plain_normed_taps, [(2, 2, 3, 5, 32), (2, 3, 3, 5, 32)]),
    ],
    ids=["norm", "doubled", "taps"],
)
def test_gradients_are_those_of_xla(monkeypatch, name, own, plain, shapes):
    """With the kernel in the forward pass, whatever it is."""
    monkeypatch.setattr(pixel_passes, name, plain)
    arrays = [jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(shapes)]
    arrays.append(1 + jax.random.normal(jax.random.key(9), (32,)) / 8)

    def loss(of):
        return lambda *x: sum(jnp.vdot(jnp.sin(y), y) for y in jax.tree.leaves(of(*x)))

    found, wanted = (jax.grad(loss(of), argnums=tuple(range(len(arrays))))(*arrays) for of in (own, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


def test_layers_take_them_where_they_serve(monkeypatch):
    """A norm, and what follows a doubling, by the kernels in half precision; in float32 and elsewhere by XLA."""
    taken = []

    def kernel(name, plain):
        return lambda *x: taken.append(name) or plain(*x)

    monkeypatch.setattr(pixel_passes, "missing_packages", lambda: None)
    monkeypatch.setattr(layers, "norm_silu", kernel("norm", causal.plain_norm_silu))
    monkeypatch.setattr(layers, "doubled_norm_silu", kernel("doubled", causal.plain_doubled_norm_silu))
    results = {}
    for dtype in (jnp.bfloat16, jnp.float32):
        up = Upsample(32, temporal=False, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
        norm = ChannelNorm(16, param_dtype=dtype, rngs=nnx.Rngs(0))
        x = jax.random.normal(jax.random.key(0), (1, 2, 8, 16, 32), dtype)
        for capability in (9.0, 8.0, 10.0, None):
            monkeypatch.setattr(causal, "cuda_capability", lambda present=capability: present)
            for implementation in ("mosaic", "xla", None):
                norm.implementation = implementation
                (frames, normed), past = up(x, (), first=False, norm=norm)
                assert normed is not None
                assert (frames.shape, normed.shape, past) == ((1, 2, 16, 32, 16),) * 2 + ((),)
                again = norm(frames, silu=True)
                results[dtype, capability, implementation] = frames, normed, again
                served = (dtype, capability) == (jnp.bfloat16, 9.0) and implementation != "xla"
                expected = ["doubled", "norm"] * served
                assert taken == expected
                taken.clear()
        first, *others = (results[key] for key in results if key[0] == dtype)
        for other in others:
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), np.float32(b)), first, other)


def test_what_is_not_served_is_said():
    if reason := pixel_passes.missing_packages():
        pytest.skip(reason)
    for x, said in [
        (struct(64, 96, dtype=jnp.float32), "float32 is not one of bfloat16"),
        (struct(64, 20), "20 channels are above 1024, or not a multiple of 8"),
        (struct(63, 96), "63 pixels are not a multiple of 32"),
    ]:
        assert said in (pixel_passes.supports(x) or "")


@pytest.mark.parametrize("case", ["taken", "first", "one step", "by its kernel", "XLA's norm"])
def test_a_convolution_takes_normalised_taps_where_it_puts_them_together(monkeypatch, case):
    """And nowhere else; the same frames and past in any case."""
    taken = []
    monkeypatch.setattr(layers, "normed_taps", lambda *x: taken.append(x[1].shape) or causal.plain_normed_taps(*x))
    monkeypatch.setattr(layers, "norm_by_kernel", lambda implementation, x: implementation != "xla")
    monkeypatch.setattr(layers, "by_kernel", lambda *_: case == "by its kernel")
    monkeypatch.setattr(
        layers, "causal_convolution", lambda *x, **y: (causal.plain(x[0][0], x[1][0], *x[2:])[0][None],)
    )
    monkeypatch.setattr(layers, "norms", lambda *_: False)
    options = dict(dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    conv = layers.Conv(16, 8, (1 if case == "one step" else 3, 3, 3), **options)
    norm = ChannelNorm(16, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
    norm.implementation = "xla" if case == "XLA's norm" else None
    x = jax.random.normal(jax.random.key(0), (1, 1 if case == "first" else 4, 4, 8, 16))
    past = jnp.zeros_like(conv.empty_past(1, 4, 8)) if case == "first" else conv.empty_past(1, 4, 8) + 1
    monkeypatch.setattr(layers, "norm_silu", causal.plain_norm_silu)
    (y, normed), latest = conv.after_normed(past, x, None, before=norm, first=case == "first")
    wanted = conv.after(past, causal.plain_norm_silu(x, norm.gamma[...]), first=case == "first")
    assert (taken, normed) == ([x.shape] * (case == "taken"), None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), (y, latest), wanted)
