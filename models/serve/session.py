"""One client's video, a state machine of turns: each starts a block or handles messages. No networking, no threads."""

import contextlib
import secrets
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from monarchrt.models.errors import UserError, disk_full_reason, printable
from monarchrt.models.generate.decoders import to_host
from monarchrt.models.media.writer import Mp4Writer
from monarchrt.models.sampling import LiveRollout
from monarchrt.models.serve.engine import Engine, blended
from monarchrt.models.serve.limits import Limits
from monarchrt.models.serve.messages import Message, Pause, Ping, Prompt, Refusal, Resume, Save, Seek, Start, Step, Stop
from monarchrt.models.serve.outbox import Outbox
from monarchrt.models.web.encodings import ENCODINGS, Encoding

MOST_COMMANDS = 16  # messages of a session that may wait for its next turn
AT_ONCE = float("-inf")
KEEPING = ("finished", "longest", "stopped", "idle")  # reasons of ending after which the video can still be saved
AHEAD = 1.0  # seconds that a paced video is generated ahead of playback
WARMED = 2  # blocks that are decoded again before a seek's target, for the decoder's state

type Texts = tuple[Array, Array | None]
type Submit = Callable[..., bytes | Future[Any]]


def at_once(encode: Callable[..., bytes], *arguments: Any) -> bytes:
    """Encodes in the calling thread; a pool's `submit` would do it while the next block is generated."""
    return encode(*arguments)


@dataclass
class Observed:
    """Receives measurements and ignores them; `Metrics` overrides it."""

    def block(self, seconds: float, frames: int) -> None:
        """A block was generated in `seconds`."""

    def dropped(self, frames: int) -> None:
        """Frames were dropped."""

    def ended(self, reason: str) -> None:
        """A session has ended."""


@dataclass(kw_only=True)
class Block:
    """A block whose computation was dispatched.

    Attributes:
        number: Index in the video.
        latents: The network's latents; on the host if they were encoded from given frames.
        frames: The decoder's frames.
        finite: Whether latents and frames are finite.
        began: Time of dispatch, by the session's clock.
        done: Whether its frames were handed out, or its session has ended.
    """

    number: int
    latents: Array | np.ndarray
    frames: Array
    finite: Array
    began: float
    done: bool = False

    def wait(self) -> None:
        """Waits until the network has computed it; errors are raised where the results are fetched, not here."""
        with contextlib.suppress(Exception):
            jax.block_until_ready(self.latents)


