"""The compiled block by block sampler against a plain loop; it compiles once, and has no end."""

import dataclasses
from functools import partial
from itertools import islice, pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.sampling import Rollout, autoregressive
from monarchrt.models.sampling.rollout import begin_block, block_noise, call_network, embed_calls, start_cache
from monarchrt.models.sampling.solve import fresh_noise
from monarchrt.models.wan import DenseAttention, MonarchAttention, WanModel
from monarchrt.models.wan.causal import cached_forward, init_cache, rebase_cache
from tests.compiled import array_sizes, compiled_here
from tests.untyped import programs, there

H, W = 8, 12  # latents; 4 x 6 tokens
KEY = 11
FEW = np.array([1000, 937.5, 2500 / 3, 625]) / 1000
DENSE, MONARCH = DenseAttention(), MonarchAttention(tile=(1, 4, 6))


@pytest.fixture
def tiny(wan):
    def tiny(attention=DENSE, **changes):
        model = wan.model(attention=attention, in_channels=6, num_layers=2, **changes)
        text = jnp.asarray(np.random.default_rng(5).standard_normal((1, 7, 20)), jnp.float32)
        return model, text

    return tiny


def options(frames, rollout, **more) -> dict[str, Any]:
    return dict(frames=frames, height=H, width=W, key=jax.random.key(KEY), rollout=rollout) | more


def video(model, text, frames, rollout=None, **more):
    blocks = list(autoregressive(model, text, **options(frames, rollout or Rollout(), **more)))
    return np.concatenate(blocks, axis=1)


def plain_roll_out(model, text, frames, *, first=3, initial=None, window=None, sinks=0):
    """Self-Forcing's inference as a loop: four calls with fresh noise, then one at time 0 to rewrite the cache."""
    rolling: dict[str, Any] = dict(rolling=True, sink_frames=sinks) if window else {}
    cache = init_cache(model, text, frames=window or frames, height=H, width=W, **rolling)
    forward = nnx.jit(lambda model, *args, frame: cached_forward(model, *args, frame=frame))
    out, frame = [], 0
    while frame < frames:
        count = first if frame == 0 else 3
        times = lambda t, count=count: jnp.full((1, count), t, jnp.float32)  # noqa: E731
        if initial is not None and frame < initial.shape[1]:
            data = initial[:, frame : frame + count]
        else:
            shape = (1, count, H, W, 6)
            key = jax.random.fold_in(jax.random.key(KEY), frame)
            x = block_noise(key, shape)
            fresh = fresh_noise(key, x)
            for n, sigma in enumerate(FEW):
                flow, cache = forward(model, x, times(1000 * sigma), cache, frame=jnp.int32(frame))
                data = x - sigma * flow
                if n < 3:
                    x = (1 - FEW[n + 1]) * data + FEW[n + 1] * fresh(n)
        _, cache = forward(model, data, times(0), cache, frame=jnp.int32(frame))
        out.append(data)
        frame += count
    return np.concatenate(out, axis=1)


class TestAgainstALoop:
    @pytest.mark.parametrize(
        "attention",
        [MONARCH, *(pytest.param(x, marks=pytest.mark.slow) for x in (DENSE, MonarchAttention(tile=(3, 2, 6))))],
    )
    def test_blocks_of_three(self, tiny, attention):
        model, text = tiny(attention, causal_block=3)
        out = video(model, text, 9)
        np.testing.assert_allclose(out, plain_roll_out(model, text, 9), atol=2e-4)
        assert out.std() > 0.3

    def test_rolling_window_and_sinks(self, tiny):
        model, text = tiny()
        out = video(model, text, 15, Rollout(window=9, sink_frames=3))
        np.testing.assert_allclose(out, plain_roll_out(model, text, 15, window=9, sinks=3), atol=2e-4)
        whole = video(model, text, 15)
        np.testing.assert_allclose(out[:, :9], whole[:, :9], atol=2e-4)  # nothing was evicted yet
        assert np.abs(out[:, 12:] - whole[:, 12:]).max() > 1e-2

    @pytest.mark.slow
    def test_first_frame_alone_and_an_image(self, tiny):
        model, text = tiny()
        rollout = Rollout(independent_first_frame=True)
        np.testing.assert_allclose(video(model, text, 7, rollout), plain_roll_out(model, text, 7, first=1), atol=2e-4)
        image = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, H, W, 6)), jnp.float32)
        out = video(model, text, 7, rollout, initial=image)
        np.testing.assert_array_equal(out[:, :1], image)
        np.testing.assert_allclose(out, plain_roll_out(model, text, 7, first=1, initial=image), atol=2e-4)

    def test_a_clip_is_continued(self, tiny):
        model, text = tiny(MONARCH)
        clip = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, H, W, 6)), jnp.float32)
        out = video(model, text, 9, initial=clip)
        np.testing.assert_array_equal(out[:, :6], clip)
        np.testing.assert_allclose(out, plain_roll_out(model, text, 9, initial=clip), atol=2e-4)

    @pytest.mark.slow
    def test_many_steps_with_guidance(self, tiny):
        """One cache of twice the batch equals two caches."""
        model, text = tiny()
        negative = -text[:, :4]
        rollout = Rollout(sampler="euler", steps=3, guidance=4.0)
        out = video(model, text, 6, rollout, negative=negative)
        caches = [init_cache(model, given, frames=6, height=H, width=W) for given in (text, negative)]
        sigmas = [*rollout.table().sigmas.tolist(), 0.0]
        forward = nnx.jit(lambda model, *args, frame: cached_forward(model, *args, frame=frame))
        expected = []
        for frame in (0, 3):
            x = block_noise(jax.random.fold_in(jax.random.key(KEY), frame), (1, 3, H, W, 6))
            for sigma, following in [*pairwise(sigmas), (0.0, 0.0)]:
                t, flows = jnp.full((1, 3), 1000 * sigma, jnp.float32), []
                for n in range(2):
                    flow, caches[n] = forward(model, x, t, caches[n], frame=jnp.int32(frame))
                    flows.append(flow)
                x = x + (following - sigma) * (flows[1] + 4.0 * (flows[0] - flows[1]))
            expected.append(x)
        np.testing.assert_allclose(out, np.concatenate(expected, axis=1), atol=5e-4)
        assert np.abs(out - video(model, text, 6, dataclasses.replace(rollout, guidance=1.0))).max() > 0.05


