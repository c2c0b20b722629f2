"""From a checkpoint to an engine."""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import NEGATIVE_PROMPT, NO_CONDITION, GenerateConfig
from monarchrt.models.generate.load import WanCheckpoint, find_components, half_precision, load_wan, open_checkpoint
from monarchrt.models.generate.material import Material
from monarchrt.models.generate.text import StoredTexts, TextEncoder
from monarchrt.models.sampling import Rollout
from monarchrt.models.serve.engine import Encode, Engine


def load_engine(config: GenerateConfig, *, report: Callable[[str], None]) -> Engine:
    """Loads everything that sessions are made with: of a Wan checkpoint and its parts, or of a run folder.

    Args:
        config: The settings of a generation; of all its videos.
        report: Takes lines for the person who waits.

    Returns:
        The engine; nothing is compiled yet.

    Raises:
        UserError: If something is missing, or a setting does not fit.
    """
    for name in ("mesh", "decoder_device"):
        if (value := getattr(config, name)) is not None:
            raise UserError(f"{name} is {value}, but sessions are made on one device; leave it out")
    config = dataclasses.replace(config, mode="autoregressive")
    opened = open_checkpoint(config)
    if isinstance(opened, WanCheckpoint):
        encode, material = _wan(config, opened, report)
    else:
        material = opened.material(dataclasses.replace(config, condition=NO_CONDITION))
        report("note: a run folder was trained without text; prompts do nothing")
        encode = _untold(material)
    plan, rollout = material.plan, material.plan.settings
    if not isinstance(rollout, Rollout):
        raise UserError(f"mode is {plan.config.mode}; sessions are made block by block")
    if rollout.window is None:
        rollout = dataclasses.replace(rollout, window=plan.latents[0])
    report(f"a session's attention reaches back over {rollout.window} latent frames")
    return Engine(
        material.pipeline,
        rollout=rollout,
        height=plan.latents[1],
        width=plan.latents[2],
        encode=encode,
        fps=plan.config.fps or 16.0,
        sample=encode.prompts[0] if isinstance(encode, StoredTexts) else "a cat",
        negative=NEGATIVE_PROMPT if config.negative_prompt is None else config.negative_prompt,
    )


def _wan(config: GenerateConfig, opened: WanCheckpoint, report: Callable[[str], None]) -> tuple[Encode, Material]:
    components, sizes = find_components(config, opened.source.path), opened.sizes
    material = load_wan(config, opened, texts=False, report=report)
    if config.embeddings is not None:
        return StoredTexts(config.embeddings, rows=sizes.text_len), material
    if components.text_encoder is None or components.tokenizer is None:
        raise UserError("there is no text encoder; give its folder with --components, or --embeddings")
    encoder = TextEncoder(
        components.text_encoder,
        components.tokenizer,
        rows=sizes.text_len,
        dtype=half_precision(config),
        report=report,
    )
    return encoder, material


def _untold(material: Material) -> Encode:
    """Of a network without text."""

    def encode(prompts: Sequence[str]):
        return [jnp.asarray(material.text) for _ in prompts]

    return encode
