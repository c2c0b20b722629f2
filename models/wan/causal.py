"""Wan one block of frames after another, with caches of fixed shapes: one compiled program for a whole video.

The parameters are the bidirectional model's. Training sees the whole clip at once with `WanConfig.causal_block`;
generation calls `cached_forward` for each block, as often as it is denoised, and both give the same numbers.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Real

from monarch_jax import MonarchKVCache
from monarchrt.models.wan.attention import dense_attention
from monarchrt.models.wan.config import DenseAttention, MonarchAttention
from monarchrt.models.wan.dit import WanModel, attention_runs, rematerialized
from monarchrt.models.wan.rope import axis_table, axis_widths, rope_table, rotate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WanCache:
    """Keys and values of the frames so far, of every layer, and of the text. A pytree of fixed shapes.

    Attributes:
        keys: For each run of layers with equal attention [layers, B, tiles, b1, b2, heads, head_dim], in the tiled
            order of that attention; dense layers keep token order.
        values: Likewise.
        length: int32 scalar, frames written so far.
        cross: (key, value) of the text and, for i2v, of the image, each [layers, B, rows, heads, head_dim].
        layouts: For each run, its cache without arrays: tile, capacity, rolling window, sink frames.
    """

    keys: Any
    values: Any
    length: Any
    cross: Any
    layouts: tuple["Layout", ...] = dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fixed part of one layer's `MonarchKVCache`."""

    spec: Any
    sink_frames: int
    rolling: bool
    detach_past: bool

    def cache(self, key: Array, value: Array, length: Array) -> MonarchKVCache:
        """One layer's cache."""
        fixed = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return MonarchKVCache(key=key, value=value, length=length, **fixed)


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
) -> WanCache:
    """Caches for a new video: the cross-attention's filled from the text, the self-attention's empty.

    Example:
        >>> from monarchrt.models.wan import wan_config
        >>> model = WanModel(wan_config("tiny"), rngs=nnx.Rngs(0))
        >>> cache = init_cache(model, jnp.zeros((1, 5, 32)), frames=6, height=4, width=8)
        >>> forward = nnx.jit(cached_forward)
        >>> flow, cache = forward(model, jnp.zeros((1, 3, 4, 8, 16)), jnp.full((1, 3), 1000.0), cache)
        >>> flow.shape, int(cache.length)
        ((1, 3, 4, 8, 16), 3)

    Args:
        model: Its attention decides the order that keys and values are kept in.
        text: Output of the text encoder, as in the model's call.
        image: Output of the image encoder, for i2v.
        frames: Capacity in frames of tokens: all frames of the video, or the window of a rolling cache, which
            includes the block being generated.
        height: Of the latents.
        width: Of the latents.
        rolling: Whether frames past the capacity evict the oldest.
        sink_frames: Leading frames that a rolling cache never evicts.
        detach_past: Whether gradients reach only the newest block's keys and values.

    Returns:
        The cache. It is differentiable in the text's keys and values.

    Raises:
        ValueError: If sizes do not fit the model, its tiles or each other.
    """
    config = model.config
    model.check_context(text.shape[0], text, image)
    _, rows, columns = config.token_grid(config.patch_size[0], height, width)
    keys, values, layouts = [], [], []
    for run in attention_runs(config.layer_attention):
        setting = run.setting
        tiled = isinstance(setting, MonarchAttention)

        def empty(tile=setting.tile if tiled else None, blocks=setting.blocks if tiled else "fh,w"):
            cache = MonarchKVCache.init(
                batch=text.shape[0],
                frames=frames,
                height=rows,
                width=columns,
                heads=config.num_heads,
                head_dim=config.head_dim,
                tile=tile,
                blocks=blocks,
                rolling=rolling,
                sink_frames=sink_frames,
                detach_past=detach_past,
                dtype=jnp.dtype(config.dtype),
            )
            layouts.append(Layout(cache.spec, sink_frames, rolling, detach_past))
            return cache.key

        shape = jax.eval_shape(empty)
        stack = (run.stop - run.start, *shape.shape)
        keys.append(jnp.zeros(stack, shape.dtype))
        values.append(jnp.zeros(stack, shape.dtype))
    context = model.embed_context(text, image)
    graph, state = nnx.split(model.blocks)

    def cross_keys_values(_, layer):
        return None, nnx.merge(graph, layer).cross_attn.keys_values(*context)

    _, cross = jax.lax.scan(cross_keys_values, None, state)
    return WanCache(
        keys=tuple(keys),
        values=tuple(values),
        length=jnp.zeros((), jnp.int32),
        cross=cross,
        layouts=tuple(layouts),
    )


