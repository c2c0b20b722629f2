"""What must be equal in all processes besides a command's settings: versions, and settings of compilation."""

import contextlib
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping

_PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "flax", "optax", "orbax-checkpoint", "numpy")
# settings of JAX that change a compiled program or random numbers
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_numpy_dtype_promotion",
    "jax_use_shardy_partitioner",
)
# flags that may differ between processes: number of devices, paths, logging
_OWN = re.compile(r"dump|device_count|path|file|directory|_dir\b|cache|log|cuda_data|parallelism|threads")


def versions() -> dict[str, str]:
    """Versions of this package, Python and the installed packages that programs, data and checkpoints depend on."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # a plugin of other devices
            found[f"version of {name}"] = importlib.metadata.version(name)
    own = importlib.import_module("monarch_jax").__version__
    return {**found, "version of monarchrt": own, "version of Python": sys.version.split()[0]}


def compilation(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Settings of JAX and flags of XLA that change the program compiled from a function.

    Args:
        environment: Environment variables of the process.

    Returns:
        Values by name, such as "jax_enable_x64" or "--xla_gpu_autotune_level in XLA_FLAGS".

    Examples:
        >>> flags = {"XLA_FLAGS": "--xla_gpu_autotune_level=0 --xla_force_host_platform_device_count=2"}
        >>> {name: value for name, value in compilation(flags).items() if "XLA" in name}
        {'--xla_gpu_autotune_level in XLA_FLAGS': '0'}
    """
    import jax

    settings = {name: str(jax.config.values[name]) for name in _SETTINGS if name in jax.config.values}
    words = [word.partition("=") for word in environment.get("XLA_FLAGS", "").split() if word.startswith("--")]
    flags = {f"{name} in XLA_FLAGS": value or "true" for name, _, value in words if not _OWN.search(name)}
    return settings | flags
