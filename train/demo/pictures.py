"""The demo's pictures: losses over the steps, and attention maps."""

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

from monarch_jax import monarch_factors
from monarchrt.models.wan import MonarchAttention, WanModel
from monarchrt.train.config import TrainConfig
from monarchrt.train.data import ClipWindows
from monarchrt.train.logs import read_log
from monarchrt.train.objectives.flow import add_noise, evaluation_noise
from monarchrt.train.objectives.settings import FlowConfig

matplotlib.use("Agg")  # pictures go to files; no display is needed
import matplotlib.pyplot as plt

COLOURS = {"dense": "#4c72b0", "monarch": "#dd8452"}


def draw_losses(path: Path, dense: TrainConfig, monarch: TrainConfig, *, untrained: float) -> Path:
    """Draws training and held-out losses of both runs one after the other.

    Args:
        path: The png.
        dense: Settings of the dense run.
        monarch: Settings of the finetuning run.
        untrained: Held-out loss between the two.

    Returns:
        The path.
    """
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    offset = 0
    for label, config in (("dense", dense), ("monarch", monarch)):
        records = read_log(config.run.folder)
        steps, losses = _series(records, "loss")
        window = max(1, len(losses) // 50)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(offset + steps[window - 1 :], smooth, color=COLOURS[label], alpha=0.45, lw=1)
        at, held_out = _series(records, "held_out_loss")
        if label == "monarch":
            at, held_out = np.concatenate([[0], at]), np.concatenate([[untrained], held_out])
        axes.plot(offset + at, held_out, "o-", color=COLOURS[label], label=f"{label}, held-out", ms=4)
        if label == "dense":
            level = held_out[-1]
            offset = config.run.steps
            axes.axvline(offset, color="0.6", lw=1, ls=":")
    axes.axhline(level, color=COLOURS["dense"], lw=1, ls="--", label="dense, final")
    axes.set(xlabel="step", ylabel="flow-matching loss", title="faint: training loss, smoothed")
    # the swap is what the picture is about; the first steps leave it at the top
    bottom, height = min(level, np.min(smooth)), max(untrained - level, 0.05 * level)
    axes.set_ylim(bottom - 0.5 * height, untrained + 2.5 * height)
    note = "Monarch attention\nswapped in"
    axes.annotate(
        note, (offset, untrained), (-12, 40), textcoords="offset points", ha="right", arrowprops={"arrowstyle": "->"}
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_attention(
    path: Path, models: Mapping[str, WanModel], source: ClipWindows, config: TrainConfig, *, level: float = 0.6
) -> Path:
    """Draws the attention map of one head of the last layer, for each model, on one held-out window.

    The head is the one whose map the swap changes most.

    Args:
        path: The png.
        models: Label -> network; the first is dense, the second has its parameters.
        source: The clip.
        config: Settings of the training run.
        level: Noise level of all frames but the first, which is clean.

    Returns:
        The path.
    """
    latents, text = (jnp.asarray(x) for x in source.held_out_batch([source.held_out // 2]))
    noise = jnp.asarray(evaluation_noise(0, 0, latents.shape))
    sigma = jnp.where(jnp.arange(latents.shape[1]) > 0, level, 0.0)[None]
    noisy = add_noise(latents, noise, sigma)
    timesteps = sigma * cast(FlowConfig, config.objective).num_train_timesteps
    maps = {label: attention_map(model, noisy, timesteps, text) for label, model in models.items()}
    first, second = list(maps.values())[:2]
    head = int(np.abs(first - second).sum((1, 2)).argmax())
    tokens = latents.shape[2] * latents.shape[3]
    figure, axes = plt.subplots(1, len(maps), figsize=(4.6 * len(maps), 5), layout="constrained")
    peak = np.quantile(first[head], 0.999)
    for axis, (label, attention) in zip(np.atleast_1d(axes), maps.items(), strict=True):
        axis.imshow(np.sqrt(attention[head] / peak), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(label)
        edges = np.arange(0, attention.shape[1] + 1, tokens) - 0.5
        axis.set_xticks(edges[:-1] + tokens / 2, [f"frame {n}" for n in range(len(edges) - 1)])
        axis.set_yticks(edges[:-1] + tokens / 2, [str(n) for n in range(len(edges) - 1)])
        axis.tick_params(length=0)
        for edge in edges[1:-1]:
            axis.axhline(edge, color="w", lw=0.4)
            axis.axvline(edge, color="w", lw=0.4)
    figure.supxlabel(
        f"key (frame 0 is clean, the others are noisy); layer {_last(models)}, head {head}; colour: square root"
    )
    figure.supylabel("query")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def attention_map(model: WanModel, latents: jnp.ndarray, timesteps: jnp.ndarray, text: jnp.ndarray) -> np.ndarray:
    """The attention map of the last layer for the first sample, [heads, N, N], rows summing to 1."""
    layer = model.config.num_layers - 1
    setting = model.config.layer_attention[layer]

    @nnx.jit
    def draw(model, latents, timesteps, text):
        query, key, _, grid = model.attention_inputs(latents, timesteps, text, layer=layer)
        if not isinstance(setting, MonarchAttention):
            scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
            return jax.nn.softmax(scores, -1)[0]
        factors = monarch_factors(
            query, key, grid=grid, tile=setting.tile, blocks=setting.blocks, num_iters=setting.num_iters
        )
        return factors.attention[0]

    return np.asarray(draw(model, latents[:1], timesteps[:1], text[:1]))


def _series(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(record["step"], record[name]) for record in records if name in record]
    steps, values = zip(*found, strict=True)
    return np.array(steps), np.array(values, float)


def _last(models: Mapping[str, WanModel]) -> int:
    return next(iter(models.values())).config.num_layers - 1
