"""Sizes measured on a card, as data: tuned/<device kind>.json, used where present instead of the heuristics."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax

from monarchrt.pallas_kernels.sm90.config import BackwardConfig, ForwardConfig, backward_config, forward_config
from monarchrt.pallas_kernels.sm90.refined_config import refined_config

FOLDER = pathlib.Path(__file__).parents[1] / "tuned"
DEFAULT_KIND = "NVIDIA H200"  # other Hopper cards have the same multiprocessors, if not as many


def shape_key(rows: int, cols: int, dim: int, *, few: bool = False, e4m3: bool = False, masked: bool = False) -> str:
    """Key of an entry; `few` are fewer query tiles than key tiles, as with a KV cache; `e4m3` as in `forward`;
    `masked` where query tiles may see fewer key tiles than there are.

    Examples:
        >>> shape_key(30, 52, 128, few=True)
        'b1=30 b2=52 dim=128 few'
    """
    return f"b1={rows} b2={cols} dim={dim}" + " few" * few + " e4m3" * e4m3 + " masked" * masked


def forward(
    rows: int, cols: int, dim: int, *, few: bool = False, e4m3: bool = False, masked: bool = False
) -> ForwardConfig | None:
    """The forward pass's sizes for the local card, or for an H200 where there is none; None when nothing fits.

    An entry for few query tiles or for masked calls stands instead of the shape's. With `e4m3`, alpha and Y are stored
    in 8 bits.
    """
    config = forward_config(rows, cols, dim, e4m3=e4m3)
    keys = [shape_key(rows, cols, dim, few=x) for x in ((True, False) if few else (False,))]
    if not e4m3:
        return _choose(config, "forward", *(key + " masked" for key in keys if masked), *keys)
    config = _choose(config, "forward", *keys, only=("right",))  # what was measured of stage 1 with 16 bits
    return _choose(config, "forward", *(shape_key(rows, cols, dim, few=" few" in key, e4m3=True) for key in keys))


def backward(rows: int, cols: int, dim: int) -> BackwardConfig | None:
    """The backward pass's sizes, as `forward`."""
    return _choose(backward_config(rows, cols, dim), "backward", shape_key(rows, cols, dim))


def refined_backward(rows: int, cols: int, dim: int) -> BackwardConfig | None:
    """The sizes of several refinement steps: what was measured of one, but for the kernel back through L."""
    config = refined_config(rows, cols, dim)
    return _choose(config, "backward", shape_key(rows, cols, dim), only=("right", "query", "chunk_bytes"))


def changed(config: Any, changes: dict[str, Any]) -> Any:
    """A configuration with changes, nested ones as dictionaries.

    Examples:
        >>> config = changed(forward_config(30, 52, 128), {"chunk_bytes": 2**20, "left": {"stages": 3}})
        >>> config.chunk_bytes, config.left.stages, config.left.columns
        (1048576, 3, 2)

    Args:
        config: A dataclass of `pallas_kernels.sm90.config`.
        changes: Fields to values; the changes of a field that is a dataclass are a dictionary.

    Returns:
        The changed configuration.

    Raises:
        TypeError: If a field does not exist.
        ValueError: If the changed sizes do not fit each other.
    """
    new = {}
    for name, value in changes.items():
        old = getattr(config, name, None)
        new[name] = changed(old, value) if dataclasses.is_dataclass(old) else value
    return dataclasses.replace(config, **new)


def _choose(config: Any, which: str, *keys: str, only: tuple[str, ...] = ()) -> Any:
    if config is None:
        return None
    kind = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else DEFAULT_KIND
    measured = _entries(kind)
    entries = (_entries(DEFAULT_KIND) or {}) if measured is None else measured
    changes = next((entries[key][which] for key in keys if which in entries.get(key, {})), {})
    if only:
        changes = {name: change for name, change in changes.items() if name in only}
    if measured is None:  # a card with fewer multiprocessors may have no place for a cluster of 16 blocks
        changes = {name: change for name, change in changes.items() if name != "fused"}
    return changed(config, changes)


@functools.cache
def _entries(kind: str) -> dict[str, dict] | None:
    path = FOLDER / f"{kind.replace(' ', '_').replace('/', '_')}.json"
    return json.loads(path.read_text()) if path.is_file() else None
