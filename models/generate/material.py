"""Everything loaded for a video, as far as it does not depend on the kind of checkpoint."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from monarch_jax.devices import cuda_capability
from monarchrt.models.attention.base import Attention
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
    """Everything loaded for a video.

    Attributes:
        plan: The plan.
        pipeline: Network and decoder.
        text: Embedding of the prompt.
        negative: Embedding of the negative prompt, with guidance.
        initial: Latents that the video starts with.
        noise: Noise to use instead of the seed's.
        reference: Loads the model of `compare`.
    """

    plan: Plan
    pipeline: VideoPipeline
    text: Any
    negative: Any = None
    initial: Any = None
    noise: Noise | None = None
    reference: Callable[[], VideoPipeline] | None = None

    def options(self) -> dict[str, Any]:
        """Keyword arguments for `pipeline` and `make_video`."""
        names = ("plan", "negative", "initial", "noise")
        return {name: getattr(self, name) for name in names}


@runtime_checkable
class Opened(Protocol):
    """A checkpoint that was found and inspected, without reading weights."""

    @property
    def sizes(self) -> WanConfig:
        """Sizes of the network, with the stored attention."""
        ...

    def material(self, config: GenerateConfig) -> Material:
        """Loads everything for a video; sizes and files are checked before weights are read."""
        ...

    def check_same(self, config: GenerateConfig, *, what: str = "weights") -> None:
        """Raises UserError in all processes unless all read the same weights and LoRAs."""
        ...

    def network(
        self, config: GenerateConfig, *, attention: Attention | tuple[Attention, ...] | None = None
    ) -> WanModel:
        """Loads the network, with its stored attention unless another is given."""
        ...


def unrolled_if_asked(model: WanModel, config: GenerateConfig) -> WanModel | UnrolledWan:
    """The network, unrolled with `--unroll-layers yes`; by default not, as compiling that pays only for many videos."""
    if not config.unroll:
        return model
    sizes = model.config
    return unroll_layers(model, passes=default_passes(sizes.dtype, sizes.dim) if config.mesh is None else None)


def check_precision(config: GenerateConfig) -> None:
    """Checks that this machine's GPU supports the products of `precision`.

    Raises:
        UserError: If the GPU is too old; a CPU computes them in float32, slowly.
    """
    if config.precision == "fp8" and (present := cuda_capability()) is not None and present < CAPABILITY:
        raise UserError(
            f"precision fp8 needs an NVIDIA GPU of compute capability {CAPABILITY} (Ada, Hopper) or later, "
            f"and this one has {present}; take bf16"
        )


def with_products(model: WanModel, config: GenerateConfig) -> WanModel:
    """The network, with its large products in 8 bits if `precision` says so."""
    return fp8_products(model) if config.precision == "fp8" else model


def given_noise(plan: Plan, channels: int, *, given: int) -> Noise | None:
    """The noise of `--noise` for the latent frames after the `given` ones; None without the option."""
    path = plan.config.noise
    return None if path is None else read_noise(path, plan, channels=channels, given=given)


def condition_latents(plan: Plan, decoder: FrameDecoder) -> Any:
    """Latents of the image or clip that the video starts with; None if there is none.

    Raises:
        UserError: If it cannot be read or is not a whole number of blocks.
    """
    frames = condition_frames(plan)
    return None if frames is None else decoder.encode(frames[None])


def condition_frames(plan: Plan) -> np.ndarray | None:
    """Frames of the image or clip, scaled to the video's size, uint8 [T, H, W, 3]."""
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
