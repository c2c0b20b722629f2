"""`monarchrt study map`: error of the attention map against density (paper, Figure 1a)."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from monarch_jax import MonarchSpec, monarch_factors
from monarchrt.models.attention.base import Grid
from monarchrt.models.attention.capture import capture
from monarchrt.models.errors import UserError
from monarchrt.train.config import to_dict
from monarchrt.train.data import spread
from monarchrt.train.evaluation.subject import Subject, check_example, noisy_example, open_subject, probed_call
from monarchrt.train.studies import pictures
from monarchrt.train.studies.approximations import (
    TOP_K,
    Error,
    dense_map,
    error_of,
    low_rank,
    misaligned,
    monarch_projection,
    tiles_of,
)
from monarchrt.train.studies.config import MapConfig
from monarchrt.train.studies.partial import Partial
from monarchrt.train.studies.results import claim_results, progress, write_json

LARGEST = 6000  # most tokens of a map, which then has 144 MB in float32
FILES, PART = ("map.json", "map.png", "structure.png"), "map.part.json"
SHOWN = 4  # maps in the picture of their structure
EQUATION = "equation 1"


class Scores(NamedTuple):
    """Queries and keys of one head, whose map is studied.

    Attributes:
        name: Name of the map.
        grid: Token grid (F, h, w).
        query: Queries [N, d].
        key: Keys [N, d].
        scale: Scale of the scores; None for d ** -0.5.
    """

    name: str
    grid: tuple[int, int, int]
    query: Float[np.ndarray, "N d"]
    key: Float[np.ndarray, "N d"]
    scale: float | None = None


class Point(NamedTuple):
    """One approximation of one map.

    Attributes:
        map: Name of the map.
        method: Name of the method.
        setting: Parameters of the method.
        density: Number of stored numbers relative to the entries of the map.
        error: Error of the approximation.
    """

    map: str
    method: str
    setting: str
    density: float
    error: Error

    def record(self) -> dict[str, Any]:
        """The point as JSON values."""
        flat = {name: getattr(self, name) for name in ("map", "method", "setting", "density")}
        return flat | self.error._asdict()

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Point":
        """The point of JSON values from `record`."""
        rest = {name: record[name] for name in ("map", "method", "setting", "density")}
        return cls(**rest, error=Error(**{name: record[name] for name in Error._fields}))


def equation_1(grid: tuple[int, int, int], *, seed: int = 0, pairs: int = 10, noise: float = 0.05) -> Scores:
    """Queries and keys whose map has the form of the paper's equation 1: separable, with semantic entries and noise.

    Scores decrease with the squared distance along each axis, so that the map is a product of three factors; `pairs`
    random entries are as large as the diagonal; Gaussian noise is added to the scores.

    Examples:
        >>> scores = equation_1((2, 2, 3))
        >>> scores.query.shape == scores.key.shape, scores.query.shape[0]
        (True, 12)

    Args:
        grid: Token grid (F, h, w).
        seed: Seed of the entries and the noise.
        pairs: Number of semantic entries.
        noise: Standard deviation of the noise of the scores.

    Returns:
        Queries whose features are the scores, and keys that are unit vectors.
    """
    draw = np.random.default_rng(seed)
    place = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
    reach = np.array([1.5, 2.0, 2.0])
    total = -(((place[:, None] - place[None]) / reach) ** 2).sum(-1)
    rows, columns = (draw.choice(len(place), min(pairs, len(place)), replace=False) for _ in range(2))
    total[rows, columns] = total.max()
    total += noise * draw.standard_normal(total.shape)
    return Scores(EQUATION, grid, total.astype(np.float32), np.eye(len(place), dtype=np.float32), 1.0)


def approximations(scores: Scores, exact: np.ndarray, config: MapConfig) -> Iterator[Point]:
    """Yields all approximations of a map that the study compares.

    Args:
        scores: Queries and keys of the map.
        exact: The map [N, N].
        config: The settings.
    """

    def point(method: str, setting: str, density: float, approximation: np.ndarray) -> Point:
        return Point(scores.name, method, setting, density, error_of(approximation, exact))

    for method, reading in TOP_K.items():
        for density in config.densities:
            yield point(method, f"{density:g}", density, reading(exact, density))
    factors = np.linalg.svd(exact, full_matrices=False)
    for density in config.densities:
        best = low_rank(factors, density)
        if best is not None:
            yield point("low rank", f"{density:g}", density, best)
    grid, most = scores.grid, max(config.densities)
    for tile in tiles_of(grid):
        spec = MonarchSpec(grid=grid, tile=tile)
        if spec.density > most:
            continue
        whole = tile == grid
        family, setting = "Monarch" if whole else "tiled Monarch", ",".join(map(str, tile))
        for steps in config.steps:
            name = f"{family}, T={steps}"
            yield point(name, setting, spec.density, factored(scores, grid, tile, steps))
        yield point(f"{family}, projection", setting, spec.density, monarch_projection(exact, spec))
    for rows, columns in misaligned(grid):
        line = MonarchSpec(grid=(1, rows, columns))
        if line.density > most:
            continue
        for steps in config.steps[:1]:
            made = factored(scores, line.grid, None, steps)
            yield point(f"Monarch, misaligned, T={steps}", f"{rows}x{columns}", line.density, made)
        projected = monarch_projection(exact, line)
        yield point("Monarch, misaligned, projection", f"{rows}x{columns}", line.density, projected)


def factored(scores: Scores, grid: Grid, tile: Grid | None, steps: int) -> np.ndarray:
    """The map of Monarch attention, [N, N], for the queries and keys of a map.

    Args:
        scores: Queries and keys of N tokens.
        grid: (frames, height, width) of the tokens.
        tile: The tile; None: the whole grid is one.
        steps: Refinement steps.

    Returns:
        Probabilities; rows sum to 1.
    """
    query, key = (jnp.asarray(x)[None, :, None] for x in (scores.query, scores.key))
    made = monarch_factors(query, key, grid=grid, tile=tile, num_iters=steps, scale=scores.scale)
    return np.asarray(made.attention[0, 0])


def structure(scores: Scores) -> dict[str, np.ndarray]:
    """A map and its untiled Monarch approximations with one refinement step, by title (paper, Figures 5 to 7).

    Each aligned approximation, (f, hw) and (fh, w), is followed by the misaligned one of the nearest density.

    Examples:
        >>> [title.split(",")[0] for title in structure(equation_1((2, 2, 3)))]
        ['as it is', 'aligned 4 x 3', 'misaligned 3 x 4', 'aligned 2 x 6', 'misaligned 6 x 2']
    """
    frames, height, width = scores.grid
    exact = dense_map(scores.query, scores.key, scale=scores.scale)
    panels, others = {"as it is": exact}, misaligned(scores.grid)

    def stored(sizes: tuple[int, int]) -> float:
        return 1 / sizes[0] + 1 / sizes[1]

    for aligned in dict.fromkeys([(frames * height, width), (frames, height * width)]):
        forms = {"aligned": aligned}
        if others:
            forms["misaligned"] = min(others, key=lambda sizes: abs(stored(sizes) - stored(aligned)))
        for name, (rows, columns) in forms.items():
            made = factored(scores, (1, rows, columns), None, 1)
            error = error_of(made, exact).relative
            panels[f"{name} {rows} x {columns}, {stored((rows, columns)):.1%}, error {error:.2f}"] = made
    return panels


def captured_scores(subject: Subject, config: MapConfig) -> list[Scores]:
    """Captures queries and keys of a checkpoint for the layers, heads, noise levels and examples in the settings.

    Raises:
        UserError: If a layer, head or example does not exist, or maps would be too large.
    """
    layers = chosen_layers(subject, config.layers)
    heads = choose("heads", config.heads, subject.model.config.num_heads) or None
    grid = _cropped(subject.grid, config.crop)
    scores = []
    for index in check_example(subject, config.windows):
        for level in config.levels:
            with capture(subject.model, layers=layers, heads=heads) as (model, calls):
                probed_call(model)(model, *noisy_example(subject, index, level))
            for call in calls:
                for place, head in enumerate(call.heads):
                    name = f"layer {call.layer}, head {head}, sigma {level:g}, example {index}"
                    query, key = (crop(x[0, :, place], call.grid, grid) for x in (call.query, call.key))
                    scores.append(Scores(name, grid, query, key))
    return scores


def choose(name: str, numbers: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The given numbers of layers or heads, each once.

    Args:
        name: "layers" or "heads", for messages.
        numbers: The numbers.
        count: How many there are in the network.

    Raises:
        UserError: If a number is not in 0...count-1.
    """
    for number in numbers:
        if not 0 <= number < count:
            raise UserError(f"{name} has {number}, but the network has {count} {name}; use 0 to {count - 1}")
    return tuple(dict.fromkeys(numbers))


