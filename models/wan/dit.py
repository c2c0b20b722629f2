"""The Wan 2.1 diffusion transformer, which predicts the flow from latents, timesteps and text."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Real

from monarchrt.models.attention.base import Attention, Context, Grid, Steps
from monarchrt.models.attention.blocks import attend_blocks
from monarchrt.models.sharding import no_whole_weights, split_batch, splits_weights, whole
from monarchrt.models.wan.activations import gelu_tanh
from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.kept import BY_GROUPS, POLICIES
from monarchrt.models.wan.kinds import PLACE, make_modules, modules_of, with_modules
from monarchrt.models.wan.layers import (
    MLP,
    Head,
    ImageEmbedding,
    PatchEmbedding,
    WanBlock,
    linear,
    sinusoid,
    small_normal,
)
from monarchrt.models.wan.rope import rope_table
from monarchrt.models.wan.stacks import STACKED, stacks_written, through_stacks
from monarchrt.models.wan.tokens import join_frames, pad, pad_rope, padded, split_tokens, whole_tokens


class Tokens(NamedTuple):
    """Inputs of the blocks and the head."""

    x: Array  # [B, F, h*w, D] residual stream
    time: Array  # [B, T, D] timestep embedding, T = F or 1
    time_projection: Array  # [B, T, 6, D]


type Times = tuple[Float[Array, "B T D"], Float[Array, "B T 6 D"]]  # of `WanModel.embed_times`


class CrossInputs(NamedTuple):
    """Inputs of the cross-attention."""

    text: Array  # [B, text_len, D]
    image: Array | None  # [B, image rows, D]


class WanModel(nnx.Module):
    """The Wan 2.1 DiT (Wan technical report, Section 4), a scan over `blocks`, whose parameters are stacked by layer.

    `config` has the attention of the layers, which `with_attention` replaces. Parameters of attention kinds are at
    `blocks.self_attn.kinds`.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> model = WanModel(wan_config("tiny", in_channels=4, out_channels=4), rngs=nnx.Rngs(0))
        >>> flow = model(jnp.zeros((1, 3, 4, 8, 4)), jnp.array([500.0]), jnp.zeros((1, 5, 32)))
        >>> flow.shape, flow.dtype
        ((1, 3, 4, 8, 4), dtype('float32'))

    Args:
        config: Sizes, attention and policy.
        rngs: Random keys; the parameters are initialised as in the official code: Xavier-uniform weights, zero biases,
            and a zero head.
    """

    def __init__(self, config: WanConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config, rngs=rngs)
        self.text_embedding = MLP(config, (config.text_dim, dim, dim), act=gelu_tanh, init=small_normal, rngs=rngs)
        self.time_embedding = MLP(
            config, (config.freq_dim, dim, dim), act=jax.nn.silu, init=small_normal, precise=True, rngs=rngs
        )
        self.time_projection = linear(config, dim, 6 * dim, precise=True, rngs=rngs)
        if config.model_type == "i2v":
            self.image_embedding = ImageEmbedding(config, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> WanBlock:
            return WanBlock(config, rngs=rngs)

        self.blocks = stack(rngs)
        self.head = Head(config, rngs=rngs)
        if (modules := make_modules(config, rngs)) is not None:  # last, so that other parameters do not depend on kinds
            setattr(self.blocks.self_attn, PLACE, modules)

    def __call__(
        self,
        latents: Float[Array, "B F H W C"],
        timesteps: Real[Array, "B"] | Real[Array, "B frames"],
        text: Float[Array, "B L E"],
        image: Float[Array, "B I G"] | None = None,
        *,
        step: Steps = None,
    ) -> Float[Array, "B F H W C_out"]:
        """Predicts the flow, noise minus data.

        Args:
            latents: Noisy latents, channels last.
            timesteps: 0 to 1000, one per sample or one per frame of tokens.
            text: Output of the text encoder, at most `text_len` rows; shorter is padded with zero rows, which are
                attended to.
            image: Output of the image encoder, for i2v.
            step: Index of the call within a sampler, which may be traced, for attention that depends on it; or one per
                sample or per frame of tokens.

        Returns:
            The flow, in float32 or wider.

        Raises:
            ValueError: If a shape does not match the configuration, or a tile does not fit the grid.
        """
        grid = self.check_latents(latents, timesteps, step)
        self.check_context(latents.shape[0], text, image)
        tokens = self.embed_latents(latents, timesteps)
        x = self.run_blocks(tokens, self.embed_context(text, image), grid, step=step, added=True)
        return self.unpatchify(self.run_head(x, tokens.time), grid)

    def check_latents(
        self,
        latents: Array | jax.ShapeDtypeStruct,
        timesteps: Array | jax.ShapeDtypeStruct,
        step: Steps = None,
        *,
        cached: bool = False,
    ) -> tuple[int, int, int]:
        """Checks the shapes of inputs against the configuration.

        Args:
            latents: As in the call; only its shape is used.
            timesteps: As in the call; only its shape is used.
            step: As in the call.
            cached: Whether the latents are a block over a cache rather than a whole clip.

        Returns:
            The grid of tokens (F, h, w).

        Raises:
            ValueError: If a shape does not match.
        """
        config = self.config
        batch, *size, channels = latents.shape
        if channels != config.in_channels:
            raise ValueError(f"latents have {channels} channels (last axis), the model takes {config.in_channels}.")
        grid = config.token_grid(*size)
        if timesteps.shape not in ((batch,), (batch, grid[0])):
            raise ValueError(
                f"timesteps have shape {timesteps.shape}, not ({batch},) for one per sample "
                f"or ({batch}, {grid[0]}) for one per frame."
            )
        if step is not None and jnp.shape(step) not in ((), (batch,), (batch, grid[0])):
            raise ValueError(
                f"step has shape {jnp.shape(step)}, not () for one, ({batch},) for one per sample "
                f"or ({batch}, {grid[0]}) for one per frame."
            )
        for setting in dict.fromkeys(config.layer_attention):
            if cached:  # a block of frames: masks are those of the whole clip
                setting.check_block(grid)
            else:
                setting.check(grid, causal_block=config.causal_block)
        return grid

    def check_context(self, batch: int, text: Array, image: Array | None) -> None:
        """Raises ValueError unless text and image match the configuration and the batch."""
        config = self.config
        if text.shape[0] != batch or text.shape[2] != config.text_dim:
            raise ValueError(f"text has shape {text.shape}, not ({batch}, rows, {config.text_dim}).")
        if text.shape[1] > config.text_len:
            raise ValueError(f"text has {text.shape[1]} rows, the model takes at most {config.text_len}.")
        if config.model_type == "i2v":
            if image is None:
                raise ValueError(f"image is None; an i2v model needs [{batch}, rows, {config.image_dim}].")
            if image.shape[0] != batch or image.shape[2] != config.image_dim:
                raise ValueError(f"image has shape {image.shape}, not ({batch}, rows, {config.image_dim}).")
        elif image is not None:
            raise ValueError("image was given to a t2v model; it takes None.")

    def embed_latents(
        self, latents: Array, timesteps: Array, times: Times | None = None, *, joined: bool = False
    ) -> Tokens:
        """Embeds latents and timesteps.

        Args:
            latents: As in the call.
            timesteps: As in the call.
            times: Result of `embed_times`, if it was computed before.
            joined: Whether to put the tokens of all frames in one row, [B, 1, F*h*w, D].

        Returns:
            The inputs of the blocks and the head.
        """
        per_frame = timesteps if timesteps.ndim == 2 else timesteps[:, None]
        time, projection = self.embed_times(per_frame) if times is None else times

        def arrange(patches: Array) -> Array:
            if joined:  # every device has all patches, so that padding needs no exchange of rows
                patches = whole_tokens(join_frames(patches))
                return split_tokens(whole_tokens(pad(patches, padded(patches.shape[2]))))
            return split_tokens(pad(patches, padded(patches.shape[2])))

        x = whole(self.patch_embedding, dtype=self.config.dtype)(latents, arrange)
        return Tokens(split_tokens(x), *split_batch((time, projection)))

    def embed_times(self, timesteps: Real[Array, "B T"]) -> Times:
        """The timestep embedding [B, T, D] and its projection [B, T, 6, D], in float32 or wider."""
        config = self.config
        time = whole(self.time_embedding)(sinusoid(timesteps, config.freq_dim))

        def project(time):
            return whole(self.time_projection)(jax.nn.silu(time))

        # recomputed in the backward pass: otherwise its float32 weights would be kept until then
        project = project if config.remat == "none" else jax.checkpoint(project)
        return time, project(time).reshape(*time.shape[:2], 6, config.dim)

    def embed_context(self, text: Array, image: Array | None = None) -> CrossInputs:
        """The embedded text, zero-padded to `text_len` rows, and the embedded image, each [B, rows, D]."""
        padded = jnp.pad(text, ((0, 0), (0, self.config.text_len - text.shape[1]), (0, 0)))
        text = whole(self.text_embedding, dtype=self.config.dtype)(padded)
        return split_batch(CrossInputs(text, None if image is None else whole(self.image_embedding)(image)))

    def run_blocks(
        self,
        tokens: Tokens,
        context: CrossInputs,
        grid: tuple[int, int, int],
        *,
        layers: int | None = None,
        step: Steps = None,
        added: bool = False,
    ) -> Array:
        """Runs blocks on embedded latents.

        Consecutive layers with equal attention are one scan, so that compile time does not grow with depth, unless
        `config.unroll_layers`.

        Args:
            tokens: From `embed_latents`.
            context: From `embed_context`.
            grid: (F, h, w) tokens.
            layers: Number of blocks to run, from the first; None: all.
            step: As in the call.
            added: Whether the result includes the padding tokens of a mesh.

        Returns:
            The residual stream, [B, F, h*w, D].
        """
        config = self.config
        rope, per_frame = pad_rope(rope_table(grid, config.head_dim)), grid[1] * grid[2]
        graph, state = self.split_blocks()
        x = tokens.x
        for run in attention_runs(config.layer_attention[:layers]):

            def body(x, layer, setting=run.setting):
                layer, number = layer
                block = nnx.merge(graph, whole_layer(layer, config))
                keys_values = block.cross_attn.keys_values(*context)

                def attention(query, key, value):
                    inputs = partial(block.attention_inputs, x[:, :, :per_frame], tokens.time_projection)
                    where = Context(layer=number, step=step, inputs=inputs, modules=modules_of(block))
                    return attend_clip(config, setting, query, key, value, grid=grid, context=where)

                how: Any = dict(tokens=per_frame, recompute=config.remat in BY_GROUPS)
                x = block(x, tokens.time_projection, rope, keys_values, attention, **how)
                return split_tokens(x), None

            stacked = run.of(state, config.num_layers), jnp.arange(run.start, run.stop)
            x = through_layers(body, config, x, stacked)
        return x if added else x[:, :, :per_frame]

    def split_blocks(self, *, apart: bool = False) -> tuple[nnx.GraphDef, Any]:
        """The graph of a layer, and the stacked state of all layers.

        Raises:
            ValueError: If the layers were unrolled, unless `apart`.
        """
        graph, state = nnx.split(self.blocks)
        if not apart and not jax.tree.leaves(state)[0].shape[0]:
            raise ValueError("model has no layers: they are in the UnrolledWan that it is part of; pass that.")
        return graph, state

    def run_head(self, x: Array, time: Array) -> Array:
        """Runs the head; with `remat`, gradients of its parameters are computed before those of the blocks."""
        head = whole(self.head)
        if self.config.remat == "none":
            return head(x, time)
        graph, state = nnx.split(head)
        # also a barrier in the backward pass, where it delays the gradient of x until the others are computed
        state, x, time = jax.lax.optimization_barrier((state, x, time))
        return nnx.merge(graph, state)(x, time)

    def attention_inputs(
        self,
        latents: Float[Array, "B F H W C"],
        timesteps: Real[Array, "B"] | Real[Array, "B frames"],
        text: Float[Array, "B L E"],
        image: Float[Array, "B I G"] | None = None,
        *,
        layer: int,
    ) -> tuple[Float[Array, "B N n d"], Float[Array, "B N n d"], Float[Array, "B N n d"], tuple[int, int, int]]:
        """Query, key and value of the self-attention of one layer, for analysis and plots.

        Args:
            latents: As in the call.
            timesteps: As in the call.
            text: As in the call.
            image: As in the call.
            layer: Index of the layer, 0 to num_layers - 1.

        Returns:
            Query, key and value, each [B, F*h*w, heads, head_dim] with the rotary embedding applied, and the grid
            (F, h, w).

        Raises:
            ValueError: As in the call, or if the layer does not exist.
        """
        if not 0 <= layer < self.config.num_layers:
            raise ValueError(f"layer={layer} is not one of 0 to {self.config.num_layers - 1}.")
        grid = self.check_latents(latents, timesteps)
        self.check_context(latents.shape[0], text, image)
        tokens = self.embed_latents(latents, timesteps)
        x = self.run_blocks(tokens, self.embed_context(text, image), grid, layers=layer, added=True)
        graph, state = nnx.split(self.blocks)
        block = nnx.merge(graph, jax.tree.map(lambda stacked: stacked[layer], state))
        shift, scale = block.modulations(tokens.time_projection)[:2]
        rope, per_frame = pad_rope(rope_table(grid, self.config.head_dim)), grid[1] * grid[2]
        return *block.self_attn.qkv(block.modulated(block.norm1, x, shift, scale), rope, per_frame), grid

    def unpatchify(self, patches: Array, grid: tuple[int, int, int]) -> Array:
        """Rearranges patches [B, F, h*w, pt*ph*pw*C] into latents [B, F*pt, h*ph, w*pw, C].

        Padding tokens of a mesh are dropped. The tokens of all frames may be in one row, as from `embed_latents`.
        """
        pt, ph, pw = self.config.patch_size
        if patches.shape[1] != grid[0]:
            patches = whole_tokens(patches)[:, :, : math.prod(grid)]
            patches = patches.reshape(patches.shape[0], grid[0], -1, patches.shape[3])
        patches = patches[:, :, : grid[1] * grid[2]]
        return rearrange(
            patches, "b f (h w) (pt ph pw c) -> b (f pt) (h ph) (w pw) c", h=grid[1], w=grid[2], pt=pt, ph=ph, pw=pw
        )

    def with_attention(
        self, attention: Attention | tuple[Attention, ...], *, rngs: nnx.Rngs | None = None
    ) -> "WanModel":
        """A model with another attention that shares this model's arrays.

        Parameters of a kind that is also in the new attention, with the same shapes, are kept. Parameters of its other
        kinds are initialised, and those of kinds that are not in it are dropped.

        Examples:
            >>> from monarchrt.models.wan import MonarchAttention, wan_config
            >>> dense = WanModel(wan_config("tiny"), rngs=nnx.Rngs(0))
            >>> dense.with_attention(MonarchAttention(tile=(3, 2, 4))).config.attention.tile
            (3, 2, 4)

        Args:
            attention: One setting, or one per layer.
            rngs: Random keys for initialised parameters; None: seed 0.

        Returns:
            A new model; `self` does not change.

        Raises:
            ValueError: As in `WanConfig`.
        """
        return self.with_config(attention=attention, rngs=rngs)

    def with_config(self, *, rngs: nnx.Rngs | None = None, **changes) -> "WanModel":
        """A model with another `attention` (see `with_attention`), `causal_block`, `remat` or `unroll_layers`.

        Raises:
            ValueError: If another field is given, which would change the parameters, or a value is invalid.
        """
        allowed = ("attention", "causal_block", "independent_first_frame", "remat", "unroll_layers")
        for name in changes:
            if name not in allowed:
                raise ValueError(f"{name!r} cannot be changed on a built model; these can: {', '.join(allowed)}.")
        config = dataclasses.replace(self.config, **changes)
        graph, state = nnx.split(self)
        model = nnx.merge(graph, state)
        model.config = config
        with_modules(model, config, rngs)
        return model


class AttentionRun(NamedTuple):
    """Consecutive layers, from `start` to before `stop`, with the same attention."""

    setting: Attention
    start: int
    stop: int

    def of(self, stacked, num_layers: int):
        """The slices of these layers from a tree that is stacked over all layers; the tree itself if they are all."""
        if (self.start, self.stop) == (0, num_layers):
            return stacked
        return jax.tree.map(lambda leaf: leaf[self.start : self.stop], stacked)


def attention_runs(settings: Sequence[Attention]) -> list[AttentionRun]:
    """Groups consecutive layers with equal attention.

    Examples:
        >>> from monarchrt.models.attention.notation import parse
        >>> [(run.start, run.stop) for run in attention_runs([parse("dense")] * 2 + [parse("monarch")] * 3)]
        [(0, 2), (2, 5)]
    """
    runs, start = [], 0
    for setting, group in itertools.groupby(settings):
        stop = start + len(list(group))
        runs.append(AttentionRun(setting, start, stop))
        start = stop
    return runs


def attend_clip(
    config: WanConfig, setting: Attention, query: Array, key: Array, value: Array, *, grid: Grid, context: Context
) -> Array:
    """Self-attention of a whole clip, with the causal blocks of the model if it is causal.

    Args:
        config: Configuration of the model.
        setting: The attention.
        query: [B, F*h*w, heads, head_dim].
        key: As `query`.
        value: As `query`.
        grid: (F, h, w) tokens.
        context: Place of the call in the network and in generation.

    Returns:
        An array like `query`.
    """
    if config.causal_block is None or not config.independent_first_frame:
        return setting(query, key, value, grid=grid, causal_block=config.causal_block, context=context)
    sizes = config.block_sizes(grid[0])
    return attend_blocks(setting, query, key, value, past=(key, value), grid=grid, sizes=sizes, context=context)


def whole_layer(layer: Any, config: WanConfig) -> Any:
    """The parameters of a layer, gathered on a mesh that splits them: at the entry of the block, before its loops."""
    own = [(path, leaf) for path, leaf in nnx.to_flat_state(layer)]
    made = [PLACE in path for path, _ in own]  # attention kinds may compute in another dtype
    return nnx.from_flat_state(
        [
            (path, whole(leaf, dtype=None if kind else config.dtype))
            for (path, leaf), kind in zip(own, made, strict=True)
        ]
    )


def through_layers(body, config: WanConfig, x: Array, stacked: Any) -> Array:
    """Runs stacked layers in a scan, with stacked residuals if these are on, or unrolled.

    Args:
        body: (x, layer) -> (x, None), one layer.
        config: Gives `remat` and `unroll_layers`.
        x: The residual stream.
        stacked: Tree of the layers' parameters with a leading axis of layers.

    Returns:
        The residual stream after the last layer.
    """
    if stacks_written.on and config.remat == STACKED and not config.unroll_layers:
        return through_stacks(rematerialized(body, config), x, stacked)
    if not config.unroll_layers:
        return jax.lax.scan(rematerialized(body, config), x, stacked)[0]
    layer = jax.jit(rematerialized(body, config))  # traced once
    for own in apart(stacked):
        x, _ = layer(x, own)
    return x


def apart(stacked: Any) -> list[Any]:
    """Splits stacked arrays into a list of trees, one per layer; their gradients are stacked once, at the end.

    Examples:
        >>> [int(x) for x in apart(jnp.arange(3))]
        [0, 1, 2]
    """

    @jax.custom_vjp
    def split(array):
        return [array[number] for number in range(array.shape[0])]

    split.defvjp(lambda array: (split(array), None), lambda _, gradients: (jnp.stack(gradients),))
    leaves, structure = jax.tree.flatten(stacked)
    inexact = [jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in leaves]
    each = [split(leaf) if own else list(leaf) for leaf, own in zip(leaves, inexact, strict=True)]
    return [jax.tree.unflatten(structure, layer) for layer in zip(*each, strict=True)]


def rematerialized(body, config: WanConfig):
    """The body of a scan over layers, recomputed in the backward pass according to `config.remat`."""
    how: Any = dict(prevent_cse=config.unroll_layers)  # the passes of a scan are separate loops: CSE cannot undo remat
    if config.remat == "none":
        # gathered weights are not kept for the backward pass, which gathers them again
        return jax.checkpoint(body, policy=no_whole_weights, **how) if splits_weights() else body
    return jax.checkpoint(body, policy=POLICIES[config.remat], **how)


def count_parameters(model: WanModel | WanConfig) -> int:
    """Number of parameters; for a configuration, nothing is allocated.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> count_parameters(wan_config("wan2.1-t2v-1.3b"))
        1418996800

    Args:
        model: A model or a configuration.

    Returns:
        The count.
    """
    if isinstance(model, WanConfig):
        config = model
        model = nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
