"""Sessions without a network: what a client asks for is what is made, when it is due, and no more."""

import io
from concurrent.futures import Future
from typing import Any

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarchrt.models.errors import UserError
from monarchrt.models.media.video import read_clip
from monarchrt.models.sampling import Rollout, autoregressive
from monarchrt.models.sampling.rollout import call_network
from monarchrt.models.serve import Engine, Limits, Outbox, Refusal, Session, Sessions
from monarchrt.models.serve.messages import Pause, Ping, Prompt, Resume, Save, Seek, Start, Step, Stop
from tests.compiled import compiled_here
from tests.models.serve.conftest import drain
from tests.untyped import programs

FREE: dict[str, Any] = dict(pace=False)


def start(prompt="a cat", **more):
    return Start(prompt=prompt, **(FREE | more))


def pictures(frames):
    return np.stack([np.frombuffer(picture, np.uint8).reshape(8, 16, 3) for *_, picture in frames]).astype(int)


def types(events):
    return [event["type"] for event in events]


def of(events, type):
    return [event for event in events if event["type"] == type]


def test_a_video_from_start_to_end(stage, client, engine):
    """The frames are those of the pipeline's own video."""
    events, frames = client(stage(), start(seed=3, frames=9)).run()
    assert types(events) == ["started", "block", "block", "block", "ended"]
    assert events[0]["frames"] == 9
    assert events[-1] == {"type": "ended", "reason": "finished", "blocks": 3}
    assert [(index, block) for index, block, _ in frames] == [(n, n // 3) for n in range(9)]
    video, state, expected = engine.video(engine.embed("a cat", None), 3), engine.start_decoder(), []
    for _ in range(3):
        decoded, _, state = engine.decode(video.generate(), state)
        expected.append(decoded[0])
    np.testing.assert_array_equal(pictures(frames), np.concatenate(expected))


def test_another_prompt_says_where_it_applies(stage, client):
    _, before = client(stage(), start(frames=15)).run()
    changed = client(stage(), start(frames=15))
    changed.run(turns=2)
    changed.tell(Prompt(prompt="a dog", id="p1"))
    events, frames = changed.run()
    told = of(events, "prompt")[0]
    assert told == {
        "type": "prompt", "id": "p1", "prompt": "a dog", "block": 2, "frame": 6, "recache": True, "blend": 0
    }  # fmt: skip
    assert types(events)[0] == "prompt"
    difference = np.abs(pictures(frames) - pictures(before)[6:]).mean(axis=(1, 2, 3))
    assert difference.min() > 3


@pytest.mark.parametrize("recache", [True, False])
def test_a_blend_goes_over_in_steps(stage, client, engine, recache):
    """Each block has its own text, the last the new one; compared with the roll-out by hand."""
    session = client(stage(), start(seed=1, frames=15))
    session.run(turns=1)
    session.tell(Prompt(prompt="a dog", blend=2, recache=recache))
    _, frames = session.run()
    old, new = engine.embed("a cat", None)[0], engine.embed("a dog", None)[0]
    video, state, past, expected = engine.video((old, None), 1), engine.start_decoder(), {}, []
    for block in range(5):
        if 1 <= block <= 3:
            video.set_text(old + (block / 3) * (new - old))
            if recache:
                video.recache(video.frame, past)
        past[3 * block] = video.generate()
        decoded, _, state = engine.decode(past[3 * block], state)
        expected.append(decoded[0])
    np.testing.assert_allclose(pictures(frames), np.concatenate(expected[1:]), atol=1)


def test_pause_step_and_resume(stage, client):
    session = client(stage(), start(paused=True))
    events, frames = session.run()
    assert (types(events), frames) == (["started"], [])
    session.tell(Step(blocks=2))
    events, frames = session.run()
    assert types(events) == ["stepping", "block", "block"]
    session.tell(Prompt(prompt="a dog"))  # is told at once, also while nothing is made
    assert of(session.run()[0], "prompt")[0]["block"] == 2
    session.tell(Resume(id="r"))
    events, _ = session.run(turns=2)
    assert events[0] == {"type": "resumed", "id": "r", "block": 2}
    session.tell(Pause())
    events, frames = session.run()
    assert types(events) == ["paused"]
    session.tell(Ping(id="x"))
    session.tell(Stop())
    assert session.run()[0] == [
        {"type": "pong", "id": "x"},
        {"type": "ended", "reason": "stopped", "blocks": session.session.block},
    ]


def test_going_back(stage, client):
    """The same blocks come again; and after another prompt others."""
    session = client(stage(), start(frames=30))
    _, first = session.run(turns=3)
    session.tell(Seek(block=1, id="s"))
    events, again = session.run(turns=2)
    assert events[0] == {"type": "sought", "id": "s", "block": 1, "frame": 3}
    assert [block for _, block, _ in again] == [1] * 3 + [2] * 3
    np.testing.assert_allclose(pictures(again), pictures(first)[3:], atol=1)
    session.tell(Seek(block=7))
    events, _ = session.run(turns=1)
    assert "block is 7, which cannot be returned to; blocks 0 to 2 are kept" in of(events, "error")[0]["message"]
    session.tell(Seek(block=0))
    assert session.run(turns=1)[0][0]["frame"] == 0


def test_the_decoder_sees_again_what_was_before(stage, client, engine, monkeypatch):
    """Its state is of the two blocks before the one that is gone back to."""
    session = client(stage(), start(frames=30))
    session.run(turns=4)
    past, shown = dict(session.session._past), []
    decode = engine.decode
    monkeypatch.setattr(engine, "decode", lambda latents, state: shown.append(latents) or decode(latents, state))
    session.tell(Seek(block=3))
    session.run(turns=1)
    np.testing.assert_array_equal(np.stack(shown[:2]), np.stack([past[1], past[2]]))
    assert len(shown) == 3


def test_what_is_kept_is_bounded(stage, client):
    session = client(stage(kept=1, seconds=10.0), start())
    session.run(turns=20)
    assert len(session.session._past) == 1 + 3 + 2  # the sinks' block besides those of the window, with room
    session.tell(Seek(block=4))
    assert "cannot be returned to; blocks 1" in of(session.run(turns=1)[0], "error")[0]["message"]
    session.tell(Seek(block=19))
    assert of(session.run(turns=1)[0], "sought")


def test_saving(stage, client, tmp_path):
    """One block a turn, so that others are not kept waiting."""
    sessions = stage(videos=1)
    session = client(sessions, start(paused=True))
    session.tell(Save())
    assert of(session.run()[0], "error")[0]["message"] == "save: saving has nothing"
    session.tell(Step(blocks=3))
    session.run()
    for number in range(2):
        session.tell(Save(id="v"))
        events, _ = session.run(turns=1)
        assert events == []
        (saved,) = session.run()[0]
        assert (saved["type"], saved["frames"], saved["block"], saved["id"]) == ("saved", 9, 0, "v")
        path = sessions.video(saved["url"].removeprefix("/video/"))
        assert len(read_clip(path, height=8, width=16)) == 9
        assert len(list(tmp_path.iterdir())) == 1, number
    assert sessions.video("other.mp4") is None


def test_turns_go_round(stage, client):
    sessions = stage()
    one, other = (client(sessions, start(name, frames=12)) for name in ("a cat", "a dog"))
    for _ in range(4):
        sessions.turn()
    assert one.session.block == other.session.block == 2


def test_a_queue_with_positions(stage, client):
    sessions = stage(sessions=1, waiting=2)
    first, second, third = (client(sessions, start(frames=3)) for _ in range(3))
    assert [types(x.run(turns=0)[0]) for x in (first, second, third)] == [["started"], ["queued"], ["queued"]]
    with pytest.raises(Refusal, match="1 sessions are active and 2 wait; try again later"):
        client(sessions, start())
    sessions.close(second.session, "disconnected")
    sessions.turn()
    assert types(third.run(turns=0)[0]) == ["queued", "started"]  # the first is over, and the second is gone
    assert second.run(turns=0)[0] == [{"type": "ended", "reason": "disconnected", "blocks": 0}]
    assert types(third.run()[0]) == ["block", "ended"]
    assert (sessions.active, sessions.waiting) == (0, 0)


def test_positions_move_up(stage, client):
    sessions = stage(sessions=1, waiting=3)
    _, second, third = (client(sessions, start(frames=3)) for _ in range(3))
    third.run(turns=0)
    second.tell(Stop())
    sessions.turn()
    events = third.run(turns=0)[0]
    assert types(events) in (["started"], ["queued", "started"])


def test_a_paced_video_is_made_as_it_is_played(stage, client, clock):
    session = client(stage(), start(pace=True))
    session.run()
    made = session.session.block
    assert (made - 1) * 3 / 30 <= 1.0 < (made + 1) * 3 / 30  # a second ahead
    assert session.session.due() > clock.now
    clock.now += 1.0
    session.run()
    assert session.session.block - made in (9, 10, 11)


def test_a_client_that_says_nothing(stage, client, clock):
    session = client(stage(idle=60.0), start(paused=True))
    clock.now = 59.0
    assert session.run()[0][-1]["type"] == "started"
    session.tell(Ping())
    clock.now = 118.0
    session.run()
    assert session.session.ended is None
    clock.now = 119.5
    assert session.run()[0] == [
        {"type": "ended", "reason": "idle", "message": "nothing was heard for 60 s", "blocks": 0}
    ]


def test_who_had_to_wait_was_not_idle(stage, client, clock):
    sessions = stage(sessions=1, idle=60.0)
    first, second = (client(sessions, start(paused=True)) for _ in range(2))
    clock.now = 59.0
    first.tell(Ping())
    clock.now = 100.0
    first.tell(Stop())
    second.run()
    assert second.session.ended is None
    clock.now = 161.0
    assert second.run()[0][-1]["reason"] == "idle"


def test_the_longest_video(stage, client):
    events, frames = client(stage(seconds=1.0), start()).run()
    assert len(frames) == 30
    assert events[-1]["reason"] == "longest"
    assert events[-1]["message"] == "a session's video has at most 1 s"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (dict(height=16), "height is 16, which would need another compiled program; this server's height is 8"),
        (dict(width=8), "width is 8, which would need another compiled program; this server's width is 16"),
        (dict(window=9), "window is 9, which would need"),
        (
            dict(sink_frames=0),
            "sink_frames is 0, which would need another compiled program; this server's sink_frames is 3",
        ),
        (dict(frames=10), "frames is 10, which do not make whole blocks; 9 or 12 do"),
        (dict(frames=10**9), "frames is 1000000000; a session makes at most 18000"),
    ],
)
def test_what_cannot_be_made(stage, client, more, message):
    with pytest.raises(Refusal, match=message):
        client(stage(), start(**more))
    assert client(stage(), start(height=8, width=16, window=6, sink_frames=3)).session.ended is None