class TestOneProgram:
    @pytest.mark.parametrize(
        ("attention", "rollout"),
        [
            (DENSE, Rollout(window=6, sink_frames=3)),
            pytest.param(MONARCH, Rollout(window=6, sink_frames=3), marks=pytest.mark.slow),
            pytest.param(MONARCH, Rollout(), marks=pytest.mark.slow),
        ],
    )
    def test_every_block_reuses_it(self, tiny, attention, rollout):
        """Nothing at all is compiled after the first block."""
        model, text = tiny(attention)
        model = nnx.clone(model)
        jax.clear_caches()
        blocks = autoregressive(model, text, **options(15, rollout))
        next(blocks).block_until_ready()
        with compiled_here() as compiled:
            rest = [np.asarray(block) for block in blocks]
        assert len(rest) == 4
        assert compiled == []
        assert programs(call_network) == 1

    def test_the_listener_would_hear(self):
        heard = []

        def listen(event: str, duration_secs: float, **_: Any) -> None:
            heard.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            jax.jit(lambda x: x * 3.25)(jnp.ones(3))
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)
        assert "/jax/core/compile/backend_compile_duration" in heard

    def test_the_cache_is_donated(self, tiny):
        model, text = tiny()
        graph, params = nnx.split(model)
        cache = init_cache(model, text, frames=6, height=H, width=W)
        where = jnp.zeros(2, jnp.int32)
        key = jax.random.key(0)
        state = begin_block(key, where, shape=(1, 3, H, W, 6))
        call_network(graph, params, cache, state, np.int32(0), key, where, rollout=Rollout())
        assert all(leaf.is_deleted() for leaf in cache.keys + cache.values)

    def test_noise_of_all_steps_is_never_there_at_once(self, tiny):
        model, text = tiny()
        graph, params = nnx.split(model)

        def largest(steps):
            rollout = Rollout(steps=tuple(range(1000, 1000 - steps, -1)))
            cache = jax.eval_shape(
                partial(start_cache, graph, frames=3, height=H, width=W, rollout=rollout), params, text
            )
            key, where = jax.random.key(0), jnp.zeros(2, jnp.int32)
            state, times = begin_block(key, where, shape=(1, 3, H, W, 6)), embed_calls(graph, params, rollout=rollout)
            given = graph, params, cache, state, np.int32(0), key, where, times
            traced = call_network.trace(*given, rollout=rollout)
            return max(array_sizes(traced.jaxpr.jaxpr))

        assert largest(2) == largest(500) < 500 * 3 * H * W * 6

    @pytest.mark.parametrize("rollout", [pytest.param(Rollout(), marks=pytest.mark.slow), Rollout(window=60)])
    def test_the_cache_is_written_in_place(self, wan, rollout):
        """No layer's cache is held twice."""

        def memory(layers):
            config = dataclasses.replace(wan.SMALL, num_layers=layers, in_channels=6, attention=MONARCH)
            graph, params = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))
            text = jax.ShapeDtypeStruct((1, 7, config.text_dim), jnp.float32)
            begin = partial(start_cache, graph, frames=60, height=H, width=W, rollout=rollout)
            cache = jax.eval_shape(begin, params, text)
            where, key = jax.ShapeDtypeStruct((2,), jnp.int32), jax.eval_shape(lambda: jax.random.key(0))
            state = jax.eval_shape(partial(begin_block, shape=(1, 3, H, W, 6)), key, where)
            given = graph, params, cache, state, np.int32(0), key, where
            analysis = there(call_network.lower(*given, rollout=rollout).compile().memory_analysis())
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in cache.keys + cache.values)
            assert analysis.alias_size_in_bytes >= size
            return analysis.temp_size_in_bytes, size

        (few, few_size), (many, many_size) = memory(2), memory(8)
        assert many - few < 0.2 * (many_size - few_size)  # the new block's keys and values, 3 of 60 frames


