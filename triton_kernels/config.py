"""Block sizes, warps and stages of each kernel by device; nothing is tuned at run time."""

import contextlib
import contextvars
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax

DEFAULT_CAPABILITY = 90
KERNELS = ("right_forward", "left_forward", "left_backward", "right_backward", "right_query")
OPTIONAL = (
    "left_last",
    "right_first",
    "right_again",
    "left_refine",
    "left_refine_backward",
)  # as one of those, unless set


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Launch parameters of one kernel.

    Attributes:
        rows: Rows of query side per block: (a, j) for the kernels of R, i for those of L. A power of two.
        keys: Key columns l (kernels of R) or key rows (c, k) (kernels of L) per block. A power of two.
        warps: Warps per program.
        stages: Depth of the software pipeline of the loop.
        split: Number of programs that share the loop (`right_forward`).
        transposed: Whether scores have keys first (`left_backward`), which is faster for few rows.
        more_rows: Kernels of L: rows of a second part beside the first, so that 135 run as 128 + 16, not as 256.
        more_keys: Kernels of R: key columns of a second part, so that 80 run as 64 + 16, not as 128.
        registers: Largest number of registers per thread; None leaves it to the compiler. A stream has its own.
        early: `sparse_key_backward`: the product with the values comes before the exponential.
        packed: `sparse_forward` without a band: blocks of fewer keys than others go in parts of so many, a power of two
            of them in one step. 0: a block at a time.
    """

    rows: int
    keys: int
    warps: int = 4
    stages: int = 2
    split: int = 1
    transposed: bool = False
    more_rows: int = 0
    more_keys: int = 0
    registers: int | None = None
    early: bool = False
    packed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """The forward pass as one launch: R of one chunk of rows (a, j) runs beside L of an earlier one (`streamed`).

    Takes block sizes, warps and stages from `right_forward` and `left_forward`.

    Attributes:
        rows: Rows (a, j) of one (batch, head) pair per chunk.
        tiles: Number of key tiles that one program of R processes.
        lag: Number of chunks by which L is behind R.
        slots: Number of chunks whose alpha and Y are in memory, more than `lag`.
        registers: Largest number of registers per thread; None leaves it to the compiler.
    """

    rows: int
    tiles: int
    lag: int = 1
    slots: int = 3
    registers: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError if R would wait for a slot that only later work frees."""
        if not 0 < self.lag < self.slots:
            raise ValueError(f"slots={self.slots} is not more than lag={self.lag}, or lag is not positive.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configs:
    """One `Config` per kernel, the bytes of intermediates that may exist at a time, and how the forward pass goes.

    `stream` is for the forward pass; without it, it takes a launch per chunk of `scratch_bytes / 2`, in the last of
    which L runs alone, with `left_last` or as `left_forward` says. Of several refinement steps, `right_first` is for R
    of the first, `right_again` of the others, and `left_refine` and `left_refine_backward` for L of all but the last,
    where they are set, and `refine_scratch_bytes` is instead of `scratch_bytes`.
    """

    right_forward: Config
    left_forward: Config
    left_backward: Config
    right_backward: Config
    right_query: Config
    scratch_bytes: int = 800 * 2**20
    stream: Stream | None = None
    left_last: Config | None = None
    right_first: Config | None = None
    right_again: Config | None = None
    left_refine: Config | None = None
    left_refine_backward: Config | None = None
    refine_scratch_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Target:
    """The GPU to compile for: compute capability times 10, such as 90, and the device's name if known."""

    compute_capability: int
    device_kind: str | None = None


_CONFIGS: contextvars.ContextVar[Configs | None] = contextvars.ContextVar("triton_kernels_configs", default=None)
_TARGET: contextvars.ContextVar[Target | None] = contextvars.ContextVar("triton_kernels_target", default=None)


@contextlib.contextmanager
def holding[T](variable: contextvars.ContextVar[T], value: T) -> Iterator[None]:
    """Sets a context variable inside the block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextlib.contextmanager
def compile_for(compute_capability: int, device_kind: str | None = None) -> Iterator[None]:
    """Traces for a given GPU instead of the local one, so that no device is needed.

    The default is the first local GPU, or compute capability 9.0 (Hopper) without one.

    Examples:
        >>> with compile_for(80):
        ...     target().compute_capability
        80

    Args:
        compute_capability: Compute capability times 10, for example 80, 89, 90, 100, 120.
        device_kind: Name of the device, as in `jax.Device.device_kind`, to use its tuned configs.

    Yields:
        None.
    """
    with holding(_TARGET, Target(compute_capability, device_kind)):
        yield


def target() -> Target:
    """The GPU to trace for: that of `compile_for`, else the first local one, else Hopper."""
    chosen = _TARGET.get()
    if chosen is not None:
        return chosen
    if jax.default_backend() != "gpu":
        return Target(DEFAULT_CAPABILITY)
    device = jax.devices()[0]
    return Target(round(10 * float(device.compute_capability)), device.device_kind)


def shape_key(*, b1: int, b2: int, dim: int, itemsize: int, few: bool = False) -> str:
    """Key of a tuned entry; `few` for fewer query tiles than key tiles, as with a KV cache.

    Args:
        b1: Rows of a tile.
        b2: Columns of a tile.
        dim: Channels per head.
        itemsize: Bytes of a number.
        few: Whether there are fewer query tiles than key tiles, as with a KV cache.
    """
    return f"b1={b1} b2={b2} dim={dim} itemsize={itemsize}" + " few" * few


@contextlib.contextmanager
def use(configs: Configs) -> Iterator[None]:
    """Traces with these configs, independently of device and shape; for tuning and tests.

    Args:
        configs: Result of the function `configs` inside the block.

    Yields:
        None.
    """
    with holding(_CONFIGS, configs):
        yield


def configs(where: Target, *, b1: int, b2: int, dim: int, itemsize: int, few: bool = False) -> Configs:
    """The tuned configs of a device for a shape: the user's, else the shipped ones, else `heuristic`.

    With `few`, settings of the entry for few query tiles take precedence over those of the entry for the shape.

    Args:
        where: The device.
        b1: Rows of a tile.
        b2: Columns of a tile.
        dim: Channels per head.
        itemsize: Bytes of a number.
        few: Whether there are fewer query tiles than key tiles, as with a KV cache.

    Returns:
        The configs.
    """
    chosen = _CONFIGS.get()
    if chosen is not None:
        return chosen
    best = heuristic(where, b1=b1, b2=b2, dim=dim, itemsize=itemsize)
    for entry in (False, True) if few else (False,):
        stored = tuned(where, shape_key(b1=b1, b2=b2, dim=dim, itemsize=itemsize, few=entry))
        best = dataclasses.replace(best, **{name: _parsed(name, x) for name, x in stored.items()})
    return best


def tuned(where: Target, key: str) -> dict[str, Any]:
    """The entry of a key in the user's file of a device, or else in the shipped one; empty if neither has it."""
    return next((entries[key] for entries in (_read(user_file(where)), _shipped(where)) if key in entries), {})


def _parsed(name: str, x: Any) -> Any:
    if name in KERNELS or (name in OPTIONAL and x):
        return Config(**x)
    return Stream(**x) if name == "stream" and x else x


def store(
    where: Target, chosen: Configs, *, b1: int, b2: int, dim: int, itemsize: int, few: bool = False
) -> pathlib.Path:
    """Adds an entry to the user's file of a device.

    Args:
        where: The device.
        chosen: Its configs for the shape.
        b1: Rows of a tile.
        b2: Columns of a tile.
        dim: Size of a head.
        itemsize: Bytes of a number.
        few: Whether the entry is for fewer query tiles than key tiles.

    Returns:
        The file.
    """
    path = user_file(where)
    path.parent.mkdir(parents=True, exist_ok=True)
    key = shape_key(b1=b1, b2=b2, dim=dim, itemsize=itemsize, few=few)
    entries = _read(path) | {key: dataclasses.asdict(chosen)}
    fresh = path.with_suffix(".new")  # replaced atomically: readers see the old file or the new one
    fresh.write_text(json.dumps(entries, indent=1))
    fresh.replace(path)
    return path


def user_file(where: Target) -> pathlib.Path:
    """The file in which `tune` stores configs of a device, in $XDG_CACHE_HOME/monarchrt/triton, by default ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(cache) / "monarchrt" / "triton" / f"{_name(where)}.json"


def heuristic(where: Target, *, b1: int, b2: int, dim: int, itemsize: int) -> Configs:
    """Configs that every supported GPU can run, from the shape alone.

    Args:
        where: The device.
        b1: Rows of a tile.
        b2: Columns of a tile.
        dim: Channels per head.
        itemsize: Bytes of a number.

    Returns:
        The configs.
    """
    big = where.compute_capability in (80, 90, 100)  # 164 KB of shared memory or more; others have 99
    wide = itemsize * max(64, power_of_two(dim)) // 128  # 1: a row of 64 halves; 2: of 128 halves; 4: of 128 floats
    deep = 3 if big and wide <= 2 else 1 if wide > 2 else 2
    side = 64 if wide <= 2 else 32
    l, i = min(power_of_two(b2, 16), side), min(power_of_two(b1, 16), side)
    return Configs(
        right_forward=Config(rows=side, keys=l, stages=min(deep, 2)),
        left_forward=Config(rows=i, keys=side // (1 if big else 2), stages=deep),
        left_backward=Config(rows=i, keys=32 if wide <= 2 else 16, stages=min(deep, 3 if big else 1)),
        right_backward=Config(
            rows=32 if wide <= 2 else 16, keys=l, warps=4 if wide <= 2 else 8, stages=min(deep, 3 if big else 1)
        ),
        right_query=Config(rows=side, keys=l, stages=min(deep, 2)),
    )


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def _shipped(where: Target) -> dict:
    """Entries of the device's shipped file; other Hopper GPUs use the H200's, which has the same multiprocessors."""
    folder = pathlib.Path(__file__).parent / "tuned"
    path = folder / f"{_name(where)}.json"
    return _read(path if path.is_file() or where.compute_capability != 90 else folder / "NVIDIA_H200.json")


def _name(where: Target) -> str:
    return (where.device_kind or f"sm_{where.compute_capability}").replace(" ", "_").replace("/", "_")


def _read(path: pathlib.Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {}
