"""Times tiled Monarch attention against dense attention: the rows of Tables 5 and 6 of the paper, on one GPU.

    python benchmarks/attention.py                                    # 480p and 720p, JAX only
    python benchmarks/attention.py --published PATH/monarch_attn.py   # and the published PyTorch kernels, same run
    python benchmarks/attention.py --small --implementations xla      # a smoke test that runs anywhere

Numbers are checked first: output and gradients of every implementation against the reference in float64; an
implementation that fails is not timed. Then every row is timed: medians, batch 1, bfloat16, 12 heads of 128. Writes
attention.json, after each measurement, and attention.png into --out; --results prints and plots such files again,
anywhere.
"""

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the published kernels run on the same card

import jax
import jax.numpy as jnp
import numpy as np
from measuring import clocked, heading, machine, write_report

from monarch_jax import monarch_attention
from monarch_jax.backends import IMPLEMENTATIONS, choose
from monarch_jax.contract import Problem
from monarch_jax.spec import MonarchSpec, bytes_moved, flops

MAX_ERROR = 1e-2  # relative Frobenius error that the gate allows in bfloat16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: the clip's (frames, height, width) in latent tokens and the frames per tile.

    A tile has the grid's rows, divided by `height_parts`, and its columns. `num_iters` are refinement steps, `blocks`
    which axes are a tile's rows and columns. A tile that does not divide `decode_frames` is not timed decoding.
    """

    name: str
    grid: tuple[int, int, int]
    tile_frames: int
    height_parts: int = 1
    num_iters: int = 1
    blocks: str = "fh,w"
    decode_frames: int = 3
    heads: int = 12
    head_dim: int = 128

    @property
    def tile(self) -> tuple[int, int, int]:
        return (self.tile_frames, self.grid[1] // self.height_parts, self.grid[2])

    @property
    def published(self) -> bool:
        """Whether the published kernels do the same: one step, frames and height as a tile's rows."""
        return self.num_iters == 1 and self.blocks == "fh,w"

    @property
    def works(self) -> tuple[str, ...]:
        """What is timed."""
        decoded = ("decode",) * (self.decode_frames % self.tile_frames == 0)
        return ("forward", *decoded, "forward + backward")


ROWS = (
    Row(name="480p (h,w)", grid=(21, 30, 52), tile_frames=1),
    Row(name="480p (3h,w)", grid=(21, 30, 52), tile_frames=3),
    Row(name="720p (h,w)", grid=(21, 45, 80), tile_frames=1),
    Row(name="720p (3h,w)", grid=(21, 45, 80), tile_frames=3),
    Row(name="480p (h/2,w)", grid=(21, 30, 52), tile_frames=1, height_parts=2),
    Row(name="480p (h,w) T=2", grid=(21, 30, 52), tile_frames=1, num_iters=2),
    Row(name="480p (3h,w) T=2", grid=(21, 30, 52), tile_frames=3, num_iters=2),
    Row(name="480p (f,hw)", grid=(21, 30, 52), tile_frames=21, blocks="f,hw"),
)
E4M3 = "+e4m3"  # ends the name of an implementation that is to store alpha and Y in 8 bits
MAX_ERROR_E4M3 = 4e-2  # what the gate allows those; on its inputs the definition itself has 2.5e-2
KEEPING = "+keep"  # ends the name of an implementation that is to keep intermediates
SMALL = (Row(name="small (h,w)", grid=(6, 6, 8), tile_frames=1, heads=2, head_dim=16),)


