"""`monarchrt study tiles`: finds the best tile by error of outputs and of a video against time."""

import dataclasses
import functools
import shlex
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from monarch_jax import BLOCKS
from monarchrt.models.attention.base import Attention
from monarchrt.models.attention.capture import capture
from monarchrt.models.attention.notation import parse, with_options
from monarchrt.models.attention.registry import SHORT, exact
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.material import Material
from monarchrt.models.generate.pipeline import VideoPipeline
from monarchrt.train.config import to_dict
from monarchrt.train.evaluation.metrics import psnr, relative_error
from monarchrt.train.evaluation.subject import Subject, check_example, noisy_example, open_subject, probed_call
from monarchrt.train.studies import pictures
from monarchrt.train.studies.approximations import tiles_of
from monarchrt.train.studies.config import TilesConfig
from monarchrt.train.studies.maps import choose, chosen_layers
from monarchrt.train.studies.mass import video_material
from monarchrt.train.studies.partial import Partial
from monarchrt.train.studies.results import claim_results, progress, write_json

FILES, PART = ("tiles.json", "tiles.png"), "tiles.part.json"
PLAIN = BLOCKS[0]  # the default layout


class Choice(NamedTuple):
    """A candidate setting of MonarchAttention.

    Attributes:
        tile: Tile (frames, height, width) in tokens.
        blocks: Layout of the blocks.
        steps: Number of refinement steps T.
    """

    tile: tuple[int, int, int]
    blocks: str
    steps: int

    @property
    def setting(self) -> Attention:
        """The attention setting."""
        return parse(with_options(SHORT, {"tile": self.tile, "blocks": self.blocks, "num_iters": self.steps}))

    @property
    def label(self) -> str:
        """A short label for tables and plots."""
        text = ",".join(map(str, self.tile)) + ("" if self.blocks == PLAIN else f" {self.blocks}")
        return text + ("" if self.steps == 1 else f" T={self.steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layers:
    """What layers of a checkpoint attend to, of all examples and noise levels.

    Attributes:
        query: [layers * examples * levels, N, n, d].
        key: As `query`.
        value: As `query`.
        grid: (F, h, w) of the tokens.
        causal_block: Frames per causal block, or None.
    """

    query: Float[Array, "B N n d"]
    key: Float[Array, "B N n d"]
    value: Float[Array, "B N n d"]
    grid: tuple[int, int, int]
    causal_block: int | None

    def call(self, setting: Attention) -> Callable[..., Float[Array, "B N n d"]]:
        """Attention of queries, keys and values, compiled."""
        return jax.jit(lambda *tensors: setting(*tensors, grid=self.grid, causal_block=self.causal_block))

    def attend(self, setting: Attention) -> Float[np.ndarray, "B N n d"]:
        """The outputs, in float64."""
        return np.asarray(self.call(setting)(self.query, self.key, self.value), np.float64)

    def operations(self, setting: Attention) -> float:
        """Floating-point operations of a layer, of one sample."""
        return float(setting.flops(self.grid, heads=self.query.shape[2], head_dim=self.query.shape[3]))

    def milliseconds(self, setting: Attention, *, repeats: int) -> float:
        """Median time of a layer, of one sample."""
        one, call = (self.query[:1], self.key[:1], self.value[:1]), self.call(setting)
        call(*one).block_until_ready()
        taken = []
        for _ in range(repeats):
            begin = time.perf_counter()
            call(*one).block_until_ready()
            taken.append(1000 * (time.perf_counter() - begin))
        return statistics.median(taken)


def captured_layers(config: TilesConfig, subject: Subject) -> Layers:
    """Runs a checkpoint with dense attention on the examples of a study, and keeps what its layers attend to.

    Args:
        config: Examples, noise levels, layers and heads.
        subject: The checkpoint.

    Returns:
        What the chosen layers and heads attend to.

    Raises:
        UserError: If there is no such example, layer or head.
    """
    heads = choose("heads", config.heads, subject.model.config.num_heads) or None
    calls = []
    for index in check_example(subject, config.windows):
        for level in config.levels:
            dense = subject.model.with_attention(exact())
            with capture(dense, layers=chosen_layers(subject, config.layers), heads=heads) as (model, captured):
                probed_call(model)(model, *noisy_example(subject, index, level))
            calls += captured
    query, key, value = (jnp.concatenate([getattr(call, name) for call in calls]) for name in ("query", "key", "value"))
    causal_block = subject.model.config.causal_block
    return Layers(query=query, key=key, value=value, grid=subject.grid, causal_block=causal_block)


def study_tiles(config: TilesConfig) -> dict[str, Any]:
    """Measures tiles and layouts on a checkpoint's own queries, keys and values, and writes plot and JSON.

    The error is that of single layers, with dense attention in the layers before: ||out - dense|| / ||dense||, averaged
    over layers, examples and noise levels. Videos show the error of all layers together.

    Args:
        config: The settings.

    Returns:
        The content of the JSON file, among others `points`, sorted by time, each with `setting`, `density`, `error`,
        `time`, `front` (whether it is on the Pareto front of time and error) and `command`; and for some `psnr` and
        `latent_error` of a video and `video_front`, whether it is on the Pareto front of time and PSNR.

    Raises:
        UserError: If a setting cannot be used.
    """
    claim_results(config.out, FILES, overwrite=config.overwrite)
    partial = Partial(config.out / PART, to_dict(config), resume=config.resume, overwrite=config.overwrite)
    subject = open_subject(config.checkpoint, video=config.video, latents=config.latents)
    choices = candidates(config, subject)
    layers = captured_layers(config, subject)
    measured = config.time == "measured" or (config.time == "auto" and jax.default_backend() == "gpu")
    clock = functools.partial(layers.milliseconds, repeats=config.repeats) if measured else layers.operations
    points: list[dict[str, Any]] = []
    with progress("tiles", len(choices) + 1, quiet=config.quiet) as advance:
        target = layers.attend(exact())
        of_dense = partial.of("exact", lambda: clock(exact()))
        advance()
        for choice in choices:
            setting = choice.setting
            advance(0, choice.label)
            error, taken = partial.of(
                str(setting), lambda setting=setting: (_error(layers.attend(setting), target), clock(setting))
            )
            density = setting.density(layers.grid, causal_block=layers.causal_block)
            points.append(
                {
                    "setting": str(setting),
                    "label": choice.label,
                    "density": density.visible,
                    "kept": density.kept,
                    "error": error,
                    "time": taken if measured else taken / of_dense,
                    "command": command(config, choice),
                }
            )
            advance()
    points.sort(key=lambda point: (point["time"], point["error"]))
    mark_front(points)
    if config.videos:
        _add_videos(points, config, partial)
        mark_video_front(points)
    unit = "milliseconds of a layer, measured" if measured else "arithmetic over dense attention's"
    result = {
        "checkpoint": config.checkpoint,
        "grid": list(layers.grid),
        "unit": unit,
        "exact": of_dense if measured else 1.0,
        "examples": len(layers.query),
        "points": points,
    }
    write_json(config.out / FILES[0], result)
    pictures.draw_front(config.out / FILES[1], points, unit=unit)
    partial.done()
    return result


def candidates(config: TilesConfig, subject: Subject) -> list[Choice]:
    """The settings to try.

    Raises:
        UserError: If a tile or a layout is invalid, a tile does not divide the token grid, or there are no candidates.
    """
    grid, causal = subject.grid, subject.model.config.causal_block
    layouts = BLOCKS if "all" in config.layouts else config.layouts
    for layout in layouts:
        if layout not in BLOCKS:
            raise UserError(f"layouts has {layout!r}; choose from {', '.join(BLOCKS)}, or all")
    tiles = [_tile(text) for text in config.tiles] or list(tiles_of(grid, causal_block=causal))
    choices = []
    with user_input():
        for tile in tiles:
            for layout in layouts:
                for steps in config.steps:
                    choice = Choice(tile, layout, steps)
                    choice.setting.check(grid, causal_block=causal)
                    if config.tiles or choice.setting.density(grid, causal_block=causal).visible <= config.most:
                        choices.append(choice)
    choices = list(dict.fromkeys(choices))
    if not choices:
        raise UserError(
            f"most is {config.most:g}, but all tiles of the token grid {grid} have a larger density; give a larger one"
        )
    return choices


def _tile(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise UserError(f"tiles has {text!r}; write frames,rows,columns, such as 3,30,52")
    return int(parts[0]), int(parts[1]), int(parts[2])


def _error(out: Float[np.ndarray, "B N n d"], target: Float[np.ndarray, "B N n d"]) -> float:
    """Mean over calls of ||out - target|| / ||target||."""
    axes = (1, 2, 3)
    return float(np.sqrt(np.square(out - target).sum(axes) / np.square(target).sum(axes)).mean())


def mark_front(points: list[dict[str, Any]]) -> None:
    """Sets `front` of each point, sorted by time: whether its error is smaller than that of all points before it.

    Examples:
        >>> points = [{"time": 1, "error": 3}, {"time": 2, "error": 4}, {"time": 3, "error": 1}]
        >>> mark_front(points)
        >>> [point["front"] for point in points]
        [True, False, True]
    """
    best = float("inf")
    for point in points:
        point["front"] = point["error"] < best
        best = min(best, point["error"])


def mark_video_front(points: list[dict[str, Any]]) -> None:
    """Sets `video_front` of each point with a video: whether its PSNR is larger than that of all faster ones.

    Examples:
        >>> points = [{"time": 1, "psnr": 20.0}, {"time": 2}, {"time": 3, "psnr": 19.0}, {"time": 3, "psnr": 30.0}]
        >>> mark_video_front(points)
        >>> [point.get("video_front") for point in points]
        [True, None, False, True]
    """
    best = -float("inf")
    filmed = [point for point in points if point.get("psnr") is not None]
    for point in sorted(filmed, key=lambda point: (point["time"], -point["psnr"])):
        point["video_front"] = point["psnr"] > best
        best = max(best, point["psnr"])


def command(config: TilesConfig, choice: Choice) -> str:
    """The command line that generates a video with a setting."""
    words = ["monarchrt", "generate", "--checkpoint", str(config.checkpoint), "--tile", *map(str, choice.tile)]
    words += [] if choice.blocks == PLAIN else ["--blocks", choice.blocks]
    words += [] if choice.steps == 1 else ["--num-iters", str(choice.steps)]
    words += [] if config.prompt is None else ["--prompt", config.prompt]
    return shlex.join(words)


def _add_videos(points: list[dict[str, Any]], config: TilesConfig, partial: Partial) -> None:
    """Generates videos with settings spread over the front, then with others; compares them with dense attention's."""
    front, others = ([point for point in points if point["front"] == on] for on in (True, False))
    places = sorted({round(float(x)) for x in np.linspace(0, len(front) - 1, min(config.videos, len(front)))})
    chosen = [front[place] for place in places] + others[: max(0, config.videos - len(front))]
    material = video_material(config)
    with progress("videos", len(chosen), quiet=config.quiet) as advance:

        @functools.cache  # generated when the first video is compared with it
        def reference() -> tuple[np.ndarray, np.ndarray]:
            return _video(material, exact())

        def compared(point: dict[str, Any]) -> dict[str, Any]:
            dense, expected = reference()
            try:
                frames, latents = _video(material, parse(point["setting"]))
            except ValueError as error:  # the video's blocks may be smaller than the examples
                return {"no_video": " ".join(str(error).split())}
            given = 0 if material.initial is None else material.initial.shape[1]
            return apart((frames, latents), (dense, expected), given=given)

        for point in chosen:
            advance(0, point["label"])
            point |= partial.of(_of_video(point), lambda point=point: compared(point))
            advance()


def apart(
    made: tuple[np.ndarray, np.ndarray], dense: tuple[np.ndarray, np.ndarray], *, given: int = 0
) -> dict[str, float]:
    """PSNR and error of the latents as in `monarchrt evaluate`, without given frames at the start.

    Args:
        made: Frames [T, H, W, 3] and latents [1, F, h, w, C].
        dense: Those of dense attention, from the same noise.
        given: Number of given latent frames at the start of both.

    Returns:
        `psnr`, in dB and averaged over frames, and `latent_error`.
    """
    (frames, latents), (others, expected) = made, dense
    per_latent = (len(frames) - 1) // (latents.shape[1] - 1) if latents.shape[1] > 1 else 1  # the first is one frame
    left = 1 + (given - 1) * per_latent if given else 0
    error = relative_error(latents[:, given:], expected[:, given:])
    return {"psnr": float(psnr(frames, others)[left:].mean()), "latent_error": error}


def _of_video(point: dict[str, Any]) -> str:
    return f"video of {point['setting']}"


def _video(material: Material, setting: Attention) -> tuple[np.ndarray, np.ndarray]:
    """Generates a video; returns its frames [T, H, W, 3] and latents [1, F, h, w, C]."""
    kept: list[Any] = []
    pipeline = VideoPipeline(material.pipeline.model.with_attention(setting), material.pipeline.decoder)
    frames = list(pipeline(material.text, **material.options(), keep=kept))
    return np.concatenate(frames), np.concatenate([np.asarray(part) for part in kept], axis=1)
