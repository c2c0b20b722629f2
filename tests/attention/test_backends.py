"""The shared suite on the backends that run anywhere, and what is particular to each."""

import functools
import importlib.util
import itertools
import types
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import backends, monarch_attention, xla
from monarch_jax.backends import AUTOMATIC, IMPLEMENTATIONS, choose, on_cuda
from monarch_jax.contract import SAVED, Problem, Residuals
from tests.attention.suite import AttentionSuite, error, inputs, value_and_grads, with_grads
from tests.untyped import there


class TestXla(AttentionSuite):
    implementation = "xla"

    @pytest.mark.parametrize("num_iters", [pytest.param(1, marks=pytest.mark.slow), 3])
    def test_float64(self, x64, num_iters):
        grid, tile = (4, 4, 6), (2, 4, 3)
        arrays = inputs(0, grid, dtype=jnp.float64)
        self.compare(*arrays, grid=grid, tile=tile, num_iters=num_iters, causal_block=2)

    @pytest.mark.parametrize("chunk_bytes", [1, 200_000])
    def test_chunks(self, monkeypatch, chunk_bytes):
        """One query tile at a time, or a few, gives what all at once gives."""
        monkeypatch.setattr("monarch_jax.xla.CHUNK_BYTES", chunk_bytes)
        for num_iters in (1, 2):
            self.compare(
                *inputs(1, (6, 4, 6)), grid=(6, 4, 6), tile=(1, 2, 6), causal_block=3, num_iters=num_iters, bound=1e-5
            )

    @pytest.mark.parametrize("num_iters", [1, 2])
    @pytest.mark.parametrize("options", [{}, {"causal_block": 1}], ids=["all", "causal"])
    def test_a_second_call_compiles_nothing(self, caplog, num_iters, options):
        """Outside of `jax.jit`, forward and backward."""
        q, k, v, _ = inputs(0, (2, 3, 5))

        def run(q):
            return monarch_attention(
                q, k, v, grid=(2, 3, 5), num_iters=num_iters, implementation=self.implementation, **options
            )

        for call in (lambda: run(q), lambda: jax.grad(lambda q: (run(q) ** 2).sum())(q)):
            compiled = []
            for _ in range(2):
                caplog.clear()
                with jax.log_compiles():
                    call()
                compiled.append([r.getMessage() for r in caplog.records if r.getMessage().startswith("Compiling")])
            assert compiled[0]
            assert not compiled[1]

    @pytest.mark.parametrize("num_iters", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_export_with_a_symbolic_batch(self, num_iters):
        """One exported program, forward and backward, serves every batch."""
        options = dict(grid=(2, 3, 4), num_iters=num_iters, implementation=self.implementation)
        run = jax.jit(lambda *x: value_and_grads(*x, **options))
        x = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("b"), 24, 3, 16), jnp.float32)
        exported = jax.export.export(run)(x, x, x, x)
        for batch in (1, 3):
            arrays = inputs(0, (2, 3, 4), batch=batch)
            for found, expected in zip(exported.call(*arrays), run(*arrays), strict=True):
                assert error(found, expected) <= 2e-6

    @pytest.mark.parametrize("num_iters", [1, 2])
    @pytest.mark.parametrize("backward", [False, True])
    def test_memory_is_linear_in_frames(self, num_iters, backward):
        """Temporary memory of the compiled program at F = 42 against F = 21."""

        def temporary(frames):
            grid = (frames, 10, 13)
            x = jax.ShapeDtypeStruct((1, frames * 130, 8, 64), jnp.float32)
            options: dict[str, Any] = dict(grid=grid, num_iters=num_iters, implementation="xla")
            run = (
                (lambda q, k, v, g: value_and_grads(q, k, v, g, **options))
                if backward
                else (lambda q, k, v, g: monarch_attention(q, k, v, **options))
            )
            return there(jax.jit(run).lower(x, x, x, x).compile().memory_analysis()).temp_size_in_bytes

        assert temporary(42) <= 2.3 * temporary(21)


