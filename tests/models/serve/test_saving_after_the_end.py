"""A video that has come to its end can still be saved, for a while, and holds nobody up; late messages are answered."""

import numpy as np
import pytest

from monarchrt.models.media.video import read_clip
from monarchrt.models.serve import Refusal
from monarchrt.models.serve.messages import Pause, Prompt, Save, Stop
from tests.models.serve.test_session import of, pictures, start, types


def saved(events, sessions):
    (event,) = of(events, "saved")
    return read_clip(sessions.video(event["url"].removeprefix("/video/")), height=8, width=16).astype(int)


def test_a_video_that_is_finished_or_stopped(stage, client):
    """Whole, or as far as it came."""
    sessions = stage()
    whole = client(sessions, start(frames=9))
    events, frames = whole.run()
    assert types(events)[-1] == "ended"
    assert sessions.active == 0
    whole.tell(Save(id="v"))
    events, none = whole.run()
    assert (types(events), none, events[0]["id"]) == (["saved"], [], "v")
    film = saved(events, sessions)
    assert film.shape == (9, 8, 16, 3)
    assert np.abs(film.mean((1, 2)) - pictures(frames).mean((1, 2))).max() < 30
    with pytest.raises(Refusal, match=r"pause: the session has ended \(finished\)"):
        whole.tell(Pause())

    stopped = client(sessions, start())
    stopped.run(turns=2)
    stopped.tell(Stop())
    stopped.run()
    stopped.tell(Save())
    assert len(saved(stopped.run()[0], sessions)) == 6


def test_others_go_on_meanwhile(stage, client):
    """The place is free, and turns alternate."""
    sessions = stage(sessions=1, waiting=0)
    first = client(sessions, start(frames=12))
    first.run()
    second = client(sessions, start(frames=12))
    first.tell(Save())
    for _ in range(4):
        sessions.turn()
    assert second.session.block == 2
    second.run()
    assert len(saved(first.run()[0], sessions)) == 12


def test_only_the_newest_are_kept(stage, client, clock, tmp_path):
    """Who saves takes turns, and is no newer for it."""
    sessions = stage(sessions=2)

    def finished(frames):
        one = client(sessions, start(frames=frames))
        clock.now += 1.0
        while one.session.ended is None:
            sessions.turn()
        return one

    first, second = finished(30), finished(3)
    first.tell(Save(id="v"))
    third, fourth = finished(3), finished(3)
    assert [one.session.keeps for one in (first, second, third, fourth)] == [False, False, True, True]
    (error,) = of(first.run()[0], "error")
    assert (error["id"], error["code"], error["message"]) == ("v", "cannot_save", "save: others took its place")
    assert not list(tmp_path.iterdir())
    with pytest.raises(Refusal, match=r"save: saving has nothing; the session has ended \(finished\)"):
        second.tell(Save())
    fourth.tell(Save())
    sessions.close(fourth.session, "disconnected")
    sessions.turn()
    assert not fourth.session.keeps
    assert not of(fourth.run()[0], "saved")


def test_saving_while_nothing_is_heard(stage, client, clock):
    """The session ends, the file is completed."""
    sessions = stage(idle=5.0)
    one = client(sessions, start())
    one.run(turns=3)
    one.tell(Save(id="v"))
    sessions.turn()
    clock.now += 5.0
    events, _ = one.run()
    assert [event.get("reason", event.get("id")) for event in events[-2:]] == ["idle", "v"]
    assert events[-1]["frames"] == 9


@pytest.mark.parametrize("reason", ["error", "disconnected"])
def test_what_is_broken_off_is_not_kept(stage, client, reason):
    """And it is said of a file that was begun."""
    one = client(stage(), start())
    one.run(turns=2)
    one.tell(Save(id="v"))
    one.sessions.turn()
    one.session.end(reason)
    assert of(one.run()[0], "error")[0]["message"] == f"save: the session has ended ({reason})"
    with pytest.raises(Refusal, match=rf"the session has ended \({reason}\)"):
        one.tell(Save())


def test_messages_that_were_too_late_are_answered(stage, client):
    """They waited while the last block was made; saving is begun."""
    sessions = stage()
    one = client(sessions, start(frames=6))
    while one.session.block < 2:
        sessions.turn()
    one.tell(Prompt(prompt="a dog", id="p"))
    one.tell(Save(id="v"))
    one.tell(Stop())
    events, _ = one.run()
    assert types(events)[-3:] == ["ended", "error", "saved"]
    assert (events[-2]["id"], events[-2]["code"]) == ("p", "no_session")
    assert events[-2]["message"] == "prompt: the session has ended (finished)"
    assert events[-1]["id"] == "v"
    one.session._commands.append(Save(id="w"))  # as by another thread, at that moment
    one.session._answer_late()
    assert one.run()[0][0]["id"] == "w"
