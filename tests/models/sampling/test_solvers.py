"""Schedules against known numbers, solvers against diffusers and against formulas written out here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from monarchrt.models.sampling import (
    SAMPLERS,
    SamplerTable,
    dpmpp_2m,
    few_step_schedule,
    guided,
    keep_context,
    sample,
    sampler_table,
    uniform_schedule,
    unipc,
    unipc_schedule,
)
from monarchrt.models.sampling.solve import fresh_noise
from tests.compiled import array_sizes


def toy_flow(x, sigma):
    """A curved field with no closed form; numpy, torch and jax alike."""
    return x * (0.3 + sigma) - 0.7 * sigma * sigma + 0.1 * x * x


class TestSchedules:
    @pytest.mark.parametrize(
        ("shift", "first", "last"),
        [
            (5.0, [999, 995, 991, 987], [241, 172, 92]),
            (8.0, [999, 997, 994, 991], [337, 249, 140]),
            (3.0, [999, 992, 985, 978], [160, 111, 57]),
        ],
    )
    def test_unipc_of_wan(self, shift, first, last):
        schedule = unipc_schedule(50, shift)
        assert schedule.timesteps[:4].tolist() == first
        assert schedule.timesteps[-3:].tolist() == last
        assert schedule.sigmas[-1] == 0
        assert schedule.sigmas[0] == pytest.approx(shift * 0.999 / (1 + (shift - 1) * 0.999))

    @pytest.mark.parametrize("shift", [1.0, 2.0, 3.0, 5.0, 7.0, 8.0, 10.0, 12.0, 16.0])
    def test_whole_times_are_wans(self, shift):
        """As Wan's two schedulers compute them; also where float64 falls just short of a whole number."""
        for steps in range(1, 101):
            levels = [shift * u / (1 + (shift - 1) * u) for u in np.linspace(1, 0, steps + 1)[:steps]]
            assert sampler_table("dpm++", steps=steps, shift=shift).timesteps.tolist() == [
                int(1000 * s) for s in levels
            ]
            first = float(np.float32(1 - 1 / 1000))  # the greatest level that Wan's UniPC keeps, in float32
            levels = [shift * u / (1 + (shift - 1) * u) for u in np.linspace(first, 0, steps + 1)[:steps]]
            assert sampler_table("unipc", steps=steps, shift=shift).timesteps.tolist() == [
                int(1000 * s) for s in levels
            ]

    def test_steps_of_ones_own(self):
        table = sampler_table("few-step", steps=(1000, 757, 522), shift=8.0)
        u = np.array([1.0, 0.757, 0.522])
        np.testing.assert_allclose(table.sigmas, 8 * u / (1 + 7 * u), rtol=1e-12)
        np.testing.assert_allclose(table.predict[:, 3], [*table.sigmas[1:], 0])

    def test_from_a_level_on(self):
        schedule = uniform_schedule(3, 5.0, start=0.6)
        u = np.linspace(0.6 / (5 - 4 * 0.6), 0, 4)
        np.testing.assert_allclose(schedule.sigmas, 5 * u / (1 + 4 * u), rtol=1e-12)

    @pytest.mark.parametrize(
        ("shift", "expected"), [(5.0, [1000, 937.5, 833.3333, 625]), (8.0, [1000, 960, 888.8889, 727.2727])]
    )
    def test_few_steps_are_indices(self, shift, expected):
        schedule = few_step_schedule(shift=shift)
        np.testing.assert_allclose(schedule.timesteps, expected, atol=5e-5)
        np.testing.assert_allclose(schedule.sigmas, [*(schedule.timesteps / 1000), 0])

    def test_the_few_step_sampler_uses_all_four(self):
        np.testing.assert_allclose(sampler_table("few-step").timesteps, [1000, 937.5, 833.3333, 625], atol=5e-5)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: unipc_schedule(0), "steps=0 is not a positive integer"),
            (lambda: uniform_schedule(4, -1.0), r"shift=-1\.0 is not positive"),
            (lambda: few_step_schedule([1000, 0]), r"steps=\[1000, 0\] are not decreasing indices in 1\.\.\.1000"),
            (lambda: few_step_schedule([500, 750]), "not decreasing"),
            (lambda: sampler_table("ddim"), "sampler='ddim' is unknown; choose from unipc, dpm"),
            (lambda: sampler_table("few-step", steps=0), "steps=0 is not in 1"),
            (lambda: unipc(uniform_schedule(4)), "UniPC needs less than 1"),
            (lambda: uniform_schedule(4, start=1.5), r"start=1\.5 is not a noise level in \(0, 1\]"),
            (lambda: sampler_table("few-step", steps=()), "are not decreasing indices"),
            (
                lambda: sampler_table("euler", steps=(1000, 500)),
                r"\(1000, 500\) is a list, which few-step takes; euler",
            ),
            (lambda: sampler_table(sampler_table("euler"), steps=3), "steps=3 does not go with a table, .* own 50"),
            (lambda: sampler_table(sampler_table("euler")._replace(sigmas=np.ones(3))), "sigmas has shape"),
            (lambda: sampler_table(SamplerTable(*[np.zeros(0)] * 4)), "sigmas has shape"),
            (
                lambda: sampler_table(sampler_table("euler")._replace(sigmas=np.full(50, np.nan))),
                "sigmas is not finite",
            ),
        ],
    )
    def test_bad_arguments(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()


def start(shape=(2, 5)):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def ours(table, x):
    out = jax.jit(lambda x: sample(lambda x, t: toy_flow(x, t / 1000), x, table))(jnp.asarray(x))
    return np.asarray(out)


def exact_times(table):
    """The toy field is asked at 1000 sigma, so that truncation plays no part."""
    return table._replace(timesteps=1000 * table.sigmas)


class TestSolvers:
    @pytest.mark.parametrize("steps", [1, 2, 4, 10, 50])
    @pytest.mark.parametrize("shift", [3.0, 8.0])
    def test_unipc_equals_diffusers_on_the_same_grid(self, steps, shift):
        torch = pytest.importorskip("torch")
        diffusers = pytest.importorskip("diffusers")
        schedule = unipc_schedule(steps, shift)
        scheduler = diffusers.UniPCMultistepScheduler(
            solver_order=2, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
        )
        scheduler.set_timesteps(steps)
        scheduler.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
        scheduler.timesteps = torch.arange(1000, 1000 - steps, -1)  # names only
        x = torch.tensor(start())
        for n, t in enumerate(scheduler.timesteps):
            x = scheduler.step(toy_flow(x, float(schedule.sigmas[n])), t, x).prev_sample
        np.testing.assert_allclose(ours(exact_times(unipc(schedule)), start()), x.numpy(), atol=2e-6, rtol=1e-5)

    @pytest.mark.parametrize("steps", [1, 2, 4, 10, 50])
    def test_dpmpp_equals_diffusers_on_the_same_grid(self, steps):
        torch = pytest.importorskip("torch")
        diffusers = pytest.importorskip("diffusers")
        schedule = uniform_schedule(steps, 5.0)
        scheduler = diffusers.DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver++",
            solver_type="midpoint",
            solver_order=2,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=5.0,
            final_sigmas_type="zero",
        )
        scheduler.set_timesteps(steps)
        scheduler.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
        scheduler.timesteps = torch.arange(1000, 1000 - steps, -1)
        x = torch.tensor(start())
        for n, t in enumerate(scheduler.timesteps):
            x = scheduler.step(toy_flow(x, float(schedule.sigmas[n])), t, x).prev_sample
        np.testing.assert_allclose(ours(exact_times(dpmpp_2m(schedule)), start()), x.numpy(), atol=2e-6, rtol=1e-5)

    @pytest.mark.parametrize("steps", [3, 12])
    def test_unipc_equals_its_formulas(self, steps):
        """UniPC-bh2 as the paper has it, in float64, written as a loop."""
        sigma = unipc_schedule(steps, 5.0).sigmas
        with np.errstate(divide="ignore"):
            lam = np.log(1 - sigma) - np.log(sigma)
        x, y, m, order = start().astype(np.float64), None, [], 1
        for n in range(steps):
            m.append(x - sigma[n] * toy_flow(x, sigma[n]))
            if n:
                h = lam[n] - lam[n - 1]
                beta, alpha = np.expm1(-h), 1 - sigma[n]
                base = sigma[n] / sigma[n - 1] * y - alpha * beta * m[n - 1]
                if order == 1:
                    x = base - alpha * beta * 0.5 * (m[n] - m[n - 1])
                else:
                    r = (lam[n - 2] - lam[n - 1]) / h
                    g1 = beta / -h - 1
                    rho = np.linalg.solve([[1, 1], [r, 1]], [g1 / beta, 2 * (g1 / -h - 0.5) / beta])
                    slope = (m[n - 2] - m[n - 1]) / r
                    x = base - alpha * beta * (rho[0] * slope + rho[1] * (m[n] - m[n - 1]))
            y, order = x, min(2, steps - n, n + 1)
            h = lam[n + 1] - lam[n]
            beta, alpha = np.expm1(-h), 1 - sigma[n + 1]
            x = sigma[n + 1] / sigma[n] * x - alpha * beta * m[n]
            if order == 2:
                x = x - alpha * beta * 0.5 * (m[n - 1] - m[n]) / ((lam[n - 1] - lam[n]) / h)
        np.testing.assert_allclose(ours(exact_times(unipc(unipc_schedule(steps, 5.0))), start()), x, atol=2e-6)

    def test_euler_is_euler(self):
        schedule = uniform_schedule(7, 5.0)
        x = start().astype(np.float64)
        for sigma, following in zip(schedule.sigmas[:-1], schedule.sigmas[1:], strict=True):
            x = x + (following - sigma) * toy_flow(x, sigma)
        np.testing.assert_allclose(ours(sampler_table("euler", steps=7), start()), x, atol=2e-6)

    def test_few_steps_noise_afresh(self):
        """The sampler of Self-Forcing, as a loop."""
        table, key, x = sampler_table("few-step"), jax.random.key(3), jnp.asarray(start())
        draw = fresh_noise(key, x)
        out = sample(lambda x, t: toy_flow(x, t / 1000), x, table, key=key)
        for n, sigma in enumerate([1, 0.9375, 5 / 6, 0.625]):
            data = x - sigma * toy_flow(x, sigma)
            if n < 3:
                following = [0.9375, 5 / 6, 0.625][n]
                x = (1 - following) * data + following * draw(n)
        np.testing.assert_allclose(out, data, atol=1e-5)
        noises = np.stack([draw(n) for n in range(3)])
        assert np.abs(np.corrcoef(noises.reshape(3, -1))[np.triu_indices(3, 1)]).max() < 0.9

    def test_noise_of_all_steps_is_never_there_at_once(self):
        table = sampler_table("few-step", steps=tuple(range(1000, 500, -1)))
        run = lambda x, key: sample(lambda x, t: toy_flow(x, t / 1000), x, table, key=key)  # noqa: E731
        sizes = array_sizes(jax.make_jaxpr(run)(jnp.zeros(5000), jax.random.key(0)).jaxpr)
        assert max(sizes) <= 2 * 5000  # random bits are made in halves

    def test_higher_order_is_more_accurate(self):
        """On a smooth field, at the same number of calls."""
        fine = ours(sampler_table("euler", steps=4000), start())
        error = {name: np.abs(ours(exact_times(sampler_table(name, steps=12)), start()) - fine).max()
                 for name in SAMPLERS[:3]}  # fmt: skip
        assert error["unipc"] < 0.5 * error["euler"]
        assert error["dpm++"] < 0.5 * error["euler"]

    def test_pytrees_and_dtypes(self):
        tree = {"video": jnp.ones((2, 3)), "audio": jnp.full((4,), 0.5, jnp.bfloat16)}
        flow = lambda x, t: jax.tree.map(lambda leaf: toy_flow(leaf, t / 1000), x)  # noqa: E731
        out = sample(flow, tree, sampler_table("unipc", steps=5))
        assert out["audio"].dtype == jnp.bfloat16
        alone = sample(lambda x, t: toy_flow(x, t / 1000), tree["video"], sampler_table("unipc", steps=5))
        np.testing.assert_allclose(out["video"], alone, rtol=1e-6)

    def test_a_stochastic_sampler_needs_a_key(self):
        with pytest.raises(ValueError, match="key is None"):
            sample(lambda x, t: x, jnp.ones(2), sampler_table("few-step"))


