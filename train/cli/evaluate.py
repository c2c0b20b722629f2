"""`monarchrt evaluate`: compares attention settings with the same weights; videos and scores of VBench."""

import json
from collections.abc import Sequence

from monarchrt.train.cli.parsing import parse
from monarchrt.train.cli.tables import print_table, say
from monarchrt.train.evaluation.config import EvaluateConfig
from monarchrt.train.evaluation.vbench import ScoresConfig, VBenchConfig
from monarchrt.train.interrupt import finish_first

_EVALUATE = """Compare attention settings with the same weights, prompts or clips, seeds and noise.

Held-out flow loss with paired intervals; PSNR, SSIM, flicker, drift and latent error of videos; LPIPS and VMAF.

monarchrt evaluate --checkpoint runs/demo/dense --attention 'monarch(tile=(4,8,14))' 'top_k(keep=0.1)' --seeds 0 1 2

For VBench, see monarchrt evaluate vbench --help and monarchrt evaluate scores --help."""
_VBENCH = """Write the videos that VBench's tools expect: five per prompt, under the names that they look for.

monarchrt evaluate vbench --full-info VBench_full_info.json --checkpoint Wan-AI/Wan2.1-T2V-1.3B --out videos"""
_SCORES = """Turn VBench's results into quality, semantic and total scores, with a column per folder.

monarchrt evaluate scores --results results/dense results/monarch"""


def evaluate_command(arguments: Sequence[str]) -> int:
    """`monarchrt evaluate`, `monarchrt evaluate vbench`, `monarchrt evaluate scores`."""
    kind = arguments[0] if arguments else ""
    if kind == "vbench":
        return _vbench(arguments[1:])
    if kind == "scores":
        return _scores(arguments[1:])
    config = parse(EvaluateConfig, arguments, prog="monarchrt evaluate", description=_EVALUATE)
    with finish_first():
        from monarchrt.train.evaluation.compare import REPORT, evaluate
        from monarchrt.train.evaluation.report import PICTURE, table

    report = evaluate(config)
    titles, rows = table(report)
    print_table(titles, rows)
    if report.get("examples", config.windows) < config.windows:
        say(f"note: {report['examples']} examples are held out; the loss uses all of them instead of {config.windows}")
    say(f"{config.out}: {REPORT}, {PICTURE}{', samples' if config.videos else ''}")
    return 0


def _vbench(arguments: Sequence[str]) -> int:
    config = parse(VBenchConfig, arguments, prog="monarchrt evaluate vbench", description=_VBENCH)
    from monarchrt.train.evaluation.vbench import write_videos

    made, there = write_videos(config)
    say(f"{made} videos were generated in {config.out}, {there} existed already")
    return 0


def _scores(arguments: Sequence[str]) -> int:
    config = parse(ScoresConfig, arguments, prog="monarchrt evaluate scores", description=_SCORES)
    from monarchrt.train.evaluation.vbench import DIMENSIONS, read_columns, scores

    columns = read_columns(config.results)
    results = {title: scores(values) for title, values in columns.items()}
    if config.json:
        both = {title: {"dimensions": columns[title], **result._asdict()} for title, result in results.items()}
        print(json.dumps(both, indent=1))
        return 0
    by_name = {title: columns[title] | result.scores for title, result in results.items()}
    names = [name for name in DIMENSIONS if any(name in values for values in columns.values())]
    names += next(iter(results.values())).scores
    cells = [[values.get(name) for values in by_name.values()] for name in names]
    print_table(
        ["dimension or score", *by_name],
        [
            [name, *("" if value is None else f"{value:.4f}" for value in row)]
            for name, row in zip(names, cells, strict=True)
        ],
    )
    for title, result in results.items():
        if result.missing:
            say(f"{title}: dimensions without results, whose scores are left out: {', '.join(result.missing)}")
    return 0
