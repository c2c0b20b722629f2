"""Our own format: `config.json`, and the parameters, stacked over layers as in the model, in an Orbax folder `params`.

Each layer is a chunk of its own, so that single tensors can be read through tensorstore, which Orbax uses;
`ocp.StandardCheckpointer` restores the whole folder.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import nnx

from monarchrt.models.checkpoints.orbax_arrays import open_arrays, result
from monarchrt.models.checkpoints.reading import ParameterPath
from monarchrt.models.checkpoints.tensor_files import TensorInfo
from monarchrt.models.files import new_folder
from monarchrt.models.wan.checkpoints import settings
from monarchrt.models.wan.checkpoints.mapping import checkpoint_shape, parameter_shapes, tensors, to_theirs
from monarchrt.models.wan.config import WanConfig
from monarchrt.models.wan.dit import WanModel

FOLDER = "params"


class OrbaxFile:
    """The parameters as the tensors of an official checkpoint, read one at a time.

    Attributes:
        infos: Shape and dtype by official name.

    Raises:
        ValueError: If a parameter is missing, cannot be opened, or has another shape than in `config`.
    """

    def __init__(self, path: Path, config: WanConfig):
        self.path = path
        self._tensors = {tensor.official: tensor for tensor in tensors(config)}
        self._arrays = _open(path, parameter_shapes(config))
        self.infos = {
            name: TensorInfo(checkpoint_shape(config, tensor), self._arrays[tensor.path].dtype.numpy_dtype)
            for name, tensor in self._tensors.items()
        }
        self.metadata: dict[str, str] = {}

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor."""
        tensor = self._tensors[name]
        array = self._arrays[tensor.path]
        wanted = array if tensor.layer is None else array[tensor.layer]
        value = result(wanted.read(), self.path / FOLDER, ".".join(tensor.path))
        return np.asarray(to_theirs(value, tensor.layout))


def _open(path: Path, shapes: dict[ParameterPath, tuple[int, ...]]) -> dict[ParameterPath, ts.TensorStore]:
    """Opens every parameter without reading it."""
    folder = path / FOLDER
    stores = open_arrays(folder, [".".join(parameter) for parameter in shapes])
    arrays = dict(zip(shapes, stores.values(), strict=True))
    for parameter, array in arrays.items():
        if array.shape != shapes[parameter]:
            raise ValueError(
                f"{folder} does not fit its config.json: {'.'.join(parameter)} has shape {array.shape}, "
                f"not {shapes[parameter]}."
            )
    return arrays


def save_orbax(
    model: WanModel,
    path: str | Path,
    *,
    dtype: str | None = None,
    few_step: bool = False,
    trained: settings.Trained | None = None,
) -> Path:
    """Writes a model with its configuration; needs memory for a copy of its largest parameter.

    Args:
        model: The model.
        path: A folder that does not exist or is empty.
        dtype: Dtype of the parameters; None keeps theirs.
        few_step: As in `save_checkpoint`.
        trained: As in `save_checkpoint`.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder is not empty.
    """
    kept = dtype or model.config.param_dtype
    config = dataclasses.replace(model.config, param_dtype=kept)
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(kept)), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    with new_folder(path) as folder:
        data = settings.config_to_json(config, "official", few_step=few_step, trained=trained)
        data |= {"image_dim": config.image_dim, "param_dtype": kept}
        (folder / "config.json").write_text(settings.dump_json(data))
        chunks = jax.tree.map(lambda leaf: ocp.SaveArgs(shard_axes=(0,) if leaf.ndim > 2 else ()), state)
        # Orbax copies arrays before writing: at most the largest parameter at a time, with a margin for rounding
        largest = max(leaf.nbytes for leaf in jax.tree.leaves(state))
        handler = ocp.StandardCheckpointHandler(save_concurrent_gb=1.001 * largest / 1e9)  # type: ignore[arg-type]
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save((folder / FOLDER).absolute(), args=ocp.args.StandardSave(state, save_args=chunks))
    return Path(path).expanduser()
