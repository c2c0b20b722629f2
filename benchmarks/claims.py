"""The paper's comparisons in miniature, on small models: with what is left out, three seeds, intervals and pictures.

    python benchmarks/claims.py                                # trains three models; for a GPU
    python benchmarks/claims.py --demos runs/0 runs/1 runs/2   # models of `monarchrt demo --seed ...`; a CPU will do
    python benchmarks/claims.py --redraw --out FOLDER          # table and picture again, nothing measured

(a) The order of Tables 3 and 4: dense models, attention swapped, nothing trained. The held-out loss, and the videos of
    `monarchrt evaluate` against those of dense attention, same noise.
(b) Table 2's: the same models after equal finetuning, with dense attention as the control.
(c) Aligned against misaligned block sizes (Section 4.1), on the maps of these models.
(d) Whether a matrix that stores more is nearer (Section 4.2): tiles that lie in each other, by loss and on the maps,
    and untiled block sizes on the maps.

Models that it trains itself are the demo's network on windows of 16 frames, 16 x 8 x 28 tokens, of Big Buck Bunny and
two scenes of a city (clips/README.md), whose ends are held out: large enough for Monarch to leave out 95%, and for a
first frame that all see to be a sixteenth of the map and not a quarter as on the demo's 4 x 8 x 14.

Differences have 95% bootstrap intervals over pairs: (model, clip, noise level, noise) of the loss, (model, noise) of
videos, (model, layer, head, noise level) of maps. Whatever is measured is kept in --out; a run that was stopped goes
on, and seeds and parts may be processes side by side:

    for s in 0 1 2; do python benchmarks/claims.py --seeds $s & done; wait; python benchmarks/claims.py

With --there, the report is of the videos that are measured by then, and says how many.

It chooses nothing by the outcome.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from claims_report import write_report
from finetuning import CLIPS, Program, once, windows_of
from low_rank import LowRankAttention  # settings can name it then

from monarch_jax import MonarchSpec, monarch_factors
from monarchrt.models.attention.capture import capture
from monarchrt.models.attention.notation import parse
from monarchrt.models.checkpoints.json_files import read_json
from monarchrt.models.media.video import read_clip
from monarchrt.train.config import TrainConfig
from monarchrt.train.demo.config import DemoConfig, dense_run, further_runs
from monarchrt.train.evaluation.compare import evaluate, loss_terms
from monarchrt.train.evaluation.config import EvaluateConfig
from monarchrt.train.evaluation.metrics import paired_interval
from monarchrt.train.evaluation.subject import Subject, noisy_example, open_subject
from monarchrt.train.loop import train
from monarchrt.train.studies.approximations import dense_map, error_of, misaligned, monarch_projection
from monarchrt.train.studies.config import MapConfig
from monarchrt.train.studies.maps import captured_scores

DENSE, ORACLE = "dense", "top_k(keep=0.15)"
GRID = (16, 8, 28)  # of models that are trained here
HELD_OUT = 0.3  # of each clip; the shortest has 74 frames
FILMED = {4: None, 16: 31}  # by frames of a window: those of a video; None: as many windows as `generate` makes
MOST, WHOLE = 0.3, 1000  # density of forms that are compared on maps; tokens of maps that are projected too

SWAPPED: dict[int, tuple[str, ...]] = {  # by frames of a window
    4: (
        "monarch(tile=(4,8,14))",
        "monarch(tile=(4,8,14), num_iters=2)",
        "monarch(tile=(4,4,14))",
        "top_k(keep=0.1)",
        ORACLE,
        "radial(keep=0.15, block=14)",
        "radial(keep=0.4375, block=14)",
        "svg(keep=0.15, block=8)",
        "svg(keep=0.02, block=8)",
        "svg2(query_clusters=16, key_clusters=64, top_p=0.6, min_keep=0.05)",
        "svg2(query_clusters=16, key_clusters=64, top_p=0.9, min_keep=0.1)",
        "svg2(query_clusters=64, key_clusters=128, top_p=0.9, min_keep=0.1)",
        "vsa(keep=0.15, cube=(2,2,2), gate=False)",
        "sliding_tile(tile=(2,2,2), window=(1,3,3))",
        "low_rank(keep=0.1)",
        "low_rank(keep=0.15)",
    ),
    16: (
        "monarch(tile=(16,8,28))",
        "monarch(tile=(16,8,28), num_iters=2)",
        "monarch(tile=(16,4,28))",
        "monarch(tile=(16,2,14))",
        "monarch(tile=(16,2,14), num_iters=2)",
        "monarch(tile=(4,8,14))",
        "top_k(keep=0.05)",
        "top_k(keep=0.1)",
        ORACLE,
        "radial(keep=0.15, block=14)",  # 12.1%: the first frame and the own one, and blocks too large for more
        "radial(keep=0.15, block=7)",
        "svg(keep=0.15, block=8)",
        "svg(keep=0.09, block=8)",
        "svg2(query_clusters=64, key_clusters=128, top_p=0.9, min_keep=0.1)",
        "svg2(query_clusters=64, key_clusters=128, top_p=0.7, min_keep=0.05)",
        "vsa(keep=0.15, cube=(2,2,2), gate=False)",
        "sliding_tile(tile=(2,2,2), window=(3,3,7))",
        "low_rank(keep=0.1)",
        "low_rank(keep=0.15)",
    ),
}
TUNED = {
    4: (
        "monarch(tile=(4,8,14))",
        "monarch(tile=(4,4,14))",
        "vsa(keep=0.15, cube=(2,2,2))",
        "vsa(keep=0.05, cube=(2,2,2))",
    ),
    16: (
        "monarch(tile=(16,8,28))",
        "monarch(tile=(16,4,28))",
        "vsa(keep=0.15, cube=(2,2,2))",
        "vsa(keep=0.05, cube=(2,2,2))",
    ),
}
NESTED = {
    4: (((4, 8, 14), (4, 4, 14), (4, 2, 14), (4, 1, 14), (4, 1, 7)), ((4, 8, 14), (2, 8, 14), (1, 8, 14), (1, 4, 14))),
    16: (
        ((16, 8, 28), (16, 4, 28), (16, 2, 28), (16, 1, 28), (16, 1, 14)),
        ((16, 8, 28), (8, 8, 28), (4, 8, 28), (2, 8, 28), (1, 8, 28)),
        ((16, 8, 28), (16, 8, 14), (16, 8, 7)),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """What is measured of a loss: as `monarchrt evaluate`."""

    windows: int = 8
    timesteps: int = 8
    batch: int = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """One of the models.

    Attributes:
        seed: Its number in file names.
        subject: The network and its examples.
        clip: That its videos begin with, if it is not where the run says.
        further: Settings of finetuning.
        folder: Where its results go.
    """

    seed: int
    subject: Subject
    clip: Path | None
    further: TrainConfig
    folder: Path

    def loss(self, text: str, loss: Loss) -> np.ndarray:
        """Terms of the held-out loss, of their file or measured."""
        return once(self.folder / f"loss-{named(text)}.npy", lambda: loss_terms(self.subject, parse(text), loss))


def named(text: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in text).strip("-")


def tile_text(tile: tuple[int, ...]) -> str:
    return f"monarch(tile=({','.join(map(str, tile))}))"


def kept_json(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds, or what is made and put there."""
    if not path.is_file():
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)
    return json.loads(path.read_text(encoding="utf-8"))


