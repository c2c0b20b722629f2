"""Softmax attention on a mesh: every device attends for its own heads or queries, which is all that cuDNN takes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, use_abstract_mesh

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
