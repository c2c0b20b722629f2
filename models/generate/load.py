"""Finding and loading the parts of a Wan checkpoint: network, VAE, text encoder and tokenizer."""

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from monarchrt.models.checkpoints.hub import fetch, names_repository
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.config import NO_CONDITION, GenerateConfig
from monarchrt.models.generate.decoders import FrameDecoder, WanDecoder
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.plan import Defaults, Plan, check_attention, make_plan
from monarchrt.models.generate.tensors import read_noise
from monarchrt.models.generate.text import text_embeddings
from monarchrt.models.media.video import read_clip
from monarchrt.models.sampling import Noise
from monarchrt.models.vae import load_vae
from monarchrt.models.wan import WanConfig, WanModel

if TYPE_CHECKING:
    from monarchrt.models.wan.checkpoints.source import Source

WAN_RATE = 16.0  # frames per second of the clips that Wan was trained on
# what each part is called in an official folder and in a diffusers folder
PARTS = {
    "VAE": ("Wan2.1_VAE.pth", "vae"),
    "text encoder": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"),
    "tokenizer": ("google/umt5-xxl", "tokenizer"),
}


class Components(NamedTuple):
    """Where the parts beside the network are; None if not needed."""

    vae: Path
    text_encoder: Path | None
    tokenizer: Path | None


def find_components(config: GenerateConfig, checkpoint: Path) -> Components:
    """Looks for the parts in `components`, else beside the checkpoint; from the hub if one of them is named there.

    Args:
        config: With `embeddings`, no text encoder is needed.
        checkpoint: Folder or file of the network.

    Returns:
        The paths.

    Raises:
        UserError: If parts are missing; names all of them, and where they were looked for.
    """
    apart = config.components
    if apart is not None and not apart.is_dir() and not names_repository(apart):
        raise UserError(f"components {apart} is not a folder")
    beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    folders = [apart] if apart is not None and apart.is_dir() else []
    folders += [beside, beside.parent] if beside.name == "transformer" else [beside]
    needed = ["VAE"] if config.embeddings is not None else list(PARTS)
    found: dict[str, Path] = {}
    if apart is not None and names_repository(apart):
        found = _fetched(str(apart), needed)
    found = _parts_in(folders, needed) | found
    missing = [part for part in needed if part not in found]
    if missing and names_repository(config.checkpoint or ""):
        found |= _fetched(config.checkpoint or "", missing)
        missing = [part for part in needed if part not in found]
    if missing:
        looked = "; ".join(f"{part} ({' or '.join(PARTS[part])})" for part in missing)
        named = [name for name in (apart, config.checkpoint) if name is not None and names_repository(name)]
        where = " and ".join(map(str, dict.fromkeys((*named, *folders))))
        saved = "" if missing == ["VAE"] else ", or the text with --embeddings"
        raise UserError(
            f"checkpoint lacks: {looked}; looked in {where}; give the folder that has them with --components{saved}"
        )
    return Components(found["VAE"], found.get("text encoder"), found.get("tokenizer"))


def _parts_in(folders: list[Path], parts: list[str]) -> dict[str, Path]:
    """Those parts that are in one of the folders, the first that has them."""
    places = [(part, folder / name) for part in parts for folder in reversed(folders) for name in reversed(PARTS[part])]
    return {part: place for part, place in places if place.exists()}


def _fetched(repository: str, parts: list[str]) -> dict[str, Path]:
    """Those parts that a Hugging Face repository has, in the local cache."""
    patterns = [pattern for part in parts for name in PARTS[part] for pattern in (name, f"{name}/*")]
    with user_input():
        return _parts_in([fetch(repository, patterns)], parts)


