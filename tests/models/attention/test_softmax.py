"""Softmax attention on a mesh: every device attends for its own heads or queries, which is all that cuDNN takes.

And what is given to cuDNN where keys are few.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

from monarchrt.models.attention import softmax
from monarchrt.models.attention.softmax import BY_HEADS, BY_QUERIES, softmax_attention
from monarchrt.models.mesh import AXES, MeshShape

MESH = AbstractMesh(MeshShape(data=2, heads=2).sizes(), AXES, axis_types=(AxisType.Auto,) * len(AXES))


@pytest.mark.parametrize(
    ("split", "query", "key"),
    [(BY_HEADS, (1, 8, 2, 16), (1, 6, 2, 16)), (BY_QUERIES, (1, 4, 4, 16), (1, 6, 4, 16))],
    ids=["heads", "queries"],
)
@pytest.mark.parametrize("lengths", [False, True])
def test_each_device_attends_for_its_part(monkeypatch, split, query, key, lengths):
    seen, attend = [], jax.nn.dot_product_attention

    def record(query, key, value, **options):
        seen.append((query.shape, key.shape, value.shape))
        return attend(query, key, value, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    x = [jax.ShapeDtypeStruct((2, tokens, 4, 16), jnp.float32) for tokens in (8, 6, 6)]
    with use_abstract_mesh(MESH):
        out = jax.eval_shape(
            lambda *x: softmax_attention(*x, valid_keys=jnp.int32(5) if lengths else None, split=split), *x
        )
    assert seen == [(query, key, key)]
    assert out.shape == x[0].shape


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
