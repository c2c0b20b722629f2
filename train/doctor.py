"""Checks of this machine: versions, driver and devices, implementations of a call, folders, and speed.

Every function returns its findings; `monarchrt doctor` prints them.
"""

import functools
import importlib.metadata
import importlib.resources
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.requirements import Requirement

DISTRIBUTION = "monarchrt"
EXTRA = "cuda"
PLUGIN = "jax-cuda13-plugin"  # by which JAX uses NVIDIA GPUs
LEAST_DRIVER = 580  # oldest major version of the driver for CUDA 13
ANYWHERE = ("xla", "reference")  # implementations that run on every device
LEAST_FREE = 5e9  # free bytes, enough for a compile cache and a few checkpoints of a small run


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fact about the machine.

    Attributes:
        name: Name of the package, device or folder.
        found: Its version or state.
        advice: What to do; None if nothing needs fixing.
        optional: Whether the advice may be ignored, as for a package that only a GPU needs.
    """

    name: str
    found: str
    advice: str | None = None
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of MonarchAttention in bfloat16; without a GPU it is timed in float32.

    Attributes:
        grid: Latent frames, rows and columns of tokens.
        tile: Frames, rows and columns of a tile.
        heads: Number of heads.
        head_dim: Channels per head.
        num_iters: Number of refinement steps.
    """

    grid: tuple[int, int, int]
    tile: tuple[int, int, int]
    heads: int = 12
    head_dim: int = 128
    num_iters: int = 1


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The implementation of a call on this machine.

    Attributes:
        chosen: The implementation that `implementation=None` selects.
        reasons: For every implementation, why it does not support the call here; None if it does.
    """

    chosen: str
    reasons: dict[str, str | None]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Median milliseconds of one forward call.

    Attributes:
        implementation: Implementation of MonarchAttention that was timed.
        monarch: Milliseconds of MonarchAttention.
        dense: Milliseconds of dense attention over the same tokens.
        expected: Stored milliseconds of MonarchAttention for this card and case; None if there are none.
    """

    implementation: str
    monarch: float
    dense: float
    expected: float | None


def versions() -> list[Finding]:
    """Python and the required packages, with their versions and whether these are supported."""
    running = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    findings = [Finding(name="python", found=running)]
    for text in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(text)
        if requirement.marker is None:
            findings.append(_version(requirement, f"pip install '{DISTRIBUTION}'"))
        elif requirement.marker.evaluate({"extra": EXTRA}) and not requirement.marker.evaluate({"extra": ""}):
            install = f"pip install '{DISTRIBUTION}[{EXTRA}]', for NVIDIA GPUs only"
            finding = _version(requirement, install, optional=True)
            judged = finding.found == "not installed" or _installed(PLUGIN)  # without it, any jaxlib is right
            findings.append(finding if judged else replace(finding, advice=None))
    return findings


def _installed(name: str) -> bool:
    """Whether there is any version of a package."""
    try:
        return bool(importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return False


def _version(requirement: Requirement, install: str, *, optional: bool = False) -> Finding:
    """Checks the version of a package.

    Args:
        requirement: The package and its supported versions.
        install: Advice on how to install it.
        optional: Whether the package may be missing.
    """
    name = requirement.name
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, found="not installed", advice=install, optional=optional)
    fits = requirement.specifier.contains(version, prereleases=True)
    return Finding(name=name, found=version, advice=None if fits else f"needs {requirement.specifier}: {install}")


