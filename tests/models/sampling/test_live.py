"""A video whose text and past change while it is made, against the network on whole clips, which knows no cache."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.sampling import LiveRollout, Rollout, autoregressive
from monarchrt.models.sampling.rollout import block_noise, call_network, write_text
from monarchrt.models.sampling.solve import fresh_noise
from monarchrt.models.wan import MonarchAttention, rope
from tests.compiled import compiled_here
from tests.untyped import programs

H, W = 8, 12  # latents; 4 x 6 tokens
KEY = 11
SIGMAS = (1.0, 0.625)  # of two steps, [1000, 625] unshifted
STEPS: dict[str, Any] = dict(steps=(1000, 625), shift=1.0)
ROLLED = Rollout(window=9, sink_frames=3, **STEPS)
MONARCH = MonarchAttention(tile=(1, 4, 6))


@pytest.fixture
def model(wan):
    return wan.model(attention=MONARCH, in_channels=6, num_layers=2)


def text(seed):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((1, 7, 20)), jnp.float32)


OLD, NEW = text(5), text(6)


def begun(model, rollout, *, blocks, key=KEY, **more):
    """A video, and its blocks by their first frame."""
    video = LiveRollout(model, OLD, height=H, width=W, key=jax.random.key(key), rollout=rollout, **more)
    past = {}
    for _ in range(blocks):
        frame = video.frame
        past[frame] = video.generate()
    return video, past


@partial(jax.jit, static_argnums=0)
def whole_clip(graph, params, latents, times, text, positions):
    """The flow of a clip whose frames are at any positions: the rotary table's rows are picked, nothing is cached."""

    def table(grid, head_dim):
        cos, sin = rope.rope_table((60, *grid[1:]), head_dim)
        return cos[positions], sin[positions]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("monarchrt.models.wan.dit.rope_table", table)
        return nnx.merge(graph, params)(latents, times, text)


def from_latents(model, text, past, frame, *, first=3):
    """The block at `frame` of a video of which the latents `past` are known, [(first frame, latents)]."""
    graph, params = nnx.split(model.with_config(causal_block=3, independent_first_frame=first == 1))
    positions = [start + n for start, block in past for n in range(block.shape[1])] + [frame, frame + 1, frame + 2]
    key = jax.random.fold_in(jax.random.key(KEY), frame)
    x = block_noise(key, (1, 3, H, W, 6))
    fresh = fresh_noise(key, x)
    for n, sigma in enumerate(SIGMAS):
        clip = jnp.concatenate([*(block for _, block in past), x], axis=1)
        times = jnp.concatenate([jnp.zeros((1, clip.shape[1] - 3)), jnp.full((1, 3), 1000 * sigma)], axis=1)
        data = x - sigma * whole_clip(graph, params, clip, times, text, jnp.array(positions))[:, -3:]
        x = data if n else (1 - SIGMAS[1]) * data + SIGMAS[1] * fresh(0)
    return x