class TestFlows:
    def test_guidance_is_two_forwards(self):
        def model(x, t, text):
            return x * text.sum((1, 2))[:, None] + t[:, None]

        x, text, negative = jnp.ones((2, 3)), jnp.full((2, 4, 1), 0.5), jnp.full((2, 3, 1), 0.1)
        t = jnp.float32(7.0)
        conditional, unconditional = model(x, jnp.full(2, t), text), model(x, jnp.full(2, t), negative)
        expected = unconditional + 6.0 * (conditional - unconditional)
        np.testing.assert_allclose(guided(model, text, negative, guidance=6.0)(x, t), expected, rtol=1e-6)
        np.testing.assert_allclose(guided(model, text)(x, t), conditional)
        np.testing.assert_allclose(guided(model, text, negative, guidance=1.0)(x, t), conditional)

    def test_context_is_clean_and_kept(self):
        seen = {}

        def model(x, t, text):
            seen.update(x=x, t=t)
            return x

        context, new = jnp.full((1, 2, 1, 1, 1), 5.0), jnp.ones((1, 3, 1, 1, 1))
        text = jnp.zeros((1, 1, 1))
        flow = guided(keep_context(model, context), text)(new, jnp.float32(800))
        assert seen["t"].tolist() == [[0, 0, 800, 800, 800]]
        assert seen["x"][0, :, 0, 0, 0].tolist() == [5, 5, 1, 1, 1]
        assert flow.shape == new.shape
        guided(keep_context(model, context), text, text + 1, guidance=2.0)(new, jnp.float32(800))
        assert seen["x"][:, :, 0, 0, 0].tolist() == [[5, 5, 1, 1, 1]] * 2
