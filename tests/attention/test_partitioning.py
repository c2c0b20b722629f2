"""Kernels under vmap and on arrays split over devices, with the XLA path in the place of kernels."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import partitioning, xla
from monarch_jax.contract import Problem, differentiable
from monarch_jax.partitioning import forward_anywhere, vjp_anywhere
from tests.devices import on_devices

PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from monarch_jax import xla
from monarch_jax.contract import Problem, differentiable
from monarch_jax.partitioning import forward_anywhere, vjp_anywhere

class Shapes(list):
    def forward(self, problem, q, k, v, visible):
        self.append(q.shape)
        return xla.forward(problem, q, k, v, visible)
    def keeping(self, problem, q, k, v, visible):
        batch, heads = q.shape[0], q.shape[4]
        return *self.forward(problem, q, k, v, visible), (q.transpose(0, 4, 1, 2, 3, 5).reshape(batch * heads, -1),)
    def vjp(self, problem, residuals, d_out):
        q = residuals.q
        if problem.keep:
            kept = residuals.kept[0].reshape(q.shape[0], q.shape[4], *q.shape[1:4], -1)
            q = kept.transpose(0, 2, 3, 4, 1, 5)
        self.append(q.shape)
        residuals = type(residuals)(q, *(getattr(residuals, x) for x in ("k", "v", "visible", "out", "lse")))
        return xla.vjp(problem, residuals, d_out)

split, keep = [name.split("+") for name in sys.argv[1].split(",")], bool(int(sys.argv[2]))
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType[sys.argv[3]],) * 2)
sharding = NamedSharding(mesh, P(*(tuple(filter(None, names)) or None for names in split)))
problem, visible = Problem(scale=0.3, masked=True, keep=keep), jnp.array([1, 2, 3, 3], jnp.int32)
arrays = [jax.random.normal(key, (4, 4, 3, 5, 4, 8)) for key in jax.random.split(jax.random.key(0), 4)]
seen = Shapes()
attend = differentiable(forward_anywhere(seen.forward), vjp_anywhere(seen.vjp), forward_anywhere(seen.keeping))

def run(attend):
    def fn(q, k, v, g):
        out, vjp = jax.vjp(lambda *x: attend(problem, *x, visible), q, k, v)
        return out, *vjp(g)
    return fn

expected = jax.jit(run(xla.attend))(*arrays)
seen.clear()
program = jax.jit(run(attend), out_shardings=sharding).lower(*(jax.device_put(x, sharding) for x in arrays)).compile()
for x, y in zip(program(*(jax.device_put(x, sharding) for x in arrays)), expected, strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
print(*sorted({(shape[0], shape[4]) for shape in seen}), "all-gather" in program.as_text(), sep="; ")
"""


@pytest.mark.parametrize(
    ("split", "keep", "axes", "parts", "gathers"),
    [
        ("y+x", False, "Auto", "(1, 4)", False),
        ("x,,,,y", False, "Auto", "(2, 2)", False),
        pytest.param("x,,,,y", False, "Explicit", "(2, 2)", False, marks=pytest.mark.slow),
        pytest.param(",,,,x", False, "Auto", "(4, 2)", False, marks=pytest.mark.slow),
        pytest.param("x", True, "Auto", "(2, 4)", False, marks=pytest.mark.slow),
        ("x", True, "Explicit", "(2, 4)", False),
        ("x,,,,y", True, "Auto", "(2, 4)", True),  # what is kept is not split along heads
        (",x", False, "Auto", "(4, 4)", True),  # query tiles are not independent of all keys
    ],
)
def test_devices_work_on_their_part(split, keep, axes, parts, gathers):
    said = on_devices(PROGRAM, split, str(int(keep)), axes)
    # traced once for the whole arrays, then for what a device has
    assert said.split("; ") == [*sorted({parts, "(4, 4)"}), str(gathers)]


ANYHOW = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from monarch_jax import MonarchKVCache, backends, monarch_attention, xla
from monarch_jax.contract import Backend, differentiable
from monarch_jax.partitioning import forward_anywhere, vjp_anywhere

