"""Schedules sessions on one device: turns of one block each, a queue for places, and limits."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from monarchrt.models.serve.engine import Engine
from monarchrt.models.serve.limits import Limits
from monarchrt.models.serve.messages import Message, Refusal, Start
from monarchrt.models.serve.outbox import Outbox
from monarchrt.models.serve.session import Block, Observed, Session, Submit, at_once
from monarchrt.models.web.encodings import Encoding


class Sessions:
    """The sessions of an engine. `turn` and `run` must be called from a single thread, other methods from any.

    Examples:
        >>> sessions = Sessions(engine, limits=Limits())  # doctest: +SKIP
        >>> outbox = Outbox(frames=96)  # doctest: +SKIP
        >>> session = sessions.open(Start(prompt="a cat"), outbox)  # doctest: +SKIP
        >>> while sessions.turn():  # doctest: +SKIP
        ...     print(outbox.take())

    Args:
        engine: Generates the videos.
        limits: Limits for clients.
        clock: Monotonic time in seconds.
        folder: Where videos are saved; None: `save` is refused.
        observed: Receives measurements.
        submit: Runs the encoder: `at_once`, or the `submit` of a thread pool.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        folder: Path | None = None,
        observed: Observed | None = None,
        submit: Submit = at_once,
    ):
        self.engine, self.limits = engine, limits
        self._clock, self._folder, self._observed, self._submit = clock, folder, observed or Observed(), submit
        self._active: list[Session] = []  # also sessions that have ended, but can still save
        self._waiting: list[Session] = []
        self._videos: list[Path] = []
        self._under_way: tuple[Session, Block] | None = None
        self._free = clock()  # time at which the device finished the last block
        self._changed = threading.Condition()
        self._closing: str | None = None

    @property
    def active(self) -> int:
        """Number of sessions that have a place."""
        return sum(session.ended is None for session in list(self._active))

    @property
    def waiting(self) -> int:
        """Number of sessions in the queue."""
        return sum(session.ended is None for session in list(self._waiting))

    @property
    def frames_waiting(self) -> int:
        """Number of frames that clients have not read yet."""
        return sum(len(session.outbox) for session in list(self._active) if session.ended is None)

    def open(
        self,
        start: Start,
        outbox: Outbox,
        *,
        begin: UInt8[np.ndarray, "T H W 3"] | None = None,
        encoding: Encoding | None = None,
    ) -> Session:
        """Opens a session, which starts at once or waits in the queue for a place.

        Args:
            start: The client's message; its `begin` is ignored, the caller passes the frames.
            outbox: Receives events and frames.
            begin: Frames that the video starts with, of the engine's size; their number is one of `engine.begins`.
            encoding: Encoding of the frames; None: the one that `start` names.

        Returns:
            The session.

        Raises:
            Refusal: If the queue is full, the server is closing, or the message cannot be satisfied.
        """
        with self._changed:
            if self._closing is not None:
                raise Refusal(f"start: the server is closing ({self._closing})", code="closing", id=start.id)
            self._seat()  # sessions that have just ended free their places
            if self.active >= self.limits.sessions and len(self._waiting) >= self.limits.waiting:
                raise Refusal(
                    f"start: {self.active} sessions are active and {len(self._waiting)} wait; try again later",
                    code="full",
                    id=start.id,
                )
            session = Session(
                self.engine,
                start,
                outbox,
                limits=self.limits,
                clock=self._clock,
                folder=self._folder,
                observed=self._observed,
                submit=self._submit,
                begin=begin,
                encoding=encoding,
            )
            self._waiting.append(session)
            self._seat()
            if session in self._waiting:
                outbox.event("queued", id=start.id, session=session.name, position=len(self._waiting))
            self._changed.notify_all()
        return session

    def tell(self, session: Session, message: Message) -> None:
        """Queues a message for a session, as `Session.tell`.

        Raises:
            Refusal: If the session cannot take it.
        """
        with self._changed:
            session.tell(message)
            self._changed.notify_all()

    def close(self, session: Session, reason: str) -> None:
        """Ends a session whose client has disconnected; a block that is being generated is completed first."""
        with self._changed:
            session.leave(reason)
            self._changed.notify_all()

    def turn(self) -> bool:
        """Gives a turn to the session that is due and has waited longest.

        The frames of a block are fetched while the next block, of this or another session, is being dispatched: after
        its first programs, so that the device is busy, and before the last, so that the copy does not wait behind all
        of them. The turn ends when the network has computed the new block.

        Returns:
            Whether there was anything to do.
        """
        with self._changed:
            self._seat()
            now = self._clock()
            due = [session for session in self._active if (at := session.due()) is not None and at <= now]
            if not due and self._under_way is None:
                return False
            if due:
                self._active.remove(due[0])  # moves to the end
                self._active.append(due[0])
        begun = due[0].turn(free=self._free, meanwhile=self.finish) if due else None
        self.finish(None if begun is None else (due[0], begun))
        with self._changed:
            for session in due[:1]:
                self._keep_videos(session)
            self._seat()
        return True

    def finish(self, following: tuple[Session, Block] | None = None) -> None:
        """Hands out the block under way, while the following one is computed; in the thread of turns."""
        (session, block), self._under_way = self._under_way or (None, None), following
        if session is not None and block is not None:
            session.finish(block, free=self._free)
            self._free = self._clock()
            with self._changed:
                self._seat()
        if following is not None:
            following[1].wait()

    def run(self) -> None:
        """Gives turns until `shut` is called, then ends all sessions; for a thread of its own."""
        while self._closing is None:
            if not self.turn():
                with self._changed:
                    self._changed.wait(timeout=self._until_due())
        self.finish()
        with self._changed:
            for session in [*self._active, *self._waiting]:
                session.end(self._closing)
            self._active, self._waiting = [], []

    def shut(self, reason: str) -> None:
        """Makes `run` end all sessions, after the current block, with this reason."""
        with self._changed:
            self._closing = self._closing or reason
            self._changed.notify_all()

    def _until_due(self) -> float:
        """Seconds until a session is due, at most 1."""
        times = [at for session in self._active if (at := session.due()) is not None]
        return 0.0 if self._closing else min(max(0.0, min(times, default=1.0) - self._clock()), 1.0)

    def _seat(self) -> None:
        """Removes sessions that have ended, gives free places to the queue, and sends clients their new positions."""
        before = list(self._waiting)
        over = [session for session in self._active if session.ended is not None and session.keeps]
        for session in sorted(over, key=lambda session: session.ended_at)[: -self.limits.sessions]:
            session.forget("others took its place")
        self._active = [session for session in self._active if session.ended is None or session.keeps]
        for session in list(self._waiting):
            session.give_up_waiting()
        self._waiting = [session for session in self._waiting if session.ended is None]
        while self._waiting and self.active < self.limits.sessions:
            session = self._waiting.pop(0)
            session.welcome()
            self._active.append(session)
        for position, session in enumerate(self._waiting, 1):
            if session in before and before.index(session) != position - 1:
                session.outbox.event("queued", session=session.name, position=position)

    def _keep_videos(self, session: Session) -> None:
        """Registers the videos that a session saved; deletes the oldest beyond the limit."""
        self._videos += session.saved
        session.saved.clear()
        while len(self._videos) > self.limits.videos:
            self._videos.pop(0).unlink(missing_ok=True)

    def video(self, name: str) -> Path | None:
        """The file of a saved video; None if there is no video of this name."""
        with self._changed:
            fresh = [path for session in self._active for path in session.saved]
            return next((path for path in [*self._videos, *fresh] if path.name == name), None)
