"""What a run says of itself before it begins."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from monarchrt.models.wan import MonarchAttention, WanConfig
from monarchrt.train.config import TrainConfig
from monarchrt.train.state import TrainState


def run_header(
    config: TrainConfig, template: TrainState, *, latent_shape: Sequence[int], network: Any, devices: Sequence[Any]
) -> list[str]:
    """Sums up a run in three lines: network and attention, data and optimizer, devices and memory.

    Args:
        config: The settings.
        template: Shapes and shardings of the state.
        latent_shape: Shape [F, h, w, C] of a sample.
        network: The network's `WanConfig`; anything else leaves tokens and attention out.
        devices: What the run works on.

    Returns:
        The lines.
    """
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(template.params))
    lines = [f"network: {_short(count)} parameters, computed in {config.run.precision}"]
    if isinstance(network, WanConfig):
        grid = network.token_grid(*latent_shape[:3])
        size = " x ".join(map(str, grid))
        lines[0] += f"; {math.prod(grid):,} tokens ({size}) a sample; {_attention(network, grid)}"
    run, optimizer = config.run, config.optimizer
    origin = "scratch" if run.init_from is None else run.init_from
    lines.append(
        f"run: {run.steps:,} steps of {run.batch} samples from {origin}, seed {run.seed}; AdamW at "
        f"{optimizer.learning_rate:g}, {optimizer.schedule}; everything goes to {run.folder}"
    )
    lines.append(
        f"devices: {_devices(devices)}; the state takes {_bytes(_held(template))} of each, activations come on top"
    )
    return lines


def _attention(network: WanConfig, grid: tuple[int, int, int]) -> str:
    settings = network.layer_attention
    stored = [1 - s.spec(grid).sparsity if isinstance(s, MonarchAttention) else 1.0 for s in settings]
    if min(stored) == 1:
        return "dense attention"
    tiles = {s.tile or (1, *grid[1:]) for s in settings if isinstance(s, MonarchAttention)}
    tile = " or ".join(" x ".join(map(str, tile)) for tile in sorted(tiles))
    return f"Monarch attention, tile {tile}, {1 - sum(stored) / len(stored):.1%} sparse"


def _devices(devices: Sequence[Any]) -> str:
    kind = getattr(devices[0], "device_kind", devices[0].platform)
    memory = (devices[0].memory_stats() or {}).get("bytes_limit")
    return f"{len(devices)} x {kind}" + (f" with {_bytes(memory)}" if memory else "")


def _held(template: TrainState) -> int:
    """Bytes of the state on one device."""
    sizes = (
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(template)
    )
    return sum(sizes)


def _short(count: int) -> str:
    """A count in three digits, such as 1.42B."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _bytes(count: int) -> str:
    for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count} bytes"
