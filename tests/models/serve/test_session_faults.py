"""What goes wrong in a session is said, and harms no other."""

import errno

import numpy as np

from monarchrt.models.errors import UserError
from monarchrt.models.media.writer import Mp4Writer
from monarchrt.models.serve.messages import Prompt, Save
from tests.models.serve.test_session import of, pictures, start, types


def test_a_file_that_cannot_be_written(stage, client, tmp_path, monkeypatch):
    """Is said; the session goes on, and nothing of it is left. Nor of one that the client did not wait for."""
    sessions = stage()
    session = client(sessions, start(frames=30))
    session.run(turns=3)

    def full(self, frames):
        raise OSError(errno.ENOSPC, "No space left on device")

    session.tell(Save(id="v"))
    session.run(turns=2)
    with monkeypatch.context() as patch:
        patch.setattr(Mp4Writer, "write", full)
        (error,) = of(session.run(turns=1)[0], "error")
    assert (error["id"], error["code"], error["message"]) == (
        "v", "cannot_save", "save: the disk is full on the server"
    )  # fmt: skip
    assert not list(tmp_path.iterdir())
    session.tell(Save())
    session.run(turns=2)
    sessions.close(session.session, "disconnected")
    assert session.run()[0][-1]["reason"] == "disconnected"
    assert not list(tmp_path.iterdir())


def test_a_prompt_that_cannot_be_encoded(stage, client, engine, monkeypatch):
    """As a file of embeddings has no others: it is said, and the video goes on as it was."""
    session, embed = client(stage(), start(frames=15, seed=3)), engine.embed
    _, expected = client(stage(), start(frames=15, seed=3)).run()

    def stored(prompt, negative):
        if prompt == "other":
            raise UserError("embeddings a.safetensors has no 'other'")
        return embed(prompt, negative)

    monkeypatch.setattr(engine, "embed", stored)
    _, first = session.run(turns=2)
    session.tell(Prompt(prompt="other", id="p"))
    events, rest = session.run()
    (error,) = of(events, "error")
    assert error == {
        "type": "error", "id": "p", "code": "invalid", "message": "prompt: embeddings a.safetensors has no 'other'"
    }  # fmt: skip
    assert events[-1]["reason"] == "finished"
    np.testing.assert_array_equal(pictures(first + rest), pictures(expected))


def test_not_a_number_ends_the_session_and_no_other(stage, client, engine, monkeypatch):
    sessions = stage()
    bad, good = client(sessions, start("nan", frames=6)), client(sessions, start(frames=6))
    embed = engine.embed
    broken = lambda prompt, negative: (embed(prompt, negative)[0] * (np.nan if prompt == "nan" else 1), None)  # noqa: E731
    monkeypatch.setattr(engine, "embed", broken)
    events, frames = bad.run()
    assert events[-1]["reason"] == "error"
    assert "NaN or infinite" in events[-1]["message"]
    assert not frames
    assert types(good.run()[0])[-3:] == ["block", "block", "ended"]
    after = client(sessions, start(frames=3))
    assert after.run()[0][-1]["reason"] == "finished"


def test_nothing_is_decoded_of_a_session_that_ends_while_its_next_block_is_sent(stage, client, engine, monkeypatch):
    """What was wrong with a block is found when the next one's first call is sent."""
    sessions, decoded, decode, embed = stage(), [], engine.decode, engine.embed
    monkeypatch.setattr(engine, "decode", lambda *x: decoded.append(x) or decode(*x))
    bad = client(sessions, start(frames=9))
    monkeypatch.setattr(engine, "embed", lambda *texts: (embed(*texts)[0] * np.nan, None))
    events, frames = bad.run()
    assert (events[-1]["reason"], frames, len(decoded)) == ("error", [], 1)
    assert (bad.session._decoder, bad.session._past, list(bad.session._under_way)) == (None, {}, [])
    assert sessions.active == 0


def test_an_error_that_nobody_thought_of(stage, client, engine, monkeypatch):
    session = client(stage(), start())
    monkeypatch.setattr(engine, "decode", lambda *_: 1 // 0)
    events, _ = session.run()
    assert events[-1]["message"].startswith("ZeroDivisionError: ")
