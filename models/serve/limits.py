"""Limits of what the clients of a server may ask for."""

import dataclasses
from dataclasses import dataclass

from monarchrt.models.errors import UserError

MOST_OF_ALL = 10_000_000  # upper bound of every limit; as seconds, four months


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits for the clients of a server.

    Attributes:
        sessions: Sessions that generate at the same time; each holds a cache of keys and values.
        waiting: Sessions in the queue for one of these places.
        seconds: Seconds of video in a session.
        idle: Seconds without a message after which a session ends.
        prompt: Characters of a prompt.
        message: Bytes of a message.
        kept: Blocks of latents that a session keeps, for `seek` and `save`.
        frames: Frames that wait for a client to read them; the oldest are dropped.
        videos: Saved videos that can be fetched; the oldest are deleted.
        upload: Bytes of an uploaded image or clip.
        uploads: Uploads that wait for their session; the oldest are deleted.

    Raises:
        UserError: If a limit is less than 1 (`waiting`: 0) or more than 10 million.
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
