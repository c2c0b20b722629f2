"""Reading untrusted files in a separate process, so that memory, crashes and time concern only that process."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from monarchrt.models.errors import UserError
from monarchrt.models.files import temporary_folder

SECONDS, MEMORY = 20, 4 * 2**30  # limits: CPU seconds, and bytes of address space
_USED_UP = 1  # exit status if a limit was reached or the process crashed; 2 for UserErrors
_NICE = 10


def read_stranger(
    path: Path,
    *,
    height: int,
    width: int,
    counts: Sequence[int],
    frames: int | None = None,
    fps: float = 0,
    seconds: int = SECONDS,
    memory: int = MEMORY,
) -> UInt8[np.ndarray, "t h w 3"]:
    """Reads an image or a clip as `read_clip` does, within limits of time and memory.

    Args:
        path: The file; errors call it by its name, without the folder.
        height: Height of the result in pixels.
        width: Width of the result in pixels.
        counts: Allowed numbers of frames; the largest one that the file has is taken.
        frames: One of `counts`, to take exactly this many.
        fps: Frames per second to read at; 0 reads the frames that are stored.
        seconds: Limit of CPU seconds.
        memory: Limit of the address space in bytes.

    Returns:
        RGB frames, uint8 [T, height, width, 3]; T is one of `counts`.

    Raises:
        UserError: If the file cannot be read, has too few frames, or takes more than the limits.
    """
    if frames is not None and frames not in counts:
        raise UserError(f"frames is {frames}; it must be {_listed(counts)}")
    with temporary_folder() as folder:
        out = folder / "frames.npy"
        wanted = dict(height=height, width=width, max_frames=frames or max(counts), fps=fps)
        asked = json.dumps(dict(name=path.name, out=str(out), seconds=seconds, memory=memory, clip=wanted))
        command = [sys.executable, "-P", "-m", __spec__.name if __spec__ else __name__, asked]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in map(os.path.abspath, sys.path))}
        try:
            run = subprocess.run(
                command, cwd=path.parent, env=environment, capture_output=True, text=True, timeout=3 * seconds
            )
        except subprocess.TimeoutExpired:
            raise _too_much(path, seconds, memory) from None
        if run.returncode == 2:
            raise UserError(run.stderr.strip().splitlines()[-1])
        if run.returncode:
            raise _too_much(path, seconds, memory)
        found = np.load(out, allow_pickle=False)
    fitting = [count for count in counts if count <= len(found) and frames in (None, count)]
    if not fitting:
        rate = f" at {fps:g} frames per second" if fps else ""
        one = "is a single image" if len(found) == 1 else f"has {len(found)} frames{rate}"
        raise UserError(f"{path.name} {one}, and {_listed(counts if frames is None else [frames])} are needed")
    return found[: max(fitting)]


def _listed(counts: Sequence[int]) -> str:
    return " or ".join(str(count) for count in sorted(counts))


def _too_much(path: Path, seconds: int, memory: int) -> UserError:
    return UserError(
        f"{path.name} could not be read within {seconds} s and {memory / 2**30:g} GiB of memory; give a smaller one"
    )


def _limit(seconds: int, memory: int) -> None:
    """Sets the limits of this process; where the system has none, only the caller's time-out ends it."""
    try:
        import resource
    except ImportError:
        return
    limits = {"RLIMIT_CPU": seconds, "RLIMIT_AS": memory, "RLIMIT_CORE": 0}
    for name, value in limits.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (ValueError, OSError, AttributeError):
            continue


def _main(asked: dict[str, Any]) -> int:
    from monarchrt.models.media.video import read_clip

    _limit(asked["seconds"], asked["memory"])
    if hasattr(os, "nice"):
        os.nice(_NICE - min(0, os.nice(0)))  # the priority that a server has raised for itself is not for uploads
    try:
        np.save(asked["out"], read_clip(asked["name"], **asked["clip"]))
    except UserError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except MemoryError:
        return _USED_UP
    return 0


if __name__ == "__main__":
    raise SystemExit(_main(json.loads(sys.argv[1])))
