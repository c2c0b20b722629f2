"""Checkpoints of a small state, read back under the conditions that a run meets."""

import dataclasses
import errno
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.errors import UserError
from monarchrt.train.checkpointing import Checkpoints
from monarchrt.train.config import OptimizerConfig
from monarchrt.train.data import Batch
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.objectives.settings import FlowConfig
from monarchrt.train.state import create_role, create_state, make_training, split_model, to_arrays
from monarchrt.train.step import make_train_step


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.proj = nnx.Linear(64, 64, rngs=rngs)

    def __call__(self, latents, timesteps, text):
        return self.proj(latents)


@pytest.fixture(scope="module")
def training():
    graph, params, frozen = split_model(Network(nnx.Rngs(0)))
    training = make_training(OptimizerConfig(), updates=10)
    step = make_train_step(make_objective(FlowConfig()), {"student": graph}, {"student": training}, configs={})
    batches = {"student": Batch(np.ones((2, 1, 2, 2, 64), np.float32), np.zeros((2, 1, 1), np.float32))}

    def fresh():
        return create_state({"student": create_role(jax.tree.map(jnp.copy, params), frozen, training)}, seed=0)

    return fresh, lambda state: step(state, batches, due=("student",))[0]


def accept(identity, step):
    pass


def values(state):
    return {name: np.array(array) for name, array in to_arrays(state).items()}


def test_what_is_read_is_what_was_saved_although_the_state_was_donated(training, tmp_path):
    fresh, step = training
    checkpoints = Checkpoints(tmp_path)
    state = step(fresh())
    saved = values(state)
    checkpoints.save(state, {"name": "a"})
    for _ in range(20):  # overwrites the donated buffers while the save goes on
        state = step(state)
    checkpoints.wait()
    restored = checkpoints.restore(fresh(), check=accept, note=pytest.fail)
    assert restored is not None
    for name, array in values(restored).items():
        np.testing.assert_array_equal(array, saved[name], err_msg=name)
    assert int(restored.step) == 1
    # and it trains on as the state itself does
    again = step(restored)
    assert int(again.step) == 2


def test_only_the_newest_are_kept(training, tmp_path):
    fresh, step = training
    checkpoints = Checkpoints(tmp_path, keep=2)
    state = fresh()
    for _ in range(4):
        state = step(state)
        checkpoints.save(state, {})
    checkpoints.close()
    assert checkpoints.steps() == [3, 4]
    assert Checkpoints(tmp_path).steps() == [3, 4]


def test_an_empty_folder_has_nothing(training, tmp_path):
    fresh, _ = training
    assert Checkpoints(tmp_path).restore(fresh(), check=accept, note=pytest.fail) is None


def test_leftovers_of_a_killed_save_are_removed(training, tmp_path):
    leftover = tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp"
    leftover.mkdir(parents=True)
    assert Checkpoints(tmp_path).steps() == []
    assert not leftover.exists()


@pytest.fixture
def two(training, tmp_path):
    fresh, step = training
    checkpoints = Checkpoints(tmp_path)
    state = step(fresh())
    checkpoints.save(state, {})
    checkpoints.save(step(state), {})
    checkpoints.close()
    return tmp_path


