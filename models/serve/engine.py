"""What all sessions share: the network, the decoder and the text encoder, loaded once, and one set of programs."""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import NEGATIVE_PROMPT
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.sampling import LiveRollout, Rollout

KEPT_TEXTS = 64

type Encode = Callable[[Sequence[str]], Sequence[Float[Array, "1 L E"]]]


class Engine:
    """Makes videos of one size, with one set of compiled programs for all of them.

    Args:
        pipeline: Network and decoder.
        rollout: How blocks are made; it needs a window.
        height: Of the latents.
        width: Of the latents.
        encode: Prompts to embeddings, all of one shape.
        fps: Frames per second of play.
        negative: The prompt of what is not wanted, if nothing else is said.
        sample: A prompt that `encode` knows, to compile with.

    Raises:
        UserError: If the roll-out has no window.
    """

    def __init__(
        self,
        pipeline: VideoPipeline,
        *,
        rollout: Rollout,
        height: int,
        width: int,
        encode: Encode,
        fps: float = 16.0,
        negative: str = NEGATIVE_PROMPT,
        sample: str = "a cat",
    ):
        if rollout.window is None:
            raise UserError("sessions may go on without end, for which attention needs a --window, such as 21")
        self.pipeline, self.rollout, self.fps, self.latents = pipeline, rollout, fps, (height, width)
        self._encode, self._negative, self._sample = encode, negative, sample
        self._texts: OrderedDict[str, Array] = OrderedDict()
        self._finite = jax.jit(lambda latents, decoded: jnp.isfinite(latents).all() & decoded)

    @property
    def window(self) -> int:
        """Latent frames that attention reaches back over."""
        return self.rollout.window or 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        spatial = self.pipeline.decoder.spatial
        return self.latents[0] * spatial, self.latents[1] * spatial

    def count(self, block: int) -> int:
        """Latent frames of a block."""
        return 1 if self.rollout.independent_first_frame and not block else self.rollout.block

    def first_latent(self, block: int) -> int:
        """Index of a block's first latent frame; `first_latent(n)` is also how many the first n blocks have."""
        return 0 if not block else self.count(0) + (block - 1) * self.rollout.block

    def frames(self, blocks: int) -> int:
        """Frames of the first blocks of a video."""
        return 0 if not blocks else 1 + (self.first_latent(blocks) - 1) * self.pipeline.decoder.temporal

    def blocks(self, frames: int) -> int:
        """Blocks that make so many frames.

        Raises:
            UserError: If they do not; names the numbers nearby that do.
        """
        blocks = self.most_blocks(frames)
        if not blocks or self.frames(blocks) != frames:
            near = [self.frames(n) for n in (blocks, blocks + 1) if n]
            raise UserError(f"frames is {frames}, which do not make whole blocks; {' or '.join(map(str, near))} do")
        return blocks

    def most_blocks(self, frames: int) -> int:
        """Blocks that make at most so many frames."""
        return bisect.bisect_right(range(frames + 1), frames, key=self.frames) - 1

    def embed(self, prompt: str, negative: str | None) -> tuple[Array, Array | None]:
        """Embeddings of a prompt and, with guidance, of the negative one; those of late are kept."""
        if self.rollout.guidance == 1.0:
            return self._embedded(prompt), None
        return self._embedded(prompt), self._embedded(self._negative if negative is None else negative)

    def _embedded(self, prompt: str) -> Array:
        if prompt not in self._texts:
            self._texts[prompt] = self._encode([prompt])[0]
            if len(self._texts) > KEPT_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(prompt)
        return self._texts[prompt]

    def video(self, texts: tuple[Array, Array | None], seed: int) -> LiveRollout:
        """A video to be made."""
        height, width = self.latents
        return LiveRollout(
            self.pipeline.model,
            texts[0],
            negative=texts[1],
            height=height,
            width=width,
            key=jax.random.key(seed),
            rollout=self.rollout,
        )

    def start_decoder(self) -> Any:
        """The decoder's state before the first latents."""
        return self.pipeline.decoder.start(1, *self.latents)

    def decode(
        self, latents: Float[Array | np.ndarray, "1 F h w C"], state: Any
    ) -> tuple[UInt8[Array, "1 T H W 3"], Bool[Array, ""], Any]:
        """Frames, whether they and the latents are numbers, and the state after; dispatched, not waited for."""
        decoder, latents = self.pipeline.decoder, jnp.asarray(latents)
        frames, state = decoder.decode(latents, state)
        return frames, self._finite(latents, decoder.finite(state)), state

    def warm_up(self) -> None:
        """Compiles everything that sessions run: blocks, another text, computing the past anew, decoding."""
        texts = self.embed(self._sample, None)
        video, state, past = self.video(texts, 0), self.start_decoder(), {}
        needed = -(-self.window // self.rollout.block) + 2  # until frames are let go
        for number in range(needed):
            frame = video.frame
            past[frame] = np.asarray(video.generate())
            if number < 2:
                _, finite, state = self.decode(past[frame], state)
                finite.block_until_ready()
        video.set_text(*blended(texts, texts, 0.5))
        video.recache(video.frame, past)
        jax.block_until_ready(video.generate())


def blended(old: tuple[Array, Array | None], new: tuple[Array, Array | None], share: float) -> tuple[Array, Any]:
    """Embeddings between two pairs of them."""
    weight = np.float32(share)
    (text, negative), (next_text, next_negative) = old, new
    mixed = None
    if negative is not None and next_negative is not None:
        mixed = negative + weight * (next_negative - negative)
    return text + weight * (next_text - text), mixed
