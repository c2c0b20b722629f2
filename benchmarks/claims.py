"""The paper's comparisons in miniature: attention settings swapped into small dense models, nothing trained.

    for s in 0 1 2; do monarchrt demo --seed $s --folder runs/$s; done          # ten minutes each on 2 cores
    python benchmarks/claims.py --demos runs/0 runs/1 runs/2 --out claims.json  # and claims.png

1. The order of Tables 3 and 4 on the held-out loss, at the densities of the paper as far as kinds reach them: the mean
   of the difference to dense attention, with a paired bootstrap interval over (clip, noise level, noise).
2. Aligned against misaligned block sizes (Section 4.1), on the maps of these models, with intervals over the maps.
3. Whether a smaller tile, which stores more, is always nearer to dense attention (Section 4.2): how much the loss
   changes from one tile to the next that lies in it, in pairs as above.

Writes JSON, and a picture of all three beside it. What it prints is what it finds; it chooses nothing by the outcome.
"""

import argparse
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import matplotlib
import numpy as np

from monarch_jax import MonarchSpec
from monarchrt.models.attention.base import leaves
from monarchrt.models.attention.capture import capture
from monarchrt.models.attention.notation import parse
from monarchrt.train.evaluation.compare import loss_terms
from monarchrt.train.evaluation.metrics import paired_interval
from monarchrt.train.evaluation.subject import Subject, noisy_example, open_subject
from monarchrt.train.studies.approximations import dense_map, error_of, misaligned, monarch_projection
from monarchrt.train.studies.config import MapConfig
from monarchrt.train.studies.maps import _factored, captured_scores

matplotlib.use("Agg")  # pictures go to files; no display is needed
import matplotlib.pyplot as plt

# on the demo's grid of 4 x 8 x 14 tokens
ORDER = (
    "dense",
    "monarch(tile=(4,8,14))",
    "monarch(tile=(4,8,14), num_iters=2)",
    "monarch(tile=(4,4,14))",
    "top_k(keep=0.1)",
    "top_k(keep=0.15)",
    "radial(keep=0.15, block=14)",
    "radial(keep=0.4375, block=14)",
    "svg(keep=0.15, block=8)",
    "svg(keep=0.02, block=8)",
    "svg2(query_clusters=16, key_clusters=64, top_p=0.6, min_keep=0.05)",
    "svg2(query_clusters=16, key_clusters=64, top_p=0.9, min_keep=0.1)",
    "svg2(query_clusters=64, key_clusters=128, top_p=0.9, min_keep=0.1)",
    "vsa(keep=0.15, cube=(2,2,2), gate=False)",
    "sliding_tile(tile=(2,2,2), window=(1,3,3))",
)
NESTED = ((4, 8, 14), (4, 4, 14), (4, 2, 14), (4, 1, 14), (4, 1, 7)), ((4, 8, 14), (2, 8, 14), (1, 8, 14), (1, 4, 14))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """What is measured of a loss: as `monarchrt evaluate`."""

    windows: int = 8
    timesteps: int = 8
    batch: int = 4


def reachable(text: str, subject: Subject) -> tuple[Any, str]:
    """A setting with its density in the four ways, or why it cannot be had."""
    try:
        setting = parse(text)
        setting.check(subject.grid)
        density = setting.density(subject.grid)
    except ValueError as error:
        return None, " ".join(str(error).split())
    if np.isnan(density.kept):
        return setting, f"kept {measured(setting, subject):.1%}, measured, mean over layers and noise levels"
    return setting, f"asked for {density.asked:.1%}, kept {density.kept:.1%}, of what is visible {density.visible:.1%}"


def measured(setting: Any, subject: Subject) -> float:
    """What a kind keeps whose density is not known before: on what dense attention sees of one clip."""
    kept = []
    for level in (0.3, 0.6, 0.9):
        with capture(subject.model) as (model, calls):
            model(*noisy_example(subject, 0, level))
        kept += [setting.measure(jnp.asarray(c.query), jnp.asarray(c.key), grid=c.grid).kept for c in calls]
    return float(np.mean(kept))


def order(subjects: list[Subject], loss: Loss) -> list[dict[str, Any]]:
    """Losses of the settings over all models, in pairs with dense attention's."""
    rows, reference = [], None
    for text in ORDER:
        setting, said = reachable(text, subjects[0])
        if setting is None:
            rows.append({"setting": text, "said": said})
            print(f"{text}: {said}", flush=True)
            continue
        terms = [loss_terms(subject, setting, loss) for subject in subjects]
        reference = terms if reference is None else reference
        differences = [a - b for a, b in zip(terms, reference, strict=True)]
        low, high = paired_interval(np.concatenate(differences)) if rows else (0.0, 0.0)
        row = {
            "setting": text, "said": said, "loss": float(np.mean(terms)), "more": float(np.mean(differences)),
            "interval": [low, high], "by_model": [float(x.mean()) for x in terms],
            "kinds": [leaf.name for leaf in leaves(setting)],
        }  # fmt: skip
        rows.append(row)
        print(f"{row['loss']:.4f}  {row['more']:+.4f} ({low:+.4f} to {high:+.4f})  {text}  {said}", flush=True)
    return rows


