"""Runs the published PyTorch MonarchRT attention for `attention.py`, in a process of its own.

With --arrays: reads q, k, v, g from the .npz, adds out, dq, dk, dv to it, with the first of each kernel's configs.
With --grid: prints, by kind of work, medians in ms and the most bytes beyond the inputs as JSON. The forward pass is
replayed from a CUDA graph, so that its launches from Python do not count against it; forward and backward runs
eagerly. The first call of every shape tunes itself; a config that is a fifth slower in three launches than the best one
so far is not timed further. With --share i n every n-th config is compiled and run once, not timed, so that several
processes can fill Triton's cache first; with --configs FILE what the tuning chose is kept there, by card, tile and
frames, and later runs take it from there.
"""

import argparse
import importlib.util
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton


def load(path):
    spec: Any = importlib.util.spec_from_file_location("published_monarch_attn", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def median_ms(run, repeats=7):
    """Measured as `attention.timed` does: calls are sent without waiting for each other."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    run()
    torch.cuda.synchronize()
    calls = max(2, min(50, int(0.2 / (time.perf_counter() - start))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return statistics.median(times)


def most_bytes(run):
    """Peak memory of a call beyond what there is before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def graph(run):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        run()
    return recorded.replay


def tuned_kernels(module):
    """The kernels that tune themselves, by name."""
    return {name: x for name, x in vars(module).items() if isinstance(x, triton.runtime.Autotuner)}


def keep_configs(module, which):
    """Leaves each tuned kernel those of its configs that the slice says."""
    for kernel in tuned_kernels(module).values():
        kernel.configs = kernel.configs[which] or kernel.configs[:1]


def run_once(call, quantiles):
    """In place of a benchmark."""
    call()
    return [0.0] * len(quantiles)


def quick_bench(kernel):
    """A benchmark for the tuning of a kernel: Triton's for what comes close to the best config of the same tuning."""
    best = {}  # ms by how many specialisations were tuned before

    def bench(call, quantiles):
        tuning = len(kernel.cache)
        call()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(4_000_000)  # cycles in which the launches are sent, so that they are not timed
        start.record()
        for _ in range(3):
            call()
        end.record()
        torch.cuda.synchronize()
        ms = start.elapsed_time(end) / 3
        if ms > 1.2 * best.get(tuning, float("inf")):
            return [ms] * len(quantiles)
        quantiles_ms: Any = triton.testing.do_bench(call, warmup=10, rep=40, quantiles=quantiles)  # ms
        best[tuning] = min(best.get(tuning, float("inf")), quantiles_ms[0])
        return quantiles_ms

    return bench


def config_key(args):
    """What a choice of configs holds for; with the backward pass the same kernels are tuned for more."""
    shape = f"tile {'x'.join(map(str, args.tile))}, {args.grid[0]} frames, head {args.dim}"
    return f"{torch.cuda.get_device_name()}, {shape}, forward{' and backward' if args.backward else ''}"


def take_configs(module, args):
    """Leaves each tuned kernel what an earlier tuning chose, where the file knows it."""
    known = json.loads(args.configs.read_text()).get(config_key(args), {}) if args.configs.exists() else {}
    for name, kernel in tuned_kernels(module).items():
        kernel.configs = [x for x in kernel.configs if x.all_kwargs() in known.get(name, [])] or kernel.configs


def store_configs(module, args):
    """Adds what the tuning chose to the file, unless it is known; a kernel has a config for each specialisation."""
    stored = json.loads(args.configs.read_text()) if args.configs.exists() else {}
    if config_key(args) in stored:
        return
    configs = {}
    for name, kernel in tuned_kernels(module).items():
        chosen = [config.all_kwargs() for config in kernel.cache.values()]
        configs[name] = [x for n, x in enumerate(chosen) if x not in chosen[:n]]
    args.configs.write_text(json.dumps(stored | {config_key(args): configs}, indent=1))


def compare(module, file, tile, parts):
    keep_configs(module, slice(1))  # errors do not depend on block sizes; tuning takes minutes
    with np.load(file) as stored:
        arrays = {name: stored[name] for name in stored.files}
    q, k, v, g = (torch.tensor(arrays[name], device="cuda", dtype=torch.bfloat16) for name in ("q", "k", "v", "g"))
    for x in (q, k, v):
        x.requires_grad_()
    out = module.monarch_attn(q, k, v, tile[0], parts, 1, parts * tile[1], tile[2])
    out.backward(g)
    results = {"out": out, "dq": q.grad, "dk": k.grad, "dv": v.grad}
    np.savez(file, **arrays, **{name: x.detach().float().cpu().numpy() for name, x in results.items()})


def times(module, args):
    frames, height, width = args.grid
    torch.manual_seed(0)

    def tokens(count):
        shape = (1, count * height * width, args.heads, args.dim)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    q, k, v, block, g = tokens(frames), tokens(frames), tokens(frames), tokens(args.decode), tokens(frames)
    tile, _ = module._get_rearrange_fns(q, args.tile[0], args.parts, 1, height, width)
    result = {}
    with torch.no_grad():
        tiled = [tile(x).contiguous() for x in (q, block, k, v)]
        for work, query in (("forward", tiled[0]), ("decode", tiled[1])):

            def run(query=query):
                return module._attention_no_cache.apply(query, *tiled[2:], args.dim**-0.5, 0, False)

            run()
            if not args.share:
                result[work] = {"bytes": most_bytes(run), "ms": median_ms(graph(run))}
    if args.backward:
        for x in (q, k, v):
            x.requires_grad_()

        def step():
            q.grad = k.grad = v.grad = None
            module.monarch_attn(q, k, v, args.tile[0], args.parts, 1, height, width).backward(g)

        step()
        q.grad = k.grad = v.grad = None
    if args.configs and not args.share:
        store_configs(module, args)
    if args.backward and not args.share:
        result["forward + backward"] = {"bytes": most_bytes(step), "ms": median_ms(step)}
    print(json.dumps(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--arrays")
    parser.add_argument("--tile", type=int, nargs=3, required=True)
    parser.add_argument("--parts", type=int, default=1, help="tiles above each other in a frame's height")
    parser.add_argument("--grid", type=int, nargs=3)
    parser.add_argument("--decode", type=int, default=3)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--share", type=int, nargs=2)
    parser.add_argument("--configs", type=Path)
    arguments = parser.parse_args()
    published = load(arguments.path)
    if arguments.share:
        keep_configs(published, slice(arguments.share[0], None, arguments.share[1]))
    elif arguments.configs:
        take_configs(published, arguments)
    for tuned in tuned_kernels(published).values():
        tuned._do_bench = run_once if arguments.share else quick_bench(tuned)
    if arguments.arrays:
        compare(published, arguments.arrays, arguments.tile, arguments.parts)
    else:
        times(published, arguments)
