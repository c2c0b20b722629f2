"""`monarchrt demo --distill`: compares a many-step dense teacher with four-step Monarch students.

The measure is the distance between the distributions of a network's clips and of the teacher's many-step clips, which
is not a training loss; clips are sampled from noise that was not used in training. Every student is compared with the
same network sampled in as many steps without distillation.

All networks are sampled with the moving average of their parameters, since a student's latest parameters change a lot
from one update to the next.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from monarchrt.models.errors import report_full_disk
from monarchrt.models.media.video import write_mp4
from monarchrt.models.wan import WanModel
from monarchrt.train.config import TrainConfig, to_dict
from monarchrt.train.data import Batch, ClipWindows
from monarchrt.train.demo.config import DemoConfig, dense_run
from monarchrt.train.demo.distances import energy_distance
from monarchrt.train.demo.few_steps import SHIFT
from monarchrt.train.demo.film import COLUMN, HOLD, labelled, subscribed
from monarchrt.train.logs import read_log
from monarchrt.train.loop import TrainResult
from monarchrt.train.objectives.dmd import DMDObjective
from monarchrt.train.objectives.flow import euler_sample, sampling_levels
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.objectives.settings import FlowConfig

matplotlib.use("Agg")  # pictures go to files; no display is needed
import matplotlib.pyplot as plt

STEPS = 24  # steps of the teacher's clips
SHOWN = 8  # clips of each network in the film

AVERAGED = "average of the parameters, decay {:g}"

type Sampling = Callable[[Any, jax.Array, Batch], jax.Array]
"""(network, key, examples that define shape and text) -> clips."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Measures of one network with one sampler.

    Attributes:
        label: Label of the network.
        steps: Network calls per clip, or per block.
        stored: Fraction of the attention map that is stored.
        distance: Energy distance of its clips to the teacher's.
        to_clip: Energy distance of its clips to the held-out windows of the video.
        frames: Energy distance of single frames to the teacher's, for each frame of a clip.
        motion: Mean absolute difference of neighboring frames, relative to the teacher's.
        parameters: The parameters that it was sampled with, in words.
    """

    label: str
    steps: int
    stored: float
    distance: float
    to_clip: float
    frames: list[float]
    motion: float
    parameters: str

    @property
    def drift(self) -> float:
        """Difference between the distances of the last frame and of the first."""
        return self.frames[-1] - self.frames[0]


def many_steps(steps: int) -> Sampling:
    """A sampler by Euler's method."""
    levels = sampling_levels(FlowConfig(shift=SHIFT), steps=steps)
    return lambda network, key, like: euler_sample(
        network, jax.random.normal(key, like.latents.shape), jnp.asarray(like.text), levels=levels
    )


def few_steps(config: TrainConfig) -> Sampling:
    """The sampler of a student, with all of its steps.

    Raises:
        TypeError: If the objective has no few-step student.
    """
    objective = make_objective(config.objective)
    if not isinstance(objective, DMDObjective):
        raise TypeError(f"{config.objective.name} has no few steps")

    def sample(network: Any, key: jax.Array, like: Batch) -> jax.Array:
        draws = objective.draws(key, like)["student"].student
        last = jnp.int32(len(objective.settings.student_steps) - 1)
        return objective.samples(network, jnp.asarray(like.text), draws._replace(last=last))

    return sample