def main() -> None:
    """Checks, times, prints, writes."""
    args = parse()
    if args.results:
        reports = [stored(path) for path in args.results]
        args.out.mkdir(parents=True, exist_ok=True)
        show(reports, args.out)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    rows = SMALL if args.small else tuple(row for row in ROWS if {row.name, row.name.split()[0]} & set(args.rows))
    print(heading())
    errors = {}
    for name in (*args.implementations, *(["published"] if args.published else [])):
        check, what = (published_errors, args.published) if name == "published" else (gate, name)
        able = [row for row in rows if serves(name, row)]
        errors[name] = {row.name: attempt(check, row, what) or {} for row in able}
        for row, by_array in errors[name].items():
            listed = "  ".join(f"{array} {x:.1e}" for array, x in by_array.items())
            print(f"{name:10s} {row:14s} {listed}", flush=True)
        if name.endswith(E4M3):
            show_beside(name.removesuffix(E4M3), able)
    failed = [
        name
        for name in args.implementations
        if not all(by_array and all(x <= bound(name) for x in by_array.values()) for by_array in errors[name].values())
    ]
    for name in failed:
        print(f"{name} failed or is above {bound(name):.0e} and is not timed.")
    timed = [name for name in args.implementations if name not in failed]
    limits = ceilings(args.small)
    results = []
    report = machine() | {"ceilings": limits, "errors": errors, "rows": results}
    for row in rows:
        published = (attempt(published_times, row, args) if args.published and row.published else None) or {}
        for work in row.works:
            able = [name for name in timed if serves(name, row)]
            results.append(measure(row, work, able, limits, published.get(work), dense=not args.small))
            print(line(results[-1]), flush=True)
            write_report(args.out / "attention.json", report)
    plot(results, machine()["device"], args.out / "attention.png")
    if failed:
        sys.exit(1)


def bound(implementation: str) -> float:
    """Relative error that an implementation may have to be timed."""
    return MAX_ERROR_E4M3 if implementation.endswith(E4M3) else MAX_ERROR


def show_beside(name: str, rows: list[Row]) -> None:
    """Prints the same implementation's errors with alpha and Y in bfloat16."""
    for row in rows:
        by_array = attempt(gate, row, name) or {}
        listed = "  ".join(f"{array} {x:.1e}" for array, x in by_array.items())
        print(f"  beside {name}: {row.name:14s} {listed}", flush=True)


def parts(implementation: str) -> tuple[str, dict[str, Any]]:
    """The library's name of an implementation, and the options that the end of its name here stands for."""
    if implementation.endswith(E4M3):
        return implementation.removesuffix(E4M3), {"intermediates": "e4m3"}
    name = implementation.removesuffix(KEEPING)
    return name, {"keep_intermediates": name != implementation}


@functools.cache
def serves(implementation: str, row: Row) -> bool:
    """Whether an implementation, or "published", takes a row at all: some have one refinement step alone."""
    if implementation == "published":
        return row.published
    spec = MonarchSpec(grid=row.grid, tile=row.tile, blocks=row.blocks)
    shape = (1, spec.query_tiles, spec.block_rows, spec.block_cols, row.heads, row.head_dim)
    tiles = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    name, options = parts(implementation)
    problem = Problem(scale=1.0, num_iters=row.num_iters, intermediates=options.get("intermediates"))
    try:
        choose(name, problem, tiles, tiles)
    except NotImplementedError as error:
        print(f"{row.name}: {error}")
        return False
    return True


