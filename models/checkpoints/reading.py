"""Finding and opening files with weights, and filling the parameters of a model with their tensors."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike

from monarchrt.models.checkpoints.json_files import read_json
from monarchrt.models.checkpoints.names import strip_prefixes
from monarchrt.models.checkpoints.recognize import SUPPORTED, foreign_start, shard_of
from monarchrt.models.checkpoints.scaled import check_finite, widened
from monarchrt.models.checkpoints.tensor_files import (
    INDEX_SUFFIX,
    SafetensorsFile,
    ShardedSafetensors,
    TensorFile,
    TensorInfo,
)
from monarchrt.models.checkpoints.torch_pickle import TorchFile
from monarchrt.models.errors import printable
from monarchrt.models.files import is_litter, listed

type AnyArray = np.ndarray | Array
type Layout = Literal["linear", "conv", "conv2d", "vector", "flat"]
type ParameterPath = tuple[str, ...]
type Shardings = Callable[[ParameterPath, tuple[int, ...]], jax.sharding.Sharding | None]
type Progress = Callable[[str, int, int], None]
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# unsupported or unfinished files, which errors mention if there are no weights
OTHER_SUFFIXES = (
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".engine",
    ".plan",
    ".npz",
    ".part",
    ".incomplete",
    ".crdownload",
)


@runtime_checkable
class Slot(Protocol):
    """The destination of a tensor: path of a parameter, and index on its leading axis if layers are stacked."""

    @property
    def path(self) -> ParameterPath:
        """Attributes and indices, as strings."""
        ...

    @property
    def layer(self) -> int | None:
        """Index on the parameter's leading axis, or None if the tensor is the whole parameter."""
        ...

    @property
    def layout(self) -> Layout:
        """Change of layout; see `to_ours`."""
        ...


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a model, with its names in several formats.

    Attributes:
        path: Path of our parameter.
        layer: Index on the parameter's leading layer axis, or None.
        names: Its name by naming, such as "official" and "diffusers".
        layout: Change of layout; see `to_ours`.
    """

    path: ParameterPath
    layer: int | None
    names: dict[str, str]
    layout: Layout


def to_ours(array: AnyArray, layout: Layout) -> AnyArray:
    """Converts a checkpoint's array to our layout; for NumPy arrays the result is a view.

    Examples:
        >>> to_ours(np.zeros((5, 4, 3, 2, 1)), "conv").shape, to_ours(np.zeros((5, 1, 1)), "flat").shape
        ((3, 2, 1, 4, 5), (5,))

    Args:
        array: An array in torch's layout.
        layout: "linear" [out, in] -> [in, out]; "conv" [out, in, t, h, w] -> [t, h, w, in, out]; "conv2d"
            [out, in, h, w] -> [1, h, w, in, out]; "flat" drops axes of size 1; "vector" is unchanged.

    Returns:
        The array.
    """
    match layout:
        case "linear":
            return array.T
        case "conv":
            return array.transpose(2, 3, 4, 1, 0)
        case "conv2d":
            return array[None].transpose(0, 3, 4, 2, 1)
        case "flat":
            return array.reshape(array.shape[0])
        case _:
            return array


def stored_dtype(file: TensorFile) -> str:
    """The dtype of a file's tensors, or float32 if it is mixed; float64 only if JAX enables it."""
    dtypes = {info.dtype.name for info in file.infos.values()}
    return jax.dtypes.canonicalize_dtype(dtypes.pop() if len(dtypes) == 1 else "float32").name


def is_float(info: TensorInfo) -> bool:
    """Whether a tensor has a float dtype; integers are quantized weights, which are useless without their scales."""
    return jnp.issubdtype(info.dtype, jnp.floating)


def some(items: list[str], count: int = 3) -> str:
    """The first few items and the number of the others, for messages.

    Examples:
        >>> some(["a", "b", "c", "d"])
        'a; b; c; and 1 more'
    """
    more = len(items) - count
    return "; ".join(map(printable, items[:count])) + (f"; and {more} more" if more > 0 else "")


