"""The settings of each objective, and its row in the table. Nothing here imports JAX, so that help is quick."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from monarchrt.models.errors import UserError
from monarchrt.train.objectives.registry import Generation, ObjectiveSettings, register


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class FlowConfig(ObjectiveSettings):
    """The rectified-flow objective."""

    name: ClassVar[str] = "flow"

    shift: float = 5.0
    """Timestep shift s: sigma = s*u / (1 + (s-1)*u). Larger means more training at high noise."""

    weighting: Literal["gaussian", "uniform"] = "gaussian"
    """Weight of a noise level in the loss: a bell around t = 500 with mean 1, or 1 everywhere."""

    num_train_timesteps: int = 1000
    """Number of noise levels; the network sees t = num_train_timesteps * sigma."""

    frames_per_level: int | None = None
    """Frames that share a noise level. Default: the whole window. 1 or more: each run of so many frames draws a level
    of its own (diffusion forcing); 3 is what Self-Forcing trains causal models with."""

    def __post_init__(self) -> None:
        _require(0 < self.shift < math.inf, f"shift is {self.shift}; it must be positive and finite, for example 5.0")
        _require(
            self.num_train_timesteps >= 2,
            f"num_train_timesteps is {self.num_train_timesteps}; it must be at least 2, for example 1000",
        )
        _require(
            self.frames_per_level is None or self.frames_per_level >= 1,
            f"frames_per_level is {self.frames_per_level}; it must be at least 1, for example 3, or None",
        )

    @property
    def generation(self) -> Generation:
        """Euler's method at the shift of the training."""
        return Generation(shift=self.shift, level_per_frame=self.frames_per_level is not None)


register(FlowConfig, "monarchrt.train.objectives.flow:FlowObjective")
