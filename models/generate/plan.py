"""Turns settings into a plan: defaults filled in and sizes checked, before any weights are read."""

import dataclasses
import math
from dataclasses import dataclass

import jax

from monarchrt.models.attention.base import Attention, leaves
from monarchrt.models.attention.densities import FULL, NetworkDensity, density_of_network
from monarchrt.models.attention.notation import parse
from monarchrt.models.attention.registry import EXACT, SHORT, exact
from monarchrt.models.errors import UserError, printable, user_input
from monarchrt.models.generate.config import NO_CONDITION, STORED, GenerateConfig
from monarchrt.models.sampling import Rollout, Windows
from monarchrt.models.sampling.rollout import cache_room
from monarchrt.models.sampling.tables import sampler_table
from monarchrt.models.wan import WanConfig
from monarchrt.models.wan.causal import cache_shape, empty_runs
from monarchrt.models.wan.checkpoints.settings import Trained
from monarchrt.models.wan.rope import MAX_POSITIONS

LARGEST_SIDE = 16384  # pixels, limit of the H.264 encoder
SMALLEST_WIDTH = 320  # pixels; smaller videos are enlarged for display
LONGEST_WITHOUT_WINDOW = 21  # latent frames of Wan's training clips
BLOCK = 3  # latent frames of a block in Self-Forcing
SPATIAL, TEMPORAL = 8, 4  # pixels and frames per latent of Wan's VAE
USED_IN = {
    "window": ("autoregressive", "windows"),
    "sink_frames": ("autoregressive",),
    "independent_first_frame": ("autoregressive",),
    "context": ("windows",),
}
PIECE = 3  # latent frames that are decoded at a time, for clips that are not generated block by block


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """Defaults that a checkpoint provides for settings that were not given.

    Attributes:
        mode: autoregressive, bidirectional or windows.
        frames: Number of frames.
        height: Height in pixels.
        width: Width in pixels.
        fps: Frames per second.
        sampler: Sampler in this mode.
        steps: Number of sampling steps, or for few-step samplers their list; None: the sampler's default.
        shift: Shift of the noise levels.
        guidance: Guidance scale, for samplers other than few-step.
        window: Latent frames of a window, in mode windows.
        trained: Settings of the training, as far as they are known.
        shift_from: Source of the shift, for messages; None if it is only assumed.
        distilled: Whether the network was distilled to few steps.
        causal: Whether it was trained block by block.
    """

    mode: str
    frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    sampler: str = "unipc"
    steps: int | tuple[int, ...] | None = None
    shift: float = 5.0
    guidance: float = 5.0
    window: int | None = None
    shift_from: str | None = None
    distilled: bool | None = None
    causal: bool | None = None
    trained: Trained | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The complete settings of a generation.

    Attributes:
        config: The complete settings: whatever has a default is neither None nor "auto".
        latents: Shape (F, h, w) of the video's latents.
        settings: Settings of the sampler.
        attention: Attention of the model, for all layers or one for each layer.
        spatial: Pixels per latent position.
        temporal: Frames per latent frame after the first.
        frames_given: Whether the number of frames was given; otherwise it follows from the checkpoint and the blocks.
        notes: Lines for the user about these settings.
        density: Density of the attention maps, over all layers and steps.
    """

    config: GenerateConfig
    latents: tuple[int, int, int]
    settings: Rollout | Windows
    attention: Attention | tuple[Attention, ...]
    spatial: int
    temporal: int
    frames_given: bool = True
    notes: tuple[str, ...] = ()
    density: NetworkDensity = FULL

    @property
    def kinds(self) -> str:
        """Names of the attention kinds."""
        settings = self.attention if isinstance(self.attention, tuple) else (self.attention,)
        return ", ".join(dict.fromkeys(leaf.name for setting in settings for leaf in leaves(setting)))

    @property
    def guides(self) -> bool:
        """Whether guidance is used, which needs a negative prompt."""
        return self.settings.guidance != 1.0

    @property
    def parts(self) -> list[int]:
        """Latent frames of each decoded part; empty in mode windows, where the windows are the parts."""
        frames, settings = self.latents[0], self.settings
        if isinstance(settings, Rollout):
            return settings.blocks(frames)
        if settings.window is not None:
            return []
        return [min(PIECE, frames - start) for start in range(0, frames, PIECE)]

    @property
    def first_block(self) -> int:
        """Latent frames of the first block or of a window's context, the default length of a conditioning clip."""
        if isinstance(self.settings, Windows):
            return self.settings.context
        return 1 if self.settings.independent_first_frame else self.settings.block

    def begins_with(self, frames: int) -> int:
        """Number of latent frames of a conditioning clip with this many frames.

        Raises:
            UserError: If it is not a whole number of latent frames and blocks, or leaves nothing to generate.
        """
        count, over = divmod(frames - 1, self.temporal)
        latents = count + 1
        first = self.first_block
        whole = latents >= first
        if isinstance(self.settings, Rollout):
            whole = whole and not (latents - first) % self.settings.block
        if over or not whole:
            step = self.settings.block if isinstance(self.settings, Rollout) else 1
            good = [1 + (first + n * step - 1) * self.temporal for n in range(3)]
            hint = ""
            if frames == 1 and isinstance(self.settings, Rollout):
                hint = "; a single image needs independent_first_frame"
            raise UserError(
                f"condition has {frames} frames, which do not make whole blocks; {', '.join(map(str, good))}, ... do"
                f" (condition_frames){hint}"
            )
        if latents >= self.latents[0]:
            raise UserError(
                f"condition has {frames} frames, which leaves none of frames={self.config.frames} to generate"
            )
        return latents