def chosen_layers(subject: Subject, layers: tuple[int, ...]) -> tuple[int, ...]:
    """The layers to study, by default the first, the middle and the last."""
    count = subject.model.config.num_layers
    return tuple(dict.fromkeys(choose("layers", layers, count) or (0, count // 2, count - 1)))


def _cropped(
    grid: tuple[int, int, int], wanted: tuple[int, int, int] | None, *, option: str = "crop"
) -> tuple[int, int, int]:
    """The part of the grid whose maps are studied.

    Raises:
        UserError: If it is larger than the grid, or has more than `LARGEST` tokens.
    """
    if wanted is not None:
        for name, size, there in zip(("frames", "rows", "columns"), wanted, grid, strict=True):
            if size > there:
                raise UserError(f"crop is {wanted}, but an example has {there} {name} of tokens (grid {grid})")
    part = wanted or grid
    tokens = part[0] * part[1] * part[2]
    if tokens > LARGEST:
        raise UserError(
            f"a map of {tokens} tokens {part} has {tokens**2 / 1e9:.1f} billion entries; give --{option}, at "
            f"most {LARGEST} tokens, such as --{option} {max(1, LARGEST // (part[1] * part[2]))} {part[1]} {part[2]}"
        )
    return part


def crop(tokens: np.ndarray, grid: tuple[int, int, int], part: tuple[int, int, int]) -> np.ndarray:
    """Selects the first frames, rows and columns of tokens.

    Args:
        tokens: Tokens [F*h*w, d].
        grid: Token grid (F, h, w).
        part: Number of frames, rows and columns to select.

    Returns:
        The selected tokens, in their order.
    """
    whole = tokens.reshape(*grid, -1)
    return whole[: part[0], : part[1], : part[2]].reshape(-1, whole.shape[-1])


def study_map(config: MapConfig) -> dict[str, Any]:
    """Runs the study and writes its plots and JSON.

    Args:
        config: The settings; without a checkpoint, only the map of equation 1 is studied.

    Returns:
        The content of the JSON file, among others `points`, one for each approximation of each map, and `means` over
        the captured maps.

    Raises:
        UserError: If a setting cannot be used.
    """
    given = (config.video, config.latents, config.crop, *config.layers, *config.heads)
    if config.checkpoint is None and any(value is not None for value in given):
        raise UserError("video, latents, layers, heads and crop are of captured maps; give --checkpoint too")
    _cropped(config.grid, None, option="grid")
    claim_results(config.out, FILES, overwrite=config.overwrite)
    partial = Partial(config.out / PART, to_dict(config), resume=config.resume, overwrite=config.overwrite)
    studied = [equation_1(config.grid, seed=config.seed)]
    if config.checkpoint is not None:
        subject = open_subject(config.checkpoint, video=config.video, latents=config.latents)
        studied += captured_scores(subject, config)
    points: list[Point] = []
    with progress("maps", len(studied), quiet=config.quiet) as advance:
        for number, scores in enumerate(studied):
            advance(0, scores.name)
            records = partial.of(f"{number}: {scores.name}", lambda scores=scores: _measured(scores, config))
            points += map(Point.of, records)
            advance()
    captured = [point for point in points if point.map != EQUATION]
    result = {
        "checkpoint": config.checkpoint,
        "maps": [{"name": scores.name, "grid": list(scores.grid)} for scores in studied],
        "means": [point.record() for point in means(captured)],
        "points": [point.record() for point in points],
    }
    write_json(config.out / FILES[0], result)
    panels = {EQUATION: [point for point in points if point.map == EQUATION]}
    if captured:
        panels[f"{config.checkpoint}, mean of {len(studied) - 1} maps"] = means(captured)
    pictures.draw_map(config.out / FILES[1], panels)
    shown = [studied[place] for place in spread(len(studied), SHOWN)]
    pictures.draw_structure(config.out / FILES[2], {scores.name: structure(scores) for scores in shown})
    partial.done()
    return result


def _measured(scores: Scores, config: MapConfig) -> list[dict[str, Any]]:
    exact = dense_map(scores.query, scores.key, scale=scores.scale)
    return [point.record() for point in approximations(scores, exact, config)]


def means(points: list[Point]) -> list[Point]:
    """The mean errors of each approximation over maps."""
    groups: dict[tuple[str, str, float], list[Error]] = {}
    for point in points:
        groups.setdefault((point.method, point.setting, point.density), []).append(point.error)
    return [
        Point(f"mean of {len(errors)}", *key, Error(*(float(np.mean(values)) for values in zip(*errors, strict=True))))
        for key, errors in groups.items()
    ]


def front(points: list[Point]) -> list[Point]:
    """The points that have a smaller error than all others of at most their density, sorted by density."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.density, point.error.relative)):
        if not best or point.error.relative < best[-1].error.relative:
            best.append(point)
    return best


def table(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """For each method, the row (method, setting, error) of the point nearest to 10% density."""
    rows = result["means"] or result["points"]
    by_method: dict[str, dict[str, Any]] = {}
    for record in rows:
        best = by_method.get(record["method"])
        if best is None or abs(record["density"] - 0.1) < abs(best["density"] - 0.1):
            by_method[record["method"]] = record
    return [
        (name, f"{record['setting']} ({record['density']:.1%})", f"{record['relative']:.3f}")
        for name, record in by_method.items()
    ]