class TestAnotherText:
    def test_without_changes_it_is_the_roll_out(self, model):
        _, past = begun(model, ROLLED, blocks=4)
        blocks = autoregressive(model, OLD, frames=12, height=H, width=W, key=jax.random.key(KEY), rollout=ROLLED)
        for ours, block in zip(past.values(), blocks, strict=True):
            np.testing.assert_array_equal(ours, block)

    def test_the_past_as_the_new_text_has_it(self, model):
        """A window with a sink: frames 3 to 8 are forgotten, and the sink keeps its distance."""
        video, past = begun(model, ROLLED, blocks=4)
        assert video.past_of(12) == [0, 9]
        video.set_text(NEW)
        video.recache(12, past)
        expected = from_latents(model, NEW, [(0, past[0]), (9, past[9])], 12)
        ours = video.generate()
        np.testing.assert_allclose(ours, expected, atol=2e-4)
        other = from_latents(model, OLD, [(0, past[0]), (9, past[9])], 12)
        assert np.abs(ours - other).max() > 1e-2

    def test_the_blocks_after_that_roll_on(self, model):
        """A block goes out of the window after the past was rewritten, and the one after it sees what it should."""
        video, past = begun(model, ROLLED, blocks=4)
        video.recache(12, past)
        past[12] = video.generate()
        past[15] = video.generate()
        video.recache(18, past)
        again = video.generate()
        np.testing.assert_allclose(again, from_latents(model, OLD, [(0, past[0]), (15, past[15])], 18), atol=2e-4)

    @pytest.mark.parametrize("first", [3, pytest.param(1, marks=pytest.mark.slow)])
    def test_all_of_the_past(self, model, first):
        rollout = Rollout(independent_first_frame=True, **STEPS) if first == 1 else ROLLED
        video, past = begun(model, rollout, blocks=2, frames=first + 6)
        video.set_text(NEW)
        video.recache(first + 3, past)
        ours = video.generate()
        np.testing.assert_allclose(
            ours, from_latents(model, NEW, list(past.items()), first + 3, first=first), atol=2e-4
        )

    @pytest.mark.parametrize(
        ("window", "sinks", "seen"),
        [(9, 0, [9, 12]), (9, 4, [0, 3, 12]), (10, 3, [0, 9, 12]), (8, 2, [0, 12]), (15, 3, [0, 6, 9, 12])],
    )
    def test_who_is_seen(self, model, window, sinks, seen):
        """Also where windows and sinks are no whole blocks."""
        video, _ = begun(model, Rollout(window=window, sink_frames=sinks, **STEPS), blocks=0)
        assert video.past_of(15) == seen

    @pytest.mark.slow
    @pytest.mark.parametrize(("window", "sinks"), [(9, 4), (10, 3), (8, 2), (11, 1)])
    def test_windows_and_sinks_that_are_no_whole_blocks(self, wan, window, sinks):
        """Keys of a single layer do not depend on the frames before: computed anew they are as they were."""
        model = wan.model(in_channels=6, num_layers=1)
        rollout = Rollout(window=window, sink_frames=sinks, **STEPS)
        video, past = begun(model, rollout, blocks=6)
        expected = np.asarray(past[15])
        video.recache(15, past)
        np.testing.assert_allclose(video.generate(), expected, atol=1e-4)
        fresh, _ = begun(model, rollout, blocks=0)
        fresh.recache(15, past)  # into a cache that has seen nothing
        np.testing.assert_allclose(fresh.generate(), expected, atol=1e-4)

    def test_without_recomputing_only_what_follows_changes(self, model):
        video, past = begun(model, ROLLED, blocks=2)
        video.set_text(NEW)
        changed = video.generate()
        _, plain = begun(model, ROLLED, blocks=3)
        for frame in past:
            np.testing.assert_array_equal(past[frame], plain[frame])
        assert np.abs(changed - plain[6]).max() > 1e-2
        video.recache(6, past)
        assert np.abs(video.generate() - changed).max() > 1e-3  # the keys and values of the old text were in use

    @pytest.mark.slow
    def test_guidance_has_both_texts(self, model):
        rollout = Rollout(window=6, guidance=3.0, **STEPS)
        video, _ = begun(model, rollout, blocks=1, negative=-OLD)
        video.set_text(NEW, -OLD)
        ours = video.generate()
        other, _ = begun(model, rollout, blocks=1, negative=-OLD)
        other.set_text(NEW, OLD)
        assert np.abs(ours - other.generate()).max() > 1e-3
        with pytest.raises(ValueError, match=r"text has shape \(1, 7, 20\); the video began with \(2, 7, 20\)"):
            video.set_text(NEW)


class TestSeeking:
    def test_to_a_block_and_on(self, model):
        """The same blocks follow, as often as one goes back; with another key others do."""
        video, past = begun(model, ROLLED, blocks=3)
        video.recache(6, past)
        assert video.frame == 6
        np.testing.assert_allclose(video.generate(), past[6], atol=1e-4)
        video.recache(0, {})
        np.testing.assert_allclose(video.generate(), past[0], atol=1e-5)
        video.recache(3, past)
        video.key = jax.random.key(KEY + 1)
        assert np.abs(video.generate() - past[3]).max() > 0.1

    @pytest.mark.slow
    def test_what_was_given_is_given(self, model):
        """Given frames are told time 0, and a video's own its context noise; also when they are written again."""
        rollout = Rollout(context_noise=100.0, **STEPS)
        clip = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, H, W, 6)), jnp.float32)
        video, _ = begun(model, rollout, blocks=0, frames=9)
        video.write(clip)
        past = {0: clip, 3: video.generate()}
        expected = video.generate()
        video.recache(6, past)
        np.testing.assert_allclose(video.generate(), expected, atol=1e-4)

    def test_a_lost_cache_is_made_again(self, model, monkeypatch):
        """A call that fails takes the cache with it; what is kept as latents brings it back."""
        video, past = begun(model, ROLLED, blocks=2)
        expected = {frame: np.asarray(block) for frame, block in past.items()}
        monkeypatch.setattr("monarchrt.models.sampling.rollout.call_network", lambda *_, **__: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            video.generate()
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match="its cache was lost"):
            video.generate()
        video.recache(3, expected)
        np.testing.assert_allclose(video.generate(), expected[3], atol=1e-4)

    def test_bad_arguments(self, model):
        video, past = begun(model, ROLLED, blocks=1)
        with pytest.raises(
            ValueError, match=r"past lacks the blocks at frames \[3\]; the block at frame=6 sees \[0, 3\]"
        ):
            video.recache(6, past)
        for frame in (4, -3):
            with pytest.raises(ValueError, match=f"frame={frame} is not the first of a block; blocks begin at 0 and 3"):
                video.recache(frame, past)
        assert video.frame == 3