def attempt(run, *args):
    """The result, or None after saying why there is none: one failure must not cost the other rows."""
    try:
        return run(*args)
    except Exception as error:
        print(f"{run.__name__} failed: {type(error).__name__}: {str(error)[:500]}")
        return None


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--implementations",
        nargs="+",
        default=["triton"],
        choices=[*IMPLEMENTATIONS, *(name + end for end in (KEEPING, E4M3) for name in IMPLEMENTATIONS)],
        metavar="NAME",
        help=f"of {', '.join(IMPLEMENTATIONS)}; mosaic{KEEPING}: with keep_intermediates=True; mosaic{E4M3}: with "
        f"intermediates='e4m3', whose backward pass is not timed; default: triton",
    )
    names = [row.name for row in ROWS]
    sizes = list(dict.fromkeys(name.split()[0] for name in names))
    parser.add_argument(
        "--rows",
        nargs="+",
        default=sizes,
        choices=[*sizes, *names],
        metavar="ROW",
        help=f"of {', '.join(map(repr, [*sizes, *names]))}; default: all",
    )
    parser.add_argument("--published", type=Path, help="wan/modules/monarch_attn.py of Infini-AI-Lab/MonarchRT")
    parser.add_argument("--published-backward", action="store_true", help="time their backward too (more tuning)")
    parser.add_argument("--published-configs", type=Path, metavar="FILE", help="keep what their tuning chose in FILE")
    parser.add_argument("--results", nargs="+", type=Path, help="print and plot these attention.json, measure nothing")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--small", action="store_true", help="a tiny clip, no dense baseline; runs without a GPU")
    args = parser.parse_args()
    if args.published and not args.published.is_file():
        parser.error(f"--published {args.published} is not a file; give wan/modules/monarch_attn.py of the repository")
    for name in ("published_backward", "published_configs"):
        if getattr(args, name) and not args.published:
            parser.error(f"--{name.replace('_', '-')} needs --published")
    if not (args.results or args.small) and jax.default_backend() != "gpu":
        parser.error("there is no GPU; --small --implementations xla runs anywhere, and --results shows what is stored")
    return args


def inputs(row: Row, frames: int, seed: int = 0) -> list[jax.Array]:
    """q, k, v and a cotangent [1, frames*h*w, heads, head_dim] in bfloat16, standard normal."""
    shape = (1, frames * row.grid[1] * row.grid[2], row.heads, row.head_dim)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(seed), 4)]


def with_gradients(attend, q, k, v, g):
    """Output and the gradients of <output, g>."""
    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(g)


def check_row(row: Row) -> Row:
    """Two tiles of the row's shape, one head: small enough for the reference in float64."""
    return dataclasses.replace(row, grid=(2 * row.tile_frames, *row.grid[1:]), heads=1)


@functools.cache
def expected(row: Row) -> tuple[list[jax.Array], list[np.ndarray]]:
    """Inputs in bfloat16 and the reference's results on them in float64, compiled quickly, as it runs once."""
    arrays = inputs(row, row.grid[0])
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        run = functools.partial(with_gradients, attention(row, row.grid[0], "reference"))
        attend = jax.jit(run, compiler_options={"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False})
        return arrays, [np.asarray(x) for x in attend(*wide)]


def attention(row: Row, frames: int, implementation: str):
    """The operation with `frames` query frames over the clip."""
    name, how = parts(implementation)
    options = {
        "grid": (frames, *row.grid[1:]),
        "tile": row.tile,
        "blocks": row.blocks,
        "num_iters": row.num_iters,
    } | how
    return lambda q, k, v: monarch_attention(q, k, v, implementation=name, **options)


def relative_errors(results, reference) -> dict[str, float]:
    """Relative Frobenius error of each array."""
    names = ("out", "dq", "dk", "dv")
    return {name: relative_error(x, y) for name, x, y in zip(names, results, reference, strict=True)}


def relative_error(x, y) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y))


@functools.cache
def gate(row: Row, implementation: str) -> dict[str, float]:
    """Errors on two tiles of this row's shape."""
    small = check_row(row)
    arrays, reference = expected(small)
    run = jax.jit(lambda *x: with_gradients(attention(small, small.grid[0], implementation), *x))
    errors = relative_errors(run(*arrays), reference)
    q, k, v, _ = arrays
    block = q.shape[1] // 2  # one query tile of the two, as when decoding: queries of different tiles are independent
    decoded = jax.jit(attention(small, row.tile_frames, implementation))(q[:, block:], k, v)
    return errors | {"decode": relative_error(decoded, reference[0][:, block:])}


