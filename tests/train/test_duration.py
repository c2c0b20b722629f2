"""The time that `monarchrt train --plan` estimates: products by hand, seconds against what was measured."""

import dataclasses
import json
import statistics
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.attention.notation import parse
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.train import rates
from monarchrt.train.arithmetic import UncountedError, Work, work
from monarchrt.train.config import OptimizerConfig, TrainConfig
from monarchrt.train.data import Batch
from monarchrt.train.duration import Estimate, UpdateTime, estimated
from monarchrt.train.objectives.base import Objective
from monarchrt.train.objectives.registry import make_objective
from monarchrt.train.objectives.settings import (
    ConsistencyConfig,
    DMDConfig,
    FlowConfig,
    ODEConfig,
    SelfForcingConfig,
    TeacherForcingConfig,
)
from monarchrt.train.state import create_role, create_state, make_training, split_model

H200 = Path(__file__).parents[2] / "benchmarks" / "h200"


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


class TestWork:
    """What is counted."""

    def test_products_with_a_matrix_and_of_each_sample(self):
        found = work(lambda x, w: jnp.einsum("bnd,bmd->bnm", x @ w, x @ w), array(2, 3, 4), array(4, 4))
        assert found == Work(products=2 * (2 * 6 * 4 * 4), attended=2 * 2 * 3 * 3 * 4, float32=384 + 144)
        half = work(lambda x, w: x @ w, array(3, 4, dtype="bfloat16"), array(4, 4, dtype="bfloat16"))
        assert half == Work(products=96)

    def test_products_that_may_not_be_rounded(self):
        found = work(lambda x, w: jnp.dot(x, w, precision="highest"), array(3, 4), array(4, 4))
        assert found == Work(products=96, float32=96, full_precision=96)

    def test_gradients_and_what_is_recomputed_for_them(self):
        def loss(recomputed):
            def layer(w, x):
                return jnp.sin(x @ w) @ w

            return lambda w, x: jnp.sum((jax.checkpoint(layer) if recomputed else layer)(w, x))

        product = 2 * 3 * 4 * 4
        kept, again = (work(jax.grad(loss(recomputed)), array(4, 4), array(3, 4)) for recomputed in (False, True))
        # two forward, one gradient by x between them, two by w; the first once more
        assert kept.products == 5 * product
        assert again.products == 6 * product

    def test_loops_and_choices(self):
        x, product = array(4, 4), 2 * 4**3

        def scanned(x):
            return jax.lax.scan(lambda x, _: (x @ x, None), x, None, length=7)[0]

        assert work(scanned, x).products == 7 * product
        drawn = lambda n, x: jax.lax.fori_loop(0, n, lambda _, x: scanned(x), x)  # noqa: E731
        assert work(drawn, array(dtype="int32"), x, turns=1.5).products == 1.5 * 7 * product
        choice = lambda c, x: jax.lax.cond(c, lambda: x @ x, lambda: scanned(x))  # noqa: E731
        assert work(choice, array(dtype="bool"), x).products == 7 * product

    @pytest.mark.parametrize(
        "attention", ["monarch(tile=(1,4,4),implementation=mosaic)", "dense(implementation=cudnn)"]
    )
    def test_kernels_are_not_passed_over(self, attention):
        config = wan_config(
            "tiny", num_layers=1, dim=256, num_heads=2, dtype="bfloat16", attention=parse(attention)
        )  # fmt: skip
        graph, params = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))
        inputs = array(1, 3, 8, 8, 16), array(1), array(1, config.text_len, config.text_dim)
        with pytest.raises(UncountedError, match="calls a kernel"):
            work(lambda params, *inputs: nnx.merge(graph, params)(*inputs), params, *inputs)

    def test_convolutions(self):
        def convolved(x, w):
            return jax.lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        assert work(convolved, array(1, 4, 4, 3), array(2, 2, 3, 5)).products == 2 * 9 * 5 * 2 * 2 * 3

    def test_wan_as_its_formula(self):
        """Products of a forward pass, by hand."""
        config = wan_config("tiny", num_layers=2)
        graph, params = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))
        rows, (frames, height, width) = config.text_len, (3, 8, 8)
        found = work(
            lambda params, x, t, text: nnx.merge(graph, params)(x, t, text),
            params, array(1, frames, height, width, 16), array(1), array(1, rows, config.text_dim),
        )  # fmt: skip
        tokens, dim = frames * height * width // 4, config.dim
        layer = 2 * tokens * (6 * dim * dim + 2 * dim * config.ffn_dim) + 2 * rows * 2 * dim * dim
        around = 2 * tokens * 2 * dim * 4 * 16 + 2 * rows * (config.text_dim * dim + dim * dim)
        of_time = 2 * (config.freq_dim * dim + dim * dim + 6 * dim * dim)
        assert found.products == 2 * layer + around + of_time
        assert found.attended == 2 * 4 * tokens * dim * (tokens + rows)


