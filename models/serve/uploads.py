"""Uploads: images and clips that videos start with, limited in number, size and time."""

import asyncio
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from aiohttp import web
from jaxtyping import UInt8

from monarchrt.models.errors import UserError, disk_full_reason
from monarchrt.models.files import temporary_folder
from monarchrt.models.media.reading import read_stranger
from monarchrt.models.serve.engine import Engine
from monarchrt.models.serve.limits import Limits

ARRIVING = 8  # uploads in progress at once
ARRIVAL = 60.0  # seconds that an upload may take
KEPT = 300.0  # seconds that an upload is kept for its session
NAME = "upload"  # name of the file in errors


class Uploads:
    """Uploads that no session has used yet.

    Args:
        engine: Determines the size, frame rate and allowed numbers of frames.
        limits: Limits for clients.
        clock: Monotonic time in seconds.
    """

    def __init__(self, engine: Engine, *, limits: Limits, clock: Callable[[], float] = time.monotonic):
        self._engine, self._limits, self._clock = engine, limits, clock
        self._kept: OrderedDict[str, tuple[float, UInt8[np.ndarray, "T H W 3"]]] = OrderedDict()
        self._arriving, self._reading = 0, asyncio.Semaphore(1)

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, name: str) -> UInt8[np.ndarray, "T H W 3"] | None:
        """The frames of an upload; None if the name is unknown or the upload has expired."""
        self._forget()
        return self._kept[name][1] if name in self._kept else None

    def used(self, name: str) -> None:
        """Deletes an upload after a session has taken it."""
        self._kept.pop(name, None)

    def _forget(self) -> None:
        """Deletes uploads that have expired or exceed the limit."""
        old = self._clock() - KEPT
        while self._kept and (len(self._kept) > self._limits.uploads or next(iter(self._kept.values()))[0] < old):
            self._kept.popitem(last=False)

    async def receive(self, request: web.Request) -> web.Response:
        """Handles `POST /upload`: the file is the body, `?frames=` the number of frames to use (default: all that fit).

        Returns:
            JSON with "upload", the name for `start`, and "frames", their number.

        Raises:
            web.HTTPException: If videos cannot start from frames here (404), the upload takes too long (408), is too
                large (413), cannot be read (422) or stored (507), or too many are in progress (503).
        """
        if not self._engine.begins:
            raise web.HTTPNotFound(text="this server starts no videos from images or clips: its --begin is 0\n")
        most, length = self._limits.upload, request.content_length
        if length is not None and length > most:
            raise _too_large(most, length)
        if self._arriving >= ARRIVING:
            raise web.HTTPServiceUnavailable(text=f"{ARRIVING} uploads are on their way; try again\n")
        self._arriving += 1
        try:
            with temporary_folder() as folder:
                path = folder / NAME
                try:
                    async with asyncio.timeout(ARRIVAL):
                        await _save(request, path, most)
                except TimeoutError:
                    raise web.HTTPRequestTimeout(text=f"the upload took more than {ARRIVAL:.0f} s\n") from None
                async with self._reading:
                    frames = await asyncio.to_thread(self._read, path, request.query.get("frames"))
        except OSError as error:
            if (why := disk_full_reason(error)) is None:
                raise
            raise web.HTTPInsufficientStorage(text=f"the upload cannot be stored: {why} on the server\n") from error
        except UserError as error:
            raise web.HTTPUnprocessableEntity(text=f"{error}\n") from error
        finally:
            self._arriving -= 1
        name = secrets.token_urlsafe(12)
        self._kept[name] = self._clock(), frames
        self._forget()
        return web.json_response({"upload": name, "frames": len(frames)})

    def _read(self, path: Path, frames: str | None) -> UInt8[np.ndarray, "T H W 3"]:
        """The frames of a file, scaled to the engine's size; raises UserError if it cannot be used."""
        engine = self._engine
        if frames is not None and not (frames.isascii() and frames.isdigit() and len(frames) < 7):
            raise UserError(f"frames is {frames[:20]!a}; it must be a number")
        # networks without compression in time use the clip's own frame rate
        rate = engine.fps if engine.pipeline.decoder.temporal > 1 else 0.0
        return read_stranger(
            path,
            height=engine.size[0],
            width=engine.size[1],
            counts=engine.begins,
            frames=None if frames is None else int(frames),
            fps=rate,
        )


async def _save(request: web.Request, path: Path, most: int) -> None:
    """Writes a request's body, at most `most` bytes, to a file."""
    written = 0
    with path.open("wb") as file:
        async for piece in request.content.iter_chunked(2**16):
            written += len(piece)
            if written > most:
                raise _too_large(most, written)
            file.write(piece)
    if not written:
        raise UserError("the upload is empty; send the file as the body of the request")


def _too_large(most: int, size: int) -> web.HTTPException:
    return web.HTTPRequestEntityTooLarge(
        max_size=most, actual_size=size, text=f"the upload has {size} bytes or more; at most {most} are taken\n"
    )
