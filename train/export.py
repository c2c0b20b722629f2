"""The network of a run folder, which `monarchrt.models.generate` reads, with the settings of its training."""

from pathlib import Path
from typing import TYPE_CHECKING

from monarchrt.models.generate import runs
from monarchrt.models.generate.runs import is_run
from monarchrt.train.config import TrainConfig
from monarchrt.train.run_folder import read_config

if TYPE_CHECKING:
    from monarchrt.models.wan import WanModel

__all__ = ["find_run", "is_run", "run_model"]


def find_run(path: Path) -> TrainConfig | None:
    """The settings of a run folder; None if the path is something else.

    Args:
        path: Any path, existing or not.

    Returns:
        The settings.

    Raises:
        UserError: If config.json is damaged, or the folder holds run folders instead of being one; names them.
    """
    return None if runs.find_run(path) is None else read_config(path)


def run_model(folder: Path, run: TrainConfig | None = None, *, precision: str = "fp32") -> "WanModel":
    """The network that a run exports, of the newest checkpoint that can be read: the moving average, if there is one.

    The folder is only read, so a run that is still going on is not disturbed.

    Args:
        folder: The run folder.
        run: Settings to take instead of those in the folder.
        precision: "fp32" or "bf16", the compute type; parameters are fp32.

    Returns:
        The network, with the attention that it was trained with.

    Raises:
        UserError: If there is no checkpoint, it cannot be read, or it is of another network.
    """
    from monarchrt.models.generate.run_arrays import run_network

    settings = runs.read_run(folder)
    if run is not None:
        model = run.model
        settings = settings._replace(
            preset=model.preset, overrides=model.override_values(), attention=model.attention_text()
        )
    return run_network(settings, dtype="bfloat16" if precision == "bf16" else "float32")
