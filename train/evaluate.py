"""The held-out loss: a number without chance, so that networks can be compared."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float64

from monarchrt.train.data import Source
from monarchrt.train.objectives.base import Objective
from monarchrt.train.objectives.registry import ObjectiveSettings, make_objective
from monarchrt.train.state import TrainState, split_model
from monarchrt.train.step import ErrorFn, make_error_fn

Place = Callable[[Any], Any]


def held_out_losses(
    errors: ErrorFn,
    state: TrainState,
    source: Source,
    *,
    objective: Objective,
    windows: int = 4,
    timesteps: int = 8,
    batch: int = 4,
    place: Place = jax.device_put,
) -> dict[str, float]:
    """Measures the objective on held-out examples with fixed draws.

    The same examples and draws are used for every network, step and run, so differences between two values come from
    the networks alone.

    Args:
        errors: From `monarchrt.train.step.make_error_fn`.
        state: Its evaluated parameters are measured.
        source: Its held-out part is used.
        objective: Says which examples and draws, and with what weights.
        windows: Examples, spread over the held-out part.
        timesteps: Noise levels, spread evenly over the training distribution.
        batch: Samples per call of the networks.
        place: Moves a batch to the devices.

    Returns:
        For each role that the objective measures, the mean of weight times error.
    """
    networks = {name: (role.evaluated, state.frozen(name)) for name, role in state.roles.items()}
    terms = weighted_errors(
        errors,
        networks,
        source=source,
        objective=objective,
        windows=windows,
        timesteps=timesteps,
        batch=batch,
        place=place,
    )
    return {role: float(values.mean()) for role, values in terms.items()}


def held_out_loss(
    model: nnx.Module,
    source: Source,
    *,
    objective: ObjectiveSettings,
    windows: int = 4,
    timesteps: int = 8,
    batch: int = 4,
) -> float:
    """The held-out loss of a network for an objective with one role, as training measures it.

    Args:
        model: The network.
        source: Its held-out part is used.
        objective: Settings of the objective.
        windows: As `held_out_losses`.
        timesteps: As `held_out_losses`.
        batch: As `held_out_losses`.

    Returns:
        The mean of weight times error.
    """
    options = {"objective": objective, "windows": windows, "timesteps": timesteps, "batch": batch}
    return float(held_out_terms(model, source, **options).mean())


def held_out_terms(
    model: nnx.Module,
    source: Source,
    *,
    objective: ObjectiveSettings,
    windows: int = 4,
    timesteps: int = 8,
    batch: int = 4,
) -> Float64[np.ndarray, "n"]:
    """What the held-out loss is the mean of: weight times error of each example at each of its draws.

    Those of two networks are of the same examples, noise levels and noise, in the same order, so that they can be
    compared in pairs. Arguments are as in `held_out_loss`.
    """
    made, role = make_objective(objective), objective.exported
    graph, params, frozen = split_model(model)
    errors = make_error_fn(made, {role: graph})
    networks = {role: (params, frozen)}
    return weighted_errors(
        errors, networks, source=source, objective=made, windows=windows, timesteps=timesteps, batch=batch
    )[role]


def weighted_errors(
    errors: ErrorFn,
    networks: Mapping[str, tuple[Any, Any]],
    *,
    source: Source,
    objective: Objective,
    windows: int,
    timesteps: int,
    batch: int,
    place: Place = jax.device_put,
) -> dict[str, Float64[np.ndarray, "n"]]:
    """Weight times error of each example at each of its draws, by role, in an order that is the same for all networks.

    Args:
        errors: From `monarchrt.train.step.make_error_fn`.
        networks: Trained and frozen parameters of each role.
        source: As `held_out_losses`, like the remaining arguments.
        objective: Says which examples and draws, and with what weights.
        windows: Examples.
        timesteps: Noise levels.
        batch: Samples per call of the networks.
        place: Moves a batch to the devices.

    Returns:
        [examples x draws] for each role that the objective measures.
    """
    terms: dict[str, list[np.ndarray]] = {}
    for part in objective.held_out(source, windows=windows, timesteps=timesteps, batch=batch):
        for role, measured in errors(networks, place(part.batch), place(part.draws)).items():
            weighted = np.asarray(measured, np.float64) * part.weight
            # those after the first `count` only fill the batch up
            means = weighted.reshape(len(weighted) if weighted.ndim else 1, -1).mean(1)
            terms.setdefault(role, []).append(means[: part.count])
    return {role: np.concatenate(measured) for role, measured in terms.items()}
