"""What XLA makes of a training step for a GPU that is not there: products that are done, and how they lie."""

import os
import re
import subprocess
import sys

import pytest

from tests.kernels.test_mosaic_compile import H200

STEP = """
import sys
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.train.config import ObjectiveConfig, OptimizerConfig
from monarchrt.train.data import Batch
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.sharding import Placement
from monarchrt.train.state import create_role, create_state, make_training, split_model
from monarchrt.train.step import make_train_step

config = wan_config("tiny", dim=384, ffn_dim=1024, num_heads=3, num_layers=3, dtype="bfloat16", remat=sys.argv[1])
training = make_training(OptimizerConfig(ema_decay=None), updates=1)
topology = topologies.get_topology_desc(platform="cuda", target_config=sys.stdin.read(), topology="1x1x1")
placement = Placement(batch=1, mesh="data=1", devices=list(topology.devices))

def create():
    _, params, fixed = split_model(WanModel(config, rngs=nnx.Rngs(0)))
    return create_state({"student": create_role(params, fixed, training)}, seed=0)

state = jax.eval_shape(create)
graph = split_model(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))[0]
places = placement.shardings(state)
step = make_train_step(
    make_objective(ObjectiveConfig()), {"student": graph}, {"student": training}, shardings=places
)
state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
here = jax.NamedSharding(placement.mesh, jax.P())
batch = Batch(*(
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here)
    for shape in ((1, 6, 32, 32, config.in_channels), (1, config.text_len, config.text_dim))
))
print(step.lower(state, {"student": batch}, due=("student",)).compile().as_text())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "times"), [("cheap", 2), ("full", 3)])
def test_products_are_done_once(remat, times):
    """Of each product with a layer's weights, of the tokens: itself, its input's gradient, and again if recomputed."""
    pytest.importorskip("jax_cuda13_plugin")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", STEP, remat]
    done = subprocess.run(command, input=H200, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    layouts = re.findall(r"= \(bf16\[1536,\d+\]\{(.*?)\}.* custom-call\(.*__cublas\$lt\$matmul", done.stdout)
    assert len(layouts) == times * 8 + 1  # and what patches are embedded by
    if remat == "cheap":  # else what is kept would be transposed beside gradients that lie otherwise
        assert set(layouts) == {"1,0"}
