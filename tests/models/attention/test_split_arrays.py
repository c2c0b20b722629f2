"""Every kind on arrays that a user has split over devices, on meshes of either type of axis, beside one device."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from monarch_jax import MonarchKVCache
from monarchrt.models.attention.base import Context
from monarchrt.models.attention.dense import DenseAttention
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
OVER_A_CACHE = """
import sys
from types import SimpleNamespace
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from monarchrt.models.attention.base import CacheShape, Context
from monarchrt.models.attention.notation import parse

half = 3 * 4 * 6  # tokens of a block, of two
numbers = np.random.default_rng(0).standard_normal((3, 2, 2 * half, 4, 16)).astype(np.float32)
inputs = np.random.default_rng(1).standard_normal((2, 2 * half, 8)).astype(np.float32)
sizes = SimpleNamespace(dim=8, num_heads=4, head_dim=16, dtype="float32", param_dtype="float32")

def program(attention, shape):
    layer = attention.init(sizes, rngs=nnx.Rngs(0))
    graph, params = nnx.split({} if layer is None else {attention.name: layer})
    params = jax.tree.map(lambda x: np.asarray(x) + 0.3, params)

    def run(q, k, v, inputs, params, step, at):
        where = {} if shape.layers is None else {"layer": at}
        def attend(q, k, v):
            cache = attention.init_cache(shape)
            for number in range(2):
                modules = nnx.merge(graph, params)
                context = Context(inputs=lambda: inputs[number], modules=modules, step=step, block=number)
                cache = cache.append(k[number], v[number], frame=3 * number, **where)
                out = attention.attend_cache(cache, q[number], context=context, **where)
            return out
        return attend(q, k, v), *jax.tree.leaves(jax.grad(lambda *x: (attend(*x) * q[1]).sum(), (0, 1, 2))(q, k, v))
    return run, params

def blocks(x, put=lambda x: x):
    return [put(x[:, :half]), put(x[:, half:])]

text, some = sys.argv[1], len(sys.argv) > 2
attention = parse(text)
for options in ({"layers": 2},) if some else ({}, {"layers": 2}, {"layers": 2, "detach_past": True}):
    shape = CacheShape(batch=2, frames=6, height=4, width=6, heads=4, head_dim=16, dtype="float32", **options)
    run, params = program(attention, shape)
    rest = params, np.int32(1), np.int32(1)
    right = jax.jit(run)(*map(blocks, numbers), blocks(inputs), *rest)
    assert all(np.isfinite(x).all() for x in right)
    mesh = jax.make_mesh((2, 2), ("data", "heads"), axis_types=(AxisType.Explicit,) * 2)
    for spec in (P("data", None, "heads"),) if some else (P("data", None, "heads"), P(None, "heads"), P()):
        def split(x):
            return blocks(x, lambda x: jax.device_put(x, NamedSharding(mesh, P(*spec[: x.ndim - 1]))))
        given = *map(split, numbers), split(inputs)
        with jax.set_mesh(mesh):
            found = jax.jit(run)(*given, *rest)
            assert jax.typeof(found[0]).sharding.spec == jax.typeof(given[0][1]).sharding.spec
            once = [] if some else [run(*given, *rest)]
        for several in (found, *once):
            for x, y in zip(several, right, strict=True):
                np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5, err_msg=f"{text} {options} {spec}")
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


def test_over_a_cache():
    """The cache begins on no mesh, and its arrays are split as what is written."""
    assert on_devices(OVER_A_CACHE, QUICK, "some") == "all right"


def test_what_is_known_stays_known():
    """On explicit axes a kind sees none of them, but the numbers, and what only the writer of a block knows."""
    seen = []

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Spy(DenseAttention):
        def attend_cache(self, cache, query, *, layer=None, context=Context()):  # noqa: B008
            axes = (x.sharding.mesh.explicit_axes for x in map(jax.typeof, (query, cache.key)))
            seen.append((*axes, cache._newest, layer if layer is None else int(layer), context.step))
            return super().attend_cache(cache, query, layer=layer, context=context)

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(jnp.ones((1, 12, 2, 8)), NamedSharding(mesh, PartitionSpec("data")))
    cache = MonarchKVCache.init(batch=1, frames=3, height=2, width=3, heads=2, head_dim=8, layers=2, dtype=x.dtype)
    at, plain = jnp.int32(1), jnp.ones(x.shape)
    with jax.set_mesh(mesh):
        cache = cache.append(x, x, frame=0, layer=at)
        out = Spy().attend_cache(cache, x, layer=at, context=Context(step=3))
        Spy().attend_cache(cache, plain, layer=at)  # the cache alone is on the mesh
    assert out.shape == x.shape
    assert jax.typeof(out).sharding == jax.typeof(x).sharding
    assert seen == [((), (), 2, 1, 3), ((), (), 2, 1, None)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "dense", "monarch(tile=(3,4,6))", *FITTING, *BY_LISTS, "first_blocks(1, dense, top_k(keep=0.2))",
        "first_steps(2, dense, monarch)", "first_steps(1, monarch(tile=(3,4,6)), monarch)",
    ],
)  # fmt: skip
def test_right_over_a_cache_however_arrays_are_split(text):
    """Every kind, and pairs that share a cache; in a program, and call by call."""
    assert on_devices(OVER_A_CACHE, text) == "all right"