def cached_forward(
    model: WanModel,
    latents: Float[Array, "B F H W C"],
    timesteps: Real[Array, "B"] | Real[Array, "B frames"],
    cache: WanCache,
    *,
    frame: int | Int[Array, ""] | None = None,
    in_place: bool = False,
) -> tuple[Float[Array, "B F H W C_out"], WanCache]:
    """Predicts the flow of a block of frames that see each other and all cached frames.

    Called again with the same `frame`, it rewrites the block in the cache: for every denoising step, and once more
    with the finished block at timestep 0, before the next block (Self-Forcing, Section 3; causal Wan's cache rewrite).
    Shapes do not depend on how full the cache is, so that jitted with `frame` traced it compiles once.

    Args:
        model: The model that the cache was made for.
        latents: The block, channels last.
        timesteps: One per sample or one per frame.
        cache: Of `init_cache` or an earlier call.
        frame: Absolute index of the block's first frame; None: after the newest one. Traced frames past the capacity
            of a cache that does not roll, or past the rotary table's 1024, give NaN.
        in_place: For generation, with the cache donated: every layer writes its block into the cache of all layers and
            reads it there, without a copy of its own. Gradients are right, but take the memory of whole caches.

    Returns:
        The flow, in float32 at least, and the cache with this block as its newest.

    Raises:
        ValueError: If shapes do not fit the model or the cache, or a static `frame` is beyond its capacity.
    """
    config = model.config
    grid = model.check_latents(latents, timesteps)
    runs = attention_runs(config.layer_attention)
    check_cache(model, cache, latents.shape[0], grid)
    start = cache.length if frame is None else frame
    tokens = model.embed_latents(latents, timesteps)
    rope = rope_table(grid, config.head_dim, start_frame=start)
    graph, state = nnx.split(model.blocks)
    x, keys, values = tokens.x, [], []
    for run, layout, key, value in zip(runs, cache.layouts, cache.keys, cache.values, strict=True):
        through = _layers_in_place if in_place else _layers_apart
        past = layout.cache(key, value, cache.length)
        layers, cross = run.of(state, config.num_layers), run.of(cache.cross, config.num_layers)

        def run_block(x, layer, cross, attention):
            block = nnx.merge(graph, layer)
            return block(x, tokens.time_projection, rope, cross, attention, recompute=config.remat == "full")

        x, past = through(run_block, x, (layers, cross), past, run.setting, start, config)
        keys.append(past.key)
        values.append(past.value)
    flow = model.unpatchify(model.run_head(x, tokens.time), grid)
    length = jnp.asarray(start, jnp.int32) + grid[0]
    return flow, dataclasses.replace(cache, keys=tuple(keys), values=tuple(values), length=length)


def _layers_apart(run_block, x, layers, past: MonarchKVCache, setting, start, config) -> tuple[Array, MonarchKVCache]:
    """x through layers that each take a copy of their keys and values out of the cache of all, [layers, B, ...]."""
    like = dataclasses.replace(past, key=None, value=None)

    def body(x, xs):
        (layer, cross), key, value = xs
        written = []

        def attention(q, k, v):
            written.extend((k, v))
            own = dataclasses.replace(like, key=key, value=value)
            return attend_cached(own.append(k, v, frame=start), q, setting)

        x = run_block(x, layer, cross, attention)
        return x, tuple(written)

    # Only the new block leaves the scan; all layers' caches are then written at once, in place if donated.
    x, new = jax.lax.scan(rematerialized(body, config), x, (layers, past.key, past.value))

    def write(key, value, new_key, new_value):
        own = dataclasses.replace(like, key=key, value=value).append(new_key, new_value, frame=start)
        return own.key, own.value

    key, value = jax.vmap(write)(past.key, past.value, *new)
    return x, dataclasses.replace(past, key=key, value=value)


def _layers_in_place(
    run_block, x, layers, past: MonarchKVCache, setting, start, config
) -> tuple[Array, MonarchKVCache]:
    """The same through layers that write and read where the cache of all lies.

    The loop's own counter is the index, not an element of an array: XLA then hands a slice of the cache to a kernel as
    an offset.
    """

    def body(carry, xs):
        x, past, index = carry
        (layer, cross) = xs
        found = []

        def attention(q, k, v):
            found.append(past.append(k, v, frame=start, layer=index))
            return attend_cached(found[0], q, setting, layer=index)

        x = run_block(x, layer, cross, attention)
        return (x, dataclasses.replace(found[0], length=past.length), index + 1), None

    (x, past, _), _ = jax.lax.scan(rematerialized(body, config), (x, past, jnp.int32(0)), layers)
    return x, past


