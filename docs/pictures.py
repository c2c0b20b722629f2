"""Draws the pictures of these pages, docs/assets/*: `python docs/pictures.py`.

With `--demo runs/demo`, the film of a finished `monarchrt demo` too, made smaller.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from monarch_jax import MonarchSpec, monarch_factors, sparsity

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ASSETS = Path(__file__).parent / "assets"
GRID = (3, 4, 6)  # frames, rows, columns


def video_like(key: jax.Array, grid: tuple[int, int, int], *, width: int = 24) -> tuple[jax.Array, jax.Array]:
    """Queries and keys [1, N, 1, D] whose scores fall with distance in time, height and width, plus a few strong pairs.

    That is equation 1 of the paper: a part that separates over the axes, and a sparse rest.
    """
    axes = [
        np.exp(-(np.subtract.outer(np.arange(n), np.arange(n)) ** 2) / reach)
        for n, reach in zip(grid, (4, 2, 3), strict=True)
    ]
    frames, rows, columns = (np.linalg.cholesky(a + 1e-3 * np.eye(len(a))) for a in axes)
    position = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
    smooth = np.concatenate([frames[position[:, 0]], rows[position[:, 1]], columns[position[:, 2]]], axis=1)
    rest = np.asarray(jax.random.normal(key, (2, len(position), width)))
    q, k = (np.concatenate([6 * smooth, 0.9 * part], axis=1) for part in rest)
    return jnp.asarray(q)[None, :, None], jnp.asarray(k)[None, :, None]


def maps() -> None:
    """The dense map beside Monarch maps of three tiles."""
    q, k = video_like(jax.random.key(0), GRID)
    tiles = [(1, 1, 1), (1, 4, 6), (1, 2, 6), (3, 4, 6)]
    figure, axes = plt.subplots(1, len(tiles), figsize=(13, 3.7), constrained_layout=True)
    dense = None
    for axis, tile in zip(axes, tiles, strict=True):
        attention = np.asarray(monarch_factors(q, k, grid=GRID, tile=tile, scale=1 / 5).attention[0, 0])
        dense = attention if dense is None else dense
        error = np.linalg.norm(attention - dense) / np.linalg.norm(dense)
        stored = 1 - sparsity(grid=GRID, tile=tile)
        title = "dense, tile (1, 1, 1)" if tile == tiles[0] else f"tile {tile}\n{stored:.0%} stored, error {error:.0%}"
        axis.imshow(attention**0.5, cmap="magma", vmax=dense.max() ** 0.5, vmin=0)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("key")
        for edge in range(GRID[1] * GRID[2], attention.shape[0], GRID[1] * GRID[2]):
            axis.axhline(edge - 0.5, color="white", lw=0.4)
            axis.axvline(edge - 0.5, color="white", lw=0.4)
    axes[0].set_ylabel("query")
    figure.savefig(ASSETS / "maps.png", dpi=110)
    plt.close(figure)


def tiles() -> None:
    """Which tokens of a clip share a tile, for three tiles."""
    figure, axes = plt.subplots(3, GRID[0], figsize=(7.5, 5.2), constrained_layout=True)
    for row, tile in enumerate([(1, 4, 6), (1, 2, 6), (3, 4, 6)]):
        spec = MonarchSpec(grid=GRID, tile=tile)
        for frame in range(GRID[0]):
            y, x = np.mgrid[: GRID[1], : GRID[2]]
            number = (frame // tile[0]) * spec.tiles_per_group + y // tile[1] * (GRID[2] // tile[2]) + x // tile[2]
            inside = ((frame % tile[0]) * tile[1] + y % tile[1], x % tile[2])
            axis = axes[row, frame]
            axis.imshow(number, cmap="tab10", vmin=0, vmax=9, alpha=0.55)
            for i in range(GRID[1]):
                for j in range(GRID[2]):
                    axis.text(j, i, f"{inside[0][i, j]},{inside[1][i, j]}", ha="center", va="center", fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(f"frame {frame}", fontsize=9)
            if frame == 0:
                axis.set_ylabel(f"tile {tile}\nb1={spec.block_rows}, b2={spec.block_cols}", fontsize=9)
    figure.savefig(ASSETS / "tiles.png", dpi=110)
    plt.close(figure)


def stages() -> None:
    """The two stages of one refinement step: from keys to alpha and Y, from these to the output."""
    figure, axis = plt.subplots(figsize=(9, 1.9), constrained_layout=True)
    boxes = {
        "Q [a, i, j]\nK, V [c, k, l]": (0, "#dbe4f3"),
        "R: softmax over l\n$s\\,\\langle Q_{akj}, K_{ckl} \\rangle$": (2.2, "#f3dfdb"),
        "alpha, $c_L$, Y\n[a, c, j, k]": (4.6, "#e4f3db"),
        "L: softmax over (c, k)\n$s\\,\\langle Q_{aij}, \\alpha_{acjk} \\rangle - (c_L)_{acjk}$": (6.9, "#f3dfdb"),
        "O\n[a, i, j]": (9.3, "#dbe4f3"),
    }
    for text, (x, color) in boxes.items():
        axis.text(x, 0, text, ha="center", va="center", fontsize=10, bbox={"boxstyle": "round,pad=0.5", "fc": color})
    for left, right in ((0.72, 1.33), (3.07, 3.92), (5.28, 5.85), (8.0, 8.85)):
        axis.annotate("", (right, 0), (left, 0), arrowprops={"arrowstyle": "->"})
    axis.text(2.2, -0.75, "stage 1: for each pair of tiles (a, c)", ha="center", fontsize=9)
    axis.text(6.9, -0.75, "stage 2: over all key tiles c jointly, with Q again", ha="center", fontsize=9)
    axis.set(xlim=(-0.7, 9.9), ylim=(-0.95, 0.45))
    axis.axis("off")
    figure.savefig(ASSETS / "stages.png", dpi=110)
    plt.close(figure)


def film(demo: Path) -> None:
    """The demo's film: the clip, and how each model continues it."""
    from PIL import Image

    from monarchrt.models.media.video import read_clip

    frames = [Image.fromarray(frame) for frame in read_clip(demo / "comparison.mp4", height=360, width=572)]
    first, rest = frames[0], frames[1:]
    options = {"duration": 125, "loop": 0, "quality": 60, "method": 6}
    first.save(ASSETS / "demo.webp", save_all=True, append_images=rest, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="folder of a finished demo")
    asked = parser.parse_args()
    ASSETS.mkdir(exist_ok=True)
    for draw in (maps, tiles, stages):
        draw()
    if asked.demo:
        film(asked.demo)
