"""The settings of each objective and its entry in the table. Does not import JAX, so that help is quick."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from monarchrt.models.attention.registry import EXACT
from monarchrt.models.errors import require
from monarchrt.train.objectives.registry import Generation, ObjectiveSettings, Role, register


def check_steps(steps: tuple[int, ...]) -> None:
    """Raises UserError unless the steps of a few-step student decrease and lie in 1...1000."""
    falling = all(a > b for a, b in itertools.pairwise(steps))
    shown = " ".join(map(str, steps[:8])) + (f" and {len(steps) - 8} more" if len(steps) > 8 else "")
    require(
        bool(steps) and falling and steps[0] <= 1000 and steps[-1] > 0,
        f"student_steps is {shown or 'empty'}; give decreasing timesteps from 1000 to 1, such as 1000 750 500 250",
    )


def check_shift(shift: float) -> None:
    """Raises UserError unless a timestep shift is positive and finite."""
    require(0 < shift < math.inf, f"shift is {shift}; it must be positive and finite, for example 5.0")


def _check_block(block: int | None, *, independent: bool) -> None:
    require(block is None or block >= 1, f"block is {block}; it must be at least 1, for example 3")
    require(
        not independent or block is not None,
        "independent_first_frame is true, but there are no blocks; give block, for example 3",
    )


@dataclass(frozen=True, kw_only=True)
class FlowConfig(ObjectiveSettings):
    """The rectified-flow objective."""

    name: ClassVar[str] = "flow"

    shift: float = 5.0
    """Timestep shift s: sigma = s*u / (1 + (s-1)*u). A larger shift trains more at high noise."""

    weighting: Literal["gaussian", "uniform"] = "gaussian"
    """Weight of a noise level in the loss: a bell curve around t = 500 with mean 1, or 1 everywhere."""

    num_train_timesteps: int = 1000
    """Number of noise levels; the network sees t = num_train_timesteps * sigma."""

    frames_per_level: int | None = None
    """Frames that share a noise level (diffusion forcing): each run of this many frames draws its own level. Default:
    one level for the whole window. Self-Forcing trains causal models with 3."""

    independent_first_frame: bool = False
    """Whether the first frame has its own level and the runs start after it: windows of 3 k + 1 frames. A causal
    network needs the same blocks: `--overrides causal_block=3 independent_first_frame=true`."""

    def __post_init__(self) -> None:
        check_shift(self.shift)
        require(
            self.num_train_timesteps >= 2,
            f"num_train_timesteps is {self.num_train_timesteps}; it must be at least 2, for example 1000",
        )
        require(
            self.frames_per_level is None or self.frames_per_level >= 1,
            f"frames_per_level is {self.frames_per_level}; it must be at least 1, for example 3, or None",
        )
        require(
            not self.independent_first_frame or self.frames_per_level is not None,
            "independent_first_frame is true, but all frames share a level; give frames_per_level, for example 3",
        )

    @property
    def generation(self) -> Generation:
        """Euler's method with the shift of the training."""
        return Generation(shift=self.shift, level_per_frame=self.frames_per_level is not None)


register(FlowConfig, "monarchrt.train.objectives.flow:FlowObjective")


@dataclass(frozen=True, kw_only=True)
class TeacherForcingConfig(FlowConfig):
    """Teacher forcing: the flow of noisy blocks that attend to the clean blocks before them, in a causal network."""

    name: ClassVar[str] = "teacher-forcing"

    frames_per_level: int | None = 3
    """Latent frames per block, which share a noise level; the network's causal_block."""

    context_sigma: float = 0.0
    """Largest noise level of the context, the blocks that later ones attend to; each block's level is drawn between 0
    and this, and given to the network. 0 leaves them clean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.frames_per_level is not None, "frames_per_level is None; give the frames per block, such as 3")
        require(
            0 <= self.context_sigma < 1,
            f"context_sigma is {self.context_sigma}; it must lie in [0, 1), for example 0.1, or 0 for clean",
        )


register(TeacherForcingConfig, "monarchrt.train.objectives.teacher_forcing:TeacherForcingObjective")


@dataclass(frozen=True, kw_only=True)
class FewStepSettings(ObjectiveSettings):
    """Base class of the settings of objectives whose student is sampled in a few steps."""

    student_steps: tuple[int, ...] = (1000, 750, 500, 250)
    """The student's steps: timesteps before the shift, decreasing from 1000."""

    shift: float = 5.0
    """Timestep shift of the student's steps."""

    def __post_init__(self) -> None:
        check_steps(self.student_steps)
        check_shift(self.shift)

    @property
    def generation(self) -> Generation:
        """Few-step sampling at the student's steps."""
        return Generation(shift=self.shift, sampler="few-step", steps=self.student_steps)