def networks(settings: Any, *, attention: str, remat: str, causal: bool, presets: dict[str, str]) -> Any:
    """Shapes of Wan 1.3B in each role, or of another."""
    roles, graphs = {}, {}
    for name, role in settings.roles.items():
        config = wan_config(
            presets.get(name, "wan2.1-t2v-1.3b"),
            dtype="bfloat16",
            remat=remat,
            attention=parse(attention if name == "student" else "dense"),
            causal_block=3 if causal and (name == "student" or settings.name == "consistency") else None,
            param_dtype="float32" if role.trains else "bfloat16",
        )
        graphs[name], params, frozen = split_model(nnx.eval_shape(lambda c=config: WanModel(c, rngs=nnx.Rngs(0))))
        training = make_training(TrainConfig(objective=settings).trained(name), updates=10) if role.trains else None
        kept = (params, frozen) if role.trains else (nnx.State({}), nnx.merge_state(params, frozen))
        roles[name] = jax.eval_shape(lambda p, f, t=training: create_role(p, f, t), *kept)
    template = jax.eval_shape(lambda roles: create_state(roles, seed=0), roles)
    return types.SimpleNamespace(graphs=graphs, template=template)


MONARCH = "monarch(tile=(3,30,52))"
NEGATIVE = Path("negative")
GUIDED: dict[str, Any] = {"negative": NEGATIVE}


def timed(report: str, **wanted: Any) -> float:
    """Seconds of a row of a report."""
    rows = json.loads((H200 / f"{report}.json").read_text())["rows"]
    (row,) = (row for row in rows if all(row[name] == value for name, value in wanted.items()))
    return row["seconds"] if "seconds" in row else row["ms"] / 1e3


CASES: dict[str, Any] = {
    "flow": (FlowConfig(), "student", MONARCH, "full", False, {}, timed("training_full", attention="monarch 97%")),
    "flow, less recomputed": (
        FlowConfig(), "student", MONARCH, "cheap", False, {}, timed("training_cheap", attention="monarch 97%")
    ),
    "dense flow": (FlowConfig(), "student", "dense", "cheap", False, {}, timed("training_dense", attention="dense")),
    "teacher forcing": (
        TeacherForcingConfig(), "student", MONARCH, "full", True, {}, timed("stages", stage="teacher forcing")
    ),
    "consistency": (
        ConsistencyConfig(block=3, **GUIDED), "student", MONARCH, "full", True, {}, timed("stages", stage="consistency")
    ),
    # measured after the rates were chosen
    "flow in blocks, beside --plan itself": (
        FlowConfig(), "student", MONARCH, "full", True, {},
        statistics.median(row["seconds"] for row in json.loads((H200 / "plan.json").read_text())["steps"][1:]),
    ),
    "ode regression": (ODEConfig(block=3), "student", MONARCH, "full", True, {}, timed("stages", stage="ode")),
    "diffusion forcing": (
        FlowConfig(frames_per_level=3), "student", MONARCH, "full", True, {}, timed("stages", stage="diffusion forcing")
    ),
    **{
        f"dmd, {role}": (
            DMDConfig(**GUIDED), role, MONARCH, "full", False, {}, timed("stages", stage=f"dmd {role}")
        )
        for role in ("student", "critic")
    },
    **{
        f"self-forcing, {role}, {attention}": (
            SelfForcingConfig(**GUIDED), role, MONARCH if attention != "dense" else "dense", "full", True, {},
            timed("distill_student" if role == "student" else "distill", update=role, attention=attention),
        )
        for role in ("student", "critic")
        for attention in ("monarch 97%", "dense")
    },
    "teacher of 14B": (
        SelfForcingConfig(**GUIDED), "student", MONARCH, "full", True, {"teacher": "wan2.1-t2v-14b"},
        timed("distill_14b", update="student"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "flow" else pytest.mark.slow) for case in CASES]
)
def test_steps_that_were_measured_lie_within_what_is_said(case):
    settings, role, attention, remat, causal, presets, measured = CASES[case]
    objective: Any = make_objective(settings)
    objective.negative = np.zeros((8, 4096), np.float32)
    objective.turns = lambda role: 2.0  # the student's last step is the third in what was measured
    found = networks(settings, attention=attention, remat=remat, causal=causal, presets=presets)
    states = len(settings.student_steps) + 1 if isinstance(settings, ODEConfig) else 1
    batch = Batch(array(1, states * 21, 60, 104, 16), array(1, 512, 4096))  # type: ignore[arg-type]
    device = types.SimpleNamespace(device_kind="NVIDIA H200", platform="gpu")
    state = found.template.roles[role]
    held = sum(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.params, state.optimizer, state.average))
    )
    estimate = estimated(
        objective, graphs=found.graphs, template=found.template, accumulation={role: 1}, batches={role: batch},
        device=device, devices=1, left=10, state={role: held},
    )  # fmt: skip
    (update,) = estimate.updates
    assert estimate.rates is not None
    assert estimate.rates.low * update.seconds < measured < (estimate.rates.high or 0) * update.seconds
    print(f"{case}: measured {measured:.3f} s, estimated {update.seconds:.3f}: {measured / update.seconds:.2f}")