def driver() -> Finding:
    """The NVIDIA driver and cards that nvidia-smi reports; without a driver this is no error."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return Finding(name="NVIDIA driver", found="none", advice=None)
    rows = [row.split(", ") for row in run.stdout.strip().splitlines()]
    if run.returncode or not rows or any(len(row) != 3 for row in rows):
        reason = " ".join((run.stderr or run.stdout).split())[:200]
        return Finding(name="NVIDIA driver", found=f"nvidia-smi fails: {reason}", advice="fix the driver first")
    version = rows[0][1]
    cards = ", ".join(f"{name} ({memory})" for name, _, memory in rows)
    old = version.split(".")[0].isdigit() and int(version.split(".")[0]) < LEAST_DRIVER
    advice = f"JAX for CUDA 13 needs version {LEAST_DRIVER} or newer" if old else None
    return Finding(name="NVIDIA driver", found=f"{version}; {cards}", advice=advice)


def devices() -> Finding:
    """The default devices of JAX, with advice if it does not use a GPU that is there."""
    import jax

    try:
        present = jax.devices()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        return Finding(name="JAX devices", found=f"none: {reason}", advice="set JAX_PLATFORMS=cpu to run on the CPU")
    kinds = sorted({f"{device.device_kind} ({device.platform})" for device in present})
    advice = None
    if present[0].platform == "cpu" and driver().found[0].isdigit():
        asked = os.environ.get("JAX_PLATFORMS")
        why = f"JAX_PLATFORMS is {asked!r}" if asked else f"pip install '{DISTRIBUTION}[{EXTRA}]'"
        advice = f"there is an NVIDIA GPU that JAX does not use: {why}"
    return Finding(name="JAX devices", found=f"{len(present)} x {', '.join(kinds)}", advice=advice)


def folders() -> Iterator[Finding]:
    """The folders that commands write to, with advice if they are not writable or nearly full."""
    import jax

    places = {
        "compile cache": jax.config.jax_compilation_cache_dir,
        "tuned Triton sizes": str(Path.home() / ".cache" / "monarchrt" / "triton"),
        "Hugging Face cache": os.environ.get("HF_HOME") or str(Path.home() / ".cache" / "huggingface"),
        "this folder": str(Path.cwd()),
    }
    for name, place in places.items():
        if place is None:
            yield Finding(name=name, found="off; JAX_COMPILATION_CACHE_DIR=FOLDER keeps what was compiled")
            continue
        there = Path(place).expanduser()
        exists = next(parent for parent in (there, *there.parents) if parent.exists())
        free = shutil.disk_usage(exists).free
        advice = f"only {free / 1e9:.1f} GB are left" if free < LEAST_FREE else None
        if not os.access(exists, os.W_OK):
            advice = f"{exists} cannot be written to"
        yield Finding(name=name, found=f"{there}{'' if there.exists() else ' (not there yet)'}", advice=advice)


def choice(case: Case) -> Choice:
    """Determines the implementation of a case on this machine.

    Args:
        case: The call.

    Returns:
        The chosen implementation, and which ones support the call.

    Raises:
        ValueError: If the tile does not fit the grid.

    Examples:
        >>> choice(Case(grid=(2, 4, 6), tile=(1, 4, 6), heads=1, head_dim=16)).reasons["xla"] is None
        True
    """
    import jax
    import jax.numpy as jnp

    from monarch_jax import MonarchSpec
    from monarch_jax.backends import IMPLEMENTATIONS, choose
    from monarch_jax.contract import Problem
    from monarch_jax.devices import on_cuda

    spec = MonarchSpec(grid=case.grid, tile=case.tile, num_iters=case.num_iters)
    tiles = (1, spec.query_tiles, spec.block_rows, spec.block_cols, case.heads, case.head_dim)
    shape = jax.ShapeDtypeStruct(tiles, jnp.bfloat16)
    problem = Problem(scale=case.head_dim**-0.5, num_iters=case.num_iters)
    reasons: dict[str, str | None] = {}
    for name in IMPLEMENTATIONS:
        try:
            choose(name, problem, shape, shape)
            here = name in ANYWHERE or on_cuda()
            reasons[name] = None if here else "it needs an NVIDIA GPU, where it would support the call"
        except NotImplementedError as error:
            reasons[name] = str(error).removeprefix(f"implementation={name!r} cannot run this call: ")
    return Choice(chosen=choose(None, problem, shape, shape).name, reasons=reasons)


def speed(case: Case, *, seconds: float = 3.0) -> Speed:
    """Times a case on this machine, after a check of its output.

    Args:
        case: The call.
        seconds: Seconds for which to time each of Monarch and dense attention, without compilation.

    Returns:
        The medians, and the stored time for this card.

    Raises:
        ArithmeticError: If the output for two tiles has a relative error above 1e-2 against the reference.
    """
    import jax

    from monarch_jax import monarch_attention

    _check_numbers(case)
    tokens = case.grid[0] * case.grid[1] * case.grid[2]
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, tokens, case.heads, case.head_dim), _dtype()) for key in keys)
    monarch = functools.partial(monarch_attention, grid=case.grid, tile=case.tile, num_iters=case.num_iters)
    implementation = "cudnn" if jax.default_backend() == "gpu" else None
    dense = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
    times = [_median(jax.jit(run), (q, k, v), seconds) for run in (monarch, dense)]
    return Speed(
        implementation=choice(case).chosen,
        monarch=times[0],
        dense=times[1],
        expected=expected(jax.devices()[0].device_kind, case),
    )


def expected(card: str, case: Case) -> float | None:
    """Milliseconds of a case on a card, as stored in `speeds.json`; None if nothing is stored.

    Examples:
        >>> expected("NVIDIA H200", Case(grid=(21, 30, 52), tile=(1, 30, 52)))
        2.12
    """
    stored = json.loads((importlib.resources.files(__package__) / "speeds.json").read_text(encoding="utf-8"))
    for row in stored.get(card, ()):
        if all(row[name] == json.loads(json.dumps(value)) for name, value in vars(case).items()):
            return row["ms"]
    return None


def _dtype():
    import jax
    import jax.numpy as jnp

    return jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32


def _check_numbers(case: Case) -> None:
    import jax
    import jax.numpy as jnp

    from monarch_jax import monarch_attention

    grid = (2 * case.tile[0], *case.tile[1:])  # two tiles
    shape = (3, 1, grid[0] * grid[1] * grid[2], 1, case.head_dim)
    arrays = jax.random.normal(jax.random.key(1), shape, jnp.float32).astype(_dtype())
    attend = functools.partial(monarch_attention, grid=grid, tile=case.tile, num_iters=case.num_iters)
    ours = attend(*arrays).astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        reference = attend(*arrays.astype(jnp.float32), implementation="reference")
    error = float(jnp.linalg.norm(ours - reference) / jnp.linalg.norm(reference))
    if not error <= 1e-2:
        raise ArithmeticError(f"the attention is off by {error:.1e} from the reference, more than 1e-2")


def _median(run, arrays, seconds: float) -> float:
    import jax

    jax.block_until_ready(run(*arrays))  # compiles
    times, end = [], time.monotonic() + seconds
    while not times or (time.monotonic() < end and len(times) < 200):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