def weights_file(folder: Path, *, preferred: tuple[str, ...]) -> Path:
    """Finds the weights in a folder: an index of safetensors shards, a safetensors file or a torch pickle.

    Args:
        folder: The folder.
        preferred: Preferred stems if there are several files.

    Returns:
        The file.

    Raises:
        ValueError: If there is none, or several without a preferred one.
    """
    there = [file for file in listed(folder) if file.is_file()]
    indices = [file for file in there if file.name.endswith(INDEX_SUFFIX)]
    chosen = [file for file in indices if file.name.removesuffix(INDEX_SUFFIX) in preferred]
    if len(indices) == 1 or len(chosen) == 1:
        return (chosen or indices)[0]
    files = [file for file in there if file.suffix in (".safetensors", ".sft")]
    pickles = [file for file in there if file.suffix in PICKLES]
    for candidates in (
        [file for file in files if file.stem in preferred],
        files,
        [file for file in pickles if file.stem in preferred],
        [] if files else pickles,
    ):
        if len(candidates) == 1:
            return candidates[0]
    others = [] if files or pickles else [file for file in sorted(folder.iterdir()) if file.suffix in OTHER_SUFFIXES]
    if others:
        raise ValueError(f"{folder} holds {', '.join(printable(file.name) for file in others[:5])}; {SUPPORTED}.")
    if files and all(shard_of(file) for file in files):
        raise ValueError(f"{folder} lacks {shard_of(files[0])}, the index of its {len(files)} files; download it too.")
    named = ", ".join(printable(file.name) for file in (files or pickles)[:9]) or "nothing of the kind"
    raise ValueError(
        f"{folder} should hold one safetensors file, an index of its shards, or one {'/'.join(PICKLES)} file; found "
        f"{named}."
    )