def test_wrong_contents_are_noticed_even_if_they_can_be_read(training, two):
    fresh, _ = training
    # the description holds the checksums: a wrong one is what silently changed data looks like
    about = two / "checkpoints/2/about/metadata"
    content = json.loads(about.read_text())
    content["arrays"]["roles.student.params.proj.kernel"]["checksum"] ^= 1
    about.write_text(json.dumps(content))
    notes = []
    restored = Checkpoints(two).restore(fresh(), check=accept, note=notes.append)
    assert restored is not None
    assert int(restored.step) == 1
    assert len(notes) == 1
    assert "step 2 is corrupt, continuing from step 1" in notes[0]
    assert "checksum of roles.student.params.proj.kernel" in notes[0]
    assert (two / "unreadable_checkpoints/2/state").is_dir()
    assert Checkpoints(two).steps() == [1]


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_damaged_data_falls_back(training, two, damage):
    fresh, _ = training
    data = max((two / "checkpoints/2/state").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    if damage == "remove":
        data.unlink()
    elif damage == "truncate":
        data.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 0x10
        data.write_bytes(content)
    notes = []
    restored = Checkpoints(two).restore(fresh(), check=accept, note=notes.append)
    assert restored is not None
    assert int(restored.step) == 1
    assert "step 2 is corrupt, continuing from step 1" in notes[0]


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory"),
        MemoryError(),
        PermissionError(errno.EACCES, "no"),
        OSError(errno.EIO, "input/output error"),
        ValueError("PERMISSION_DENIED: Error opening local file"),
    ],
    ids=repr,
)
def test_what_is_not_the_checkpoints_fault_sets_nothing_aside(training, two, monkeypatch, error):
    fresh, _ = training

    def fail(*_):
        raise error

    monkeypatch.setattr("monarchrt.models.generate.run_arrays.read_arrays", fail)
    checkpoints = Checkpoints(two)
    with pytest.raises(UserError, match=r"step 2 .* could not be read, .* nothing was changed"):
        checkpoints.restore(fresh(), check=accept, note=pytest.fail)
    with pytest.raises(UserError, match=r"step 2 .* could not be read"):
        checkpoints.restore_parameters(fresh().roles["student"].params)
    assert checkpoints.steps() == [1, 2]
    assert not (two / "unreadable_checkpoints").exists()


def test_none_can_be_read(training, two):
    """The error says what is wrong with the newest."""
    fresh, _ = training
    for step in (1, 2):
        about = two / f"checkpoints/{step}/about/metadata"
        content = json.loads(about.read_text())
        part = "kernel" if step == 2 else "bias"
        content["arrays"][f"roles.student.params.proj.{part}"]["checksum"] ^= 1
        about.write_text(json.dumps(content))
    message = (
        r"steps 1, 2; the newest: ValueError: the checksum of roles.student.params.proj.kernel is wrong\); start again"
    )
    with pytest.raises(UserError, match=message):
        Checkpoints(two).restore(fresh(), check=accept, note=lambda line: None)
    assert Checkpoints(two).steps() == [1, 2]


@pytest.mark.parametrize("missing", ["about", "state"])
def test_missing_parts_fall_back(training, two, missing):
    fresh, _ = training
    (two / "checkpoints/2" / missing).rename(two / "elsewhere")
    notes = []
    restored = Checkpoints(two).restore(fresh(), check=accept, note=notes.append)
    assert restored is not None
    assert int(restored.step) == 1
    assert len(notes) == 1


def test_a_refused_identity_is_an_error_not_a_fall_back(training, two):
    fresh, _ = training

    def refuse(identity, step):
        raise UserError(f"not step {step}")

    with pytest.raises(UserError, match="not step 2"):
        Checkpoints(two).restore(fresh(), check=refuse, note=pytest.fail)
    assert Checkpoints(two).steps() == [1, 2]


def test_parameters_of_another_run(training, two, tmp_path_factory):
    fresh, step = training
    state = step(step(fresh()))
    params = Checkpoints(two).restore_parameters(fresh().roles["student"].params)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(state.roles["student"].average), strict=True):
        np.testing.assert_array_equal(one, other)
    _, larger, _ = split_model(nnx.Linear(64, 32, rngs=nnx.Rngs(0)))
    with pytest.raises(UserError, match="another model"):
        Checkpoints(two).restore_parameters(larger)
    wider = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:-1], 32)), fresh().roles["student"].params)
    with pytest.raises(UserError, match="has shape"):
        Checkpoints(two).restore_parameters(wider)
    with pytest.raises(UserError, match="no checkpoint"):
        Checkpoints(tmp_path_factory.mktemp("empty")).restore_parameters(fresh().roles["student"].params)


def test_without_an_average_the_parameters_themselves_are_taken(training, tmp_path):
    fresh, step = training
    state = step(fresh())
    bare = dataclasses.replace(state.roles["student"], average=None)
    state = dataclasses.replace(state, roles={"student": bare})
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state, {})
    checkpoints.wait()
    params = checkpoints.restore_parameters(fresh().roles["student"].params)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(state.roles["student"].params), strict=True):
        np.testing.assert_array_equal(one, other)
