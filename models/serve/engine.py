"""What all sessions share: network, decoder and text encoder, loaded once, and one set of compiled programs."""

import bisect
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from monarchrt.models.attention.notation import parse, to_text
from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import NEGATIVE_PROMPT
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.memory import device_memory
from monarchrt.models.sampling import LiveRollout, Rollout
from monarchrt.models.sampling.rollout import check_size
from monarchrt.models.serve.messages import Refusal
from monarchrt.models.wan import WanModel
from monarchrt.models.wan.passes import default_passes
from monarchrt.models.wan.unrolled import Cut, UnrolledWan, unroll_layers
from monarchrt.models.web.encodings import ENCODINGS

KEPT_TEXTS = 64

type Encode = Callable[[Sequence[str]], Sequence[Float[Array, "1 L E"]]]


class Engine:
    """Generates videos of one size, with one set of compiled programs for all of them.

    Args:
        pipeline: Network and decoder, which may be on different devices; latents are copied from one to the other.
        rollout: Sampling block by block; its window must be set.
        height: Height of the latents.
        width: Width of the latents.
        encode: Maps prompts to embeddings, all of the same shape.
        fps: Frames per second of playback.
        negative: Default negative prompt.
        sample: A prompt that `encode` accepts, for compilation.
        begins: Allowed numbers of given frames at the start of a video; empty if videos cannot start from frames.
        attentions: Attention settings that a video may use besides the network's own, in their notation.
        unroll: Whether to unroll the network's layers (`unroll_layers`).

    Raises:
        UserError: If the roll-out has no window, a number in `begins` is not a whole number of blocks, or an attention
            setting is invalid or does not fit the size.
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
        begins: Sequence[int] = (),
        attentions: Sequence[str] = (),
        unroll: bool = False,
    ):
        if rollout.window is None:
            raise UserError("sessions may be endless, which needs a --window, such as 21")
        self.pipeline, self.rollout, self.fps, self.latents = pipeline, rollout, fps, (height, width)
        self._encode, self._negative, self.sample = encode, negative, sample
        self._texts: OrderedDict[str, Array] = OrderedDict()
        for frames in begins:
            self.blocks(frames, name="begin")
        self.begins = tuple(sorted(set(begins)))
        self.models = _with_attentions(pipeline.model, attentions)
        self._check_sizes()
        self.networks: Mapping[str, WanModel | UnrolledWan] = self.models
        if unroll:
            cut: Cut = {}
            config = pipeline.model.config
            passes = default_passes(config.dtype, config.dim) if pipeline.mesh is None else None
            unrolled = {name: unroll_layers(model, cut=cut, passes=passes) for name, model in self.models.items()}
            self.networks, self.models = unrolled, {name: network.model for name, network in unrolled.items()}
            # the stacked layers can be freed
            self.pipeline = VideoPipeline(next(iter(self.models.values())), pipeline.decoder, mesh=pipeline.mesh)
        self._finite = jax.jit(lambda latents, decoded: jnp.isfinite(latents).all() & decoded)

    def _check_sizes(self) -> None:
        """Raises UserError unless every attention setting accepts the blocks' shapes."""
        channels = self.pipeline.model.config.in_channels
        for name, model in self.models.items():
            try:
                for frames in {self.count(0), self.rollout.block}:
                    shape = (1, frames, *self.latents, channels)
                    check_size(model.with_config(causal_block=None), shape, cached=True)
            except ValueError as error:
                raise UserError(f"attention {name} does not suit these videos: {error}") from error

    @property
    def window(self) -> int:
        """Length of the attention window in latent frames."""
        return self.rollout.window or 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the frames in pixels."""
        spatial = self.pipeline.decoder.spatial
        return self.latents[0] * spatial, self.latents[1] * spatial

    def count(self, block: int) -> int:
        """Number of latent frames of a block, by its index."""
        return 1 if self.rollout.independent_first_frame and not block else self.rollout.block

    def first_latent(self, block: int) -> int:
        """Index of a block's first latent frame, and so the number of latent frames of all blocks before it."""
        return 0 if not block else self.count(0) + (block - 1) * self.rollout.block

    def frames(self, blocks: int) -> int:
        """Number of frames that the first `blocks` blocks of a video have."""
        return 0 if not blocks else 1 + (self.first_latent(blocks) - 1) * self.pipeline.decoder.temporal

    def blocks(self, frames: int, *, name: str = "frames") -> int:
        """The number of blocks that a number of frames is; `name` is that of the number, for errors.

        Raises:
            UserError: If it is not a whole number of blocks; says which nearby numbers are.
        """
        blocks = self.most_blocks(frames)
        if not blocks or self.frames(blocks) != frames:
            near = [self.frames(n) for n in (blocks, blocks + 1) if n]
            raise UserError(f"{name} is {frames}, which do not make whole blocks; {' or '.join(map(str, near))} do")
        return blocks

    def most_blocks(self, frames: int) -> int:
        """The largest number of blocks with at most this many frames."""
        return bisect.bisect_right(range(frames + 1), frames, key=self.frames) - 1

    def attention(self, notation: str | None) -> str:
        """The key in `models` of an attention setting.

        Args:
            notation: The setting; None for the network's own.

        Raises:
            UserError: If the notation is invalid.
            Refusal: If the engine has no programs for the setting.
        """
        if notation is None:
            return next(iter(self.models))
        try:
            name = notation if notation in self.models else to_text(parse(notation))
        except ValueError as error:
            raise UserError(f"attention: {error}") from error
        if name not in self.models:
            raise Refusal(
                f"attention is {name}, which would need another compiled program; this server has "
                f"{', '.join(self.models)}",
                code="other_program",
            )
        return name

    def formats(self) -> list[str]:
        """Names of the encodings that can send frames of this size."""
        return [name for name, encoding in ENCODINGS.items() if encoding.mime(*self.size, self.fps)]

    def begins_with(self, frames: UInt8[np.ndarray, "T H W 3"]) -> int:
        """The number of blocks that given frames at the start of a video fill.

        Raises:
            UserError: If their size is not the engine's, or their number is not in `begins`.
        """
        if not self.begins:
            raise UserError("this server starts no videos from images or clips: its --begin is 0")
        if len(frames) not in self.begins:
            raise UserError(f"begin has {len(frames)} frames; videos begin with {_either(self.begins)} here")
        if frames.shape[1:3] != self.size:
            raise UserError(f"begin has frames of {frames.shape[1]}x{frames.shape[2]}; videos have {self.size} here")
        return self.blocks(len(frames))

    def encode(self, frames: UInt8[np.ndarray, "T H W 3"]) -> list[Float[np.ndarray, "1 F h w C"]]:
        """The latents of given frames at the start of a video, one array for each block."""
        latents = np.asarray(self.pipeline.decoder.encode(frames[None]), np.float32)
        ends = [self.first_latent(block) for block in range(1, self.blocks(len(frames)))]
        return np.split(latents, ends, axis=1)

    def embed(self, prompt: str, negative: str | None) -> tuple[Array, Array | None]:
        """Embeddings of a prompt and of its negative prompt, from a cache of the 64 that were used last.

        Args:
            prompt: The prompt.
            negative: The negative prompt; None for the engine's.

        Returns:
            Two embeddings; the second is None without guidance.
        """
        if self.rollout.guidance == 1.0:
            return self._embedded(prompt), None
        return self._embedded(prompt), self._embedded(self._negative if negative is None else negative)

    def embed_anew(self, prompt: str) -> Array:
        """The embedding of a prompt, without the cache."""
        return self._encode([prompt])[0]

    def _embedded(self, prompt: str) -> Array:
        if prompt not in self._texts:
            self._texts[prompt] = self.embed_anew(prompt)
            if len(self._texts) > KEPT_TEXTS:
                self._texts.popitem(last=False)
        self._texts.move_to_end(prompt)
        return self._texts[prompt]

    def video(self, texts: tuple[Array, Array | None], seed: int, *, attention: str | None = None) -> LiveRollout:
        """A new video.

        Args:
            texts: Embeddings, as from `embed`.
            seed: Seed of all noise.
            attention: As in `attention`.

        Returns:
            The roll-out, before its first block.
        """
        height, width = self.latents
        return LiveRollout(
            self.networks[self.attention(attention)],
            texts[0],
            negative=texts[1],
            height=height,
            width=width,
            key=jax.random.key(seed),
            rollout=self.rollout,
            mesh=self.pipeline.mesh,
        )

    def start_decoder(self) -> Any:
        """The decoder's state before the first latents."""
        return self.pipeline.decoder.start(1, *self.latents)

    def decode(
        self, latents: Float[Array | np.ndarray, "1 F h w C"], state: Any
    ) -> tuple[UInt8[Array, "1 T H W 3"], Bool[Array, ""], Any]:
        """Decodes a block; dispatches the computation and does not wait for it.

        Args:
            latents: The block's latents.
            state: The decoder's state, from `start_decoder` or the block before.

        Returns:
            The frames, whether they and the latents are finite, and the next state.
        """
        decoder, latents = self.pipeline.decoder, jnp.asarray(latents)
        frames, state = decoder.decode(latents, state)
        decoded = decoder.finite(state)  # on the decoder's device, to which the latents are copied asynchronously
        return frames, self._finite(jax.device_put(latents, decoded.sharding), decoded), state

    def held(self, sessions: int) -> tuple[int, int]:
        """Bytes of the weights, and bytes of the caches and decoder states of a number of sessions.

        Of several devices, those of the one with the least memory left.
        """
        return self._fullest(sessions)[1]

    def held_on(self, sessions: int) -> dict[Any, tuple[int, int]]:
        """As `held`, for every device that the network or the decoder is on."""
        config, decoder = self.pipeline.model.config, self.pipeline.decoder
        text = jnp.zeros((1, config.text_len, config.text_dim))
        texts = text, None if self.rollout.guidance == 1.0 else text
        cache = max(self.video(texts, 0, attention=name).held for name in self.models)
        state = _bytes(jax.tree.leaves(jax.eval_shape(functools.partial(decoder.start, 1, *self.latents))))
        network, decoders = self._weights()
        own, others = _devices(network), _devices(decoders)

        def on(device: Any) -> tuple[int, int]:
            each = cache * (device in own) + state * (device in others)
            return _bytes_on(device, network + decoders), sessions * each

        return {device: on(device) for device in dict.fromkeys([*own, *others])}

    def _weights(self) -> tuple[list[Array], list[Array]]:
        """The weights of the network and of the decoder."""
        network = list(self.networks.values())[-1]
        params = network.params if isinstance(network, UnrolledWan) else nnx.state(network)
        parts = vars(self.pipeline.decoder)
        return jax.tree.leaves(params), jax.tree.leaves([parts.get("_state"), parts.get("_synthesis")])

    def _fullest(self, sessions: int) -> tuple[Any, tuple[int, int]]:
        """The device with the least memory left, and its two numbers of `held_on`."""
        return min(self.held_on(sessions).items(), key=lambda item: device_memory(item[0]) - sum(item[1]))

    def check_memory(self, sessions: int) -> None:
        """Checks, before anything is compiled, that a number of sessions fits into the memory of every device.

        Raises:
            UserError: If it does not; says how much memory they need.
        """
        device, (weights, each) = self._fullest(sessions)
        if weights + each > (there := device_memory(device)):
            raise UserError(
                f"the weights take {_gib(weights)} and {sessions} sessions {_gib(each)}, and {self._named(device)} has "
                f"{_gib(there)}; give fewer --sessions, a shorter --window or smaller videos"
            )

    def _named(self, device: Any) -> str:
        """A device's name in messages, with its number if several devices are in use."""
        return "the device" if len(self.held_on(1)) == 1 else f"device {device.id}"

    def warm_up(self) -> None:
        """Compiles all programs of sessions: blocks, a change of prompt, recomputing the cache, encoder and decoder.

        Raises:
            UserError: If a device runs out of memory; says how much was needed.
        """
        try:
            given = [self.encode(np.zeros((frames, *self.size, 3), np.uint8)) for frames in self.begins]
            for name in self.models:
                self._warm_up(name, given)
        except jax.errors.JaxRuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            device, (weights, each) = self._fullest(1)
            raise UserError(
                f"the memory of {self._named(device)}, {_gib(device_memory(device))}, is used up: the weights take "
                f"{_gib(weights)}, a session {_gib(each)}, and programs what is said here: {error}; give a shorter "
                f"--window or smaller videos"
            ) from error
        self.formats()

    def _warm_up(self, attention: str, given: Sequence[Sequence[np.ndarray]]) -> None:
        texts = self.embed(self.sample, None)
        video, state, past = self.video(texts, 0, attention=attention), self.start_decoder(), {}
        needed = -(-self.window // self.rollout.block) + 2  # until the window drops frames
        for number in range(needed):
            frame = video.frame
            past[frame] = np.asarray(video.generate())
            if number < 2:
                _, finite, state = self.decode(past[frame], state)
                finite.block_until_ready()
        video.set_text(*blended(texts, texts, 0.5))
        video.recache(video.frame, past)
        video.count_anew()
        jax.block_until_ready(video.generate())
        for blocks in given:
            video = self.video(texts, 0, attention=attention)
            for latents in blocks:
                video.write(jnp.asarray(latents))
            jax.block_until_ready(video.generate())


def blended(old: tuple[Array, Array | None], new: tuple[Array, Array | None], share: float) -> tuple[Array, Any]:
    """Linear interpolation between two pairs of embeddings of `Engine.embed`; share 0 is the old pair, 1 the new."""
    weight = np.float32(share)
    (text, negative), (next_text, next_negative) = old, new
    mixed = None
    if negative is not None and next_negative is not None:
        mixed = negative + weight * (next_negative - negative)
    return text + weight * (next_text - text), mixed


def _with_attentions(model: WanModel, attentions: Sequence[str]) -> Mapping[str, WanModel]:
    """The network with each attention setting, its own first; all share the same weights."""
    models = {to_text(model.config.attention): model}
    for notation in attentions:
        try:
            setting = parse(notation)
            models.setdefault(to_text(setting), model.with_attention(setting))
        except ValueError as error:
            raise UserError(f"attentions: {notation!a}: {error}") from error
    return models


def _bytes(arrays: Sequence[Any]) -> int:
    return sum(array.size * array.dtype.itemsize for array in arrays)


def _devices(arrays: Sequence[Array]) -> list[Any]:
    """The devices that arrays are on, ordered by number."""
    return sorted({device for array in arrays for device in array.devices()}, key=lambda device: device.id)


def _bytes_on(device: Any, arrays: Sequence[Array]) -> int:
    """Bytes of the parts of arrays that are on a device."""
    shapes = [array.sharding.shard_shape(array.shape) if device in array.devices() else (0,) for array in arrays]
    return sum(math.prod(shape) * array.dtype.itemsize for shape, array in zip(shapes, arrays, strict=True))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.2f} MiB"


def _either(values: Sequence[int]) -> str:
    return " or ".join(map(str, values))
