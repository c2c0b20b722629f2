"""Softmax attention on a mesh: every device attends for its own heads or queries, which is all that cuDNN takes.

And what is given to cuDNN where keys are few.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from monarchrt.models.attention import softmax
from monarchrt.models.attention.softmax import softmax_attention
from monarchrt.models.mesh import AXES, MeshShape
from monarchrt.models.wan import wan_config
from monarchrt.models.wan.layers import CrossAttention

MESH = AbstractMesh(MeshShape(data=2, heads=2).sizes(), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.fixture
def seen(monkeypatch):
    """Shapes of what is attended to, of each call on a device."""
    shapes, attend = [], jax.nn.dot_product_attention

    def record(query, key, value, **options):
        shapes.append((query.shape, key.shape, value.shape))
        return attend(query, key, value, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    return shapes


@pytest.mark.parametrize("lengths", [False, True])
def test_each_device_attends_for_its_heads(seen, lengths):
    x = [jax.ShapeDtypeStruct((2, tokens, 4, 16), jnp.float32) for tokens in (8, 6, 6)]
    with use_abstract_mesh(MESH):
        out = jax.eval_shape(lambda *x: softmax_attention(*x, valid_keys=jnp.int32(5) if lengths else None), *x)
    assert seen == [((1, 8, 2, 16), (1, 6, 2, 16), (1, 6, 2, 16))]
    assert out.shape == x[0].shape


def test_each_device_attends_to_the_text_for_its_tokens(seen):
    config = wan_config("tiny", dim=64, num_heads=4)
    text = jax.ShapeDtypeStruct((2, 6, 4, 16), jnp.float32)
    with use_abstract_mesh(MESH):
        out = jax.eval_shape(
            lambda x, *pair: CrossAttention(config, rngs=nnx.Rngs(0))(x, (pair,)),
            jax.ShapeDtypeStruct((2, 3, 8, 64), jnp.float32), text, text,
        )  # fmt: skip
    assert seen == [((1, 12, 4, 16), (1, 6, 4, 16), (1, 6, 4, 16))]
    assert out.shape == (2, 3, 8, 64)


@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_by_groups_of_queries(monkeypatch, batch):
    """The value is of all queries at once, as without a gradient; the gradients are those of all together."""
    rng = np.random.default_rng(0)
    query, gradient = (jnp.asarray(rng.normal(size=(batch, 12, 2, 16)), jnp.bfloat16) for _ in range(2))
    key, value = (jnp.asarray(rng.normal(size=(batch, 5, 2, 16)), jnp.bfloat16) for _ in range(2))
    seen, attend = [], jax.nn.dot_product_attention

    def as_xla(query, key, value, *, implementation):
        seen.append((query.shape[:2], key.shape[:2]))
        return attend(query, key, value, implementation="xla")

    right = jax.vjp(attend, query, key, value)[1](gradient)
    monkeypatch.setattr(jax.nn, "dot_product_attention", as_xla)
    monkeypatch.setattr(softmax, "QUERIES", 3)
    np.testing.assert_array_equal(
        softmax_attention(query, key, value, implementation="cudnn"), attend(query, key, value, implementation="xla")
    )
    assert seen == [((batch, 12), (batch, 5))]
    found = jax.vjp(lambda *x: softmax_attention(*x, implementation="cudnn"), query, key, value)[1](gradient)
    assert seen[1:] == [((4 * batch, 3), (4 * batch, 5))]
    for one, other in zip(found, right, strict=True):
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        assert np.linalg.norm(one - other) < 4e-3 * np.linalg.norm(other)


def test_float16_without_a_gpu():
    """XLA's products of float16 with sums in float32 are not for CPUs."""
    q, k, v = jnp.asarray(np.random.default_rng(0).standard_normal((3, 2, 6, 2, 8)), jnp.float16)
    found = jax.jit(softmax_attention)(q, k, v, valid_keys=jnp.int32(4))
    expected = softmax_attention(*(x.astype("float32") for x in (q, k[:, :4], v[:, :4])))
    assert found.dtype == jnp.float16
    np.testing.assert_allclose(found.astype("float32"), expected, atol=1e-3)
    gradient = jax.jit(jax.grad(lambda q: softmax_attention(q, k, v).astype("float32").sum()))(q)
    assert gradient.dtype == jnp.float16
