"""Capturing queries, keys and values: they are what the layers see, and the model computes the same."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.attention.capture import capture
from monarchrt.models.errors import UserError
from monarchrt.models.sampling import Rollout, autoregressive
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.watched import watching


@pytest.fixture(scope="module")
def model():
    model = WanModel(wan_config("tiny", num_layers=2, causal_block=1), rngs=nnx.Rngs(0))
    kernel = model.head.proj.kernel
    kernel[...] = 0.1 * nnx.Rngs(1).normal(kernel.shape)
    return model


def test_what_a_roll_out_sees(model):
    """Each block's keys are the cached frames and its own; a whole clip's are all; only what was chosen is kept."""
    rollout = Rollout(block=1, sampler="euler", steps=2)
    options: Any = dict(frames=3, height=4, width=8, key=jax.random.key(0), rollout=rollout)
    text = jnp.ones((1, 2, 32))
    plain = np.concatenate(list(autoregressive(model, text, **options)), axis=1)
    with capture(model, layers=(1,), steps=(1,), blocks=(0, 2), heads=(3, 0)) as (probed, calls):
        made = np.concatenate(list(autoregressive(probed, text, **options)), axis=1)
    np.testing.assert_array_equal(made, plain)
    assert [(call.layer, call.step, call.block, call.heads) for call in calls] == [
        (1, 1, 0, (3, 0)),
        (1, 1, 2, (3, 0)),
    ]
    assert [call.key_frames.tolist() for call in calls] == [[0], [0, 1, 2]]
    assert calls[1].query.shape == (1, 8, 2, 24)
    assert calls[1].key.shape == (1, 24, 2, 24)
    # the cache was rewritten at time 0 from the finished blocks: as the whole clip, clean, sees itself
    with capture(model, layers=(1,)) as (probed, whole):
        probed(jnp.asarray(made), jnp.zeros((1, 3)), text)
    np.testing.assert_allclose(calls[1].key[:, :16], whole[0].key[:, :16][:, :, [3, 0]], atol=2e-5)
    assert whole[0].causal_block == 1
    query, key, value, grid = model.attention_inputs(jnp.asarray(made), jnp.zeros((1, 3)), text, layer=1)
    for found, expected in ((whole[0].query, query), (whole[0].key, key), (whole[0].value, value)):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert whole[0].grid == grid == (3, 2, 4)


@pytest.mark.parametrize(
    ("chosen", "says"), [({"layers": (2,)}, "layers=.*0 to 1"), ({"heads": (4,)}, "heads=.*0 to 3")]
)
def test_what_does_not_exist(model, chosen, says):
    with pytest.raises(ValueError, match=says), capture(model, **chosen):
        pass


@pytest.mark.parametrize("what", [capture, watching])
def test_what_passes_through_the_host_needs_a_cpu(monkeypatch, model, what):
    def none(backend=None):
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "local_devices", none)
    monkeypatch.setattr(jax.config, "read", lambda name: "cuda")
    with pytest.raises(UserError, match="JAX_PLATFORMS='cuda' excludes; use cuda,cpu"), what(model):
        pass