def make_plan(
    config: GenerateConfig, *, defaults: Defaults, model: WanConfig, spatial: int = SPATIAL, temporal: int = TEMPORAL
) -> Plan:
    """Fills in defaults and checks the settings.

    Args:
        config: Settings as given.
        defaults: Defaults of the checkpoint.
        model: Sizes of the network, and its stored attention.
        spatial: Pixels per latent position.
        temporal: Frames per latent frame after the first.

    Returns:
        The plan.

    Raises:
        UserError: If a size, number of frames, tile or setting is invalid; the message names a valid one.
    """
    frames_given = config.frames is not None
    config = _complete(config, defaults, model, temporal)
    _check_unrolled(config)
    _check_model(model)
    latents = (_latent_frames(config, temporal), *_latent_size(config, model, spatial))
    with user_input():
        if config.mode == "autoregressive":
            settings: Rollout | Windows = Rollout(
                sampler=config.sampler,
                steps=config.steps,
                shift=config.shift or 5.0,
                guidance=1.0 if config.guidance is None else config.guidance,
                block=config.block or BLOCK,
                independent_first_frame=config.independent_first_frame,
                window=config.window or _window(config, latents[0]),
                sink_frames=config.sink_frames or 0,
                context_noise=config.context_noise,
            )
        else:
            settings = Windows(
                sampler=config.sampler,
                steps=config.steps,
                shift=config.shift or 5.0,
                guidance=1.0 if config.guidance is None else config.guidance,
                window=config.window if config.mode == "windows" else None,
                context=config.context,
                context_noise=config.context_noise,
            )
        attention = _attention(config, model)
    zoom = _zoom(config)
    _check_positions(config, settings.window, latents, model, spatial, temporal)
    plan = Plan(
        config=dataclasses.replace(config, window=settings.window, zoom=zoom),
        latents=latents,
        settings=settings,
        attention=attention,
        spatial=spatial,
        temporal=temporal,
        frames_given=frames_given,
        notes=_notes(config, defaults, settings, model),
    )
    density = check_attention(plan, model)
    if config.compare_dense and set(_stored(attention)) == {exact()}:
        raise UserError(
            f"compare_dense compares another attention with {EXACT}, but attention is {EXACT}; give a --tile"
        )
    return dataclasses.replace(plan, density=density)