def update(role="student", *, updates=3, **parts):
    return UpdateTime(role=role, updates=updates, work=Work(products=2e12, attended=1e12), parts=parts)


def known():
    found = rates.known_rates("NVIDIA H200")
    assert found is not None
    return found


class TestRates:
    """Of devices."""

    def test_products_attention_and_memory_of_a_data_sheet(self):
        assert known().seconds(Work(products=0.43 * 989e12)) == pytest.approx(1.0)
        assert known().seconds(Work(products=0.43 * 989e12, attended=0.6 * 989e12)) == pytest.approx(2.0)
        assert known().seconds(Work(products=0.43 * 989e12, float32=0.43 * 989e12)) == pytest.approx(2.0)
        assert known().seconds(Work()) == 0.0
        assert known().moving(2_880_000_000_000) == pytest.approx(1.0)

    def test_devices_that_were_not_measured_are_said_to_be(self):
        assert "only an H200 was measured" not in known().basis
        other = rates.known_rates("NVIDIA A100-SXM4-80GB")
        assert other is not None
        assert "only an H200 was measured, no NVIDIA A100-SXM4-80GB" in other.basis
        assert rates.known_rates("NVIDIA A100-SXM4-40GB") is rates.known_rates("NVIDIA H100 PCIe") is None

    @pytest.mark.parametrize("single", [True, False])
    def test_one_product_where_it_is_not_known(self, monkeypatch, single):
        monkeypatch.setattr(rates, "_SIDE", {"cpu": 64})
        ticks = iter(range(100))
        monkeypatch.setattr(rates.time, "perf_counter", lambda: next(ticks) / 1000)
        found = rates.timed_rates(jax.devices()[0], single=single)
        assert found.products == found.attention == pytest.approx(2 * 64**3 / 1e-3)
        assert (found.low, found.high, found.moving(9)) == (1.0, None, 0.0)
        assert f"64 by 64 numbers of {'float32' if single else 'bfloat16'}" in found.basis
        assert found.seconds(Work(products=2 * 64**3, float32=9)) == pytest.approx(1e-3)


