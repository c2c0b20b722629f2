"""What `claims.py` found, as a table in Markdown and as pictures, from its JSON alone."""

import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # pictures go to files; no display is needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes


def write_report(path: Path) -> str:
    """Writes NAME.md and NAME.png beside NAME.json.

    Args:
        path: The JSON.

    Returns:
        The tables.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    parts = {"order": swapped, "tuned": finetuned, "maps": on_maps, "tiles": nested}
    text = "\n".join(itertools.chain(*(part(result) for name, part in parts.items() if name in result)))
    path.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
    draw(path.with_suffix(".png"), result)
    return text


def share(density: dict[str, float]) -> str:
    if "kept" in density:
        return f"{density['kept']:.1%}"
    return f"{density['measured']:.1%} (measured)" if "measured" in density else "by the data"


def within(values: list[float], digits: int = 4, sign: str = "+") -> str:
    """A mean with its interval; one value alone has none."""
    mean, low, high = (f"{x:{sign}.{digits}f}" for x in values)
    return mean if values[1] == values[2] else f"{mean} ({low} to {high})"


def swapped(result: dict[str, Any]) -> list[str]:
    """(a)."""
    lines = [
        "| attention | kept of the map | loss | more than dense | more than top-k at 15% |",
        "| --- | --- | --- | --- | --- |",
    ]
    rows = sorted((row for row in result["order"] if "loss" in row), key=lambda row: row["loss"])
    for row in rows:
        more = [within(row[name]) if name in row else "" for name in ("more", "more_than_oracle")]
        lines.append(f"| `{row['setting']}` | {share(row['density'])} | {row['loss']:.4f} | {' | '.join(more)} |")
    lines += [f"| `{row['setting']}` | {row['said']} | | | |" for row in result["order"] if "said" in row]
    made = [row for row in rows if "videos" in row and "more" in row]
    if not made:
        return [*lines, ""]
    lines += [
        "",
        "| videos | of each | PSNR, dB | than top-k at 15% | SSIM | last frame less first, dB | flicker less dense's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(made, key=lambda row: -row["videos"]["psnr"][0]):
        of = row["videos"]
        paired = within(of["psnr_more_than_oracle"], 1) if "psnr_more_than_oracle" in of else ""
        steady = within(of["flicker_more_than_dense"]) if "flicker_more_than_dense" in of else ""
        cells = [str(of["count"]), within(of["psnr"], 1, ""), paired, f"{of['ssim_gaussian'][0]:.3f}"]
        cells += [within(of["psnr_drift"], 1), steady]
        lines.append(f"| `{row['setting']}` | {' | '.join(cells)} |")
    return [*lines, ""]


def finetuned(result: dict[str, Any]) -> list[str]:
    """(b)."""
    lines = [
        "| attention | kept of the map | swapped in | finetuned | more than dense finetuned as long | by model |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(result["tuned"], key=lambda row: row["after"]):
        more = within(row["more"]) if "more" in row else ""
        each = " ".join(f"{x:.4f}" for x in row.get("by_model", []))
        start = f"| `{row['setting']}` | {share(row['density'])} | {row['before']:.4f} | {row['after']:.4f}"
        lines.append(f"{start} | {more} | {each} |")
    return [*lines, ""]


def on_maps(result: dict[str, Any]) -> list[str]:
    """(c)."""
    lines = [
        "| blocks, untiled | | stored | error of the map, T = 1 | nearest | more than the aligned one beside it |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    forms = result["maps"]["forms"]
    for name, row in sorted(forms.items(), key=lambda item: item[1]["density"]):
        if row["family"] == "tiled":
            continue
        nearest = f"{row['projection']:.3f}" if "projection" in row else ""
        more = f"{within(row['more'], 3)}, {row['beside']}" if "more" in row else ""
        cells = [name, row["family"], f"{row['density']:.1%}", within(row["T=1"], 3, ""), nearest, more]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def nested(result: dict[str, Any]) -> list[str]:
    """(d)."""
    lines = ["| tiles that lie in each other | stored | loss | less than the one before |", "| --- | --- | --- | --- |"]
    for chain in result["tiles"]:
        changes = ["", *(within([-mean, -high, -low]) for mean, low, high in chain["change"])]
        for tile, density, loss, less in zip(chain["tiles"], chain["density"], chain["loss"], changes, strict=True):
            lines.append(f"| {tuple(tile)} | {density:.1%} | {loss:.4f} | {less} |")
    lines.append("")
    for kind, steps in result["maps"]["order"].items():
        worse = [f"{step['from']} to {step['to']}" for step in steps if step["change"][1] > 0]
        better = sum(step["change"][2] < 0 for step in steps)
        said = f": {', '.join(worse)}" if worse else ""
        lines.append(
            f"On maps, {kind}, from each form to each denser one ({len(steps)} pairs): {better} surely nearer, "
            f"{len(worse)} surely farther{said}."
        )
    return [*lines, ""]


# Pictures


def draw(path: Path, result: dict[str, Any]) -> None:
    """The parts that there are."""
    parts = {"order": draw_order, "tuned": draw_tuned, "maps": draw_alignment, "tiles": draw_tiles}
    there = [part for name, part in parts.items() if name in result]
    rows = 2 if len(there) > 3 else 1
    shape = (rows, -(-len(there) // rows))
    figure, axes = plt.subplots(*shape, figsize=(7.5 * shape[1], 5.5 * rows), layout="constrained", squeeze=False)
    for axis, part in zip(axes.flat, there, strict=True):
        part(axis, result)
        axis.grid(alpha=0.3)
    grid = " x ".join(map(str, result["grid"]))
    figure.suptitle(f"{result['models']} models on {grid} tokens; 95% intervals", fontsize=11)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def bars(axis: Axes, rows: list[tuple[str, list[float]]], **how: Any) -> None:
    """Means with their intervals, one below the other."""
    middle, low, high = np.array([values for _, values in rows]).T
    places = np.arange(len(rows))
    axis.errorbar(middle, places, xerr=np.stack([middle - low, high - middle]), fmt="o", capsize=3, **how)
    axis.set_yticks(places, [name for name, _ in rows], fontsize=7)


def draw_order(axis: Axes, result: dict[str, Any]) -> None:
    """(a): the loss, and the distance of videos above."""
    rows = sorted((row for row in result["order"] if "more" in row), key=lambda row: row["more"][0])
    bars(axis, [(f"{row['setting']}\n{share(row['density'])}", row["more"]) for row in rows], color="C0")
    axis.set(xlabel="held-out loss more than dense attention's (blue)", title="(a) swapped in, nothing trained")
    axis.invert_yaxis()
    if min(row["more"][1] for row in rows) > 0:
        axis.set_xscale("log")
    shown = [(place, row["videos"]["psnr"]) for place, row in enumerate(rows) if "videos" in row]
    if shown:
        other = axis.twiny()
        middle, low, high = np.array([values for _, values in shown]).T
        ends = np.stack([middle - low, high - middle])
        other.errorbar(middle, [place for place, _ in shown], xerr=ends, fmt="s", color="C1", alpha=0.6, ms=4)
        other.set_xlabel("PSNR to dense attention's videos, dB (orange)", fontsize=8)
        other.invert_xaxis()


def draw_tuned(axis: Axes, result: dict[str, Any]) -> None:
    """(b)."""
    rows = [row for row in result["tuned"] if "more" in row]
    bars(axis, [(f"{row['setting']}\n{share(row['density'])}", row["more"]) for row in rows])
    for place, row in enumerate(rows):
        axis.plot(row["by_model"], [place + 0.15] * len(row["by_model"]), "k|", ms=9)
    axis.axvline(0, color="0.6")
    axis.set(xlabel="held-out loss more than dense attention's finetuned as long; | each model")
    axis.set(title=f"(b) after {result['finetuned']} steps of finetuning", ylim=(len(rows) - 0.5, -0.5))


def draw_alignment(axis: Axes, result: dict[str, Any]) -> None:
    """(c)."""
    colours = {"aligned": ("o", "C0"), "misaligned": ("x", "C3")}
    seen = set()
    for name, row in result["maps"]["forms"].items():
        if row["family"] not in colours:
            continue
        mark, colour = colours[row["family"]]
        label = None if row["family"] in seen else row["family"]
        seen.add(row["family"])
        spread(axis, row, mark, colour, label)
        axis.annotate(
            name, (100 * row["density"], row["T=1"][0]), fontsize=7, xytext=(4, 3), textcoords="offset points"
        )
    axis.set(xlabel="% stored", ylabel="relative error of the map, T = 1", title="(c) untiled block sizes")
    axis.legend(fontsize=8)


def spread(axis: Axes, row: dict[str, Any], mark: str, colour: str, label: str | None = None) -> None:
    mean, low, high = row["T=1"]
    ends = [[mean - low], [high - mean]]
    axis.errorbar([100 * row["density"]], [mean], yerr=ends, fmt=mark, color=colour, capsize=3, label=label)


def draw_tiles(axis: Axes, result: dict[str, Any]) -> None:
    """(d): losses down chains of tiles; the maps' errors of all forms on the right axis."""
    for chain in result["tiles"]:
        densities = 100 * np.array(chain["density"])
        first, last = chain["tiles"][0], chain["tiles"][-1]
        axis.plot(densities, chain["loss"], "o-", label=f"loss, {tuple(first)} to {tuple(last)}")
        for tile, density, loss in zip(chain["tiles"], densities, chain["loss"], strict=True):
            axis.annotate(",".join(map(str, tile)), (density, loss), fontsize=6)
    axis.set(xlabel="% stored", ylabel="held-out loss", title="(d) does storing more bring it nearer?")
    axis.legend(fontsize=7, loc="upper right")
    other = axis.twinx()
    rows = sorted(result["maps"]["forms"].values(), key=lambda row: row["density"])
    line = [(100 * row["density"], row["T=1"][0]) for row in rows if row["family"] != "tiled"]
    other.plot(*zip(*line, strict=True), "x--", color="0.6", label="untiled block sizes, error of the map")
    other.set_ylabel("relative error of the map, untiled (grey)")
