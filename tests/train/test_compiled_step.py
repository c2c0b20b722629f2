"""What XLA makes of a training step for a GPU that is not there: products that are done, and how they lie."""

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from monarchrt.models.wan import wan_config
from monarchrt.train.config import OptimizerConfig
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.objectives.settings import FlowConfig
from monarchrt.train.state import make_training
from monarchrt.train.step import may_write_stacks
from tests.kernels.test_mosaic_compile import H200

STEP = """
import sys
import jax, jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from monarchrt.models.mesh import MeshShape
from monarchrt.models.sharding import partition
from monarchrt.models.wan import WanModel, layers, wan_config
from monarchrt.train.config import OptimizerConfig
from monarchrt.train.data import Batch
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.objectives.settings import FlowConfig
from monarchrt.train.sharding import Placement
from monarchrt.train.state import create_role, create_state, make_training, split_model
from monarchrt.train.step import make_train_step

if "groups" in sys.argv:  # of frames, as in a large clip
    layers.HIDDEN_BYTES = 2**20
config = wan_config("tiny", dim=384, ffn_dim=1024, num_heads=3, num_layers=3, dtype="bfloat16", remat=sys.argv[1])
mesh = MeshShape.parse(sys.argv[2])
training = make_training(OptimizerConfig(ema_decay=None), updates=1)
topology = topologies.get_topology_desc(platform="cuda", target_config=sys.stdin.read(), topology=f"1x1x{mesh.size}")
batch = mesh.data * mesh.fsdp
placement = Placement(batch=batch, mesh=str(mesh), devices=list(topology.devices))

def create():
    _, params, fixed = split_model(WanModel(config, rngs=nnx.Rngs(0)))
    return create_state({"student": create_role(params, fixed, training)}, seed=0)

state = jax.eval_shape(create)
graph = split_model(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))[0]
places = placement.shardings(state)
step = make_train_step(
    make_objective(FlowConfig()),
    {"student": graph},
    {"student": training},
    configs={"student": config},
    shardings=places,
)
state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
here = jax.NamedSharding(placement.mesh, partition(placement.mesh, (batch,), ("batch",)))
batch = Batch(*(
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here)
    for shape in ((batch, 6, 32, 32, config.in_channels), (batch, config.text_len, config.text_dim))
))
print(step.lower(state, {"student": batch}, due=("student",)).compile().as_text())
"""


def compiled(remat: str, mesh: str, *settings: str, flags: str = "") -> str:
    """The text of a step's program."""
    pytest.importorskip("jax_cuda13_plugin")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    command = [sys.executable, "-c", STEP, remat, mesh, *settings]
    done = subprocess.run(command, input=H200, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "times"), [("cheap", 2), ("full", 3)])
def test_products_are_done_once(remat, times):
    """Of each product with a layer's weights, of the tokens: itself, its input's gradient, and again if recomputed."""
    text = compiled(remat, "data=1")
    layouts = re.findall(r"= \(bf16\[1536,\d+\]\{(.*?)\}.* custom-call\(.*__cublas\$lt\$matmul", text)
    assert len(layouts) == times * 8 + 1  # and what patches are embedded by
    in_place = re.findall(r"= \(bf16\[3,1536,1024\].* kind=kCustom", text)  # hidden layers, by the product itself
    assert len(in_place) == (remat == "cheap")
    if remat == "cheap":  # else what is kept would be transposed beside gradients that lie otherwise
        assert set(layouts) == {"1,0"}


@pytest.mark.parametrize(
    ("platform", "network", "accumulation", "written"),
    [
        ("gpu", {"remat": "cheap"}, 1, True),
        ("cpu", {"remat": "cheap"}, 1, False),
        ("gpu", {"remat": "dots"}, 1, False),
        ("gpu", {"remat": "cheap", "unroll_layers": True}, 1, False),
        ("gpu", {"remat": "cheap"}, 2, False),
    ],
)
def test_stacks_are_written_by_one_gpu_alone(monkeypatch, platform, network, accumulation, written):
    """Where anything else were in a loop, XLA would form what is kept twice."""
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform)])
    objective, training = (
        make_objective(FlowConfig()),
        make_training(OptimizerConfig(accumulation=accumulation), updates=1),
    )
    configs = {"student": wan_config("tiny", **network)}
    assert may_write_stacks(objective, configs, {"student": training}, None) == written
    for other in ({}, {"student": None}):  # of a network that is none of ours
        assert not may_write_stacks(objective, other, {"student": training}, None)


@pytest.mark.slow
def test_nothing_is_transposed_by_heads():
    """Gradients of queries, keys and values lie as these do, and so do those that are formed again."""
    text = compiled("full", "heads=3", "groups")
    layouts = re.findall(r"= \(bf16\[528,384\]\{(.*?)\}.* custom-call\(.*__cublas\$lt\$matmul", text)
    assert len(layouts) == 3 * 3 + 1  # each, again, and its input's gradient; and what patches are embedded by
    assert set(layouts) == {"1,0"}


BESIDE = "--xla_gpu_enable_pipelined_all_gather=false"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "mesh", "flags", "ahead"),
    [
        ("full", "fsdp=2", "", 0.5),  # two layers a turn, of which one is used in it
        ("none", "fsdp=2", "", 0.5),
        ("cheap", "data=2,fsdp=2", "", 0.5),
        ("full", "fsdp=2", BESIDE, 0.0),
    ],
)
def test_weights_are_gathered_a_layer_ahead(remat, mesh, flags, ahead):
    """What is gathered in a turn of a loop over layers, forward and backward, leaves it for the next."""
    shares = gathered_for_the_next_turn(compiled(remat, mesh, flags=flags))
    assert shares == [ahead, ahead]


def gathered_for_the_next_turn(text: str) -> list[float]:
    """Of each loop whose body gathers: the share of these arrays that nothing but its result reads."""
    shares = []
    bodies = set(re.findall(r"body=%?([\w.\-]+)", text))
    for computation in re.split(r"\n(?=%|ENTRY )", text):
        name = re.match(r"%([\w.\-]+) \(", computation)
        if name is None or name[1] not in bodies:
            continue
        lines = re.findall(r"^ +(ROOT )?%([\w.\-]+) = .*? ([\w\-]+)\((.*)$", computation, re.MULTILINE)
        readers: dict[str, list[str]] = {}
        kinds = {own: "ROOT" if root else kind for root, own, kind, _ in lines}
        for _, own, _, rest in lines:
            for operand in set(re.findall(r"%([\w.\-]+)", rest.partition("), ")[0])):
                readers.setdefault(operand, []).append(own)
        passes = ("all-gather-done", "get-tuple-element", "bitcast", "copy")

        def leaves(array: str, kinds=kinds, readers=readers, passes=passes) -> bool:
            return all(
                kinds[reader] == "ROOT" or (kinds[reader] in passes and leaves(reader)) for reader in readers[array]
            )

        gathers = [own for own, kind in kinds.items() if kind in ("all-gather", "all-gather-start")]
        if gathers:
            shares.append(sum(map(leaves, gathers)) / len(gathers))
    return shares
