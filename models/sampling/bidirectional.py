"""Generation of whole clips with a bidirectional model, and of longer videos as windows that continue each other."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from monarchrt.models.sampling.noise import Noise, joined
from monarchrt.models.sampling.rollout import check_size
from monarchrt.models.sampling.settings import check_sampler
from monarchrt.models.sampling.solve import fresh_noise, guided, keep_context, sample
from monarchrt.models.sampling.tables import SamplerTable, sampler_table
from monarchrt.models.wan import WanModel


@dataclass(frozen=True, kw_only=True)
class Windows:
    """The settings of a generation by windows.

    Attributes:
        sampler: Name of a sampler, as in `sampler_table`, or a table.
        steps: Network calls per window, or for few-step the list of its timesteps; None: the sampler's default.
        shift: Shift of the noise levels.
        guidance: Weight of classifier-free guidance, with a negative text; 1 is none.
        window: Latent frames that are denoised together; None: all.
        context: Number of finished latent frames at the start of each following window; needs a model trained with a
            noise level per frame.
        context_noise: Timestep, 0 to 1000, given to the network for these finished frames, which are clean.
    """

    sampler: str | SamplerTable = "unipc"
    steps: int | tuple[int, ...] | None = None
    shift: float = 5.0
    guidance: float = 1.0
    window: int | None = None
    context: int = 1
    context_noise: float = 0.0

    def __post_init__(self):
        check_sampler(self)
        if self.window is not None and not 1 <= self.context < self.window:
            raise ValueError(
                f"window={self.window} frames has no room for context={self.context} finished and at least one new "
                f"frame; use a window of at least {max(self.context, 1) + 1} and a context of at least 1."
            )

    def table(self) -> SamplerTable:
        """The sampler."""
        return sampler_table(self.sampler, steps=self.steps, shift=self.shift)

    def new_frames(self, frames: int, *, given: int = 0) -> list[int]:
        """Latent frames that each window denoises; the last may denoise more than are needed.

        Examples:
            >>> Windows(window=3).new_frames(6), Windows(window=3).new_frames(6, given=1)
            ([3, 2, 2], [2, 2, 2])

        Args:
            frames: Latent frames of the video, including given ones.
            given: Finished frames at the start.
        """
        windows, done = [], given
        while done < frames:
            windows.append((self.window or frames) - (self.context if done else 0))
            done += windows[-1]
        return windows

    def noise(self, key: Key[Array, ""], shape: tuple[int, ...], *, given: int = 0) -> Noise:
        """The noise that `windows` draws from a key, for use elsewhere.

        Examples:
            >>> noise = Windows(window=3).noise(jax.random.key(0), (1, 6, 4, 8, 16))
            >>> noise.first.shape, noise.fresh
            ((1, 7, 4, 8, 16), None)

        Args:
            key: As in `windows`.
            shape: Shape of the whole video's latents, [B, F, H, W, C].
            given: Number of leading frames that are given.

        Returns:
            The noise of the windows' new frames, one window after the other.
        """
        parts, noisy = [], self.table().noisy
        for number, count in enumerate(self.new_frames(shape[1], given=given)):
            start, fresh = jax.random.split(jax.random.fold_in(key, number))
            first = jax.random.normal(start, (shape[0], count, *shape[2:]))
            draw = fresh_noise(fresh, first)
            parts.append(Noise(first, jnp.stack([draw(int(n)) for n in noisy]) if len(noisy) else None))
        return joined(parts)


@partial(jax.jit, static_argnames=("graph", "settings", "shape"))
def generate_window(
    graph: nnx.GraphDef,
    params: Any,
    text: Float[Array, "B L E"],
    negative: Float[Array, "B M E"] | None,
    context: Float[Array, "B K H W C"] | None,
    key: Key[Array, ""],
    given: Noise | None = None,
    *,
    settings: Windows,
    shape: tuple[int, ...],
) -> Float[Array, "B F H W C"]:
    """Denoises the new frames of one window, all steps in one program.

    Args:
        graph: From `nnx.split(model)`.
        params: From `nnx.split(model)`.
        text: Embedding of the prompt.
        negative: Embedding of the negative prompt, for guidance.
        context: Finished latents before the new frames.
        key: Key of the noise.
        given: The window's noise; parts that are None are drawn.
        settings: Settings.
        shape: Shape of the new frames, [B, F, H, W, C].

    Returns:
        The new latents, float32.
    """
    model: Any = nnx.merge(graph, params)
    start, fresh = jax.random.split(key)
    if context is not None:
        model = keep_context(model, context, timestep=settings.context_noise)
    flow = guided(model, text, negative, guidance=settings.guidance)
    table = settings.table()
    if given is None:
        return sample(flow, jax.random.normal(start, shape), table, key=fresh, numbered=True)
    return sample(flow, given.first, table, key=fresh, fresh=given.by_step(table), numbered=True)


def windows(
    model: WanModel,
    text: Float[Array, "B L E"],
    *,
    frames: int,
    height: int,
    width: int,
    key: Key[Array, ""],
    settings: Windows,
    negative: Float[Array, "B M E"] | None = None,
    initial: Float[Array, "B K H W C"] | None = None,
    noise: Noise | None = None,
) -> Iterator[Float[Array, "B F H W C"]]:
    """Generates latents window by window; without `settings.window`, the whole clip at once.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> model = WanModel(wan_config("tiny", num_layers=1), rngs=nnx.Rngs(0))
        >>> settings = Windows(sampler="euler", steps=2, window=3)
        >>> size = dict(frames=6, height=4, width=8, key=jax.random.key(0))
        >>> [part.shape[1] for part in windows(model, jnp.zeros((1, 8, 32)), settings=settings, **size)]
        [3, 2, 1]

    Args:
        model: A bidirectional model.
        text: Embedding of the prompt.
        frames: Total number of latent frames, including given ones.
        height: Height of the latents.
        width: Width of the latents.
        key: Key of all noise.
        settings: Settings.
        negative: Embedding of the negative prompt, for guidance.
        initial: Finished latents at the start, at least `settings.context` frames; they are yielded too.
        noise: Noise of the windows' new frames, one window after the other, `sum(settings.new_frames(...))` of them,
            instead of the key's, which is `Windows.noise`.

    Yields:
        Latents, float32.

    Raises:
        ValueError: If a size does not fit the model; before anything is computed.
    """
    config = model.config
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"model has {config.in_channels} input and {config.out_channels} output channels; only text-to-video "
            f"models can be sampled."
        )
    if frames < 1:
        raise ValueError(f"frames={frames} is not a positive number of latent frames.")
    window = frames if settings.window is None else settings.window
    check_size(model, (text.shape[0], window, height, width, config.in_channels))
    if initial is not None:
        given = (text.shape[0], height, width, config.out_channels)
        if (initial.shape[0], *initial.shape[2:]) != given or initial.shape[1] < settings.context:
            raise ValueError(
                f"initial has shape {initial.shape}; batch, height, width and channels should be {given}, and there "
                f"should be at least context={settings.context} frames."
            )
        if settings.window is None:
            raise ValueError("initial frames can only be continued by windows; set window, for example window=4.")
    if noise is not None:
        new = sum(settings.new_frames(frames, given=0 if initial is None else initial.shape[1]))
        noise.check(settings.table(), (text.shape[0], new, height, width, config.out_channels))
    return _windows(model, text, negative, frames, (height, width), key, settings, initial, noise)


def _windows(model, text, negative, frames, size, key, settings, initial, noise) -> Iterator[Array]:
    graph, params = nnx.split(model)
    context, done = None, 0
    if initial is not None:
        initial = jnp.asarray(initial[:, :frames], jnp.float32)
        context, done = initial[:, -settings.context :], initial.shape[1]
        yield initial
    used, part = 0, None
    for number, new in enumerate(settings.new_frames(frames, given=done)):
        if part is not None:  # not after the last window, for which it would be compiled unnecessarily
            past = part if context is None else jnp.concatenate([context, part], axis=1)
            context = past[:, -settings.context :]
        shape = (text.shape[0], new, *size, model.config.out_channels)
        key_of_window = jax.random.fold_in(key, number)
        given = None if noise is None else noise.part(used, new)
        part = generate_window(
            graph, params, text, negative, context, key_of_window, given, settings=settings, shape=shape
        )
        yield part[:, : frames - done]
        done, used = done + new, used + new
