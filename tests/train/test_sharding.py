"""Several devices, as virtual CPU devices in processes of their own."""

import os
import subprocess
import sys

import pytest

from monarchrt.models.errors import UserError
from monarchrt.train.run_settings import RunConfig
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


@pytest.mark.slow
def test_a_run_goes_on_with_another_mesh(baseline, arguments, run, tmp_path):
    """Trained, evaluated and sampled on four devices; then on one; then on two. As the baseline, which has one."""
    folder = tmp_path / "run"
    command = [*arguments, "--folder", folder, "--sample-every", "2"]
    four, two = (
        {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={count}"} for count in (4, 2)
    )
    for steps, mesh, devices in ((2, "data=2,heads=2", four), (4, "data=1", {}), (6, "heads=2", two)):
        code, stderr = run([*command, "--steps", steps, "--mesh", mesh, *["--resume"] * (steps > 2)], **devices)
        assert code == 0, stderr
        assert (folder / "samples" / f"step_{steps:06d}.mp4").stat().st_size
    one, found = ([record["loss"] for record in history(path) if "loss" in record][:6] for path in (baseline, folder))
    assert found == pytest.approx(one, rel=1e-4)
    expected = next(record["held_out_loss"] for record in history(baseline) if "held_out_loss" in record)
    assert history(folder)[-1]["held_out_loss"] == pytest.approx(expected, rel=1e-4)
    # a run that is split by a mesh can go on without one, and by its short form
    code, stderr = run([*command, "--steps", 7, "--resume", "--sharding", "fsdp"], **two)
    assert code == 0, stderr
    assert "mesh changes from heads=2 to None" in stderr


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": "data=2,rows=2"}, "mesh is 'data=2,rows=2', which has an axis 'rows'"),
        (
            {"mesh": "data=2", "sharding": "fsdp"},
            "sharding is fsdp, but mesh data=2 defines it too; leave one of them out",
        ),
    ],
)
def test_settings_that_contradict_each_other(settings, message):
    with pytest.raises(UserError, match=message):
        RunConfig(**settings)


@pytest.mark.slow
def test_heads_that_do_not_divide(environment, arguments, run, tmp_path):
    """The network's heads are known before anything is compiled or written."""
    three = {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=3"}
    code, stderr = run([*arguments, "--folder", tmp_path / "run", "--mesh", "heads=3"], **three)
    assert code == 2
    assert "mesh is heads=3, but the network has 2 attention heads, which heads=3 does not divide" in stderr
    assert "heads could be 1 or 2" in stderr
    assert not (tmp_path / "run").exists()


def test_fsdp_splits_the_large_arrays_and_trains_as_one_device_does(environment):
    program = """
import jax, jax.numpy as jnp
from flax import nnx
from monarchrt.models.checkpoints.checksums import checksums
from monarchrt.train.config import OptimizerConfig
from monarchrt.train.objectives.settings import FlowConfig
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
parts = make_objective(FlowConfig()), {"student": graph}, {"student": training}
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
one, expected = train(make_train_step(*parts, configs={}), start, batch)
placement = Placement(batch=4, accumulation=2, state="fsdp")
state = create()
state = jax.device_put(state, placement.shardings(state))
step = make_train_step(*parts, configs={}, shardings=placement.shardings(state))
print(len(jax.devices()), kinds(state))
print(placement.sharding((30, 1536, 1536)).spec, placement.sharding((30, 1535, 1535)).spec)  # never the layers
state, losses = train(step, state, placement.batch(batch))
print(kinds(state), step._cache_size())
wide = jax.device_put(jnp.ones((64, 256)), placement.sharding((64, 256)))  # split on its last axis
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
        "P(None, 'fsdp') P()",
        "[0.5, 0.5, 1.0] 1",
        "False",
        "True",
        "True",
    ]


MESH = """
import sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import use_abstract_mesh
from monarchrt.models.attention.notation import parse
from monarchrt.models.collectives import collectives
from monarchrt.models.wan import WanModel, layers, wan_config
from monarchrt.train.config import OptimizerConfig
from monarchrt.train.objectives.settings import FlowConfig
from monarchrt.train.sharding import Placement
from monarchrt.train.data import Batch
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.state import create_role, create_state, make_training, split_model
from monarchrt.train.step import make_train_step
what, remat, attention, *meshes = sys.argv[1:]
layers.HIDDEN_BYTES = 2 ** 14  # a frame after the other
config = wan_config(
    "tiny", dim=96, ffn_dim=192, num_heads=4, num_layers=2, text_dim=64, text_len=8, remat=remat,
    attention=parse(attention), unroll_layers=what == "unrolled", dtype="bfloat16" if what == "rounded" else "float32",
)
graph = split_model(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))[0]
training = make_training(OptimizerConfig(learning_rate=1e-2, eps=1e-3), updates=5)
numbers = np.random.default_rng(0).normal(size=(2, 14336)).astype(np.float32)
batch = Batch(numbers[0].reshape(4, 2, 8, 14, 16), numbers[1, :2048].reshape(4, 8, 64))
@jax.jit
def create():
    params, fixed = split_model(WanModel(config, rngs=nnx.Rngs(0)))[1:]
    params = jax.tree.map(lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), params)
    return create_state({"student": create_role(params, fixed, training)}, seed=0)
