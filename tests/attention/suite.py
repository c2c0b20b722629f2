"""The tests that every backend inherits: subclass `AttentionSuite` and name the implementation.

A backend differs in what it supports and how exact it is, never in what is asked of it.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import MonarchKVCache, monarch_attention
from tests.untyped import programs

LAYOUTS = ("fh,w", "w,fh", "f,hw", "hw,f", "fw,h", "h,fw")
# grid, tile: odd sizes, several tiles in every direction, the paper's two settings in small
SHAPES = (
    ((3, 5, 7), None),
    ((6, 4, 6), (3, 4, 6)),
    ((4, 6, 9), (2, 3, 3)),
    ((2, 10, 13), (1, 5, 13)),
)


def inputs(seed, grid, *, key_frames=None, batch=2, heads=3, dim=16, dtype=jnp.float32, sharpness=1.0):
    """query, key, value and an output cotangent, standard normal, query times `sharpness`."""
    frames, height, width = grid
    tokens = height * width
    shape = (batch, frames * tokens, heads, dim)
    key_shape = (batch, (key_frames or frames) * tokens, heads, dim)
    rng = np.random.default_rng(seed)  # of NumPy, which compiles nothing
    q, k, v, g = (rng.standard_normal(s, np.float32) for s in (shape, key_shape, key_shape, shape))
    return tuple(jnp.asarray(x, dtype) for x in (np.float32(sharpness) * q, k, v, g))


def poisoned(x, valid):
    """`x` with NaN behind the first `valid` tokens."""
    x = np.array(x)
    x[:, valid:] = np.nan
    return jnp.asarray(x)


def error(x, expected):
    """Relative Frobenius error; NaN if either has one."""
    x, expected = np.asarray(x, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(x - expected) / np.linalg.norm(expected)


def with_grads(**options):
    """A compiled function of q, k, v and g: the output and the gradients of <output, g>."""

    @jax.jit
    def run(q, k, v, g):
        out, vjp = jax.vjp(lambda *x: monarch_attention(*x, **options), q, k, v)
        return out, *vjp(g)

    return run


def value_and_grads(q, k, v, g, **options):
    """Output and the gradients of <output, g>, as one compiled program."""
    return with_grads(**options)(q, k, v, g)


def layers_in_one_cache(implementation, *, grid, heads, dim, dtype, layers=3, blocks=3):
    """A loop over layers that carries the cache of all of them, against each layer's own cache: the same bits.

    The kernels' operands are slices of what the loop writes to in place.
    """
    frames, height, width = grid
    arrays = [inputs(20 + n, grid, batch=2, heads=heads, dim=dim, dtype=dtype)[:3] for n in range(layers * blocks)]
    sizes: dict[str, Any] = dict(
        batch=2, frames=frames * blocks, height=height, width=width, heads=heads, head_dim=dim, dtype=dtype
    )

    @jax.jit
    def together(cache, q, k, v, frame):
        def body(carry, x):
            cache, index = carry
            cache = cache.append(*x[1:], frame=frame, layer=index)
            return (cache, index + 1), cache.attend(x[0], layer=index, implementation=implementation)

        (cache, _), out = jax.lax.scan(body, (cache, jnp.int32(0)), (q, k, v))
        return out, cache

    @jax.jit
    def alone(cache, q, k, v, frame):
        cache = cache.append(k, v, frame=frame)
        return cache.attend(q, implementation=implementation), cache

    whole = MonarchKVCache.init(layers=layers, **sizes)
    own = [MonarchKVCache.init(**sizes) for _ in range(layers)]
    for block in range(blocks):
        now = arrays[block * layers : (block + 1) * layers]
        frame = jnp.int32(block * frames)
        out, whole = together(whole, *(jnp.stack(x) for x in zip(*now, strict=True)), frame)
        for n, (q, k, v) in enumerate(now):
            expected, own[n] = alone(own[n], q, k, v, frame)
            assert np.abs(np.asarray(expected, np.float32)).max() > 0.01
            np.testing.assert_array_equal(np.asarray(out[n]), np.asarray(expected))


class AttentionSuite:
    """Subclasses set `implementation`, and where needed the limits below."""

    implementation: str
    dims: ClassVar = (16, 12)
    dtypes: ClassVar = ("float32", "bfloat16", "float16")
    bounds: ClassVar = {"float64": 1e-12, "float32": 2e-6, "bfloat16": 1e-2, "float16": 2e-3}
    num_iters: ClassVar = (1, 2, 3, 4)
    shapes: ClassVar = SHAPES
    instead: ClassVar[dict] = {}  # (grid, tile): what a backend that does not serve small tiles takes in its place

    def compare(self, *arrays, bound=None, **options):
        """Output and gradients against the reference computed from the same inputs in the widest dtype there is."""
        bound = bound or self.bounds[arrays[0].dtype.name]
        wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
        found = value_and_grads(*arrays, implementation=self.implementation, **options)
        expected = value_and_grads(*(x.astype(wide) for x in arrays), implementation="reference", **options)
        for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            assert x.dtype == arrays[0].dtype
            assert error(x, y) <= bound, f"{name}: relative error {error(x, y):.2e} > {bound:.0e}"

    @pytest.mark.parametrize(("grid", "tile"), SHAPES)
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_shapes_and_dtypes(self, grid, tile, dtype):
        if dtype not in self.dtypes or (grid, tile) not in self.shapes:
            pytest.skip(f"{self.implementation} does not take {dtype}, {grid}, {tile}")
        grid, tile = self.instead.get((grid, tile), (grid, tile))
        self.compare(*inputs(0, grid, dim=self.dims[0], dtype=dtype), grid=grid, tile=tile)

    @pytest.mark.parametrize(
        "blocks", [pytest.param(x, marks=[pytest.mark.slow] * (x not in ("fh,w", "h,fw"))) for x in LAYOUTS]
    )
    def test_layouts(self, blocks):
        grid, tile = (4, 4, 8), (4, 4, 4)
        self.compare(*inputs(1, grid, dim=self.dims[0]), grid=grid, tile=tile, blocks=blocks)

    @pytest.mark.parametrize("dim", [0, 1])
    def test_head_dims(self, dim):
        self.compare(*inputs(2, (2, 5, 6), dim=self.dims[dim]), grid=(2, 5, 6))

    @pytest.mark.parametrize("sharpness", [pytest.param(0.1, marks=pytest.mark.slow), 1.0, 10.0])
    def test_sharp_and_flat_softmaxes(self, sharpness):
        arrays = inputs(3, (3, 5, 6), dim=self.dims[0], sharpness=sharpness)
        self.compare(*arrays, grid=(3, 5, 6), bound=20 * self.bounds["float32"])

    def test_a_dominant_key_row(self):
        q, k, v, g = inputs(4, (3, 5, 6), dim=self.dims[0])
        k = np.array(k)
        k[:, 30:36] *= 8.0
        self.compare(q, jnp.asarray(k), v, g, grid=(3, 5, 6), bound=20 * self.bounds["float32"])

    @pytest.mark.parametrize("tile", [None, pytest.param((3, 4, 6), marks=pytest.mark.slow), (1, 2, 6)])
    def test_block_causal(self, tile):
        grid, tile = self.instead.get(((6, 4, 6), tile), ((6, 4, 6), tile))
        self.compare(*inputs(5, grid, dim=self.dims[0]), grid=grid, tile=tile, causal_block=3)

    def test_keeping_intermediates(self):
        """A hint: whether a backend takes it or not, the numbers are right."""
        self.compare(*inputs(8, (4, 4, 8), dim=self.dims[0]), grid=(4, 4, 8), keep_intermediates=True)

    @pytest.mark.parametrize("num_iters", [*(pytest.param(x, marks=pytest.mark.slow) for x in (2, 3)), 4])
    def test_more_steps(self, num_iters):
        if num_iters not in self.num_iters:
            pytest.skip(f"{self.implementation} serves one refinement step")
        arrays = inputs(6, (4, 3, 5), dim=self.dims[0])
        self.compare(*arrays, grid=(4, 3, 5), tile=(2, 3, 5), num_iters=num_iters, bound=1e-5)

    @pytest.mark.parametrize("num_iters", [2, pytest.param(3, marks=pytest.mark.slow)])
    def test_more_steps_with_masks(self, num_iters):
        """Two causal blocks of queries at the end of 9 valid frames in a buffer of 12, whose rest is NaN."""
        grid, valid = (6, 5, 7), 9 * 35
        q, k, v, g = inputs(21, grid, key_frames=12, dim=self.dims[0])
        options = dict(grid=grid, tile=(3, 5, 7), causal_block=3, num_iters=num_iters)
        run = jax.jit(lambda n, *x: value_and_grads(*x, kv_frames=n, implementation=self.implementation, **options))
        out, dq, dk, dv = map(np.asarray, run(jnp.int32(9), q, poisoned(k, valid), poisoned(v, valid), g))
        k, v = np.asarray(k), np.asarray(v)
        expected = value_and_grads(q, k[:, :valid], v[:, :valid], g, implementation="reference", **options)
        for name, x, y in zip(
            ("out", "dq", "dk", "dv"), (out, dq, dk[:, :valid], dv[:, :valid]), expected, strict=True
        ):
            assert error(x, y) <= 1e-5, f"{name}: relative error {error(x, y):.2e}"
        assert not dk[:, valid:].any()
        assert not dv[:, valid:].any()

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_more_steps_in_low_precision(self, dtype):
        if dtype not in self.dtypes:
            pytest.skip(f"{self.implementation} does not take {dtype}")
        arrays = inputs(22, (4, 4, 8), dim=self.dims[0], dtype=jnp.dtype(dtype))
        self.compare(*arrays, grid=(4, 4, 8), tile=(2, 4, 8), num_iters=2)

    @pytest.mark.parametrize("tile", [None, pytest.param((3, 4, 6), marks=pytest.mark.slow)])
    def test_fewer_queries_than_keys(self, tile):
        self.compare(*inputs(7, (3, 4, 6), key_frames=9, dim=self.dims[0]), grid=(3, 4, 6), tile=tile)

    @pytest.mark.parametrize("tile", [pytest.param(None, marks=pytest.mark.slow), (3, 4, 6)])
    def test_traced_kv_frames(self, tile):
        """One compiled program for every fill; what lies behind the valid frames may be NaN."""
        grid, total = (3, 4, 6), 9
        q, k, v, g = inputs(8, grid, key_frames=total, dim=self.dims[0])
        options = dict(grid=grid, tile=tile, implementation=self.implementation)
        run = jax.jit(lambda frames, *x: value_and_grads(*x, kv_frames=frames, **options))
        keys, values = np.asarray(k), np.asarray(v)
        for frames in (3, 6, 9):
            valid = frames * 24
            found = run(jnp.int32(frames), q, poisoned(k, valid), poisoned(v, valid), g)
            out, dq, dk, dv = map(np.asarray, found)
            expected = value_and_grads(
                q, keys[:, :valid], values[:, :valid], g, grid=grid, tile=tile, implementation="reference"
            )
            for x, y in zip((out, dq, dk[:, :valid], dv[:, :valid]), expected, strict=True):
                assert error(x, y) <= self.bounds["float32"]
            assert not dk[:, valid:].any()
            assert not dv[:, valid:].any()
        assert programs(run) == 1

    def test_static_kv_frames(self):
        grid = (3, 4, 6)
        self.compare(*inputs(9, grid, key_frames=9, dim=self.dims[0]), grid=grid, kv_frames=6)

    def test_causal_queries_at_the_end_of_a_buffer(self):
        """Two causal blocks of queries at the end of 9 valid frames in a buffer of 12."""
        grid, _ = self.instead.get(((6, 3, 5), None), ((6, 3, 5), None))
        arrays = inputs(10, grid, key_frames=12, dim=self.dims[0])
        self.compare(*arrays, grid=grid, causal_block=3, kv_frames=jnp.int32(9))

    def test_cache_equals_causal(self):
        grid = (9, 4, 6)
        q, k, v, _ = map(np.asarray, inputs(11, grid, dim=self.dims[0]))
        expected = np.asarray(
            jax.jit(lambda *x: monarch_attention(*x, grid=grid, causal_block=3, implementation="reference"))(q, k, v)
        )
        cache = MonarchKVCache.init(
            batch=2, frames=9, height=4, width=6, heads=3, head_dim=self.dims[0], dtype=jnp.float32
        )
        step = jax.jit(
            lambda cache, q, k, v: ((c := cache.append(k, v)).attend(q, implementation=self.implementation), c)
        )
        for block in range(3):
            tokens = slice(block * 72, (block + 1) * 72)
            out, cache = step(cache, q[:, tokens], k[:, tokens], v[:, tokens])
            assert error(out, expected[:, tokens]) <= self.bounds["float32"]

    def test_gradients_of_the_newest_block(self):
        """With detach_past the new block's gradients equal the full ones, and the past gets none."""
        grid = (3, 4, 6)
        q, k, v, g = inputs(12, grid, key_frames=6, dim=self.dims[0])
        past = MonarchKVCache.init(
            batch=2, frames=9, height=4, width=6, heads=3, head_dim=self.dims[0], dtype=jnp.float32, detach_past=True
        )

        def run(q, k, v):
            cache = past.append(k[:, :72], v[:, :72]).append(k[:, 72:], v[:, 72:])
            return cache.attend(q, implementation=self.implementation)

        @jax.jit
        def with_gradients(q, k, v, g):
            out, vjp = jax.vjp(run, q, k, v)
            return out, *vjp(g)

        found = with_gradients(q, k, v, g)
        expected = value_and_grads(q, k, v, g, grid=grid, implementation="reference")
        for x, y in zip(found[:2], expected[:2], strict=True):
            assert error(x, y) <= self.bounds["float32"]
        for x, y in zip(map(np.asarray, found[2:]), map(np.asarray, expected[2:]), strict=True):
            assert error(x[:, 72:], y[:, 72:]) <= self.bounds["float32"]
            assert not x[:, :72].any()

    def test_vmap(self):
        grid = (3, 4, 6)
        q, k, v, g = inputs(13, grid, batch=4, dim=self.dims[0])
        options = dict(grid=grid, implementation=self.implementation)
        split = [np.asarray(x).reshape(2, 2, *x.shape[1:]) for x in (q, k, v, g)]
        mapped = jax.jit(jax.vmap(lambda *x: value_and_grads(*x, **options)))(*split)
        for x, y in zip(mapped, value_and_grads(q, k, v, g, **options), strict=True):
            assert error(np.asarray(x).reshape(y.shape), y) <= self.bounds["float32"]

    def test_vmap_over_the_fill(self):
        grid = (1, 4, 6)
        q, k, v, _ = map(np.asarray, inputs(14, grid, key_frames=4, batch=3, dim=self.dims[0]))
        frames = np.array([1, 3, 4], np.int32)

        def run(q, k, v, n):
            return monarch_attention(
                q[None], k[None], v[None], grid=grid, implementation=self.implementation, kv_frames=n
            )[0]

        mapped = np.asarray(jax.jit(jax.vmap(run))(q, k, v, frames))

        @jax.jit
        def one_by_one(q, k, v):
            parts = [x[b : b + 1] for b, _ in enumerate(frames) for x in (q, k, v)]
            triples = zip(parts[::3], parts[1::3], parts[2::3], frames.tolist(), strict=True)
            return [monarch_attention(*x, grid=grid, kv_frames=n, implementation="reference") for *x, n in triples]

        for b, (n, expected) in enumerate(zip(frames.tolist(), one_by_one(q, k, v), strict=True)):
            found = error(mapped[b], np.asarray(expected)[0])
            assert found <= self.bounds["float32"], f"{n} frames: relative error {found:.2e}"

    def test_scan_over_layers(self):
        """Operands that are slices of stacked arrays, results that are stored into slices, forward and backward."""
        grid = (3, 4, 6)
        stacked = [np.stack([inputs(seed, grid, dim=self.dims[0])[n] for seed in (17, 18)]) for n in range(4)]

        def attend(implementation):
            options = dict(grid=grid, implementation=implementation)
            return lambda *x: jax.lax.scan(lambda _, x: (None, monarch_attention(*x, **options)), None, x)[1]

        def run(implementation):
            out, vjp = jax.vjp(attend(implementation), *stacked[:3])
            return out, *vjp(stacked[3])

        found, expected = jax.jit(lambda: run(self.implementation))(), jax.jit(lambda: run("reference"))()
        for name, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            assert error(x, y) <= self.bounds["float32"], f"{name}: relative error {error(x, y):.2e}"

    def test_layers_in_one_cache(self):
        layers_in_one_cache(self.implementation, grid=(3, 4, 6), heads=3, dim=self.dims[0], dtype=jnp.float32)

    def test_checkpoint_and_jit(self):
        grid = (3, 4, 6)
        arrays = inputs(15, grid, dim=self.dims[0])
        run = jax.checkpoint(lambda *x: monarch_attention(*x, grid=grid, implementation=self.implementation))

        @jax.jit
        def with_gradients(q, k, v, g):
            out, vjp = jax.vjp(jax.jit(run), q, k, v)
            return out, *vjp(g)

        expected = value_and_grads(*arrays, grid=grid, implementation="reference")
        for x, y in zip(with_gradients(*arrays), expected, strict=True):
            assert error(x, y) <= self.bounds["float32"]

    def test_deterministic(self):
        grid = (3, 5, 6)
        arrays = inputs(16, grid, dim=self.dims[0])
        run = jax.jit(lambda *x: value_and_grads(*x, grid=grid, implementation=self.implementation))
        for x, y in zip(run(*arrays), run(*arrays), strict=True):
            np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
