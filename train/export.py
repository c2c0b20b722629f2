"""The network of a run folder, together with the settings of its training."""

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
    """The settings of a run folder.

    Args:
        path: Any path, which need not exist.

    Returns:
        The settings; None if the path is not a run folder.

    Raises:
        UserError: If config.json is damaged, or the folder contains run folders but is none itself.
    """
    return None if runs.find_run(path) is None else read_config(path)


def run_model(folder: Path, run: TrainConfig | None = None, *, precision: str = "fp32") -> "WanModel":
    """Reads the exported network of a run from the newest checkpoint that can be read, by its moving average if any.

    The folder is only read, so the run may still be training.

    Args:
        folder: The run folder.
        run: Settings to use instead of those in the folder.
        precision: Compute dtype, "fp32" or "bf16"; parameters are float32.

    Returns:
        The network, with the attention of its training.

    Raises:
        UserError: If there is no checkpoint, it cannot be read, or it belongs to another network.
    """
    from monarchrt.models.generate.run_arrays import run_network

    settings = runs.read_run(folder)
    if run is not None:
        model = run.model
        settings = settings._replace(
            preset=model.preset, overrides=model.override_values(), attention=model.attention_text()
        )
    return run_network(settings, dtype="bfloat16" if precision == "bf16" else "float32")
