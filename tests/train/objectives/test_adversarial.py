"""The adversarial term: its losses by hand, its gradients against plain forms, and what it takes."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.checkpoints.orbax_arrays import read_arrays
from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.errors import UserError
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.checkpoints import save_checkpoint
from monarchrt.train.cli import main
from monarchrt.train.config import DataConfig
from monarchrt.train.objectives import dmd
from monarchrt.train.objectives.adversarial import discriminate, draw_gan, student_loss
from monarchrt.train.objectives.discriminator import Discriminator, logits_of, with_discriminator
from monarchrt.train.objectives.dmd import DMDObjective
from monarchrt.train.objectives.self_forcing import SelfForcingObjective
from monarchrt.train.objectives.settings import DMDConfig, SelfForcingConfig
from tests.train.conftest import history
from tests.untyped import untyped

from .networks import Small, assert_same, batch, gradient, wan

SHAPE = (2, 3, 2, 2, 2)
PLAIN = {"relativistic": False, "weight": 1.0, "r1": 0.0, "r2": 0.0, "sigma": 0.1}


def softplus(x):
    return np.log1p(np.exp(x))


class TestLosses:
    fake, real = jnp.array([0.3, -1.0]), jnp.array([0.5, 2.0])

    def test_of_the_student(self):
        fake, real = np.asarray(self.fake), np.asarray(self.real)
        np.testing.assert_allclose(student_loss(self.fake), softplus(-fake).mean(), rtol=1e-5)
        np.testing.assert_allclose(student_loss(self.fake, self.real), softplus(real - fake).mean(), rtol=1e-5)

    @pytest.mark.parametrize("relativistic", [False, True])
    def test_of_the_discriminator_with_what_keeps_it_flat(self, relativistic):
        """With logits that are linear in the clip, R1 and R2 are half the squared slope along the noise."""
        clips = jax.random.normal(jax.random.key(0), (5, *SHAPE))
        weights, fake, real, near_real, near_fake = (np.asarray(x, np.float64) for x in clips)

        def logits(x):
            return jnp.sum(clips[0] * x, axis=(1, 2, 3, 4))

        options = {"relativistic": relativistic, "weight": 0.3, "r1": 0.7, "r2": 0.2, "sigma": 0.5}
        loss, metrics = discriminate(logits, *clips[1:], **options)
        of_fake, of_real, slope_real, slope_fake = (
            (weights * x).sum((1, 2, 3, 4)) for x in (fake, real, near_real, near_fake)
        )
        apart = softplus(of_fake - of_real) if relativistic else softplus(of_fake) + softplus(-of_real)
        apart = apart.mean()
        r1, r2 = 0.5 * np.square(slope_real).mean(), 0.5 * np.square(slope_fake).mean()
        np.testing.assert_allclose(loss, 0.3 * apart + 0.7 * r1 + 0.2 * r2, rtol=1e-4)
        for name, value in (("gan_loss", apart), ("gan_r1", r1), ("gan_r2", r2), ("gan_real", of_real.mean())):
            np.testing.assert_allclose(metrics[name], value, rtol=1e-4)
        assert float(metrics["gan_told_apart"]) == np.mean(of_real > of_fake)

    def test_without_regularisation_its_noise_is_not_drawn(self):
        draws = draw_gan(jax.random.key(0), SHAPE, r1=False, r2=True)
        assert draws.near_real is None
        assert untyped(draws.near_fake).shape == SHAPE
        clip = jnp.zeros(SHAPE)
        _, metrics = discriminate(lambda x: jnp.zeros(2), clip, clip, None, None, **PLAIN)
        assert not {"gan_r1", "gan_r2"} & set(metrics)


def linear(network, x, t, text, *, layers=None):
    """Logits of a network that has no head: their mean flow, in parts of its own parameters."""
    return network(x, t, text).mean((1, 2, 3, 4)) + t / 1000


@pytest.fixture
def objective(monkeypatch):
    monkeypatch.setattr(dmd, "logits_of", linear)
    settings: Any = {"student_steps": (1000, 500), "gan_weight": 0.3, "gan_critic_weight": 0.2, "gan_r2": 0.1}
    return DMDObjective(DMDConfig(**settings))


@pytest.mark.parametrize(
    ("role", "relativistic"),
    [
        ("student", True),
        ("critic", False),
        pytest.param("student", False, marks=pytest.mark.slow),
        pytest.param("critic", True, marks=pytest.mark.slow),
    ],
)
def test_it_is_added_to_the_loss_of_each_role(role, relativistic, objective):
    """The rest is as without; both clips are noised alike; the student's gradient passes through the discriminator."""
    settings = DMDConfig(**{**vars(objective.settings), "gan_relativistic": relativistic})
    ours, without = DMDObjective(settings), DMDObjective(DMDConfig(student_steps=(1000, 500)))
    examples, networks = batch(SHAPE), {"student": Small(0), "critic": Small(1), "teacher": Small(2)}
    text, real = jnp.asarray(examples.text), jnp.asarray(examples.latents)
    draws = ours.draws(jax.random.key(1), examples)[role]
    plain_draws = without.draws(jax.random.key(1), examples)[role]
    np.testing.assert_array_equal(draws.student.noise, plain_draws.student.noise)
    gan = untyped(draws.gan)
    t = jnp.clip(5000 * (gan.time / 1000) / (1 + 4 * gan.time / 1000), 20, 980)
    sigma = (t / 1000).reshape(-1, 1, 1, 1, 1)

    def term(network):
        seen = networks | {role: network}
        clip = without.samples(seen["student"], text, plain_draws.student)
        critic = seen["critic"]
        fake, data = ((1 - sigma) * x + sigma * gan.noise for x in (clip, real))
        of_fake, of_real = linear(critic, fake, t, text), linear(critic, data, t, text)
        if role == "student":
            return 0.3 * jnp.mean(jax.nn.softplus(of_real - of_fake if relativistic else -of_fake))
        softly = jax.nn.softplus
        apart = softly(of_fake - of_real) if relativistic else softly(of_fake) + softly(-of_real)
        near = [
            weight * 0.5 * jnp.mean(((linear(critic, x + 0.1 * noise, t, text) - there) / 0.1) ** 2)
            for weight, x, noise, there in ((0.02, data, gan.near_real, of_real), (0.1, fake, gan.near_fake, of_fake))
        ]
        return 0.2 * jnp.mean(apart) + sum(near)

    def plain(network):
        return without.loss(role, networks | {role: network}, examples, plain_draws)[0] + term(network)

    def loss(network):
        return ours.loss(role, networks | {role: network}, examples, draws)

    ((value, metrics), grads) = gradient(loss, networks[role], has_aux=True)()
    expected, wanted = gradient(plain, networks[role])()
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    assert_same(grads, wanted, 1e-4)
    assert {"gan_loss", "gan_fake"} <= set(metrics)


