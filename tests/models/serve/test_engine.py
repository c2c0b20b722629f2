"""What sessions are made with, without one: the engine, its memory, and the way out of frames."""

import dataclasses
from concurrent.futures import Future

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from monarchrt.models.errors import UserError
from monarchrt.models.sampling import Rollout
from monarchrt.models.serve import Engine, Outbox
from monarchrt.models.serve.bench import measure
from monarchrt.models.serve.engine import blended
from monarchrt.models.wan.causal import turned
from tests.compiled import compiled_here
from tests.models.serve.conftest import encode, pipeline
from tests.untyped import untyped


class TestMemory:
    def test_what_is_needed_is_said_before_anything_is_compiled(self, engine, monkeypatch):
        weights, one = engine.held(1)
        values = nnx.state(engine.pipeline.model)
        assert weights >= sum(leaf.size * 4 for leaf in jax.tree.leaves(values))
        keys = 2 * 6 * (2 * 4) * engine.pipeline.model.config.dim * 4  # of a window of 6 frames of 2 x 4 tokens
        assert keys < one < 8 * keys
        assert engine.held(3)[1] == 3 * one
        engine.check_memory(4)
        monkeypatch.setattr("monarchrt.models.serve.engine.device_memory", lambda device: weights + 3 * one)
        engine.check_memory(3)
        with pytest.raises(UserError, match=r"the weights take .* and 4 sessions .* MiB, and the device has .*; give"):
            engine.check_memory(4)

    def test_what_compiling_needs(self, engine, monkeypatch):
        def video(*_, **__):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

        monkeypatch.setattr(engine, "_warm_up", video)
        with pytest.raises(
            UserError, match=r"is used up: the weights take .*a session .*Out of memory allocating 9 by"
        ):
            engine.warm_up()


@pytest.mark.parametrize("prepare", [Engine.warm_up, lambda engine: measure(engine, blocks=3)])
def test_a_long_stream_compiles_nothing_where_positions_are_counted_anew(prepare, monkeypatch):
    """After 1024 frames; without sinks nothing else takes that program."""
    own = Engine(pipeline(), rollout=Rollout(steps=1, window=6), height=4, width=8, encode=encode, unroll=True)
    untyped(turned).clear_cache()
    prepare(own)
    monkeypatch.setattr("monarchrt.models.sampling.rollout.MAX_POSITIONS", 12)
    video = own.video(own.embed("a cat", None), 0)
    with compiled_here() as compiled:
        for _ in range(5):
            video.generate()
    assert (video.frame, video._base) == (15, 6)
    assert compiled == []


class TestOutbox:
    def test_the_oldest_frames_go(self):
        box = Outbox(frames=3)
        box.event("a")
        for index in range(5):
            box.frame(index, 0, b"x")
            box.event("b", n=index, nothing=None)
        assert len(box) == 3
        assert box.take() == {"type": "dropped", "frames": 2, "total": 2}
        left = [box.take() for _ in range(9)]
        assert left[:3] == [{"type": "a"}, {"type": "b", "n": 0}, {"type": "b", "n": 1}]
        assert [item[:4] for item in left if isinstance(item, bytes)] == [n.to_bytes(4, "big") for n in (2, 3, 4)]
        assert box.take() is None

    def test_what_is_still_encoded_keeps_its_place(self):
        """And is given up, if it has to go before it has begun."""
        told = []
        box, first, second, third = Outbox(frames=8, notify=lambda: told.append(1)), Future(), Future(), Future()
        box.pictures(0, 0, first, frames=4)
        box.event("a")
        box.pictures(4, 1, second, frames=4)
        assert (box.take(), told) == (None, [1])
        second.set_result(b"2")
        assert box.take() is None
        first.set_exception(OSError("no"))
        assert len(told) == 3
        error = untyped(box.take())
        assert (error["code"], error["message"]) == (
            "not_encoded", "frames from 0 on could not be encoded (OSError: no)"
        )  # fmt: skip
        assert (box.take(), untyped(box.take())[8:], box.take()) == ({"type": "a"}, b"2", None)
        box.pictures(8, 2, third, frames=6)
        box.pictures(16, 3, b"4", frames=12)  # more than may wait, which one may
        assert (third.cancelled(), box.take()) == (True, {"type": "dropped", "frames": 6, "total": 6})
        assert untyped(box.take())[8:] == b"4"

    def test_events_are_bounded_too(self):
        box = Outbox(frames=1)
        for index in range(3000):
            box.event("e", n=index)
        items = untyped(list(iter(box.take, None)))
        assert len(items) == 512
        assert items[-1]["n"] == 2999

    def test_frames_of_another_past_are_not_missed(self):
        box = Outbox(frames=2)
        for index in range(2):
            box.frame(index, 0, b"x")
        box.event("a")
        box.clear_frames()
        assert len(box) == 0
        for index in range(2):
            box.frame(index, 1, b"y")
        assert (len(box), box.dropped) == (2, 0)
        assert box.take() == {"type": "a"}


class TestEngine:
    """What is counted and what is kept; nothing is computed."""

    def engine(self, engine, **changes):
        told = []

        def encode(prompts):
            told.extend(prompts)
            return [jnp.zeros((1, 4, 32))]

        rollout = dataclasses.replace(engine.rollout, **changes)
        return Engine(engine.pipeline, rollout=rollout, height=4, width=8, encode=encode, negative="bad"), told

    def test_a_negative_prompt_may_be_empty(self, engine):
        guided, told = self.engine(engine, guidance=3.0)
        for negative in (None, ""):
            assert guided.embed("a", negative)[1] is not None
        assert told == ["a", "bad", ""]
        plain, told = self.engine(engine)
        assert plain.embed("a", "b")[1] is None
        assert told == ["a"]

    def test_texts_of_late_are_kept(self, engine):
        plain, told = self.engine(engine)
        for number in range(64):
            plain.embed(str(number), None)
        plain.embed("0", None)
        plain.embed("new", None)
        for prompt in ("0", "new", "2"):
            plain.embed(prompt, None)
        assert len(told) == 65
        plain.embed("1", None)  # the one that was asked for the longest time ago
        assert told[-1] == "1"

    def test_a_first_block_of_one_frame(self, engine):
        apart, _ = self.engine(engine, independent_first_frame=True)
        assert [apart.count(block) for block in range(3)] == [1, 3, 3]
        assert [apart.first_latent(block) for block in range(4)] == [0, 1, 4, 7]
        assert apart.blocks(7) == 3
        assert [apart.most_blocks(frames) for frames in (0, 1, 3, 4, 6, 7, 10**7)] == [0, 1, 1, 2, 2, 3, 3333333 + 1]

    def test_between_two_texts_is_between_both_of_their_embeddings(self):
        old, new = (jnp.zeros(2), jnp.ones(2)), (jnp.ones(2), 5 * jnp.ones(2))
        text, negative = blended(old, new, 0.25)
        assert (text.tolist(), negative.tolist()) == ([0.25] * 2, [2.0] * 2)
        assert blended((old[0], None), (new[0], None), 0.5)[1] is None