@pytest.mark.parametrize("num_iters", [1, 2])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_nan_reaches_only_those_who_see_it(implementation, num_iters):
    """Keys and values of a later causal block: outputs of earlier ones and their gradients do not change."""
    grid, early = (4, 2, 3), slice(0, 12)
    q, k, v, g = map(np.asarray, inputs(15, grid, dim=8))
    run = with_grads(grid=grid, causal_block=2, num_iters=num_iters, implementation=implementation)
    expected = [np.asarray(x) for x in run(q, k, v, g)]
    for bad, which in itertools.product((np.nan, np.inf), "kv"):
        spoiled = (v if which == "v" else k).copy()
        spoiled[:, 20] = bad
        arrays = (q, k, spoiled) if which == "v" else (q, spoiled, v)
        found = [np.asarray(x) for x in run(*arrays, g)]
        for x, y in zip(found[:2], expected[:2], strict=True):
            assert error(x[:, early], y[:, early]) <= 2e-6
            assert not np.isfinite(x[:, 12:]).any()
        assert not np.isfinite(found[2]).any()


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_gradients_over_a_mesh(kind):
    """Under `shard_map` with heads over an axis or only the queries' frames, and with explicitly sharded arrays."""
    mesh = jax.make_mesh((1, 1), ("heads", "frames"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)
    arrays = inputs(2, (4, 2, 3), batch=1, heads=2, dim=8)
    expected = value_and_grads(*arrays, grid=(4, 2, 3), implementation="reference")
    heads, frames = jax.P(None, None, "heads"), jax.P(None, "frames")
    for query, keys in ((heads, heads), (frames, jax.P())) if kind == "Auto" else ((heads, heads),):
        specs = (query, keys, keys)
        attend = functools.partial(monarch_attention, grid=(4, 2, 3), implementation="xla")
        if kind == "Auto":
            attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=query)

        def run(q, k, v, g, attend=attend):
            out, vjp = jax.vjp(attend, q, k, v)
            return out, *vjp(g)

        with jax.set_mesh(mesh):
            placed = [
                jax.device_put(x, jax.NamedSharding(mesh, p)) for x, p in zip(arrays, (*specs, query), strict=True)
            ]
            found = jax.jit(run)(*placed)
        for x, y in zip(found, expected, strict=True):
            assert error(x, y) <= 2e-6


def test_none_picks_a_documented_backend():
    q, k, v, _ = inputs(0, (2, 3, 4))
    default = monarch_attention(q, k, v, grid=(2, 3, 4))
    assert (default == monarch_attention(q, k, v, grid=(2, 3, 4), implementation=AUTOMATIC[-1])).all()
    assert set(AUTOMATIC) < set(IMPLEMENTATIONS)


def test_unknown_implementation():
    q, k, v, _ = inputs(0, (2, 3, 4))
    with pytest.raises(ValueError, match=r"implementation='cuda' is not None or one of 'mosaic', 'triton', 'xla'"):
        monarch_attention(q, k, v, grid=(2, 3, 4), implementation="cuda")


@pytest.mark.parametrize("implementation", ["mosaic", "triton"])
def test_a_backend_that_cannot_run_says_why(implementation):
    """Tiles of three rows in float32 are beyond every kernel, whatever the machine."""
    q, k, v, _ = inputs(0, (2, 3, 4))
    with pytest.raises(NotImplementedError, match=rf"implementation='{implementation}' cannot run this call: .{{10,}}"):
        monarch_attention(q, k, v, grid=(2, 3, 4), implementation=implementation)


