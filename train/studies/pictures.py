"""Plots of the studies."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # pictures go to files; no display is needed
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

MARKS = "osD^vPX<>*p"  # 11 marks and 10 colors, whose pairs repeat after 110
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)  # densities in %


def looks_of(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A distinct pair of color and mark for each name.

    Examples:
        >>> looks = looks_of([str(n) for n in range(14)])
        >>> len(set(looks.values())), looks["10"]
        (14, ('C0', 'p'))
    """
    return {name: (f"C{n % 10}", MARKS[n % len(MARKS)]) for n, name in enumerate(names)}


def draw_map(path: Path, panels: Mapping[str, Sequence[Any]]) -> Path:
    """Plots error of the map against density: a panel for each set of points, a line for each method.

    Args:
        path: The png file to write.
        panels: `monarchrt.train.studies.maps.Point`s by title of the panel.

    Returns:
        The path.
    """
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.5 * len(panels) + 2.5, 5), layout="constrained", squeeze=False
    )
    methods = list(dict.fromkeys(point.method for points in panels.values() for point in points))
    looks = looks_of(methods)
    for axis, (title, points) in zip(axes[0], panels.items(), strict=True):
        for name in methods:
            of_method = sorted((point for point in points if point.method == name), key=lambda point: point.density)
            if not of_method:
                continue
            colour, mark = looks[name]
            density = [100 * point.density for point in of_method]
            error = [max(point.error.relative, 1e-7) for point in of_method]
            line = "none" if "tiled" in name or "misaligned" in name else "-"
            axis.plot(density, error, marker=mark, ls=line, color=colour, ms=4, lw=1, label=name)
        axis.set(xscale="log", yscale="log", xlabel="density, % of the map's entries", title=title)
        low, high = axis.get_xlim()
        shown = [tick for tick in TICKS if low <= tick <= high]
        if len(shown) > 1:
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xticks(shown, [f"{tick:g}" for tick in shown])
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel("relative error of the map, ||A' - A|| / ||A||")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return _saved(figure, path)


def draw_structure(path: Path, rows: Mapping[str, Mapping[str, np.ndarray]], *, largest: int = 450) -> Path:
    """Draws maps and their approximations as images of the fourth roots of entries, a row for each map.

    Args:
        path: The png file to write.
        rows: Maps [N, N] by name of the row and title.
        largest: Most pixels per side; larger maps are averaged over squares.

    Returns:
        The path.
    """
    most = max(len(panels) for panels in rows.values())
    size = (3.1 * most, 3.4 * len(rows))
    figure, axes = plt.subplots(len(rows), most, figsize=size, layout="constrained", squeeze=False)
    for line, (name, panels) in zip(axes, rows.items(), strict=True):
        for axis in line:
            axis.set_axis_off()
        top = max(float(panel.max()) for panel in panels.values())
        for axis, (title, panel) in zip(line, panels.items(), strict=False):
            axis.imshow(np.clip(_smaller(panel, largest), 0, None) ** 0.25, vmin=0, vmax=top**0.25, cmap="magma")
            axis.set_title(f"{name}\n{title}", fontsize=7)
    return _saved(figure, path)


def _smaller(picture: np.ndarray, largest: int) -> np.ndarray:
    """Averages an image over squares, so that no side has more than `largest` pixels."""
    step = -(-len(picture) // largest)
    cut = [np.arange(0, side, step) for side in picture.shape]
    sums = np.add.reduceat(np.add.reduceat(picture, cut[0], axis=0), cut[1], axis=1)
    counts = [np.diff([*places, side]) for places, side in zip(cut, picture.shape, strict=True)]
    return sums / np.outer(*counts)


def draw_mass(path: Path, shares: Mapping[str, Sequence[float]], *, blocks: Sequence[int], mass: float) -> Path:
    """Plots the fraction of keys that hold `mass` of the attention against the block, a line for each head.

    Args:
        path: The png file to write.
        shares: Fractions by block, by label of the line.
        blocks: Indices of the blocks.
        mass: Sum of probabilities that was reached.

    Returns:
        The path.
    """
    figure, axis = plt.subplots(figsize=(8, 4.6), layout="constrained")
    for (label, values), mark in zip(shares.items(), itertools.cycle(MARKS), strict=False):
        axis.plot(blocks, [100 * value for value in values], marker=mark, ms=4, lw=1, label=label)
    axis.set_xticks(blocks)
    axis.set(xlabel="block of the roll-out", ylabel=f"% of keys for {mass:.0%} of the attention", ylim=(0, 100))
    axis.grid(alpha=0.3)
    if len(shares) <= 24:
        axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=7)
    return _saved(figure, path)


def draw_front(path: Path, points: Sequence[Mapping[str, Any]], *, unit: str) -> Path:
    """Plots error of the layers' outputs against time, with the Pareto front, and PSNR of videos if there are any.

    Args:
        path: The png file to write.
        points: Points with `label`, `time`, `error`, `front`, and optionally `psnr` and `video_front`.
        unit: Unit of the time, the label of the axis.

    Returns:
        The path.
    """
    videos = [point for point in points if point.get("psnr") is not None]
    figure, axes = plt.subplots(
        1, 2 if videos else 1, figsize=(14 if videos else 8, 5), layout="constrained", squeeze=False
    )
    panels = [("error", points, "front", "relative error of the layers' outputs")]
    if videos:
        panels.append(("psnr", videos, "video_front", "PSNR of the video to dense attention's, dB"))
    for axis, (name, shown, front, label) in zip(axes[0], panels, strict=True):
        line = sorted((point for point in shown if point[front]), key=lambda point: point["time"])
        axis.plot([p["time"] for p in shown], [p[name] for p in shown], "o", color="0.6", ms=4)
        axis.plot([p["time"] for p in line], [p[name] for p in line], "o-", color="C3", ms=5, label="Pareto front")
        axis.legend()
        for point in line:
            axis.annotate(point["label"], (point["time"], point[name]), (4, 3), textcoords="offset points", fontsize=7)
        axis.set(xlabel=unit, ylabel=label)
        axis.grid(alpha=0.3)
    return _saved(figure, path)


def _saved(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
