"""The rectified-flow objective, which lives in `monarchrt.train.objectives.flow`; this name of it is kept."""

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
