"""The clip that a video begins with is read at Wan's rate, a run's as it is stored, both as asked if asked."""

import numpy as np
import pytest

from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.load import condition_frames
from monarchrt.models.generate.plan import Defaults, make_plan
from monarchrt.models.wan import wan_config
from tests.clips import encode_video


@pytest.mark.parametrize(
    ("temporal", "given", "step"),
    [(4, None, 2), (4, 0.0, 1), (4, 8.0, 4), (1, None, 1), (1, 16.0, 2)],
)
def test_rate(tmp_path, capsys, temporal, given, step):
    """Of 32 frames per second every second one is seen at 16."""
    frames = [np.full((32, 48, 3), 6 * k, np.uint8) for k in range(40)]
    path = encode_video(tmp_path / "a.mp4", frames, rate=32)
    config = GenerateConfig(
        condition=str(path), condition_fps=given, condition_frames=9, frames=21, height=32, width=48
    )
    defaults, model = Defaults(mode="autoregressive"), wan_config("tiny", num_layers=1)
    plan = make_plan(config, defaults=defaults, model=model, spatial=8, temporal=temporal)
    read = condition_frames(plan)
    assert read is not None
    assert [round(float(frame.mean()) / 6) for frame in read] == list(range(0, 9 * step, step))
    said = capsys.readouterr().err
    assert ("--condition-fps 0 takes the frames that are stored" in said) == (step > 1)


def test_what_is_no_rate():
    with pytest.raises(UserError, match="condition_fps is -1"):
        GenerateConfig(condition_fps=-1.0)