@partial(jax.jit, static_argnames=("frames", "head_dim"), donate_argnames="cache")
def rebase_cache(cache: WanCache, *, frames: int, head_dim: int) -> WanCache:
    """Counts the frames of a rolling cache from `frames` later on, so that a video can outgrow the rotary table.

    Only differences of positions matter to attention, so the cached keys are turned back by `frames` positions, each
    in its slot; what follows is as before, with every frame index less by `frames`.

    Example:
        >>> from monarchrt.models.wan import WanModel, wan_config
        >>> model = WanModel(wan_config("tiny", num_layers=1), rngs=nnx.Rngs(0))
        >>> cache = init_cache(model, jnp.zeros((1, 5, 32)), frames=6, height=4, width=8, rolling=True)
        >>> cache = dataclasses.replace(cache, length=jnp.int32(1020))
        >>> int(rebase_cache(cache, frames=1014, head_dim=24).length)
        6

    Args:
        cache: Rolling, with at least `frames` frames more written than it holds; it is donated.
        frames: A multiple of the frames that roll, capacity less sinks.
        head_dim: The model's.

    Returns:
        The cache.

    Raises:
        ValueError: If the cache does not roll, or slots would not stay in place.
    """
    layout = cache.layouts[0]
    rolls = layout.spec.total_key_frames - layout.sink_frames
    if not layout.rolling or frames < 0 or frames % rolls:
        raise ValueError(f"frames={frames} is not a multiple of the {rolls} frames that a rolling cache rolls over.")
    width = axis_widths(head_dim)[0]
    cos, sin = axis_table(np.array([-frames]), width)
    rest = ((0, 0), (0, head_dim // 2 - width // 2))
    cos, sin = jnp.asarray(np.pad(cos, rest, constant_values=1.0))[None], jnp.asarray(np.pad(sin, rest))[None]

    def turn(keys):
        return rotate(keys.reshape(-1, 1, 1, *keys.shape[-2:]), cos, sin).reshape(keys.shape)

    return dataclasses.replace(cache, keys=tuple(map(turn, cache.keys)), length=cache.length - frames)


def attend_cached(
    cache: MonarchKVCache,
    query: Float[Array, "B N n d"],
    setting: DenseAttention | MonarchAttention,
    *,
    layer: Int[Array, ""] | None = None,
) -> Float[Array, "B N n d"]:
    """Attention of the newest block's queries over one layer's cache.

    Args:
        cache: With the block written. A dense layer's has whole frames as tiles, so that it is in token order.
        query: [B, F*h*w, heads, head_dim].
        setting: The layer's attention.
        layer: Which layer, if the cache is that of several.

    Returns:
        As `query`.
    """
    if isinstance(setting, MonarchAttention):
        return cache.attend(query, num_iters=setting.num_iters, layer=layer, implementation=setting.implementation)
    _, height, width = cache.spec.grid
    return dense_attention(
        query,
        *cache.tokens(layer=layer),
        valid_keys=cache.valid_frames * (height * width),
        implementation=setting.implementation,
    )


def check_cache(model: WanModel, cache: WanCache, batch: int, grid: tuple[int, int, int]) -> None:
    """Raises ValueError unless the cache was made for this model's layers, batch and frame size."""
    runs = attention_runs(model.config.layer_attention)
    layers = [stack.shape[0] for stack in cache.keys]
    specs = [layout.spec for layout in cache.layouts]
    tiles = [
        (run.setting.tile, run.setting.blocks) if isinstance(run.setting, MonarchAttention) else (None, "fh,w")
        for run in runs
    ]
    if layers != [run.stop - run.start for run in runs] or any(
        (spec.tile_shape, spec.blocks) != (tile or (1, *spec.grid[1:]), blocks)
        for spec, (tile, blocks) in zip(specs, tiles, strict=True)
    ):
        raise ValueError("cache was made for another attention than the model's; make a new one with init_cache.")
    height, width = specs[0].grid[1:]
    if (height, width) != grid[1:] or cache.keys[0].shape[1] != batch:
        raise ValueError(
            f"latents of batch {batch} and {grid[1]}x{grid[2]} tokens do not fit the cache of batch "
            f"{cache.keys[0].shape[1]} and {height}x{width} tokens."
        )