def network(placement):
    def loss(params, batch):
        with use_abstract_mesh(placement.mesh.abstract_mesh):
            flow = nnx.merge(graph, params)(batch.latents, jnp.arange(1.0, 5) * 200, batch.text)
        return (flow * batch.latents).mean(), flow
    return jax.jit(jax.value_and_grad(loss, has_aux=True))
def compute(mesh, devices):
    placement = Placement(batch=4, mesh=mesh, devices=jax.devices()[:devices])
    shardings = placement.shardings(jax.eval_shape(create))
    state, data = jax.device_put(create(), shardings), placement.batch(batch)
    if what != "step":
        params = state.roles["student"].params
        program = network(placement).lower(params, data).compile()
        results = program(params, data)
    else:
        step = make_train_step(make_objective(FlowConfig()), {"student": graph}, {"student": training},
                               configs={"student": config}, shardings=shardings)
        program, data = step.lower(state, {"student": data}, due=("student",)).compile(), {"student": data}
        state, metrics = program(state, data)
        state, metrics = program(state, data)
        results = metrics, state.roles["student"].params
    found = collectives(program.as_text())
    bias_and_kernel = jax.tree.leaves(state.roles["student"].params["blocks"]["ffn"]["fc1"])
    return jax.device_get(results), found, [x.addressable_shards[0].data.size / x.size for x in bias_and_kernel]
right, none, whole = compute(None, 1)
assert not none and whole == [1, 1]
shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(create).roles["student"].params)]
weights = {shape[-2:] for shape in shapes if len(shape) > 1} | {(64, 96)}
for mesh in meshes:
    found, exchanged, parts = compute(mesh, 4)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
        if what == "rounded":
            assert np.linalg.norm(x - y) <= 0.05 * np.linalg.norm(y)
        else:
            np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-4)
    assert all(x.loops < 2 for x in exchanged), [x for x in exchanged if x.loops > 1]  # none for each frame
    for x in exchanged:
        if x.kind == "all-gather":  # of matrices; neither of vectors nor of activations
            gathered = {tuple(n for n in shape if n != 1) for shape in x.shapes}
            assert gathered <= weights and all(len(shape) == 2 for shape in gathered), x
    counts = [sum(x.times for x in exchanged if x.kind == kind) for kind in ("all-gather", "all-reduce")]
    halves = [x.kind == "collective-permute" and x.shapes[0][-2:] == (2, 24) for x in exchanged]  # of 4 heads
    sent = sum(x.times for x, half in zip(exchanged, halves, strict=True) if half or x.kind == "all-to-all")
    print(mesh, *counts, sent, *parts, flush=True)
"""
MATRICES = 10  # of a block: four projections of each attention, two of the feed-forward


def on_four_devices(environment, *arguments: str) -> dict[str, list[float]]:
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", MESH, *arguments],
        env=environment | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    return {mesh: [float(number) for number in numbers] for mesh, *numbers in lines}


def test_a_mesh_has_the_gradients_of_one_device(environment):
    """Weights are gathered once in each pass of a block, and tokens are exchanged for heads around the attention.

    28 tokens are no multiple of 8 on each of two devices: some are added.
    """
    found = on_four_devices(environment, "gradients", "full", "dense", "fsdp=2,heads=2")
    gathers, reduces, exchanges, *parts = found["fsdp=2,heads=2"]
    assert parts == [1.0, 0.5]  # vectors are whole everywhere
    assert gathers <= 2 * (2 * MATRICES) + 8
    assert reduces < 40
    # halves of q, k and v together, and of the output, of 2 layers, forward, again, and backward
    assert exchanges == 2 * 2 * 3


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("what", ["rounded", "unrolled"])
def test_no_pass_keeps_whole_weights(environment, what, remat):
    """The backward pass gathers them again: also where float32 is rounded first, and where no loop is about a layer."""
    gathers, *_ = on_four_devices(environment, what, remat, "dense", "fsdp=4")["fsdp=4"]
    assert gathers >= 2 * (2 * MATRICES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "attention"), [("none", "dense"), ("full", "monarch(tile=(1,4,7))"), ("cheap", "monarch(tile=(1,4,7))")]
)
def test_every_mesh_trains_as_one_device_does(environment, remat, attention):
    meshes = ["data=4", "fsdp=4", "heads=4", "data=2,heads=2", "data=2,fsdp=2", "fsdp=2,heads=2"]
    found = on_four_devices(environment, "step", remat, attention, *meshes)
    assert list(found) == meshes
    for mesh, (gathers, reduces, exchanges, *_) in found.items():
        assert gathers <= (2 * (2 * MATRICES) + 8) * ("fsdp" in mesh), mesh
        # with remat none too, weights are gathered again rather than kept whole for the backward pass
        assert ("fsdp" in mesh) == (gathers >= 2 * (2 * MATRICES)), mesh
        assert (exchanges > 0) == ("heads" in mesh), mesh
        assert reduces < 40, mesh


def test_devices_must_divide_the_batch():
    class Device:
        pass

    with pytest.raises(UserError, match="batch is 6, which 2 devices times accumulation 2 do not divide"):
        Placement(batch=6, accumulation=2, devices=[Device(), Device()])
