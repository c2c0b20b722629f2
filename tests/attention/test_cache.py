"""The KV cache: rewriting, rolling, sinks, overflow, gradients."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import MonarchKVCache, backends, monarch_attention, xla
from tests.attention.suite import error, inputs
from tests.untyped import programs, untyped

GRID, FRAME = (3, 2, 4), 8  # a block of 3 frames of 2x4 tokens


def empty(**options):
    sizes: dict[str, Any] = dict(batch=2, frames=9, height=2, width=4, heads=3, head_dim=8, dtype=jnp.float32)
    return MonarchKVCache.init(**(sizes | options))


def blocks(count, seed=0):
    q, k, v, _ = inputs(seed, (3 * count, 2, 4), dim=8)
    return [tuple(x[:, n * 24 : (n + 1) * 24] for x in (q, k, v)) for n in range(count)]


@pytest.mark.parametrize("tile", [None, (3, 2, 4), (1, 1, 2)])
def test_rewriting_the_newest_block(tile):
    """Every denoising step writes its block again; only the last write counts."""
    first, second = blocks(2)
    noise = blocks(1, seed=9)[0]
    cache = empty(tile=tile).append(*first[1:])
    step = jax.jit(lambda cache, k, v, frame: cache.append(k, v, frame=frame))
    rewritten = step(step(cache, *noise[1:], jnp.int32(3)), *second[1:], jnp.int32(3))
    expected = cache.append(*second[1:])
    for x, y in zip(jax.tree.leaves(rewritten), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert int(rewritten.valid_frames) == 6


def test_keys_come_back_in_token_order():
    _, k, v = blocks(1)[0]
    keys, values = empty(tile=(3, 1, 2), blocks="w,fh").append(k, v).tokens()
    np.testing.assert_array_equal(np.asarray(keys[:, :24]), np.asarray(k))
    np.testing.assert_array_equal(np.asarray(values[:, :24]), np.asarray(v))


@pytest.mark.parametrize(
    ("frames", "sinks"),
    [(9, 0), (12, 3), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((9, 3), (10, 1), (8, 1)))],
)
def test_rolling_window(frames, sinks):
    """Each block sees the sinks and the newest frames, itself included, as if only those were given."""
    clip = blocks(7)
    cache = empty(frames=frames, rolling=True, sink_frames=sinks)
    step = jax.jit(lambda cache, q, k, v: ((c := cache.append(k, v)).attend(q), c))
    keys, values = (jnp.concatenate([b[i] for b in clip], 1) for i in (1, 2))
    for n, (q, k, v) in enumerate(clip):
        for _ in range(2):  # written twice, as denoising does
            out, after = step(cache, q, k, v)
        cache = after
        end = 3 * (n + 1)
        kept = range(end) if end <= frames else [*range(sinks), *range(end - (frames - sinks), end)]
        tokens = np.concatenate([np.arange(f * FRAME, (f + 1) * FRAME) for f in kept])
        expected = monarch_attention(q, keys[:, tokens], values[:, tokens], grid=GRID, implementation="reference")
        assert error(out, expected) <= 2e-6
        # writing the same block again at its own frame changes nothing
        again = cache.append(k, v, frame=3 * n)
        np.testing.assert_array_equal(np.asarray(again.key), np.asarray(cache.key))
    assert programs(step) == 1


@pytest.mark.parametrize("options", [{}, dict(rolling=True, sink_frames=3), dict(tile=(3, 1, 4), detach_past=True)])
def test_layers_in_one_cache(options):
    """A loop that carries the cache of all layers does what each layer's own cache does."""
    clip = [blocks(4, seed) for seed in range(3)]
    layered = empty(layers=3, **options)
    own = [empty(**options) for _ in clip]

    @jax.jit
    def step(cache, q, k, v, frame):
        def body(carry, layer):
            cache, index = carry
            cache = cache.append(layer[1], layer[2], frame=frame, layer=index)
            return (cache, index + 1), cache.attend(layer[0], layer=index)

        (cache, _), out = jax.lax.scan(body, (cache, jnp.int32(0)), (q, k, v))
        return out, cache

    for n in range(4 if "rolling" in options else 3):
        block = [jnp.stack([layer[n][i] for layer in clip]) for i in range(3)]
        out, layered = step(layered, *block, jnp.int32(3 * n))
        for i, layer in enumerate(clip):
            q, k, v = layer[n]
            own[i] = own[i].append(k, v)
            assert error(out[i], own[i].attend(q)) <= 2e-6
            for x, y in zip(layered.tokens(layer=i), own[i].tokens(), strict=True):
                np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
        assert int(layered.length) == 3 * n + 3