def measure(row: Row, work: str, implementations, limits, published: dict | None, *, dense: bool) -> dict:
    """Times, peak memory beyond the inputs, and floors of one row and kind of work."""
    frames = row.decode_frames if work == "decode" else row.grid[0]
    q, k, v, g = inputs(row, row.grid[0])
    q, g = (x[:, : frames * row.grid[1] * row.grid[2]] for x in (q, g))
    arrays = (q, k, v, g) if work == "forward + backward" else (q, k, v)
    form: dict[str, Any] = {"tile": row.tile, "blocks": row.blocks, "num_iters": row.num_iters}
    spec = MonarchSpec(grid=(frames, *row.grid[1:]), key_frames=row.grid[0], **form)
    size: dict[str, Any] = {"heads": row.heads, "head_dim": row.head_dim}
    arithmetic, plain = flops(spec, **size), bytes_moved(spec, **size)
    # a further step writes and reads alpha and the next queries, as many bytes as alpha and Y
    moved = plain + row.num_iters * (bytes_moved(spec, **size, spill=True) - plain)
    if work == "forward + backward":  # alpha, Y and their gradients pass through memory twice more
        arithmetic += flops(spec, mode="vjp", **size)
        moved, plain = moved + 2 * (moved - plain) + plain, 2 * plain
    result = {
        "row": row.name,
        "work": work,
        "floor_flops_ms": 1e3 * arithmetic / limits["flops"],
        "floor_bytes_ms": 1e3 * moved / limits["bytes"],
        "sparsity": spec.sparsity,
        "implementations": {},
    }
    if dense and (measured := attempt(timed, dense_attention, arrays)):
        result["dense_ms"], result["dense_bytes"] = measured
    if published is not None:
        result["published_ms"], result["published_bytes"] = published["ms"], published["bytes"]
    for name in implementations:
        if name.endswith(KEEPING) and work != "forward + backward":
            continue  # the same
        if name.endswith(E4M3) and work == "forward + backward":
            continue  # the gradient is XLA's
        measured = attempt(timed, attention(row, frames, name), arrays)
        if measured:
            result["implementations"][name] = {"ms": measured[0], "bytes": measured[1]}
    return result


def dense_attention(q, k, v):
    """The baseline."""
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn")


def timed(attend, arrays, repeats: int = 7) -> tuple[float, int]:
    """Median ms of a call, with its gradients when a cotangent is given, and its bytes beyond the inputs.

    Calls are sent without waiting for each other, so that the time to launch one hides behind the one before.
    """
    run = attend if len(arrays) == 3 else (lambda *x: with_gradients(attend, *x))
    compiled = jax.jit(run).lower(*arrays).compile()
    memory: Any = compiled.memory_analysis()
    return clocked(compiled, arrays, repeats), memory.temp_size_in_bytes + memory.output_size_in_bytes


def ceilings(small: bool) -> dict[str, float]:
    """FLOP/s of a large bfloat16 product and bytes/s (read and written) of a large copy, on this device, now."""
    n = 256 if small else 8192
    a = jax.random.normal(jax.random.key(1), (n, n), jnp.bfloat16)
    product, _ = timed(lambda a, b, c: a @ b, (a, a, a))
    x = jax.random.normal(jax.random.key(2), (n * n * (1 if small else 8),), jnp.float32)
    copy, _ = timed(lambda x, y, z: x + 1, (x, x[:1], x[:1]))
    return {"flops": 2 * n**3 / (product / 1e3), "bytes": 2 * x.nbytes / (copy / 1e3)}


