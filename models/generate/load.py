"""Finding and loading the parts of a Wan checkpoint: network, VAE, text encoder and tokenizer."""

from typing import Any

import numpy as np

from models.errors import UserError
from models.generate.decoders import FrameDecoder
from models.generate.plan import Plan
from models.media.video import read_clip

NO_CONDITION = "none"


def condition_latents(plan: Plan, decoder: FrameDecoder) -> Any:
    """Latents of the image or clip that the video begins with; None if there is none.

    Raises:
        UserError: If it cannot be read, or its frames do not make whole blocks.
    """
    frames = condition_frames(plan)
    return None if frames is None else decoder.encode(frames[None])


def condition_frames(plan: Plan) -> np.ndarray | None:
    """Frames of the image or clip, at the video's size, uint8 [T, H, W, 3]."""
    config = plan.config
    if config.condition is None or config.condition.lower() == NO_CONDITION:
        return None
    if config.mode == "bidirectional":
        raise UserError("condition needs --mode autoregressive or windows; a whole clip at once begins with nothing")
    wanted = config.condition_frames or 1 + (plan.first_block - 1) * plan.temporal
    frames = read_clip(config.condition, height=config.height or 0, width=config.width or 0, max_frames=wanted)
    if len(frames) < wanted and config.condition_frames is not None:
        raise UserError(f"condition {config.condition} has {len(frames)} frames, fewer than {wanted}")
    plan.begins_with(len(frames))
    return frames