def tiles(subjects: list[Subject], loss: Loss) -> list[dict[str, Any]]:
    """Losses down two chains of tiles that lie in each other."""
    chains, known = [], {}
    for chain in NESTED:
        steps: list[tuple[str, float, float]] = []
        terms: list[np.ndarray] = []
        for tile in chain:
            text = f"monarch(tile={','.join(map(str, tile)).join('()')})"
            if text not in known:
                setting = parse(text)
                of_models = [loss_terms(subject, setting, loss) for subject in subjects]
                known[text] = setting.density(subjects[0].grid).kept, np.concatenate(of_models)
            density, measured = known[text]
            steps.append((text, density, float(measured.mean())))
            terms.append(measured)
        changes = [paired_interval(after - before) for before, after in itertools.pairwise(terms)]
        worse = [step[0] for step, (_, high) in zip(steps[1:], changes, strict=True) if high >= 0]
        chains.append({"chain": steps, "change": changes, "not_surely_better_than_the_tile_before": worse})
        for (text, density, value), change in zip(steps, [None, *changes], strict=True):
            said = "" if change is None else f"  from the one before {change[0]:+.4f} to {change[1]:+.4f}"
            print(f"{value:.4f}  {density:.1%}  {text}{said}", flush=True)
    return chains


def alignment(subjects: list[Subject]) -> dict[str, Any]:
    """Relative error of maps under aligned and misaligned block sizes, untiled; mean over heads and levels."""
    config = MapConfig(levels=(0.3, 0.9))
    errors: dict[str, list[tuple[float, float, float]]] = {}
    for subject in subjects:
        scored = captured_scores(subject, config)
        frames, height, width = subject.grid
        forms = {"aligned, fh x w": (frames * height, width), "aligned, f x hw": (frames, height * width)}
        forms |= {f"misaligned, {a} x {b}": (a, b) for a, b in misaligned(subject.grid) if 1 / a + 1 / b <= 0.3}
        for scores in scored:
            exact = dense_map(scores.query, scores.key)
            for name, (rows, columns) in forms.items():
                spec = MonarchSpec(grid=(1, rows, columns))
                factored = error_of(_factored(scores, spec.grid, None, 1), exact).relative
                projected = error_of(monarch_projection(exact, spec), exact).relative
                errors.setdefault(name, []).append((spec.density, factored, projected))
    result = {}
    aligned = [name for name in errors if name.startswith("aligned")]
    for name, triples in errors.items():
        of_maps = np.array(triples)
        density, factored, projected = of_maps.mean(0)
        # the same maps by the aligned form of nearly as many numbers
        beside = min(aligned, key=lambda other: abs(errors[other][0][0] - density))
        low, high = paired_interval(of_maps[:, 1] - np.array(errors[beside])[:, 1]) if name not in aligned else (0, 0)
        result[name] = {
            "density": density, "T=1": factored, "projection": projected, "maps": len(triples),
            "beside": beside, "more": [low, high],
        }  # fmt: skip
        said = "" if name in aligned else f"  more than {beside} {low:+.3f} to {high:+.3f}"
        print(f"{density:6.1%}  T=1 {factored:.3f}  projection {projected:.3f}  {name}{said}", flush=True)
    return result


def draw(path: Path, result: dict[str, Any]) -> None:
    """The three comparisons, side by side."""
    figure, axes = plt.subplots(1, 3, figsize=(19, 6), layout="constrained")
    rows = [row for row in result["order"][1:] if "more" in row]
    places = np.arange(len(rows))
    middle = np.array([row["more"] for row in rows])
    ends = np.abs(np.array([row["interval"] for row in rows]).T - middle)
    axes[0].errorbar(middle, places, xerr=ends, fmt="o", capsize=3)
    axes[0].set_yticks(places, [row["setting"] for row in rows], fontsize=7)
    axes[0].invert_yaxis()
    axes[0].set(xlabel="held-out loss more than dense attention's", title="training-free, 95% intervals")
    for name, row in result["alignment"].items():
        mark = "o" if name.startswith("aligned") else "x"
        for form, colour in (("T=1", "C0"), ("projection", "C1")):
            axes[1].plot(100 * row["density"], row[form], mark, color=colour, ms=7)
        axes[1].annotate(name.split(", ")[1], (100 * row["density"], row["T=1"]), fontsize=7)
    axes[1].set(
        xlabel="% stored", ylabel="relative error of the map", title="o aligned, x misaligned; T=1 blue, nearest orange"
    )
    for chain in result["tiles"]:
        labels, densities, losses = zip(*chain["chain"], strict=True)
        axes[2].plot(100 * np.array(densities), losses, "o-", label=f"within {labels[0]}")
        for label, density, value in chain["chain"]:
            axes[2].annotate(str(parse(label).unit), (100 * density, value), fontsize=7)
    axes[2].set(xlabel="% stored", ylabel="held-out loss", title="tiles that lie in each other")
    axes[2].legend(fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demos", nargs="+", type=Path, required=True, help="folders of `monarchrt demo`")
    parser.add_argument("--video", type=Path, help="their clip, if it is elsewhere now")
    parser.add_argument("--out", type=Path, default=Path("claims.json"))
    parser.add_argument("--windows", type=int, default=8)
    given = parser.parse_args()
    subjects = [open_subject(str(folder / "dense"), video=given.video) for folder in given.demos]
    loss = Loss(windows=given.windows)
    print(f"\nTraining-free, held-out loss of {len(subjects)} models\n")
    result: dict[str, Any] = {"order": order(subjects, loss)}
    print("\nAligned and misaligned blocks, relative error of the map\n")
    result["alignment"] = alignment(subjects)
    print("\nTiles that lie in each other, held-out loss\n")
    result["tiles"] = tiles(subjects, loss)
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(given.out.with_suffix(".png"), result)


if __name__ == "__main__":
    main()