def _notes(
    config: GenerateConfig, defaults: Defaults, settings: Rollout | Windows, model: WanConfig
) -> tuple[str, ...]:
    """Notes on the sampling, and on settings for which the checkpoint is not known to be trained."""
    table = settings.table()
    listed = f" ({_listed(settings.steps)})" if isinstance(settings.steps, tuple) else ""
    said = f" (of {defaults.shift_from})" if defaults.shift_from and settings.shift == defaults.shift else ""
    grid = "; noise levels on Wan's grid, from which diffusers' differs a little" if defaults.shift_from else ""
    guidance = "no guidance" if settings.guidance == 1.0 else f"guidance {settings.guidance:g}"
    notes = [f"sampler {config.sampler}: {table.steps} steps{listed}, shift {settings.shift:g}{said}, {guidance}{grid}"]
    if config.sampler == "few-step" and defaults.distilled is False:
        notes.append(
            "note: this checkpoint does not seem to be distilled, and few steps then give blurred videos; use the "
            "sampler unipc or euler"
        )
    if config.mode == "autoregressive" and defaults.causal is False:
        mode, suits = "bidirectional", "whole clips suit"
        if defaults.mode == "windows":  # a whole clip may be longer than those it was trained on
            mode, suits = "windows", "windows that continue each other suit"
        notes.append(
            f"note: this checkpoint does not seem to be trained block by block, and its videos may then drift; {suits} "
            f"it: monarchrt generate --mode {mode}"
        )
    return (*notes, *_differences(settings, defaults, model))


def _differences(settings: Rollout | Windows, defaults: Defaults, model: WanConfig) -> list[str]:
    """The settings that differ from the training, as far as that is known."""
    trained = defaults.trained
    if trained is None:
        return []
    found: list[tuple[str, object, str]] = []
    if trained.shift is not None and settings.shift != trained.shift:
        found.append(("shift", f"{settings.shift:g}", f"{trained.shift:g}"))
    if trained.steps is not None and settings.sampler == "few-step":
        theirs = sampler_table("few-step", steps=trained.steps, shift=settings.shift).timesteps
        if settings.table().timesteps.tolist() != theirs.tolist():
            found.append(("steps", _listed(settings.steps), _listed(trained.steps)))
    if isinstance(settings, Rollout):
        window, sinks = trained.window, trained.sink_frames or 0
        if window is None and trained.latents is not None and settings.window is not None:
            whole = trained.latents[0]
            if settings.window < whole:
                found.append(("window", settings.window, f"all of the {whole} frames of its clips"))
        elif window not in (None, settings.window):
            found.append(("window", settings.window, str(window)))
        if settings.sink_frames != sinks:
            found.append(("sink_frames", settings.sink_frames, str(sinks)))
        if settings.independent_first_frame and model.causal_block and not model.independent_first_frame:
            found.append(("independent_first_frame", "true", f"whole blocks of {model.causal_block} frames"))
    return [f"note: {name} is {value}, but this checkpoint was trained with {was}" for name, value, was in found]


def _listed(steps: int | tuple[int, ...] | None) -> str:
    return " ".join(map(str, steps)) if isinstance(steps, tuple) else str(steps)


def _check_unrolled(config: GenerateConfig) -> None:
    """Raises UserError if layers should be unrolled but cannot be."""
    if not config.unroll:
        return
    if config.mode != "autoregressive":
        raise UserError(f"unroll_layers is yes, for mode autoregressive, but mode is {config.mode}; use auto")
    if config.compare_dense:
        raise UserError("compare_dense is True, which needs layers in their stack, but unroll_layers is yes; use auto")


def _complete(config: GenerateConfig, defaults: Defaults, model: WanConfig, temporal: int) -> GenerateConfig:
    """The settings with the checkpoint's defaults filled in."""
    mode = defaults.mode if config.mode == "auto" else config.mode
    _check_used(config, mode)
    sampler = _sampler(config, defaults, mode)
    few = sampler == "few-step"
    given = {name: getattr(config, name) for name in ("frames", "height", "width", "fps", "shift", "guidance", "steps")}
    filled = {
        "frames": defaults.frames,
        "height": defaults.height,
        "width": defaults.width,
        "fps": defaults.fps,
        "shift": defaults.shift,
        "guidance": 1.0 if few else defaults.guidance,
        "steps": (defaults.steps if few == (defaults.sampler == "few-step") else None) or (4 if few else 50),
    } | {name: value for name, value in given.items() if value is not None}
    window, sinks = _window_and_sinks(config, defaults, mode)
    block = _chosen_block(config, defaults, model, mode)
    alone = mode == "autoregressive" and (config.independent_first_frame or model.independent_first_frame)
    complete = dataclasses.replace(
        config, mode=mode, sampler=sampler, window=window, sink_frames=sinks,
        block=block, independent_first_frame=alone, **filled,
    )  # fmt: skip
    if config.frames is None:  # the checkpoint's default is for its own mode and blocks
        complete = dataclasses.replace(complete, frames=_nearest(complete, temporal)[0])
    return complete


