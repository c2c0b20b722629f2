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

from monarch_jax.block_mask import block_mask, kernel_sides
from monarch_jax.contract import Side, SparseProblem
from monarchrt.models.attention.listed import by_head
from monarchrt.triton_kernels import sparse
from monarchrt.triton_kernels.block_sparse import KERNELS, SparseConfigs, kept, launches, shorter, slots
from monarchrt.triton_kernels.config import Config
from tests.kernels.sparse_cases import CASES, Case, error


def few(problem: SparseProblem, part: int, queries: Side):
    """What the forward pass is given beside the lists."""
    return shorter(queries, problem.columns, part) if part else queries.count


def run_case(case: Case) -> dict[str, float]:
    """The larger relative errors of out, dq, dk, dv: scores' gradients are computed twice, or kept.

    Where each head is a sample of one head, as `listed` hands them on heads first, numbers are the same.
    """
    again, kept_once = (run(case, keep) for keep in (False, True))
    if case.heads > 1:
        for x, y in zip(again, run(case, False, apart=True), strict=True):
            np.testing.assert_array_equal(x, y)
    names = ("out", "dq", "dk", "dv")
    found = zip(names, again, kept_once, case.expected(), strict=True)
    return {name: float(np.maximum(error(x, right), error(y, right))) for name, x, y, right in found}


def heads_first(x: np.ndarray) -> np.ndarray:
    """[B, N, H, D] as [B * H, N, 1, D]."""
    return np.ascontiguousarray(np.moveaxis(x, 2, 1).reshape(-1, x.shape[1], 1, x.shape[3]))


def run(case: Case, keep: bool, *, apart: bool = False) -> list[np.ndarray]:
    """The results out, dq, dk, dv [B, N, H, D]; `apart`, each head is a sample of one head."""
    q, k, v, g = map(heads_first, case.arrays()) if apart else case.arrays()
    query_starts, key_starts = case.starts()
    mask = block_mask(case.seen(), query_starts=query_starts, key_starts=key_starts, **case.options())
    width, sink = case.band or (None, 0)
    problem = SparseProblem(
        scale=case.dim**-0.5, rows=case.rows, columns=case.columns, width=width, sink=sink, even=mask.even
    )
    if apart:
        mask = jax.tree.map(lambda x: by_head(x, (case.batch, case.heads)), mask)
    lead = (q.shape[0], q.shape[2])
    queries, keys = kernel_sides(mask, batch=lead[0], heads=lead[1])
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
    results = [np.asarray(arrays[name]) for name in ("out", "dq", "dk", "dv")]
    lead = (case.batch, case.heads)
    return [np.moveaxis(x.reshape(*lead, *x.shape[1::2]), 1, 2).copy() for x in results] if apart else results


if __name__ == "__main__":
    for name in sys.argv[1:] or CASES:
        began = time.perf_counter()
        errors = run_case(CASES[name])
        print(json.dumps({"case": name, **errors}), flush=True)
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr)