def wan_defaults(source: "Source") -> Defaults:
    """How a Wan checkpoint is sampled where nothing else is said: block by block if causal, in few steps if distilled.

    Args:
        source: The opened checkpoint.

    Returns:
        The defaults; distilled models are causal, though Self-Forcing's files do not say so.
    """
    if source.few_step:
        return Defaults(mode="autoregressive", sampler="few-step", distilled=True, causal=True)
    causal = source.config.causal_block is not None
    own: dict[str, Any] = {}
    with contextlib.suppress(ValueError):  # of a scheduler that we have not, which the caller is told of
        if (scheduler := source.scheduler) is not None:
            own = {"sampler": scheduler.sampler, "shift": scheduler.shift, "shift_from": scheduler.path.name}
    return Defaults(mode="autoregressive" if causal else "bidirectional", distilled=False, causal=causal, **own)


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
    """A checkpoint that was found and looked through, and of which no weights have been read.

    Attributes:
        sizes: Of the network, with the attention that is stored.
    """

    sizes: WanConfig

    def material(self, config: GenerateConfig) -> Material:
        """Everything for a video; sizes and files are checked before any weights are read."""
        ...

    def network(self, config: GenerateConfig, *, attention: Any = None) -> WanModel:
        """The network, with its own attention unless another is given."""
        ...


# who opens a checkpoint, asked in this order: a function from settings to what was opened, or None if it is not theirs
OPENERS = {
    "a run folder": "monarchrt.train.export:open_run",
    "a Wan checkpoint": "monarchrt.models.generate.load:open_wan",
}


def open_checkpoint(config: GenerateConfig) -> Opened:
    """Opens what `config.checkpoint` names.

    Raises:
        UserError: If it is nothing that can be generated with.
    """
    if config.checkpoint is None:
        raise UserError("no checkpoint was given; give the path of one, or the name of a Hugging Face repository")
    for place in OPENERS.values():
        module, _, function = place.partition(":")
        opened = getattr(importlib.import_module(module), function)(config)
        if opened is not None:
            return opened
    raise UserError(f"checkpoint {config.checkpoint} is neither of {', '.join(OPENERS)}")


def load_material(config: GenerateConfig) -> Material:
    """Loads everything that a video is made of from paths: of a Wan checkpoint and its parts, or of a run folder.

    Example:
        >>> material = load_material(GenerateConfig(checkpoint="runs/demo/monarch", frames=13))  # doctest: +SKIP
        >>> frames = material.pipeline(material.text, **material.options())  # doctest: +SKIP

    Args:
        config: The settings.

    Returns:
        The material.

    Raises:
        UserError: If something is missing, or a setting does not fit; before any weights are read where possible.
    """
    opened = open_checkpoint(config)
    if config.compare is None:
        return opened.material(config)
    apart = dataclasses.replace(config, checkpoint=config.compare, weights=None)
    try:
        other = open_checkpoint(apart)
    except UserError as error:
        raise UserError(f"compare {config.compare}: {error}") from error
    for name in ("patch_size", "in_channels", "out_channels", "text_dim", "text_len"):
        ours, theirs = getattr(opened.sizes, name), getattr(other.sizes, name)
        if ours != theirs:
            raise UserError(
                f"compare {config.compare} has {name} {theirs}, and checkpoint {config.checkpoint} has {ours}"
            )
    material = opened.material(config)
    check_attention(dataclasses.replace(material.plan, attention=other.sizes.attention), other.sizes)
    decoder = material.pipeline.decoder
    return dataclasses.replace(material, reference=lambda: VideoPipeline(other.network(apart), decoder))


def half_precision(config: GenerateConfig) -> str:
    """The compute type."""
    half = config.precision == "bf16" or (config.precision == "auto" and jax.default_backend() == "gpu")
    return "bfloat16" if half else "float32"


@dataclass(frozen=True)
class WanCheckpoint:
    """A Wan checkpoint that was opened."""

    source: "Source"

    @property
    def sizes(self) -> WanConfig:
        """Of the network."""
        return self.source.config

    def network(self, config: GenerateConfig, *, attention: Any = None) -> WanModel:
        """The network."""
        from monarchrt.models.wan.checkpoints.load import read_model, resolve_config

        dtype = half_precision(config)
        with user_input():
            self.source.check()
            chosen = resolve_config(
                self.source, None, attention=attention, dtype=dtype, param_dtype=dtype, override=True
            )
            return read_model(self.source, chosen)

    def material(self, config: GenerateConfig) -> Material:
        """Everything for a video."""
        return load_wan(config, self)


