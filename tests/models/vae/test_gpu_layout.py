"""What XLA makes of a residual block of the autoencoder for an H200, compiled on a machine without a card."""

import os
import re
import subprocess
import sys

import pytest

from tests.kernels.test_mosaic_compile import H200, missing_wheels

pytestmark = pytest.mark.skipif(bool(missing_wheels()), reason=f"needs {', '.join(missing_wheels())}")

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from monarchrt.models.vae.layers import ResidualBlock

topology = topologies.get_topology_desc(platform="cuda", target_config=sys.stdin.read(), topology="1x1x1")
sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
options = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
graph, state = nnx.split(nnx.eval_shape(lambda: ResidualBlock(96, 96, **options, rngs=nnx.Rngs(0))))

def struct(shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

state = jax.tree.map(lambda leaf: struct(leaf.shape), state)
past = (struct((1, 2, 48, 80, 96)),) * 2
run = jax.jit(lambda state, x, past: nnx.merge(graph, state)(x, past, first=False))
print(run.trace(state, struct((1, 4, 48, 80, 96)), past).lower().compile().as_text())
"""


def test_convolutions_and_norms():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # which would run them
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=H200, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r'custom_call_target="__cudnn\$conv', done.stdout)) == 2
    layouts = set(re.findall(r"dim_labels=(\S+?)[,\s]", done.stdout))
    assert layouts == {"b01f_o01i->b01f"}, layouts
    scales = re.findall(r'"side_input_scale":(\d)', done.stdout)
    assert sorted(scales) == ["0", "1"], scales  # the second convolution adds the block's input itself
    rows = 4 * 48 * 80  # norms run over two axes; over five, XLA searches for tiles far longer
    assert len(re.findall(rf"bf16\[{rows},96\]\S* fusion", done.stdout)) == 2