def test_several_causal_blocks_at_once():
    """Prefilling two blocks in one call equals one block at a time."""
    (q0, k0, v0), (q1, k1, v1) = blocks(2)
    q, k, v = (jnp.concatenate(x, 1) for x in ((q0, q1), (k0, k1), (v0, v1)))
    out = empty().append(k, v).attend(q, causal_block=3)
    one = empty().append(k0, v0)
    assert error(out[:, :24], one.attend(q0)) <= 2e-6
    assert error(out[:, 24:], one.append(k1, v1).attend(q1)) <= 2e-6


def test_gradients_through_the_past():
    """Without detach_past the past gets its gradients; with it, none."""
    (_, k0, v0), (q1, k1, v1) = blocks(2)

    def loss(k0, k1, detach):
        cache = empty(detach_past=detach).append(k0, v0).append(k1, v1)
        return (cache.attend(q1) ** 2).sum()

    full, detached = (jax.grad(loss, (0, 1))(k0, k1, detach) for detach in (False, True))
    assert np.abs(full[0]).max() > 0
    assert not np.asarray(detached[0]).any()
    assert error(detached[1], full[1]) <= 2e-6


@pytest.mark.parametrize("frames", [1, 2, 3])
@pytest.mark.parametrize("passed_on", [False, True])
def test_gradients_where_a_backend_leaves_out_the_past(monkeypatch, frames, passed_on):
    """Queries of less than the newest block: all of the block has gradients in a backend that uses `grad_tiles`."""
    asked = []

    def vjp(problem, residuals, d_out):
        dq, *grads = xla.vjp(problem, residuals, d_out)
        asked.append(problem.grad_tiles)
        if problem.grad_tiles is not None:
            last = jnp.arange(grads[0].shape[1]) >= residuals.visible.max() - problem.grad_tiles
            grads = [jnp.where(last[:, None, None, None, None], x, 0) for x in grads]
        return dq, grads[0], grads[1]

    backend = backends.Backend("triton", lambda problem, q, k: None, backends.differentiable(xla.forward, vjp))
    monkeypatch.setitem(backends._REGISTRY, "triton", lambda: backend)
    (_, k0, v0), (q1, k1, v1) = blocks(2)

    def loss(k0, k1, implementation):
        cache = empty(detach_past=True, tile=(1, 1, 4)).append(k0, v0).append(k1, v1)
        if passed_on:
            cache = jax.tree.map(lambda x: x, cache)
        return (cache.attend(q1[:, -frames * FRAME :], implementation=implementation) ** 2).sum()

    found, expected = (jax.grad(loss, (0, 1))(k0, k1, x) for x in ("triton", "xla"))
    assert asked == [None if passed_on else 6]  # a cache that is handed on does not know its newest block
    assert not np.asarray(found[0]).any()
    assert error(found[1], expected[1]) <= 2e-6


@pytest.mark.parametrize(
    ("count", "sinks"), [(4, 0), (7, 3), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, 0), (3, 0), (5, 3)))]
)
def test_gradients_of_a_rolling_cache(monkeypatch, count, sinks):
    """The newest block is where the oldest was; a backend that gives the last tiles alone their gradients gives its."""
    asked = []

    def vjp(problem, residuals, d_out):
        dq, *grads = xla.vjp(problem, residuals, d_out)
        asked.append(problem.grad_tiles)
        last = jnp.arange(grads[0].shape[1]) >= residuals.visible.max() - problem.grad_tiles
        dk, dv = (jnp.where(last[:, None, None, None, None], x, 0) for x in grads)
        return dq, dk, dv

    backend = backends.Backend("triton", lambda problem, q, k: None, backends.differentiable(xla.forward, vjp))
    monkeypatch.setitem(backends._REGISTRY, "triton", lambda: backend)
    *past, (q, k, v) = blocks(count)
    weights = jax.random.normal(jax.random.key(5), q.shape)

    @functools.partial(jax.jit, static_argnums=3)
    def gradients(q, k, v, detach):
        def loss(q, k, v):
            cache = empty(frames=9, rolling=True, sink_frames=sinks, detach_past=detach, tile=(3, 1, 4))
            for _, key, value in past:
                cache = cache.append(key, value)
            out = cache.append(k, v).attend(q, implementation="triton" if detach else "xla")
            return (weights * out).sum(), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    found, expected = (gradients(q, k, v, detach) for detach in (True, False))
    assert asked == [2]  # tiles of one block
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error(ours, theirs) <= 2e-6


