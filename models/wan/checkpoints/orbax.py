"""Our own format: `config.json` and the parameters, stacked as the model holds them, in an Orbax folder `params`."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from models.checkpoints.tensor_files import TensorInfo
from models.wan.checkpoints import settings
from models.wan.checkpoints.mapping import tensors
from models.wan.checkpoints.save import ModelFile, new_folder
from models.wan.checkpoints.source import Source
from models.wan.config import WanConfig
from models.wan.dit import WanModel

FOLDER = "params"


class OrbaxFile:
    """The parameters as the tensors of an official checkpoint; read as a whole when the first is asked for.

    Attributes:
        infos: Shape and dtype by official name.
    """

    def __init__(self, path: Path, config: WanConfig):
        self._path, self._config = path, config
        self._file: ModelFile | None = None
        abstract = nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0)))
        self.infos: dict[str, TensorInfo] = ModelFile(abstract).infos
        self.metadata: dict[str, str] = {}

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        if self._file is None:
            self._file = ModelFile(_restore(self._path, self._config))
        return self._file.read(name)


def save_orbax(model: WanModel, path: str | Path, *, dtype: str | None = None) -> Path:
    """Writes a model, its sizes and its Monarch settings.

    Args:
        model: The model.
        path: A folder that does not exist yet, or is empty.
        dtype: Of the parameters; None keeps theirs.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder is not empty.
    """
    kept = dtype or model.config.param_dtype
    config = dataclasses.replace(model.config, param_dtype=kept)
    state = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(kept)), nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    with new_folder(path) as folder:
        data = settings.config_to_json(config, "official") | {"image_dim": config.image_dim, "param_dtype": kept}
        (folder / "config.json").write_text(settings.dump_json(data))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((folder / FOLDER).absolute(), state)
    return Path(path)


def open_orbax(path: Path) -> Source:
    """The checkpoint that `save_orbax` wrote.

    Raises:
        ValueError: If its `config.json` is not ours.
    """
    config_path = path / "config.json"
    data = json.loads(config_path.read_text())
    config, _ = settings.config_from_json(data, where=str(config_path))
    extra = {name: data[name] for name in ("image_dim", "param_dtype") if name in data}
    config = dataclasses.replace(config, **extra)
    file = OrbaxFile(path, config)
    names = {tensor.official: tensor.official for tensor in tensors(config)}
    return Source(path, "orbax", "official", config, config_path, names, file)


def _restore(path: Path, config: WanConfig) -> WanModel:
    model = nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            values = checkpointer.restore((path / FOLDER).absolute(), nnx.to_pure_dict(state))
    except Exception as error:
        raise ValueError(f"{path / FOLDER} cannot be restored: {' '.join(str(error).split())[:300]}") from error
    nnx.replace_by_pure_dict(state, values)
    return nnx.merge(graph, state)
