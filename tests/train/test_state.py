"""The state and one compiled step, on a network of one matrix."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from monarchrt.models.errors import UserError
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.train.config import OptimizerConfig
from monarchrt.train.data import Batch
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.objectives.scores import in_bins
from monarchrt.train.objectives.settings import FlowConfig
from monarchrt.train.state import (
    all_finite,
    check_trainable,
    checksums,
    create_role,
    create_state,
    from_arrays,
    learning_rate_schedule,
    make_optimizer,
    make_training,
    parameter_names,
    split_model,
    to_arrays,
    trainable_filter,
    update_ema,
)  # fmt: skip
from monarchrt.train.step import accumulate, make_train_step
from tests.untyped import untyped

SHAPE = (4, 2, 3, 3, 5)


class Linear(nnx.Module):
    """v = latents @ W + b, less a mean of the text."""

    def __init__(self, rngs: nnx.Rngs):
        self.proj = nnx.Linear(SHAPE[-1], SHAPE[-1], rngs=rngs)

    def __call__(self, latents, timesteps, text):
        return self.proj(latents) + 1e-3 * timesteps[:, None, None, None, None] - text.mean()


def setup(**settings):
    graph, params, frozen = split_model(Linear(nnx.Rngs(0)))
    training = make_training(OptimizerConfig(**settings), updates=10)
    state = create_state({"student": create_role(params, frozen, training)}, seed=3)
    step_fn = make_train_step(make_objective(FlowConfig()), {"student": graph}, {"student": training}, configs={})

    def step(state, latents, text):
        state, metrics = step_fn(state, {"student": Batch(latents, text)}, due=("student",))
        return state, metrics["student"]

    return state, step


def test_a_network_that_there_is_not():
    graph, *_ = split_model(Linear(nnx.Rngs(0)))
    training = make_training(OptimizerConfig(), updates=10)
    with pytest.raises(ValueError, match="configs has 'studnet', but the networks are 'student'"):
        make_train_step(
            make_objective(FlowConfig()), {"student": graph}, {"student": training}, configs={"studnet": None}
        )


def params_of(state):
    return state.roles["student"].params


def batch(seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(SHAPE), jnp.float32), jnp.zeros((4, 1, 2))


def leaves(tree):
    return [np.array(leaf) for leaf in jax.tree.leaves(tree)]


def test_a_step_moves_the_parameters_and_counts():
    state, step = setup()
    before = leaves(params_of(state))
    state, metrics = step(state, *batch())
    assert int(state.step) == 1
    assert all(not np.array_equal(old, new) for old, new in zip(before, leaves(params_of(state)), strict=True))
    assert bool(metrics["finite"])
    assert float(metrics["grad_norm"]) > 0
    assert float(metrics["learning_rate"]) == pytest.approx(1e-3)


def test_training_fits_the_flow():
    state, step = setup(learning_rate=3e-2)

    def losses(state, count):
        found = []
        for _ in range(count):
            state, metrics = step(state, *batch())
            found.append(float(metrics["loss"]))
        return state, found

    state, before = losses(state, 150)
    # the same noise again, with the trained parameters
    _, after = losses(dataclasses.replace(state, step=jnp.zeros((), jnp.int32)), 20)
    # most of the loss is noise that no linear map predicts
    assert np.mean(after) < 0.85 * np.mean(before[:20])


def test_the_step_number_decides_the_noise():
    state, step = setup()
    one, first = step(jax.tree.map(jnp.copy, state), *batch())
    again, second = step(jax.tree.map(jnp.copy, state), *batch())
    assert float(first["loss"]) == float(second["loss"])
    later = dataclasses.replace(state, step=state.step + 1)
    _, third = step(later, *batch())
    assert float(first["loss"]) != float(third["loss"])
    for a, b in zip(leaves(params_of(one)), leaves(params_of(again)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_is_the_same_step(parts):
    whole, step = setup()
    split, split_step = setup(accumulation=parts)
    whole, metrics = step(whole, *batch())
    split, split_metrics = split_step(split, *batch())
    assert float(metrics["loss"]) == pytest.approx(float(split_metrics["loss"]), rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(float(split_metrics["grad_norm"]), rel=1e-5)
    for a, b in zip(leaves(params_of(whole)), leaves(params_of(split)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_what_accumulation_shows_is_of_all_parts():
    """Noise levels that most parts have no sample of; a loss that is not finite is not hidden."""

    def loss_and_grads(errors, times):
        return (jnp.mean(errors), in_bins(errors, times) | {"last": times[-1]}), jnp.mean(errors)

    errors, times = jnp.array([1.0, 4.0, 2.0, 8.0]), jnp.array([10.0, 950.0, 190.0, 300.0])
    (loss, shown), gradient = accumulate(loss_and_grads, (errors, times), 4)
    assert float(loss) == float(gradient) == 3.75
    assert float(shown.pop("last")) == times.mean()
    np.testing.assert_array_equal(list(shown.values()), [1.5, 8.0, np.nan, np.nan, 4.0])
    assert not jnp.isfinite(accumulate(loss_and_grads, (errors.at[2].set(jnp.nan), times), 4)[0][0])


def test_the_average_is_a_copy_until_it_starts_and_then_decays():
    config = OptimizerConfig(ema_decay=0.9, ema_start=2)
    old, new = {"a": jnp.zeros(3)}, {"a": jnp.ones(3)}
    np.testing.assert_array_equal(update_ema(old, new, jnp.array(2), config)["a"], 1)
    np.testing.assert_allclose(update_ema(old, new, jnp.array(3), config)["a"], 0.1, rtol=1e-6)
    assert update_ema(None, new, jnp.array(3), config) is None


def test_evaluated_parameters():
    state, _ = setup()
    role = state.roles["student"]
    assert role.evaluated is role.average
    state, _ = setup(ema_decay=None)
    assert state.roles["student"].evaluated is params_of(state)


def test_clipping_bounds_the_first_update_only_through_the_gradient():
    # AdamW's first update does not depend on the gradient's size, so look at what reaches it
    clipped, step = setup(clip_norm=1e-3, beta1=0.5)
    clipped, metrics = step(clipped, *batch())
    moments = clipped.roles["student"].optimizer[1][0].mu
    assert float(metrics["grad_norm"]) > 1e-3
    assert float(optax.tree.norm(moments)) == pytest.approx(0.5e-3, rel=1e-4)


def test_weight_decay_is_on_matrices_alone():
    """Of a Wan network; its norms and modulation tables have two axes and more, as layers are stacked."""
    config = wan_config("tiny", num_layers=2, dim=24, num_heads=2, ffn_dim=48)
    _, params, _ = split_model(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), params)
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5, learning_rate=0.1), steps=1)
    update = jax.jit(
        lambda params: optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    )
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="."): bool(np.any(leaf != 0))
        for path, leaf in jax.tree_util.tree_leaves_with_path(update(params)[0])
    }
    spared = {name for name in moved if any(word in name for word in ("norm", "modulation", "bias"))}
    assert any("norm_q" in name for name in spared)
    assert any("modulation" in name for name in spared)
    assert {name for name, decayed in moved.items() if not decayed} == spared
    assert len(moved) > len(spared)


def test_updates_are_those_of_adamw():
    """By its formulas, with settings that are nobody's defaults."""
    settings = dict(learning_rate=0.1, beta1=0.7, beta2=0.6, eps=0.3, weight_decay=0.2, clip_norm=None)
    optimizer = make_optimizer(OptimizerConfig(**untyped(settings)), steps=9)
    weight, first, second = np.array([1.0, -2.0]), 0.0, 0.0
    params = {"kernel": jnp.asarray(weight, jnp.float32)}
    state = optimizer.init(params)
    for n, gradient in enumerate(([0.5, -1.0], [2.0, 0.1], [-0.3, 0.7]), 1):
        g = np.array(gradient)
        first, second = 0.7 * first + 0.3 * g, 0.6 * second + 0.4 * g**2
        scale = np.sqrt(second / (1 - 0.6**n)) + 0.3
        weight = weight - 0.1 * (first / (1 - 0.7**n) / scale + 0.2 * weight)
        changes, state = optimizer.update({"kernel": jnp.asarray(g, jnp.float32)}, state, params)
        params = untyped(optax.apply_updates(params, changes))
        np.testing.assert_allclose(params["kernel"], weight, rtol=1e-5)


