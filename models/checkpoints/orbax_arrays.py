"""Reading of arrays from a folder written by Orbax, with tensorstore's futures instead of Orbax's coroutines.

If one of many arrays is damaged, Orbax abandons the coroutines that read the others. These reads continue, finish
without an event loop, and can crash the process (seen with Orbax 0.12.8 and tensorstore 0.1.86).
"""

from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from monarchrt.models.checkpoints.json_files import read_json

BYTES_AT_A_TIME = 2**32  # limit on bytes of concurrent reads


def open_arrays(folder: Path, names: Iterable[str]) -> dict[str, ts.TensorStore]:
    """Opens arrays without reading them.

    Args:
        folder: Folder written by Orbax, with `_METADATA` and the arrays.
        names: Keys of the saved tree from its root, joined by dots.

    Returns:
        The opened arrays by name.

    Raises:
        ValueError: If Orbax did not write the folder, or one of the arrays cannot be opened.
    """
    folder = folder.absolute()
    try:
        stored = read_json(folder / "_METADATA")
        driver, single = ("zarr3" if stored["use_zarr3"] else "zarr"), stored["use_ocdbt"]
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder} is not a folder that Orbax wrote: {_on_one_line(error)}") from error
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})

    def spec(name: str) -> dict[str, Any]:
        inside = f"{name}/"
        base = {"driver": "file", "path": f"{folder}/" if single else f"{folder}/{inside}"}
        return {"driver": driver, "kvstore": {"driver": "ocdbt", "base": base, "path": inside} if single else base}

    pending = {name: ts.open(spec(name), open=True, read=True, context=context) for name in names}
    return {name: result(future, folder, name) for name, future in pending.items()}


def read_arrays(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Reads arrays onto their devices; each process reads only its own parts.

    Args:
        folder: As in `open_arrays`.
        wanted: Shapes, dtypes and shardings by name; without a sharding, an array goes to the first device.

    Returns:
        The arrays by name.

    Raises:
        ValueError: If an array cannot be read, or has another shape or dtype.
    """
    stores, arrays = open_arrays(folder, wanted), {}
    reading: deque[tuple[str, dict[str, ts.Future]]] = deque()
    under_way = 0

    def finish() -> int:
        name, futures = reading.popleft()
        parts = {place: np.asarray(result(future, folder, name)) for place, future in futures.items()}
        target = wanted[name]
        arrays[name] = jax.make_array_from_callback(target.shape, _sharding(target), lambda at: parts[str(at)])
        return target.size * target.dtype.itemsize

    for name, target in wanted.items():
        store = stores[name]
        if store.shape != target.shape or store.dtype.numpy_dtype != target.dtype:
            raise ValueError(
                f"{folder} has another {name}: shape {store.shape} and {store.dtype.name}, not {target.shape} and "
                f"{target.dtype.name}"
            )
        parts = _sharding(target).addressable_devices_indices_map(target.shape).values()
        places = {str(at): at for at in parts}  # several devices may have the same part
        reading.append((name, {place: store[at].read() for place, at in places.items()}))
        under_way += target.size * target.dtype.itemsize
        while under_way > BYTES_AT_A_TIME:
            under_way -= finish()
    while reading:
        finish()
    return arrays


def _sharding(target: jax.ShapeDtypeStruct) -> jax.sharding.Sharding:
    return target.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def result(future: ts.Future, folder: Path, name: str) -> Any:
    """Waits for the result of a tensorstore future; `folder` and `name` are for the error.

    Raises:
        ValueError: If it fails.
    """
    try:
        return future.result()
    except ValueError as error:
        raise ValueError(f"{folder} is damaged: {name} cannot be read: {_on_one_line(error)[:300]}") from error


def _on_one_line(error: Exception) -> str:
    return " ".join(str(error).split())
