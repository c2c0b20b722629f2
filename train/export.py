"""The network of a run folder, for `monarchrt generate` and `monarchrt convert`."""

from pathlib import Path
from typing import TYPE_CHECKING

from monarchrt.models.errors import UserError
from monarchrt.train.config import TrainConfig
from monarchrt.train.run_folder import CONFIG_NAME, read_config

if TYPE_CHECKING:
    from monarchrt.models.wan import WanModel


def is_run(path: Path) -> bool:
    """Whether a path is a run folder that has been trained in.

    Example:
        >>> is_run(Path("nowhere"))
        False
    """
    from monarchrt.train.checkpointing import FOLDER_NAME

    return (path / CONFIG_NAME).is_file() and (path / FOLDER_NAME).is_dir()


def find_run(path: Path) -> TrainConfig | None:
    """The settings of a run folder; None if the path is something else.

    Args:
        path: Any path, existing or not.

    Returns:
        The settings.

    Raises:
        UserError: If config.json is damaged, or the folder holds run folders instead of being one; names them.
    """
    if is_run(path):
        return read_config(path)
    if path.is_dir() and (runs := [child for child in sorted(path.iterdir()) if is_run(child)]):
        raise UserError(f"checkpoint {path} holds runs; give one of them: {', '.join(map(str, runs))}")
    return None


def run_model(folder: Path, run: TrainConfig, *, precision: str = "fp32") -> "WanModel":
    """The network that a run exports, as in its newest checkpoint: the moving average, if there is one.

    The folder is only read, so a run that is still going on is not disturbed.

    Args:
        folder: The run folder.
        run: Its settings, of `read_config`.
        precision: "fp32" or "bf16", the compute type; parameters are fp32.

    Returns:
        The network, with the attention that it was trained with.

    Raises:
        UserError: If there is no checkpoint, it cannot be read, or it is of another network.
    """
    import jax
    from flax import nnx

    from monarchrt.models.wan import WanModel
    from monarchrt.train.checkpointing import Checkpoints
    from monarchrt.train.model import model_settings
    from monarchrt.train.state import split_model

    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with Checkpoints(folder, read_only=True) as checkpoints:
        kernel = checkpoints.shapes().get("patch_embedding.kernel", (None, None))
        # the data's channels, which the preset does not tell
        settings = model_settings(run.model, channels=kernel[-2], precision=precision)
        graph, params, others = split_model(nnx.eval_shape(lambda: WanModel(settings, rngs=nnx.Rngs(0))))
        template = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), params)
        params = checkpoints.restore_parameters(template)
    return nnx.merge(graph, params, others)
