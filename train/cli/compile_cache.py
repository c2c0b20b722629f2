"""Programs that were compiled are kept on disk, so that a command's second run begins at once. No JAX is imported."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

FOLDER_VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX's own
OFF_VARIABLE = "MONARCHRT_NO_PROGRAM_CACHE"
LARGEST = 8 * 2**30  # bytes; those that were not used for longest go
LEAST_FREE = 2**30  # bytes on the disk; with less, programs are not kept
BEING_WRITTEN = 60.0  # seconds that a program's file may be empty for


def programs_folder(environment: MutableMapping[str, str] = os.environ) -> Path:
    """Where compiled programs are kept unless JAX_COMPILATION_CACHE_DIR says otherwise: in the user's cache folder."""
    cache = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "monarchrt" / "programs"


def keep_programs(environment: MutableMapping[str, str] = os.environ) -> None:
    """Lets JAX keep what it compiles, unless it was told where already, or not to.

    Examples:
        >>> chosen = {"JAX_COMPILATION_CACHE_DIR": "/elsewhere"}
        >>> keep_programs(chosen)
        >>> chosen
        {'JAX_COMPILATION_CACHE_DIR': '/elsewhere'}

    Args:
        environment: Changed before JAX is imported; a folder that cannot be written to changes nothing, nor one on a
            disk that is almost full: what JAX writes there is damaged, and is never written again.
    """
    if FOLDER_VARIABLE in environment or environment.get(OFF_VARIABLE):
        return
    folder = programs_folder(environment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_empty(folder)
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


def _remove_empty(folder: Path) -> None:
    """Removes files of programs that a full disk left empty: JAX would fail to read them, and not replace them."""
    old = time.time() - BEING_WRITTEN
    for entry in os.scandir(folder):
        with contextlib.suppress(OSError):  # another command has removed it by now
            if entry.name.endswith("-cache") and (found := entry.stat()).st_size == 0 and found.st_mtime < old:
                Path(entry).unlink(missing_ok=True)
