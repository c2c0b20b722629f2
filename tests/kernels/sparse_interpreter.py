"""Runs the block-sparse kernels in Triton's interpreter on torch CPU tensors and prints relative errors as JSON.

Run in a process of its own: TRITON_INTERPRET=1 counts when the kernels are imported. Results start as NaN, so that a
number that was never written shows, and keys that lie in no block hold NaN, so that one that is read shows.
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

from monarch_jax.block_sparse import _side, block_mask
from monarch_jax.contract import Side, SparseProblem
from monarchrt.triton_kernels import sparse
from monarchrt.triton_kernels.block_sparse import KERNELS, SparseConfigs, kept, launches, shorter, slots
from monarchrt.triton_kernels.config import Config
from tests.kernels.sparse_cases import CASES, Case, error


def few(problem: SparseProblem, part: int, queries: Side):
    """What the forward pass is given beside the lists."""
    return shorter(queries, problem.columns, part) if part else queries.count


def run_case(case: Case) -> dict[str, float]:
    """The larger relative errors of out, dq, dk, dv: scores' gradients are computed twice, or kept."""
    again, kept_once = (run(case, keep) for keep in (False, True))
    return {name: float(np.maximum(x, kept_once[name])) for name, x in again.items()}


def run(case: Case, keep: bool) -> dict[str, float]:
    """Relative errors of out, dq, dk, dv against whole maps in float64."""
    q, k, v, g = case.arrays()
    query_starts, key_starts = case.starts()
    mask = block_mask(case.seen(), query_starts=query_starts, key_starts=key_starts, **case.options())
    width, sink = case.band or (None, 0)
    problem = SparseProblem(
        scale=case.dim**-0.5, rows=case.rows, columns=case.columns, width=width, sink=sink, even=mask.even
    )
    lead = (case.batch, case.heads)
    queries = _side(mask.keys, mask.query_starts, mask.key_starts, mask.query_places, case.batch, case.heads)
    keys = _side(mask.queries, mask.key_starts, mask.query_starts, mask.key_places, case.batch, case.heads)
    q_struct, k_struct = (jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype)) for x in (q, k))
    chosen = SparseConfigs(**dict.fromkeys(KERNELS, Config(rows=16, keys=16, early=case.ragged)))
    if keep:  # with parts of other sizes, short blocks in parts of their own, and one head at a time
        packed = dataclasses.replace(chosen.sparse_forward, packed=4)
        chosen = dataclasses.replace(
            chosen, sparse_forward=packed, sparse_query_product=Config(rows=32, keys=32), scratch_bytes=2**40
        )
        whole = kept(problem, q_struct, queries, chosen)
        assert whole is not None
        chosen = dataclasses.replace(chosen, scratch_bytes=whole.size * whole.dtype.itemsize // case.heads)
    scores = kept(problem, q_struct, queries, chosen)
    calls = launches(problem, q_struct, k_struct, queries, keys, chosen)
    assert len(calls) == (1 + 2 * case.heads if keep else 3)
    if case.rest:
        k[:, -case.rest :], v[:, -case.rest :] = np.nan, np.nan
    arrays: dict[str, Any] = {name: torch.tensor(x) for name, x in {"q": q, "k": k, "v": v, "d_out": g}.items()}
    arrays["scale"] = problem.scale
    shapes: dict[str, Any] = {"out": q, "dq": q, "dk": k, "dv": k, "d_scores": scores}
    shapes["lse"] = np.empty((*lead, q.shape[1]), np.float32)
    arrays["slots"] = torch.tensor(np.asarray(slots(queries, keys, max(q.shape[1], k.shape[1]))))
    for n, call in enumerate(calls):
        arrays["head"] = (n - 1) // 2
        side, other = (keys, queries) if "dk" in call.writes else (queries, keys)
        arrays |= {name: torch.tensor(np.asarray(x)) for name, x in side._asdict().items()}
        arrays["query_places" if side is keys else "key_places"] = torch.tensor(np.asarray(other.places))
        for name in call.writes:
            shape = shapes[name]
            if name in arrays and name != "d_scores":
                continue
            arrays[name] = torch.full(shape.shape, float("nan"), dtype=getattr(torch, shape.dtype.name))
        kernel = getattr(sparse, call.kernel)
        arrays["few"] = torch.tensor(np.asarray(few(problem, call.constants.get("PACKED", 0), queries)))
        names = [name for name in inspect.signature(kernel.fn).parameters if not name.isupper()]
        kernel[call.grid](**{name: arrays[name] for name in names}, **call.constants)
        if "out" in call.writes:
            arrays["delta"] = torch.einsum("bnhd,bnhd->bhn", arrays["d_out"].float(), arrays["out"].float())
    names = ("out", "dq", "dk", "dv")
    return {name: error(arrays[name], x) for name, x in zip(names, case.expected(), strict=True)}


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        began = time.perf_counter()
        errors = run_case(CASES[name])
        print(json.dumps({"case": name, **errors}), flush=True)
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