class TestEstimate:
    """What is said."""

    def test_a_range_and_what_it_rests_on(self):
        updates = update(roll_out=1.0, backward=2.0, optimizer=0.5), update("critic", updates=15, backward=4.0)
        first, second, whole = Estimate(rates=known(), updates=updates, left=15, devices=2).lines()
        assert first == (
            "an update of the student: 3 TFLOP in products on 2 devices, some 3.5 s, from 2.8 s to 4.38 s "
            "(roll out 1, backward 2, optimizer 0.5)"
        )
        assert second.startswith("an update of the critic: 3 TFLOP in products on 2 devices, some 4 s")
        assert "15 steps, 3 of the student and 15 of the critic: some 70.5 s, from 56.4 s to 88.1 s" in whole
        assert "and exchange between devices aside; an estimate: products and attention at 43% and 60%" in whole
        (long,) = [line for line in Estimate(rates=known(), updates=updates * 100, left=9).lines() if "steps" in line]
        assert (
            ": some 1 h 58 min, from 1 h 34 min to 2 h 27 min, held-out losses, samples and checkpoints aside" in long
        )

    def test_a_bound_where_only_a_product_was_timed(self):
        bound = dataclasses.replace(known(), low=1.0, high=None, basis="why")
        estimate = Estimate(rates=bound, updates=(update(backward=4.0),), left=3)
        assert next(line.split(", ")[1] for line in estimate.lines()) == "more than 4 s (backward 4)"
        assert "more than 12 s" in list(estimate.lines())[1]
        assert estimate.to_dict()["seconds"] == 12.0
        assert estimate.to_dict()["rates"]["high"] is None

    def test_none_where_there_is_no_saying(self):
        estimate = Estimate(rates=None, why="because")
        assert list(estimate.lines()) == ["the time is not estimated: because"]
        assert (estimate.seconds, estimate.to_dict()["why"]) == (None, "because")

    def test_products_that_may_not_be_rounded_have_no_rate_on_a_gpu(self):
        assert "not be rounded" in self.of(batch=2, precision="highest").why

    def test_updates_parts_devices_and_accumulation(self):
        """All parts of a batch count; steps that update no such role do not; devices share."""
        one, parts, shared = self.of(batch=2), self.of(batch=2, accumulation=2), self.of(batch=2, devices=2)
        product = 2 * 2 * 4 * 4
        assert [update.updates for update in one.updates] == [34, 100]
        for estimate in (one, parts, shared):
            student, critic = estimate.updates
            assert (student.work.products, critic.work.products) == ((1 + 2.5 + 1 + 2) * product, (1 + 1 + 2) * product)
        student = one.updates[0]
        assert list(student.parts) == ["before", "forward", "backward", "optimizer"]
        rate = known().products / 2  # of float32
        expected = [1 * product / rate, 3.5 * product / rate, 2 * product / rate, 2 * 100 / (0.6 * 4.8e12)]
        assert list(student.parts.values()) == pytest.approx(expected)
        assert list(shared.updates[0].parts.values())[:3] == pytest.approx([value / 2 for value in expected[:3]])
        assert one.seconds == pytest.approx(sum(34 * x for x in expected) + 100 * one.updates[1].seconds)

    def of(self, *, batch, accumulation=1, devices=1, precision=None):
        """Of an objective of two roles, one of which has a loop whose turns are drawn, in vectors of four."""

        class Two(Objective):
            """Just what is asked of an objective."""

            def draws(self, key, shapes):
                count = jax.random.randint(key, (), 0, 5)
                return {"student": (count, count), "critic": (count, count)}

            def turns(self, role):
                return 2.5 if role == "student" else 0.0

            def typical(self, role, draws):
                return (draws[0], 1)

            def due(self, step):
                return ("student", "critic") if step % 3 == 1 else ("critic",)

            def parts(self, role):
                return {"before": lambda networks, batch, draws: self.multiply(role, networks, batch.text)} | {
                    "forward": None
                }

            def multiply(self, role, networks, x):
                return jnp.dot(x, jax.lax.stop_gradient(networks[role].kernel[...]), precision=precision)

            def loss(self, role, networks, batch, draws):
                x = self.multiply(role, networks, batch.text)
                x = jax.lax.fori_loop(0, draws[0], lambda _, x: self.multiply(role, networks, x), x)
                x = jax.lax.fori_loop(0, draws[1], lambda _, x: x @ networks[role].kernel[...], x)
                return x.mean(), {}

        graph, params = nnx.split(nnx.eval_shape(lambda: nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(0))))
        training = make_training(OptimizerConfig(ema_decay=None), updates=10)
        role = jax.eval_shape(lambda params: create_role(params, nnx.State({}), training), params)
        roles = {"student": role, "critic": role}

        def state() -> Any:
            return create_state(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), roles), seed=0)

        arguments: Any = dict(
            graphs=dict.fromkeys(roles, graph),
            template=jax.eval_shape(state),
            accumulation=dict.fromkeys(roles, accumulation),
            batches=dict.fromkeys(roles, Batch(array(batch, 1, 1, 1, 1), array(batch, 1, 4))),  # type: ignore
            device=types.SimpleNamespace(device_kind="NVIDIA H200", platform="gpu"),
            devices=devices, left=100, state=dict.fromkeys(roles, 100),
        )  # fmt: skip
        settings = types.SimpleNamespace(roles=dict.fromkeys(roles, types.SimpleNamespace(averaged=False)))
        return estimated(Two(settings), **arguments)
