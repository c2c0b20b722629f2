import json

import numpy as np
import pytest
import safetensors.numpy

from monarchrt.models.vae import VAEConfig, load_vae, vae_config
from monarchrt.models.vae.checkpoint import config_from_diffusers, vae_entries
from tests.models.vae.conftest import SMALL
from tests.parameters import assert_same, flat


@pytest.fixture(scope="module")
def official(torch_vae):
    """torch tensors under the official names."""
    left = torch_vae.state_dict()
    return {entry.names["official"]: left[entry.names["diffusers"]] for entry in vae_entries(SMALL)}


def test_names_at_true_size():
    entries = vae_entries(vae_config("wan21"))
    official = {entry.names["official"] for entry in entries}
    assert len(official) == len({entry.path for entry in entries}) == 194
    assert {
        *("conv1.weight", "conv2.bias", "encoder.conv1.weight", "decoder.head.2.weight", "encoder.head.0.gamma"),
        *("encoder.downsamples.2.resample.1.weight", "encoder.downsamples.5.time_conv.bias"),
        *("encoder.downsamples.3.shortcut.weight", "encoder.downsamples.10.residual.6.weight"),
        *("encoder.middle.1.norm.gamma", "decoder.middle.1.to_qkv.weight", "decoder.middle.2.residual.3.gamma"),
        *("decoder.upsamples.3.time_conv.weight", "decoder.upsamples.4.shortcut.weight"),
        *("decoder.upsamples.11.resample.1.bias", "decoder.upsamples.14.residual.0.gamma"),
    } < official
    assert "decoder.upsamples.11.time_conv.weight" not in official
    assert "encoder.downsamples.2.time_conv.weight" not in official


def test_every_name_of_diffusers_at_true_size():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        model = diffusers.AutoencoderKLWan()
    assert {entry.names["diffusers"] for entry in vae_entries(vae_config("wan21"))} == set(model.state_dict())
    assert config_from_diffusers(dict(model.config)) == vae_config("wan21")