# Models


def models_of(args: argparse.Namespace) -> list[Model]:
    """Those of demos, or trained here."""
    found = []
    for seed in args.seeds:
        if args.demos:
            subject, demo = open_subject(str(args.demos[seed] / "dense"), video=args.video), DemoConfig()
            clip = args.video
        else:
            subject, demo = trained(args, seed)
            clip = demo.clip
        demo = dataclasses.replace(demo, finetune_steps=args.steps)
        path = args.out / f"model-{seed}"
        path.mkdir(parents=True, exist_ok=True)
        further = further_runs(demo)[0]
        found.append(Model(seed=seed, subject=subject, clip=clip, further=further, folder=path))
    grids = {model.subject.grid for model in found}
    if len(grids) > 1 or next(iter(grids))[0] not in SWAPPED:
        raise SystemExit(f"error: models on grids {sorted(grids)}; they must be of one, of {list(SWAPPED)} frames")
    return found


def trained(args: argparse.Namespace, seed: int) -> tuple[Subject, DemoConfig]:
    """A model that is trained here, or was before."""
    frames, height, width = GRID
    demo = DemoConfig(
        seed=seed, folder=args.out / f"trained-{seed}", height=4 * height, width=4 * width, steps=args.dense_steps
    )
    settings = dense_run(demo)
    settings = dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, frames=frames),
        run=dataclasses.replace(settings.run, resume=True, eval_every=500, checkpoint_every=500),
    )
    clips = [read_clip(path, height=4 * height, width=4 * width) for path in CLIPS]
    text_dim = dict(item.split("=") for item in settings.model.overrides)["text_dim"]
    source = windows_of(clips, settings, int(text_dim), held_out=HELD_OUT)
    if not (settings.run.folder / "checkpoints" / str(args.dense_steps)).is_dir():  # else other processes may read it
        train(settings, source=source, quiet=True)
    subject = open_subject(str(demo.folder / "dense"), video=demo.clip)  # wherever it was trained
    return dataclasses.replace(subject, source=source), demo