def test_too_many_commands_wait(stage, client):
    session = client(stage(), start(paused=True))
    for _ in range(16):
        session.tell(Pause())
    with pytest.raises(Refusal, match="pause: 16 messages are already waiting"):
        session.tell(Pause())
    with pytest.raises(Refusal, match="start: this session has begun"):
        session.tell(start())
    session.tell(Stop())
    assert session.run()[0][-1]["reason"] == "stopped"


@pytest.fixture
def log(monkeypatch):
    """What is begun and what is handed out, by the order of both."""
    done, begin, send = [], Session._begin_block, Session._send

    def begun(self, meanwhile):
        done.append(f"{self._start.prompt} {self.block}")
        return begin(self, meanwhile)

    def sent(self, first, block, pictures):
        done.append(f"{self._start.prompt} {block} sent")
        send(self, first, block, pictures)

    monkeypatch.setattr(Session, "_begin_block", begun)
    monkeypatch.setattr(Session, "_send", sent)
    return done


def test_a_block_is_under_way_before_the_one_before_is_fetched(stage, client, log):
    """Of this session or another; what is asked for in between comes after what is under way, and waits for it."""
    client(stage(), start("a", frames=9)).run()
    assert log == ["a 0", "a 1", "a 0 sent", "a 2", "a 1 sent", "a 2 sent"]
    log.clear()
    sessions = stage()
    for name in "ab":
        client(sessions, start(name, frames=6))
    while sessions.turn():
        pass
    assert log == ["a 0", "b 0", "a 0 sent", "a 1", "b 0 sent", "b 1", "a 1 sent", "b 1 sent"]
    log.clear()
    asks = client(stage(), start("a"))
    for _ in range(3):
        asks.sessions.turn()
    asks.tell(Prompt(prompt="another"))
    asks.sessions.turn()
    asks.tell(Pause())
    events, _ = asks.run()
    assert log == ["a 0", "a 1", "a 0 sent", "a 2", "a 1 sent", "a 2 sent", "a 3", "a 3 sent"]
    assert of(events, "prompt")[0]["block"] == 3
    assert types(events)[-2:] == ["block", "paused"]


