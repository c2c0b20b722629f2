"""Sampling settings from the `scheduler_config.json` of a diffusers pipeline."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from monarchrt.models.checkpoints.json_files import read_json

NAME = "scheduler_config.json"
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
# diffusers' class: our sampler, the field of the shift, and fields that are required for flow matching
CLASSES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "UniPCMultistepScheduler": ("unipc", "flow_shift", FLOW),
    "DPMSolverMultistepScheduler": ("dpm++", "flow_shift", FLOW),
    "FlowMatchEulerDiscreteScheduler": ("euler", "shift", {}),
}
# options for other noise levels than shifted ones, which are not supported
OFF = ("thresholding", "use_dynamic_shifting", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerSettings:
    """Default sampling settings of a pipeline in diffusers' format.

    Attributes:
        path: The `scheduler_config.json`.
        class_name: diffusers' class.
        sampler: The corresponding name in `monarchrt.models.sampling.SAMPLERS`.
        shift: Shift of the noise levels: `flow_shift`, or `shift` of the Euler scheduler; 1.0 if the file has none, the
            default of these classes.
    """

    path: Path
    class_name: str
    sampler: str
    shift: float

    def __str__(self) -> str:
        return f"{self.class_name} ({self.sampler}), shift {self.shift:g}"


def scheduler_settings(folder: str | Path) -> SchedulerSettings | None:
    """Reads `scheduler_config.json` of a pipeline in diffusers' format.

    Examples:
        >>> scheduler_settings("/no/such/folder") is None
        True

    Args:
        folder: The pipeline's folder, or its `scheduler/`, or another of its parts such as `transformer/`.

    Returns:
        The settings, or None if there is no such file.

    Raises:
        ValueError: If the file cannot be read, or its class or settings are not those of a supported flow matching
            sampler.
    """
    folder = Path(folder)
    beside = [folder.parent / "scheduler"] if (folder.parent / "model_index.json").is_file() else []
    places = [place / NAME for place in (folder, folder / "scheduler", *beside)]
    path = next((place for place in places if place.is_file()), None)
    return None if path is None else _settings(read_json(path), path)


def _settings(data: dict[str, Any], path: Path) -> SchedulerSettings:
    class_name = data.get("_class_name")
    if not isinstance(class_name, str) or class_name not in CLASSES:
        raise ValueError(f"{path}: _class_name={class_name!r} is not supported; choices: {', '.join(CLASSES)}.")
    sampler, field, flow = CLASSES[class_name]
    given = {name: data.get(name) for name in flow} | {name: data.get(name, False) or False for name in OFF}
    for name, value in (dict.fromkeys(OFF, False) | flow).items():
        if given[name] != value:
            raise ValueError(f"{path}: {name}={given[name]!r} is not supported; Wan is sampled with {value!r}.")
    if data.get("num_train_timesteps", 1000) != 1000:
        raise ValueError(f"{path}: num_train_timesteps={data['num_train_timesteps']!r} is not Wan's 1000.")
    shift = data.get(field, 1.0)
    if isinstance(shift, bool) or not isinstance(shift, int | float) or not 0 < shift < math.inf:
        raise ValueError(f"{path}: {field}={shift!r} must be a positive number, for example 3.0.")
    return SchedulerSettings(path=path, class_name=class_name, sampler=sampler, shift=float(shift))
