"""The cache of compiled programs on disk, which lets a command's second run start at once. Does not import JAX."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

FOLDER_VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX's own
OFF_VARIABLE = "MONARCHRT_NO_PROGRAM_CACHE"
LARGEST = 8 * 2**30  # bytes; beyond, the least recently used programs are removed
LEAST_FREE = 2**30  # free bytes on the disk below which programs are not kept
BEING_WRITTEN = 60.0  # seconds for which a program's file may be empty while it is written


def programs_folder(environment: MutableMapping[str, str] = os.environ) -> Path:
    """The folder of compiled programs, in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    cache = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "monarchrt" / "programs"


def keep_programs(environment: MutableMapping[str, str] = os.environ) -> None:
    """Turns on JAX's compilation cache, unless the environment names a folder for it or turns it off.

    Nothing changes if the folder is not writable, or if its disk has less than 1 GiB free: JAX would leave damaged
    files on a full disk, and would never replace them.

    Examples:
        >>> chosen = {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}
        >>> keep_programs(chosen)
        >>> chosen
        {'JAX_COMPILATION_CACHE_DIR': '/elsewhere'}

    Args:
        environment: Environment variables to change. If they are the process's own, JAX may already be imported.
    """
    if FOLDER_VARIABLE in environment or environment.get(OFF_VARIABLE):
        return
    folder = programs_folder(environment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_empty(folder)
        if not os.access(folder, os.W_OK) or shutil.disk_usage(folder).free < LEAST_FREE:
            return
    except OSError:
        return
    settings = {
        FOLDER_VARIABLE: str(folder),
        "JAX_COMPILATION_CACHE_MAX_SIZE": str(LARGEST),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    for name, value in settings.items():
        environment.setdefault(name, value)
    if (jax := sys.modules.get("jax")) is not None and environment is os.environ:  # it has read its settings already
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", LARGEST)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def remove_empty(folder: Path) -> None:
    """Removes files that a full disk left empty: JAX would fail to read them, and would not replace them."""
    old = time.time() - BEING_WRITTEN
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # another command may have removed it
            if entry.name.endswith("-cache") and (found := entry.stat()).st_size == 0 and found.st_mtime < old:
                Path(entry).unlink(missing_ok=True)