def make_clips(network: nnx.Module, sampling: Sampling, like: Batch, *, count: int, seed: int) -> np.ndarray:
    """Samples clips of a network in batches.

    Args:
        network: The network.
        sampling: Its sampler.
        like: Examples that define the shape of clips, the texts, and the size of a batch.
        count: Number of clips.
        seed: Seed of the noise.

    Returns:
        Clips [count, F, h, w, C].
    """
    graph, params = nnx.split(network)
    run = jax.jit(lambda params, key, text: sampling(nnx.merge(graph, params), key, like._replace(text=text)))
    keys = jax.random.split(jax.random.key(seed), -(-count // len(like.text)))
    return np.concatenate([np.asarray(run(params, key, like.text)) for key in keys])[:count]


class Measured:
    """Samples clips of several networks and measures their distances to the teacher's.

    Args:
        teacher: The dense network, sampled in many steps.
        source: The windows of the clip.
        count: Number of clips of each network.
        seed: Seed of their noise.
    """

    def __init__(self, teacher: nnx.Module, source: ClipWindows, *, count: int, seed: int):
        self._source, self._count, self._seed = source, count, seed
        self._like = source.held_out_batch([n % source.held_out for n in range(8)])
        self._reference = make_clips(teacher, many_steps(STEPS), self._like, count=count, seed=seed + 1)
        self._held_out = np.asarray(source.held_out_batch(list(range(source.held_out))).latents, np.float32)
        self.rows: dict[str, Row] = {}
        self.clips: dict[str, np.ndarray] = {}

    def add(
        self, name: str, label: str, network: Any, sampling: Sampling, *, steps: int, stored: float, parameters: str
    ) -> Row:
        """Samples clips of a network and measures them.

        Args:
            name: Name of the row.
            label: Label of the network.
            network: The network.
            sampling: Its sampler.
            steps: Network calls per clip, or per block.
            stored: Fraction of the attention map that is stored.
            parameters: The parameters of the network, in words.

        Returns:
            The measures, which are also added to `rows`.
        """
        clips = make_clips(network, sampling, self._like, count=self._count, seed=self._seed)
        there = self._reference
        motion = lambda x: float(np.abs(np.diff(x, axis=1)).mean())  # noqa: E731
        row = Row(
            label=label,
            steps=steps,
            stored=stored,
            distance=energy_distance(clips, there),
            to_clip=energy_distance(clips, self._held_out),
            frames=[energy_distance(clips[:, n], there[:, n]) for n in range(clips.shape[1])],
            motion=motion(clips) / motion(there),
            parameters=parameters,
        )
        self.rows[name], self.clips[name] = row, clips[:SHOWN]
        return row

    def film(self, path: Path) -> Path:
        """Writes a video with the first clips of each network in sequence, the networks side by side."""
        zoom = max(1, COLUMN // 2 // (self._like.latents.shape[3] * self._source.transform.patch))
        panels = []
        for name, clips in self.clips.items():
            frames = self._source.transform.decode(clips.reshape(1, -1, *clips.shape[2:]))[0]
            panels.append(labelled(frames, self.rows[name].label, zoom))
        panels += [np.full_like(panels[0], 255)] * (-len(panels) % 2)
        rows = [np.concatenate(panels[n : n + 2], axis=2) for n in range(0, len(panels), 2)]
        film = np.concatenate(rows, axis=1)
        film = subscribed(film, f"sampled with the {sampled_with(self.rows)}")
        return write_mp4(path, np.concatenate([film, *[film[-1:]] * HOLD]), fps=4.0)


def parameters_of(config: TrainConfig) -> str:
    """The parameters of `TrainResult.model`, in words."""
    decay = config.optimizer.ema_decay
    return "latest parameters" if decay is None else AVERAGED.format(decay)


def sampled_with(rows: Mapping[str, Row]) -> str:
    """The parameters that the networks were sampled with, in words; by network if they differ."""
    kinds = {row.parameters for row in rows.values()}
    return kinds.pop() if len(kinds) == 1 else "; ".join(f"{name}: {row.parameters}" for name, row in rows.items())


def draw_curves(path: Path, rows: Mapping[str, Row], runs: Mapping[str, TrainConfig]) -> Path:
    """Plots the distances of all networks, and curves from the logs of the runs.

    The curves are the critic's loss, and the mean difference of critic and teacher on the student's clips.

    Args:
        path: The png file to write.
        rows: Measures by network.
        runs: Settings of the runs, by name.

    Returns:
        The path.
    """
    figure, (bars, critic, apart) = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    names = list(rows)[::-1]
    bars.barh([rows[name].label for name in names], [rows[name].distance for name in names], color="#4c72b0")
    bars.set(title="distance to the teacher's clips, less is better", xlabel=f"energy distance; {sampled_with(rows)}")
    for name, config in runs.items():
        records = read_log(config.run.folder)
        for axes, key in ((critic, "critic/loss"), (apart, "student/mean_abs_difference")):
            points = [(record["step"], record[key]) for record in records if key in record]
            if points:
                steps, values = (np.array(column, float) for column in zip(*points, strict=True))
                window = max(1, len(values) // 25)
                smooth = np.convolve(values, np.ones(window) / window, mode="valid")
                axes.plot(steps[window - 1 :], smooth, label=name)
    critic.set(title="loss of the critic", xlabel="step")
    apart.set(title="mean |x_f - x_r|: critic against teacher", xlabel="step")
    apart.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def run_distillation(
    config: DemoConfig,
    runs: Mapping[str, TrainConfig],
    dense: WanModel,
    source: ClipWindows,
    trained: Callable[[TrainConfig], TrainResult],
    console: Console,
    *,
    begun: float,
) -> dict[str, Row]:
    """Trains the students, compares them with networks that are not distilled, and writes the results.

    Args:
        config: The settings of the demo.
        runs: Settings of the runs, from `distillations`.
        dense: The teacher.
        source: The windows of the clip.
        trained: Trains a run.
        console: Shows progress.
        begun: Start of the whole demo, by `time.monotonic()`.

    Returns:
        The measures by network.
    """
    students: dict[str, TrainResult] = {}
    titles = {
        "dmd": "distil it into four steps with Monarch attention (DMD)",
        "dmd-dense": "the same with dense attention, to compare with",
        "causal": "finetune the dense model to see earlier frames only, with Monarch attention",
        "self-forcing": "distil that into four steps, on clips that it makes frame by frame (Self-Forcing)",
    }
    for number, (name, settings) in enumerate(runs.items(), 2):
        console.print(f"\n{number}. {titles[name]}, {settings.run.steps} steps")
        students[name] = trained(settings)
    console.print(f"\n{len(runs) + 2}. make {config.clips} clips with each, and compare them with the teacher's")
    measured = Measured(dense, source, count=config.clips, seed=config.seed + 1000)
    grid = dense.config.token_grid(*source.latent_shape[:3])

    def stored(model: WanModel) -> float:
        return model.config.layer_attention[0].density(grid).kept

    def add(name: str, label: str, network: WanModel, sampling: Sampling, steps: int = 4) -> None:
        of_run = parameters_of(runs.get(name, dense_run(config)))
        row = measured.add(name, label, network, sampling, steps=steps, stored=stored(network), parameters=of_run)
        console.print(f"   {label}: {row.distance:.4f}")

    averages = {name: result.model for name, result in students.items()}
    few = {name: few_steps(runs[name]) for name in ("dmd", "dmd-dense", "self-forcing")}
    swapped = dense.with_attention(averages["dmd"].config.attention)
    add("teacher", "teacher, dense, other noise", dense, many_steps(STEPS), STEPS)
    add("dense-euler", "teacher, dense, not distilled, Euler", dense, many_steps(4))
    add("dense", "teacher, dense, not distilled", dense, few["dmd"])
    add("swapped", "Monarch, not distilled", swapped, few["dmd"])
    add("dmd", "Monarch, DMD", averages["dmd"], few["dmd"])
    add("dmd-dense", "dense, DMD", averages["dmd-dense"], few["dmd-dense"])
    add("causal", "causal Monarch, not distilled", averages["causal"], few["self-forcing"])
    add("self-forcing", "causal Monarch, Self-Forcing", averages["self-forcing"], few["self-forcing"])
    rows = measured.rows
    written = [
        measured.film(config.folder / "students.mp4"),
        draw_curves(config.folder / "distillation.png", rows, runs),
        _write(config.folder / "distillation.json", config, rows, seconds=time.monotonic() - begun),
    ]
    console.print(table(rows))
    for line in verdicts(rows):
        console.print(line)
    names = ", ".join(path.name for path in written)
    seconds = time.monotonic() - begun
    console.print(f"\n{seconds:.0f} s, the program's start aside; everything is in {config.folder}: {names}")
    return rows


def verdicts(rows: Mapping[str, Row]) -> list[str]:
    """For each claim, a line that says whether the measured distances support it."""
    best = min(rows[name].distance for name in ("dense-euler", "dense"))
    dmd, forced = rows["dmd"].parameters, rows["self-forcing"].parameters
    claims = (
        (f"DMD: the Monarch student ({dmd}) is nearer to the teacher than the dense teacher itself in 4 steps",
         rows["dmd"].distance, best),
        ("DMD: it is nearer than the same network in 4 steps without distillation",
         rows["dmd"].distance, rows["swapped"].distance),
        ("DMD: it is within 1.5 times the distance of the dense student",
         rows["dmd"].distance, 1.5 * rows["dmd-dense"].distance),
        (f"Self-Forcing: the causal Monarch student ({forced}) is nearer than without distillation",
         rows["self-forcing"].distance, rows["causal"].distance),
        ("Self-Forcing: it drifts less over the frames than without distillation",
         rows["self-forcing"].drift, rows["causal"].drift),
    )  # fmt: skip
    return [f"{'holds' if a < b else 'does not hold'}: {claim} ({a:.4f} against {b:.4f})" for claim, a, b in claims]


def table(rows: Mapping[str, Row]) -> Table:
    """The table of all rows."""
    shown = Table(
        "network", "steps", "map stored", "distance to teacher", "to the held-out clip", "drift", "motion",
        caption=f"sampled with the {sampled_with(rows)}",
    )  # fmt: skip
    for row in rows.values():
        shown.add_row(
            row.label, str(row.steps), f"{row.stored:.0%}", f"{row.distance:.4f}", f"{row.to_clip:.4f}",
            f"{row.drift:+.4f}", f"{row.motion:.2f}",
        )  # fmt: skip
    return shown


def _write(path: Path, config: DemoConfig, rows: Mapping[str, Row], *, seconds: float) -> Path:
    values = {
        "networks": {name: dataclasses.asdict(row) | {"drift": row.drift} for name, row in rows.items()},
        "claims": verdicts(rows),
        "seconds": round(seconds, 1),
        "config": to_dict(config),
    }
    with report_full_disk(path):
        path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return path