def published_run(path: Path, *options: str) -> str:
    """Standard output of `published.py`, in a process of its own: torch and JAX share the card one after the other."""
    script = Path(__file__).with_name("published.py")
    done = subprocess.run([sys.executable, script, path, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The published kernels failed:\n{done.stderr[-2000:]}")
    return done.stdout


def published_errors(row: Row, path: Path) -> dict[str, float]:
    """Errors of the published kernels on the gate's inputs."""
    small = check_row(row)
    arrays, reference = expected(small)
    with tempfile.TemporaryDirectory() as folder:
        names = ("q", "k", "v", "g")
        file = Path(folder) / "arrays.npz"
        saved: dict[str, Any] = {name: np.asarray(x, np.float32) for name, x in zip(names, arrays, strict=True)}
        np.savez(file, **saved)
        options = ("--arrays", str(file), "--tile", *map(str, row.tile), "--parts", str(row.height_parts))
        published_run(path, *options)
        with np.load(file) as results:
            return relative_errors([results[name] for name in ("out", "dq", "dk", "dv")], reference)


def published_times(row: Row, args: argparse.Namespace) -> dict[str, dict]:
    """Median ms and peak bytes beyond the inputs of the published kernels, by kind of work."""
    options = ["--grid", *map(str, row.grid), "--tile", *map(str, row.tile), "--decode", str(row.decode_frames)]
    options += ["--parts", str(row.height_parts), "--heads", str(row.heads), "--dim", str(row.head_dim)]
    if args.published_backward:
        options.append("--backward")
    if args.published_configs:
        options += ["--configs", str(args.published_configs.absolute())]
    return json.loads(published_run(args.published, *options).splitlines()[-1])


def line(result: dict) -> str:
    """One printed row."""
    floors = f"floors {result['floor_flops_ms']:.2f} (arithmetic) {result['floor_bytes_ms']:.2f} (bytes)"
    text = f"{result['row']:12s} {result['work']:18s} {floors}"
    for name in ("dense", "published"):
        if f"{name}_ms" in result:
            text += f"  {name} {result[f'{name}_ms']:.3f} ms, {result[f'{name}_bytes'] / 1e9:.2f} GB"
    for name, measured in result["implementations"].items():
        text += f"\n    {name:10s} {measured['ms']:8.3f} ms, {measured['bytes'] / 1e9:.2f} GB"
        for key in ("dense_ms", "published_ms"):
            if key in result:
                text += f", {result[key] / measured['ms']:.2f}x {key.removesuffix('_ms')}"
        text += f", {result['floor_flops_ms'] / measured['ms']:.0%} of the arithmetic floor"
        text += f", {result['floor_bytes_ms'] / measured['ms']:.0%} of the byte floor"
    return text


def stored(path: Path) -> dict:
    """A report that this script wrote."""
    try:
        report = json.loads(path.read_text())
        return {"device": report["device"], "rows": report["rows"], "first": report["rows"][0]["work"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"error: {path} is not an attention.json of this script ({type(error).__name__}: {error})")


def show(reports: list[dict], out: Path) -> None:
    """Prints stored reports row by row, and plots them together; what several have is the last one's."""
    results = {(result["row"], result["work"]): result for report in reports for result in report["rows"]}
    for result in results.values():
        print(line(result))
    plot(list(results.values()), reports[0]["device"], out / "attention.png")


def plot(results: list[dict], device: str, path: Path) -> None:
    """Bars of every row, logarithmic; without Matplotlib it says how to get them later."""
    try:
        import matplotlib
    except ImportError:
        print("No plot: pip install matplotlib, then --results attention.json.")
        return

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    series: dict[str, list[float]] = {}
    for n, result in enumerate(results):
        values = {"dense cuDNN": result.get("dense_ms"), "published": result.get("published_ms")}
        values |= {name: measured["ms"] for name, measured in result["implementations"].items()}
        values["floor"] = max(result["floor_flops_ms"], result["floor_bytes_ms"])
        for name, value in values.items():
            series.setdefault(name, [float("nan")] * len(results))[n] = float("nan") if value is None else value
    series["floor"] = series.pop("floor")  # last
    figure, axes = plt.subplots(figsize=(1.1 * len(results) + 3, 4.5), layout="constrained")
    width = 0.8 / len(series)
    for n, (name, values) in enumerate(series.items()):
        axes.bar(np.arange(len(results)) + (n + 0.5) * width - 0.4, values, width, label=name)
    axes.set_xticks(range(len(results)), [f"{r['row']}\n{r['work']}" for r in results], fontsize=7, rotation=30)
    axes.set_yscale("log")
    axes.set_ylabel("ms")
    axes.set_title(f"Tiled Monarch attention, {device}")
    figure.legend(fontsize=8, loc="outside right upper")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
