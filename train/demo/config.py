"""The settings of the demo, and of its three training runs. Does not import JAX."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from monarchrt.models.errors import UserError
from monarchrt.train.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from monarchrt.train.objectives.settings import FlowConfig

DISTILLED = Path("runs/distil")  # default folder of `monarchrt demo --distill`
PATCH = 4  # side in pixels of a latent position, which is one token


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train a tiny dense video transformer on a clip, replace its attention by Monarch, finetune it, and compare."""

    video: Path | None = None
    """Any video of at least 45 frames. Default: five seconds of Big Buck Bunny that come with the package."""

    folder: Path = Path("runs/demo")
    """Folder for everything: results.json, losses.png, attention.png, comparison.mp4, and the three training runs.
    Default with --distill: runs/distil."""

    resume: bool = False
    """Continue a demo that was stopped; settings that are not given are those with which it was started."""

    seed: int = 0
    """Seed of the initial parameters, the noise and the order of the data."""

    steps: int = 1000
    """Training steps of the dense model."""

    finetune_steps: int = 250
    """Steps of finetuning with Monarch attention, and of training the dense model further for comparison."""

    height: int = 32
    """Height of a frame in pixels, a multiple of 4; a token is 4 x 4 pixels."""

    width: int = 56
    """Width of a frame in pixels, a multiple of 4."""

    tile: tuple[int, int, int] = (4, 8, 14)
    """Tile of MonarchAttention in tokens (frames, height, width); a window has 4 frames."""

    distill: bool = False
    """Instead of finetuning: distil the dense model into four-step Monarch students, by DMD and, causal, by
    Self-Forcing, and compare clips of their averages with the dense model's many-step clips. Writes distillation.json,
    distillation.png and students.mp4; takes some 19 minutes on 2 CPU cores."""

    distill_steps: int = 450
    """With distill: steps of each DMD run; Self-Forcing takes a third of them. Every step updates the critic, every
    fourth also the student."""

    clips: int = 64
    """With distill: clips to generate with each network for the comparison."""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("finetune_steps", 1), ("distill_steps", 1), ("clips", 8)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("distill_steps", "clips"):
            if not self.distill and getattr(self, name) != getattr(type(self), name):
                raise UserError(f"{name} is {getattr(self, name)}, which is for the distillation; give --distill too")
        dense_run(self)  # the other settings are checked there

    @property
    def clip(self) -> Path:
        """The video to use."""
        return self.video or Path(__file__).parent / "assets" / "big_buck_bunny.mp4"


def dense_run(config: DemoConfig) -> TrainConfig:
    """The run that trains a model from scratch with dense attention.

    Every frame of a window has its own noise level, so the content of a noisy frame has to be taken from a cleaner one
    by attention, which makes attention matter in such a small model. The loss from the swap adds up over layers: with
    two layers it was within the difference between seeds, with five it is many times larger.

    Args:
        config: The settings of the demo.

    Returns:
        The settings of the run in `folder/dense`.

    Raises:
        UserError: If a setting is out of range.
    """
    return TrainConfig(
        data=DataConfig(
            video=config.clip,
            frames=4,
            height=config.height,
            width=config.width,
            patch=PATCH,
            whitening=1.0,
            held_out=0.2,
            gap=4,
            flip=True,
        ),
        model=ModelConfig(
            preset="tiny",
            overrides=(
                "dim=64",
                "ffn_dim=192",
                "num_heads=2",
                "num_layers=5",
                "text_dim=8",
                "text_len=1",
                "patch_size=[1,1,1]",
            ),
            attention="dense",
        ),
        objective=FlowConfig(shift=3.0, frames_per_level=1),
        optimizer=OptimizerConfig(learning_rate=6e-3, warmup=20, schedule="cosine", ema_decay=0.98),
        run=RunConfig(
            folder=config.folder / "dense",
            resume=config.resume,
            steps=config.steps,
            batch=4,
            seed=config.seed,
            eval_every=200,
            eval_windows=8,
            eval_timesteps=8,
            checkpoint_every=200,
            keep=1,
        ),
    )


def further_runs(config: DemoConfig) -> tuple[TrainConfig, TrainConfig]:
    """The runs after the dense one: a control that trains the dense model further, and finetuning with Monarch.

    Both start from the dense model's average and use the same batches and noise. They differ only in attention, so
    both contain the gain of the additional steps.

    Args:
        config: The settings of the demo.

    Returns:
        The settings of the runs in `folder/control` and `folder/monarch`.
    """
    dense = dense_run(config)
    control = dataclasses.replace(
        dense,
        optimizer=dataclasses.replace(dense.optimizer, learning_rate=2e-3),
        run=dataclasses.replace(
            dense.run,
            folder=config.folder / "control",
            init_from=dense.run.folder,
            steps=config.finetune_steps,
            eval_every=50,
            checkpoint_every=100,
        ),
    )
    monarch = dataclasses.replace(
        control,
        model=dataclasses.replace(dense.model, attention="monarch", tile=config.tile),
        run=dataclasses.replace(control.run, folder=config.folder / "monarch"),
    )
    return control, monarch
