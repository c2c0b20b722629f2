"""Runs the Triton kernels in Triton's interpreter on torch CPU tensors and prints relative errors as JSON.

Run in a process of its own: TRITON_INTERPRET=1 counts when the kernels are imported. Scratch and results start as NaN,
so that a number that was never written shows.
"""

import dataclasses
import inspect
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from triton.runtime import interpreter

from monarch_jax import reference
from monarch_jax.contract import Problem
from monarchrt.triton_kernels import left, overlapped, plan, refine, refine_backward, right, streamed
from monarchrt.triton_kernels.config import KERNELS as NAMES
from monarchrt.triton_kernels.config import Config, Stream, Target, heuristic
from tests.kernels import sparse_cases, sparse_interpreter
from tests.kernels.sparse_cases import error

jax.config.update("jax_enable_x64", True)


def call(self, *args, **kwargs):
    """Calls a device function; patches the language for Triton's own modules once, and not for each call."""
    if not self.fn.__module__.startswith("triton_kernels") and self.fn.__module__ not in PATCHED:
        PATCHED.add(self.fn.__module__)
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **kwargs)


# Half of the interpreter's time: the launch has patched the language already, and offsets are small.
PATCHED: set[str] = set()
interpreter.InterpretedFunction.__call__ = call
interpreter.interpreter_builder.options = dataclasses.replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
KERNELS = {
    "forward": overlapped.forward,
    "streamed": streamed.streamed,
    "right_forward": right.right_forward,
    "left_refine": refine.left_refine,
    "left_last": refine.left_last,
    "left_backward": left.left_backward,
    "right_backward": right.right_backward,
    "right_query": right.right_query,
    "right_further": refine_backward.right_further,
    "right_further_backward": refine_backward.right_further_backward,
    "right_further_query": refine_backward.right_further_query,
    "left_refine_backward": refine_backward.left_refine_backward,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One problem; `configs` (by kernel), `stream` and `scratch_bytes` override the heuristic's."""

    batch: int = 1
    query_tiles: int = 2
    key_tiles: int = 3
    b1: int = 5
    b2: int = 7
    heads: int = 2
    dim: int = 16
    visible: tuple[int, ...] | None = None
    grad_tiles: int | None = None
    half: bool = False
    sharpness: float = 1.0
    dominant: bool = False
    configs: Config | dict[str, Config] | None = None
    transposed: bool | None = None
    stream: Stream | None = None
    scratch_bytes: int = 2**30
    num_iters: int = 1


SPARSE = "sparse: "  # begins the name of a case of `sparse_cases`
PARTS = {name: Config(rows=16, keys=16, more_rows=16) for name in ("left_forward", "left_backward")} | {
    name: Config(rows=16, keys=16, more_keys=16) for name in ("right_forward", "right_backward", "right_query")
}
APART = PARTS | {"left_backward": Config(rows=16, keys=64, more_rows=16, warps=8)}  # products added afterwards
CASES = {
    "plain": Case(batch=2, heads=1),
    "causal": Case(query_tiles=3, heads=1, visible=(1, 2, 2)),
    "half": Case(heads=1, half=True),
    "one pair at a time, a dominant row": Case(scratch_bytes=30_000, dominant=True),
    "one query tile at a time": Case(query_tiles=3, heads=1, visible=(3, 1, 2), scratch_bytes=1),
    "blocks of rows and columns": Case(
        query_tiles=1, key_tiles=2, b1=17, b2=17, heads=1, configs=Config(rows=16, keys=16)
    ),
    "split": Case(
        query_tiles=3, key_tiles=2, b2=11, heads=1, configs={"right_forward": Config(rows=16, keys=16, split=2)}
    ),
    "more columns than alpha and Y have numbers": Case(
        query_tiles=1, key_tiles=1, b1=4, b2=40, heads=1, configs=Config(rows=16, keys=64)
    ),
    "keys first": Case(query_tiles=1, key_tiles=2, heads=1, transposed=True),
    "sharp, padded dim": Case(heads=1, dim=12, sharpness=10.0),
    "flat": Case(heads=1, sharpness=0.1),
    "newest tile": Case(heads=1, visible=(2, 2), grad_tiles=1),
    "480p tile": Case(query_tiles=1, key_tiles=1, b1=30, b2=52, heads=1, dim=32),
    "stream": Case(batch=2, heads=1, stream=Stream(rows=5, tiles=2, lag=3, slots=6)),
    "stream, causal": Case(
        query_tiles=3, heads=1, visible=(1, 2, 2), dominant=True, stream=Stream(rows=9, tiles=1, lag=2, slots=4)
    ),
    "stream, sharp": Case(heads=1, sharpness=10.0, stream=Stream(rows=64, tiles=1, slots=2)),
    "two parts": Case(
        query_tiles=1, key_tiles=2, b1=17, b2=17, heads=1, stream=Stream(rows=17, tiles=2), configs=PARTS
    ),
    "two parts, apart": Case(query_tiles=1, key_tiles=2, b1=17, heads=1, configs=APART),
    "two parts, keys first": Case(query_tiles=1, key_tiles=1, b1=17, b2=17, heads=1, transposed=True, configs=PARTS),
    "two steps": Case(batch=2, heads=1, num_iters=2, sharpness=4.0),  # some factors are at their limit
    "three steps, causal, chunks": Case(query_tiles=3, heads=1, visible=(1, 3, 2), num_iters=3, scratch_bytes=1),
    "two steps, half, sharp": Case(heads=1, num_iters=2, half=True, sharpness=3.0),
    "two steps, blocks of rows and columns": Case(
        query_tiles=1, key_tiles=2, b1=17, b2=17, heads=1, num_iters=2, configs=Config(rows=16, keys=16)
    ),
    "two steps, a dominant row, two parts": Case(
        query_tiles=1, key_tiles=2, b1=17, heads=1, num_iters=2, dominant=True, configs=PARTS
    ),
    "two steps, newest tile, blocks": Case(
        b1=17, heads=1, visible=(2, 2), grad_tiles=1, num_iters=2, configs=Config(rows=16, keys=16)
    ),
    "three steps, blocks of columns": Case(
        query_tiles=1, key_tiles=2, b2=17, heads=1, num_iters=3, configs=Config(rows=16, keys=16)
    ),
    "two steps, one query tile at a time": Case(heads=2, visible=(3, 2), dim=12, num_iters=2, scratch_bytes=1),
    "few rows, many columns": Case(query_tiles=1, key_tiles=1, b2=140, heads=1),
    "two steps, few rows, many columns": Case(query_tiles=1, key_tiles=1, b2=140, heads=1, num_iters=2),
    "two steps, 480p tile": Case(query_tiles=1, key_tiles=1, b1=30, b2=52, heads=1, dim=32, num_iters=2),
    "two parts, newest tile": Case(b2=17, heads=1, visible=(2, 2), grad_tiles=1, configs=PARTS),
}


def run_plan(todo, operands, scratch, results, start, kept=()):
    """What `launch.run` does, with torch."""
    state = dict(start)
    for n, step in enumerate(todo.steps):
        arrays = dict(operands, step=torch.tensor(step, dtype=torch.int32), **state)
        for name, (size, dtype) in (scratch | results).items():
            if name not in arrays:
                arrays[name] = torch.full(size, float("nan"), dtype=dtype)  # never int32: counters start as zeros
        for call in todo.launches_of(n):
            kernel = KERNELS[call.kernel]
            names = [name for name in inspect.signature(kernel.fn).parameters if not name.isupper()]
            kernel[call.grid](**{name: arrays[call.arrays.get(name, name)] for name in names}, **call.constants)
        state = {name: arrays[name] for name in (*results, *kept)}
    return state


def scratch_of(shape, todo, dtype, backward):
    sizes = plan.scratch_shapes(shape, todo, backward=backward)
    return {name: (size, dtype if name.startswith("mid") else torch.float32) for name, size in sizes.items()}


def run_case(case: Case) -> dict[str, float]:
    """Relative errors of out, dq, dk, dv against the reference in float64."""
    dtype = torch.float16 if case.half else torch.float32
    rng = np.random.default_rng(0)
    tiles = (case.query_tiles, case.key_tiles, case.key_tiles, case.query_tiles)
    q, k, v, g = (
        rng.standard_normal((case.batch, n, case.b1, case.b2, case.heads, case.dim)).astype(
            np.float16 if case.half else np.float32
        )
        for n in tiles
    )
    q *= case.sharpness
    if case.dominant:
        k[:, 0, 1] *= 8
    visible = np.array(case.visible or [case.key_tiles] * case.query_tiles, np.int32)
    problem = Problem(
        scale=case.dim**-0.5, masked=case.visible is not None, grad_tiles=case.grad_tiles, num_iters=case.num_iters
    )
    wide = [jnp.asarray(x, jnp.float64) for x in (q, k, v, g)]

    @jax.jit  # one program: compiling it takes a second, operation by operation six
    def reference_results(q, k, v, g):
        out, vjp = jax.vjp(lambda q, k, v: reference.attend(problem, q, k, v, jnp.asarray(visible)), q, k, v)
        return out, *vjp(g)

    expected = dict(zip(("out", "dq", "dk", "dv"), reference_results(*wide), strict=True))

    shape = plan.Shape(
        batch=case.batch, query_tiles=case.query_tiles, key_tiles=case.key_tiles, b1=case.b1, b2=case.b2,
        heads=case.heads, dim=case.dim, itemsize=2 if case.half else 4,
    )  # fmt: skip
    configs = heuristic(Target(90), b1=case.b1, b2=case.b2, dim=case.dim, itemsize=2)
    changes = case.configs if isinstance(case.configs, dict) else {}
    if isinstance(case.configs, Config):
        changes = dict.fromkeys(NAMES, case.configs)
    configs = dataclasses.replace(
        configs,
        **changes,
        left_refine=changes.get("left_forward"),
        scratch_bytes=case.scratch_bytes,
        stream=case.stream,
    )
    if case.transposed is not None:
        back = dataclasses.replace(configs.left_backward, transposed=case.transposed)
        configs = dataclasses.replace(configs, left_backward=back)

    last = int(visible.max())
    k[:, last:], v[:, last:] = np.nan, np.nan  # what nobody sees may hold anything
    q, k, v, g = (torch.tensor(x) for x in (q, k, v, g))
    operands = {"visible": torch.tensor(visible), "q": q, "k": k, "v": v, "scale": problem.scale}
    more = case.num_iters > 1
    todo = plan.refined(shape, configs, "ieee", case.num_iters) if more else plan.forward(shape, configs, "ieee")
    results: dict[str, Any] = {"out": (q.shape, dtype), "lse": (q.shape[:-1], torch.float32)}
    kept, start = ("mid", "stats"), {}
    if todo.stream:
        results["counters"] = (plan.counters(shape, todo.stream), torch.int32)
        start["counters"] = torch.zeros(results["counters"][0], dtype=torch.int32)
    found = run_plan(todo, operands, scratch_of(shape, todo, dtype, False), results, start, kept)

    if more:
        todo = plan.refined_backward(shape, configs, "ieee", case.grad_tiles, case.num_iters)
    else:
        todo = plan.backward(shape, configs, "ieee", case.grad_tiles)
    key_dtype = torch.float32 if todo.summed else dtype
    start, first = {}, 0
    if todo.summed or case.grad_tiles is not None:
        start = {name: torch.zeros(k.shape, dtype=key_dtype) for name in ("dk", "dv")}
    if case.grad_tiles is not None:
        first = last - case.grad_tiles
    operands |= {
        "first_tile": torch.tensor([first], dtype=torch.int32),
        "d_out": g,
        "lse": found["lse"],
        "delta": (g.float() * found["out"].float()).sum(-1),
    }
    results = {"dq": (q.shape, dtype), "dk": (k.shape, key_dtype), "dv": (k.shape, key_dtype)}
    found |= run_plan(todo, operands, scratch_of(shape, todo, dtype, True), results, start)
    wanted = slice(first, last) if case.grad_tiles is not None else slice(None)
    errors = {name: error(found[name], expected[name]) for name in ("out", "dq")}
    return errors | {name: error(found[name][:, wanted], expected[name][:, wanted]) for name in ("dk", "dv")}


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        began = time.perf_counter()
        if name.startswith(SPARSE):
            errors = sparse_interpreter.run_case(sparse_cases.CASES[name.removeprefix(SPARSE)])
        else:
            errors = run_case(CASES[name])
        print(json.dumps({"case": name, **errors}), flush=True)
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
