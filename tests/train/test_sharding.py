"""Several devices, as virtual CPU devices in processes of their own."""

import os
import subprocess
import sys

import pytest

from monarchrt.models.errors import UserError
from monarchrt.train.sharding import Placement

from .conftest import history

TWO_DEVICES = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["replicated", "fsdp"])
def test_two_devices_train_as_one_does(baseline, arguments, run, tmp_path, sharding):
    folder = tmp_path / "run"
    command = [*arguments, "--folder", folder, "--sharding", sharding]
    code, stderr = run([*command, "--steps", "4"], **TWO_DEVICES)
    assert code == 0, stderr
    # the state is read back to where it lives
    code, stderr = run([*command, "--steps", "6", "--resume"], **TWO_DEVICES)
    assert code == 0, stderr
    assert "at step 4" in stderr
    one = [record["loss"] for record in history(baseline) if "loss" in record][:6]
    two = [record["loss"] for record in history(folder) if "loss" in record]
    assert two == pytest.approx(one, rel=1e-4)
    expected = next(record["held_out_loss"] for record in history(baseline) if "held_out_loss" in record)
    assert history(folder)[-1]["held_out_loss"] == pytest.approx(expected, rel=1e-4)


def test_fsdp_splits_the_large_arrays_and_trains_as_one_device_does(environment):
    program = """
import jax, jax.numpy as jnp
from flax import nnx
from monarchrt.models.checkpoints.checksums import checksums
from monarchrt.train.config import ObjectiveConfig, OptimizerConfig
from monarchrt.train.sharding import Placement
from monarchrt.train.data import Batch
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.state import create_role, create_state, make_training, split_model
from monarchrt.train.step import make_train_step
class Network(nnx.Module):
    def __init__(self):
        self.proj = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    def __call__(self, latents, timesteps, text):
        return self.proj(latents)
def kinds(state):
    role = state.roles["student"]
    kernel, bias = role.params["proj"]["kernel"][...], role.params["proj"]["bias"][...]
    moment = role.optimizer[1][0].mu["proj"]["kernel"][...]
    return [x.addressable_shards[0].data.size / x.size for x in (kernel, moment, bias)]
settings = OptimizerConfig(accumulation=2)
graph, params, fixed = split_model(Network())
training = make_training(settings, updates=5)
parts = make_objective(ObjectiveConfig()), {"student": graph}, {"student": training}
batch = Batch(jax.random.normal(jax.random.key(1), (4, 1, 2, 2, 64)), jnp.zeros((4, 1, 1)))
def create():
    return create_state({"student": create_role(params, fixed, training)}, seed=0)
def train(step, state, batch):
    losses = []
    for _ in range(3):
        state, metrics = step(state, {"student": batch}, due=("student",))
        losses.append(metrics["student"]["loss"])
    assert bool(metrics["student"]["finite"])
    return state, jnp.array(losses)
initial = jax.tree.map(jnp.copy, params)  # a step's input state is donated
start = jax.tree.map(jnp.copy, create())
one, expected = train(make_train_step(*parts), start, batch)
placement = Placement(batch=4, accumulation=2, state="fsdp")
state = create()
state = jax.device_put(state, placement.shardings(state))
step = make_train_step(*parts, shardings=placement.shardings(state))
print(len(jax.devices()), kinds(state))
print(placement.sharding((30, 1536, 1536)).spec, placement.sharding((30, 1535, 1535)).spec)  # never the layers
state, losses = train(step, state, placement.batch(batch))
print(kinds(state), step._cache_size())
wide = jax.device_put(jnp.ones((4, 256)), placement.sharding((4, 256)))  # split on its last axis
print("all-gather" in checksums.lower({"wide": wide}).compile().as_text())
first, last = one.roles["student"].params, state.roles["student"].params
pairs = zip(jax.tree.leaves((first, expected)), jax.tree.leaves((last, losses)), strict=True)
print(all(bool(jnp.allclose(x, y, rtol=1e-5, atol=1e-6)) for x, y in pairs))
moved = zip(jax.tree.leaves(initial), jax.tree.leaves(last), strict=True)
print(all(float(abs(x - y).max()) > 1e-5 for x, y in moved))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment | TWO_DEVICES, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2 [0.5, 0.5, 1.0]",
        "P(None, 'data') P()",
        "[0.5, 0.5, 1.0] 1",
        "False",
        "True",
        "True",
    ]


def test_fsdp_gathers_weights_not_activations(environment):
    """With the batch and the weights split along one mesh axis the compiler could do either."""
    program = """
import re
import jax, numpy as np
from flax import nnx
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.train.config import ObjectiveConfig, OptimizerConfig
from monarchrt.train.sharding import Placement
from monarchrt.train.data import Batch
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.state import create_role, create_state, make_training, split_model
from monarchrt.train.step import make_error_fn, make_train_step
config = wan_config("tiny", dim=192, ffn_dim=768, num_heads=4, num_layers=8, text_dim=64, text_len=8, remat="full")
graph, params, fixed = split_model(WanModel(config, rngs=nnx.Rngs(0)))
objective, graphs = make_objective(ObjectiveConfig()), {"student": graph}
training = make_training(OptimizerConfig(), updates=5)
placement = Placement(batch=8, state="fsdp")
state = create_state({"student": create_role(params, fixed, training)}, seed=0)
shardings = placement.shardings(state)
state = jax.device_put(state, shardings)
latents, words = np.zeros((8, 5, 32, 32, 16), np.float32), np.zeros((8, 8, 64), np.float32)
batch = placement.batch(Batch(latents, words))
step = make_train_step(objective, graphs, {"student": training}, shardings=shardings)
errors = make_error_fn(objective, graphs, shardings=shardings)
sigma, = placement.batch((np.zeros((8, 5), np.float32),))
role = state.roles["student"]
lowered = (
    step.lower(state, {"student": batch}, due=("student",)),
    errors.lower({"student": (role.params, role.frozen)}, batch, (batch.latents, sigma)),
)
for text in (x.compile().as_text() for x in lowered):
    moved = re.findall(r"= \\S+\\[([\\d,]+)\\]\\S* (?:all-gather|all-reduce|all-to-all)\\(", text)
    print(len(moved) > 0, [shape for shape in moved if ",256,192" in shape or ",256,768" in shape])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment | TWO_DEVICES, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["True []"] * 2


def test_devices_must_divide_the_batch():
    class Device:
        pass

    with pytest.raises(UserError, match="batch is 6, which 2 devices times accumulation 2 do not divide"):
        Placement(batch=6, accumulation=2, devices=[Device(), Device()])
