"""Files of Hugging Face repositories, from the local cache where they are there."""

import re
from collections.abc import Iterable
from pathlib import Path

NAME = re.compile(r"[\w.-]+/[\w.-]+")


def names_repository(path: str | Path) -> bool:
    """Whether this is no path here, but may be a repository `owner/name`.

    Examples:
        >>> names_repository("Wan-AI/Wan2.1-T2V-1.3B"), names_repository("/no/such/folder")
        (True, False)
    """
    return NAME.fullmatch(str(path)) is not None and not Path(path).expanduser().exists()


def fetch(name: str, patterns: Iterable[str], *, revision: str | None = None) -> Path:
    """The local copy of a repository, with at least the files that are named; what is cached is not fetched again.

    Args:
        name: `owner/name`.
        patterns: Of files, such as `vae/*`.
        revision: Branch, tag or commit; None is the main branch.

    Returns:
        The folder. Without a network, it holds what is in the cache.

    Raises:
        ValueError: If it cannot be had.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"path={name!r} does not exist; to take it from the Hugging Face hub, pip install huggingface_hub."
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        hint = "; if it is a run folder, it is not here" if _may_be_a_run(name) else ""
        raise ValueError(
            f"path={name!r} does not exist here and cannot be downloaded from the hub: {reason}{hint}"
        ) from error


def _may_be_a_run(name: str) -> bool:
    """Whether a folder of this name would more likely be a run's here than a repository, by what it would be in.

    Examples:
        >>> _may_be_a_run("runs/few"), _may_be_a_run("./few"), _may_be_a_run("no-such-owner/Wan2.1-T2V-1.3B")
        (True, True, False)
    """
    return name.startswith(("runs/", "./", "../")) or Path(name).parent.is_dir()