# (a)


def reachable(text: str, grid: tuple[int, int, int]) -> str | None:
    """Why a setting cannot be had, or None."""
    try:
        parse(text).check(grid)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def turned(settings: tuple[str, ...], models: list[Model]) -> tuple[str, ...]:
    """The same, from another one on for each model: processes side by side use what others have compiled by then."""
    first = round(models[0].seed * len(settings) / 3) % len(settings)
    return settings[first:] + settings[:first]


def settings_on(grid: tuple[int, int, int]) -> list[str]:
    """Those of (a) that can be had."""
    return [text for text in SWAPPED[grid[0]] if reachable(text, grid) is None]


def filmed(grid: tuple[int, int, int]) -> list[str]:
    """Those of which videos are made: not low rank, whose singular vectors take too long in each step."""
    return [text for text in settings_on(grid) if not isinstance(parse(text), LowRankAttention)]


def density_of(text: str, models: list[Model]) -> dict[str, float]:
    """What a setting keeps; of one whose density is not known before, on what dense attention sees."""
    setting: Any = parse(text)
    density = setting.density(models[0].subject.grid)
    if not np.isnan(density.kept):
        return density._asdict()

    def measure(model: Model) -> float:
        kept = []
        for level in (0.3, 0.6, 0.9):
            with capture(model.subject.model) as (probed, calls):
                probed(*noisy_example(model.subject, 0, level))
            kept += [setting.measure(jnp.asarray(c.query), jnp.asarray(c.key), grid=c.grid).kept for c in calls]
        return float(np.mean(kept))

    of_models = [kept_json(model.folder / f"kept-{named(text)}.json", lambda m=model: measure(m)) for model in models]
    return {"measured": float(np.mean(of_models))}