def _check_used(config: GenerateConfig, mode: str) -> None:
    """Raises UserError for settings that the mode, or a video without a condition, does not use."""
    for name, modes in USED_IN.items():
        value, default = getattr(config, name), getattr(GenerateConfig(), name)
        if value not in (None, 0, default) and mode not in modes:
            instead = "leave it out" if not default else f"use {default}"
            raise UserError(f"{name} is {value}, for mode {' or '.join(modes)}, but mode is {mode}; {instead}")
    if config.condition_frames is not None and (config.condition or NO_CONDITION).lower() == NO_CONDITION:
        raise UserError(f"condition_frames is {config.condition_frames}, but there is no --condition; leave it out")


def _sampler(config: GenerateConfig, defaults: Defaults, mode: str) -> str:
    """The sampler: the given one, else the checkpoint's in its own mode, else the usual one of the mode."""
    if config.sampler != "auto":
        return config.sampler
    if mode == defaults.mode or (mode == "autoregressive" and defaults.distilled is False):
        return defaults.sampler
    return "few-step" if mode == "autoregressive" else "unipc"


def _window_and_sinks(config: GenerateConfig, defaults: Defaults, mode: str) -> tuple[int | None, int | None]:
    """Latent frames of the window, and those that it always keeps; None: there is none."""
    if mode == "windows":
        window = defaults.window if config.window is None else config.window
        if window is None:
            raise UserError(
                "mode is 'windows', but there is no window; give one: monarchrt generate --mode windows --window 6"
            )
        return window, None
    if mode != "autoregressive":
        return config.window, None
    window, sinks, known = config.window, config.sink_frames, defaults.trained
    if known is not None and known.window is not None:
        window = known.window if window is None else window
        sinks = known.sink_frames if sinks is None else sinks
    return window, sinks


def _chosen_block(config: GenerateConfig, defaults: Defaults, model: WanConfig, mode: str) -> int:
    """Latent frames per block; videos of other modes store it too."""
    trained = model.causal_block
    if mode == "autoregressive" and None not in (config.block, trained) and config.block != trained:
        raise UserError(f"block is {config.block}, but the model was trained on blocks of {trained}; leave it out")
    usual = trained or (BLOCK if mode == defaults.mode else _block(config, model))
    if mode != "autoregressive" and config.block not in (None, usual):
        raise UserError(f"block is {config.block}, for mode autoregressive, but mode is {mode}; leave it out")
    return config.block or usual


def _block(config: GenerateConfig, model: WanConfig) -> int:
    """Latent frames per block of a model trained without blocks: Self-Forcing's 3, or whole tiles."""
    with user_input():
        settings = _attention(config, model)
    parts = [leaf for setting in (settings if isinstance(settings, tuple) else (settings,)) for leaf in leaves(setting)]
    frames = math.lcm(*(part.unit[0] for part in parts if part.unit is not None)) * model.patch_size[0]
    return BLOCK if not BLOCK % frames else frames


def _check_model(model: WanConfig) -> None:
    if model.in_channels != model.out_channels:
        raise UserError(
            f"checkpoint is of type {model.model_type}, with {model.in_channels} input channels; only text-to-video "
            f"models can be sampled: take one, such as Wan-AI/Wan2.1-T2V-14B, or for a video that begins with an image "
            f"a causal one, such as Self-Forcing's: monarchrt generate --condition IMAGE --independent-first-frame"
        )


def _latent_frames(config: GenerateConfig, temporal: int) -> int:
    """Number of latent frames of the video, a whole number of blocks."""
    frames, nearest = config.frames or 1, _nearest(config, temporal)
    if frames not in nearest:
        rules = [f"be 1 + {temporal} k"] if temporal > 1 else []
        if config.mode == "autoregressive":
            first = "after the first one " if config.independent_first_frame else ""
            rules.append(f"make {first}whole blocks of {config.block or BLOCK} latent frames")
        raise UserError(
            f"frames is {frames}; it must {' and '.join(rules)}; the nearest: {' or '.join(map(str, nearest))}"
        )
    return 1 + (frames - 1) // temporal


