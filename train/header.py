"""The summary that a run prints before it starts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from monarchrt.models.attention.densities import density_of_network
from monarchrt.models.attention.notation import to_text
from monarchrt.models.errors import UserError
from monarchrt.models.memory import device_memory
from monarchrt.models.wan import WanConfig
from monarchrt.train.config import TrainConfig
from monarchrt.train.state import SameAs, TrainState


def run_header(
    config: TrainConfig,
    template: TrainState,
    *,
    latent_shape: Sequence[int],
    held_out: int,
    networks: Mapping[str, Any],
    devices: Sequence[Any],
) -> list[str]:
    """Summarizes a run: each network and its attention, optimizers, devices and memory, and warnings.

    Args:
        config: The settings.
        template: Shapes and shardings of the state.
        latent_shape: Shape [F, h, w, C] of a sample.
        held_out: Number of held-out examples.
        networks: Configuration of each role's network; tokens and attention are shown for a `WanConfig` only.
        devices: Devices of the run.

    Returns:
        The lines.
    """
    lines = [_network(config, template, role, latent_shape, networks[role]) for role in template.roles]
    lines += dict.fromkeys(line for role in config.objective.training for line in _narrow(networks[role]))
    for role in config.objective.training:
        lines += [*undecayed(config, role), *not_reached(config, role)]
    run = config.run
    lines += few_examples(held_out, run.eval_windows)
    origin = config.origin(config.objective.exported) or "scratch"
    optimizers = [_optimizer(config, role) for role in config.objective.training]
    lines.append(
        f"run: {run.steps:,} steps of {run.batch} samples from {origin}, seed {run.seed}; {'; '.join(optimizers)}; "
        f"everything goes to {run.folder}"
    )
    lines.append(
        f"devices: {_devices(devices)}; the state takes {_bytes(_held(template))} on each, in addition to activations"
    )
    return lines


def check_fits(template: TrainState, devices: Sequence[Any]) -> None:
    """Checks that the state of a run fits into the memory of its devices; steps need more.

    Args:
        template: Shapes and shardings of the state.
        devices: Devices of the run.

    Raises:
        UserError: If the state is larger than a device's memory.
    """
    held, there = _held(template), min(map(device_memory, devices))
    if held <= there:
        return
    count = sum(math.prod(leaf.shape) for role in template.roles.values() for leaf in jax.tree.leaves(role.params))
    raise UserError(
        f"the state of the run takes {_bytes(held)} on each device, which has {_bytes(there)}: {_short(count)} "
        f"parameters, their averages and the optimizer's; use a smaller --preset or smaller --overrides, or more "
        f"devices and --sharding fsdp"
    )


def _network(config: TrainConfig, template: TrainState, role: str, latent_shape: Sequence[int], network: Any) -> str:
    several, state = len(template.roles) > 1, template.roles[role]
    parts = (state.params, template.frozen(role))
    trained, fixed = (sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(x)) for x in parts)
    line = f"{role if several else 'network'}: {_short(trained + fixed)} parameters"
    if fixed:
        line += f", {_short(trained)} of them trained" if trained else ", not trained"
    line += f", computed in {config.role(role).precision}"
    if isinstance(state.frozen, SameAs):
        line += f", on those of the {state.frozen.role}"
    if not isinstance(network, WanConfig):
        return line
    grid = network.token_grid(*latent_shape[:3])
    size = " x ".join(map(str, grid))
    return f"{line}; {math.prod(grid):,} tokens ({size}) a sample; {_attention(network, grid)}"


def _optimizer(config: TrainConfig, role: str) -> str:
    settings = config.trained(role)
    whose = f" for the {role}" if len(config.objective.training) > 1 else ""
    return f"AdamW at {settings.learning_rate:g}, {settings.schedule}{whose}"


def _attention(network: WanConfig, grid: tuple[int, int, int]) -> str:
    settings = network.layer_attention
    density = density_of_network(network.attention, network.num_layers, grid, causal_block=network.causal_block)
    text = to_text(settings[0] if len(set(settings)) == 1 else settings)
    return f"attention {text}, {density}"


def _narrow(network: Any) -> list[str]:
    """A warning if a token has more values than the network's width: the network cannot reproduce the noise."""
    if not isinstance(network, WanConfig):
        return []
    numbers = math.prod(network.patch_size) * network.out_channels
    if numbers <= network.dim:
        return []
    return [
        f"warning: a token holds {numbers} numbers and the network is {network.dim} wide: noise cannot pass "
        f"through it, and the loss stays above about {1 - network.dim / numbers:.2f}; use a smaller --patch, or a "
        f"larger dim with --overrides"
    ]


def undecayed(config: TrainConfig, role: str) -> list[str]:
    """A warning if `decay_steps` is given but the learning rate is constant."""
    settings = config.trained(role)
    if settings.decay_steps is None or settings.schedule != "constant":
        return []
    decay, schedule = (config.option(role, name) for name in ("decay_steps", "schedule"))
    return [
        f"warning: {decay} is {settings.decay_steps}, but {schedule} is constant, so the learning rate does not "
        f"change; give --{schedule.replace('_', '-')} cosine or linear"
    ]


def not_reached(config: TrainConfig, role: str) -> list[str]:
    """Warnings if the warm-up does not end in the run, or the moving average does not start."""
    settings, steps = config.trained(role), config.run.steps
    warmup, start, decay = (config.option(role, name) for name in ("warmup", "ema_start", "ema_decay"))
    lines = []
    if settings.warmup > steps:
        lines.append(
            f"warning: {warmup} is {settings.warmup} and the run has {steps} steps, so the learning rate stays below "
            f"{settings.learning_rate:g}; give a smaller --{warmup.replace('_', '-')}"
        )
    if settings.ema_start and settings.ema_decay is None:
        lines.append(f"warning: {start} is {settings.ema_start}, but {decay} is None, so there is no moving average")
    elif settings.ema_start >= steps:
        lines.append(
            f"warning: {start} is {settings.ema_start} and the run has {steps} steps, so the moving average is the "
            f"last parameters; give a smaller --{start.replace('_', '-')}"
        )
    return lines


def few_examples(held_out: int, windows: int) -> list[str]:
    """A note if fewer examples are held out than `eval_windows`."""
    if held_out >= windows:
        return []
    few = f"{held_out} examples are" if held_out > 1 else "1 example is"
    return [f"note: only {few} held out, so the held-out loss uses {held_out} instead of --eval-windows {windows}"]


def _devices(devices: Sequence[Any]) -> str:
    kind = getattr(devices[0], "device_kind", devices[0].platform)
    own = next((device for device in devices if device.process_index == jax.process_index()), None)
    memory = None if own is None else (own.memory_stats() or {}).get("bytes_limit")
    return f"{len(devices)} x {kind}" + (f" with {_bytes(memory)}" if memory else "")


def _held(template: TrainState) -> int:
    """Bytes of the state on one device."""
    sizes = (
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(template)
    )
    return sum(sizes)


def _short(count: int) -> str:
    """A count with three significant digits, such as 1.42B."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _bytes(count: int) -> str:
    for size, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= size:
            return f"{count / size:.3g} {name}"
    return f"{count} bytes"
