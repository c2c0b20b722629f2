"""The held-out loss: a number without chance, so that networks can be compared."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from monarchrt.train.config import ObjectiveConfig
from monarchrt.train.data import Batch, Source, spread
from monarchrt.train.objective import evaluation_indices, evaluation_levels, evaluation_noise
from monarchrt.train.step import ErrorFn

Place = Callable[[Any], Any]


def held_out_loss(
    errors: ErrorFn,
    params: Any,
    fixed: Any,
    source: Source,
    *,
    objective: ObjectiveConfig,
    windows: int = 4,
    timesteps: int = 8,
    batch: int = 4,
    place: Place = jax.device_put,
) -> float:
    """Measures the training objective on held-out examples at fixed noise levels with fixed noise.

    The same examples, levels and noise are used for every network, step and run, so differences between two values
    come from the networks alone.

    Args:
        errors: From `monarchrt.train.step.make_error_fn`.
        params: Parameters to evaluate.
        fixed: The network's other variables.
        source: Its held-out part is used.
        objective: The loss.
        windows: Examples, spread over the held-out part.
        timesteps: Noise levels, spread evenly over the training distribution.
        batch: Samples per call of the network.
        place: Moves a batch to the devices.

    Returns:
        Mean over examples and levels of weight(t) * mean (v - (eps - x0))^2.
    """
    levels = evaluation_levels(objective, timesteps)
    indices = spread(source.held_out, windows)
    pairs = [(index, level) for index in indices for level in range(timesteps)]
    examples = {index: source.held_out_batch([index]) for index in indices}
    total = 0.0
    for start in range(0, len(pairs), batch):
        chunk = pairs[start : start + batch]
        full = chunk + [chunk[-1]] * (batch - len(chunk))  # one compiled shape
        clean = Batch(*(np.concatenate(part) for part in zip(*(examples[index] for index, _ in full), strict=True)))
        noise = np.stack([evaluation_noise(index, level, source.latent_shape) for index, level in full])
        level = np.stack([evaluation_indices(objective, level, timesteps, clean.latents.shape[1]) for _, level in full])
        per_sample = errors(params, fixed, *place((*clean, noise, levels.sigma[level])))
        weighted = np.asarray(per_sample, np.float64) * levels.weight[level]
        total += float(weighted.reshape(len(full), -1).mean(1)[: len(chunk)].sum())
    return total / len(pairs)
