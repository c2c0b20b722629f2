import functools

import jax.numpy as jnp
import pytest
from flax import nnx

from monarchrt.models.checkpoints.reading import fill_model, parameter_shapes, to_ours
from monarchrt.models.umt5 import Tokenizer, UMT5Config, UMT5Encoder
from monarchrt.models.umt5.checkpoint import umt5_entries

SMALL = UMT5Config(vocab_size=60, dim=24, attention_dim=32, ffn_dim=40, num_heads=4, num_layers=3)
WORDS = ["a", "cat", "on", "the", "wall", "dog", "runs", "&", "red", "café"]


@functools.cache
def transformers_umt5(seed=0):
    """transformers' encoder of the same sizes, every parameter random."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.UMT5Config(
        vocab_size=SMALL.vocab_size,
        d_model=SMALL.dim,
        d_kv=SMALL.attention_dim // SMALL.num_heads,
        d_ff=SMALL.ffn_dim,
        num_heads=SMALL.num_heads,
        num_layers=SMALL.num_layers,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
    )
    torch.manual_seed(seed)
    model = transformers.UMT5EncoderModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "layer_norm" in name
            wide = norm or "bias" in name or "shared" in name  # so that the position bias matters
            parameter.normal_(0, 0.3 if norm else 1.0 if wide else parameter.shape[-1] ** -0.5)
            if norm:
                parameter.add_(1)
    return model.eval()


def torch_tensors():
    """Its parameters by name, tied names once."""
    left = dict(transformers_umt5().state_dict())
    left.pop("encoder.embed_tokens.weight", None)
    return left


@pytest.fixture(scope="session")
def torch_encoder():
    return transformers_umt5()


@pytest.fixture(scope="session")
def encoder(torch_encoder):
    """Our model with the same parameters; every one must be used. Not to be changed in place."""
    left = torch_tensors()
    arrays = [(e, to_ours(left.pop(e.names["transformers"]).numpy(), e.layout)) for e in umt5_entries(SMALL)]
    assert not left, f"not in the mapping: {sorted(left)}"
    model = nnx.eval_shape(lambda: UMT5Encoder(SMALL, rngs=nnx.Rngs(0)))
    assert {entry.path for entry, _ in arrays} == set(parameter_shapes(model))
    return fill_model(model, arrays, dtype=jnp.float32)


def write_tokenizer(folder, *, end=True):
    """A tokenizer.json of whole words, with umT5's special tokens and, unless `end` is False, its end token."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors

    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<pad>", "</s>", "<unk>"])
    if end:
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    inner.enable_truncation(5)  # as a file may have it; ours decides the length itself
    inner.enable_padding(length=7)
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    return Tokenizer.load(write_tokenizer(tmp_path / "tokenizer"))