def test_what_is_handed_out_is_copied_before_anyone_waits(stage, client, log, monkeypatch):
    """Frames, latents, and whether they are numbers; and handed out before all of the next block is sent."""
    copy = type(jnp.zeros(())).copy_to_host_async

    def noted(array):
        log.append(array.ndim)
        copy(array)

    monkeypatch.setattr("monarchrt.models.generate.decoders.on_cpu", lambda array: False)  # as on a GPU
    monkeypatch.setattr(type(jnp.zeros(())), "copy_to_host_async", noted)
    client(stage(), start("a", frames=6)).run()
    assert log == ["a 0", 0, 5, 5, "a 1", "a 0 sent", 0, 5, 5, "a 1 sent"]


@pytest.mark.parametrize("message", [Prompt(prompt="another"), Seek(block=1)])
def test_many_messages_keep_nobody_waiting(stage, client, message):
    """Those that may compute the past anew are done one a turn."""
    sessions = stage()
    asks, other = client(sessions, start("a")), client(sessions, start("b"))
    for _ in range(4):
        sessions.turn()
    asks.run(turns=0)
    for _ in range(5):
        asks.tell(message)
    asks.tell(Pause())
    for done in range(5):
        made = other.session.block
        sessions.turn()
        sessions.turn()
        events, _ = asks.run(turns=0)
        assert (len(of(events, "prompt") + of(events, "sought")), other.session.block) == (1, made + 1), done
    asks.run(turns=2)
    assert not asks.session._playing