def find_weights(
    path: str | Path, *, official: str, pattern: str, folder: str, preferred: tuple[str, ...] = ()
) -> Path:
    """Finds the file with the weights of a part of a pipeline.

    Args:
        path: The file, or a folder with the file or with `folder`.
        official: Name of the released file, for the message.
        pattern: Pattern of its name without the suffix, such as `*VAE*`.
        folder: Name of the part's folder in diffusers' format.
        preferred: As in `weights_file`, which is used if no file matches `pattern`.

    Returns:
        The file.

    Raises:
        ValueError: If there is none, or several without a preferred one.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"path={str(path)!r} does not exist; give {official} or a folder that holds it or {folder}/.")
    if path.is_file():
        return path
    if (path / folder).is_dir():
        path = path / folder
    suffixes = (".pth", ".safetensors")
    named = [file for suffix in suffixes for file in sorted(path.glob(pattern + suffix)) if not is_litter(file)]
    return named[0] if len(named) == 1 else weights_file(path, preferred=preferred)


class BareFile:
    """A file's tensors by their names without prefixes, and without those of other parts of a pipeline.

    Attributes:
        path: The file.
        infos: Shape and dtype by bare name.
        metadata: Metadata of the file.
    """

    def __init__(self, file: TensorFile, *, anchors: tuple[str, ...]):
        self._file, self.path, self.metadata = file, file.path, file.metadata
        self._names = strip_prefixes(file.infos, anchors=anchors, where=file.path)
        self.infos = {bare: file.infos[name] for bare, name in self._names.items()}

    def read(self, name: str) -> np.ndarray:
        """Reads a tensor."""
        return self._file.read(self._names[name])


def load_part[M: nnx.Module](
    file: TensorFile,
    entries: Iterable[Entry],
    build: Callable[[], M],
    *,
    naming: str,
    what: str,
    dtype: DTypeLike,
    sharding: jax.sharding.Sharding | Shardings | None,
    progress: Progress | None,
    ignore: Iterable[str] = (),
) -> M:
    """Builds a model with the parameters in a file.

    Args:
        file: The tensors.
        entries: The model's tensors.
        build: Creates the model; it is only traced.
        naming: The naming of the file.
        what: Name of the model, for messages.
        dtype: Dtype of the parameters.
        sharding: As in `fill_model`.
        progress: As in `read_entries`.
        ignore: Names of other tensors that the file may have.

    Returns:
        The model.

    Raises:
        ValueError: If the file lacks a tensor or has others, or a tensor has another shape, is damaged or not finite.
    """
    model, entries = nnx.eval_shape(build), list(entries)
    match_names(file, entries, parameter_shapes(model), where=file.path, naming=naming, model=what, ignore=ignore)
    arrays = read_entries(file, entries, naming, progress=progress)
    return fill_model(model, arrays, dtype=jnp.dtype(dtype), sharding=sharding)


def settings_beside(file: Path) -> tuple[Path, dict[str, Any]]:
    """The path of the `config.json` beside a file, and its content; {} if it does not exist.

    Raises:
        ValueError: If it is damaged.
    """
    beside = file.parent / "config.json"
    if not beside.is_file():
        return beside, {}
    return beside, read_json(beside)


def open_tensors(path: Path, *, weights: str | None = None, preference: tuple[str, ...] = ()) -> TensorFile:
    """Opens a file with weights, by its content: an index of shards, a torch pickle, or else safetensors.

    Args:
        path: The file.
        weights: Set of tensors in a torch pickle; None: the first of `preference`.
        preference: Names of sets in order of preference.

    Returns:
        The open file; no tensor is read.

    Raises:
        ValueError: If it cannot be read, or `weights` is given for a file with one set.
    """
    try:
        file = _open(path, weights, preference)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    return widened(file)


def _open(path: Path, weights: str | None, preference: tuple[str, ...]) -> TensorFile:
    if path.name.endswith(INDEX_SUFFIX):
        _one_set(path, weights)
        return ShardedSafetensors(path)
    if (what := foreign_start(path)) is not None:
        raise ValueError(f"{path} is {what}." if ";" in what else f"{path} is {what}; {SUPPORTED}.")
    if (index := shard_of(path)) is not None:
        raise ValueError(f"{path} is one of several files of one model; give its folder, or the index {index} in it.")
    with path.open("rb") as file:
        start = file.read(9)
    if start[:2] == b"PK" or (path.suffix in PICKLES and start[8:] != b"{"):
        return TorchFile(path, weights=weights, preference=preference)
    _one_set(path, weights)
    return SafetensorsFile(path, quantized=True)


def _one_set(path: Path, weights: str | None) -> None:
    if weights is not None:
        raise ValueError(f"weights={weights!r}: {path} holds one set of tensors; leave weights out.")


class Problems(NamedTuple):
    """Differences between a file and a model: missing names, unexpected names, and sentences about wrong tensors."""

    missing: list[str]
    unexpected: list[str]
    wrong: list[str]


def find_problems(
    file: TensorFile,
    entries: Iterable[Entry],
    shapes: dict[ParameterPath, tuple[int, ...]],
    *,
    naming: str,
    ignore: Iterable[str] = (),
) -> Problems:
    """Compares the tensors of a file with those of a model; arguments are as in `match_names`."""
    expected = {entry.names[naming]: entry for entry in entries}
    wrong = []
    for name, entry in expected.items():
        if name not in file.infos:
            continue
        stored = file.infos[name].shape
        fitting = stored_shape(shapes, entry)
        if entry.layout == "flat":
            fitting += (1,) * (len(stored) - 1)
        if stored != fitting:
            wrong.append(f"{name} has shape {stored}, not {fitting}")
        elif not is_float(file.infos[name]):
            wrong.append(f"{name} is of {file.infos[name].dtype}, not floats")
    missing = [name for name in expected if name not in file.infos]
    known = expected.keys() | set(ignore)
    unexpected = [name for name in file.infos if name not in known]
    return Problems(missing, unexpected, wrong)


def match_names(
    file: TensorFile,
    entries: Iterable[Entry],
    shapes: dict[ParameterPath, tuple[int, ...]],
    *,
    where: Path,
    naming: str,
    model: str,
    ignore: Iterable[str] = (),
) -> None:
    """Raises ValueError unless the file has exactly the tensors of the model, with their shapes.

    Args:
        file: The tensors.
        entries: The model's tensors.
        shapes: Shapes of our parameters by path, stacked over layers.
        where: The file, for messages.
        naming: The naming of the file.
        model: Name of the model, for messages.
        ignore: Names of other tensors that the file may have.
    """
    entries = list(entries)
    missing, unexpected, wrong = find_problems(file, entries, shapes, naming=naming, ignore=ignore)
    if missing:
        raise ValueError(f"{where} lacks {len(missing)} of {len(entries)} tensors of {model}: {some(missing)}.")
    if wrong:
        raise ValueError(f"{where} does not fit the configuration of {model}: {some(wrong)}.")
    if unexpected:
        raise ValueError(f"{where} has {len(unexpected)} tensors that {model} does not have: {some(unexpected)}.")


def stored_shape(shapes: dict[ParameterPath, tuple[int, ...]], slot: Slot) -> tuple[int, ...]:
    """The shape of a tensor in a checkpoint; the inverse of `to_ours` for shapes.

    Args:
        shapes: Shapes of our parameters by path, stacked over layers.
        slot: The tensor.

    Returns:
        The shape; for the layout "flat", without axes of size 1.
    """
    shape = shapes[slot.path] if slot.layer is None else shapes[slot.path][1:]
    match slot.layout:
        case "linear":
            return shape[::-1]
        case "conv":
            return tuple(shape[axis] for axis in (4, 3, 0, 1, 2))
        case "conv2d":
            return tuple(shape[axis] for axis in (4, 3, 1, 2))
        case _:
            return shape


def parameter_shapes(model: nnx.Module) -> dict[ParameterPath, tuple[int, ...]]:
    """Shapes of a model's parameters by path, for a model of arrays or of `jax.ShapeDtypeStruct`."""
    return {tuple(map(str, path)): leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def read_entries(
    file: TensorFile, entries: Iterable[Entry], naming: str, *, progress: Progress | None = None
) -> Iterator[tuple[Entry, AnyArray]]:
    """Reads tensors one at a time.

    Args:
        file: The tensors.
        entries: The tensors to read.
        naming: The naming of the file.
        progress: Called after each tensor with its name, bytes read so far, and bytes in total.

    Yields:
        Each entry with its array in our layout.

    Raises:
        ValueError: If a tensor cannot be read, or has NaN or infinite values.
    """
    entries = list(entries)
    total, done = sum(file.infos[entry.names[naming]].nbytes for entry in entries), 0
    for entry in entries:
        name = entry.names[naming]
        yield entry, to_ours(check_finite(file.read(name), name, file.path), entry.layout)
        done += file.infos[name].nbytes
        if progress is not None:
            progress(name, done, total)


def fill_model[M: nnx.Module](
    model: M,
    arrays: Iterable[tuple[Slot, AnyArray]],
    *,
    dtype: Any,
    sharding: jax.sharding.Sharding | Shardings | None = None,
) -> M:
    """Fills, casts and places the parameters of a model one tensor at a time.

    Stacked parameters are allocated once on their devices and filled in place, so that the host needs memory for the
    model and one tensor at most.

    Args:
        model: A model of `jax.ShapeDtypeStruct`, from `nnx.eval_shape`.
        arrays: Every tensor in our layout with its destination; consumed lazily.
        dtype: Dtype of the parameters.
        sharding: Sharding of the parameters: one for all, or a function of path and shape (layers are stacked on axis
            0, which must not be split).

    Returns:
        The filled model.

    Raises:
        ValueError: If a sharding splits the layers.
    """
    graph, state = nnx.split(model)
    leaves = dict(nnx.to_flat_state(state))
    shapes = {tuple(map(str, path)): leaf.shape for path, leaf in leaves.items()}
    place = sharding if callable(sharding) else lambda path, shape: sharding
    filled: dict[ParameterPath, jax.Array] = {}
    for slot, array in arrays:
        shape = shapes[slot.path]
        where = place(slot.path, shape)
        if slot.layer is None:
            filled[slot.path] = jax.device_put(array.astype(dtype), where)
            continue
        if slot.path not in filled:
            filled[slot.path] = _allocate(shape, dtype, where)
        one = jax.device_put(array, _layer_sharding(slot.path, where, len(shape)))
        filled[slot.path] = _fill(where)(filled[slot.path], one, slot.layer)
        filled[slot.path].block_until_ready()  # otherwise reading runs ahead and its buffers accumulate
    complete = [(path, leaf.replace(filled[tuple(map(str, path))])) for path, leaf in leaves.items()]
    return nnx.merge(graph, nnx.from_flat_state(complete))


def _allocate(shape: tuple[int, ...], dtype: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)()


def _layer_sharding(
    path: ParameterPath, sharding: jax.sharding.Sharding | None, rank: int
) -> jax.sharding.Sharding | None:
    """Sharding of one layer of a stacked array with `rank` axes."""
    if not isinstance(sharding, NamedSharding):
        return sharding
    spec = tuple(sharding.spec) + (None,) * (rank - len(sharding.spec))
    if spec[0] is not None:
        raise ValueError(
            f"sharding of {'.'.join(path)} splits the layers (axis 0), which are scanned; split another axis."
        )
    return NamedSharding(sharding.mesh, PartitionSpec(*spec[1:]))


@functools.lru_cache(maxsize=64)
def _fill(sharding: jax.sharding.Sharding | None):
    """(stack, array, layer) -> stack with the layer written, in place."""

    def fill(stack, array, layer):
        return jax.lax.dynamic_update_index_in_dim(stack, array.astype(stack.dtype), layer, 0)

    return jax.jit(fill, donate_argnums=0, out_shardings=sharding)
