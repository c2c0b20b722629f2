"""`monarchrt study mass`: the fraction of keys with most of the attention, by block (paper, Figure 4a)."""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np

from monarchrt.models.attention.capture import Captured, capture
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.config import GenerateConfig, Mode
from monarchrt.models.generate.material import Material
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.train.config import to_dict
from monarchrt.train.evaluation.subject import video_of
from monarchrt.train.studies import pictures
from monarchrt.train.studies.approximations import share_for_mass
from monarchrt.train.studies.config import MassConfig, TilesConfig
from monarchrt.train.studies.maps import choose
from monarchrt.train.studies.partial import Partial
from monarchrt.train.studies.results import claim_results, progress, write_json

FILES, PART = ("mass.json", "mass.png"), "mass.part.json"


def study_mass(config: MassConfig) -> dict[str, Any]:
    """Generates a video and writes the fraction of keys that hold `mass` of the attention, by head and block.

    A block is one of the roll-out, or a window in mode windows.

    Args:
        config: The settings.

    Returns:
        The content of the JSON file, among others `blocks`, the indices of generated blocks; `shares`, the fractions by
        head and block; and `mean`, their means over the heads.

    Raises:
        UserError: If a setting cannot be used.
    """
    claim_results(config.out, FILES, overwrite=config.overwrite)
    partial = Partial(config.out / PART, to_dict(config), resume=config.resume, overwrite=config.overwrite)
    material = video_material(config, mode=config.mode)
    sizes = material.pipeline.model.config
    layers = choose("layers", config.layers, sizes.num_layers) or (0, sizes.num_layers // 2, sizes.num_layers - 1)
    heads = choose("heads", config.heads, sizes.num_heads) or tuple(range(sizes.num_heads))
    steps = material.plan.settings.table().steps
    if config.step >= steps:
        raise UserError(f"step is {config.step}, but the sampler has {steps} steps; use 0 to {steps - 1}")
    with (
        progress("latent frames", material.plan.latents[0], quiet=config.quiet) as advance,
        capture(material.pipeline.model, layers=layers, steps=(config.step,), heads=heads) as (model, calls),
    ):
        options = {"negative": material.negative, "initial": material.initial, "noise": material.noise}
        with user_input():
            pipeline = VideoPipeline(model, material.pipeline.decoder)
            for part in pipeline.latents(material.text, plan=material.plan, **options):
                advance(part.shape[1])
    with progress("shares", len(calls) * len(heads), quiet=config.quiet) as advance:
        blocks, shares = by_block(calls, config.mass, partial, advance)
    mean = [float(np.mean(values)) for values in zip(*shares.values(), strict=True)]
    result = {
        "checkpoint": config.checkpoint, "mass": config.mass, "step": config.step, "blocks": blocks, "mean": mean,
        "shares": shares,
    }  # fmt: skip
    write_json(config.out / FILES[0], result)
    pictures.draw_mass(config.out / FILES[1], shares, blocks=blocks, mass=config.mass)
    partial.done()
    return result


def by_block(
    calls: list[Captured], mass: float, partial: Partial, advance: Callable[[], None] = lambda: None
) -> tuple[list[int], dict[str, list[float]]]:
    """The fraction of keys by layer, head and block; for calls without a block, by number of the call.

    Args:
        calls: Captured queries and keys.
        mass: Sum of probabilities to reach.
        partial: Stores each result, since counting takes longer than the video on a large model.
        advance: Called after each result.

    Returns:
        Indices of the blocks, and the fractions by layer and head.
    """
    shares: dict[str, dict[int, float]] = collections.defaultdict(dict)
    calls = sorted(calls, key=lambda call: call.layer)  # a stable sort, which keeps the order of blocks
    for call in calls:
        for place, head in enumerate(call.heads):
            label = f"layer {call.layer}, head {head}"
            block = len(shares[label]) if call.block is None else call.block
            query, key = (x[0, :, place] for x in (call.query, call.key))
            shares[label][block] = partial.of(
                f"{label}, block {block}", lambda query=query, key=key: share_for_mass(query, key, mass)
            )
            advance()
    blocks = sorted({block for values in shares.values() for block in values})
    return blocks, {label: [values[block] for block in blocks] for label, values in shares.items()}


def video_material(config: MassConfig | TilesConfig, *, mode: Mode = "auto") -> Material:
    """Loads what is needed to generate a study's video, as `monarchrt generate` would."""
    given = GenerateConfig(
        checkpoint=config.checkpoint,
        frames=config.frames,
        steps=config.sample_steps,
        prompt=config.prompt,
        components=config.components,
        embeddings=config.embeddings,
        seed=config.seed,
        mode=mode,
    )
    return video_of(given, config.video)
