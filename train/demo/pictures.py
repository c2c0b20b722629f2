"""The demo's plots: losses over the steps, and attention maps."""

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx

from monarchrt.models.wan import WanModel
from monarchrt.train.config import TrainConfig
from monarchrt.train.data import ClipWindows
from monarchrt.train.logs import read_log
from monarchrt.train.objectives.flow import add_noise, evaluation_noise
from monarchrt.train.objectives.settings import FlowConfig

matplotlib.use("Agg")  # pictures go to files; no display is needed
import matplotlib.pyplot as plt

COLOURS = {"dense": "#4c72b0", "dense, trained further": "#55a868", "Monarch, finetuned": "#dd8452"}
LOOK_FOR = (
    "Top: a row for each query token, a column for each key token; brighter is more attention. Look at the column of "
    "frame 0: it is clean, so the noisy frames attend to it. Sharp diagonal dots mean that each token attends to "
    "positions of its own; haze and vertical stripes, that all attend to the same ones. Swapped in, Monarch attention "
    "blurs the map; finetuning sharpens it. Bottom: the attention of the token marked +, in each frame."
)


def draw_losses(path: Path, dense: TrainConfig, control: TrainConfig, monarch: TrainConfig) -> Path:
    """Plots training and held-out losses of the dense run and of the two runs that continue it.

    Args:
        path: The png file to write.
        dense: Settings of the dense run.
        control: Settings of the run that trains it further.
        monarch: Settings of the run that finetunes it with Monarch attention.

    Returns:
        The path.
    """
    figure, axes = plt.subplots(figsize=(9, 4.6), layout="constrained")
    bottom, level, untrained = np.inf, 0.0, 0.0
    for (label, colour), config in zip(COLOURS.items(), (dense, control, monarch), strict=True):
        records = read_log(config.run.folder)
        offset = 0 if config is dense else dense.run.steps
        steps, losses = _series(records, "loss")
        window = max(1, len(losses) // 25)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        bottom = min(bottom, np.min(smooth))
        axes.plot(offset + steps[window - 1 :], smooth, color=colour, alpha=0.35, lw=1)
        at, held_out = _series(records, "held_out_loss")
        axes.plot(offset + at, held_out, "o-", color=colour, label=f"{label}: {held_out[-1]:.3f}", ms=4)
        if config is control:
            level = held_out[-1]
        untrained = held_out[0]  # after the loop that of the Monarch run, at step 0
    axes.axvline(dense.run.steps, color="0.6", lw=1, ls=":")
    axes.axhline(level, color=COLOURS["dense, trained further"], lw=1, ls="--")
    axes.set(xlabel="step", ylabel="flow-matching loss", title="dots: on the held-out clip; faint: while training")
    # limits that show the swap; the losses of the first steps are above them
    bottom, height = min(level, bottom), max(untrained - level, 0.05 * level)
    axes.set_ylim(bottom - 0.5 * height, untrained + 2.5 * height)
    note = f"Monarch attention\nswapped in: {untrained:.3f}"
    axes.annotate(
        note,
        (dense.run.steps, untrained),
        (-12, 40),
        textcoords="offset points",
        ha="right",
        arrowprops={"arrowstyle": "->"},
    )
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), title="held-out loss at the end")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_attention(
    path: Path, models: Mapping[str, WanModel], source: ClipWindows, config: TrainConfig, *, level: float = 0.6
) -> Path:
    """Draws the attention of one head of the last layer, for each model, on one held-out window.

    The upper part shows the whole map, the lower part the row of one token as frames. Shown are the head, and the token
    of a noisy frame, whose attention the swap changes most.

    Args:
        path: The png file to write.
        models: Networks by label; the first has dense attention, the second the same parameters.
        source: The windows of the clip.
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
    grid = latents.shape[1:4]
    tokens = grid[1] * grid[2]
    token = tokens + int(np.abs(first - second)[head, tokens:].sum(1).argmax())
    figure = plt.figure(figsize=(4.6 * len(maps), 8.2), layout="constrained")
    above, below = cast(Any, figure.subfigures(2, 1, height_ratios=[4.6, 2.6]))
    _draw_maps(above, {label: attention[head] for label, attention in maps.items()}, tokens)
    _draw_rows(below, {label: attention[head, token] for label, attention in maps.items()}, grid, token)
    where = f"Layer {_last(models)}, head {head}; frame 0 is clean, the others are noisy; colours are of square roots."
    figure.supxlabel(textwrap.fill(f"{LOOK_FOR} {where}", 60 * len(maps)), fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _draw_maps(figure: Any, maps: Mapping[str, np.ndarray], tokens: int) -> None:
    """Draws whole maps [N, N] with lines between the frames."""
    peak = np.quantile(next(iter(maps.values())), 0.999)
    for axis, (label, attention) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps.items(), strict=True):
        axis.imshow(np.sqrt(attention / peak), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(label)
        edges = np.arange(0, len(attention) + 1, tokens) - 0.5
        axis.set_xticks(edges[:-1] + tokens / 2, [f"frame {n}" for n in range(len(edges) - 1)])
        axis.set_yticks(edges[:-1] + tokens / 2, [str(n) for n in range(len(edges) - 1)])
        axis.tick_params(length=0)
        for edge in edges[1:-1]:
            axis.axhline(edge, color="w", lw=0.4)
            axis.axvline(edge, color="w", lw=0.4)
    figure.supylabel("query token")


def _draw_rows(figure: Any, rows: Mapping[str, np.ndarray], grid: tuple[int, ...], token: int) -> None:
    """Draws one row [N] of each map as frames [F, h, w], in two lines, with a cross at the position of the token."""
    frames, height, width = grid
    columns = -(-frames // 2)
    peak = np.quantile(next(iter(rows.values())), 0.99)
    for part, row in zip(figure.subfigures(1, len(rows), squeeze=False)[0], rows.values(), strict=True):
        axes = part.subplots(2, columns, squeeze=False).ravel()
        for axis in axes:
            axis.axis("off")
        for number, (axis, picture) in enumerate(zip(axes, row.reshape(frames, height, width), strict=False)):
            axis.imshow(np.sqrt(picture / peak), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(f"frame {number}", fontsize=8)
        frame, place = divmod(token, height * width)
        axes[frame].plot(place % width, place // width, "+", color="cyan", ms=9, mew=2)


def attention_map(model: WanModel, latents: jnp.ndarray, timesteps: jnp.ndarray, text: jnp.ndarray) -> np.ndarray:
    """Computes the attention map of the last layer for the first sample.

    Args:
        model: The network.
        latents: Latents [B, F, h, w, C].
        timesteps: Timesteps [B, F].
        text: Text embeddings [B, L, D].

    Returns:
        The map of each head, [heads, N, N], whose rows sum to 1.
    """
    layer = model.config.num_layers - 1
    setting = model.config.layer_attention[layer]

    @nnx.jit
    def draw(model, latents, timesteps, text):
        query, key, _, grid = model.attention_inputs(latents, timesteps, text, layer=layer)
        return setting.attention_map(query, key, grid=grid)[0]

    return np.asarray(draw(model, latents[:1], timesteps[:1], text[:1]))


def _series(records: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[name]) for record in records if name in record]
    steps, values = zip(*points, strict=True)
    return np.array(steps), np.array(values, float)


def _last(models: Mapping[str, WanModel]) -> int:
    return next(iter(models.values())).config.num_layers - 1