def fake_gpu(monkeypatch, platform, version, capability="9.0"):
    client = types.SimpleNamespace(platform_version=version)
    device = types.SimpleNamespace(platform=platform, client=client, compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(jax, "devices", lambda *_: [device])


@pytest.mark.parametrize(
    ("platform", "version", "expected"),
    [
        ("gpu", "PJRT C API\ncuda 13000", True),
        ("gpu", "PJRT C API\nrocm 60300", False),
        ("cpu", "<unknown>", False),
        ("tpu", "libtpu", False),
    ],
)
def test_where_cuda_is(monkeypatch, platform, version, expected):
    fake_gpu(monkeypatch, platform, version)
    assert on_cuda() == expected
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # what the user asked for comes first
        assert not on_cuda()


def test_a_compute_capability_can_be_asked_for(monkeypatch):
    fake_gpu(monkeypatch, "gpu", "cuda 13000", "7.5")
    assert on_cuda()
    assert on_cuda(capability=7.5)
    assert not on_cuda(capability=8)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("7.5", ("xla",)), ("8.0", AUTOMATIC), ("9.0", ("mosaic", "triton", "xla")), ("12.0", AUTOMATIC)],
)
def test_the_order_differs_by_architecture(monkeypatch, capability, expected):
    fake_gpu(monkeypatch, "cpu", "<unknown>")
    assert backends.automatic() == AUTOMATIC
    fake_gpu(monkeypatch, "gpu", "PJRT C API\ncuda 13000", capability)
    assert backends.automatic() == expected


def test_every_order_ends_with_what_runs_anywhere():
    for order in (AUTOMATIC, *backends.AUTOMATIC_ON.values()):
        assert set(order) < set(IMPLEMENTATIONS)
        assert order[-1] == "xla"


def chosen(monkeypatch, *, cuda, installed=True, num_iters=1, b1=8):
    """What None chooses, with Triton's packages or without."""
    monkeypatch.setattr(backends, "on_cuda", lambda: cuda)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    x = jax.ShapeDtypeStruct((1, 2, b1, 8, 1, 64), jnp.bfloat16)
    return choose(None, Problem(scale=1.0, num_iters=num_iters), x, x).name


@pytest.mark.parametrize("num_iters", [1, 2])
def test_triton_is_chosen_where_it_can_run(monkeypatch, num_iters):
    assert chosen(monkeypatch, cuda=True, num_iters=num_iters) == "triton"


@pytest.mark.parametrize("change", [{"cuda": False}, {"installed": False}, {"b1": 3}])
def test_xla_is_chosen_where_triton_cannot_run(monkeypatch, change):
    assert chosen(monkeypatch, **({"cuda": True} | change)) == "xla"


@pytest.mark.parametrize(
    ("dtype", "num_iters", "columns", "expected"),
    [
        ("bfloat16", 1, 8, "mosaic"),
        ("float32", 1, 8, "triton"),
        ("bfloat16", 2, 8, "mosaic"),
        ("float16", 3, 8, "mosaic"),
        ("bfloat16", 2, 64, "triton"),
        ("bfloat16", 1, 1560, "triton"),  # f,hw
    ],
)
def test_a_hopper_gpu_takes_what_serves_the_call(monkeypatch, dtype, num_iters, columns, expected):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    fake_gpu(monkeypatch, "gpu", "PJRT C API\ncuda 13000", "9.0")
    x = jax.ShapeDtypeStruct((1, 2, 21, columns, 1, 128), dtype)
    assert choose(None, Problem(scale=1.0, num_iters=num_iters), x, x).name == expected


