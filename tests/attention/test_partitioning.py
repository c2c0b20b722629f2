"""Kernels under vmap and on arrays split over devices, with the XLA path in the place of kernels."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarch_jax import partitioning

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

split, keep = sys.argv[1].split(","), bool(int(sys.argv[2]))
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType[sys.argv[3]],) * 2)
sharding = NamedSharding(mesh, P(*(name or None for name in split)))
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
        ("x", False, "Auto", "(2, 4)", False),
        ("x,,,,y", False, "Auto", "(2, 2)", False),
        ("x,,,,y", False, "Explicit", "(2, 2)", False),
        (",,,,x", False, "Auto", "(4, 2)", False),
        ("x", True, "Auto", "(2, 4)", False),
        ("x", True, "Explicit", "(2, 4)", False),
        ("x,,,,y", True, "Auto", "(2, 4)", True),  # what is kept is not split along heads
        (",x", False, "Auto", "(4, 4)", True),  # query tiles are not independent of all keys
    ],
)
def test_devices_work_on_their_part(split, keep, axes, parts, gathers):
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-c", PROGRAM, split, str(int(keep)), axes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    # traced once for the whole arrays, then for what a device has
    assert done.stdout.strip().split("; ") == [*sorted({parts, "(4, 4)"}), str(gathers)]


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
    found = jax.vmap(partitioning._anywhere(fn, ("bd", "bc", "a"), ("bd", "b")), in_axes=axes)(*given)
    for x, y in zip(found, jax.vmap(fn, in_axes=axes)(*given), strict=True):
        np.testing.assert_array_equal(x, y)
