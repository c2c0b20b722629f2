"""Times the Mosaic kernels with other sizes than they have, side by side in one process, on one Hopper GPU.

    python benchmarks/sizes.py --row "480p (3h,w)" --work forward --change '{"left": {"stages": 3}}'
    python benchmarks/sizes.py --row "720p (h,w)" --work backward --change '{"keys": {"ring": 8}}' '{"chunk_bytes": 8}'

A change is JSON: fields of `pallas_kernels.sm90.config.ForwardConfig` (forward, decode) or `BackwardConfig` (backward)
to values, as in pallas_kernels/tuned. Results are compared with those of the present sizes first; a change whose
results differ by more than rounding is not timed. Times are medians over rounds in which every change has its turn, so
that a card whose clock drifts drifts for all. What wins goes into pallas_kernels/tuned/<device>.json. Writes
sizes.json.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from attention import ROWS, Row, relative_error
from measuring import calls_within, heading, machine, milliseconds, write_report

from monarchrt.pallas_kernels.sm90 import tuning
from monarchrt.pallas_kernels.sm90.backward import backward
from monarchrt.pallas_kernels.sm90.forward import forward

WORK = ("forward", "decode", "backward")
MAX_DIFFERENCE = 5e-3  # relative Frobenius norm: two roundings of the same sums in bfloat16


def main() -> None:
    """Compares, times, prints, writes."""
    args = parse()
    changes = [{}, *(json.loads(text) for text in args.change)]
    arrays = inputs(args)
    runs, results, present = [], [], None
    for change, config in zip(changes, sizes(args, changes), strict=True):
        results.append({"change": change})
        runs.append(None)
        try:
            run = jax.jit(call(args.work, config)).lower(*arrays).compile()
            out = run(*arrays)
            jax.block_until_ready(out)
        except Exception as error:  # one change that does not fit the card must not cost the others
            if present is None:
                raise
            results[-1]["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            continue
        if present is None:
            present = out
            if not all(jnp.isfinite(x).all() for x in present.values()):
                sys.exit("error: the present sizes give results that are not finite")
        differences = {name: relative_error(out[name], np.asarray(x, np.float64)) for name, x in present.items()}
        results[-1] |= {"differences": differences, "bytes": temporaries(run)}
        if all(x <= MAX_DIFFERENCE for x in differences.values()):  # NaN is not
            runs[-1] = run
    times = rounds([run for run in runs if run], arrays, args.rounds)
    print(f"{args.row}, {args.work}, {heading()}; median ms of {args.rounds} rounds")
    for run, result in zip(runs, results, strict=True):
        name = json.dumps(result["change"]) if result["change"] else "present sizes"
        if "error" in result:
            print(f"{name}: {result['error']}")
            continue
        largest = np.max(list(result["differences"].values()))
        if run is None:
            print(f"{name}: differs by {largest:.1e} and is not timed")
            continue
        result["ms"] = times.pop(0)
        same = f"differs by {largest:.1e}" if largest else "the same bits"
        share = result["ms"] / results[0]["ms"]
        print(f"{result['ms']:8.3f} ms  {share:6.1%}  {result['bytes'] / 1e9:.2f} GB  {same}  {name}")
    args.out.mkdir(parents=True, exist_ok=True)
    report = machine() | {"row": args.row, "work": args.work, "results": results}
    write_report(args.out / "sizes.json", report)
    if None in runs:
        sys.exit(1)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", required=True, choices=[row.name for row in ROWS], help="the video and its tile")
    parser.add_argument("--work", required=True, choices=WORK)
    parser.add_argument("--change", nargs="+", default=[], metavar="JSON", help="one or more changes, each on its own")
    parser.add_argument("--intermediates", choices=("e4m3",), help="with alpha and Y in 8 bits; not backward")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} must be at least 1")
    if args.intermediates and args.work == "backward":
        parser.error("--intermediates e4m3 is for --work forward and decode: gradients take 16 bits")
    try:
        sizes(args, [json.loads(text) for text in args.change])
    except (ValueError, TypeError, AttributeError) as error:
        parser.error(f"--change: {error}")
    if jax.default_backend() != "gpu":
        parser.error("there is no GPU")
    return args


def tile_shape(name: str) -> tuple[Row, int, int, int]:
    """The row of that name, tiles of its clip, rows and columns of a tile."""
    row = next(row for row in ROWS if row.name == name)
    frames, height, width = row.grid
    return row, frames // row.tile_frames, row.tile_frames * height, width


def sizes(args: argparse.Namespace, changes: list[dict]) -> list:
    """The changed configurations."""
    row, _, rows, cols = tile_shape(args.row)
    if args.work == "backward":
        config = tuning.backward(rows, cols, row.head_dim)
    else:
        config = tuning.forward(rows, cols, row.head_dim, few=args.work == "decode", e4m3=args.intermediates == "e4m3")
    return [tuning.changed(config, change) for change in changes]


def inputs(args: argparse.Namespace) -> tuple[jax.Array, ...]:
    """q, k, v and, for the backward pass, what the forward pass found and a cotangent; standard normal, bfloat16."""
    row, tiles, rows, cols = tile_shape(args.row)
    keys, shape = jax.random.split(jax.random.key(0), 4), (1, tiles, rows, cols, row.heads, row.head_dim)
    q, k, v, g = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys)
    if args.work == "decode":
        return q[:, : row.decode_frames // row.tile_frames], k, v
    if args.work == "forward":
        return q, k, v
    results = jax.jit(call("forward", tuning.forward(rows, cols, row.head_dim)))(q, k, v)
    return q, k, v, results["out"], results["lse"], g


def temporaries(program: Any) -> int:
    """Bytes that a compiled program needs beside its arguments and results."""
    return program.memory_analysis().temp_size_in_bytes


def call(work: str, config):
    """The pass with these sizes, as a function to compile."""

    def options(q, k):
        every = jnp.full(q.shape[1], k.shape[1], jnp.int32)
        return {"visible": every, "scale": q.shape[-1] ** -0.5, "masked": False, "config": config}

    def forwards(q, k, v):
        out, lse, _ = forward(q, k, v, **options(q, k))
        return {"out": out, "lse": lse}

    def backwards(q, k, v, out, lse, g):
        gradients = backward(q, k, v, out=out, lse=lse, d_out=g, grad_tiles=None, **options(q, k))
        return dict(zip(("dq", "dk", "dv"), gradients, strict=True))

    return backwards if work == "backward" else forwards


def rounds(runs: list, arrays: tuple[jax.Array, ...], count: int) -> list[float]:
    """Median ms of each; calls are sent without waiting for each other."""
    jax.block_until_ready(runs[0](*arrays))
    calls = calls_within(0.05, milliseconds(runs[0], arrays, 1) / 1e3)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(count):
        for run, taken in zip(runs, times, strict=True):
            jax.block_until_ready(run(*arrays))
            taken.append(milliseconds(run, arrays, calls))
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()
