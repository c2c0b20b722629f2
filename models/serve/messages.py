"""What a client may say to a session, one JSON object a message; and what is wrong with other messages."""

import dataclasses
import json
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, get_args, get_type_hints

from monarchrt.models.errors import UserError, printable

LARGEST_SEED = 2**32 - 1


class Refusal(UserError):
    """A message that is not done; the session goes on.

    Attributes:
        code: A name for programs, such as "invalid" or "full".
        id: The message's, if it had one.
    """

    def __init__(self, message: str, *, code: str = "invalid", id: str | None = None):
        super().__init__(message)
        self.code, self.id = code, id


@dataclass(frozen=True, kw_only=True)
class Message:
    """Any message.

    Attributes:
        id: The client's own name for it, which comes back in the answer.
    """

    type: ClassVar[str]
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Start(Message):
    """Begins the session's video. Sizes, window and sinks are the server's; to name others is an error.

    Attributes:
        prompt: What the video shows.
        negative: What it should not show, for models with guidance; None: the model's own.
        seed: Of all noise.
        frames: Frames of the video, whole blocks of them; None: until it is stopped, or the server's limit.
        height: In pixels.
        width: In pixels.
        window: Latent frames that attention reaches back over.
        sink_frames: Leading latent frames that it never lets go.
        pace: Whether frames are made as fast as they are played, not faster.
        paused: Whether it waits for `resume` or `step`.
        video: How frames go out: "jpeg", one a message, "mp4", a block a message, or "webrtc".
        offer: With "webrtc", the client's description of its connection, SDP with all candidates.
        begin: Of an image or a clip that was sent to `/upload`: the video begins with it.
        attention: Its notation, one of those that the server has; None: the first of them.
    """

    type = "start"
    prompt: str
    negative: str | None = None
    seed: int = 0
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    window: int | None = None
    sink_frames: int | None = None
    pace: bool = True
    paused: bool = False
    video: str = "jpeg"
    offer: str | None = None
    begin: str | None = None
    attention: str | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt(Message):
    """Another text for the blocks that follow.

    Attributes:
        prompt: What the video shows from now on.
        negative: As in `start`.
        recache: Whether keys and values of the frames so far are computed anew, as the new text has them: the change
            is quicker to see.
        blend: Blocks over which the old text's embedding goes over into the new one's.
    """

    type = "prompt"
    prompt: str
    negative: str | None = None
    recache: bool = True
    blend: int = 0


@dataclass(frozen=True, kw_only=True)
class Pause(Message):
    """Makes no more blocks for now."""

    type = "pause"


@dataclass(frozen=True, kw_only=True)
class Resume(Message):
    """Goes on."""

    type = "resume"


@dataclass(frozen=True, kw_only=True)
class Step(Message):
    """Makes some blocks, and is paused after them."""

    type = "step"
    blocks: int = 1


@dataclass(frozen=True, kw_only=True)
class Seek(Message):
    """Goes on at a block again, from the latents before it; those from it on are forgotten."""

    type = "seek"
    block: int


@dataclass(frozen=True, kw_only=True)
class Save(Message):
    """Makes an mp4 of the blocks that are kept, to be fetched."""

    type = "save"


@dataclass(frozen=True, kw_only=True)
class Stop(Message):
    """Ends the session."""

    type = "stop"


@dataclass(frozen=True, kw_only=True)
class Ping(Message):
    """Says that the client is there; the answer is `pong`."""

    type = "ping"


MESSAGES: dict[str, type[Message]] = {
    kind.type: kind for kind in (Start, Prompt, Pause, Resume, Step, Seek, Save, Stop, Ping)
}
LEAST = {"seed": 0, "frames": 1, "height": 1, "width": 1, "window": 1, "sink_frames": 0, "blend": 0, "blocks": 1}
LONGEST_NAME = 100
LONGEST = {"attention": 1000, "offer": 32768}
MOST = {"seed": LARGEST_SEED, "blend": 64, "blocks": 1024, "block": 2**31 - 1}


def parse_message(text: str, *, longest_prompt: int = 4000) -> Message:
    """The message that a client sent.

    Examples:
        >>> parse_message('{"type": "seek", "block": 3}')
        Seek(id=None, block=3)

    Args:
        text: JSON.
        longest_prompt: Characters that a prompt may have.

    Returns:
        The message.

    Raises:
        Refusal: If it is not JSON object, of no known type, lacks a field, or has one that is unknown or out of range.
    """
    try:
        values = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the message is not JSON ({printable(str(error), 80)})") from error
    if not isinstance(values, dict):
        raise Refusal(f'the message is {_shown(values)}; it must be an object such as {{"type": "pause"}}')
    name = values.pop("type", None)
    id = values.get("id")
    id = id if isinstance(id, str) and len(id) <= LONGEST_NAME else None
    kind = MESSAGES.get(name) if isinstance(name, str) else None
    if kind is None:
        raise Refusal(f"type is {_shown(name)}; it must be one of {', '.join(MESSAGES)}", code="unknown_type", id=id)
    try:
        return kind(**_checked(kind, values, longest_prompt))
    except UserError as error:
        raise Refusal(f"{kind.type}: {error}", id=id) from error


def _checked(kind: type[Message], values: dict[str, Any], longest_prompt: int) -> dict[str, Any]:
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name, value in values.items():
        if name not in fields:
            raise UserError(f"field {_shown(name)} is unknown; there are {', '.join(fields)}")
        kinds = get_args(hints[name]) if isinstance(hints[name], UnionType) else (hints[name],)
        if type(value) not in kinds:
            wanted = " or ".join("null" if one is NoneType else one.__name__ for one in kinds)
            raise UserError(f"{name} is {_shown(value)}; it must be {wanted}")
        _check_range(name, value, longest_prompt)
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in values]
    if missing:
        raise UserError(f"{' and '.join(missing)} is missing")
    return values


def _check_range(name: str, value: Any, longest_prompt: int) -> None:
    if isinstance(value, str):
        longest = longest_prompt if name in ("prompt", "negative") else LONGEST.get(name, LONGEST_NAME)
        if len(value) > longest:
            raise UserError(f"{name} has {len(value)} characters; at most {longest} are taken")
        if name == "prompt" and not value.strip():
            raise UserError("prompt is empty; describe what the video shows")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"{name} has half of a surrogate pair, which is not valid text") from None
    elif isinstance(value, int) and not isinstance(value, bool):
        least, most = LEAST.get(name, 0), MOST.get(name, 2**31 - 1)
        if not least <= value <= most:
            raise UserError(f"{name} is {_shown(value)}; it must lie in [{least}, {most}]")


def _shown(value: Any) -> str:
    try:
        return printable(json.dumps(value), 60)
    except (ValueError, RecursionError):
        return "a value that cannot be shown"


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a number")
