"""Files of Hugging Face repositories, from the local cache if possible."""

import re
from collections.abc import Iterable
from pathlib import Path

NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
FILES = (".bin", ".ckpt", ".gguf", ".mp4", ".pt", ".pth", ".safetensors")  # no repository, if a path ends like this


def names_repository(path: str | Path) -> bool:
    """Whether a path does not exist but has the form of a repository, `owner/name`.

    Examples:
        >>> names_repository("Wan-AI/Wan2.1-T2V-1.3B"), names_repository("/no/such/folder")
        (True, False)
        >>> names_repository("./self_forcing_dmd.pt"), names_repository("models/self_forcing_dmd.pt")
        (False, False)
    """
    text = str(path)
    may_be_one = NAME.fullmatch(text) is not None and not text.lower().endswith(FILES)
    return may_be_one and not Path(path).expanduser().exists()


def fetch(name: str, patterns: Iterable[str], *, revision: str | None = None) -> Path:
    """Downloads files of a repository to the local cache, unless they are there already.

    Args:
        name: The repository, `owner/name`.
        patterns: Patterns of the files, such as `vae/*`.
        revision: Branch, tag or commit; None: the main branch.

    Returns:
        The folder of the local copy. Without a network, it has the files that are in the cache.

    Raises:
        ValueError: If `huggingface_hub` is not installed, or the download fails.
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
        reason = _reason(error)
        hint = "; if it is a run folder, it is not here" if _may_be_a_run(name) else ""
        raise ValueError(
            f"path={name!r} does not exist here and cannot be downloaded from the hub: {reason}{hint}"
        ) from error


def _reason(error: Exception) -> str:
    """Why a download failed: in words of our own for the usual errors, whose messages are long; else the message.

    Examples:
        >>> _reason(ValueError("no space\\nleft."))
        'no space left'
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    known = next((text for name, text in _REASONS.items() if name in names), None)
    return known or " ".join(str(error).split()).rstrip(".")


_REASONS = {  # names of errors, as huggingface_hub is imported only for a download; the more special ones first
    "GatedRepoError": "its owner grants access on its page there; ask for it, then log in with `hf auth login`",
    "RepositoryNotFoundError": "there is no such repository, or it is private; log in with `hf auth login`",
    "RevisionNotFoundError": "it has no such revision",
    "LocalEntryNotFoundError": "it cannot be reached, and the local cache does not have the files",
    "OfflineModeIsEnabled": "HF_HUB_OFFLINE is set, and the local cache does not have the files",
}


def _may_be_a_run(name: str) -> bool:
    """Whether a name is more likely the folder of a run than a repository: its parent exists, or is `runs`.

    Examples:
        >>> _may_be_a_run("runs/few"), _may_be_a_run("no-such-owner/Wan2.1-T2V-1.3B")
        (True, False)
    """
    return name.startswith("runs/") or Path(name).parent.is_dir()
