"""Table 2 in miniature: dense attention, Monarch and VSA after equal finetuning of the same small dense models.

    python benchmarks/finetuning.py                                  # three seeds; a GPU, some three minutes on an H200
    python benchmarks/finetuning.py --size 8 14 --dense-steps 400 --steps 100 --seeds 0          # minutes on a CPU
    python benchmarks/finetuning.py --pack clips.npz; python benchmarks/finetuning.py --clips clips.npz
    for s in 0 1 2; do python benchmarks/finetuning.py --seeds $s & done; wait; python benchmarks/finetuning.py

The network and its training are those of `monarchrt demo`: 5 layers of 64 channels, windows of 4 frames, a token for
4 x 4 pixels. Clips are an excerpt of Big Buck Bunny and two scenes of a city (clips/README.md); the end of each is
held out. For each seed a dense model is trained from scratch; from its average each kind is finetuned for as many steps
with the same batches, noise and learning rates, dense attention too. Grids of 4 x 16 x 28 tokens are large enough for
Monarch to leave out 95%. VSA has its gate and the density asked for from the first step on.

The table has the held-out loss before and after, and how much more it is than that of dense attention finetuned as
long, with a 95% bootstrap interval over (seed, clip, noise level, noise), and seed by seed. What is done is kept in
--out, and a run that was stopped goes on. --pack writes the frames for a machine that cannot read videos. Nothing is
chosen by the outcome.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from measuring import machine, write_report

from monarchrt.models.attention.base import Attention
from monarchrt.models.attention.notation import parse as parse_attention
from monarchrt.models.wan import WanModel
from monarchrt.train.config import TrainConfig
from monarchrt.train.data import ClipWindows, Source
from monarchrt.train.demo.config import DemoConfig, dense_run, further_runs
from monarchrt.train.evaluate import weighted_errors
from monarchrt.train.evaluation.metrics import paired_interval
from monarchrt.train.model import build_model
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.state import create_role, create_state, make_training, split_model
from monarchrt.train.step import make_error_fn, make_train_step

CLIPS = (DemoConfig().clip, *(Path(__file__).parent / "clips" / name for name in ("towers.mp4", "night.mp4")))
KINDS = (  # {h}, {w}: rows and columns of tokens; {half}: half of the rows
    "dense",
    "monarch(tile=(4,{h},{w}))",
    "monarch(tile=(4,{half},{w}))",
    "vsa(keep=0.15, cube=(2,2,2))",
    "vsa(keep=0.05, cube=(2,2,2))",
)
EXACT = "dense"
HELD_OUT, GAP = 0.2, 4  # of each clip at its end; frames before them that are in neither part


class Program:
    """The compiled steps and errors of one attention, for all seeds."""

    def __init__(self, model: WanModel, settings: TrainConfig, steps: int):
        """Nothing is compiled before the first call."""
        self.settings, self.steps = settings, steps
        self.objective = make_objective(settings.objective)
        self.role = settings.objective.exported
        self.graph = split_model(model)[0]
        self.training = make_training(settings.optimizer, updates=steps)
        self.step = make_train_step(
            self.objective, {self.role: self.graph}, {self.role: self.training}, configs={self.role: model.config}
        )
        self.errors = make_error_fn(self.objective, {self.role: self.graph})

    def train(self, model: WanModel, source: Source, seed: int) -> WanModel:
        """The network after all steps, with averaged parameters."""
        _, params, frozen = split_model(jax.tree.map(lambda x: x.copy(), model))  # a step uses up what it is given
        state = create_state({self.role: create_role(params, frozen, self.training)}, seed=seed)
        loss: Any = np.nan
        for step in range(self.steps):
            batch = source.train_batch(step, self.settings.run.batch, seed)
            state, metrics = self.step(state, {self.role: batch}, due=(self.role,))
            loss = metrics[self.role]["loss"]
        if not np.isfinite(float(loss)):
            raise SystemExit(f"error: the loss of seed {seed} became {float(loss)}")
        return nnx.merge(self.graph, state.roles[self.role].evaluated, state.frozen(self.role))

    def terms(self, model: WanModel, source: Source, args: argparse.Namespace) -> np.ndarray:
        """The held-out loss's terms, in an order that is the same for all networks."""
        _, params, frozen = split_model(model)
        parts = {self.role: (params, frozen)}
        sizes = {"windows": args.windows, "timesteps": args.levels, "batch": self.settings.run.batch}
        return weighted_errors(self.errors, parts, source=source, objective=self.objective, **sizes)[self.role]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", nargs="+", type=Path, default=list(CLIPS), help="videos, or a file of --pack")
    parser.add_argument("--pack", type=Path, help="write the frames into this file, and train nothing")
    parser.add_argument("--attention", nargs="+", default=list(KINDS), help="beside dense; {h}, {w}, {half} are filled")
    parser.add_argument("--size", nargs=2, type=int, default=(16, 28), metavar=("ROWS", "COLUMNS"), help="of tokens")
    parser.add_argument("--dense-steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=400, help="of each finetuning")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--windows", type=int, default=12, help="held-out windows of the loss, spread over all clips")
    parser.add_argument("--levels", type=int, default=8, help="noise levels for each")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/finetuning"))
    args = parser.parse_args()
    for name in ("dense_steps", "steps", "windows", "levels"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    rows, columns = args.size
    names = {"h": rows, "w": columns, "half": rows // 2}
    grid = (4, rows, columns)
    args.settings = []
    for text in dict.fromkeys([EXACT, *args.attention]):
        try:
            setting = parse_attention(text.format(**names))
            setting.check(grid)
        except (ValueError, KeyError) as error:
            parser.error(f"--attention {text}: {' '.join(str(error).split())}")
        args.settings.append(setting)
    for path in args.clips:
        if not path.is_file():
            parser.error(f"--clips {path} is not a file")
    return args


def read(args: argparse.Namespace) -> list[np.ndarray]:
    """Frames of each clip, uint8 [T, H, W, 3]."""
    height, width = (4 * side for side in args.size)
    if args.clips[0].suffix == ".npz":
        with np.load(args.clips[0]) as stored:
            clips = [stored[name] for name in sorted(stored.files)]
        if any(clip.shape[1:] != (height, width, 3) for clip in clips):
            raise SystemExit(f"error: {args.clips[0]} has frames of {clips[0].shape[1:3]}, not {height} x {width}")
        return clips
    from monarchrt.models.media.video import read_clip  # not where there are only packed clips

    return [read_clip(path, height=height, width=width) for path in args.clips]


def windows_of(
    clips: list[np.ndarray], settings: TrainConfig, text_dim: int, *, held_out: float = HELD_OUT
) -> ClipWindows:
    """Trains on the beginnings of all clips and holds out their ends."""
    cuts = [round(len(clip) * (1 - held_out)) for clip in clips]
    parts = [clip[:cut] for clip, cut in zip(clips, cuts, strict=True)]
    parts += [clip[cut + GAP :] for clip, cut in zip(clips, cuts, strict=True)]  # the last half is held out whole
    data = dataclasses.replace(settings.data, held_out=0.5)
    return ClipWindows(np.concatenate(parts), data, text_shape=(1, text_dim), lengths=[len(part) for part in parts])


def claim(args: argparse.Namespace) -> None:
    """Makes the folder, or finds that what is in it is of the same settings."""
    values = {name: getattr(args, name) for name in ("dense_steps", "steps", "windows", "levels")}
    values |= {"size": list(args.size), "clips": [path.name for path in args.clips]}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "settings.json"
    if path.is_file() and (there := json.loads(path.read_text())) != values:
        raise SystemExit(f"error: --out {args.out} holds results of other settings, {there}; give another folder")
    part = path.with_suffix(f".{os.getpid()}")  # seeds may be processes side by side
    part.write_text(json.dumps(values) + "\n")
    os.replace(part, path)


def once(path: Path, make: Any) -> np.ndarray:
    """An array, of its file or made and put there."""
    if not path.is_file():
        part = path.with_suffix(f".{os.getpid()}.npy")
        np.save(part, make())
        os.replace(part, path)
    return np.load(path)


def flat(model: WanModel) -> np.ndarray:
    """All parameters in one array."""
    return np.concatenate([np.ravel(np.asarray(x, np.float32)) for x in jax.tree.leaves(split_model(model)[1])])


def filled(model: WanModel, numbers: np.ndarray) -> WanModel:
    """The inverse of `flat`."""
    graph, params, frozen = split_model(model)
    leaves, structure = jax.tree.flatten(params)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    parts = [part.reshape(x.shape) for part, x in zip(np.split(numbers, ends), leaves, strict=True)]
    return nnx.merge(graph, jax.tree.unflatten(structure, [jax.numpy.asarray(x) for x in parts]), frozen)


def run(args: argparse.Namespace, clips: list[np.ndarray]) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Terms of the loss before and after finetuning, of each attention and seed."""
    height, width = (4 * side for side in args.size)
    demos = [
        DemoConfig(seed=seed, height=height, width=width, steps=args.dense_steps, finetune_steps=args.steps)
        for seed in args.seeds
    ]
    settings, further = dense_run(demos[0]), further_runs(demos[0])[0]
    channels = 3 * settings.data.patch**2
    built = [build_model(settings.model, channels=channels, seed=seed) for seed in args.seeds]
    source = windows_of(clips, settings, built[0].config.text_dim)
    began, dense = time.perf_counter(), []
    program = Program(built[0], settings, args.dense_steps)
    for seed, model in zip(args.seeds, built, strict=True):
        numbers = once(args.out / f"trained-{seed}.npy", lambda m=model, s=seed: flat(program.train(m, source, s)))
        dense.append(filled(model, numbers))
        print(f"{time.perf_counter() - began:6.0f} s  dense, seed {seed}", flush=True)
    terms: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for setting in args.settings:
        name = str(setting)
        program = Program(dense[0].with_attention(setting), further, args.steps)
        for seed, model in zip(args.seeds, dense, strict=True):
            swapped = model.with_attention(setting)

            def both(program=program, swapped=swapped, seed=seed) -> np.ndarray:
                after = program.train(swapped, source, seed)
                return np.stack([program.terms(x, source, args) for x in (swapped, after)])

            file = "".join(c if c.isalnum() else "-" for c in name)
            before, after = once(args.out / f"{file}-{seed}.npy", both)
            terms.setdefault(name, []).append((before, after))
            seconds = time.perf_counter() - began
            print(f"{seconds:6.0f} s  {before.mean():.4f} -> {after.mean():.4f}  {name}, seed {seed}", flush=True)
    return terms


def rows_of(args: argparse.Namespace, terms: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> list[dict[str, Any]]:
    """The table."""
    rows, grid = [], (4, *args.size)
    control = terms[EXACT]
    for setting in args.settings:
        before, after = zip(*terms[str(setting)], strict=True)
        differences = [a - c for a, (_, c) in zip(after, control, strict=True)]
        lost = np.mean([b - c for b, (_, c) in zip(before, control, strict=True)])
        row = {"attention": str(setting), "kept": kept(setting, grid), "before": float(np.mean(before))}
        row |= {"after": float(np.mean(after)), "more": float(np.mean(differences))}
        if str(setting) != EXACT:
            row["interval"] = list(paired_interval(np.concatenate(differences)))
            row["won_back"] = float(1 - np.mean(differences) / lost) if lost > 0 else None
        row["more_by_seed"] = [float(x.mean()) for x in differences]
        rows.append(row)
    return rows


def kept(setting: Attention, grid: tuple[int, int, int]) -> float:
    """Share of the map."""
    return setting.density(grid).kept


def main() -> None:
    """Reads, trains, measures, prints, writes."""
    args = parse()
    clips = read(args)
    if args.pack is not None:
        named: Any = {f"{n}": clip for n, clip in enumerate(clips)}
        np.savez_compressed(args.pack, **named)
        print(f"{args.pack}: {', '.join(f'{len(clip)} frames' for clip in clips)}")
        return
    claim(args)
    if jax.default_backend() == "cpu" and (args.dense_steps > 400 or math.prod(args.size) > 8 * 14):
        smaller = "--size 8 14 --dense-steps 400 --steps 100 --seeds 0"
        print(f"note: there is no GPU; what a CPU does in minutes is {smaller}", file=sys.stderr)
    rows = rows_of(args, run(args, clips))
    report = machine() | {"seeds": args.seeds, "rows": rows}
    write_report(args.out / "finetuning.json", report)
    print(f"\nheld-out loss, {len(args.seeds)} seeds, 4 x {args.size[0]} x {args.size[1]} tokens\n")
    for row in rows:
        text = f"{row['kept']:6.1%}  {row['before']:.4f} -> {row['after']:.4f}"
        if "interval" in row:
            low, high = row["interval"]
            won = "none was lost" if row["won_back"] is None else f"{row['won_back']:.0%} won back"
            seeds = " ".join(f"{x:+.4f}" for x in row["more_by_seed"])
            text += f"  {row['more']:+.4f} ({low:+.4f} to {high:+.4f}; by seed {seeds})  {won}"
        print(f"{text}  {row['attention']}")


if __name__ == "__main__":
    main()
