"""The earlier name of `monarchrt.train.objectives.flow`, kept for code that imports it."""

from monarchrt.train.objectives.flow import (
    NoiseLevels,
    Velocity,
    add_noise,
    draw_noise,
    evaluation_indices,
    evaluation_levels,
    evaluation_noise,
    flow_errors,
    flow_loss,
    level_shape,
    noise_levels,
)

__all__ = [
    "NoiseLevels",
    "Velocity",
    "add_noise",
    "draw_noise",
    "evaluation_indices",
    "evaluation_levels",
    "evaluation_noise",
    "flow_errors",
    "flow_loss",
    "level_shape",
    "noise_levels",
]
