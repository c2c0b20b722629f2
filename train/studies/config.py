"""The settings of `monarchrt study`. Does not import JAX, so that help is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from monarchrt.models.errors import UserError


def check_numbers(name: str, values: tuple[float, ...], low: int, high: int, example: str) -> None:
    """Checks the values of a setting.

    Args:
        name: Name of the setting.
        values: Its values.
        low: Bound that values must exceed.
        high: Largest value.
        example: Valid values, for the message.

    Raises:
        UserError: If there are no values, or one is out of range.
    """
    if not values:
        raise UserError(f"{name} is empty; give one or more, such as {example}")
    for value in values:
        if not low < value <= high:
            raise UserError(f"{name} has {value:g}; each must be above {low:g} and at most {high:g}, such as {example}")


def check_seed(seed: int) -> None:
    """Raises UserError unless the seed lies in [0, 2**32)."""
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must lie in [0, 2**32)")


@dataclass(frozen=True, kw_only=True)
class _Study:
    """Settings of all studies."""

    checkpoint: str | None = None
    """A run folder of train or demo; or a Wan checkpoint, with --latents."""

    video: Path | None = None
    """For a run folder: a clip to use instead of its own."""

    layers: tuple[int, ...] = ()
    """Layers to study, numbered from 0. Default: the first, the middle and the last."""

    heads: tuple[int, ...] = ()
    """Heads to study, numbered from 0. Default: all."""

    out: Path = Path("study")
    """Folder for the results: a plot and a JSON file."""

    overwrite: bool = False
    """Replace the results of an earlier study there."""

    resume: bool = False
    """Continue a study that was stopped; its settings must be the same."""

    quiet: bool = False
    """Show no progress."""


@dataclass(frozen=True, kw_only=True)
class _Examples(_Study):
    """Settings of studies on held-out examples."""

    latents: Path | None = None
    """A folder written by `monarchrt encode`, whose held-out examples are used; needed for Wan checkpoints."""

    levels: tuple[float, ...] = (0.3, 0.6, 0.9)
    """Noise levels sigma, above 0 and at most 1."""

    windows: int = 1
    """Number of held-out examples, spread over all of them."""

    def __post_init__(self) -> None:
        check_numbers("levels", self.levels, 0, 1, "0.3 0.9")
        if self.windows < 1:
            raise UserError(f"windows is {self.windows}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class _Videos(_Study):
    """Settings of studies that generate videos."""

    frames: int | None = None
    """Frames of the generated video. Default: as in `monarchrt generate`."""

    sample_steps: int | None = None
    """Steps of the sampler. Default: as in `monarchrt generate`."""

    prompt: str | None = None
    """Prompt of the video, as for `monarchrt generate`."""

    components: Path | None = None
    """Folder or Hugging Face repository with VAE, text encoder and tokenizer, as for `monarchrt generate`."""

    embeddings: Path | None = None
    """File of text embeddings, as for `monarchrt generate`."""

    seed: int = 0
    """Seed of the noise."""


@dataclass(frozen=True, kw_only=True)
class MapConfig(_Examples):
    """Error of the attention map against density (paper, Figure 1a), on maps of equation 1 and of a checkpoint."""

    densities: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
    """Densities of top-k and low rank; Monarch's follow from its tiles."""

    steps: tuple[int, ...] = (1, 2, 3)
    """Numbers of refinement steps T of Monarch."""

    grid: tuple[int, int, int] = (4, 6, 10)
    """Frames, rows and columns of tokens for the maps of equation 1."""

    crop: tuple[int, int, int] | None = None
    """Use only the first frames, rows and columns of the captured tokens, since maps have N^2 entries. Default: all."""

    seed: int = 0
    """Seed of the maps of equation 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("densities", self.densities, 0, 1, "0.05 0.1 0.2")
        check_seed(self.seed)
        for name in ("grid", "crop"):
            value = getattr(self, name)
            if value is not None and min(value) < 1:
                raise UserError(f"{name} is {value}; frames, rows and columns must be at least 1")
        if not self.steps or min(self.steps) < 1:
            raise UserError(f"steps is {self.steps}; give one or more from 1 on, such as 1 2 3")


@dataclass(frozen=True, kw_only=True)
class MassConfig(_Videos):
    """Fraction of the keys that hold a given fraction of the attention, by block of the roll-out (paper, Figure 4a)."""

    mass: float = 0.95
    """The fraction p of the attention."""

    step: int = 0
    """Network call within the sampler, from 0."""

    mode: Literal["auto", "autoregressive", "bidirectional", "windows"] = "auto"
    """How the video is generated, as for `monarchrt generate`."""

    def __post_init__(self) -> None:
        check_numbers("mass", (self.mass,), 0, 1, "0.95")
        check_seed(self.seed)
        if self.step < 0:
            raise UserError(f"step is {self.step}; it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class TilesConfig(_Examples, _Videos):
    """Find the best tile: error of the layers' outputs and of a video against time, per tile and layout."""

    tiles: tuple[str, ...] = ()
    """Tiles to try, such as 1,30,52 3,30,52. Default: all that divide the grid and have a density of at most `most`."""

    layouts: tuple[str, ...] = ("fh,w",)
    """Layouts of the blocks to try; `all` for all six."""

    steps: tuple[int, ...] = (1,)
    """Numbers of refinement steps T to try."""

    most: float = 0.5
    """Largest density of the tiles to try."""

    time: Literal["auto", "measured", "estimated"] = "auto"
    """measured: milliseconds of one layer on this machine; estimated: its arithmetic relative to dense attention's.
    auto: measured on a GPU, estimated elsewhere."""

    repeats: int = 5
    """Runs per measured time, which is their median."""

    videos: int = 3
    """Videos to generate, with settings spread over the Pareto front and, if it has fewer, with the fastest others. 0:
    none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("most", (self.most,), 0, 1, "0.2")
        check_seed(self.seed)
        if not self.steps or min(self.steps) < 1:
            raise UserError(f"steps is {self.steps}; give one or more from 1 on, such as 1 2")
        for name, least in (("repeats", 1), ("videos", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