def test_gradients_of_the_newest_block_in_every_layer():
    """Appending one layer's block does not detach another's; the past of each is detached."""
    clip = [blocks(2, seed) for seed in range(2)]
    keys, values = (jnp.stack([jnp.stack([b[i] for b in layer]) for layer in clip]) for i in (1, 2))

    @functools.partial(jax.jit, static_argnums=2)
    @functools.partial(jax.grad, argnums=(0, 1))
    def stacked(keys, values, together):
        cache = empty(layers=2, detach_past=True)
        for n in range(2):
            out = []
            for i in range(2):
                cache = cache.append(keys[i, n], values[i, n], frame=3 * n, layer=jnp.int32(i))
                out.append(cache.attend(clip[i][n][0], layer=i))
            if together:
                out = [cache.attend(clip[i][n][0], layer=i) for i in range(2)]
        return sum((x**2).sum() for x in out)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def alone(keys, values):
        own = [empty(detach_past=True).append(keys[i, 0], values[i, 0]) for i in range(2)]
        own = [own[i].append(keys[i, 1], values[i, 1]) for i in range(2)]
        return sum((own[i].attend(clip[i][1][0]) ** 2).sum() for i in range(2))

    for found in (stacked(keys, values, together) for together in (False, True)):
        for x, y in zip(found, alone(keys, values), strict=True):
            assert not np.asarray(x[:, 0]).any()
            assert error(x[:, 1], y[:, 1]) <= 2e-6


def test_overflow_raises_or_poisons():
    _, k, v = blocks(1)[0]
    with pytest.raises(
        ValueError, match=r"frame=7: 3 frames from there end past the cache's 9; make it larger or pass rol"
    ):
        empty().append(k, v, frame=7)
    out = jax.jit(lambda frame: empty().append(k, v, frame=frame).attend(k))(jnp.int32(7))
    assert np.isnan(out).all()


@pytest.mark.parametrize(
    ("options", "written", "frames", "frame"),
    [
        ({}, 3, 3, -3),
        ({}, 6, 3, -1),
        ({}, 6, 3, -2),
        ({}, 0, 3, 3),
        ({}, 3, 3, 6),  # nothing was ever written to 3, 4 and 5
        (dict(tile=(3, 2, 4)), 3, 3, 1),
        (dict(rolling=True, sink_frames=3), 9, 9, 9),  # would overwrite itself
        (dict(rolling=True), 12, 3, 3),  # the frames 0, 1 and 2 that come before are gone
        (dict(rolling=True, sink_frames=1), 12, 3, 2),
    ],
)
@pytest.mark.parametrize("layers", [None, 2])
def test_a_misplaced_block_poisons(options, written, frames, frame, layers):
    """What can only be seen when running gives NaN, however often it is written; a block in its place does not."""
    q, k, v = (x[:, : frames * FRAME] for x in inputs(0, (12, 2, 4), dim=8)[:3])
    cache = empty(layers=layers, **options)
    which = [{}] if layers is None else [dict(layer=n) for n in range(layers)]

    @jax.jit
    def write(cache, k, v, frame):
        for layer in which:
            cache = cache.append(k, v, frame=frame, **layer)
        return cache, [cache.attend(q[:, :24], **layer) for layer in which]

    for n in range(0, written, 3):
        cache, out = write(cache, k[:, :24], v[:, :24], jnp.int32(n))
        assert np.isfinite(out).all()
    for _ in range(3):
        cache, out = write(cache, k, v, jnp.int32(frame))
        assert np.isnan(out).all()
    _, out = write(cache, k[:, :24], v[:, :24], cache.length)  # as without a frame
    assert np.isnan(out).all()
    cache, out = write(cache, k[:, :24], v[:, :24], jnp.int32(0))  # a new clip in the old buffers
    assert np.isfinite(out).all()
    assert int(cache.length) == 3
    cache, out = write(cache, k[:, :24], v[:, :24], jnp.int32(3))
    assert np.isfinite(out).all()


def test_a_layer_that_there_is_not(unchecked):
    """Raises if it is known; a traced one poisons what was written and what is written after it."""
    q, k, v = blocks(1)[0]
    cache = empty(layers=2)
    for layer in map(untyped, (2, -1, jnp.int32(2), jnp.int32(-1), np.int32(2))):
        for call in (
            lambda: cache.append(k, v, frame=0, layer=layer),  # noqa: B023
            lambda: cache.attend(q, layer=layer),  # noqa: B023
            lambda: cache.tokens(layer=layer),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"layer=-?\d is not from 0 to 1, the cache's layers"):
                call()

    @jax.jit
    def write(cache, frame, layer):
        cache = cache.append(k, v, frame=frame, layer=layer)
        return cache, cache.attend(q, layer=layer)

    for layer in (-3, -2, -1, 2, 5):
        wrong, out = write(cache, jnp.int32(0), jnp.int32(layer))
        assert np.isnan(out).all()
        assert np.isnan(write(wrong, jnp.int32(3), jnp.int32(0))[1]).all()
    for layer in (0, 1):
        assert np.isfinite(write(cache, jnp.int32(0), jnp.int32(layer))[1]).all()


