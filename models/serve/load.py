"""Creates an engine from a checkpoint, or with random weights."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.config import DECODERS, EXACT_DECODER, NEGATIVE_PROMPT, NO_CONDITION, GenerateConfig
from monarchrt.models.generate.decoders import FrameDecoder, TinyDecoder, WanDecoder
from monarchrt.models.generate.load import WanCheckpoint, find_components, half_precision, load_wan, open_checkpoint
from monarchrt.models.generate.material import Material, check_precision, with_products
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.places import find_places
from monarchrt.models.generate.plan import Defaults, Plan, make_plan
from monarchrt.models.generate.text import StoredTexts, TextEncoder
from monarchrt.models.sampling import Rollout
from monarchrt.models.serve.engine import Encode, Engine
from monarchrt.models.vae import TinyVAE, TinyVAEConfig, WanVAE, vae_config
from monarchrt.models.wan import WanModel, wan_config


def load_engine(
    config: GenerateConfig,
    *,
    unroll: bool | None = None,
    report: Callable[[str], None],
    begins: Sequence[int] | None = (),
    attentions: Sequence[str] = (),
) -> Engine:
    """Loads the network, decoder and text encoder of a Wan checkpoint, or the network and decoder of a run folder.

    Args:
        config: Settings that apply to all videos; `mode` is always autoregressive.
        unroll: Whether to unroll the network's layers (`unroll_layers`); None: on a GPU without a mesh.
        report: Called with lines of progress.
        begins: As in `Engine`; None: as many frames as the first block has.
        attentions: As in `Engine`.

    Returns:
        The engine, before compilation.

    Raises:
        UserError: If a file is missing, a setting is invalid, or there are several processes.
    """
    config = _block_by_block(config)
    opened = open_checkpoint(config)
    if isinstance(opened, WanCheckpoint):
        encode, material = _wan(config, opened, report)
    else:
        material = opened.material(dataclasses.replace(config, condition=NO_CONDITION))
        report("note: a run folder was trained without text; prompts have no effect")
        encode = _without_text(material)
    return _engine(material.plan, material.pipeline, encode, unroll, report, begins=begins, attentions=attentions)


def random_engine(
    config: GenerateConfig, *, preset: str, unroll: bool | None = None, report: Callable[[str], None]
) -> Engine:
    """An engine with random weights, for timing: it generates noise, by few-step sampling as Self-Forcing models do.

    Args:
        config: Settings as in `load_engine`; `decoder` must be the name of one.
        preset: Preset of `wan_config` for the network's sizes.
        unroll: As in `load_engine`.
        report: Called with lines of progress.

    Returns:
        The engine, before compilation.

    Raises:
        UserError: If the preset is unknown, or a setting is invalid or needs a checkpoint.
    """
    config = _block_by_block(config)
    check_precision(config)
    name = config.decoder or EXACT_DECODER
    if name not in DECODERS:
        raise UserError(f"decoder is {name}, but weights are random here; give {' or '.join(DECODERS)}")
    for option in ("components", "embeddings", "weights", "lora"):
        if value := getattr(config, option):
            raise UserError(f"{option} is {value}, but weights are random here; leave it out, or give a checkpoint")
    dtype = half_precision(config)
    with user_input():
        sizes = wan_config(preset, dtype=dtype, param_dtype=dtype)
    few_step = Defaults(mode="autoregressive", sampler="few-step", distilled=True, causal=True)
    plan = make_plan(config, defaults=few_step, model=sizes)
    types: dict[str, Any] = {"dtype": dtype, "param_dtype": dtype}
    where = find_places(config, heads=sizes.num_heads)
    decoder: FrameDecoder
    if name == EXACT_DECODER:
        vae = vae_config("wan21" if sizes.dim >= 1024 else "tiny")
        decoder = WanDecoder(nnx.jit(lambda: WanVAE(vae, rngs=nnx.Rngs(0), **types))(), device=where.decoder)
    else:
        tiny = nnx.jit(lambda: TinyVAE(TinyVAEConfig(), rngs=nnx.Rngs(0), **types))()
        decoder = TinyDecoder(tiny, device=where.decoder)
    if decoder.channels != sizes.out_channels:
        raise UserError(
            f"preset {preset} makes latents of {sizes.out_channels} channels, and the {name} decoder takes "
            f"{decoder.channels}; give another preset or --decoder"
        )
    model = where.moved(nnx.jit(lambda: WanModel(sizes, rngs=nnx.Rngs(0)))().with_attention(plan.attention))
    model = with_products(model, config)
    shape = (1, sizes.text_len, sizes.text_dim)

    def encode(prompts: Sequence[str]):
        return [jax.random.normal(jax.random.key(row), shape) for row, _ in enumerate(prompts)]

    report(f"weights are random, of the sizes of {preset}: no text is encoded, and what is made is noise")
    return _engine(plan, VideoPipeline(model, decoder, mesh=where.mesh), encode, unroll, report)


def _block_by_block(config: GenerateConfig) -> GenerateConfig:
    """The settings for generation block by block.

    Raises:
        UserError: If there are several processes.
    """
    if (count := jax.process_count()) > 1:
        raise UserError(f"there are {count} processes, but sessions run in one process, on its own devices; start one")
    return dataclasses.replace(config, mode="autoregressive", unroll_layers="auto")  # the engine unrolls


def _engine(
    plan: Plan,
    pipeline: VideoPipeline,
    encode: Encode,
    unroll: bool | None,
    report: Callable[[str], None],
    *,
    begins: Sequence[int] | None = (),
    attentions: Sequence[str] = (),
) -> Engine:
    rollout = plan.settings
    if not isinstance(rollout, Rollout):
        raise UserError(f"mode is {plan.config.mode}; sessions are made block by block")
    if rollout.window is None:
        rollout = dataclasses.replace(rollout, window=plan.latents[0])
    report(f"a session's attention reaches back over {rollout.window} latent frames")
    negative = plan.config.negative_prompt
    if begins is None:
        begins = (1 + (plan.first_block - 1) * plan.temporal,)
    return Engine(
        pipeline,
        rollout=rollout,
        height=plan.latents[1],
        width=plan.latents[2],
        encode=encode,
        fps=plan.config.fps or 16.0,
        sample=encode.prompts[0] if isinstance(encode, StoredTexts) else "a cat",
        negative=NEGATIVE_PROMPT if negative is None else negative,
        begins=begins,
        attentions=attentions,
        unroll=jax.default_backend() == "gpu" and pipeline.mesh is None if unroll is None else unroll,
    )


def _wan(config: GenerateConfig, opened: WanCheckpoint, report: Callable[[str], None]) -> tuple[Encode, Material]:
    components, sizes = find_components(config, opened.source.path), opened.sizes
    material = load_wan(config, opened, texts=False, report=report)
    if config.embeddings is not None:
        return StoredTexts(config.embeddings, rows=sizes.text_len), material
    if components.text_encoder is None or components.tokenizer is None:
        raise UserError("there is no text encoder; give its folder with --components, or the file of embeddings")
    encoder = TextEncoder(
        components.text_encoder,
        components.tokenizer,
        rows=sizes.text_len,
        dtype=half_precision(config),
        report=report,
    )
    return encoder, material


def _without_text(material: Material) -> Encode:
    """The encoder for a network trained without text: every prompt has the same embedding."""

    def encode(prompts: Sequence[str]):
        return [jnp.asarray(material.text) for _ in prompts]

    return encode
