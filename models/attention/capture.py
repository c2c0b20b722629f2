"""Capture of queries, keys and values of a model's self-attention while it runs."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from monarchrt.models.attention.base import NO_CONTEXT, Attention, CacheShape, Context, Density, Grid
from monarchrt.models.attention.masked import frames_of_slots
from monarchrt.models.host import check_host


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captured:
    """Queries, keys and values of one call, after the rotary embedding.

    Attributes:
        layer: Index of the layer.
        step: Index of the network call within the sampler; None outside of sampling.
        block: Index of the block of frames; None for a whole clip.
        grid: (F, h, w), tokens of the queries.
        key_frames: [F_k], index in the clip of each frame of keys, in order.
        causal_block: Frames per block of a block-causal mask over a whole clip; None: every query sees every key.
        heads: Indices of the captured heads.
        query: [B, F*h*w, heads, head_dim].
        key: [B, F_k*h*w, heads, head_dim].
        value: As `key`.
    """

    layer: int
    step: int | None
    block: int | None
    grid: Grid
    key_frames: Int[np.ndarray, "Fk"]
    causal_block: int | None
    heads: tuple[int, ...]
    query: Float[np.ndarray, "B N n d"]
    key: Float[np.ndarray, "B K n d"]
    value: Float[np.ndarray, "B K n d"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The calls to keep, and the function that stores them. Instances differ, so captures share no compiled program."""

    layers: tuple[int, ...] | None
    steps: tuple[int, ...] | None
    blocks: tuple[int, ...] | None
    heads: tuple[int, ...] | None
    keep: Callable[..., None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Probe(Attention):
    """Attends as another kind does, and sends its arguments to the host."""

    name: ClassVar[str] = "captured"
    inner: Attention
    chosen: _Chosen

    def __str__(self) -> str:
        return str(self.inner)

    def parts(self) -> tuple[Attention, ...]:
        """The kind that attends."""
        return (self.inner,)

    def for_layer(self, layer: int) -> Attention:
        """The probe of the layer's setting."""
        return dataclasses.replace(self, inner=self.inner.for_layer(layer))

    def __call__(
        self,
        query: Float[Array, "B N n d"],
        key: Float[Array, "B N n d"],
        value: Float[Array, "B N n d"],
        *,
        grid: Grid,
        causal_block: int | None = None,
        context: Context = NO_CONTEXT,
    ) -> Float[Array, "B N n d"]:
        """As the kind itself."""
        self._send_to_host(query, key, value, np.arange(grid[0]), context, grid=grid, causal_block=causal_block)
        return self.inner(query, key, value, grid=grid, causal_block=causal_block, context=context)

    def init_cache(self, shape: CacheShape) -> Any:
        """The cache of the kind itself."""
        return self.inner.init_cache(shape)

    def reads(self, cache: Any) -> bool:
        """As the kind itself."""
        return self.inner.reads(cache)

    def attend_cache(
        self,
        cache: Any,
        query: Float[Array, "B N n d"],
        *,
        layer: Int[Array, ""] | None = None,
        context: Context = NO_CONTEXT,
    ) -> Float[Array, "B N n d"]:
        """As the kind itself."""
        _, height, width = cache.spec.grid
        key, value = cache.tokens(layer=layer)
        grid = (query.shape[1] // (height * width), height, width)
        self._send_to_host(query, key, value, frames_of_slots(cache), context, grid=grid, causal_block=None)
        return self.inner.attend_cache(cache, query, layer=layer, context=context)

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """As the kind itself."""
        return self.inner.density(grid, causal_block=causal_block, steps=steps)

    def _send_to_host(self, query, key, value, key_frames, context: Context, *, grid: Grid, causal_block: int | None):
        """Sends arrays to the host if the call is one of those to keep."""
        chosen, wanted = self.chosen, []
        step = None if context.step is None or jnp.ndim(context.step) else context.step  # one for the whole call
        places = (context.layer, step, context.block)
        for place, among in zip(places, (chosen.layers, chosen.steps, chosen.blocks), strict=True):
            if among is not None and place is not None:
                wanted.append(jnp.isin(jnp.asarray(place), jnp.asarray(among)))
        heads = tuple(range(query.shape[2])) if chosen.heads is None else chosen.heads
        numbers = [jnp.asarray(-1 if place is None else place, jnp.int32) for place in places]
        tensors = [lax.stop_gradient(x[:, :, jnp.asarray(heads)]) for x in (query, key, value)]

        def keep(*arrays: Any) -> None:
            chosen.keep(*map(np.asarray, arrays), grid=grid, causal_block=causal_block, heads=heads)

        def send() -> None:
            jax.debug.callback(keep, *numbers, jnp.asarray(key_frames), *tensors)

        if not wanted:
            send()
            return
        lax.cond(jnp.stack(wanted).all(), send, lambda: None)


@contextlib.contextmanager
def capture(
    model: Any,
    *,
    layers: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
    blocks: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> Iterator[tuple[Any, list[Captured]]]:
    """Captures the arguments of a model's self-attention inside the block.

    The model may be called directly, or by a sampler, a roll-out over a cache, or `VideoPipeline`. The list is complete
    at the end of the block. If gradients recompute a layer, its call is listed twice.

    Examples:
        >>> from flax import nnx
        >>> from monarchrt.models.wan import WanModel, wan_config
        >>> model = WanModel(wan_config("tiny", num_layers=3), rngs=nnx.Rngs(0))
        >>> with capture(model, layers=(0, 2), heads=(1,)) as (probed, captured):
        ...     flow = probed(jnp.zeros((1, 3, 4, 8, 16)), jnp.array([500.0]), jnp.zeros((1, 5, 32)))
        >>> [(call.layer, call.query.shape, call.grid) for call in captured]
        [(0, (1, 24, 1, 24), (3, 2, 4)), (2, (1, 24, 1, 24), (3, 2, 4))]

    Args:
        model: A `WanModel`, or another model with `config.layer_attention` and `with_attention`; it is not changed.
        layers: Indices of the layers to keep; None: all.
        steps: Indices of network calls within the sampler to keep; None: all. Without a sampler all calls are kept.
        blocks: Indices of blocks of a roll-out to keep; None: all. Without a roll-out all calls are kept.
        heads: Indices of the heads to keep; None: all.

    Yields:
        A model that computes the same and is to be run, and the list, in the order of calls and layers.

    Raises:
        ValueError: If a layer or head does not exist.
        UserError: If `JAX_PLATFORMS` excludes the CPU, through which the arrays pass.
    """
    check_host("capture")
    config = model.config
    for name, numbers, count in (("layers", layers, config.num_layers), ("heads", heads, config.num_heads)):
        for number in numbers or ():
            if not 0 <= number < count:
                raise ValueError(f"{name}={tuple(numbers or ())}: {number} is not one of 0 to {count - 1}.")
    captured: list[Captured] = []

    def keep(layer, step, block, key_frames, query, key, value, *, grid, causal_block, heads):
        order = np.argsort(key_frames, kind="stable")
        order = order[key_frames[order] >= 0]
        tokens = (order[:, None] * (grid[1] * grid[2]) + np.arange(grid[1] * grid[2])).ravel()
        number = [None if place < 0 else int(place) for place in (step, block)]
        captured.append(
            Captured(
                layer=int(layer), step=number[0], block=number[1], grid=grid, key_frames=key_frames[order],
                causal_block=causal_block, heads=heads, query=query, key=key[:, tokens], value=value[:, tokens],
            )
        )  # fmt: skip

    def chosen(numbers: Sequence[int] | None) -> tuple[int, ...] | None:
        return None if numbers is None else tuple(int(number) for number in numbers)

    choice = _Chosen(
        layers=chosen(layers), steps=chosen(steps), blocks=chosen(blocks), heads=chosen(heads), keep=keep
    )  # fmt: skip
    settings = config.layer_attention
    probes = tuple(_Probe(inner=setting, chosen=choice) for setting in settings)
    probed = model.with_attention(probes[0] if len(set(settings)) == 1 else probes)
    try:
        yield probed, captured
    finally:
        jax.effects_barrier()