def _nearest(config: GenerateConfig, temporal: int) -> list[int]:
    """Numbers of frames that are whole latent frames and blocks: the setting itself, or the nearest ones."""
    first, block = (1 if config.independent_first_frame else 0), config.block or BLOCK
    blocked = config.mode == "autoregressive"

    def whole(frames: int) -> bool:
        latents, over = divmod(frames - 1, temporal)
        latents += 1
        if over or latents < 1:
            return False
        return not blocked or (latents > first and (latents - first) % block == 0)

    frames = config.frames or 1
    below = next((n for n in range(frames, 0, -1) if whole(n)), None)
    above = next(n for n in range(frames, frames + 4 * temporal * block + 2) if whole(n))
    return [n for n in dict.fromkeys((below, above)) if n is not None]


def _latent_size(config: GenerateConfig, model: WanConfig, spatial: int) -> tuple[int, int]:
    """Height and width of the latents."""
    sizes = []
    for name, patch in zip(("height", "width"), model.patch_size[1:], strict=True):
        size, unit = getattr(config, name), spatial * patch
        if size % unit:
            below, above = size // unit * unit, (size // unit + 1) * unit
            nearest = f"{below} or {above}" if below else f"{above}"
            raise UserError(f"{name} is {size}, which is not a multiple of {unit}; the nearest that are: {nearest}")
        sizes.append(size // spatial)
    return sizes[0], sizes[1]


def _check_positions(
    config: GenerateConfig, window: int | None, latents: tuple[int, int, int], model: WanConfig, spatial: int,
    temporal: int,
) -> None:  # fmt: skip
    """Raises UserError if attention spans more positions than the network's rotary embedding has."""
    frames, height, width = (MAX_POSITIONS * patch for patch in model.patch_size)
    if window is not None and window > frames:
        raise UserError(f"window is {window}; it must be at most {frames} latent frames")
    if window is None and latents[0] > frames:
        most = 1 + (frames - 1) * temporal
        raise UserError(
            f"frames is {config.frames}; at once it must be at most {most}; for longer ones use a window: monarchrt "
            f"generate --mode autoregressive --window 21"
        )
    for name, at, most in (("height", 1, height), ("width", 2, width)):
        if latents[at] > most:
            raise UserError(f"{name} is {getattr(config, name)}; it must be at most {most * spatial}")


def _zoom(config: GenerateConfig) -> int:
    """Factor by which the file's pixels are enlarged; the video encoder must accept the size."""
    height, width = config.height or 1, config.width or 1
    across = width * (2 if config.compare_dense or config.compare else 1)
    zoom, largest = config.zoom or max(1, -(-SMALLEST_WIDTH // width)), LARGEST_SIDE // max(height, across)
    if not largest:
        raise UserError(f"height x width is {height} x {width}; the file takes at most {LARGEST_SIDE} pixels a side")
    if config.zoom is not None and zoom > largest:
        raise UserError(
            f"zoom is {zoom}: the file would have {zoom * height} x {zoom * across} pixels, and takes at most "
            f"{LARGEST_SIDE} a side; use at most {largest}"
        )
    return min(zoom, largest)


def _window(config: GenerateConfig, latents: int) -> int | None:
    """Attention window for a long video, in whole blocks of latent frames; None if the cache holds all of it."""
    if latents <= LONGEST_WITHOUT_WINDOW:
        return None
    block = config.block or BLOCK
    return max(1, LONGEST_WITHOUT_WINDOW // block) * block


def _attention(config: GenerateConfig, model: WanConfig) -> Attention | tuple[Attention, ...]:
    options = config.attention_options()
    if config.attention != SHORT and options:
        name, value = next(iter(options.items()))
        raise UserError(
            f"{name} is {printable(repr(value), 80)}, which goes with a tile or with attention {SHORT}; attention is "
            f"{printable(repr(config.attention), 80)}"
        )
    return model.attention if config.attention == STORED else parse(config.attention_text())


def _stored(attention: Attention | tuple[Attention, ...]) -> list[Attention]:
    settings = attention if isinstance(attention, tuple) else (attention,)
    return [leaf.stored() for setting in settings for leaf in leaves(setting)]


def check_attention(plan: Plan, model: WanConfig) -> NetworkDensity:
    """Checks that the attention fits each block of tokens, the window and the sinks; returns its density.

    Raises:
        UserError: If it does not; the message names valid sizes.
    """
    settings = plan.settings
    whole = settings.window or plan.latents[0]
    counts = {settings.block, plan.first_block, whole} if isinstance(settings, Rollout) else {whole}
    with user_input():
        layers = dataclasses.replace(model, attention=plan.attention).layer_attention
    for setting in dict.fromkeys(layers):
        if setting.by_blocks and not isinstance(settings, Rollout):
            raise UserError(f"attention is {setting}, for mode autoregressive, but mode is {plan.config.mode}")
        for count in sorted(counts):
            try:
                grid = model.token_grid(count, *plan.latents[1:])
                if count == whole:
                    setting.check(grid)
                else:
                    setting.check_block(grid, whole=model.token_grid(whole, *plan.latents[1:]))
            except (ValueError, NotImplementedError) as error:
                reason = " ".join(str(error).split()).rstrip(".")
                raise UserError(reason + _sizes_for(setting, plan, model)) from error
    block = settings.block if isinstance(settings, Rollout) else None
    steps = settings.table().steps
    with user_input():
        if isinstance(settings, Rollout) and settings.sink_frames:
            _check_sinks(settings, plan, dataclasses.replace(model, attention=plan.attention))
        grid = model.token_grid(whole, *plan.latents[1:])
        return density_of_network(plan.attention, model.num_layers, grid, causal_block=block, steps=steps)


def _check_sinks(settings: Rollout, plan: Plan, model: WanConfig) -> None:
    """Raises ValueError unless the layers' caches can hold the sinks, which may have to be whole tiles."""
    frames, height, width = plan.latents
    shape = cache_shape(model, 1, height=height, width=width, **cache_room(frames, settings))
    jax.eval_shape(lambda: empty_runs(model, shape))


def _nearest_window(settings: Rollout | Windows, unit: int) -> int:
    """The largest window of whole units up to the given one, or the smallest with room for what it must hold.

    Args:
        settings: The sampling, with a window.
        unit: Latent frames of a tile.
    """
    if isinstance(settings, Rollout):
        block = settings.block if settings.block % unit == 0 else unit
        least = block + settings.sink_frames
    else:
        least = settings.context + 1
    return max((settings.window or 0) // unit, -(-least // unit)) * unit


def _sizes_for(setting: Attention, plan: Plan, model: WanConfig) -> str:
    """Advice on sizes that an attention's unit divides."""
    unit = setting.unit
    if unit is None:
        return ""
    advice = []
    patch = model.patch_size
    if isinstance(plan.settings, Windows) and plan.settings.window is None and plan.latents[0] % (unit[0] * patch[0]):
        latents = max(1, plan.latents[0] // (unit[0] * patch[0])) * unit[0] * patch[0]
        advice.append(f"frames {1 + (latents - 1) * plan.temporal}")
    if isinstance(plan.settings, Rollout) and plan.settings.block % (frames := unit[0] * patch[0]):
        first = 1 if plan.settings.independent_first_frame else 0
        count = max(1, (plan.latents[0] - first) // frames) * frames + first
        advice.append(f"block {frames}")
        if count != plan.latents[0] and plan.frames_given:
            advice.append(f"frames {1 + (count - 1) * plan.temporal}")
    if plan.settings.window is not None and plan.settings.window % (unit[0] * patch[0]):
        advice.append(f"window {_nearest_window(plan.settings, unit[0] * patch[0])}")
    for name, at in (("height", 1), ("width", 2)):
        size = unit[at] * patch[at] * plan.spatial
        pixels = plan.latents[at] * plan.spatial
        if pixels % size:
            advice.append(f"{name} {max(1, pixels // size) * size}")
    return f"; give {' and '.join(advice)}, or another tile" if advice else ""
