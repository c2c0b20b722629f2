"""Named configurations."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from monarch_jax.checks import brief, one_of, suggestion


def from_preset[Config](presets: Mapping[str, Config], name: str, overrides: Mapping[str, Any]) -> Config:
    """A named configuration with some fields replaced.

    Examples:
        >>> from monarchrt.models.vae.config import VAEConfig
        >>> from_preset({"small": VAEConfig(dim=8)}, "small", {"num_res_blocks": 4}).num_res_blocks
        4

    Args:
        presets: Frozen dataclasses of one class, by name.
        name: Name of a preset.
        overrides: New values of fields.

    Returns:
        The configuration.

    Raises:
        ValueError: If the preset or a field is unknown, or a value is invalid.
    """
    preset: Any = presets[one_of("preset", name, presets)]
    fields = [field.name for field in dataclasses.fields(preset)]
    for field in overrides:
        if field not in fields:
            raise ValueError(f"{brief(field)} is not a field of {type(preset).__name__}; {suggestion(field, fields)}")
    return dataclasses.replace(preset, **overrides)
