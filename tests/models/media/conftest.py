"""A small video file."""

from pathlib import Path

import pytest

from tests.clips import make_clip


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> Path:
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")
