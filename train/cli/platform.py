"""Sets JAX_PLATFORMS before JAX is imported: no CUDA without a driver, and the CPU beside any GPU. No JAX here."""

import importlib.metadata
import importlib.util
import os
from collections.abc import MutableMapping
from pathlib import Path

VARIABLE = "JAX_PLATFORMS"
_DRIVER = ("/dev/nvidiactl", "/proc/driver/nvidia", "/dev/dxg", "/dev/nvmap", "/dev/nvhost-gpu")  # WSL, Jetson
_TPU = ("/dev/accel0", "/dev/vfio/0")


def leave_out_cuda(environment: MutableMapping[str, str] = os.environ, *, root: Path = Path("/")) -> None:
    """Sets JAX_PLATFORMS to cpu if the CUDA plugin is installed without a driver and there is no other accelerator.

    A value that the user has set is kept. Nothing changes if there is a TPU, or a plugin for another device.

    Args:
        environment: Environment variables to change, before JAX is imported.
        root: Root of the file system in which device files are looked for.
    """
    if VARIABLE in environment:
        return
    plugins = installed_plugins()
    if not plugins or not all("cuda" in name for name in plugins):
        return
    if any((root / path.lstrip("/")).exists() for path in (*_DRIVER, *_TPU)):
        return
    if importlib.util.find_spec("libtpu") is None:
        environment[VARIABLE] = "cpu"


def keep_cpu(environment: MutableMapping[str, str] = os.environ) -> None:
    """Adds the CPU to a JAX_PLATFORMS without it: callbacks to the host need it.

    The first platform in the list stays the default.
    """
    named = [name for name in environment.get(VARIABLE, "").split(",") if name]
    if named and "cpu" not in named:
        environment[VARIABLE] = ",".join((*named, "cpu"))


def installed_plugins() -> set[str]:
    """Names of JAX's plugins for devices, as JAX finds them: modules below jax_plugins, and entry points."""
    names = {point.name for point in importlib.metadata.entry_points(group="jax_plugins")}
    spec = importlib.util.find_spec("jax_plugins")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        names |= {path.name for path in Path(folder).iterdir() if path.is_dir() and not path.name.startswith("_")}
    return names
