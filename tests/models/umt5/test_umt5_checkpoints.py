import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from monarchrt.models.umt5 import load_umt5, umt5_config
from monarchrt.models.umt5.checkpoint import umt5_entries
from tests.models.umt5.conftest import SMALL, torch_tensors
from tests.parameters import assert_same, flat


def official_tensors():
    left = torch_tensors()
    return {entry.names["official"]: left[entry.names["transformers"]] for entry in umt5_entries(SMALL)}


def numpy_tensors():
    return {name: array.numpy() for name, array in torch_tensors().items()}


def test_official_names():
    names = [entry.names["official"] for entry in umt5_entries(umt5_config("xxl"))]
    assert len(set(names)) == 242
    assert {
        "token_embedding.weight",
        "norm.weight",
        "blocks.23.norm1.weight",
        "blocks.0.attn.o.weight",
        "blocks.7.pos_embedding.embedding.weight",
        "blocks.23.ffn.gate.0.weight",
        "blocks.0.ffn.fc2.weight",
    } < set(names)


class TestLoading:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_official(self, encoder, torch_encoder, tmp_path, dtype):
        import torch

        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in official_tensors().items()}
        # An official folder has the transformer and the autoencoder beside it, and the transformer's config.json.
        torch.save(tensors, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
        torch.save({}, tmp_path / "Wan2.1_VAE.pth")
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
        (tmp_path / "config.json").write_text('{"dim": 1536}')
        seen = []
        loaded = load_umt5(tmp_path, dtype="float32", progress=lambda *args: seen.append(args))
        assert loaded.config == SMALL
        assert {leaf.dtype.name for leaf in flat(loaded).values()} == {dtype}
        if dtype == "float32":
            assert_same(loaded, encoder)
        assert [name for name, _, _ in seen] == list(tensors)
        assert seen[-1][1] == seen[-1][2] == sum(tensor.nbytes for tensor in tensors.values())
        assert_same(load_umt5(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", dtype="float32"), loaded)

    def test_transformers_folder_in_shards(self, encoder, torch_encoder, tmp_path):
        torch_encoder.save_pretrained(tmp_path / "text_encoder", max_shard_size="20KB")
        assert len(list((tmp_path / "text_encoder").glob("*.safetensors"))) > 2
        assert_same(load_umt5(tmp_path), encoder)

    def test_transformers_file(self, encoder, torch_encoder, tmp_path):
        torch_encoder.save_pretrained(tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["d_kv"] == 8
        assert_same(load_umt5(tmp_path), encoder)
        half = load_umt5(tmp_path, param_dtype="bfloat16")
        for path, array in flat(half).items():
            np.testing.assert_array_equal(array, flat(encoder)[path].astype(ml_dtypes.bfloat16))

    @pytest.mark.parametrize("both", [True, False])
    def test_tied_names(self, encoder, tmp_path, both):
        arrays = numpy_tensors()
        arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"] if both else arrays.pop("shared.weight")
        safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
        assert_same(load_umt5(tmp_path), encoder)

    def test_sharding(self, encoder, tmp_path):
        safetensors.numpy.save_file(numpy_tensors(), tmp_path / "model.safetensors")
        asked = []

        def place(path, shape):
            asked.append((path, shape))
            return jax.sharding.SingleDeviceSharding(jax.devices()[0])

        assert_same(load_umt5(tmp_path, sharding=place), encoder)
        assert (("blocks", "attn", "q", "kernel"), (3, 24, 32)) in asked


class TestErrors:
    def write(self, folder, **changes):
        arrays = numpy_tensors()
        for name, array in changes.items():
            if array is None:
                del arrays[name]
            else:
                arrays[name] = array
        safetensors.numpy.save_file(arrays, folder / "model.safetensors")
        return folder

    def test_missing(self, torch_encoder, tmp_path):
        name = "encoder.block.1.layer.1.DenseReluDense.wi_1.weight"
        with pytest.raises(ValueError, match=rf"lacks 1 of 32 tensors of a umT5 encoder: {name}"):
            load_umt5(self.write(tmp_path, **{name: None}))
        with pytest.raises(ValueError, match=r"lacks encoder.block.0.layer.0.SelfAttention.q.weight, one of the"):
            load_umt5(self.write(tmp_path, **{"encoder.block.0.layer.0.SelfAttention.q.weight": None}))

    def test_unexpected(self, torch_encoder, tmp_path):
        with pytest.raises(ValueError, match=r"has 1 tensors that a umT5 encoder does not have: lm_head.weight"):
            load_umt5(self.write(tmp_path, **{"lm_head.weight": np.zeros((2, 2), np.float32)}))
        with pytest.raises(ValueError, match=r"is a whole umT5 with decoder.x; give an encoder alone"):
            load_umt5(self.write(tmp_path, **{"decoder.x": np.zeros((2, 2), np.float32)}))

    def test_shape(self, torch_encoder, tmp_path):
        name = "encoder.block.2.layer.0.SelfAttention.q.weight"
        with pytest.raises(ValueError, match=rf"{name} has shape \(24, 32\), not \(32, 24\)"):
            load_umt5(self.write(tmp_path, **{name: np.zeros((24, 32), np.float32)}))
        with pytest.raises(ValueError, match=r"shared.weight has shape \(60, 24\)"):
            load_umt5(self.write(tmp_path), config=umt5_config("tiny", vocab_size=61, num_layers=3))

    def test_other_files(self, tmp_path):
        with pytest.raises(ValueError, match=r"does not exist; give models_t5_umt5-xxl-enc-bf16.pth"):
            load_umt5(tmp_path / "none")
        with pytest.raises(ValueError, match=r"should hold one safetensors file, .* found nothing of the kind"):
            load_umt5(tmp_path)
        safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="is not a umT5 encoder: it holds x"):
            load_umt5(tmp_path)

    def test_settings(self, torch_encoder, tmp_path):
        self.write(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps({"d_kv": 8, "model_type": "t5"}))
        with pytest.raises(ValueError, match="model_type='t5' is not supported; umT5 has 'umt5'"):
            load_umt5(tmp_path)


def test_compute_dtype_is_half_by_default(torch_encoder, tmp_path):
    safetensors.numpy.save_file(numpy_tensors(), tmp_path / "model.safetensors")
    ids = jnp.ones((1, 3), jnp.int32)
    assert load_umt5(tmp_path)(ids, ids > 0).dtype == jnp.bfloat16


def test_comfyui(encoder, torch_encoder, tmp_path):
    """Float8 with scales, under the prefix that files of whole pipelines have, the tokenizer beside it."""
    from safetensors.torch import save_file

    torch = pytest.importorskip("torch")
    prefix, tensors = "text_encoders.umt5xxl.transformer.", {}
    for name, tensor in torch_tensors().items():
        tensors[prefix + name] = tensor.contiguous().clone()
        if tensor.ndim == 2 and ".SelfAttention." in name and "bias" not in name:
            tensors[prefix + name] = (tensor / 2).to(torch.float8_e4m3fn)
            tensors[f"{prefix}{name.removesuffix('weight')}scale_weight"] = torch.tensor(2.0)
    tensors |= {
        "text_encoders.umt5xxl.spiece_model": torch.zeros(9, dtype=torch.uint8),
        "vae.conv1.bias": torch.ones(2),
    }
    tensors["text_encoders.umt5xxl.scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(tensors, tmp_path / "x.safetensors")
    found = np.asarray(load_umt5(tmp_path / "x.safetensors").blocks.attn.q.kernel[...])[1]
    exact = tensors[f"{prefix}encoder.block.1.layer.0.SelfAttention.q.weight"].float().numpy() * 2
    np.testing.assert_array_equal(found, exact.T)


def test_another_network(tmp_path):
    tensors = {"blocks.0.self_attn.q.weight": np.zeros((2, 2), np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is not a umT5 encoder but a Wan transformer: it holds"):
        load_umt5(tmp_path / "x.safetensors")