kernel = differentiable(forward_anywhere(xla.forward), vjp_anywhere(xla.vjp))
backends._REGISTRY["kernel"] = lambda: Backend("kernel", lambda problem, q, k: None, kernel)
backends.IMPLEMENTATIONS = tuple(backends._REGISTRY)
shape, grid, tile, some = eval(sys.argv[1])
size = int(np.prod(shape))
q, k, v = jax.random.normal(jax.random.key(0), (3, 8, grid[0] * grid[1] * grid[2], 8, 8))
expected = None
for implementation in ("kernel",) if some else ("xla", "kernel"):

    def attend(q, k, v):
        return monarch_attention(q, k, v, grid=grid, tile=tile, causal_block=tile[0], implementation=implementation)

    def run(q, k, v):
        one = attend(q, k, v)
        grads = jax.grad(lambda *x: (x[0] * attend(*x)).sum(), (0, 1, 2))(q, k, v)
        return one, *grads

    def mapped(q, k, v):
        found = jax.vmap(run, in_axes=2, out_axes=2)(*(x[:, :, :, None] for x in (q, k, v)))
        return tuple(x[:, :, :, 0] for x in found)

    if expected is None:
        expected = jax.jit(run)(q, k, v)
    for kind in AxisType.Auto, AxisType.Explicit:
        mesh = jax.make_mesh(shape, ("x", "y")[: len(shape)], axis_types=(kind,) * len(shape))
        specs = [P(None, "x"), P(None, None, None, "x"), P("x"), P(None, None, "x")]
        if len(shape) > 1:
            specs += [P("x", "y"), P(None, ("y", "x")), P(("x", "y")), P("y", None, "x"), P(None, "y", "x", None)]
        for spec in specs[:: 4 if kind == AxisType.Auto else 6] if some else specs:
            sharding = NamedSharding(mesh, spec)
            split = [jax.device_put(x, sharding) for x in (q, k, v)]
            calls = [(jax.jit(run), split)]
            if kind == AxisType.Auto:
                calls.append((jax.jit(run, in_shardings=sharding), (q, k, v)))
                if spec == P(None, "x"):
                    calls.append((jax.jit(mapped), split))
            else:
                mixed = (split[0], k, jax.device_put(v, NamedSharding(mesh, P(None, None, "x"))))
                calls.append((jax.jit(run), mixed))
            for program, arrays in calls:
                for found, right in zip(program(*arrays), expected, strict=True):
                    np.testing.assert_allclose(found, right, rtol=2e-5, atol=2e-5, err_msg=f"{kind} {spec}")
                if kind == AxisType.Explicit:
                    if not any((*spec, None, None, None)[n] for n in (1, 3)):  # each device has what it needs
                        assert "all-gather" not in program.lower(*split).compile().as_text(), spec
                    assert jax.typeof(program(*arrays)[0]).sharding.spec == jax.typeof(arrays[0]).sharding.spec
        options = dict(frames=grid[0], height=grid[1], width=grid[2], heads=8, head_dim=8, tile=tile, batch=8)
        right = MonarchKVCache.init(**options, dtype=q.dtype).append(k, v).attend(q)
        split = [jax.device_put(x, NamedSharding(mesh, P(None, "x"))) for x in (q, k, v)]

        def cached(q, k, v):
            return MonarchKVCache.init(**options, dtype=q.dtype).append(k, v).attend(q, implementation=implementation)

        np.testing.assert_allclose(jax.jit(cached)(*split), right, rtol=2e-5, atol=2e-5)
        with jax.set_mesh(mesh):
            np.testing.assert_allclose(cached(*split), right, rtol=2e-5, atol=2e-5)
            np.testing.assert_allclose(attend(*split), expected[0], rtol=2e-5, atol=2e-5)
print("all right")
"""


@pytest.mark.parametrize(
    ("shape", "grid", "tile", "some"),
    [
        ((2, 4), (2, 4, 5), (1, 2, 5), True),  # some ways to split them
        pytest.param((2, 4), (2, 4, 5), (1, 2, 5), False, marks=pytest.mark.slow),
        pytest.param((4,), (6, 4, 6), (1, 4, 6), False, marks=pytest.mark.slow),  # 6 tiles on 4 devices
        pytest.param((4,), (6, 4, 6), (3, 4, 6), False, marks=pytest.mark.slow),  # 2
        pytest.param((8,), (6, 4, 4), (1, 2, 4), False, marks=pytest.mark.slow),  # 12 on 8
        pytest.param((2, 2), (6, 4, 6), (1, 4, 3), False, marks=pytest.mark.slow),
    ],
)
def test_right_however_a_users_arrays_are_split(shape, grid, tile, some):
    """Along any axes, evenly into tiles or not: what is not split by batch or heads is gathered."""
    said = on_devices(ANYHOW, repr((shape, grid, tile, some)), count=math.prod(shape))
    assert said == "all right"


@pytest.mark.parametrize("mapped", [(True, False, False), (True, True, False), (True, True, True), (False, True, True)])
def test_rule_for_vmap(mapped):
    """The mapped axis joins the batch; where `visible` is mapped, one example runs after the other."""

    def fn(q, k, visible):
        return q * 2 + k.sum(1, keepdims=True) * visible.sum(), (q - k[:, :1]).sum(-1)

    arrays = [jnp.arange(24.0).reshape(3, 2, 4), jnp.arange(24.0, 72).reshape(3, 2, 8)[..., :4], jnp.array([1, 5, 2])]
    arrays = [x[..., None] if x.ndim == 1 else x for x in arrays]
    given = [x if m else x[0] for x, m in zip(arrays, mapped, strict=True)]
    axes = tuple(0 if m else None for m in mapped)
    # with a batch axis of 2 inside: [3, 2, 4] maps to [2, 4]
    found = jax.vmap(partitioning.anywhere(fn, ("bd", "bc", "a"), ("bd", "b")), in_axes=axes)(*given)
    for x, y in zip(found, jax.vmap(fn, in_axes=axes)(*given), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    "second", [lambda f: jax.grad(lambda x: jax.grad(f)(x).sum()), lambda f: jax.jacfwd(jax.grad(f))]
)
def test_kernels_have_no_second_derivatives(second):
    """In the forward pass, and in the backward pass."""
    kernel = differentiable(forward_anywhere(xla.forward), vjp_anywhere(xla.vjp))
    q, k, v = jnp.ones((3, 1, 2, 2, 2, 1, 4))

    def loss(q):
        return kernel(Problem(scale=0.5), q, k, v, jnp.array([2, 2])).sum()

    assert jax.grad(loss)(q).shape == q.shape
    with pytest.raises(NotImplementedError, match="no second ones; use implementation='xla'"):
        second(loss)(q)