def test_a_paced_block_is_handed_out_at_once(stage, client, clock, log):
    """Nothing is begun before it is due, nor kept back until then."""
    paced = client(stage(), start("a", pace=True))
    paced.run()
    log.clear()
    clock.now += 0.11  # a little more than three frames
    paced.run()
    number = paced.session.block - 1
    assert log == [f"a {number}", f"a {number} sent"]


def test_nothing_is_compiled_by_sessions(stage, client, engine):
    """Three at once with prompts, seeds, seeks and blends, a beginning and an attention of their own."""
    engine.warm_up()  # another file's tests may have let go of its programs
    count, sessions = programs(call_network), stage()
    with compiled_here() as compiled:
        one, other = (client(sessions, start(name, seed=seed)) for name, seed in (("a bird", 8), ("a fish", 9)))
        third = client(sessions, start("a fish", attention=OTHER), begin=given(6))
        for _ in range(12):
            sessions.turn()
        one.tell(Prompt(prompt="a fox", blend=1))
        other.tell(Seek(block=2))
        third.tell(Seek(block=1))
        for _ in range(9):
            sessions.turn()
    assert one.session.ended is other.session.ended is third.session.ended is None
    assert compiled == []
    assert programs(call_network) == count


OTHER = "monarch(tile=(3,2,2))"


def given(count):
    """Frames with something to see in each."""
    frames = np.zeros((count, 8, 16, 3), np.uint8)
    for index in range(count):
        frames[index, :, 2 * index : 2 * index + 4] = 200
    return frames


