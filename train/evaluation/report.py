"""The report of an evaluation as JSON, table and plots."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from monarchrt.train.evaluation.metrics import paired_interval

matplotlib.use("Agg")  # pictures go to files; no display is needed
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

PICTURE = "report.png"
DENSITIES = {
    "asked": "asked for",
    "kept": "kept of the map",
    "visible": "of what is visible",
    "with_warm_up": "with the warm-up",
}
SETS = ("frechet_", "kernel_")  # distances of sets of videos; with real videos the reference has them too


def summarise(records: dict[str, Any], *, confidence: float) -> dict[str, Any]:
    """Computes means over prompts and seeds, and paired intervals of the losses' differences to the reference's.

    Args:
        records: `settings` and `samples`; optionally `density`, `distances` and `losses` with an entry for each
            setting, and `examples`, the number of examples of the losses.
        confidence: Confidence level of the intervals.

    Returns:
        `rows`, one for each setting, the reference first; `drift` and `steps` by setting; `samples`, `confidence` and
        `examples`.
    """
    rows, drift, steps = [], {}, {}
    for index, setting in enumerate(records["settings"]):
        row: dict[str, Any] = {"setting": setting}
        if "density" in records:
            row["density"] = records["density"][index]
        samples = [sample for sample in records["samples"] if sample["setting"] == index]
        if samples:
            names = [name for name, value in samples[0].items() if isinstance(value, float)]
            row |= {name: float(np.mean([sample[name] for sample in samples])) for name in names}
            drift[setting] = {
                name: np.mean([sample["drift"][name] for sample in samples], axis=0).tolist()
                for name in samples[0]["drift"]
            }
            steps[setting] = {
                step: float(np.mean([sample["steps"][step] for sample in samples])) for step in samples[0]["steps"]
            }
        if "distances" in records:
            row |= records["distances"][index]
        if "losses" in records:
            terms, reference = (np.asarray(records["losses"][n]) for n in (index, 0))
            row["loss"] = float(terms.mean())
            if index:
                row["loss_difference"] = float((terms - reference).mean())
                row["loss_interval"] = list(paired_interval(terms - reference, confidence=confidence))
        rows.append(row)
    more = {name: records[name] for name in ("examples",) if name in records}
    return {
        "rows": rows,
        "drift": drift,
        "steps": steps,
        "samples": records["samples"],
        "confidence": confidence,
    } | more


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the table."""
    rows = report["rows"]
    hidden = {"setting", "density", "loss", "loss_difference", "loss_interval"}
    names = [name for name in rows[-1] if name not in hidden]
    titles = ["attention", *(DENSITIES.values() if "density" in rows[0] else []), *names]
    titles += ["held-out loss", "more than the reference"] if "loss" in rows[0] else []
    cells = []
    for number, row in enumerate(rows):
        line = [row["setting"]]
        if "density" in row:
            line += [_share(row["density"][name]) for name in DENSITIES]
        for name in names:
            own = number or name == "flicker" or name.startswith(SETS)  # the reference has only these
            line.append(f"{row[name]:.4g}" if own and name in row else "")
        if "loss" in row:
            line.append(f"{row['loss']:.4f}")
            low, high = row.get("loss_interval", (0, 0))
            line.append(f"{row['loss_difference']:+.4f} ({low:+.4f} to {high:+.4f})" if number else "")
        cells.append(line)
    return titles, cells


def _share(value: float | None) -> str:
    return "by the data" if value is None or np.isnan(value) else f"{value:.1%}"


def write_report(folder: Path, report: dict[str, Any]) -> Path:
    """Plots the differences of losses with their intervals, drift over blocks, and the latents' error by step.

    Args:
        folder: Folder of the picture.
        report: The report, from `summarise`.

    Returns:
        The path of the picture.
    """
    rows, shown = report["rows"], []
    if "loss" in rows[0]:
        shown.append("loss")
    if report["drift"]:
        shown += ["drift", "steps"]
    figure, axes = plt.subplots(1, len(shown), figsize=(6.5 * len(shown), 4.8), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        if name == "loss":
            places = np.arange(1, len(rows))
            middle = np.array([row["loss_difference"] for row in rows[1:]])
            low, high = np.array([row["loss_interval"] for row in rows[1:]]).reshape(-1, 2).T
            axis.errorbar(middle, places, xerr=np.abs([middle - low, high - middle]), fmt="o", capsize=3)
            axis.axvline(0, color="0.6", lw=1, ls=":")
            axis.set_yticks(places, [row["setting"] for row in rows[1:]], fontsize=7)
            axis.set(xlabel=f"held-out loss more than {rows[0]['setting']}, {report['confidence']:.0%} interval")
            axis.invert_yaxis()
            continue
        for row in rows[1:]:
            if name == "drift":
                axis.plot(report["drift"][row["setting"]]["psnr"], "o-", ms=4, label=row["setting"])
                axis.set(xlabel="block of frames", ylabel="PSNR to the reference, dB")
            else:
                errors = report["steps"][row["setting"]]
                axis.plot(list(errors.values()), "o-", ms=4, label=row["setting"])
                axis.set(xlabel="call of the network", ylabel="relative error of its latents")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(fontsize=7)
        axis.grid(alpha=0.3)
    path = folder / PICTURE
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