def test_an_empty_cache_gives_nan():
    q, _, _ = blocks(1)[0]
    assert np.isnan(jax.jit(lambda cache: cache.attend(q))(empty())).all()


@pytest.mark.parametrize(
    ("options", "written", "frames", "frame", "message"),
    [
        ({}, 9, 3, None, r"frame=9: 3 frames from there end past the cache's 9; make it larger or pass rolling=True"),
        ({}, 3, 3, 6, r"frame=6 leaves a gap: the cache ends at frame 3"),
        ({}, 3, 3, jnp.int32(6), r"frame=6 leaves a gap: the cache ends at frame 3"),
        ({}, 3, 3, jnp.int32(-3), r"frame=-3 is not a multiple of the tile's 1 frames of at least 0"),
        (
            {"rolling": True},
            12,
            3,
            3,
            r"frame=3: the frames before it were evicted; 3 frames can begin from frame 9 to 12, or",
        ),
    ],
)
def test_a_misplaced_block_raises_outside_of_jit(options, written, frames, frame, message):
    k, v = (x[:, : frames * FRAME] for x in inputs(0, (12, 2, 4), dim=8)[1:3])
    cache = empty(**options)
    for _ in range(0, written, 3):
        cache = cache.append(k[:, :24], v[:, :24])
    with pytest.raises(ValueError, match=message):
        cache.append(k, v, frame=frame)


def test_what_is_known_of_a_misplaced_block_raises_in_jit():
    k, v = (x[:, : 4 * FRAME] for x in inputs(0, (4, 2, 4), dim=8)[1:3])
    cache = empty(frames=6, rolling=True, sink_frames=3)
    with pytest.raises(ValueError, match=r"frame=3: 4 frames from there overwrite each other .* at most 3 at a time"):
        jax.jit(lambda cache: cache.append(k, v, frame=3))(cache)
    assert int(cache.append(k, v, frame=0).length) == 4


def test_after_a_misplaced_block_the_next_says_so():
    _, k, v = blocks(1)[0]
    cache = jax.jit(lambda cache, frame: cache.append(k, v, frame=frame))(empty(), jnp.int32(3))
    with pytest.raises(ValueError, match="frame=None: an earlier block had no place in the cache; begin again at fr"):
        cache.append(k, v)
    with pytest.raises(ValueError, match="frame=3 leaves a gap: the cache ends at frame 0"):
        cache.append(k, v, frame=3)
    assert int(cache.append(k, v, frame=0).length) == 3


def test_works_in_scan_and_vmap():
    clip = blocks(3)
    stacked = [jnp.stack([b[i] for b in clip]) for i in range(3)]

    def body(cache, block):
        q, k, v = block
        cache = cache.append(k, v)
        return cache, cache.attend(q)

    _, out = jax.lax.scan(body, empty(), stacked)
    whole = [jnp.concatenate([b[i] for b in clip], 1) for i in range(3)]
    expected = monarch_attention(*whole, grid=(9, 2, 4), causal_block=3)
    assert error(jnp.concatenate(list(out), 1), expected) <= 2e-6
    one = empty(batch=1)
    mapped = jax.vmap(lambda k, v: one.append(k[None], v[None]))(*clip[0][1:])
    assert mapped.key.shape == (2, *one.key.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(sink_frames=3), r"sink_frames=3 needs rolling=True"),
        (dict(sink_frames=9, rolling=True), r"sink_frames=9 is not a multiple of the tile's 1 frames, below frames=9"),
        (
            dict(tile=(2, 2, 4)),
            r"tile=\(2, 2, 4\): 2 does not divide the 9 frames of the keys .* nearest that do are 1 or 3",
        ),
        (dict(dtype=jnp.int32), r"dtype=int32 is not one of bfloat16, float16"),
        (dict(frames=0), r"^frames=0 is not a positive integer"),
        (dict(layers=0), r"layers=0 is not a positive integer"),
        (dict(batch=-1), r"batch=-1 is not a positive integer"),
        (dict(heads=2.0), r"heads=2.0 is not a positive integer"),
        (dict(tile=8), r"tile=8 is not three integers"),
        (dict(tile=(0, 2, 4)), r"tile\[0\]=0 is not a positive integer"),
        (dict(sink_frames=3.0, rolling=True), r"sink_frames=3.0 is not an integer"),
    ],
)
def test_bad_caches(unchecked, change, message):
    with pytest.raises(ValueError, match=message):
        empty(**change)


