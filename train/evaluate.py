"""The held-out loss, which is deterministic, so that networks can be compared."""

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
    """Computes the held-out losses of a state, on fixed examples with fixed draws.

    Examples and draws are the same for every network, step and run, so differences of losses come from the networks
    only.

    Args:
        errors: Error function, from `monarchrt.train.step.make_error_fn`.
        state: State, of which the evaluated parameters are used.
        source: Data, of which the held-out part is used.
        objective: Defines examples, draws and weights.
        windows: Number of examples, spread over the held-out part.
        timesteps: Number of noise levels, spread evenly over the training distribution.
        batch: Examples per call of the networks.
        place: Moves a batch to the devices.

    Returns:
        The mean of weight times error, by role.
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
    """Computes the held-out loss of a network for an objective with one role, as during training.

    Args:
        model: The network.
        source: Data, of which the held-out part is used.
        objective: Settings of the objective.
        windows: Number of examples.
        timesteps: Number of noise levels.
        batch: Examples per call of the network.

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
    """The terms of the held-out loss: weight times error of each example at each of its draws.

    The terms of two networks belong to the same examples, noise levels and noise, in the same order, so that they can
    be compared in pairs. The arguments are those of `held_out_loss`.
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
    """Weight times error of each example at each of its draws, in an order that is the same for all networks.

    Args:
        errors: Error function, from `monarchrt.train.step.make_error_fn`.
        networks: Trained and frozen parameters of each role.
        source: Data, of which the held-out part is used.
        objective: Defines examples, draws and weights.
        windows: Number of examples.
        timesteps: Number of noise levels.
        batch: Examples per call of the networks.
        place: Moves a batch to the devices.

    Returns:
        Arrays [examples x draws] by role.
    """
    terms: dict[str, list[np.ndarray]] = {}
    for part in objective.held_out(source, windows=windows, timesteps=timesteps, batch=batch):
        for role, measured in errors(networks, place(part.batch), place(part.draws)).items():
            weighted = np.asarray(measured, np.float64) * part.weight
            # the examples after the first `count` only pad the batch
            means = weighted.reshape(len(weighted) if weighted.ndim else 1, -1).mean(1)
            terms.setdefault(role, []).append(means[: part.count])
    return {role: np.concatenate(measured) for role, measured in terms.items()}