@dataclass(frozen=True, kw_only=True)
class GuidedSettings(FewStepSettings):
    """Base class of the settings of objectives with a guided teacher."""

    unguided: ClassVar[float] = 1.0
    """The guidance weight that means no guidance."""

    guidance: float | None = None
    """Weight of the teacher's guidance. Default: 3 with `negative`; without it there is none."""

    negative: Path | None = None
    """File with the embedding of the negative prompt, as `generate --save-embeddings` writes it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.guidance is None or 0 <= self.guidance < math.inf,
            f"guidance is {self.guidance}; it must be at least 0, for example 3.0; {self.unguided:g} turns it off",
        )
        require(
            self.guidance in (None, self.unguided) or self.negative is not None,
            f"guidance is {self.guidance}, but there is no embedding of a negative prompt; give --negative FILE, as "
            f"generate --save-embeddings writes it, or leave guidance out",
        )

    @property
    def weight(self) -> float:
        """Weight of the teacher's guidance; `unguided` without a negative prompt."""
        return self.unguided if self.negative is None else 3.0 if self.guidance is None else self.guidance


@dataclass(frozen=True, kw_only=True)
class ODEConfig(FewStepSettings):
    """ODE regression: a few-step student learns to predict the end of a teacher's trajectory from its states."""

    name: ClassVar[str] = "ode"
    roles: ClassVar[Mapping[str, Role]] = {"student": Role(defaults={"learning_rate": 2e-6, "beta2": 0.999})}

    student_steps: tuple[int, ...] = (1000, 750, 500, 250)
    """The student's steps, which must be those of the pairs: timesteps before the shift, decreasing from 1000."""

    shift: float = 5.0
    """Timestep shift of the student's steps, which must be that of the pairs."""

    block: int | None = None
    """Latent frames per block of a causal student, each starting from its own state; the network's causal_block.
    Default: a bidirectional student, with one state for the whole clip."""

    independent_first_frame: bool = False
    """Whether the first frame of a causal student's clips is a block of its own, as it must be in the network."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_block(self.block, independent=self.independent_first_frame)


register(ODEConfig, "monarchrt.train.objectives.ode:ODEObjective")


@dataclass(frozen=True, kw_only=True)
class ConsistencyConfig(GuidedSettings):
    """Consistency distillation: a student learns to agree with its own moving average one Euler step of the teacher
    later."""

    name: ClassVar[str] = "consistency"
    roles: ClassVar[Mapping[str, Role]] = {
        "student": Role(
            starts_as="teacher",
            averaged=True,
            defaults={"learning_rate": 2e-6, "beta1": 0.0, "beta2": 0.999, "weight_decay": 0.01},
        ),
        "teacher": Role(trains=False, random=False, defaults={"attention": EXACT}),
    }

    student_steps: tuple[int, ...] = (1000, 750, 500, 250)
    """The steps that the student is sampled in: timesteps before the shift, decreasing from 1000. It learns all of
    them."""

    shift: float = 5.0
    """Timestep shift of the grid and of the student's steps."""

    grid: int = 48
    """Number of noise levels in the grid; one Euler step of the teacher goes from one to the next."""

    guidance: float | None = None
    """Weight g of the teacher's guidance, v_negative + g (v_text - v_negative). Default: 3 with `negative`; without it
    there is none."""

    conversion: Literal["clean", "published"] = "clean"
    """Noise levels that convert predictions to data: clean, those of the grid; published, as in the published code, the
    nearest of a grid of 1000 at the same shift."""

    block: int | None = None
    """Latent frames per block of a causal student and teacher, each of which attends to the clean blocks before it;
    their causal_block. Default: both are bidirectional."""

    independent_first_frame: bool = False
    """Whether the first frame of causal networks' clips is a block of its own, as it must be in the networks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(2 <= self.grid <= 1000, f"grid is {self.grid}; it must lie in 2...1000, for example 48")
        _check_block(self.block, independent=self.independent_first_frame)


register(ConsistencyConfig, "monarchrt.train.objectives.consistency:ConsistencyObjective")


# learning rates, moments and moving average of Self-Forcing's training, with a batch of 64 clips
_STUDENT = {"learning_rate": 2e-6, "beta1": 0.0, "beta2": 0.999, "weight_decay": 0.01, "ema_start": 200}
_CRITIC = {"learning_rate": 4e-7, "beta1": 0.0, "beta2": 0.999, "weight_decay": 0.01, "ema_decay": None}


@dataclass(frozen=True, kw_only=True)
class DMDConfig(GuidedSettings):
    """Distribution matching distillation: a few-step student, a critic that follows it, and a frozen teacher."""

    name: ClassVar[str] = "dmd"
    needs_clips: ClassVar[bool] = False
    roles: ClassVar[Mapping[str, Role]] = {
        "student": Role(starts_as="teacher", defaults=_STUDENT),
        "critic": Role(starts_as="teacher", own_batch=True, defaults=_CRITIC | {"attention": EXACT}),
        "teacher": Role(trains=False, random=False, defaults={"attention": EXACT}),
    }

    unguided: ClassVar[float] = 0.0

    shift: float = 5.0
    """Timestep shift of the student's steps and of the times at which samples are compared."""

    guidance: float | None = None
    """Weight w of the teacher's guidance, x_c + w (x_c - x_u). Default: 3 with `negative`; without it there is none."""

    student_every: int = 5
    """The student is updated once in this many steps, the critic at every step."""

    low: float = 0.02
    """Smallest time at which samples are compared, as a fraction of 1000."""

    high: float = 0.98
    """Largest time at which samples are compared, as a fraction of 1000."""

    conversion: Literal["clean", "grid", "published"] = "clean"
    """Noise levels of these times: clean, t/1000; grid, the nearest of the shift-5 grid; published, as in the published
    code, which converts predictions to data with a grid of shift 8."""

    gan_weight: float = 0.0
    """Weight of the adversarial term in the student's loss, 0.03 in one-step recipes; 0 is none. A head on the critic's
    features learns to distinguish the student's clips from the data, so clips are needed."""

    gan_critic_weight: float | None = None
    """Weight of the discriminator's loss in the critic's. Default: gan_weight."""

    gan_relativistic: bool = False
    """Whether the discriminator compares a clip of the student with one of the data."""

    gan_layers: int | None = None
    """Blocks of the critic whose output the discriminator sees. Default: all."""

    gan_r1: float = 0.02
    """Weight of R1, which keeps the discriminator flat around noisy data clips, by a finite difference."""

    gan_r2: float = 0.001
    """Weight of R2, the same around the student's clips."""

    gan_sigma: float = 0.1
    """Standard deviation of the noise that R1 and R2 add to the clips."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.student_every >= 1, f"student_every is {self.student_every}; it must be at least 1")
        require(
            0 < self.low < self.high < 1,
            f"low is {self.low} and high {self.high}; give 0 < low < high < 1, for example 0.02 and 0.98",
        )
        for name in ("gan_weight", "gan_critic_weight", "gan_r1", "gan_r2"):
            value = getattr(self, name)
            require(value is None or 0 <= value < math.inf, f"{name} is {value}; it must be at least 0, such as 0.03")
        for name in ("critic_weight", "relativistic", "layers", "r1", "r2", "sigma"):
            value = getattr(self, f"gan_{name}")
            changed = value != getattr(DMDConfig, f"gan_{name}")
            require(
                self.adversarial or not changed,
                f"gan_{name} is {value}, but gan_weight is 0: there is no discriminator; give --gan-weight 0.03",
            )
        layers, sigma = self.gan_layers, self.gan_sigma
        require(layers is None or layers >= 1, f"gan_layers is {layers}; it must be at least 1")
        require(0 < sigma < math.inf, f"gan_sigma is {sigma}; it must be positive and finite, for example 0.1")

    @property
    def adversarial(self) -> bool:
        """Whether there is a discriminator."""
        return self.gan_weight > 0

    @property
    def critic_weight(self) -> float:
        """Weight of the discriminator's loss."""
        return self.gan_weight if self.gan_critic_weight is None else self.gan_critic_weight


