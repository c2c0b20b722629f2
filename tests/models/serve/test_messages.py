"""What clients send, meant and not meant."""

import json

import pytest

from monarchrt.models.serve import Refusal, parse_message
from monarchrt.models.serve.messages import Prompt, Start


def test_messages():
    assert parse_message('{"type": "start", "prompt": "a cat", "seed": 3, "id": "x"}') == Start(
        prompt="a cat", seed=3, id="x"
    )
    text = json.dumps({"type": "prompt", "prompt": "ein Hund 🐕", "negative": None, "recache": False, "blend": 2})
    assert parse_message(text) == Prompt(prompt="ein Hund 🐕", recache=False, blend=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the message is not JSON"),
        ("{", "the message is not JSON"),
        ("[" * 100000, "the message is not JSON"),
        ('{"type": "start", "prompt": "a", "seed": NaN}', r"not JSON \(NaN is not a number\)"),
        ("[]", r'the message is \[\]; it must be an object such as {"type": "pause"}'),
        ("{}", "type is null; it must be one of start, prompt, pause, resume, step, seek, save, stop, ping"),
        ('{"type": {"a": 1}}', 'type is {"a": 1}; it must be one of'),
        ('{"type": "delete"}', 'type is "delete"; it must be one of'),
        ('{"type": "start"}', "start: prompt is missing"),
        ('{"type": "start", "prompt": 3}', "start: prompt is 3; it must be str"),
        ('{"type": "start", "prompt": "  "}', "start: prompt is empty; describe what the video shows"),
        ('{"type": "start", "prompt": "a", "size": 3}', 'start: field "size" is unknown; there are id, prompt, neg'),
        ('{"type": "start", "prompt": "a", "seed": -1}', r"seed is -1; it must lie in \[0, 4294967295\]"),
        ('{"type": "start", "prompt": "a", "seed": 1.5}', "seed is 1.5; it must be int"),
        ('{"type": "start", "prompt": "a", "seed": true}', "seed is true; it must be int"),
        ('{"type": "start", "prompt": "a", "frames": "9"}', 'frames is "9"; it must be int or null'),
        ('{"type": "start", "prompt": "a", "frames": 0}', r"frames is 0; it must lie in \[1, "),
        ('{"type": "start", "prompt": "\\ud800"}', "prompt has half of a surrogate pair"),
        ('{"type": "prompt", "prompt": "a", "blend": 65}', r"prompt: blend is 65; it must lie in \[0, 64\]"),
        ('{"type": "prompt", "prompt": "a", "recache": 1}', "recache is 1; it must be bool"),
        ('{"type": "seek", "block": -1}', r"seek: block is -1; it must lie in \[0, "),
        ('{"type": "step", "blocks": 0}', r"step: blocks is 0; it must lie in \[1, 1024\]"),
        ('{"type": "pause", "id": 3}', "pause: id is 3; it must be str or null"),
        (json.dumps({"type": "ping", "id": "x" * 101}), "ping: id has 101 characters; at most 100 are taken"),
        (json.dumps({"type": "start", "prompt": "x" * 10000}), "prompt has 10000 characters; at most 4000 are taken"),
        (json.dumps({"type": "start", "prompt": "a", "negative": "x" * 4001}), "negative has 4001 characters"),
        (json.dumps({"type": "ping", "x" * 500: 1}), "ping: field"),
        ('{"type": "seek", "block": 1' + "0" * 5000 + "}", "."),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(Refusal, match=message) as caught:
        parse_message(text)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_the_id_comes_back():
    with pytest.raises(Refusal) as caught:
        parse_message('{"type": "seek", "id": "mine"}')
    assert (caught.value.id, caught.value.code) == ("mine", "invalid")


@pytest.mark.parametrize("type", ["ping", "delete"])
def test_an_id_that_is_too_long_does_not(type):
    """A client that sends many, and reads none, would fill the memory."""
    with pytest.raises(Refusal) as caught:
        parse_message(json.dumps({"type": type, "id": "x" * 101}))
    assert caught.value.id is None
