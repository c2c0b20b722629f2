import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.umt5 import UMT5Config, UMT5Encoder, umt5_config
from monarchrt.models.umt5.encoder import RMSNorm, relative_buckets
from tests.models.umt5.conftest import SMALL

encode = nnx.jit(lambda encoder, ids, mask: encoder(ids, mask))


def sample(length=150, seed=0):
    """Ids and real masks: one full, one partly filled, one with a single token."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, SMALL.vocab_size, (3, length)).astype(np.int32)
    mask = np.arange(length) < np.array([length, 37, 1])[:, None]
    return jnp.asarray(np.where(mask, ids, 0)), jnp.asarray(mask)


def test_parity(encoder, torch_encoder):
    import torch

    ids, mask = sample()
    with torch.no_grad():
        out = torch_encoder(torch.tensor(np.array(ids)).long(), torch.tensor(np.array(mask)).long())
    expected, kept = out.last_hidden_state.numpy(), np.array(mask)
    assert expected[kept].std() > 0.3
    np.testing.assert_allclose(np.array(encode(encoder, ids, mask))[kept], expected[kept], atol=1e-4)


def test_padding_changes_nothing(encoder):
    ids, mask = sample(length=40)
    other = encode(encoder, jnp.where(mask, ids, 7), mask)
    short = encode(encoder, ids[1:2, :37], mask[1:2, :37])
    out = encode(encoder, ids, mask)
    np.testing.assert_array_equal(np.array(out)[np.array(mask)], np.array(other)[np.array(mask)])
    np.testing.assert_allclose(out[1:2, :37], short, atol=1e-5)


@pytest.mark.parametrize(
    ("relative", "bucket"),
    [
        *((-200, 15), (-64, 14), (-16, 10), (-8, 8), (-7, 7), (-1, 1), (0, 0)),
        *((1, 17), (7, 23), (8, 24), (16, 26), (64, 30), (127, 31)),
    ],
)
def test_buckets(relative, bucket):
    table = relative_buckets(umt5_config("xxl"), 512)
    assert table[max(0, -relative), max(0, relative)] == bucket


def test_every_bucket_is_transformers(torch_encoder):
    import torch

    relative = torch.arange(512)[None, :] - torch.arange(512)[:, None]
    attention = torch_encoder.encoder.block[0].layer[0].SelfAttention
    expected = attention._relative_position_bucket(relative).numpy()
    np.testing.assert_array_equal(relative_buckets(SMALL, 512), expected)


def test_every_layer_has_its_own_bias(encoder):
    ids, mask = sample(length=20)
    before = encode(encoder, ids, mask)
    for layer in range(SMALL.num_layers):
        graph, state = nnx.split(encoder)
        changed = nnx.merge(graph, jax.tree.map(lambda x: x, state))
        bias = changed.blocks.attn.bias
        bias[...] = bias[...].at[layer, 17].add(1.0)
        assert np.abs(encode(changed, ids, mask)[0] - before[0]).max() > 1e-3


def test_small_numbers_are_normalised_as_in_torch():
    """Of the size of a thousandth, so that what is added to their mean square counts."""
    functional = pytest.importorskip("torch").nn.functional
    x = 1e-3 * np.random.default_rng(0).standard_normal((5, SMALL.dim)).astype(np.float32)
    expected = functional.rms_norm(functional.torch.from_numpy(x), (SMALL.dim,), eps=1e-6)
    norm = RMSNorm(SMALL, param_dtype="float32", rngs=nnx.Rngs(0))
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_size():
    model = nnx.eval_shape(lambda: UMT5Encoder(umt5_config("xxl"), rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves) == 5_680_910_336


def test_half_precision(encoder):
    half = UMT5Encoder(umt5_config("tiny"), rngs=nnx.Rngs(0), dtype="bfloat16", param_dtype="bfloat16")
    full = UMT5Encoder(umt5_config("tiny"), rngs=nnx.Rngs(0), param_dtype="bfloat16")
    ids, mask = sample(length=30)
    out, expected = encode(half, ids, mask), encode(full, ids, mask)
    assert out.dtype == jnp.bfloat16
    assert 0 < np.abs(np.float32(out) - expected)[np.array(mask)].mean() < 0.05


def test_errors(encoder):
    with pytest.raises(ValueError, match=r"mask has shape \(1, 3\), ids \(1, 4\)"):
        UMT5Encoder.__call__(encoder, jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 3), bool))
    with pytest.raises(ValueError, match="attention_dim=30 is not a multiple of num_heads=4"):
        UMT5Config(vocab_size=9, dim=8, attention_dim=30, ffn_dim=8, num_heads=4, num_layers=1)
    with pytest.raises(ValueError, match="num_layers=0 is not a positive integer"):
        umt5_config("tiny", num_layers=0)
    with pytest.raises(ValueError, match="preset='xl' is unknown; did you mean 'xxl'"):
        umt5_config("xl")