@pytest.mark.parametrize("scale", [0.0, -0.2, 1e-9])
def test_mosaic_takes_scales_above_zero(monkeypatch, scale):
    """Columns that are none are hidden before scores are scaled; others scale first."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    fake_gpu(monkeypatch, "gpu", "PJRT C API\ncuda 13000", "9.0")
    x = jax.ShapeDtypeStruct((1, 1, 30, 52, 1, 128), jnp.bfloat16)
    assert choose(None, Problem(scale=scale), x, x).name == "triton"
    with pytest.raises(NotImplementedError, match=rf"scale={scale:g}; the kernels take 1e-08 or more; use 'triton'"):
        choose("mosaic", Problem(scale=scale), x, x)


@pytest.mark.parametrize("num_iters", [1, 2])
def test_gradients_at_scale_zero_are_xlas(monkeypatch, num_iters):
    """Triton's divide by it; there are none of the queries and the keys."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    x = jax.random.normal(jax.random.key(0), (1, 2, 4, 5, 1, 16))
    problem, visible = Problem(scale=0.0, num_iters=num_iters), jnp.array([2, 2], jnp.int32)
    kernels = importlib.import_module("monarchrt.triton_kernels")
    shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
    assert kernels.supports(problem, shape, shape) is None
    assert "scale=0; gradients of L's scores are divided" in kernels.supports_vjp(problem, shape, shape)
    residuals = Residuals(x, x, x, visible, *xla.forward(problem, x, x, x, visible))
    dq, dk, dv = backends.first_vjp(kernels)(problem, residuals, jnp.ones_like(x))
    assert not dq.any()
    assert not dk.any()
    np.testing.assert_allclose(dv, 1.0, rtol=1e-5)  # all keys have the same weight


def test_several_steps_are_mosaics_by_name(monkeypatch):
    """What lies between two of them is Triton's, whose packages it takes."""
    x = jax.ShapeDtypeStruct((1, 2, 8, 8, 1, 64), jnp.bfloat16)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert choose("mosaic", Problem(scale=1.0, num_iters=2), x, x).name == "mosaic"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=r"triton and jax-triton are not installed"):
        choose("mosaic", Problem(scale=1.0, num_iters=2), x, x)
    assert choose("mosaic", Problem(scale=1.0), x, x).name == "mosaic"


def test_says_why_nothing_can_run(monkeypatch):
    monkeypatch.setattr(backends, "AUTOMATIC", ("triton",))
    x = jax.ShapeDtypeStruct((1, 2, 8, 8, 1, 64), jnp.bfloat16)
    monkeypatch.setattr(backends, "on_cuda", lambda: False)
    with pytest.raises(NotImplementedError, match="implementation='triton' cannot run this call: it needs an NVIDIA"):
        choose(None, Problem(scale=1.0), x, x)


@pytest.mark.parametrize(("capability", "served"), [("9.0", True), ("8.0", False), ("10.0", False), (None, True)])
def test_mosaic_asks_for_hopper(monkeypatch, capability, served):
    """By name, too; on a machine without a GPU it lowers for one."""
    from monarchrt import pallas_kernels

    if capability:
        fake_gpu(monkeypatch, "gpu", "PJRT C API\ncuda 13000", capability)
    tiles = jax.ShapeDtypeStruct((1, 2, 8, 8, 1, 64), jnp.bfloat16)
    reason = pallas_kernels.supports(Problem(scale=1.0), tiles, tiles)
    expected = f"the GPU has compute capability {capability}; the kernels are for Hopper's 9.0 alone."
    assert reason == (None if served else expected)


@pytest.mark.parametrize(("names", "runs"), [((), 2), ((SAVED,), 1)])
def test_a_checkpoint_can_keep_the_attention(names, runs):
    """Under its name: the forward pass then runs once, not once more in the backward pass."""
    q, k, v, _ = inputs(0, (2, 3, 4))
    attend = functools.partial(monarch_attention, grid=(2, 3, 4), implementation="xla")
    kept = jax.checkpoint(attend, policy=jax.checkpoint_policies.save_only_these_names(*names), prevent_cse=False)
    run = jax.jit(jax.grad(lambda *x: jnp.sin(kept(*x)).sum()))
    assert run.lower(q, k, v).as_text().count("call @_forward") == runs
    np.testing.assert_allclose(run(q, k, v), jax.grad(lambda *x: jnp.sin(attend(*x)).sum())(q, k, v), atol=1e-5)