def open_wan(config: GenerateConfig) -> WanCheckpoint:
    """Opens a Wan checkpoint in any format."""
    from monarchrt.models.wan.checkpoints.source import open_source

    with user_input():
        return WanCheckpoint(open_source(config.checkpoint or "", weights=config.weights))


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def load_wan(
    config: GenerateConfig, opened: WanCheckpoint | None = None, *, report: Callable[[str], None] = _say
) -> Material:
    """Loads a Wan checkpoint and its parts.

    Sizes, settings and the presence of every part are checked before any weights are read; the text encoder is let go
    of before the network is loaded.

    Args:
        config: The settings.
        opened: The checkpoint, if it is open already.
        report: Takes lines for the person who waits.

    Returns:
        The material.

    Raises:
        UserError: If something is missing or does not fit.
    """
    opened = opened or open_wan(config)
    source = opened.source
    plan = make_plan(config, defaults=wan_defaults(source), model=source.config)
    if config.prompt is None and config.embeddings is None:
        raise UserError("no prompt was given; say what the video shows, for example --prompt 'a cat on a wall'")
    with user_input():
        source.check()
    components = find_components(config, source.path)
    _tell_of_schedulers(source, report)
    for note in plan.notes:
        report(note)
    given = 0
    if (frames := condition_frames(plan)) is not None:
        given = plan.begins_with(len(frames))
        report(f"begins with {len(frames)} frames of {config.condition}")
    noise = given_noise(plan, source.config.out_channels, given=given)
    dtype = half_precision(config)
    text, negative = text_embeddings(
        plan.config,
        encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        guides=plan.guides,
        width=source.config.text_dim,
        rows=source.config.text_len,
        dtype=dtype,
        report=report,
    )
    with user_input():
        decoder = WanDecoder(load_vae(components.vae, dtype=dtype, param_dtype=dtype))
        _check_decoder(decoder, plan, source.config.out_channels)
        decoder.prepare(1, plan.parts, *plan.latents[1:])  # compiles while the network is read
    model = opened.network(config, attention=plan.attention)
    initial = None if frames is None else decoder.encode(frames[None])
    return Material(
        plan=plan,
        pipeline=VideoPipeline(model, decoder),
        text=text,
        negative=negative,
        initial=initial,
        noise=noise,
    )


def _tell_of_schedulers(source: "Source", report: Callable[[str], None]) -> None:
    try:
        _ = source.scheduler
    except ValueError as error:
        report(f"note: {error} Wan's own sampler and shift are used")


def given_noise(plan: Plan, channels: int, *, given: int) -> Noise | None:
    """The noise of `--noise`, for the latents after the `given` ones; None without it."""
    path = plan.config.noise
    return None if path is None else read_noise(path, plan, channels=channels, given=given)


def _check_decoder(decoder: FrameDecoder, plan: Plan, channels: int) -> None:
    found = decoder.channels, decoder.spatial, decoder.temporal
    if found != (channels, plan.spatial, plan.temporal):
        raise UserError(
            f"the VAE has {found[0]} channels and makes {found[1]} pixels and {found[2]} frames of a latent; the "
            f"network needs {channels}, {plan.spatial} and {plan.temporal}"
        )


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
        advice = "--condition-fps 0 takes the frames that are stored"
        print(f"{config.condition} is read at {rate:g} frames per second; {advice}", file=sys.stderr)
    if len(frames) < wanted and config.condition_frames is not None:
        raise UserError(f"condition {config.condition} has {len(frames)} frames, fewer than {wanted}")
    plan.begins_with(len(frames))
    return frames