class Session:
    """A video that is being generated, controlled by its client's messages.

    Args:
        engine: Shared by all sessions.
        start: The client's first message.
        outbox: Receives events and frames.
        limits: Limits for the client.
        clock: Monotonic time in seconds.
        folder: Where videos are saved; None: `save` is refused.
        observed: Receives measurements.
        submit: Runs the encoder: `at_once`, or the `submit` of a thread pool.
        begin: Frames that the video starts with, of the engine's size.
        encoding: Encoding of the frames; None: the one that `start` names.

    Attributes:
        name: Random name of the session.
        outbox: As given.
        ended: Reason why the session has ended; None while it is running.
        ended_at: Time of the end, by its clock.
        heard: Time of the last message, by its clock.
        block: Index of the next block to generate.
        sent: Number of blocks handed out, up to the newest; a seek lowers it.
        saved: Files of saved videos.

    Raises:
        Refusal: If `start` asks for another size, window, attention setting or encoding than the server has, or for
            more than the limits allow.
    """

    def __init__(
        self,
        engine: Engine,
        start: Start,
        outbox: Outbox,
        *,
        limits: Limits,
        clock: Callable[[], float],
        folder: Path | None = None,
        observed: Observed | None = None,
        submit: Submit = at_once,
        begin: UInt8[np.ndarray, "T H W 3"] | None = None,
        encoding: Encoding | None = None,
    ):
        self._engine, self._start, self.outbox, self._limits, self._clock = engine, start, outbox, limits, clock
        self._folder, self._observed, self._submit, self._begin_with = folder, observed or Observed(), submit, begin
        self.name, self.ended, self.block, self.sent = secrets.token_hex(4), None, 0, 0
        self._last, self._why_last = self._check(start)
        self._encoding, self._given = encoding or self._encoding_of(start), dict[int, np.ndarray]()
        self._commands: deque[Message] = deque()
        self.heard = self.ended_at = clock()
        self._playing, self._steps, self._drops = not start.paused, 0, 0
        self._video: LiveRollout | None = None
        self._decoder: Any = None
        self._past: dict[int, Array | np.ndarray] = {}  # latents by block; on the host once their block is finished
        self._under_way: deque[Block] = deque()
        self._texts: Texts | None = None
        self._blend: Iterator[tuple[Texts, bool]] | None = None
        self._mixed = -1  # index of the block for which the text last changed
        self._saving: Iterator[None] | None = None
        self._saved_for: str | None = None  # id of the `save` message
        self._begin, self._shown = clock(), 0  # start of playback, and frames generated, since the last pause or seek
        self.saved: list[Path] = []
        self._left: str | None = None

    def _check(self, start: Start) -> tuple[int, str]:
        """The number of blocks of the video, and the reason for ending there."""
        engine = self._engine
        served = dict(
            height=engine.size[0],
            width=engine.size[1],
            window=engine.window,
            sink_frames=engine.rollout.sink_frames,
        )
        for name, value in served.items():
            wanted = getattr(start, name)
            if wanted not in (None, value):
                raise Refusal(
                    f"start: {name} is {wanted}, which would need another compiled program; this server's {name} is "
                    f"{value}",
                    code="other_program",
                    id=start.id,
                )
        try:
            engine.attention(start.attention)
            given = 0 if self._begin_with is None else engine.begins_with(self._begin_with)
        except UserError as error:
            code = error.code if isinstance(error, Refusal) else "invalid"
            raise Refusal(f"start: {error}", code=code, id=start.id) from error
        last, why = self._find_last(start)
        if given >= last:
            raise Refusal(
                f"start: the video starts with {engine.frames(given)} frames, which leaves none of the "
                f"{engine.frames(last)} to generate; ask for {engine.frames(given + 1)} or more",
                id=start.id,
            )
        return last, why

    def _encoding_of(self, start: Start) -> Encoding:
        """The encoding that `start` names."""
        if start.video not in (formats := self._engine.formats()):
            known = "cannot be made here" if start.video in ENCODINGS else "is unknown"
            raise Refusal(f"start: video {start.video!a} {known}; there is {', '.join(formats)}", id=start.id)
        if start.offer is not None:
            raise Refusal(f"start: offer has no effect with video {start.video!a}; leave it out", id=start.id)
        return ENCODINGS[start.video]

    def _find_last(self, start: Start) -> tuple[int, str]:
        """As `_check`, from the requested number of frames and the limits."""
        engine = self._engine
        most = int(self._limits.seconds * engine.fps)
        if start.frames is not None:
            if start.frames > most:
                raise Refusal(
                    f"start: frames is {start.frames}; a session makes at most {most}", code="too_long", id=start.id
                )
            try:
                return engine.blocks(start.frames), "finished"
            except UserError as error:
                raise Refusal(f"start: {error}", id=start.id) from error
        return max(1, engine.most_blocks(most)), "longest"

    # Called from any thread

    def tell(self, message: Message) -> None:
        """Queues a message for the session's next turn; `ping` is answered at once.

        Raises:
            Refusal: If it is another `start`, too many messages wait, or the session has ended (except for `save`).
        """
        self.heard = self._clock()
        if isinstance(message, Ping):
            self.outbox.event("pong", id=message.id)
        elif self.ended is not None:
            self._tell_ended(message)
        elif isinstance(message, Start):
            raise Refusal("start: this session has begun; stop it, or open another", code="begun", id=message.id)
        elif len(self._commands) >= MOST_COMMANDS and not isinstance(message, Stop):
            raise Refusal(f"{message.type}: {MOST_COMMANDS} messages are already waiting", code="busy", id=message.id)
        else:
            self._commands.append(message)
            if self.ended is not None:  # another thread has ended it meanwhile
                self._answer_late()

    def _tell_ended(self, message: Message) -> None:
        """Handles a message after the end: only `save` is possible, while latents are kept."""
        if not isinstance(message, Save):
            raise Refusal(f"{message.type}: the session has ended ({self.ended})", code="no_session", id=message.id)
        try:
            self._begin_saving(message)
        except Refusal as refusal:
            said = f"{refusal}; the session has ended ({self.ended})"
            raise Refusal(said, code=refusal.code, id=message.id) from refusal

    def due(self) -> float | None:
        """The time from which it wants a turn, by its clock; None if there is nothing left to do."""
        if self.ended is not None:
            return None if self._saving is None else AT_ONCE
        if self._left or self._commands or self._saving is not None:
            return AT_ONCE
        if self.block >= self._last:  # the last block was dispatched
            return None
        if self._steps:
            return AT_ONCE
        idle = self.heard + self._limits.idle
        if not self._playing:
            return idle
        paced = self._begin + self._shown / self._engine.fps - AHEAD
        return min(idle, paced if self._start.pace else AT_ONCE)

    def leave(self, reason: str) -> None:
        """Ends the session at its next turn, because the client has disconnected."""
        self._left = reason
        if self.ended is not None:
            self.forget("the connection is gone")

    def welcome(self) -> None:
        """Sends "started": the session has a place and may generate."""
        engine, self.heard = self._engine, self._clock()
        frames = None if self._start.frames is None else engine.frames(self._last)
        self.outbox.event(
            "started",
            id=self._start.id,
            session=self.name,
            fps=engine.fps,
            frames=frames,
            playing=self._playing,
            video=self._start.video,
            mime=self._encoding.mime(*engine.size, engine.fps),
            attention=engine.attention(self._start.attention),
        )

    def give_up_waiting(self) -> None:
        """Ends a session in the queue whose client has disconnected or sent `stop`."""
        if self._left is not None or any(isinstance(message, Stop) for message in self._commands):
            self.end(self._left or "stopped")

    # Called from the thread that computes

    def turn(self, *, free: float = 0.0, meanwhile: Callable[[], object] | None = None) -> Block | None:
        """Handles messages, then dispatches a block if one is due; `finish` hands it out.

        Messages are handled after the blocks under way are finished. An error ends this session only.

        Args:
            free: As in `finish`.
            meanwhile: Called once the first part of the block is dispatched, while the device computes it.

        Returns:
            The block; None if none was dispatched.
        """
        try:
            if self.ended is not None:
                self._go_on_saving()
                return None
            if self._left is not None or self._commands or self._saving is not None:
                while self._under_way:
                    self.finish(self._under_way[0], free=free)
            if self._left is not None:
                self.end(self._left)
            while self._commands and self.ended is None:
                self._do(message := self._commands.popleft())
                if isinstance(message, Prompt | Seek):  # may recompute the cache, which takes time: one per turn
                    break
            if self.ended is not None:
                return None
            if self._clock() - self.heard >= self._limits.idle:
                self.end("idle", message=f"nothing was heard for {self._limits.idle:.0f} s")
            elif self._saving is not None:
                self._go_on_saving()
            elif (self._playing or self._steps) and self.block < self._last:
                return self._begin_block(meanwhile)
        except Exception as error:
            self._fail(error)
        return None

    def finish(self, block: Block, *, free: float = 0.0) -> None:
        """Waits for the oldest block under way, which must be `block`, and hands out its frames.

        Args:
            block: From `turn`; nothing happens if it is done.
            free: Time at which the device finished the previous block of any session, for measurements.
        """
        if block.done:
            return
        try:
            self._finish(self._under_way.popleft(), free)
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        """Ends the session because of an error."""
        message = " ".join(str(error).split())
        self.end(
            "error", message=message if isinstance(error, UserError) else f"{type(error).__name__}: {message[:300]}"
        )

    def end(self, reason: str, *, message: str | None = None) -> None:
        """Ends the session and frees its memory; unless it failed or was disconnected, latents are kept for `save`."""
        if self.ended is not None:
            return
        self.ended, self.ended_at = reason, self._clock()
        self._video = self._decoder = self._texts = self._blend = self._begin_with = None
        for block in self._under_way:
            block.done = True
        self._under_way.clear()
        self._given.clear()
        if reason not in KEEPING or self._folder is None:
            self.forget(f"the session has ended ({reason})")
        self._observed.ended(reason)
        self.outbox.event("ended", reason=reason, message=message, blocks=self.sent)
        self._answer_late()

    def _answer_late(self) -> None:
        """Answers the messages that still waited at the end."""
        while self._commands:
            message = self._commands.popleft()
            try:
                if not isinstance(message, Stop):
                    self._tell_ended(message)
            except Refusal as refusal:
                self.outbox.event("error", id=message.id, code=refusal.code, message=str(refusal))

    @property
    def keeps(self) -> bool:
        """Whether latents are kept for `save`, or it is running."""
        return bool(self._past) or self._saving is not None

    def forget(self, why: str) -> None:
        """Frees the latents kept for `save`; a `save` that is running fails with this reason."""
        if self._saving is not None:
            self.outbox.event("error", id=self._saved_for, code="cannot_save", message=f"save: {why}")
        self._past.clear()
        self._saving = None

    def _do(self, message: Message) -> None:
        try:
            if isinstance(message, Prompt):
                self._change_prompt(message)
            elif isinstance(message, Seek):
                self._seek(message)
            elif isinstance(message, Save):
                self._begin_saving(message)
            elif isinstance(message, Stop):
                self.end("stopped")
            elif isinstance(message, Step):
                self._playing, self._steps = False, self._steps + message.blocks
                self.outbox.event("stepping", id=message.id, block=self.block, blocks=self._steps)
            elif isinstance(message, Pause | Resume):
                self._playing, self._steps = isinstance(message, Resume), 0
                if self._playing:
                    self._begin, self._shown = self._clock() + AHEAD, 0
                self.outbox.event("resumed" if self._playing else "paused", id=message.id, block=self.block)
        except UserError as error:  # the session continues unchanged
            code, said = ("invalid", f"{message.type}: {error}")
            if isinstance(error, Refusal):
                code, said = error.code, str(error)
            self.outbox.event("error", id=message.id, code=code, message=said)

    def _begun(self) -> LiveRollout:
        """The roll-out, which is created at the first call."""
        if self._video is None:
            self._texts = self._engine.embed(self._start.prompt, self._start.negative)
            self._video = self._engine.video(self._texts, self._start.seed, attention=self._start.attention)
            if self._begin_with is not None:
                self._given = dict(enumerate(self._engine.encode(self._begin_with)))
                self._begin_with = None
            self._begin = self._clock()
        return self._video

    def _change_prompt(self, message: Prompt) -> None:
        video, steps = self._begun(), message.blend + 1
        new = self._engine.embed(message.prompt, message.negative)
        old = self._texts or new  # set by _begun
        shares = [n / steps for n in range(1, steps + 1)]
        self._blend = iter([(new if share == 1 else blended(old, new, share), message.recache) for share in shares])
        self._mix(video)
        self.outbox.event(
            "prompt",
            id=message.id,
            prompt=message.prompt,
            block=self.block,
            frame=self._engine.frames(self.block),
            recache=message.recache,
            blend=message.blend,
        )

    def _mix(self, video: LiveRollout) -> None:
        """Sets the next interpolated text, while the prompt is being blended."""
        if self._blend is None or (following := next(self._blend, None)) is None:
            self._blend = None
            return
        (self._texts, recache), self._mixed = following, self.block
        video.set_text(*self._texts)
        if recache:
            video.recache(video.frame, self._latents())

    def _latents(self) -> dict[int, Array | np.ndarray]:
        """The latents that are kept, by the index of their first latent frame."""
        return {self._engine.first_latent(block): latents for block, latents in self._past.items()}

    def _begin_block(self, meanwhile: Callable[[], object] | None) -> Block | None:
        """Dispatches the next block without waiting for it; None if the session ends meanwhile."""
        video, began = self._begun(), self._clock()
        if self._mixed != self.block:
            self._mix(video)
        latents: Array | np.ndarray
        if (given := self._given.get(self.block)) is None:
            latents = video.generate(meanwhile=meanwhile)
        else:
            latents = given
            video.write(jnp.asarray(given))
        if self.ended is not None:  # by an error in the previous block
            return None
        if self._decoder is None:  # created here, while the network computes
            self._decoder = self._engine.start_decoder()
        frames, finite, self._decoder = self._engine.decode(latents, self._decoder)
        to_host(finite, latents, frames)
        block = Block(number=self.block, latents=latents, frames=frames, finite=finite, began=began)
        self._under_way.append(block)
        self._past[self.block] = latents
        self._forget()
        self.block += 1
        self._steps, self._shown = max(0, self._steps - 1), self._shown + frames.shape[1]
        return block

    def _finish(self, block: Block, free: float) -> None:
        """Fetches a block, sends it, and ends the session after the last one."""
        block.done = True
        if not block.finite:
            raise UserError("the frames are NaN or infinite; check the checkpoint's weights, or use precision fp32")
        number, first = block.number, self._engine.frames(block.number)
        if number in self._past:
            self._past[number] = np.asarray(block.latents)
        pictures = np.asarray(block.frames)[0]
        seconds = self._clock() - max(block.began, free)
        self.sent = number + 1
        waiting = len(self.outbox)
        self.outbox.event(
            "block", block=number, frame=first, frames=len(pictures), ms=round(1000 * seconds, 1), waiting=waiting
        )
        self._send(first, number, pictures)
        self._observed.block(seconds, len(pictures))
        dropped, self._drops = self.outbox.dropped - self._drops, self.outbox.dropped
        self._observed.dropped(dropped)
        if self.sent >= self._last:
            longest = f"a session's video has at most {self._limits.seconds:.0f} s"
            self.end(self._why_last, message=longest if self._why_last == "longest" else None)

    def _send(self, first: int, block: int, pictures: UInt8[np.ndarray, "t H W 3"]) -> None:
        """Submits frames to the encoder and adds them to the outbox."""
        encoding, fps, size = self._encoding, self._engine.fps, len(pictures) if self._encoding.by_block else 1
        for index in range(0, len(pictures), size):
            encoded = self._submit(encoding.encode, pictures[index : index + size], first + index, fps)
            self.outbox.pictures(first + index, block, encoded, frames=size)

    def _forget(self) -> None:
        """Drops the oldest block of latents beyond the limit; never sinks or blocks in the attention window."""
        sinks = self._engine.rollout.sink_frames
        window = -(-self._engine.window // self._engine.rollout.block) + 1
        if len(self._past) > max(self._limits.kept, window + sinks):
            del self._past[next(block for block in self._past if self._engine.first_latent(block) >= sinks)]

    def _kept(self) -> list[int]:
        """Indices of the consecutive blocks of latents that are kept, up to the newest."""
        first = self.block
        while first - 1 in self._past:
            first -= 1
        return list(range(first, self.block))

    def _seek(self, message: Seek) -> None:
        """Goes back to a block; raises Refusal if latents that it needs are no longer kept."""
        video, kept = self._begun(), self._kept()
        frame = self._engine.first_latent(message.block)
        have = self._latents()
        if message.block > self.block or any(start not in have for start in video.past_of(frame)):
            last = f"; blocks {kept[0]} to {kept[-1]} are kept" if kept else "; none is made yet"
            raise Refusal(f"seek: block is {message.block}, which cannot be returned to{last}", code="not_kept")
        video.recache(frame, have)
        for block in [block for block in self._past if block >= message.block]:
            del self._past[block]
        self.block = self.sent = message.block
        self._decoder = self._engine.start_decoder()
        for block in [block for block in range(self.block - WARMED, self.block) if block in self._past]:
            *_, self._decoder = self._engine.decode(self._past[block], self._decoder)
        self._begin, self._shown = self._clock() + AHEAD, 0
        self.outbox.clear_frames()
        self.outbox.event("sought", id=message.id, block=self.block, frame=self._engine.frames(self.block))

    def _begin_saving(self, message: Save) -> None:
        """Starts to save, a block per turn; raises Refusal if that is not possible."""
        if self._folder is None or self._saving is not None or not (kept := self._kept()):
            why = "is not on" if self._folder is None else "has nothing" if self._saving is None else "is under way"
            raise Refusal(f"save: saving {why}", code="cannot_save")
        path = self._folder / f"{secrets.token_urlsafe(12)}.mp4"
        self._saving, self._saved_for = self._save(message, kept, path), message.id

    def _go_on_saving(self) -> None:
        """Saves one more block; an error, such as a full disk, is reported and does not end the session."""
        try:
            if self._saving is not None and next(self._saving, self) is self:
                self._saving = None
        except Exception as error:
            self._saving, said = None, " ".join(str(error).split())[:300]
            said = said if isinstance(error, UserError) else f"{type(error).__name__}: {said}"
            if why := disk_full_reason(error):  # without the server's path and the advice for its owner
                said = f"{why} on the server"
            self.outbox.event("error", id=self._saved_for, code="cannot_save", message=f"save: {said}")

    def _save(self, message: Save, blocks: list[int], path: Path) -> Iterator[None]:
        """Decodes the kept blocks again and writes them, one for each `next`; an incomplete file is deleted."""
        state = self._engine.start_decoder()
        kept = {block: self._past[block] for block in blocks}
        try:
            with Mp4Writer(path, fps=self._engine.fps, title=printable(self._start.prompt, 200)) as writer:
                for latents in kept.values():
                    frames, _, state = self._engine.decode(latents, state)
                    writer.write(np.asarray(jax.device_get(frames))[0])
                    yield
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        self.saved.append(path)
        self.outbox.event(
            "saved",
            id=message.id,
            url=f"/video/{path.name}",
            frames=writer.frames,
            block=blocks[0],
            bytes=path.stat().st_size,
        )