def test_weight_decay_spares_biases():
    rate, decay = 1e-3, 0.5
    plain, step = setup(weight_decay=0.0, learning_rate=rate)
    decayed, decayed_step = setup(weight_decay=decay, learning_rate=rate)
    kernel = np.array(params_of(plain)["proj"]["kernel"][...])
    plain, _ = step(plain, *batch())
    decayed, _ = decayed_step(decayed, *batch())
    difference = np.array(params_of(plain)["proj"]["kernel"][...]) - np.array(params_of(decayed)["proj"]["kernel"][...])
    np.testing.assert_allclose(difference, rate * decay * kernel, atol=1e-6)
    np.testing.assert_allclose(
        params_of(plain)["proj"]["bias"][...], params_of(decayed)["proj"]["bias"][...], atol=1e-7
    )


def test_only_what_trains_is_split_off():
    """By what is asked for, not by the kind of variable alone: a LoRA parameter is a parameter."""

    class Adapted(nnx.Module):
        def __init__(self):
            self.base = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
            self.lora = nnx.LoRA(2, 1, 3, rngs=nnx.Rngs(0))
            self.count = nnx.BatchStat(jnp.zeros(()))

    def names(*patterns):
        _, params, frozen = split_model(Adapted(), trainable_filter(patterns))
        assert sorted(parameter_names(params) + parameter_names(frozen)) == everything
        return parameter_names(params)

    everything = ["base.bias", "base.kernel", "count", "lora.lora_a", "lora.lora_b"]
    assert names("all") == ["base.bias", "base.kernel", "lora.lora_a", "lora.lora_b"]
    assert names("lora.*") == ["lora.lora_a", "lora.lora_b"]
    assert names("*.bias", "lora.lora_b") == ["base.bias", "lora.lora_b"]
    assert names("count") == []  # no parameter
    _, params, frozen = split_model(Adapted(), trainable_filter(["head.*"]))
    with pytest.raises(UserError, match=r"trainable is 'head.\*', which fits no parameter; .* base, count, lora"):
        check_trainable(["head.*"], params, frozen, option="trainable")