class TestLoading:
    def test_official(self, vae, official, tmp_path):
        import torch

        # An official folder has the transformer and the text encoder beside it, and the transformer's config.json.
        torch.save(official, tmp_path / "Wan2.1_VAE.pth")
        torch.save({}, tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
        (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
        (tmp_path / "config.json").write_text('{"_class_name": "WanModel", "dim": 1536}')
        seen = []
        loaded = load_vae(tmp_path, config=SMALL, progress=lambda *args: seen.append(args))
        assert_same(loaded, vae)
        assert len(seen) == len(official)
        assert seen[-1][1] == seen[-1][2] == sum(tensor.nbytes for tensor in official.values())
        assert_same(load_vae(tmp_path / "Wan2.1_VAE.pth", config=SMALL), vae)
        with pytest.raises(ValueError, match=r"does not fit the configuration of a Wan VAE|lacks"):
            load_vae(tmp_path)  # the released sizes

    def test_diffusers(self, vae, torch_vae, tmp_path):
        torch_vae.save_pretrained(tmp_path / "vae", max_shard_size="200KB")
        assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1
        for path in (tmp_path, tmp_path / "vae"):
            loaded = load_vae(path)
            assert loaded.config == SMALL
            assert_same(loaded, vae)

    def test_dtypes(self, torch_vae, tmp_path):
        torch_vae.save_pretrained(tmp_path)
        loaded = load_vae(tmp_path, dtype="bfloat16", param_dtype="bfloat16")
        assert {array.dtype.name for array in flat(loaded).values()} == {"bfloat16"}
        assert loaded.dtype == loaded.decoder.conv1.dtype == "bfloat16"


class TestErrors:
    def write(self, official, folder, **changes):
        arrays = {name: tensor.numpy() for name, tensor in official.items()} | changes
        arrays = {name: array for name, array in arrays.items() if array is not None}
        safetensors.numpy.save_file(arrays, folder / "vae.safetensors")
        return folder

    def test_tensors(self, official, tmp_path):
        name = "decoder.middle.1.proj.weight"
        with pytest.raises(ValueError, match=rf"lacks 1 of {len(official)} tensors of a Wan VAE: {name}"):
            load_vae(self.write(official, tmp_path, **{name: None}), config=SMALL)
        with pytest.raises(ValueError, match=r"has 1 tensors that a Wan VAE does not have: model_ema.decay"):
            load_vae(self.write(official, tmp_path, **{"model_ema.decay": np.zeros(1, np.float32)}), config=SMALL)
        for shape in ((18, 18, 1, 2), (18, 18), (18, 18, 1, 1, 1)):
            wrong = np.zeros(shape, np.float32)
            with pytest.raises(ValueError, match=rf"{name} has shape .*, not \(18, 18, 1, 1\)"):
                load_vae(self.write(official, tmp_path, **{name: wrong}), config=SMALL)
        gamma = "encoder.head.0.gamma"
        with pytest.raises(ValueError, match=rf"{gamma} has shape \(18, 2, 1, 1\), not \(18, 1, 1, 1\)"):
            load_vae(self.write(official, tmp_path, **{gamma: np.zeros((18, 2, 1, 1), np.float32)}), config=SMALL)

    def test_other_files(self, tmp_path):
        with pytest.raises(ValueError, match=r"does not exist; give Wan2.1_VAE.pth"):
            load_vae(tmp_path / "none")
        safetensors.numpy.save_file({"x": np.zeros(3, np.float32)}, tmp_path / "vae.safetensors")
        with pytest.raises(ValueError, match="is not a Wan VAE: it holds x"):
            load_vae(tmp_path)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"is_residual": True}, "is_residual=True is not supported; Wan 2.1 has False"),
            ({"patch_size": 2}, "patch_size=2 is not supported; Wan 2.1 has None"),
            ({"base_dim": 160, "decoder_base_dim": 256}, "decoder_base_dim=256 is not base_dim"),
            ({"z_dim": 48}, "config.json: latents_mean has 16 entries; z_dim=48"),
        ],
    )
    def test_another_architecture(self, settings, message):
        with pytest.raises(ValueError, match=message):
            config_from_diffusers(settings)

    def test_config_json(self, official, tmp_path):
        self.write(official, tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(ValueError, match=r"config.json is not JSON"):
            load_vae(tmp_path)
        settings = {"_class_name": "AutoencoderKLWan", "base_dim": SMALL.dim, "dim_mult": SMALL.dim_mult}
        settings |= {"z_dim": 3, "num_res_blocks": 1}
        settings |= {"latents_mean": SMALL.latents_mean, "latents_std": SMALL.latents_std}
        (tmp_path / "config.json").write_text(json.dumps(settings))
        assert load_vae(tmp_path).config == SMALL
        assert VAEConfig() != SMALL


class TestPrefixes:
    """ComfyUI's and trainers' files, as of the network."""

    @pytest.mark.parametrize("prefix", ["vae.", "first_stage_model.", "module.", "_orig_mod.", "whatever.it.is."])
    def test_one_prefix(self, vae, official, tmp_path, prefix):
        arrays = {prefix + name: tensor.numpy() for name, tensor in official.items()}
        safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
        assert_same(load_vae(tmp_path / "x.safetensors", config=SMALL), vae)

    def test_a_whole_pipeline(self, vae, official, tmp_path):
        arrays = {f"vae.{name}": tensor.numpy() for name, tensor in official.items()}
        arrays |= {
            "model.diffusion_model.patch_embedding.weight": np.zeros((8, 16, 1, 2, 2), np.float32),
            "text_encoders.umt5xxl.transformer.shared.weight": np.zeros((4, 4), np.float32),
        }
        safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
        assert_same(load_vae(tmp_path / "x.safetensors", config=SMALL), vae)

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (["blocks.0.self_attn.q.weight"], "is not a Wan VAE but a Wan transformer: it holds blocks.0"),
            (["encoder.block.0.layer.0.SelfAttention.q.weight"], "is not a Wan VAE but a T5 text encoder"),
            (["decoder.up.0.block.0.conv1.weight"], "is not a Wan VAE but an autoencoder"),
            (
                ["decoder.upsamples.0.upsamples.0.residual.0.gamma", "decoder.conv1.weight"],
                "is not the VAE of Wan 2.1 but the VAE of Wan 2.2 TI2V-5B",
            ),
        ],
    )
    def test_other_networks_are_named(self, tmp_path, names, message):
        safetensors.numpy.save_file({name: np.zeros((2, 2), np.float32) for name in names}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=message):
            load_vae(tmp_path / "x.safetensors")