def test_it_is_off_by_default():
    for kind, settings in ((DMDObjective, DMDConfig()), (SelfForcingObjective, SelfForcingConfig())):
        objective = kind(settings)
        assert objective.extension("critic") is None
        assert all(draws.gan is None for draws in objective.draws(jax.random.key(0), batch(SHAPE)).values())


def test_a_head_on_the_critics_features():
    """A new one of its own, after as many blocks as asked for, of a critic that is otherwise as it was."""
    critic = nnx.eval_shape(lambda: wan(0))
    with_head = nnx.eval_shape(lambda: with_discriminator(wan(0), seed=1))
    own = nnx.state(with_head)
    head = own.pop("discriminator")
    assert jax.tree.structure(own) == jax.tree.structure(nnx.state(critic))
    assert {leaf.dtype for leaf in jax.tree.leaves(head)} == {jnp.dtype("float32")}
    seen = jnp.ones((2, 2, 4, 4, 2)), jnp.array([500.0, 20.0]), jnp.ones((2, 2, 4))
    assert nnx.eval_shape(lambda critic: logits_of(critic, *seen, layers=1), with_head).shape == (2,)
    with pytest.raises(UserError, match="gan_layers is 2, but the critic has 1"):
        logits_of(with_head, *seen, layers=2)
    with pytest.raises(UserError, match="the critic is Small; the adversarial term needs the features of Wan"):
        with_discriminator(Small(0), seed=0)