class TestBeginning:
    """With an image or a clip."""

    def test_the_video_goes_on_from_it(self, stage, client, engine):
        """As the roll-out does with these latents; the frames that it begins with come first."""
        clip = given(6)
        events, frames = client(stage(), start(seed=4, frames=12), begin=clip).run()
        assert types(events) == ["started", *["block"] * 4, "ended"]
        assert np.abs(pictures(frames)[:6] - clip).max() <= 1
        latents = engine.pipeline.decoder.encode(clip[None])
        text, negative = engine.embed("a cat", None)
        options: dict[str, Any] = dict(
            frames=12, height=4, width=8, key=jax.random.key(4), negative=negative, initial=latents
        )
        state, expected = engine.start_decoder(), []
        for block in autoregressive(engine.networks[engine.attention(None)], text, rollout=engine.rollout, **options):
            decoded, _, state = engine.decode(block, state)
            expected.append(decoded[0])
        np.testing.assert_allclose(pictures(frames), np.concatenate(expected), atol=1)

    def test_it_is_there_again_after_going_back(self, stage, client):
        session = client(stage(), start(), begin=given(6))
        _, first = session.run(turns=3)
        session.tell(Seek(block=0))
        _, again = session.run(turns=3)
        np.testing.assert_allclose(pictures(again), pictures(first), atol=1)

    def test_another_prompt_sees_it(self, stage, client):
        session = client(stage(), start(paused=True), begin=given(6))
        session.tell(Step(blocks=2))
        session.run()
        session.tell(Prompt(prompt="a dog"))
        session.tell(Step())
        events, frames = session.run()
        assert of(events, "prompt")[0]["block"] == 2
        assert len(frames) == 3

    @pytest.mark.parametrize(
        ("clip", "more", "message"),
        [
            (given(3), {}, "start: begin has 3 frames; videos begin with 6 here"),
            (given(6)[:, :4], {}, r"begin has frames of 4x16; videos have \(8, 16\) here"),
            (
                given(6),
                dict(frames=6),
                "starts with 6 frames, which leaves none of the 6 to generate; ask for 9 or more",
            ),
        ],
    )
    def test_what_does_not_fit(self, stage, client, clip, more, message):
        with pytest.raises(Refusal, match=message):
            client(stage(), start(**more), begin=clip)

    def test_nowhere_to_begin(self, engine, stage, client, monkeypatch):
        monkeypatch.setattr(engine, "begins", ())
        with pytest.raises(Refusal, match="this server starts no videos from images or clips: its --begin is 0"):
            client(stage(), start(), begin=given(6))
        with pytest.raises(UserError, match="begin is 7, which do not make whole blocks; 6 or 9 do"):
            rebuilt(engine, begins=(7,))


def rebuilt(engine, **more):
    return Engine(engine.pipeline, rollout=engine.rollout, height=4, width=8, encode=engine._encode, **more)


class TestAttention:
    def test_each_session_has_its_own(self, stage, client, engine):
        sessions = stage()
        plain, named, other = (
            client(sessions, start(frames=9, **more))
            for more in ({}, dict(attention="dense"), dict(attention="monarch( tile=[3, 2, 2] )"))
        )
        while sessions.turn():
            pass
        (said, plain), (_, named), (told, other) = (each.run() for each in (plain, named, other))
        assert (said[0]["attention"], told[0]["attention"]) == ("dense", OTHER)
        np.testing.assert_array_equal(pictures(plain), pictures(named))
        assert np.abs(pictures(plain) - pictures(other)).max() > 3

    @pytest.mark.parametrize(
        ("attention", "code", "message"),
        [
            (
                "monarch(tile=(1,2,2))",
                "other_program",
                "would need another compiled program; this server has dense, monarch",
            ),
            ("sparse", "invalid", "attention: "),
            ("monarch(tile=(3,2,2)", "invalid", "attention: "),
        ],
    )
    def test_others_are_refused(self, stage, client, attention, code, message):
        with pytest.raises(Refusal, match=message) as caught:
            client(stage(), start(attention=attention))
        assert caught.value.code == code

    @pytest.mark.parametrize("attention", ["monarch(tile=(3,3,2))", "sparse"])
    def test_what_the_engine_cannot_have(self, engine, attention):
        with pytest.raises(UserError, match="attention"):
            rebuilt(engine, attentions=(attention,))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, (1000, 500)])