def videos(model: Model, settings: list[str], seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """Measures of the videos, by `monarchrt evaluate`; records with the number of the setting, 0 for dense."""
    config = EvaluateConfig(
        checkpoint=model.subject.checkpoint,
        video=model.clip,
        attention=tuple(settings),
        seeds=seeds,
        frames=FILMED[model.subject.grid[0]],
        windows=0,
        out=model.folder / "videos",
        resume=True,
        quiet=True,
    )
    return evaluate(config)["samples"]


def videos_there(model: Model, settings: list[str], seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    """As `videos`, of those alone that are measured already, on whatever machine; nothing is made."""
    folder = model.folder / "videos"
    if not (folder / "settings.json").is_file():
        return []
    asked, made = read_json(folder / "settings.json"), EvaluateConfig()
    wanted = {"frames": FILMED[model.subject.grid[0]], "steps": made.steps, "reference": DENSE, "mode": made.mode}
    if other := [name for name, value in wanted.items() if asked[name] != value]:
        raise SystemExit(f"error: {folder} has videos with {other[0]}={asked[other[0]]}, not {wanted[other[0]]}")
    names, records = (DENSE, *settings), []
    for seed, (number, name) in itertools.product(seeds, enumerate((DENSE, *asked["attention"]))):
        path = folder / "samples" / f"0-{seed}" / f"{number}.json"
        if name in names and path.is_file():
            records.append({"prompt": 0, "seed": seed, "setting": names.index(name), **read_json(path)})
    return records


def interval(differences: list[np.ndarray] | np.ndarray) -> list[float]:
    """Mean of paired differences and the ends of its interval."""
    values = np.concatenate(differences) if isinstance(differences, list) else np.asarray(differences)
    return [float(values.mean()), *paired_interval(values)]


def order(models: list[Model], loss: Loss, seeds: tuple[int, ...], *, there: bool = False) -> list[dict[str, Any]]:
    """Losses and videos of all settings over all models, in pairs with dense attention's and the oracle's.

    Args:
        models: The models.
        loss: What is measured of a loss.
        seeds: Of the videos; none: there are no videos.
        there: Whether videos are only those that are measured already.
    """
    grid = models[0].subject.grid
    terms = {}
    for text in turned((DENSE, *settings_on(grid)), models):
        terms[text] = [model.loss(text, loss) for model in models]
        print(f"{np.mean(terms[text]):.4f}  {text}", flush=True)
    shown = filmed(grid)
    films = videos_there if there else videos
    made = [films(model, shown, seeds) for model in models] if seeds else []
    rows: list[dict[str, Any]] = []
    for text in (DENSE, *SWAPPED[grid[0]]):
        if text not in terms:
            rows.append({"setting": text, "said": reachable(text, grid)})
            continue
        row: dict[str, Any] = {"setting": text, "density": density_of(text, models)}
        row |= {"loss": float(np.mean(terms[text])), "by_model": [float(x.mean()) for x in terms[text]]}
        if text != DENSE:
            row["more"] = interval([a - b for a, b in zip(terms[text], terms[DENSE], strict=True)])
            row["more_than_oracle"] = interval([a - b for a, b in zip(terms[text], terms[ORACLE], strict=True)])
        if text in (DENSE, *shown):
            of = of_videos(made, (DENSE, *shown).index(text), (DENSE, *shown).index(ORACLE))
            row |= {"videos": of} if of else {}
        rows.append(row)
    return rows


def of_videos(made: list[list[dict[str, Any]]], place: int, oracle: int) -> dict[str, Any]:
    """Measures of one setting's videos over models and noise, as `monarchrt evaluate` has them; empty without any.

    Differences are over the pairs of model and noise that both have videos of.
    """

    def of(setting: int) -> dict[Any, dict[str, Any]]:
        return {
            (number, record["prompt"], record["seed"]): record
            for number, records in enumerate(made)
            for record in records
            if record["setting"] == setting
        }

    own, others = of(place), {"oracle": of(oracle), "dense": of(0)}
    if not own:
        return {}

    def more(than: str, value: Callable[[dict[str, Any]], float]) -> dict[str, list[float]]:
        pairs = [value(record) - value(others[than][key]) for key, record in own.items() if key in others[than]]
        return {f"more_than_{than}": interval(np.array(pairs))} if pairs else {}

    values: dict[str, Any] = {"count": len(own)}
    for name in ("psnr", "ssim_gaussian", "ssim_box"):
        series = np.array([record["drift"][name] for record in own.values()])
        values[name] = interval(series.mean(1))
        against = more("oracle", lambda record, name=name: float(np.mean(record["drift"][name])))
        values |= {f"{name}_{key}": x for key, x in against.items()}
        values[f"{name}_by_block"] = series.mean(0).tolist()
        values[f"{name}_drift"] = interval(series[:, -1] - series[:, 0])
    values["latent_error"] = interval(np.array([record["latent_error"] for record in own.values()]))
    values["flicker"] = interval(np.array([record["flicker"] for record in own.values()]))
    return values | {f"flicker_{key}": x for key, x in more("dense", lambda record: record["flicker"]).items()}


# (b)


def tuned(models: list[Model], loss: Loss) -> list[dict[str, Any]]:
    """Losses before and after equal finetuning."""
    grid = models[0].subject.grid
    after: dict[str, list[np.ndarray]] = {}
    programs: dict[str, Program] = {}  # of a setting, for all models

    def measure(model: Model, text: str) -> np.ndarray:
        setting = parse(text)
        network = model.subject.model.with_attention(setting)
        if text not in programs:
            programs[text] = Program(network, model.further, model.further.run.steps)
        made = programs[text].train(network, model.subject.source, model.seed)
        return loss_terms(dataclasses.replace(model.subject, model=made), setting, loss)

    for text in turned((DENSE, *TUNED[grid[0]]), models):
        for model in models:
            path = model.folder / f"tuned-{named(text)}.npy"
            after.setdefault(text, []).append(once(path, lambda m=model, t=text: measure(m, t)))
            print(f"{after[text][-1].mean():.4f}  {text}, model {model.seed}, finetuned", flush=True)
    rows = []
    for text, terms in after.items():
        before = [model.loss(text, loss) for model in models]
        row = {"setting": text, "density": density_of(text, models), "before": float(np.mean(before))}
        row |= {"after": float(np.mean(terms))}
        if text != DENSE:
            differences = [a - b for a, b in zip(terms, after[DENSE], strict=True)]
            row |= {"more": interval(differences), "by_model": [float(x.mean()) for x in differences]}
        rows.append(row)
    return rows


# (c) and (d)


def forms_of(grid: tuple[int, int, int]) -> dict[str, tuple[str, MonarchSpec]]:
    """Block sizes and tiles that are compared on maps, by name, with the family of each."""
    frames, height, width = grid
    lines = {"aligned": [(frames * height, width), (frames, height * width)], "misaligned": misaligned(grid)}
    forms = {
        f"{rows} x {columns}": (family, MonarchSpec(grid=(1, rows, columns)))
        for family, sizes in lines.items()
        for rows, columns in sizes
    }
    for tile in dict.fromkeys(itertools.chain(*NESTED[frames])):
        forms[",".join(map(str, tile))] = ("tiled", MonarchSpec(grid=grid, tile=tile))
    return {name: (family, spec) for name, (family, spec) in forms.items() if spec.density <= MOST}


@functools.partial(jax.jit, static_argnames="spec")
def apart(query: jax.Array, key: jax.Array, exact: jax.Array, *, spec: MonarchSpec) -> jax.Array:
    """Relative error of the factored map, T = 1, of one head: query and key [N, d], exact [N, N]."""
    query, key = (x[None, :, None] for x in (query, key))
    made = monarch_factors(query, key, grid=spec.grid, tile=spec.tile_shape, num_iters=1).attention[0, 0]
    return jnp.sqrt(jnp.square(made - exact).sum(1).sum() / jnp.square(exact).sum(1).sum())


def errors_of(model: Model) -> dict[str, dict[str, list[float]]]:
    """Relative error of maps by form, one for each map: T = 1, and the nearest matrix where maps are small."""
    grid = model.subject.grid
    errors: dict[str, dict[str, list[float]]] = {}
    for scores in captured_scores(model.subject, MapConfig(levels=(0.3, 0.9))):
        exact = dense_map(scores.query, scores.key)
        there = jnp.asarray(exact)
        for name, (_, spec) in forms_of(grid).items():
            values = errors.setdefault(name, {"T=1": [], "projection": []})
            values["T=1"].append(float(apart(scores.query, scores.key, there, spec=spec)))
            if len(exact) <= WHOLE:
                values["projection"].append(error_of(monarch_projection(exact, spec), exact).relative)
    return errors


def maps(models: list[Model]) -> dict[str, Any]:
    """(c) and (d) on maps: errors by density, and what is surely worse than something that stores less."""
    of_models = [kept_json(model.folder / "maps.json", lambda m=model: errors_of(m)) for model in models]
    forms = forms_of(models[0].subject.grid)
    factored = {name: np.concatenate([errors[name]["T=1"] for errors in of_models]) for name in forms}
    rows = {}
    for name, (family, spec) in forms.items():
        projected = [x for errors in of_models for x in errors[name]["projection"]]
        rows[name] = {"family": family, "density": spec.density, "T=1": interval(factored[name])}
        rows[name] |= {"maps": len(factored[name])} | ({"projection": float(np.mean(projected))} if projected else {})
    for name, row in rows.items():
        if row["family"] == "misaligned":  # beside the aligned form of nearly as many numbers
            aligned = [other for other in rows if rows[other]["family"] == "aligned"]
            beside = min(aligned, key=lambda other: abs(rows[other]["density"] - row["density"]))
            row |= {"beside": beside, "more": interval(factored[name] - factored[beside])}
    return {"forms": rows, "order": {kind: steps_of(rows, factored, kind) for kind in ("nested", "tiled", "untiled")}}


def steps_of(rows: dict[str, Any], errors: dict[str, np.ndarray], kind: str) -> list[dict[str, Any]]:
    """From each form to each denser one of a kind: how much the error changes, in pairs.

    Kinds are untiled block sizes, tiles, and nested: tiles that lie in each other.
    """
    names = [name for name, row in rows.items() if (row["family"] == "tiled") != (kind == "untiled")]

    def within(small: str, large: str) -> bool:
        sides = (map(int, name.split(",")) for name in (small, large))
        return all(m % n == 0 for n, m in zip(*sides, strict=True))

    return [
        {"from": a, "to": b, "change": interval(errors[b] - errors[a])}
        for a, b in itertools.permutations(names, 2)
        if rows[b]["density"] > rows[a]["density"] and (kind != "nested" or within(b, a))
    ]


def tiles(models: list[Model], loss: Loss) -> list[dict[str, Any]]:
    """(d) by loss: down chains of tiles that lie in each other."""
    grid = models[0].subject.grid
    chains = []
    for chain in NESTED[grid[0]]:
        terms = [[model.loss(tile_text(tile), loss) for model in models] for tile in chain]
        chains.append(
            {
                "tiles": [list(tile) for tile in chain],
                "density": [MonarchSpec(grid=grid, tile=tile).density for tile in chain],
                "loss": [float(np.mean(of)) for of in terms],
                "change": [
                    interval([b - a for a, b in zip(one, next_, strict=True)])
                    for one, next_ in itertools.pairwise(terms)
                ],
            }
        )
    return chains


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demos", nargs="+", type=Path, help="folders of `monarchrt demo`; else models are trained")
    parser.add_argument("--video", type=Path, help="the demos' clip, if it is elsewhere now")
    parser.add_argument("--seeds", nargs="+", type=int, help="some of the models, without a report; default: all")
    parser.add_argument("--dense-steps", type=int, default=1500, help="of those")
    parser.add_argument("--steps", type=int, default=250, help="of each finetuning")
    parser.add_argument("--videos", type=int, default=3, help="of each model and setting; 0: none")
    parser.add_argument("--there", action="store_true", help="make no videos: take those that are measured already")
    parser.add_argument("--windows", type=int, default=8, help="held-out windows of the loss")
    parser.add_argument("--parts", default="abcd", help="letters of the parts; v: the videos of a alone")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/claims"))
    parser.add_argument("--redraw", action="store_true", help="table and pictures of --out's claims.json, no more")
    args = parser.parse_args()
    for name, least in (("dense_steps", 1), ("steps", 1), ("videos", 0), ("windows", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {least}")
    if unknown := set(args.parts) - set("abcdv"):
        parser.error(f"--parts {args.parts} has {min(unknown)}; parts are a, b, c, d, and v, the videos of a")
    for folder in args.demos or ():
        if not (folder / "dense" / "checkpoints").is_dir():
            parser.error(f"--demos {folder} has no dense/checkpoints; give the folder of a demo")
    args.alone = args.seeds is not None  # beside other processes, which have the rest
    if args.seeds is None:
        args.seeds = list(range(len(args.demos or range(3))))
    if args.demos and not set(args.seeds) <= set(range(len(args.demos))):
        parser.error(f"--seeds {args.seeds} has others than the {len(args.demos)} demos, 0 to {len(args.demos) - 1}")
    if args.redraw and not (args.out / "claims.json").is_file():
        parser.error(f"--out {args.out} has no claims.json to draw")
    return args


def main() -> None:
    """Measures what is missing and writes table and pictures."""
    args = options()
    path = args.out / "claims.json"
    if not args.redraw:
        models = models_of(args)
        loss = Loss(windows=args.windows)
        result: dict[str, Any] = {
            "device": jax.devices()[0].device_kind,
            "grid": list(models[0].subject.grid),
            "models": len(models),
            "finetuned": args.steps,
        }
        if "v" in args.parts and not args.there:  # of (a), beside its losses
            for model in models:
                videos(model, filmed(model.subject.grid), tuple(range(args.videos)))
        if "a" in args.parts:
            result["order"] = order(models, loss, tuple(range(args.videos)), there=args.there)
        if "b" in args.parts:
            result["tuned"] = tuned(models, loss)
        if set("cd") & set(args.parts):
            result["maps"] = maps(models)
        if "d" in args.parts:
            result["tiles"] = tiles(models, loss)
        if args.alone:
            return
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(write_report(path))


if __name__ == "__main__":
    main()