def test_frames_do_not_wait_for_the_rewriting_call(model, monkeypatch):
    """It comes with what follows the block, and so never after the last one."""
    rows = []

    def counted(*given, **options):
        rows.append(int(given[4]))
        return call_network(*given, **options)

    monkeypatch.setattr("monarchrt.models.sampling.rollout.call_network", counted)
    video, _ = begun(model, Rollout(context_noise=100.0, steps=2), blocks=0, frames=9)
    video.write(jnp.zeros((1, 3, H, W, 6)))
    assert rows == [3]  # what is given is clean
    video.generate()
    assert rows == [3, 0, 1]
    video.set_text(NEW)
    assert rows == [3, 0, 1, 2]  # with the text that it was made with
    video.generate()
    assert rows == [3, 0, 1, 2, 0, 1]


def test_nothing_is_compiled_after_the_first_changes(model):
    """A second video, other prompts, seeks to other frames and other keys: all programs are there."""

    def session(key, text, *, blocks, back):
        video, past = begun(model, ROLLED, blocks=blocks, key=key)
        video.set_text(text)
        video.recache(video.frame, past)
        past[video.frame] = video.generate()
        video.recache(back, past)
        return video.generate()

    session(1, NEW, blocks=4, back=9).block_until_ready()
    other = text(8).block_until_ready()  # is made by programs of its own
    counts = [programs(function) for function in (call_network, write_text)]
    with compiled_here() as compiled:
        session(2, other, blocks=6, back=12).block_until_ready()
    assert compiled == []
    assert counts == [programs(function) for function in (call_network, write_text)]


def test_counting_anew_is_one_program_for_all_distances(model, monkeypatch):
    """As if the rotary table ended at 15 positions: the video outgrows it more than once."""
    monkeypatch.setattr("monarchrt.models.sampling.rollout.MAX_POSITIONS", 15)
    video, past = begun(model, ROLLED, blocks=9)
    video.recache(27, past)
    ours = video.generate()
    np.testing.assert_allclose(ours, from_latents(model, OLD, [(0, past[0]), (24, past[24])], 27), atol=2e-4)


def test_a_second_video_is_begun_without_tracing(model, monkeypatch):
    """Checks of sizes are part of the time to its first frames."""
    begun(model, ROLLED, blocks=0)
    traced = []
    monkeypatch.setattr(jax, "eval_shape", lambda *x, **y: traced.append(x))
    begun(model, ROLLED, blocks=0, key=KEY + 1)
    assert not traced
    with pytest.raises(ValueError, match="tile"):
        LiveRollout(model, OLD, height=H, width=W + 2, key=jax.random.key(KEY), rollout=ROLLED)


def test_what_is_done_meanwhile_comes_after_the_first_call(model, monkeypatch):
    """Of each block: the call that rewrites the one before, the first, whatever is to be done, and the rest."""
    done, call = [], LiveRollout._call

    def noted(self, cache, state, number, where, fresh):
        done.append(number)
        return call(self, cache, state, number, where, fresh)

    monkeypatch.setattr(LiveRollout, "_call", noted)
    video = LiveRollout(model, OLD, height=H, width=W, key=jax.random.key(KEY), rollout=ROLLED)
    blocks = [video.generate(meanwhile=lambda: done.append("meanwhile")) for _ in range(2)]
    assert done == [0, "meanwhile", 1, 2, 0, "meanwhile", 1]
    _, past = begun(model, ROLLED, blocks=2)
    for made, (_, expected) in zip(blocks, past.items(), strict=True):
        np.testing.assert_array_equal(made, expected)


def test_counting_anew_early_changes_nothing(model):
    """Of a block that is not written yet, too."""
    expected, video = (begun(model, ROLLED, blocks=5)[0] for _ in range(2))
    video.count_anew()
    assert (video.frame, video._base) == (15, 6)
    np.testing.assert_allclose(video.generate(), expected.generate(), atol=2e-4)
    begun(model, ROLLED, blocks=0)[0].count_anew()
