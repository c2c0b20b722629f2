"""Teacher forcing: a causal model on whole clips, in which noisy blocks see clean ones, as in generation."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Real

from monarchrt.models.attention.base import Context, Steps
from monarchrt.models.attention.blocks import attend_blocks
from monarchrt.models.sharding import split_batch
from monarchrt.models.wan.dit import Tokens, WanModel, attend_clip, attention_runs, through_layers
from monarchrt.models.wan.kept import BY_GROUPS
from monarchrt.models.wan.kinds import modules_of
from monarchrt.models.wan.rope import rope_table
from monarchrt.models.wan.tokens import pad_rope


def teacher_forced(
    model: WanModel,
    noisy: Float[Array, "B F H W C"],
    timesteps: Real[Array, "B"] | Real[Array, "B frames"],
    clean: Float[Array, "B F H W C"],
    text: Float[Array, "B L E"],
    *,
    clean_timesteps: Real[Array, "B"] | Real[Array, "B frames"] | None = None,
    step: Steps = None,
) -> Float[Array, "B F H W C_out"]:
    """Predicts the flow of all noisy blocks at once, each of which sees the clean blocks before it.

    Clean block i sees clean blocks up to i; noisy block i sees clean blocks before i, and itself. Both halves have the
    same positions, and each has its own timesteps. The clean half passes through all layers and is differentiated like
    the noisy half; the head is applied to the noisy half only. Generation computes the same block by block with
    `monarchrt.models.wan.causal.cached_forward`, with the clean blocks in the cache.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> model = WanModel(wan_config("tiny", num_layers=1, causal_block=3), rngs=nnx.Rngs(0))
        >>> noisy, clean = jnp.ones((1, 6, 4, 8, 16)), jnp.zeros((1, 6, 4, 8, 16))
        >>> teacher_forced(model, noisy, jnp.full((1, 6), 500.0), clean, jnp.zeros((1, 5, 32))).shape
        (1, 6, 4, 8, 16)

    Args:
        model: A causal text-to-video model.
        noisy: Noised latents, channels last.
        timesteps: Timesteps of the noisy half, one per sample or one per frame of tokens.
        clean: The latents that later blocks see.
        text: Output of the text encoder, as in the model's call.
        clean_timesteps: Timesteps of the clean half; None: 0, which is clean.
        step: Index of the noisy half's call within a sampler, which may be traced, for attention that depends on it; or
            one per sample or per frame of tokens. The clean half counts as after all steps, like cached blocks.

    Returns:
        The flow of the noisy half, in float32 or wider.

    Raises:
        ValueError: If the model is not causal, shapes do not fit it, or frames are not whole blocks.
    """
    config = model.config
    if config.causal_block is None:
        raise ValueError("causal_block=None: the model is not causal; use model.with_config(causal_block=3).")
    if clean.shape != noisy.shape:
        raise ValueError(f"clean has shape {clean.shape}, but noisy has {noisy.shape}.")
    if config.model_type != "t2v":
        raise ValueError(f"model_type={config.model_type!r}; only text-to-video models can be teacher-forced: 't2v'.")
    if clean_timesteps is None:
        clean_timesteps = jnp.zeros_like(timesteps)
    grid = model.check_latents(noisy, timesteps, step)
    model.check_latents(clean, clean_timesteps)
    model.check_context(noisy.shape[0], text, None)
    sizes = config.block_sizes(grid[0])
    halves = [
        model.embed_latents(latents, _per_frame(times, grid))
        for latents, times in ((clean, clean_timesteps), (noisy, timesteps))
    ]
    tokens = split_batch(jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), *halves))
    x = _run_halves(model, tokens, model.embed_context(text), grid, sizes, step)
    return model.unpatchify(model.run_head(x, halves[1].time), grid)


def _per_frame(timesteps: Array, grid: tuple[int, int, int]) -> Array:
    if timesteps.ndim == 2:
        return timesteps
    return jnp.broadcast_to(timesteps[:, None], (timesteps.shape[0], grid[0]))


def _run_halves(
    model: WanModel, tokens: Tokens, context: Any, grid: tuple[int, int, int], sizes: list[int], step: Steps
) -> Array:
    """Runs all layers on the frames [clean; noisy]; returns the noisy half of the residual stream."""
    config, frames = model.config, grid[0]
    per_frame = grid[1] * grid[2]
    cos, sin = pad_rope(rope_table(grid, config.head_dim))
    rope = jnp.concatenate([cos, cos]), jnp.concatenate([sin, sin])
    graph, state = nnx.split(model.blocks)
    x = tokens.x
    for run in attention_runs(config.layer_attention):

        def body(x, layer, setting=run.setting):
            layer, number = layer
            block = nnx.merge(graph, layer)

            def where(half: slice, step: Steps = None) -> Context:
                own = x[:, half, :per_frame]
                inputs = partial(block.attention_inputs, own, tokens.time_projection[:, half])
                return Context(layer=number, step=step, inputs=inputs, modules=modules_of(block))

            def attention(query, key, value):
                clean, noisy = zip(*(jnp.split(a, 2, axis=1) for a in (query, key, value)), strict=True)
                seen = attend_clip(config, setting, *clean, grid=grid, context=where(slice(0, frames)))
                context = where(slice(frames, None), step)
                sees = attend_blocks(setting, *noisy, past=clean[1:], grid=grid, sizes=sizes, context=context)
                return jnp.concatenate([seen, sees], axis=1)

            how: Any = dict(tokens=per_frame, recompute=config.remat in BY_GROUPS)
            cross = block.cross_attn.keys_values(*context)
            x = block(x, tokens.time_projection, rope, cross, attention, **how)
            return split_batch(x), None

        stacked = run.of(state, config.num_layers), jnp.arange(run.start, run.stop)
        x = through_layers(body, config, x, stacked)
    return x[:, frames:]
