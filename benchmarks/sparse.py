"""Times sparse attention by lists of blocks beside tiled Monarch and dense attention, on one GPU.

    python benchmarks/sparse.py                          # 480p, some two minutes on an H200
    python benchmarks/sparse.py --rows all --size 720p   # all rows at 720p
    python benchmarks/sparse.py --sweep --rows 'VSA 85%'  # sizes of the kernels' blocks, 80 s or so for a row
    python benchmarks/sparse.py --small                  # a smoke test that runs anywhere, by the lists in plain JAX

A row is a kind at a density, choice, orders of tokens and lists included, and the kernels alone on what it chose. Each
is checked first: output and gradients against the kind's exact form, on the arrays that are timed; a row that fails is
not timed. Medians, batch 1, bfloat16, 12 heads of 128. `per kept` compares arithmetic per second with that of cuDNN:
entries of the map that are kept, over the kernels' time. Writes sparse_480p.json into --out after each row. --sweep
writes sweep_480p.json, whose entries go into triton_kernels/tuned.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import attention_settings
import jax
import jax.numpy as jnp
from attention import MAX_ERROR, attempt, dense_attention, timed, with_gradients
from measuring import clocked, heading, machine, write_report

from monarch_jax.block_mask import kernel_sides
from monarch_jax.block_sparse import block_sparse_attention
from monarch_jax.contract import SparseProblem, SparseResiduals
from monarchrt.models.attention import listed
from monarchrt.triton_kernels import block_sparse, config

SIZES = {"480p": (21, 30, 52), "720p": (21, 45, 80)}
SMALL = (21, 5, 16)
QUICK = 6  # rows of the default
KERNELS = ("mosaic", "triton")
CHANGES: dict[str, tuple[dict, ...]] = {  # most promising first; of the loop's side 32 leave room for more stages
    "sparse_key_backward": (
        {"warps": 4},
        {"rows": 32, "stages": 3, "warps": 4},
        {"rows": 32, "stages": 4, "warps": 4},
        {"rows": 64, "stages": 3, "warps": 4},
        {"early": True},
    ),
    "sparse_query_backward": (
        {"keys": 32, "stages": 3},
        {"keys": 32, "stages": 2},
        {"keys": 32, "stages": 4},
        {"keys": 64, "stages": 3},
        {"warps": 8},
        {"rows": 64, "warps": 4},
    ),
    # the scores' gradients are kept; "key" are the sizes of the kernel that keeps them
    "sparse_query_product": (
        {"stages": 3},
        {"key": {"rows": 64, "stages": 2, "warps": 4}},
        {"key": {"rows": 32, "stages": 3, "warps": 4}},
        {"scratch_bytes": 8 * 2**30},
        {"stages": 4},
        {"stages": 2},
        {"keys": 32, "stages": 4},
        {"warps": 8},
        {"key": {"warps": 8}},
        {"key": {"early": True}},
    ),
    "sparse_forward": (
        {"packed": 16},  # where blocks are of different sizes
        {"keys": 32, "stages": 3, "registers": None},  # three programs to a multiprocessor, which short lists need most
        {"keys": 32, "stages": 2, "registers": 128},  # four
        {"keys": 64, "stages": 2, "registers": 168},
        {"keys": 64, "stages": 3, "warps": 8},
        {"keys": 32, "stages": 4},
        {"stages": 4},
        {"stages": 2},
        {"registers": 168},
        {"rows": 64, "warps": 4},
    ),
}


def main() -> None:
    """Checks, times, prints, writes."""
    args = parse()
    began = time.perf_counter()
    grid = SMALL if args.small else SIZES[args.size]
    heads, dim = (2, 16) if args.small else (12, 128)
    shape = (1, grid[0] * grid[1] * grid[2], heads, dim)
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 4)]
    print(f"{heading()}, {args.size if not args.small else 'small'} {grid}")
    others: list[dict] = []
    report: dict[str, Any] = {**machine(), "grid": grid, "others": others, "rows": []}
    dense = {}
    if not args.small:
        dense = times(dense_attention, arrays)
        others.append({"row": attention_settings.EXACT, "share": 1.0, "ms": dense})
        setting = attention_settings.setting(attention_settings.CHECKED, *grid[1:])
        ms = attempt(times, call(setting, grid), arrays) or {}
        others.append({"row": attention_settings.CHECKED, "share": setting.density(grid).kept, "ms": ms})
    for row in others:
        show(row, dense)
    if args.sweep:
        sweep(args, grid, arrays, began)
        return
    failed = []
    for name in args.rows:
        if time.perf_counter() - began > args.seconds:
            print(f"{name} and what follows are left out: --seconds {args.seconds} are over.")
            break
        row = attempt(measure, name, grid, arrays, "xla" if args.small else args.implementation)
        if row is None or not row["ms"]:
            failed.append(name)
        if row is not None:
            report["rows"].append(row)
            show(row, dense)
        write_report(args.out / f"sparse_{'small' if args.small else args.size}.json", report)
    print(f"{time.perf_counter() - began:.0f} s")
    if failed:
        sys.exit(f"error: {', '.join(failed)} failed, or is above {MAX_ERROR:.0e}, and is not timed.")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(attention_settings.SPARSE)
    parser.add_argument(
        "--rows", nargs="+", default=names[:QUICK], choices=[*names, "all"], metavar="ROW",
        help=f"all, or of {', '.join(map(repr, names))}; default: the first {QUICK}".replace("%", "%%"),
    )  # fmt: skip
    parser.add_argument("--size", default="480p", choices=list(SIZES))
    parser.add_argument("--implementation", choices=KERNELS, help="of the kinds; default: what they choose themselves")
    parser.add_argument("--seconds", type=float, default=130.0, help="begin no row after so many; default: 130")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--sweep", action="store_true", help="time other sizes of blocks, on the kernels alone")
    parser.add_argument(
        "--kernels", nargs="+", default=list(CHANGES), choices=list(CHANGES), metavar="KERNEL",
        help=f"whose sizes --sweep changes, of {', '.join(CHANGES)}; default: all",
    )  # fmt: skip
    parser.add_argument("--small", action="store_true", help="a tiny clip by plain JAX; runs without a GPU")
    args = parser.parse_args()
    args.rows = names if "all" in args.rows else args.rows
    if not args.small and jax.default_backend() != "gpu":
        parser.error("there is no GPU; --small runs anywhere")
    return args


def call(setting, grid):
    """The kind as a function of q, k and v."""
    return lambda q, k, v: setting(q, k, v, grid=grid)


def times(attend, arrays) -> dict[str, float]:
    """Median ms, forward and with gradients."""
    return {"forward": timed(attend, arrays[:3], 5)[0], "both": timed(attend, arrays, 5)[0]}


def chosen(setting, grid, arrays):
    """What the kind hands to the kernels: tokens in the order of blocks, and the mask."""

    @jax.jit
    def run(q, k, v):
        given = []
        with mock.patch.object(listed, "block_sparse_attention", lambda *x, **rest: (given.append(x), x[0])[1]):
            setting(q, k, v, grid=grid)
        return given[0]

    return run(*arrays[:3])


@jax.jit
def error(x, right):
    """Relative Frobenius error, on the device: these are long."""
    x, right = x.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.sqrt(jnp.square(x - right).sum() / jnp.square(right).sum())


def kernels(mask, implementation: str | None):
    """The operation alone, as a function of q, k and v."""
    return lambda q, k, v: block_sparse_attention(q, k, v, mask, implementation=implementation)


def measure(name: str, grid, arrays, implementation: str | None) -> dict:
    """Errors of one row, and its times if they are small enough."""
    setting = attention_settings.sparse_setting(name, implementation)
    exact = call(dataclasses.replace(setting, implementation="exact"), grid)
    expected = jax.jit(lambda *x: with_gradients(exact, *x))(*arrays)
    results = jax.jit(lambda *x: with_gradients(call(setting, grid), *x))(*arrays)
    names = ("out", "dq", "dk", "dv")
    errors = {name: float(error(x, y)) for name, x, y in zip(names, results, expected, strict=True)}
    row = {"row": name, "setting": str(setting), "share": setting.density(grid).kept, "errors": errors, "ms": {}}
    if not all(x <= MAX_ERROR for x in errors.values()):
        print(f"{name}: errors {errors}")
        return row
    row["ms"] = times(call(setting, grid), arrays)
    q, k, v, mask = chosen(setting, grid, arrays)
    row["kernels_ms"] = times(kernels(mask, implementation), [q, k, v, q])
    return row


def sweep(args: argparse.Namespace, grid, arrays, began: float) -> None:
    """Times changes of each kernel's sizes, for each row whose blocks have other sizes than those before.

    The first is what is used now, and each changes the best so far; one whose results are not the same numbers is left
    out. Entries of an earlier sweep for other sizes stay.
    """
    where, path, seen = config.target(), args.out / f"sweep_{args.size}.json", set()
    entries = json.loads(path.read_text()) if path.is_file() else {}
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.rows:
        q, k, v, mask = chosen(attention_settings.sparse_setting(name, "triton"), grid, arrays)
        sizes = {"rows": mask.rows, "columns": mask.columns, "dim": q.shape[-1], "itemsize": q.dtype.itemsize}
        sizes["listed"] = mask.keys.entries.shape[-1]
        key = block_sparse.key_of(**sizes)
        if key in seen:
            continue
        seen.add(key)
        best = block_sparse.configs(where, **sizes)
        problem, queries, keys = parts_of(mask, q)
        out, lse = jax.jit(functools.partial(block_sparse.forward, problem))(q, k, v, queries, keys)
        saved = SparseResiduals(q, k, v, out, lse, queries, keys)
        for kernel in args.kernels:
            ahead = kernel == block_sparse.KERNELS[0]
            run = functools.partial(block_sparse.forward if ahead else block_sparse.vjp, problem)
            given = (q, k, v, queries, keys) if ahead else (saved, q)
            right, least, programs, tried = None, float("inf"), set(), set()
            for changes in ({}, *CHANGES[kernel]):
                one = changed(best, kernel, changes)
                if one in tried:
                    continue
                tried.add(one)
                if time.perf_counter() - began > args.seconds:
                    print(f"--seconds {args.seconds} are over.")
                    return
                with block_sparse.use(one):
                    ms, right = attempt(candidate, run, given, right, programs) or (None, right)
                if ms is None:
                    continue
                print(f"{name:12s} {kernel:22s} {ms:8.3f} ms  {changes or getattr(one, kernel)}", flush=True)
                memory = bool(one.sparse_query_product) > bool(
                    best.sparse_query_product
                )  # which 5% of the time are worth
                if ms < least * (0.95 if memory else 1.0):
                    least, best, entries[key] = ms, one, entry(one)
                path.write_text(json.dumps(entries, indent=1))


def changed(plain: block_sparse.SparseConfigs, kernel: str, changes: dict) -> block_sparse.SparseConfigs:
    """The configs with some sizes of one kernel changed; a product that there was not has those of what it replaces."""
    if not changes:
        return plain
    of_kernel = {name: x for name, x in changes.items() if name not in ("key", "scratch_bytes")}
    base = getattr(plain, kernel) or dataclasses.replace(plain.sparse_query_backward, stages=3)
    new: dict = {kernel: dataclasses.replace(base, **of_kernel)}
    if "key" in changes:
        new["sparse_key_backward"] = dataclasses.replace(plain.sparse_key_backward, **changes["key"])
    return dataclasses.replace(plain, **new, scratch_bytes=changes.get("scratch_bytes", plain.scratch_bytes))


def entry(configs: block_sparse.SparseConfigs) -> dict:
    """As in triton_kernels/tuned: what is not as it is by default."""
    given = {field.name: getattr(configs, field.name) for field in dataclasses.fields(configs)}
    plain = config.Config(rows=0, keys=0)
    always = ("rows", "keys", "warps", "stages")
    out: dict = {}
    for name, x in given.items():
        if isinstance(x, config.Config):
            sizes = dataclasses.asdict(x)
            out[name] = {n: v for n, v in sizes.items() if n in always or v != getattr(plain, n)}
        elif name == "scratch_bytes" and configs.sparse_query_product:
            out[name] = x
    return out


def parts_of(mask, q):
    """The problem and its two sides, as the kernels read them."""
    problem = SparseProblem(
        scale=q.shape[-1] ** -0.5,
        rows=mask.rows,
        columns=mask.columns,
        width=mask.width,
        sink=mask.sink,
        even=mask.even,
    )
    return problem, *kernel_sides(mask, batch=q.shape[0], heads=q.shape[2])


def candidate(run, given, right, programs: set[str]):
    """Median ms, and the results that count as right: the first ones.

    Fails if these are others, or if the program is one of those before, which the settings have not reached then.
    """
    lowered = jax.jit(lambda *x: run(*x)).lower(*given)  # a function that JAX knows it would not trace again
    program = lowered.as_text()
    if program in programs:
        raise ValueError("the same program as with other settings")
    programs.add(program)
    compiled = lowered.compile()
    results = jax.tree.leaves(compiled(*given))
    right = results if right is None else right
    errors = [float(error(x, y)) for x, y in zip(results, right, strict=True)]
    if not all(x <= MAX_ERROR for x in errors):
        raise ValueError(f"other results, by {max(errors):.1e}")
    return clocked(compiled, given, 5), right


def show(row: dict, dense: dict | None = None) -> None:
    """One printed row."""
    text = f"{row['row']:26s} {row['share']:6.1%}"
    for work, ms in row["ms"].items():
        text += f"   {work} {ms:8.3f} ms"
        if dense:
            text += f" ({dense[work] / ms:5.2f}x dense)"
    if "kernels_ms" in row:
        alone = row["kernels_ms"]
        text += f"\n{'':12s} kernels alone {alone['forward']:.3f} and {alone['both']:.3f} ms"
        if dense:
            rates = row["share"] * dense["forward"] / alone["forward"]
            backward = row["share"] * (dense["both"] - dense["forward"]) / (alone["both"] - alone["forward"])
            text += f"; per kept {rates:.0%} of cuDNN's forward, {backward:.0%} of its backward"
        text += f"; error {max(row['errors'].values()):.1e}"
    print(text, flush=True)


if __name__ == "__main__":
    main()
