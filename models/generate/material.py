"""What a video is made of, once it is loaded; and of it what does not depend on the kind of checkpoint."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from monarch_jax.devices import cuda_capability
from monarchrt.models.errors import UserError
from monarchrt.models.generate.config import NO_CONDITION, GenerateConfig
from monarchrt.models.generate.decoders import FrameDecoder
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.plan import Plan
from monarchrt.models.generate.tensors import read_noise
from monarchrt.models.media.video import read_clip
from monarchrt.models.sampling import Noise
from monarchrt.models.wan import WanConfig, WanModel
from monarchrt.models.wan.fp8 import CAPABILITY, fp8_products
from monarchrt.models.wan.passes import default_passes
from monarchrt.models.wan.unrolled import UnrolledWan, unroll_layers

WAN_RATE = 16.0  # frames per second of the clips that Wan was trained on


@dataclass(frozen=True, kw_only=True)
class Material:
    """Everything that a video is made of.

    Attributes:
        plan: What to make.
        pipeline: Network and decoder.
        text: Embedding of the prompt.
        negative: Of the negative prompt, with guidance.
        initial: Latents that the video begins with.
        noise: Instead of the seed's.
        reference: Loads what `compare` names.
    """

    plan: Plan
    pipeline: VideoPipeline
    text: Any
    negative: Any = None
    initial: Any = None
    noise: Noise | None = None
    reference: Callable[[], VideoPipeline] | None = None

    def options(self) -> dict[str, Any]:
        """The keyword arguments of `pipeline` and of `make_video`."""
        names = ("plan", "negative", "initial", "noise")
        return {name: getattr(self, name) for name in names}


@runtime_checkable
class Opened(Protocol):
    """A checkpoint that was found and looked through, and of which no weights have been read."""

    @property
    def sizes(self) -> WanConfig:
        """Of the network, with the attention that is stored."""
        ...

    def material(self, config: GenerateConfig) -> Material:
        """Everything for a video; sizes and files are checked before any weights are read."""
        ...

    def check_same(self, config: GenerateConfig, *, what: str = "weights") -> None:
        """Looks whether all processes read the same weights and LoRAs; raises UserError in all of them if not."""
        ...

    def network(self, config: GenerateConfig, *, attention: Any = None) -> WanModel:
        """The network, with its own attention unless another is given."""
        ...


def unrolled_if_asked(model: WanModel, config: GenerateConfig) -> WanModel | UnrolledWan:
    """The network, its layers unrolled with `--unroll-layers yes`; for one video the larger program is not worth it."""
    if not config.unroll:
        return model
    sizes = model.config
    return unroll_layers(model, passes=default_passes(sizes.dtype, sizes.dim) if config.mesh is None else None)


def check_precision(config: GenerateConfig) -> None:
    """Refuses products that this machine's GPU has not.

    Raises:
        UserError: If it is older than those that have them; a CPU computes them by float32, slowly.
    """
    if config.precision == "fp8" and (present := cuda_capability()) is not None and present < CAPABILITY:
        raise UserError(
            f"precision fp8 needs an NVIDIA GPU of compute capability {CAPABILITY} (Ada, Hopper) or later, "
            f"and this one has {present}; take bf16"
        )


def with_products(model: WanModel, config: GenerateConfig) -> WanModel:
    """The network, with its large products in 8 bits if that was asked for."""
    return fp8_products(model) if config.precision == "fp8" else model


def given_noise(plan: Plan, channels: int, *, given: int) -> Noise | None:
    """The noise of `--noise`, for the latents after the `given` ones; None without it."""
    path = plan.config.noise
    return None if path is None else read_noise(path, plan, channels=channels, given=given)


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
    if not Path(config.condition).is_file():
        raise UserError(f"condition {config.condition} is not a file; give an image or a video, or {NO_CONDITION!r}")
    wanted = config.condition_frames or 1 + (plan.first_block - 1) * plan.temporal
    rate = config.condition_fps
    if rate is None:
        rate = WAN_RATE if plan.temporal > 1 else 0.0
    frames = read_clip(
        config.condition, height=config.height or 0, width=config.width or 0, max_frames=wanted, fps=rate
    )
    if rate and len(frames) > 1:
        advice = "monarchrt generate --condition-fps 0 takes the frames that are stored"
        print(f"{config.condition} is read at {rate:g} frames per second; {advice}", file=sys.stderr)
    if len(frames) < wanted and config.condition_frames is not None:
        raise UserError(f"condition {config.condition} has {len(frames)} frames, fewer than {wanted}")
    plan.begins_with(len(frames))
    return frames
