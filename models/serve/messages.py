"""The messages of clients, one JSON object each: parsing and validation."""

import dataclasses
import json
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, ClassVar, get_args, get_type_hints

from monarchrt.models.errors import UserError, printable

LARGEST_SEED = 2**32 - 1


class Refusal(UserError):
    """A message that is refused; the session continues.

    Attributes:
        code: Machine-readable reason, such as "invalid" or "full".
        id: The message's id, if it had one.
    """

    def __init__(self, message: str, *, code: str = "invalid", id: str | None = None):
        super().__init__(message)
        self.code, self.id = code, id


@dataclass(frozen=True, kw_only=True)
class Message:
    """Base class of the messages.

    Attributes:
        id: Chosen by the client; the answer repeats it.
    """

    type: ClassVar[str]
    id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Start(Message):
    """Starts a video. `height`, `width`, `window` and `sink_frames` must be the server's, if given.

    Attributes:
        prompt: What the video shows.
        negative: Negative prompt, for models with guidance; None for the server's.
        seed: Seed of all noise.
        frames: Number of frames, a whole number of blocks; None: until it is stopped or reaches the server's limit.
        height: Height in pixels.
        width: Width in pixels.
        window: Length of the attention window in latent frames.
        sink_frames: First latent frames, which the window never drops.
        pace: Whether to generate at the speed of playback instead of as fast as possible.
        paused: Whether to wait for `resume` or `step` before the first block.
        video: Encoding: "jpeg" (a message for each frame), "mp4" (a message for each block) or "webrtc".
        offer: For "webrtc", the client's SDP offer with all ICE candidates.
        begin: Name of an upload (`/upload`), an image or a clip that the video starts with.
        attention: One of the server's attention settings; None for the first.
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
    """Changes the prompt from the next block on.

    Attributes:
        prompt: What the video shows from now on.
        negative: As in `start`.
        recache: Whether to recompute the cached keys and values with the new text, so that the change shows sooner.
        blend: Number of additional blocks over which the old embedding is interpolated to the new one.
    """

    type = "prompt"
    prompt: str
    negative: str | None = None
    recache: bool = True
    blend: int = 0


@dataclass(frozen=True, kw_only=True)
class Pause(Message):
    """Pauses generation after the current block."""

    type = "pause"


@dataclass(frozen=True, kw_only=True)
class Resume(Message):
    """Resumes generation after `pause` or `step`."""

    type = "resume"


@dataclass(frozen=True, kw_only=True)
class Step(Message):
    """Generates some blocks, then pauses.

    Attributes:
        blocks: Number of blocks, in addition to those of earlier `step` messages that are still to come.
    """

    type = "step"
    blocks: int = 1


@dataclass(frozen=True, kw_only=True)
class Seek(Message):
    """Goes back to a block and generates it again; it and all later blocks are discarded.

    Attributes:
        block: Index of the block; the latents before it that attention needs must still be kept.
    """

    type = "seek"
    block: int


@dataclass(frozen=True, kw_only=True)
class Save(Message):
    """Saves the blocks that are kept as an mp4 on the server, from where it can be fetched."""

    type = "save"


@dataclass(frozen=True, kw_only=True)
class Stop(Message):
    """Ends the session."""

    type = "stop"


@dataclass(frozen=True, kw_only=True)
class Ping(Message):
    """Keeps the session from being idle; the answer is `pong`."""

    type = "ping"


MESSAGES: dict[str, type[Message]] = {
    kind.type: kind for kind in (Start, Prompt, Pause, Resume, Step, Seek, Save, Stop, Ping)
}
LEAST = {"seed": 0, "frames": 1, "height": 1, "width": 1, "window": 1, "sink_frames": 0, "blend": 0, "blocks": 1}
LONGEST_NAME = 100
LONGEST = {"attention": 1000, "offer": 32768}
MOST = {"seed": LARGEST_SEED, "blend": 64, "blocks": 1024, "block": 2**31 - 1}


def parse_message(text: str, *, longest_prompt: int = 4000) -> Message:
    """Parses a client's message.

    Examples:
        >>> parse_message('{"type": "seek", "block": 3}')
        Seek(id=None, block=3)

    Args:
        text: JSON.
        longest_prompt: Characters that a prompt may have.

    Returns:
        The message, with all values checked.

    Raises:
        Refusal: If it is not a JSON object, its type is unknown, or a field is missing, unknown or out of range.
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
