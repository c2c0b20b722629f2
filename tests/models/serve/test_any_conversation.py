"""Whatever clients say, and whenever: each message has its answer, nothing follows an end, and all comes to rest."""

import contextlib
import random
from typing import Any

import pytest

from monarchrt.models.serve import Refusal
from monarchrt.models.serve.messages import Pause, Ping, Prompt, Resume, Save, Seek, Start, Step, Stop
from tests.models.serve.conftest import drain

ANSWERS = {Prompt: "prompt", Pause: "paused", Resume: "resumed", Step: "stepping", Seek: "sought", Save: "saved"}


class Talker:
    """A client that says anything, and notes what it is told."""

    def __init__(self, client, rng):
        self.client, self.rng, self.over, self.gone = client, rng, False, False
        self.asked = dict[str, str]()

    def say(self):
        id = f"m{self.rng.getrandbits(60)}"
        kind = self.rng.choice([*ANSWERS, Save, Seek, Ping, Stop])
        more: Any = {
            Prompt: dict(prompt="a dog", recache=self.rng.random() < 0.5, blend=self.rng.choice([0, 0, 2])),
            Seek: dict(block=self.rng.choice([0, 1, 2, 3, 50])),
            Step: dict(blocks=self.rng.choice([1, 3])),
        }
        try:
            self.client.tell(message := kind(id=id, **more.get(kind, {})))
        except Refusal:  # which is an answer
            return
        if kind not in (Ping, Stop):
            self.asked[id] = ANSWERS[type(message)]

    def hear(self):
        for event in drain(self.client.outbox)[0]:
            if (wanted := self.asked.pop(event.get("id"), None)) is not None:
                assert event["type"] in (wanted, "error"), event
            assert not (self.over and event["type"] in ("block", "ended")), event
            self.over |= event["type"] == "ended"


@pytest.mark.parametrize("seed", [*range(8), 439, 462, 473, 481])
def test_any_conversation(stage, client, clock, tmp_path, seed):
    rng = random.Random(seed)
    sessions = stage(sessions=rng.choice([1, 2]), waiting=2, kept=rng.choice([1, 50]), videos=2, idle=50.0, seconds=3.0)
    talkers: list[Talker] = []
    for _ in range(120):
        chance = rng.random()
        if chance < 0.1 and len(talkers) < 6:
            asked: Any = dict(frames=rng.choice([None, 3, 30]), pace=rng.random() < 0.3, paused=rng.random() < 0.2)
            with contextlib.suppress(Refusal):  # as there is no place to wait
                talkers.append(Talker(client(sessions, Start(prompt="a cat", **asked)), rng))
        elif chance < 0.4 and talkers:
            rng.choice(talkers).say()
        elif chance < 0.43 and talkers:
            talker = rng.choice(talkers)
            sessions.close(talker.client.session, "disconnected")
            talker.gone = True
        elif chance < 0.5:
            clock.now += rng.choice([0.1, 1.0, 20.0])
        else:
            sessions.turn()
        for talker in talkers:
            talker.hear()
    for _ in range(4):  # who waits has a place after some time, and is idle after some more
        clock.now += 60.0
        for _ in range(300):
            sessions.turn()
    for talker in talkers:
        talker.hear()
        assert talker.over
        assert talker.gone or not talker.asked
    assert (sessions.active, sessions.waiting, sessions.turn()) == (0, 0, False)
    assert len(list(tmp_path.iterdir())) <= 2