def test_what_the_head_computes():
    """Softmax over all tokens of the clip, for each head, by hand."""
    head = nnx.jit(lambda: Discriminator(4, heads=2, rngs=nnx.Rngs(0)))()
    features = np.asarray(jax.random.normal(jax.random.key(1), (1, 2, 3, 4)), np.float64)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def affine(layer, x):
        return x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)

    keys, values = np.split(affine(head.keys_values, norm(features.reshape(6, 4))), 2, axis=-1)
    query, seen = np.asarray(head.query[...], np.float64), []
    for part in (slice(0, 2), slice(2, 4)):
        weights = np.exp(keys[:, part] @ query[part] / np.sqrt(2))
        seen.append(weights @ values[:, part] / weights.sum())
    hidden = affine(head.hidden, norm(np.concatenate(seen)))
    expected = affine(head.out, hidden / (1 + np.exp(-hidden)))
    found = nnx.jit(lambda head, x: head(x))(head, jnp.asarray(features, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gan_weight": -1.0}, "gan_weight is -1.0; it must be at least 0"),
        ({"gan_weight": float("nan")}, "gan_weight is nan; it must be at least 0"),
        ({"gan_r1": 1.0}, "gan_r1 is 1.0, but gan_weight is 0: there is no discriminator; give --gan-weight 0.03"),
        ({"gan_relativistic": True}, "gan_relativistic is True, but gan_weight is 0"),
        ({"gan_layers": 3}, "gan_layers is 3, but gan_weight is 0"),
        ({"gan_weight": 0.03, "gan_layers": 0}, "gan_layers is 0; it must be at least 1"),
        ({"gan_weight": 0.03, "gan_sigma": 0.0}, "gan_sigma is 0.0; it must be positive and finite"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        DMDConfig(**settings)


def test_prompts_alone_will_not_do(tmp_path):
    objective = DMDObjective(DMDConfig(gan_weight=0.03))
    with pytest.raises(UserError, match=r"gan_weight is 0.03, but prompts .* are texts without clips"):
        objective.open_source(DataConfig(prompts=tmp_path / "prompts.txt", video=None, frames=9))


@pytest.mark.slow
def test_in_a_run(tmp_path):
    """The head trains, is in the checkpoints of the critic alone, and a resume goes on with it bit for bit."""
    sizes = dict(num_layers=1, dim=24, num_heads=2, ffn_dim=16, text_dim=4, text_len=2, freq_dim=16)
    save_checkpoint(WanModel(wan_config("tiny", **sizes), rngs=nnx.Rngs(0)), tmp_path / "teacher")
    (tmp_path / "latents").mkdir()
    for number in range(3):
        arrays = dict(zip(("latents", "text"), batch((1, 3, 4, 4, 16), seed=number), strict=True))
        write_arrays(
            tmp_path / f"latents/{number}.safetensors", {name: x[0] for name, x in arrays.items()}, metadata={}
        )
    network = [f"{name}={value}" for name, value in sizes.items()]
    roles = [word for role in ("student", "critic", "teacher") for word in (f"--{role}.overrides", *network)]

    def run(name, *options):
        data = ["--latents", str(tmp_path / "latents"), "--held-out", "0.4", "--batch", "2"]
        places = ["--folder", str(tmp_path / name), "--teacher.init-from", str(tmp_path / "teacher")]
        settings = ["--gan-weight", "0.03", "--student-every", "2", "--critic.learning-rate", "1e-2"]
        command = ["train", "--objective", "dmd", *data, *places, *settings, *roles]
        assert main([*command, *options]) == 0
        return [record for record in history(tmp_path / name) if "critic/loss" in record]

    whole = run("whole", "--steps", "3")
    run("halves", "--steps", "2")
    assert run("halves", "--steps", "3", "--resume") == whole
    for name in ("gan_loss", "gan_fake", "gan_real", "gan_r1", "gan_r2", "gan_told_apart"):
        assert f"critic/{name}" in whole[1]
    assert {"student/gan_loss", "student/gan_fake"} <= set(whole[2])
    names = json.loads((tmp_path / "whole/checkpoints/3/about/metadata").read_text())["arrays"]
    with_head = {name.split(".")[1] for name in names if ".discriminator." in name}
    assert with_head == {"critic"}
    kernels = []
    for step in (0, 3):
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        name = "roles.critic.params.discriminator.hidden.kernel"
        wanted = {name: jax.ShapeDtypeStruct((24, 24), jnp.float32, sharding=place)}
        kernels.append(np.asarray(read_arrays(tmp_path / f"whole/checkpoints/{step}/state", wanted)[name]))
    assert np.abs(kernels[1] - kernels[0]).max() > 1e-3