@dataclass(frozen=True, kw_only=True)
class SelfForcingConfig(DMDConfig):
    """Self-Forcing: distribution matching of clips that a causal student generates block by block from its own
    blocks."""

    name: ClassVar[str] = "self-forcing"

    block: int = 3
    """Latent frames per block; the student's causal_block."""

    independent_first_frame: bool = False
    """Whether the first frame is a block of its own, as it must be in the student: clips of 3 k + 1 frames."""

    context_sigma: float | None = None
    """Noise level that finished blocks have in the cache. Default: the lowest of the grid, 0.00498 at shift 5, as
    published; 0 is clean, as in generation."""

    scored_frames: int | None = None
    """Latent frames at the end of a clip, in whole blocks, that critic and teacher see and the student learns from;
    earlier ones are only rolled out. For clips longer than the teacher can process, 21 for Wan. Default: all."""

    scored_anywhere: bool = False
    """Whether the scored_frames are a random run of whole blocks, the same for all clips of a step, instead of the last
    ones; later blocks are not generated. Otherwise a student of long clips does not learn how they begin."""

    window: int | None = None
    """Latent frames that a block sees, including its own; older ones are dropped, as with `generate --window`, so clips
    may be longer than the cache. Default: all."""

    sink_frames: int = 0
    """With window: leading latent frames that are always kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.block >= 1, f"block is {self.block}; it must be at least 1, for example 3")
        require(
            self.context_sigma is None or 0 <= self.context_sigma < 1,
            f"context_sigma is {self.context_sigma}; it must lie in [0, 1), for example 0",
        )
        frames = self.scored_frames
        require(frames is None or frames >= 1, f"scored_frames is {frames}; it must be at least 1, for example 21")
        if self.scored_anywhere:
            require(frames is not None, "scored_anywhere is true, but all frames are scored; give --scored-frames 21")
            least = (frames or 0) // self.block * self.block
            require(
                frames == least,
                f"scored_frames is {frames}, which are not whole blocks of {self.block}; the nearest that are: "
                f"{' or '.join(str(n) for n in (least, least + self.block) if n)}",
            )
        window, sinks = self.window, self.sink_frames
        require(sinks >= 0, f"sink_frames is {sinks}; it must be at least 0, for example 3")
        require(not sinks or window is not None, f"sink_frames is {sinks}, but there is no window; give --window 21")
        least = self.block + sinks
        require(
            window is None or window >= least,
            f"window is {window}, which has no room for a block of {self.block} and {sinks} sink_frames; give {least} "
            f"or more, for example {max(21, least)}",
        )

    @property
    def generation(self) -> Generation:
        """Few-step sampling with the window of the roll-outs."""
        return replace(super().generation, window=self.window, sink_frames=self.sink_frames)


register(DMDConfig, "monarchrt.train.objectives.dmd:DMDObjective")
register(SelfForcingConfig, "monarchrt.train.objectives.self_forcing:SelfForcingObjective")
