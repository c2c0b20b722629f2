"""The exported network in the newest checkpoint of a run folder of `monarchrt train`."""

import contextlib
import errno
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from monarchrt.models.attention.notation import parse
from monarchrt.models.checkpoints.checksums import checksums
from monarchrt.models.checkpoints.json_files import read_json
from monarchrt.models.checkpoints.orbax_arrays import read_arrays
from monarchrt.models.checkpoints.tensor_files import SafetensorsFile
from monarchrt.models.errors import UserError, printable, user_input
from monarchrt.models.files import listed
from monarchrt.models.generate.runs import ABOUT, CHECKPOINTS_NAME, RunSettings, checkpoint_steps
from monarchrt.models.processes.agreement import first_problem
from monarchrt.models.wan import WanConfig, WanModel, wan_config
from monarchrt.models.wan.checkpoints.settings import Trained


class StoredNetwork(NamedTuple):
    """The exported network of a checkpoint: the moving average, for parameters that have one.

    Attributes:
        step: Step of the checkpoint.
        folder: Folder of its arrays.
        names: Maps names in the network, such as `head.proj.kernel`, to names in the checkpoint.
        contents: Shape and checksum by name in the checkpoint.
    """

    step: int
    folder: Path
    names: dict[str, str]
    contents: dict[str, Any]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the arrays, by name in the network."""
        return {name: tuple(self.contents[stored]["shape"]) for name, stored in self.names.items()}

    def read(self, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Reads and verifies arrays, by name in the network.

        Raises:
            UserError: If there is no such array, or it has another shape.
            ValueError: If an array is damaged.
        """
        for name, leaf in wanted.items():
            if name not in self.names:
                raise UserError(f"the checkpoint of step {self.step} has no {name}; it is of another model")
            if self.shapes[name] != leaf.shape:
                raise UserError(
                    f"{name} in the checkpoint of step {self.step} has shape {self.shapes[name]}, not {leaf.shape}"
                )
        arrays = read_checked(self.folder, {self.names[name]: leaf for name, leaf in wanted.items()}, self.contents)
        return {name: arrays[self.names[name]] for name in wanted}


