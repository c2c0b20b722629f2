"""Wan applied block by block with caches of fixed shapes, so that one compiled program generates a whole video.

The parameters are those of the bidirectional model. Training sees the whole clip at once with `WanConfig.causal_block`;
generation calls `cached_forward` for each denoising step of each block. Both give the same result.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from monarchrt.models.attention.base import CacheShape, Context, Number, map_keys
from monarchrt.models.sharding import constrain, parts
from monarchrt.models.wan.cached import CachedCall, each_cache, map_caches
from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.dit import AttentionRun, Times, WanModel, attention_runs, whole_layer
from monarchrt.models.wan.fused import Pending, settled
from monarchrt.models.wan.rope import axis_table, axis_widths, rope_table, rotate
from monarchrt.models.wan.tokens import join_frames, joins_frames, pad_rope
from monarchrt.models.wan.unrolled import over_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WanCache:
    """Keys and values of the frames so far and of the text, for every layer. A pytree whose shapes do not change.

    Attributes:
        runs: For each run of layers with equal attention, its kind's cache, whose arrays have a leading axis of these
            layers, [layers, B, ...], and no `length`. With unrolled layers, if the kind wants separate caches
            (`Attention.layers_apart`): a tuple of such caches, with one layer each.
        length: int32 scalar, frames written so far.
        cross: (key, value) of the text and, for i2v, of the image, each [layers, B, rows, heads, head_dim]; with
            unrolled layers, such pairs for each layer, [B, rows, heads, head_dim].
        shape: Sizes of the caches.
    """

    runs: Any
    length: Any
    cross: Any
    shape: CacheShape = dataclasses.field(metadata={"static": True})

    @property
    def keys(self) -> tuple[Any, ...]:
        """Keys of each run, [layers, B, ...], in the order in which its attention stores them."""
        return tuple(cache.key for run in self.runs for cache in each_cache(run))

    @property
    def values(self) -> tuple[Any, ...]:
        """Values of each run, like `keys`."""
        return tuple(cache.value for run in self.runs for cache in each_cache(run))


def init_cache(
    model: WanModel,
    text: Float[Array, "B L E"],
    image: Float[Array, "B I G"] | None = None,
    *,
    frames: int,
    height: int,
    width: int,
    rolling: bool = False,
    sink_frames: int = 0,
    detach_past: bool = False,
    block: int | None = None,
    layers: list[Any] | None = None,
) -> WanCache:
    """Creates the caches of a new video: keys and values of the text for cross-attention, empty for self-attention.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> model = WanModel(wan_config("tiny"), rngs=nnx.Rngs(0))
        >>> cache = init_cache(model, jnp.zeros((1, 5, 32)), frames=6, height=4, width=8)
        >>> forward = nnx.jit(cached_forward)
        >>> flow, cache = forward(model, jnp.zeros((1, 3, 4, 8, 16)), jnp.full((1, 3), 1000.0), cache)
        >>> flow.shape, int(cache.length)
        ((1, 3, 4, 8, 16), 3)

    Args:
        model: The model; its attention determines the order of keys and values in the cache.
        text: Output of the text encoder, as in the model's call.
        image: Output of the image encoder, for i2v.
        frames: Capacity in frames of tokens: all frames of the video, or the window of a rolling cache, which
            includes the block being generated.
        height: Height of the latents.
        width: Width of the latents.
        rolling: Whether frames past the capacity evict the oldest.
        sink_frames: Leading frames that a rolling cache never evicts.
        detach_past: Whether gradients reach only the newest block's keys and values.
        block: Frames of tokens of each written block, if always the same; some kinds then keep keys in tiles of
            several frames.
        layers: As in `cached_forward`.

    Returns:
        The cache. It is differentiable in the text's keys and values.

    Raises:
        ValueError: If sizes do not fit the model or its tiles, or are inconsistent.
    """
    config = model.config
    model.check_context(text.shape[0], text, image)
    room: Any = dict(frames=frames, rolling=rolling, sink_frames=sink_frames, detach_past=detach_past, block=block)
    shape = cache_shape(config, text.shape[0], height=height, width=width, **room)
    runs = split_heads(empty_runs(config, shape, apart=layers is not None), config.num_heads)
    cross = cross_keys_values(model, text, image, layers=layers)
    return WanCache(runs=runs, length=jnp.zeros((), jnp.int32), cross=cross, shape=shape)


def cache_shape(config: WanConfig, batch: int, *, height: int, width: int, **room: Any) -> CacheShape:
    """Sizes of the caches of a model.

    Args:
        config: Configuration of the model.
        batch: Batch size.
        height: Height of the latents.
        width: Width of the latents.
        **room: Other fields of `CacheShape`, such as frames and rolling.

    Returns:
        The sizes.

    Raises:
        ValueError: If the patch does not divide the latents.
    """
    _, rows, columns = config.token_grid(config.patch_size[0], height, width)
    return CacheShape(
        batch=batch,
        height=rows,
        width=columns,
        heads=config.num_heads,
        head_dim=config.head_dim,
        dtype=config.dtype,
        **room,
    )


def empty_runs(config: WanConfig, shape: CacheShape, *, apart: bool = False) -> tuple[Any, ...]:
    """Empty caches of all runs of layers, without lengths; `apart` for unrolled layers."""
    return tuple(empty_run(run, shape, apart=apart) for run in attention_runs(config.layer_attention))


def split_heads[Tree](caches: Tree, heads: int) -> Tree:
    """Splits keys and values, [layers, B, ..., heads, head_dim], along the heads and the batch, on a mesh."""

    def split(x: Array) -> Array:
        if x.ndim < 4 or x.shape[-2] != heads:
            return x
        return constrain(x, None, "batch", *(None,) * (x.ndim - 4), "heads", None)

    return jax.tree.map(split, caches)


def bytes_on_each(cache: WanCache) -> int:
    """Bytes of a cache on each device of the current mesh, on which `split_heads` splits keys and values only."""
    heads, batch = cache.shape.heads, cache.shape.batch

    def split(x: Any) -> bool:
        return x.ndim >= 4 and x.shape[-2] == heads

    shares = parts("heads", heads) * parts("batch", batch)
    of_runs = sum(x.size * x.dtype.itemsize // (shares if split(x) else 1) for x in jax.tree.leaves(cache.runs))
    return of_runs + sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.length, cache.cross)))


def cross_keys_values(
    model: WanModel,
    text: Float[Array, "B L E"],
    image: Float[Array, "B I G"] | None = None,
    *,
    layers: list[Any] | None = None,
) -> tuple[Any, ...]:
    """Keys and values of the cross-attention of every layer, as in `WanCache.cross`.

    Arguments are as in `init_cache`. The result is differentiable in the model's parameters.
    """
    context = model.embed_context(text, image)
    graph, state = model.split_blocks(apart=layers is not None)

    def of_layer(layer):
        return nnx.merge(graph, whole_layer(layer, model.config)).cross_attn.keys_values(*context)

    return over_layers(of_layer, state, layers)


def empty_run(run: AttentionRun, shape: CacheShape, *, apart: bool = False) -> Any:
    """The empty cache of a run of layers, without its length, or one cache per layer; see `WanCache.runs`."""

    def of_layers(count: int) -> Any:
        cache = run.setting.init_cache(dataclasses.replace(shape, layers=count))
        return dataclasses.replace(cache, length=None)

    layers = run.stop - run.start
    if apart and run.setting.layers_apart:
        return tuple(of_layers(1) for _ in range(layers))
    return of_layers(layers)


def cached_forward(
    model: WanModel,
    latents: Float[Array, "B F H W C"],
    timesteps: Real[Array, "B"] | Real[Array, "B frames"],
    cache: WanCache,
    *,
    frame: int | Int[Array, ""] | None = None,
    step: Number = None,
    block: Number = None,
    in_place: bool = False,
    layers: list[Any] | None = None,
    times: Times | None = None,
) -> tuple[Float[Array, "B F H W C_out"], WanCache]:
    """Predicts the flow of a block of frames that see each other and all cached frames, and caches the block.

    Another call with the same `frame` overwrites the block in the cache. Every denoising step does so, and finally a
    call with the finished block at timestep 0 before the next block (Self-Forcing, Section 3). Shapes do not depend on
    the fill level of the cache, so that under `jit` with a traced `frame` it compiles once.

    Args:
        model: The model that the cache was created for.
        latents: The block, channels last.
        timesteps: One per sample or one per frame.
        cache: From `init_cache` or an earlier call.
        frame: Absolute index of the block's first frame; None: the frame after the newest. Traced values past the
            capacity of a cache that does not roll, or past the rotary table's 1024 positions, give NaN.
        step: Index of the call within the sampler, which may be traced, for attention that depends on it.
        block: Index of the block of frames, which may be traced, for attention that depends on it.
        in_place: For generation with a donated cache: every layer writes its block into the cache of all layers and
            reads it there, without a copy. Gradients are correct but need the memory of whole caches.
        layers: The state of each layer, instead of those stacked in the model (`unroll_layers`); requires `in_place`.
        times: Result of `model.embed_times` for the timesteps, if it was computed before; T may be 1.

    Returns:
        The flow, in float32 or wider, and the cache with this block as its newest.

    Raises:
        ValueError: If shapes do not fit the model or the cache, a `frame` that is not traced is beyond its capacity,
            `layers` are given without `in_place`, or only one of `init_cache` and this call got `layers`.
    """
    config = model.config
    if layers is not None and not in_place:
        raise ValueError("layers need in_place=True; pass both, or leave layers out.")
    grid = model.check_latents(latents, timesteps, cached=True)
    check_cache(model, cache, latents.shape[0], grid, apart=layers is not None)
    start = cache.length if frame is None else frame
    rope, in_row = rope_table(grid, config.head_dim, start_frame=start), grid[1] * grid[2]
    if joined := in_place and joins_frames(timesteps):
        rope, in_row = (join_frames(rope[0]), join_frames(rope[1])), grid[0] * in_row
    rope, tokens = pad_rope(rope), model.embed_latents(latents, timesteps, times, joined=joined)
    graph, state = model.split_blocks(apart=layers is not None)
    call = CachedCall(
        graph=graph,
        config=config,
        time=tokens.time_projection,
        rope=rope,
        tokens=in_row,
        start=start,
        context=Context(step=step, block=block),
    )
    x: Any = tokens.x if layers is None else Pending(tokens.x)
    written = []
    for run, cached in zip(attention_runs(config.layer_attention), cache.runs, strict=True):
        past = map_caches(partial(dataclasses.replace, length=cache.length), cached)
        if layers is not None:
            own = layers[run.start : run.stop], cache.cross[run.start : run.stop]
            x, past = call.unrolled(run, x, own, past)
        else:
            own = run.of(state, config.num_layers), run.of(cache.cross, config.num_layers)
            x, past = (call.in_place if in_place else call.apart)(run, x, own, past)
        written.append(map_caches(partial(dataclasses.replace, length=None), past))
    x = x if layers is None else settled(x, tokens.time_projection)
    flow = model.unpatchify(model.run_head(x, tokens.time), grid)
    length = jnp.asarray(start, jnp.int32) + grid[0]
    runs = split_heads(tuple(written), config.num_heads)
    return flow, dataclasses.replace(cache, runs=runs, length=length)


def rebase_cache(cache: WanCache, *, frames: int, head_dim: int) -> WanCache:
    """Reduces all frame indices of a rolling cache by `frames`, so that a video can exceed the rotary table's length.

    Attention depends only on differences of positions, so the cached keys are rotated back by `frames` positions and
    stay in their slots. One compiled program serves all values of `frames`.

    Examples:
        >>> from monarchrt.models.wan import WanModel, wan_config
        >>> model = WanModel(wan_config("tiny", num_layers=1), rngs=nnx.Rngs(0))
        >>> cache = init_cache(model, jnp.zeros((1, 5, 32)), frames=6, height=4, width=8, rolling=True)
        >>> cache = dataclasses.replace(cache, length=jnp.int32(1020))
        >>> int(rebase_cache(cache, frames=1014, head_dim=24).length)
        6

    Args:
        cache: A rolling cache to which at least `frames` more frames were written than its capacity; it is donated.
        frames: A multiple of the capacity minus the sinks.
        head_dim: The model's channels per head.

    Returns:
        The cache.

    Raises:
        ValueError: If the cache does not roll, or `frames` is not such a multiple.
    """
    rolls = cache.shape.frames - cache.shape.sink_frames
    if not cache.shape.rolling or frames < 0 or frames % rolls:
        raise ValueError(f"frames={frames} is not a multiple of the {rolls} frames that a rolling cache rolls over.")
    return turned(cache, *_turn(-frames, head_dim), frames)


def turn_cache(cache: WanCache, *, frames: int, head_dim: int) -> WanCache:
    """Moves all cached frames `frames` positions into the past, as if this many frames had followed them.

    Args:
        cache: The cache, which is donated.
        frames: Number of positions.
        head_dim: The model's channels per head.

    Returns:
        The cache, with unchanged slots and length.
    """
    return turned(cache, *_turn(-frames, head_dim), 0)


def _turn(frames: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine that rotate a key by a number of frames, [1, 1, head_dim/2] float32 on the host."""
    width = axis_widths(head_dim)[0]
    cos, sin = axis_table(np.array([frames]), width)
    rest = ((0, 0), (0, head_dim // 2 - width // 2))
    return np.pad(cos, rest, constant_values=1.0)[None], np.pad(sin, rest)[None]


@partial(jax.jit, donate_argnames="cache")
def turned(cache: WanCache, cos: Array, sin: Array, frames: Int[Array, ""] | int) -> WanCache:
    """The cache with its keys rotated and its length reduced by `frames`."""

    def turn(keys):
        return rotate(keys.reshape(-1, 1, 1, *keys.shape[-2:]), cos, sin).reshape(keys.shape)

    runs = tuple(map_caches(lambda cache: map_keys(cache, turn), run) for run in cache.runs)
    return dataclasses.replace(cache, runs=runs, length=cache.length - frames)


def check_cache(
    model: WanModel, cache: WanCache, batch: int, grid: tuple[int, int, int], *, apart: bool = False
) -> None:
    """Raises ValueError unless the cache was made for this model's layers, batch and frame size.

    Args:
        model: The model.
        cache: The cache.
        batch: Batch size of the call.
        grid: (frames, rows, columns) of the call's tokens.
        apart: Whether the call is of unrolled layers.

    Raises:
        ValueError: If the cache was made for others.
    """
    if apart != (jax.tree.leaves(cache.cross)[0].ndim == 4):  # stacked, with an axis of layers
        raise ValueError("layers are given to one of init_cache and cached_forward; give them to both, or to none.")
    expected = jax.eval_shape(partial(empty_runs, model.config, cache.shape, apart=apart))
    if jax.tree.structure(expected) != jax.tree.structure(cache.runs) or any(
        wanted.shape != given.shape
        for wanted, given in zip(jax.tree.leaves(expected), jax.tree.leaves(cache.runs), strict=True)
    ):
        raise ValueError("cache was made for another attention than the model's; make a new one with init_cache.")
    shape = cache.shape
    if (shape.height, shape.width) != grid[1:] or shape.batch != batch:
        raise ValueError(
            f"latents of batch {batch} and {grid[1]}x{grid[2]} tokens do not fit the cache of batch "
            f"{shape.batch} and {shape.height}x{shape.width} tokens."
        )