def test_bad_blocks(unchecked):
    _, k, v = blocks(1)[0]
    cases = [
        (
            lambda: empty(tile=(3, 2, 4)).append(k[:, :8], v[:, :8]),
            r"key has shape \(2, 8, 3, 8\); .*n\*24.*whole tiles of 3",
        ),
        (lambda: empty().append(k[:1], v[:1]), r"key has shape \(1, 24, 3, 8\); the cache holds batch 2"),
        (lambda: empty().append(k.astype(jnp.bfloat16), v), r"key has dtype bfloat16, the cache has float32"),
        (lambda: empty(tile=(3, 2, 4)).append(k, v, frame=1), r"frame=1 is not a multiple of the tile's 3 frames"),
        (lambda: empty(rolling=True).append(k, v).attend(k, causal_block=1), r"causal_block=1: a rolling .* not 3 fr"),
        (lambda: empty().append(k, v[:, :8]), r"value has shape \(2, 8, 3, 8\), .*; key has \(2, 24, 3, 8\)"),
        (lambda: empty().append(untyped(k.tolist()), v), r"key is a list; it should be an array"),
        (lambda: empty().append(k, untyped(v.tolist())), r"value is a list; it should be an array of JAX or NumPy"),
        (lambda: empty().attend(untyped(k.tolist())), r"query is a list; it should be an array of JAX or NumPy"),
        (lambda: empty().append(k, v, frame=untyped(2.7)), r"frame=2.7 is not an integer"),
        (
            lambda: empty().append(k, v, frame=jnp.zeros(2, int)),
            r"frame has shape \(2,\), .* should be an int32 scalar",
        ),
        (lambda: empty(layers=2).append(k, v, frame=0, layer=untyped(1.5)), r"layer=1.5 is not an integer"),
        (lambda: empty(frames=2).append(k, v), r"key has 3 frames, more than the cache's 2"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_which_layer():
    q, k, v = blocks(1)[0]
    for call in (
        lambda: empty(layers=2).append(k, v),
        lambda: empty(layers=2).attend(q),
        lambda: empty(layers=2).tokens(),
    ):
        with pytest.raises(ValueError, match="layer=None: the cache holds 2 layers; pass which"):
            call()
    with pytest.raises(ValueError, match="layer=2 is not from 0 to 1"):
        empty(layers=2).append(k, v, layer=2)
    with pytest.raises(ValueError, match="frame=None: pass the block's first frame"):
        empty(layers=2).append(k, v, layer=1)
    with pytest.raises(ValueError, match="layer=0: the cache has no layers; leave layer out"):
        empty().attend(q, layer=0)


@pytest.mark.parametrize("layers", [None, 2])
def test_queries_without_keys_raise_where_that_is_known(layers):
    """An empty cache, fewer frames than the queries have, or a block that had no place; NaN under `jax.jit`."""
    q, k, v = blocks(1)[0]
    which: dict[str, Any] = {} if layers is None else {"layer": 0}
    cache = empty(layers=layers)
    with pytest.raises(ValueError, match="query: the cache holds none of the 3 frames that it has; append their keys"):
        cache.attend(q, **which)
    assert np.isnan(jax.jit(lambda cache: cache.attend(q, **which))(cache)).all()
    third = q.shape[1] // 3
    held = cache.append(k[:, :third], v[:, :third], frame=0, **which)
    with pytest.raises(ValueError, match="query: the cache holds 1 of the 3 frames"):
        held.attend(q, **which)
    assert np.isfinite(held.attend(q[:, :third], **which)).all()
    misplaced = jax.jit(lambda cache, frame: cache.append(k, v, frame=frame, **which))(cache, jnp.int32(7))
    with pytest.raises(ValueError, match=r"an earlier block had no place in the cache; begin again"):
        misplaced.attend(q, **which)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(dtype="foo"), "dtype='foo' is not one of bfloat16"),
        (dict(dtype=None), "dtype=None is not one of"),
        (dict(dtype=jnp.int8), "dtype=int8 is not one of"),
        (dict(rolling="no"), "rolling='no' is not True or False"),
        (dict(detach_past=None), "detach_past=None is not True or False"),
    ],
)
def test_bad_settings(unchecked, options, message):
    with pytest.raises(ValueError, match=message):
        empty(**options)