def read_checked(
    folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct], contents: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Reads arrays of a checkpoint and verifies their checksums.

    Args:
        folder: Folder of its arrays.
        wanted: As in `monarchrt.models.checkpoints.orbax_arrays.read_arrays`.
        contents: Shape and checksum of each array.

    Returns:
        The arrays by name in the checkpoint.

    Raises:
        ValueError: If one cannot be read or its checksum is wrong; in all processes if there are several, each of
            which reads its part.
    """
    wrong, arrays = None, {}
    try:
        arrays = read_arrays(folder, wanted)
    except ValueError as error:
        if of_the_machine(error):
            raise
        wrong = error
    complaint = first_problem("read", None if wrong is None else str(wrong))
    if complaint is not None:
        raise wrong or ValueError(complaint)
    sums = jax.device_get(checksums(arrays))
    damaged = (name for name in wanted if int(sums[name]) != contents[name]["checksum"])
    complaint = next((f"the checksum of {name} is wrong" for name in damaged), None)
    if (complaint := first_problem("checked", complaint)) is not None:
        raise ValueError(complaint)
    return arrays


def network_names(about: Mapping[str, Any]) -> dict[str, str]:
    """Maps the names of the exported network's arrays to their names in a checkpoint.

    Examples:
        >>> network_names({"exported": "student", "arrays": {"roles.student.params.bias": {}, "step": {}}})
        {'bias': 'roles.student.params.bias'}

    Args:
        about: The checkpoint's description; one without roles, from an older version, holds a single network.

    Returns:
        The names.
    """
    role = f"roles.{about['exported']}." if "exported" in about else ""
    parts = ("frozen", "params", "average") if role else ("fixed", "params", "ema")
    names: dict[str, str] = {}
    for part in parts:  # later ones take precedence
        prefix = f"{role}{part}."
        names |= {name.removeprefix(prefix): name for name in about["arrays"] if name.startswith(prefix)}
    return names


def stored_network(folder: Path, step: int) -> StoredNetwork:
    """The exported network of one checkpoint of a run folder; reads no arrays.

    Raises:
        ValueError: If its description is damaged.
    """
    place = folder / CHECKPOINTS_NAME / str(step)
    about = read_json(place / ABOUT)
    arrays = about.get("arrays")
    whole = isinstance(arrays, dict) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("checksum"), int)
        and isinstance(entry.get("shape"), list)
        and all(isinstance(size, int) for size in entry["shape"])
        for entry in arrays.values()
    )
    if "identity" not in about or not whole or not (names := network_names(about)):
        raise ValueError("the description is incomplete")
    return StoredNetwork(step, place / "state", names, about["arrays"])


def read_newest[T](
    folder: Path,
    read: Callable[[int], T],
    *,
    report: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> T:
    """Reads the newest checkpoint of a run folder that is not damaged; reports the ones that are skipped.

    Args:
        folder: Run folder.
        read: Called with a step; raises UserError for errors that an older checkpoint would share.
        report: Called with a line for each skipped checkpoint.

    Returns:
        The result of `read`.

    Raises:
        UserError: If there is no readable checkpoint.
    """
    path = folder / CHECKPOINTS_NAME
    complete = checkpoint_steps(folder)
    if not complete:
        raise UserError(f"{path} has no checkpoint to start from; give the folder of a finished run")
    wrong: list[str] = []
    for step in reversed(complete):
        try:
            result = read(step)
        except UserError:
            raise
        except Exception as error:  # tensorstore raises whatever its storage layer raised
            reason = printable(" ".join(str(error).split()), 160)
            if of_the_machine(error):
                raise UserError(f"the checkpoint of step {step} in {path} could not be read ({reason})") from error
            wrong.append(f"the checkpoint of step {step} in {path} is corrupt ({reason})")
            continue
        if wrong:
            report(f"warning: {wrong[0]}; that of step {step} is used instead")
        return result
    others = f"; nor can those of steps {', '.join(map(str, complete[:-1]))} be read" if len(wrong) > 1 else ""
    raise UserError(wrong[0] + others)


def of_the_machine(error: Exception) -> bool:
    """Whether a read error is due to the machine, not the file: no memory, no permission, a failing disk."""
    if isinstance(error, (MemoryError, jax.errors.JaxRuntimeError)):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
    # TensorStore's errors are ValueErrors that begin with the name of a status
    return str(error).startswith(("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED"))


def run_config(run: RunSettings, *, channels: int, dtype: str = "float32") -> WanConfig:
    """Configuration of a run's network.

    Args:
        run: Settings of the run.
        channels: Latent channels of its data, which the preset does not contain.
        dtype: Dtype of the computation.

    Returns:
        The configuration, with the attention that the network was trained with.

    Raises:
        UserError: If a setting is unknown or invalid.
    """
    with user_input():
        values: dict[str, Any] = {"in_channels": channels, "out_channels": channels} | run.overrides
        return wan_config(run.preset, **values | {"attention": parse(run.attention), "dtype": dtype})


def run_network(run: RunSettings, *, dtype: str = "float32") -> WanModel:
    """Loads the network that a run exports from its newest readable checkpoint: the moving average, if there is one.

    Args:
        run: Settings of the run.
        dtype: Dtype of the computation; parameters are float32.

    Returns:
        The network.

    Raises:
        UserError: If there is no readable checkpoint, or it holds another network.
    """
    if run.lora:
        raise UserError(
            f"{run.path} trained a LoRA, which is not a network; give the one that it was trained on, or make one "
            f"of both: `monarchrt convert NETWORK NEW --lora {shlex.quote(str(run.path))}`"
        )
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(step: int) -> WanModel:
        stored = stored_network(run.path, step)
        kernel = stored.shapes.get("patch_embedding.kernel", ())
        if len(kernel) < 2:
            raise UserError(f"the checkpoint of step {step} in {run.path} is not of a Wan model")
        config = run_config(run, channels=kernel[-2], dtype=dtype)
        graph, params, others = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))), nnx.Param, ...)
        flat = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(params)}
        wanted = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place) for name, leaf in flat.items()}
        arrays = stored.read(wanted)
        filled = jax.tree.unflatten(jax.tree.structure(params), [arrays[name] for name in flat])
        return nnx.merge(graph, filled, others)

    return read_newest(run.path, read)


def run_arrays(run: RunSettings) -> dict[str, np.ndarray]:
    """All arrays that a run exports, by name, from its newest readable checkpoint; for a LoRA, its matrices.

    Raises:
        UserError: If there is no readable checkpoint.
    """
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def read(step: int) -> dict[str, np.ndarray]:
        stored = stored_network(run.path, step)
        wanted = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for name, shape in stored.shapes.items()
        }
        return {name: np.asarray(array) for name, array in stored.read(wanted).items()}

    return read_newest(run.path, read)


def trained_as(run: RunSettings) -> Trained:
    """How a run's network was trained, in the form that `monarchrt.models.wan.checkpoints.save_checkpoint` takes."""
    made, data = run.generation, run.data
    latents = made.latents
    if latents is None and data.precomputed is None:
        latents = (data.frames, data.height // data.patch, data.width // data.patch)
    if latents is None:  # a run of an older version: the shape is read from its data, if that still exists
        latents = _shape_of_latents(run)
    return Trained(
        latents=latents,
        shift=made.shift,
        steps=made.steps if made.sampler == "few-step" else None,
        window=made.window,
        sink_frames=made.sink_frames or None,
    )


def _shape_of_latents(run: RunSettings) -> tuple[int, int, int] | None:
    folder = run.data.latents
    files = [] if folder is None or not folder.is_dir() else [p for p in listed(folder) if p.suffix == ".safetensors"]
    with contextlib.suppress(ValueError, OSError, IndexError, KeyError):
        frames, height, width, _ = SafetensorsFile(files[0], only=("latents",)).infos["latents"].shape
        return frames, height, width
    return None
