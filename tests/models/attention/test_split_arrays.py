"""Every kind on arrays that a user has split over devices, on meshes of either type of axis, beside one device."""

import pytest

from tests.devices import on_devices
from tests.models.attention.test_sparse_in_wan import KINDS

PROGRAM = """
import sys
from types import SimpleNamespace
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from monarchrt.models.attention.base import Context
from monarchrt.models.attention.notation import parse

numbers = np.random.default_rng(0).standard_normal((3, 2, 6 * 4 * 6, 4, 16)).astype(np.float32)
inputs = np.random.default_rng(1).standard_normal((2, 6 * 4 * 6, 8)).astype(np.float32)
sizes = SimpleNamespace(dim=8, num_heads=4, head_dim=16, dtype="float32", param_dtype="float32")

def program(attention, causal_block):
    layer = attention.init(sizes, rngs=nnx.Rngs(0))
    graph, params = nnx.split({} if layer is None else {attention.name: layer})
    params = jax.tree.map(lambda x: np.asarray(x) + 0.3, params)

    def run(q, k, v, inputs, params, step):
        context = Context(inputs=lambda: inputs, modules=nnx.merge(graph, params), step=step)
        def attend(*x):
            return attention(*x, grid=(6, 4, 6), causal_block=causal_block, context=context)
        return attend(q, k, v), *jax.grad(lambda *x: (x[0] * attend(*x)).sum(), (0, 1, 2))(q, k, v)

    return jax.jit(run), params

text, some = sys.argv[1], len(sys.argv) > 2
for causal_block in (3,) if some else (None, 3):
    run, params = program(parse(text), causal_block)
    rest = params, np.int32(1)
    right = run(*numbers, inputs, *rest)
    for kind in (AxisType.Explicit,) if some else (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(kind,) * 2)
        for spec in (P(None, "heads"),) if some else (P("data", None, "heads"), P(None, "heads")):
            split = [jax.device_put(x, NamedSharding(mesh, spec)) for x in numbers]
            with jax.set_mesh(mesh):
                found = run(*split, jax.device_put(inputs, NamedSharding(mesh, P("data"))), *rest)
            for x, y in zip(found, right, strict=True):
                np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5, err_msg=f"{text} {kind} {spec}")
            if kind == AxisType.Explicit:
                assert jax.typeof(found[0]).sharding.spec == jax.typeof(split[0]).sharding.spec
print("all right")
"""
FITTING = [text.replace("cube=(3,2,4)", "cube=(3,2,3)") for text in KINDS]  # a grid of (6, 4, 6)
LISTED = ("svg(", "radial(", "sliding_tile(", "vsa(", "sla(")
BY_LISTS = [f"{text[:-1]}, implementation=xla)" for text in FITTING if text.startswith(LISTED)]
QUICK = "vsa(keep=0.3, cube=(3,2,3), implementation=xla)"  # lists that depend on data, a gate


def test_split_along_tokens():
    """On explicit axes, which JAX has no rule for in most of what a kind does."""
    assert on_devices(PROGRAM, QUICK, "some") == "all right"


@pytest.mark.slow
@pytest.mark.parametrize("text", ["dense", "monarch(tile=(3,4,6))", *FITTING, *BY_LISTS])
def test_right_however_arrays_are_split(text):
    """Along batch and heads, or along tokens, which are gathered."""
    assert on_devices(PROGRAM, text) == "all right"
