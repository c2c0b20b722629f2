"""What the clients of a server may ask for."""

import dataclasses
from dataclasses import dataclass

from monarchrt.models.errors import UserError

MOST_OF_ALL = 10_000_000  # of what a server may be told, such as four months of seconds


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What clients may ask for.

    Attributes:
        sessions: That make videos at once; each holds a cache of keys and values.
        waiting: That wait for one of these to end.
        seconds: Of video in a session.
        idle: Seconds without a message after which a session ends.
        prompt: Characters of a prompt.
        message: Bytes of a message.
        kept: Blocks of latents that are kept of each, to go back to and to save.
        frames: That wait for a client to read them.
        videos: Saved ones that can be fetched; the oldest goes.
        upload: Bytes of an image or a clip to begin with.
        uploads: Of them that wait for their session; the oldest goes.
    """

    sessions: int = 4
    waiting: int = 16
    seconds: float = 600.0
    idle: float = 300.0
    prompt: int = 4000
    message: int = 65536
    kept: int = 120
    frames: int = 96
    videos: int = 16
    upload: int = 2**23
    uploads: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            least = 0 if field.name == "waiting" else 1
            value = getattr(self, field.name)
            if not least <= value <= MOST_OF_ALL:
                bound = f"at most {MOST_OF_ALL}" if value > least else f"at least {least}"
                raise UserError(f"{field.name} is {value}; it must be {bound}")