@pytest.mark.parametrize(("schedule", "middle", "end"), [("constant", 1, 1), ("cosine", 0.5, 0), ("linear", 0.5, 0)])
def test_schedules(schedule, middle, end):
    rate = untyped(learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup=4, schedule=schedule), steps=24))
    np.testing.assert_allclose([rate(n) for n in range(4)], [0.25, 0.5, 0.75, 1], rtol=1e-6)
    assert float(rate(14)) == pytest.approx(middle, abs=1e-6)
    assert float(rate(24)) == pytest.approx(end, abs=1e-6)
    config = OptimizerConfig(learning_rate=1.0, warmup=4, schedule=schedule, decay_steps=14)  # wherever the run ends
    assert float(untyped(learning_rate_schedule(config, steps=24))(9)) == pytest.approx(middle, abs=1e-6)


def test_a_state_survives_being_flattened_to_named_arrays():
    state, step = setup()
    state, _ = step(state, *batch())
    arrays = to_arrays(state)
    assert {"step", "rng", "roles.student.params.proj.kernel", "roles.student.average.proj.bias"} <= set(arrays)
    copied = {name: jnp.copy(value) for name, value in arrays.items()}
    again = from_arrays(state, copied)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    _, one = step(state, *batch(1))
    _, two = step(again, *batch(1))
    assert float(one["loss"]) == float(two["loss"])


def test_checksums_notice_a_bit_and_an_exchange():
    array = jnp.arange(12.0).reshape(3, 4)
    same = checksums({"a": array})["a"]
    assert int(same) == int(checksums({"a": array + 0})["a"])
    assert int(same) != int(checksums({"a": array.at[1, 1].set(5.0000005)})["a"])
    assert int(same) != int(checksums({"a": array[::-1]})["a"])
    assert int(checksums({"a": jnp.array([True, False])})["a"]) != int(checksums({"a": jnp.array([False, True])})["a"])
    assert int(checksums({"a": jnp.ones(4, jnp.bfloat16)})["a"]) != int(
        checksums({"a": jnp.zeros(4, jnp.bfloat16)})["a"]
    )


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 5)])
def test_checksums_are_those_of_checkpoints_on_disk(shape):
    """Words in row-major order, each times an odd number."""
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    words = array.view(np.uint32).reshape(-1).astype(object)
    expected = sum(word * (2 * place + 1) for place, word in enumerate(words)) % 2**32
    assert int(checksums({"a": jnp.asarray(array)})["a"]) == expected


def test_all_finite():
    assert bool(all_finite({"a": jnp.ones(3), "b": jnp.arange(3)}))
    assert not bool(all_finite({"a": jnp.ones(3), "b": jnp.array([1.0, jnp.nan])}))
    assert not bool(all_finite({"a": jnp.array(jnp.inf)}))
    assert bool(all_finite({"b": jnp.arange(3)}))


def test_nonfinite_gradients_are_flagged():
    state, step = setup()
    latents, text = batch()
    _, metrics = step(state, latents.at[0, 0, 0, 0, 0].set(jnp.nan), text)
    assert not bool(metrics["finite"])
