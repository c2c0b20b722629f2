"""The settings of a generation, the options of `monarchrt generate`. Does not import JAX, so that help is quick."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from monarchrt.models.attention.options import AttentionOptions
from monarchrt.models.attention.registry import SHORT
from monarchrt.models.bounds import check_bounds, short
from monarchrt.models.errors import UserError, printable, require
from monarchrt.models.mesh import MeshShape

type Mode = Literal["auto", "autoregressive", "bidirectional", "windows"]
type SamplerName = Literal["auto", "few-step", "unipc", "dpm++", "euler"]

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
NO_CONDITION = "none"
MOST_FRAMES, MOST_STEPS = 1_000_000, 10_000  # far above practical values, low enough not to exhaust memory
NO_LORA = (NO_CONDITION,)  # ignores the LoRAs named by a video
STORED = "stored"  # the attention that is stored with the weights
EXACT_DECODER, TINY_DECODER = DECODERS = ("exact", "tiny")
_BOUNDS = {
    **dict.fromkeys(("frames", "window", "block", "condition_frames", "context"), (1, MOST_FRAMES)),
    "sink_frames": (0, MOST_FRAMES),
    **dict.fromkeys(("height", "width", "zoom", "num_heads", "head_dim", "num_iters"), (1, math.inf)),
    "decoder_device": (0, math.inf),
    "context_noise": (0, 1000),
    "fps": (0.1, 1000),
    "shift": (0.001, 1000),  # beyond, noise levels are not distinct in float32, which would look like broken weights
    "guidance": (0, 1000),
    "linger": (0, 10**9),
    "seed": (0, 2**32 - 1),
    "quality": (0, 51),
    "port": (0, 65535),
}
OF_THE_PAGE = ("host", "port", "linger")
# settings of how files are written, which are not properties of the video
NOT_STORED = (
    *("out", "overwrite", "stream", *OF_THE_PAGE, "quiet", "compare", "compare_dense"),
    *("save_embeddings", "save_latents", "save_noise", "mesh", "decoder_device", "unroll_layers"),
)
# those that older versions stored; they are ignored
ONCE_STORED = ("compare_dense", "save_embeddings")
# settings that name files to read, which are not taken from an untrusted video
NAMES_FILES = ("checkpoint", "lora", "components", "decoder", "embeddings", "condition", "noise")


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(AttentionOptions):
    """Generate a video from a prompt with a Wan 2.1 checkpoint or a run of `monarchrt train` or `monarchrt demo`."""

    attention_fields: ClassVar[Mapping[str, type]] = {
        "tile": tuple,
        "blocks": str,
        "num_iters": int,
        "implementation": str,
    }

    checkpoint: str | None = None
    """A run folder of train or demo; or a Wan model: an official or diffusers folder, a file such as Self-Forcing's
    .pt, a folder of `monarchrt convert`, or the name of a Hugging Face repository."""

    lora: tuple[str, ...] = ()
    """LoRAs to merge into the network, FILE or FILE:SCALE, such as `style.safetensors:0.8`, in the format of diffusers,
    ComfyUI or Musubi; or a run folder that trained one. `none` ignores those named by the video of --from."""

    prompt: str | None = None
    """What the video shows. Not used by a run folder, which has no text encoder."""

    out: Path = Path("video.mp4")
    """The video to write; these settings are stored in it. An .mp4 plays everywhere; for lossless frames give an .mkv
    (FFV1), or for PNG files a folder or a pattern such as frames/%05d.png."""

    overwrite: bool = False
    """Replace existing files: `out`, and whatever else is written."""

    negative_prompt: str | None = None
    """What the video should not show, for samplers with guidance; "" for an empty prompt. Default: Wan's own."""

    components: Path | None = None
    """Folder or Hugging Face repository with the text encoder, tokenizer and VAE, in the official or diffusers layout,
    if they are not beside the checkpoint."""

    decoder: str | None = None
    """What decodes latents: exact, Wan's VAE; tiny, the small autoencoder `taew2_1` (.pth or .safetensors, beside the
    checkpoint or in --components), which is faster and less sharp; or the file of such an autoencoder. Default:
    exact."""

    embeddings: Path | None = None
    """A file of text embeddings, saved with --save-embeddings; the text encoder is then not loaded."""

    save_embeddings: Path | None = None
    """Write the embeddings of the prompts to this file, for --embeddings."""

    frames: int | None = None
    """Frames of the video: 4 k + 1 for Wan, in whole blocks if autoregressive. Default: 81, or the run's choice."""

    height: int | None = None
    """Height in pixels, a multiple of 16 for Wan. Default: 480, or the run's."""

    width: int | None = None
    """Width in pixels, a multiple of 16 for Wan. Default: 832, or the run's."""

    fps: float | None = None
    """Frames per second of the file. Default: 16, or 8 for a run."""

    zoom: int | None = None
    """Enlarge each pixel in the file and on the page. Default: 1; small runs are enlarged to a width of at least
    320."""

    seed: int = 0
    """Seed of all noise."""

    condition: str | None = None
    """An image or a video that the result starts with; `none` starts a run folder's video from noise alone. Default:
    nothing, or a held-out frame for a run folder."""

    condition_frames: int | None = None
    """Frames of a `condition` video to start with. Default: the first block, 9 with Wan's VAE and blocks of 3."""

    condition_fps: float | None = None
    """Frames per second at which to read a `condition` video, by its timestamps; 0 takes the frames as stored. Default:
    16 for Wan, 0 for a run."""

    mode: Mode = "auto"
    """autoregressive: block by block with a cache, for causal models; bidirectional: all frames at once; windows:
    clips that continue each other, for models trained with a noise level per frame. auto: chosen by the checkpoint."""

    noise: Path | None = None
    """A file of noise to use instead of the seed's, from --save-noise or from elsewhere: safetensors with `noise`
    [frames, height, width, channels] of the new latents and, for few-step, `fresh` [steps that add noise, frames,
    height, width, channels]."""

    save_noise: Path | None = None
    """Write the noise to this file, for --noise or another implementation."""

    save_latents: Path | None = None
    """Write the final latents to this file: safetensors with `latents` [frames, height, width, channels], float32."""

    sampler: SamplerName = "auto"
    """few-step for distilled models; unipc, dpm++ or euler integrate the flow in many steps. auto: few-step for
    Self-Forcing's generators, including converted ones; euler for a run; unipc otherwise."""

    steps: int | tuple[int, ...] | None = None
    """Network calls per frame, or for few-step the list of its timesteps, such as 1000 757 522; 1 stands for the single
    timestep 1000. Default: 4 for few-step, 50 otherwise; 20 for a run."""

    shift: float | None = None
    """Shift of the noise levels towards high noise. Default: from the pipeline's scheduler_config.json (diffusers) or
    the run, else 5."""

    guidance: float | None = None
    """Weight of classifier-free guidance. Default: 1 (none) for few-step and runs, 5 otherwise."""

    block: int | None = None
    """Latent frames per block, autoregressive. Default: as the model was trained, or 3."""

    independent_first_frame: bool = False
    """Autoregressive: the first latent frame is a block of its own, as models that start from an image need."""

    window: int | None = None
    """Latent frames that attention can see, including the block. Default: as the model was trained; or all, up to 21,
    beyond which the oldest are dropped. In mode windows: the window's frames."""

    sink_frames: int | None = None
    """Leading latent frames that the window always keeps. Default: as the model was trained, or 0."""

    context: int = 1
    """In mode windows: finished latent frames that each window starts with."""

    context_noise: float = 0.0
    """Timestep, 0 to 1000, given to the network for finished frames, like Self-Forcing's setting of this name."""

    attention: str = STORED
    """Self-attention: stored, the one recorded with the weights (else dense); or a kind, such as dense or monarch, with
    its fields, as in `monarch(tile=(3,30,52))`; or a combination such as `first_steps(1, dense, monarch)`, likewise
    first_layers and first_blocks."""

    tile: tuple[int, int, int] | None = None
    """Tile of Monarch attention in tokens (frames, height, width); implies --attention monarch."""

    blocks: str = "fh,w"
    """Which token axes form the rows and columns of a tile."""

    num_iters: int = 1
    """Refinement steps of Monarch attention."""

    implementation: str | None = None
    """Backend of the attention. Default: the fastest that supports the call."""

    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Compute dtype. auto: bf16 for Wan on a GPU, fp32 otherwise. fp8: as bf16, with weights and inputs of the
    network's large products in 8 bits (e4m3, one scale per row), for Ada, Hopper and newer GPUs."""

    mesh: str | None = None
    """Split the network over several devices: `heads=4` splits each block of frames (by heads inside attention, by
    tokens outside), `fsdp=2` splits weights that are too large for one device. Default: the first device."""

    decoder_device: int | None = None
    """Number of the device that decodes, from 0, so that a block is decoded while the network generates the next one;
    it is then not part of the mesh. Default: the network's first device."""

    unroll_layers: Literal["auto", "yes", "no"] = "auto"
    """Autoregressive: copy each layer's weights out of the stacked array once, so that calls need not: some 5% faster
    on a GPU, but slower to compile. auto: for sessions on a GPU without a mesh (with a mesh, give yes)."""

    weights: str | None = None
    """Set of weights in a .pt file, for example generator_ema."""

    num_heads: int | None = None
    """Attention heads of the network, for files without config.json whose heads do not have 128 channels."""

    head_dim: int | None = None
    """Channels per head, likewise."""

    quality: int = 16
    """The video encoder's CRF: 16 is visually lossless, 30 coarse; 0 loses only chroma resolution."""

    compare_dense: bool = False
    """Also generate the video with dense attention, from the same weights and noise, and write both side by side, with
    PSNR and SSIM, to OUT-compare.mp4."""

    compare: str | None = None
    """Likewise with another checkpoint and its own attention, for example the dense one that was finetuned."""

    stream: bool = False
    """Show frames on a local page as they are generated."""

    host: str = "127.0.0.1"
    """Address of the page."""

    port: int = 8765
    """Port of the page; 0 takes a free one."""

    linger: float = 60.0
    """With --stream: seconds that the page stays up after the last frame, for a browser that has not received all."""

    quiet: bool = False
    """No progress bar."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "lora", tuple(self.lora))
        if isinstance(self.steps, list | tuple):
            object.__setattr__(self, "steps", tuple(self.steps))
        self._check_steps()
        check_bounds(self, _BOUNDS)
        require(
            not self.condition_fps or 0.1 <= self.condition_fps <= 1000,
            f"condition_fps is {self.condition_fps}; it must lie in [0.1, 1000], for example 16, or be 0",
        )
        require(
            not (self.compare_dense and self.compare),
            f"compare is {self.compare}, but compare_dense already compares; leave one of them out",
        )
        require(
            self.prompt is None or bool(self.prompt.strip()),
            f"prompt is empty ({self.prompt!r}); describe what the video shows, for example --prompt 'a cat on a wall'",
        )
        if self.mesh is not None:
            MeshShape.parse(self.mesh)
        self._settle_attention()

    def _check_steps(self) -> None:
        """Checks `steps`: a number or a list of timesteps; the sampler checks which of the two it takes."""
        steps = self.steps
        if isinstance(steps, tuple):
            require(bool(steps), "steps is an empty list; give a number, or decreasing steps such as 1000 757 522")
            fits = len(steps) <= MOST_STEPS and max(steps) <= MOST_STEPS
        else:
            require(steps is None or steps >= 1, f"steps is {steps}; it must be at least 1")
            fits = steps is None or steps <= MOST_STEPS
        require(fits, f"steps is {short(steps)}; it must be at most {MOST_STEPS}")

    @property
    def unroll(self) -> bool | None:
        """Whether to unroll layers; None if the setting leaves it open."""
        return {"yes": True, "no": False}.get(self.unroll_layers)

    def _settle_attention(self) -> None:
        """Brings equal attention settings to one form: name and options of the kind, where that can express it."""
        if self.tile is not None:
            fits = self.attention == STORED or self.attention.startswith(SHORT)
            require(fits, f"tile is {self.tile}, but attention is {self.attention!r}; leave one of them out")
            object.__setattr__(self, "tile", tuple(self.tile))
            object.__setattr__(self, "attention", SHORT if self.attention == STORED else self.attention)
        if not self.attention.strip().startswith(SHORT):
            return  # the plan checks the combination of options
        self.normalize_attention()

    def stored(self) -> dict[str, Any]:
        """The settings for the video's metadata, JSON values by name.

        Examples:
            >>> GenerateConfig(prompt="a cat", seed=3).stored()["seed"]
            3
        """
        values = {name: value for name, value in dataclasses.asdict(self).items() if name not in NOT_STORED}
        if self.attention == SHORT:
            values |= self.plain_options() | {"attention": self.attention_text()}
        return json.loads(json.dumps(values, default=str))


def from_stored(values: dict[str, Any], *, source: Path) -> GenerateConfig:
    """Reads the settings stored in a video.

    Args:
        values: JSON values, as from `GenerateConfig.stored`.
        source: The video, for errors.

    Returns:
        The settings; `out` is the default.

    Raises:
        UserError: If one is unknown, of another type or out of range.
    """
    fields = {field.name for field in dataclasses.fields(GenerateConfig)} - set(NOT_STORED)
    values = {name: value for name, value in values.items() if name not in ONCE_STORED}
    unknown = sorted(set(values) - fields)
    some = ", ".join(short(ascii(name)[1:-1]) for name in unknown[:5]) + ", ..." * (len(unknown) > 5)
    require(not unknown, f"{source} was made by another version: it has the settings {some}")
    hints = get_type_hints(GenerateConfig)
    return GenerateConfig(**{name: revived(name, hints[name], value, source) for name, value in values.items()})


def revived(name: str, hint: Any, value: Any, source: Path) -> Any:
    """Converts a JSON value to the type of a setting.

    Raises:
        UserError: If the value is of another type; the message names `source`, the file.
    """
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    for kind in (getattr(kind, "__value__", kind) for kind in kinds):
        if _fits(kind, value):
            convert: Any = get_origin(kind) or kind
            return convert(value) if convert in (Path, float, tuple) else value
    shown = printable(ascii(value))
    raise UserError(f"{source} has {name}={shown} in its settings, which is not one that monarchrt generate takes")


def _fits(kind: Any, value: Any) -> bool:
    """Whether a JSON value has this type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        parts = get_args(kind)
        wanted = parts[:1] * len(value) if parts[1:] == (...,) and isinstance(value, list) else parts
        return isinstance(value, list) and [type(part) for part in value] == list(wanted)
    return type(value) in {Path: (str,), float: (float, int)}.get(kind, (kind,))
