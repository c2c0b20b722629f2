"""Finding and loading the parts of a Wan checkpoint: network, VAE, text encoder and tokenizer."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from monarchrt.models.attention.base import Attention
from monarchrt.models.checkpoints.hub import fetch, names_repository
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.config import DECODERS, EXACT_DECODER, GenerateConfig
from monarchrt.models.generate.decoders import FrameDecoder, TinyDecoder, WanDecoder
from monarchrt.models.generate.loras import given_loras, lora_files, lora_settings
from monarchrt.models.generate.material import (
    Material,
    Opened,
    check_precision,
    condition_frames,
    given_noise,
    unrolled_if_asked,
    with_products,
)
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.models.generate.places import find_places
from monarchrt.models.generate.plan import SPATIAL, TEMPORAL, Defaults, Plan, check_attention, make_plan
from monarchrt.models.generate.run_checkpoint import open_run
from monarchrt.models.generate.text import text_embeddings
from monarchrt.models.lora.merging import with_loras
from monarchrt.models.processes.alike import check_same, digest_of, listing, weight_files
from monarchrt.models.processes.arrays import broadcast_arrays
from monarchrt.models.vae import TINY_FILES, load_tiny_vae, load_vae
from monarchrt.models.wan import WanConfig, WanModel

if TYPE_CHECKING:
    from monarchrt.models.wan.checkpoints.source import Source

# names of the parts in an official folder and in a diffusers folder
PARTS = {
    "VAE": ("Wan2.1_VAE.pth", "vae"),
    "tiny decoder": TINY_FILES,
    "text encoder": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder"),
    "tokenizer": ("google/umt5-xxl", "tokenizer"),
}


class Components(NamedTuple):
    """Paths of the parts besides the network; None if a part is not needed. `vae` is the decoder, of either kind."""

    vae: Path
    text_encoder: Path | None
    tokenizer: Path | None


def find_components(config: GenerateConfig, checkpoint: Path, *, texts: bool = True) -> Components:
    """Finds the parts in `components` or beside the checkpoint; either may be a Hugging Face repository.

    Args:
        config: The settings; with `embeddings`, no text encoder is needed.
        checkpoint: Folder or file of the network.
        texts: Whether texts will be encoded.

    Returns:
        The paths.

    Raises:
        UserError: If parts are missing; the message lists them and the folders that were searched.
    """
    apart = config.components
    if apart is not None and not apart.is_dir() and not names_repository(apart):
        raise UserError(f"components {apart} is not a folder")
    beside = checkpoint if checkpoint.is_dir() else checkpoint.parent
    folders = [apart] if apart is not None and apart.is_dir() else []
    folders += [beside, beside.parent] if beside.name == "transformer" else [beside]
    decoder, given = _decoder(config)
    encoded = texts and config.embeddings is None
    needed = [*([] if given else [decoder]), *(["text encoder", "tokenizer"] if encoded else [])]
    places: dict[str, Path] = {}
    if apart is not None and names_repository(apart):
        places = _fetched(str(apart), needed)
    places = _parts_in(folders, needed) | places
    missing = [part for part in needed if part not in places]
    if missing and names_repository(config.checkpoint or ""):
        places |= _fetched(config.checkpoint or "", missing)
        missing = [part for part in needed if part not in places]
    if missing:
        looked = "; ".join(f"{part} ({' or '.join(PARTS[part])})" for part in missing)
        named = [name for name in (apart, config.checkpoint) if name is not None and names_repository(name)]
        where = " and ".join(map(str, dict.fromkeys((*named, *folders))))
        saved = "" if missing == [decoder] else ", or a file of the text's embeddings"
        raise UserError(
            f"checkpoint lacks: {looked}; looked in {where}; give the folder that has them with --components{saved}"
        )
    return Components(given or places[decoder], places.get("text encoder"), places.get("tokenizer"))


def _decoder(config: GenerateConfig) -> tuple[str, Path | None]:
    """Name of the part that decodes, and its file if one was given."""
    name = config.decoder or EXACT_DECODER
    if name in DECODERS:
        return ("VAE" if name == EXACT_DECODER else "tiny decoder"), None
    if not Path(name).exists():
        raise UserError(
            f"decoder is {name}, which is not a file; give {' or '.join(DECODERS)}, or the file of a tiny one"
        )
    return "tiny decoder", Path(name)


def load_decoder(config: GenerateConfig, path: Path, *, device: Any = None) -> FrameDecoder:
    """Loads a decoder.

    Args:
        config: The settings, which say its kind and the precision.
        path: Its file, from `find_components`.
        device: Device to compute on; None: that of the latents.

    Returns:
        The decoder.
    """
    dtype = half_precision(config)
    if _decoder(config)[0] == "VAE":
        return WanDecoder(load_vae(path, dtype=dtype, param_dtype=dtype), device=device)
    return TinyDecoder(load_tiny_vae(path, dtype=dtype, param_dtype=dtype), device=device)


def _parts_in(folders: list[Path], parts: list[str]) -> dict[str, Path]:
    """The parts found in the folders; the first folder that has a part wins."""
    places = [(part, folder / name) for part in parts for folder in reversed(folders) for name in reversed(PARTS[part])]
    return {part: place for part, place in places if place.exists()}


def _fetched(repository: str, parts: list[str]) -> dict[str, Path]:
    """The parts of a Hugging Face repository, downloaded to the local cache."""
    patterns = [pattern for part in parts for name in PARTS[part] for pattern in (name, f"{name}/*")]
    with user_input():
        return _parts_in([fetch(repository, patterns)], parts)


def wan_defaults(source: "Source") -> Defaults:
    """Sampling defaults of a Wan checkpoint: block by block if causal, few steps if distilled.

    Args:
        source: The opened checkpoint.

    Returns:
        The defaults. Distilled models without information on their training count as causal, as Self-Forcing's are.
    """
    own = _as_trained(source)
    causal = source.config.causal_block is not None
    if source.few_step:
        causal = causal or source.trained is None or source.trained.steps is None
        mode = "autoregressive" if causal else "bidirectional"
        return Defaults(mode=mode, sampler="few-step", distilled=True, causal=causal, **own)
    with contextlib.suppress(ValueError):  # an unsupported scheduler, of which the caller notifies the user
        if (scheduler := source.scheduler) is not None:
            own = {"sampler": scheduler.sampler, "shift": scheduler.shift, "shift_from": scheduler.path.name} | own
    return Defaults(mode="autoregressive" if causal else "bidirectional", distilled=False, causal=causal, **own)


def _as_trained(source: "Source") -> dict[str, Any]:
    """The defaults stored with the weights: size of the training clips, and noise levels."""
    trained = source.trained
    if trained is None:
        return {}
    own: dict[str, Any] = {"trained": trained}
    if trained.latents is not None:
        frames, height, width = trained.latents
        own |= {"frames": 1 + (frames - 1) * TEMPORAL, "height": height * SPATIAL, "width": width * SPATIAL}
        own["window"] = frames  # for mode windows
    if trained.shift is not None:
        own |= {"shift": trained.shift, "shift_from": "the run that it was trained in"}
    return own | ({} if trained.steps is None else {"steps": trained.steps})


def open_checkpoint(config: GenerateConfig) -> Opened:
    """Opens `config.checkpoint`, a Wan checkpoint or a run folder.

    Raises:
        UserError: If it is neither, or cannot be used for generation.
    """
    if config.checkpoint is None:
        raise UserError("no checkpoint was given; give the path of one, or the name of a Hugging Face repository")
    check_precision(config)
    return open_run(config) or open_wan(config)


def load_material(config: GenerateConfig) -> Material:
    """Loads everything that a video needs, from a Wan checkpoint and its parts or from a run folder.

    Examples:
        >>> material = load_material(GenerateConfig(checkpoint="runs/demo/monarch", frames=13))  # doctest: +SKIP
        >>> frames = material.pipeline(material.text, **material.options())  # doctest: +SKIP

    Args:
        config: The settings.

    Returns:
        The material.

    Raises:
        UserError: If something is missing or a setting is invalid; where possible before weights are read.
    """
    opened = open_checkpoint(config)
    if config.compare is None:
        return _inputs_of_first(opened.material(config))
    apart = dataclasses.replace(config, checkpoint=config.compare, weights=None, lora=())
    if not Path(config.compare).is_file():  # a folder has a config.json with its heads
        apart = dataclasses.replace(apart, num_heads=None, head_dim=None)
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
    other.check_same(apart, what="weights to compare with")
    material = _inputs_of_first(opened.material(config))
    check_attention(dataclasses.replace(material.plan, attention=other.sizes.attention), other.sizes)
    decoder = material.pipeline.decoder
    find_places(apart, heads=other.sizes.num_heads)  # for its checks
    mesh = material.pipeline.mesh
    return dataclasses.replace(material, reference=lambda: VideoPipeline(other.network(apart), decoder, mesh=mesh))


def _inputs_of_first(material: Material) -> Material:
    """Gives all processes the embeddings, first frames and noise of process 0."""
    names = ("text", "negative", "initial", "noise")
    read = {name: getattr(material, name) for name in names}
    return dataclasses.replace(material, **broadcast_arrays("embeddings, first frames and noise", read))


def half_precision(config: GenerateConfig) -> str:
    """The dtype of the computation."""
    half = config.precision in ("bf16", "fp8") or (config.precision == "auto" and jax.default_backend() == "gpu")
    return "bfloat16" if half else "float32"


@dataclass(frozen=True)
class WanCheckpoint:
    """An opened Wan checkpoint, with LoRAs merged."""

    source: "Source"

    @property
    def sizes(self) -> WanConfig:
        """Sizes of the network."""
        return self.source.config

    def check_same(self, config: GenerateConfig, *, what: str = "weights") -> None:
        """Raises UserError in all processes unless all read the same weights and LoRAs."""
        with user_input():
            source = self.source
            check_same(what, lambda: listing([*weight_files(source.file.path), *lora_files(config)]))
            settings = digest_of(source.config, source.few_step, source.trained, lora_settings(config))
            check_same(what.replace("weights", "settings"), lambda: settings)

    def network(
        self, config: GenerateConfig, *, attention: Attention | tuple[Attention, ...] | None = None
    ) -> WanModel:
        """The network."""
        from monarchrt.models.wan.checkpoints.load import load_source

        dtype = half_precision(config)
        where = find_places(config, heads=self.sizes.num_heads)
        with user_input():
            model = load_source(
                self.source,
                attention=attention,
                dtype=dtype,
                param_dtype=dtype,
                sharding=where.weights,
                override=True,
            )
        return with_products(where.moved(model), config)

    def material(self, config: GenerateConfig) -> Material:
        """Loads everything for a video."""
        return load_wan(config, self)


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def open_wan(config: GenerateConfig, *, report: Callable[[str], None] = _say) -> WanCheckpoint:
    """Opens a Wan checkpoint of any format, and the LoRAs to be merged into it."""
    from monarchrt.models.wan.checkpoints.source import open_source

    with user_input():
        source = open_source(
            config.checkpoint or "", weights=config.weights, num_heads=config.num_heads, head_dim=config.head_dim
        )
        return WanCheckpoint(with_loras(source, given_loras(config, report=report)))


def load_wan(
    config: GenerateConfig,
    opened: WanCheckpoint | None = None,
    *,
    texts: bool = True,
    report: Callable[[str], None] = _say,
) -> Material:
    """Loads a Wan checkpoint and its parts.

    Sizes, settings and the presence of every part are checked before any weights are read. The text encoder is freed
    before the network is loaded.

    Args:
        config: The settings.
        opened: The checkpoint, if it was opened before.
        texts: Whether to encode the prompt now; otherwise the material's text is None.
        report: Called with lines of progress.

    Returns:
        The material.

    Raises:
        UserError: If something is missing or a setting is invalid.
    """
    opened = opened or open_wan(config)
    source = opened.source
    plan = make_plan(config, defaults=wan_defaults(source), model=source.config)
    where = find_places(config, heads=source.config.num_heads)
    if texts and config.prompt is None and config.embeddings is None:
        raise UserError("no prompt was given; describe what the video shows, for example 'a cat on a wall'")
    with user_input():
        source.check()
    opened.check_same(config)
    components = find_components(config, source.path)
    _note_unsupported_scheduler(source, report)
    for note in plan.notes:
        report(note)
    given = 0
    if (frames := condition_frames(plan)) is not None:
        given = plan.begins_with(len(frames))
        report(f"begins with {len(frames)} frames of {config.condition}")
    noise = given_noise(plan, source.config.out_channels, given=given)
    dtype = half_precision(config)
    text = negative = None
    if texts:
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
        decoder = load_decoder(config, components.vae, device=where.decoder)
        _check_decoder(decoder, plan, source.config.out_channels)
        decoder.prepare(1, plan.parts, *plan.latents[1:])  # compiles while the network is read
    model = opened.network(config, attention=plan.attention)
    initial = None if frames is None else decoder.encode(frames[None])
    return Material(
        plan=plan,
        pipeline=VideoPipeline(unrolled_if_asked(model, config), decoder, mesh=where.mesh),
        text=text,
        negative=negative,
        initial=initial,
        noise=noise,
    )


def _note_unsupported_scheduler(source: "Source", report: Callable[[str], None]) -> None:
    try:
        _ = source.scheduler
    except ValueError as error:
        report(f"note: {error} Wan's own sampler and shift are used")


def _check_decoder(decoder: FrameDecoder, plan: Plan, channels: int) -> None:
    made = decoder.channels, decoder.spatial, decoder.temporal
    if made != (channels, plan.spatial, plan.temporal):
        raise UserError(
            f"the decoder has {made[0]} channels and makes {made[1]} pixels and {made[2]} frames of a latent; the "
            f"network needs {channels}, {plan.spatial} and {plan.temporal}"
        )