class TestLength:
    def test_blocks_do_not_depend_on_how_many_follow(self, tiny):
        model, text = tiny()
        rollout = Rollout(window=6)
        endless = autoregressive(model, text, **options(None, rollout))
        first = np.concatenate(list(islice(endless, 4)), axis=1)
        np.testing.assert_array_equal(first, video(model, text, 15, rollout)[:, :12])

    def test_rebasing_changes_nothing_but_the_count(self, tiny):
        """The next block's flow is the same after all frames were counted anew."""
        model, text = tiny(MONARCH)
        size: dict[str, Any] = dict(frames=6, height=H, width=W, rolling=True, sink_frames=3)
        cache, rng = init_cache(model, text, **size), np.random.default_rng(2)
        forward = nnx.jit(lambda model, *args, frame: cached_forward(model, *args, frame=frame))
        block = lambda: jnp.asarray(rng.standard_normal((1, 3, H, W, 6)), jnp.float32)  # noqa: E731
        for frame in range(0, 24, 3):
            _, cache = forward(model, block(), jnp.zeros((1, 3)), cache, frame=jnp.int32(frame))
        x, t = block(), jnp.full((1, 3), 500.0)
        expected, _ = forward(model, x, t, cache, frame=jnp.int32(24))
        moved = rebase_cache(jax.tree.map(jnp.copy, cache), frames=15, head_dim=model.config.head_dim)
        flow, after = forward(model, x, t, moved, frame=jnp.int32(9))
        np.testing.assert_allclose(flow, expected, atol=1e-4)
        assert int(after.length) == 12
        unturned = dataclasses.replace(cache, length=cache.length - 15)
        wrong, _ = forward(model, x, t, unturned, frame=jnp.int32(9))
        assert np.abs(wrong - expected).max() > 1e-2
        with pytest.raises(ValueError, match="frames=4 is not a multiple of the 3 frames"):
            rebase_cache(moved, frames=4, head_dim=model.config.head_dim)

    def test_a_video_outgrows_the_rotary_table(self, tiny, monkeypatch):
        """As if the table ended at 24 positions; the real one makes the reference."""
        model, text = tiny()
        rollout = Rollout(window=9, sink_frames=3, sampler="euler", steps=1)
        expected = video(model, text, 45, rollout)
        monkeypatch.setattr("monarchrt.models.sampling.rollout.MAX_POSITIONS", 24)
        out = video(model, text, 45, rollout)
        assert np.isfinite(out).all()
        np.testing.assert_allclose(out[:, :24], expected[:, :24], atol=1e-4)
        np.testing.assert_allclose(out, expected, atol=2e-2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(frames=8), "frames=8 latent frames are not 3 k, whole blocks; the nearest that are: 6 or 9"),
        (
            dict(frames=9, rollout=Rollout(independent_first_frame=True)),
            "frames=9 latent frames are not 1 \\+ 3 k, whole blocks; the nearest that are: 7 or 10",
        ),
        (dict(frames=None), "frames=None, an endless video, needs a window"),
        (dict(frames=9, height=7), "height=7 is not a multiple of the patch's 2"),
        (dict(frames=9, initial=jnp.zeros((1, 1, H, W, 6))), "frames=1 latent frames are not 3 k"),
        (dict(frames=9, initial=jnp.zeros((1, 3, H, W, 5))), "initial has shape"),
    ],
)
def test_bad_arguments_are_found_at_once(tiny, more, message):
    model, text = tiny()
    with pytest.raises(ValueError, match=message):
        autoregressive(model, text, **options(9, Rollout()) | more)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(window=3, sink_frames=3), "window=3 frames has no room for a block of 3 and sink_frames=3; use at least"),
        (dict(sink_frames=3), "sink_frames=3 needs a window"),
        (dict(block=0), "block=0 is not a positive number"),
        (dict(sampler="x"), "sampler='x' is unknown"),
    ],
)
def test_bad_settings(more, message):
    with pytest.raises(ValueError, match=message):
        Rollout(**more)


def test_a_tile_that_does_not_fit_is_found_at_once(tiny):
    model, text = tiny(MonarchAttention(tile=(3, 4, 6)))
    with pytest.raises(ValueError, match="3"):
        autoregressive(model, text, **options(7, Rollout(independent_first_frame=True)))
