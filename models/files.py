"""Names of files that grow before they get their own."""

import os
from pathlib import Path


def unfinished(path: Path) -> Path:
    """Where this process writes a file until it is complete; what a killed process left behind ends in .part, too.

    Example:
        >>> unfinished(Path("cat.mp4")).name == f"cat.mp4.{os.getpid()}.part"
        True
    """
    # with the process's number: two that write the same file would spoil each other's
    return path.with_name(f"{path.name}.{os.getpid()}.part")