def test_one_frame_at_a_time_in_one_or_two_steps(engine, clock, steps):
    """As models are distilled that answer soonest: blocks of a frame; compared with the roll-out by hand."""
    rollout = Rollout(block=1, steps=steps, window=3)
    fast = Engine(engine.pipeline, rollout=rollout, height=4, width=8, encode=engine._encode, begins=(1,))
    fast.networks = {name: engine.networks[name] for name in fast.networks}  # its pipeline's layers were let go of
    plain = lambda encode, frames, index, fps: frames.tobytes()  # noqa: E731
    sessions = Sessions(fast, limits=Limits(), clock=clock, submit=plain)
    outbox = Outbox(frames=100)
    sessions.open(start(seed=2, frames=6), outbox, begin=given(1))
    while sessions.turn():
        pass
    events, frames = drain(outbox)
    assert types(events) == ["started", *["block"] * 6, "ended"]
    text, _ = fast.embed("a cat", None)
    options: dict[str, Any] = dict(frames=6, height=4, width=8, key=jax.random.key(2))
    initial = engine.pipeline.decoder.encode(given(1)[None])
    state, expected = fast.start_decoder(), []
    for block in autoregressive(
        engine.networks[engine.attention(None)], text, rollout=rollout, initial=initial, **options
    ):
        decoded, _, state = fast.decode(block, state)
        expected.append(decoded[0])
    np.testing.assert_allclose(pictures(frames), np.concatenate(expected), atol=1)


class TestVideo:
    """A block a message, as a piece of an mp4."""

    def encoded(self, encode, frames, index, fps):
        return encode(frames, index, fps)

    def test_pieces_are_the_blocks(self, stage, client):
        sessions = stage()
        _, expected = client(sessions, start(frames=9)).run()
        sessions._submit = self.encoded
        events, pieces = client(sessions, start(frames=9, video="mp4")).run()
        assert events[0]["mime"].startswith('video/mp4; codecs="avc1.')
        assert [(index, block) for index, block, _ in pieces] == [(0, 0), (3, 1), (6, 2)]
        with av.open(io.BytesIO(b"".join(piece for *_, piece in pieces)), "r") as container:
            frames = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
        assert len(frames) == 9
        luma = np.array([0.299, 0.587, 0.114])  # colours are stored at half the size
        distances = [[np.abs((frame - other) @ luma).mean() for other in pictures(expected)] for frame in frames]
        assert (np.argmin(distances, axis=1) // 3).tolist() == [0] * 3 + [1] * 3 + [2] * 3

    def test_encoding_is_not_waited_for(self, stage, client):
        """Blocks are made while nothing is encoded yet; frames that then have to go are given up."""
        sessions, begun = stage(), []

        def submit(encode, frames, index, fps):
            begun.append(Future())
            return begun[-1]

        sessions._submit = submit
        session = client(sessions, start(frames=30), frames=12)
        events, frames = session.run()
        assert (session.session.ended, frames) == ("finished", [])
        assert events[0] == {"type": "dropped", "frames": 18, "total": 18}
        assert [future.cancelled() for future in begun] == [True] * 18 + [False] * 12
        for future in begun[18:]:
            future.set_result(b"")
        events, frames = session.run()
        assert [index for index, *_ in frames] == list(range(18, 30))
        assert events[-1]["reason"] == "finished"

    def test_an_unknown_one(self, stage, client):
        with pytest.raises(Refusal, match="start: video 'webm' is unknown; there is jpeg, mp4"):
            client(stage(), start(video="webm"))


def test_bad_limits():
    with pytest.raises(UserError, match="sessions is 0; it must be at least 1"):
        Limits(sessions=0)
    with pytest.raises(UserError, match="idle is nan; it must be at least 1"):
        Limits(idle=float("nan"))
    for seconds in (float("inf"), 1e300, 2e7):
        with pytest.raises(UserError, match=r"seconds is .*; it must be at most 10000000$"):
            Limits(seconds=seconds)
