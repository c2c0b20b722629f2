import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from monarchrt.models.checkpoints.tensor_files import SafetensorsFile
from monarchrt.models.errors import DiskFullError
from monarchrt.models.wan import DenseAttention, MonarchAttention, wan_config
from monarchrt.models.wan.checkpoints import (
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from monarchrt.models.wan.checkpoints.mapping import tensors
from monarchrt.models.wan.checkpoints.save import ModelFile
from monarchrt.models.wan.checkpoints.settings import config_to_json, dump_json
from tests.parameters import assert_same, flat

WEIGHTS = "diffusion_pytorch_model.safetensors"
OFFICIAL = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
OFFICIAL_OF_BLOCK = {
    "modulation": "scale_shift_table",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "norm3": "norm2",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}


def official_tensors(model):
    file = ModelFile(model)
    return {name: file.read(name) for name in file.infos}


class TestRoundTrip:
    @pytest.mark.parametrize("format", ["official", "diffusers", "orbax"])
    @pytest.mark.parametrize("param_dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
    def test_bit_for_bit(self, wan, small, tmp_path, format, param_dtype):
        model = wan.model(small, param_dtype=param_dtype)
        save_checkpoint(model, tmp_path / "a", format=format)
        loaded = load_checkpoint(tmp_path / "a")
        assert_same(loaded, model)
        assert dataclasses.replace(loaded.config, image_dim=1280) == model.config
        assert inspect_checkpoint(tmp_path / "a").format == format

    def test_i2v(self, wan, small, tmp_path):
        model = wan.model(small, model_type="i2v", in_channels=36, image_dim=24)
        for format in ("official", "diffusers"):
            save_checkpoint(model, tmp_path / format, format=format)
        assert_same(load_checkpoint(tmp_path / "diffusers"), model)
        # The official config.json has no width of the image features: it is the released models'.
        with pytest.raises(ValueError, match=r"img_emb.proj.0.weight has shape \(24,\), not \(1280,\)"):
            load_checkpoint(tmp_path / "official")

    def test_shards(self, wan, small, tmp_path):
        model = wan.model(small)
        save_checkpoint(model, tmp_path / "a", max_shard_bytes=100_000)
        files = sorted(file.name for file in (tmp_path / "a").iterdir())
        assert len(files) > 4
        assert "diffusion_pytorch_model.safetensors.index.json" in files
        total = len(files) - 2
        assert f"diffusion_pytorch_model-00001-of-{total:05}.safetensors" in files
        assert_same(load_checkpoint(tmp_path / "a"), model)

    def test_conversion_there_and_back_is_the_same_file(self, wan, small, tmp_path):
        save_checkpoint(wan.model(small), tmp_path / "a")
        convert_checkpoint(tmp_path / "a", tmp_path / "b", to="diffusers", max_shard_bytes=50_000)
        convert_checkpoint(tmp_path / "b", tmp_path / "c", to="orbax")
        convert_checkpoint(tmp_path / "c", tmp_path / "d", to="official")
        for name in ("config.json", WEIGHTS):
            assert (tmp_path / "d" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()

    def test_conversion_casts(self, wan, small, tmp_path):
        model = wan.model(small)
        save_checkpoint(model, tmp_path / "a")
        seen = []
        convert_checkpoint(
            tmp_path / "a", tmp_path / "b", to="diffusers", dtype="bfloat16", progress=lambda *args: seen.append(args)
        )
        info = inspect_checkpoint(tmp_path / "b")
        assert info.dtypes == {"bfloat16": info.tensors}
        assert len(seen) == info.tensors
        assert seen[-1][1] == seen[-1][2] == 2 * info.parameters
        for path, array in flat(load_checkpoint(tmp_path / "b")).items():
            np.testing.assert_array_equal(array, flat(model)[path].astype(ml_dtypes.bfloat16))

    def test_loading_casts(self, wan, small, tmp_path):
        model = wan.model(small)
        save_checkpoint(model, tmp_path / "a")
        loaded = load_checkpoint(tmp_path / "a", param_dtype="bfloat16", dtype="bfloat16", remat="full")
        assert (loaded.config.param_dtype, loaded.config.dtype, loaded.config.remat) == ("bfloat16", "bfloat16", "full")
        for path, array in flat(loaded).items():
            np.testing.assert_array_equal(array, flat(model)[path].astype(ml_dtypes.bfloat16))

    def test_every_name_is_written(self, wan, small, tmp_path):
        for model_type in ("t2v", "i2v"):
            model = wan.model(small, model_type=model_type, image_dim=1280)
            for naming in ("official", "diffusers"):
                folder = save_checkpoint(model, tmp_path / (model_type + naming), format=naming)
                names = set(safetensors.numpy.load_file(folder / WEIGHTS))
                assert names == {tensor.name(naming) for tensor in tensors(model.config)}
                assert len(names) == (27 * 2 + 15 if model_type == "t2v" else 32 * 2 + 23)


class TestOthersRead:
    """The files are what other libraries write and read."""

    def test_bytes_equal_the_safetensors_library(self, wan, small, tmp_path):
        model = wan.model(small)
        path = save_checkpoint(model, tmp_path / "a") / WEIGHTS
        expected = tmp_path / "expected.safetensors"
        arrays = {name: np.ascontiguousarray(array) for name, array in official_tensors(model).items()}
        safetensors.numpy.save_file(arrays, expected, metadata={"format": "pt"})
        assert path.read_bytes() == expected.read_bytes()

    def test_official_names_are_the_released_ones(self, wan, small, tmp_path):
        """What has which official name, by the name that diffusers gives it, whose numbers are compared elsewhere."""
        model = wan.model(small, model_type="i2v", image_dim=16)
        written = {
            naming: safetensors.numpy.load_file(save_checkpoint(model, tmp_path / naming, format=naming) / WEIGHTS)
            for naming in ("official", "diffusers")
        }
        names = OFFICIAL | {f"blocks.1.{ours}": f"blocks.1.{theirs}" for ours, theirs in OFFICIAL_OF_BLOCK.items()}
        seen = set()
        for official, diffusers in names.items():
            for leaf in ("", ".weight", ".bias"):
                if f"{diffusers}{leaf}" in written["diffusers"]:
                    seen.add(f"{official}{leaf}")
                    a, b = (written[k][f"{n}{leaf}"] for k, n in (("official", official), ("diffusers", diffusers)))
                    np.testing.assert_array_equal(a, b, err_msg=official)
        assert seen == {name for name in written["official"] if not name.startswith("blocks.0.")}
        values = [array.tobytes() for name, array in written["official"].items()]
        assert len(set(values)) == len(values), "an exchange of two would not be noticed"

    def test_official_config_is_the_released_one(self):
        text = dump_json(config_to_json(wan_config("wan2.1-t2v-1.3b"), "official"))
        assert len(text.encode()) == 249
        assert list(json.loads(text)) == [
            *("_class_name", "_diffusers_version", "dim", "eps", "ffn_dim", "freq_dim"),
            *("in_dim", "model_type", "num_heads", "num_layers", "out_dim", "text_len"),
        ]

    def test_diffusers_loads_ours_and_we_its(self, wan, small, tmp_path):
        torch = pytest.importorskip("torch")
        diffusers = pytest.importorskip("diffusers")
        import safetensors.torch

        inputs = wan.sample(small)
        model = wan.model(small)
        out = nnx.jit(lambda m, *x: m(*x))(model, *inputs)
        save_checkpoint(model, tmp_path / "ours", format="diffusers")
        theirs = diffusers.WanTransformer3DModel.from_config(
            diffusers.WanTransformer3DModel.load_config(tmp_path / "ours")
        )
        theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "ours" / WEIGHTS), strict=True)
        latents, timesteps, text = (torch.from_numpy(np.array(x)) for x in inputs)
        with torch.no_grad():
            expected = theirs(latents.permute(0, 4, 1, 2, 3), timesteps, text).sample.permute(0, 2, 3, 4, 1).numpy()
        assert expected.std() > 0.1
        np.testing.assert_allclose(out, expected, atol=1e-4)
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
        assert_same(load_checkpoint(tmp_path / "theirs", config=small), model)
        pipeline = tmp_path / "pipeline"
        pipeline.mkdir()
        (pipeline / "model_index.json").write_text("{}")
        (tmp_path / "theirs").rename(pipeline / "transformer")
        assert_same(load_checkpoint(pipeline, config=small), model)

    def test_hub_cache_without_network(self, wan, small, tmp_path, monkeypatch):
        constants = pytest.importorskip("huggingface_hub.constants")
        repository = tmp_path / "models--someone--Wan-small"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("abc")
        save_checkpoint(wan.model(small), repository / "snapshots" / "abc")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.chdir(tmp_path)
        assert_same(load_checkpoint("someone/Wan-small"), wan.model(small))
        with pytest.raises(
            ValueError, match="'someone/Wan-large' does not exist here and cannot be downloaded from the hub"
        ):
            load_checkpoint("someone/Wan-large")


class TestMonarchSettings:
    TILED = MonarchAttention(tile=(3, 4, 6), num_iters=2)

    @pytest.mark.parametrize("format", ["official", "diffusers", "orbax"])
    def test_travel_with_the_weights(self, wan, small, tmp_path, format):
        for name, attention in {"one": self.TILED, "layers": (DenseAttention(), self.TILED)}.items():
            model = wan.model(small, attention=attention, causal_block=3)
            save_checkpoint(model, tmp_path / name, format=format)
            loaded = load_checkpoint(tmp_path / name)
            assert loaded.config.attention == attention
            assert loaded.config.causal_block == 3
            convert_checkpoint(tmp_path / name, tmp_path / (name + "2"), to="official")
            assert load_checkpoint(tmp_path / (name + "2")).config.attention == attention

    def test_without_config_json(self, wan, small, tmp_path):
        folder = save_checkpoint(wan.model(small, attention=self.TILED), tmp_path / "a")
        (folder / "config.json").unlink()
        assert load_checkpoint(folder / WEIGHTS, config=dataclasses.replace(small, attention=self.TILED))
        with pytest.raises(ValueError, match="was trained with monarch"):
            load_checkpoint(folder / WEIGHTS, config=small)

    def test_mismatch(self, wan, small, tmp_path):
        save_checkpoint(wan.model(small, attention=self.TILED), tmp_path / "a")
        other = MonarchAttention(tile=(1, 4, 6))
        message = (
            r"was trained with monarch\(tile=\(3,4,6\), num_iters=2\); "
            r"requested was monarch\(tile=\(1,4,6\)\)\..*override"
        )
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "a", attention=other)
        with pytest.raises(ValueError, match=r"requested was dense"):
            load_checkpoint(tmp_path / "a", attention=DenseAttention())
        assert load_checkpoint(tmp_path / "a", attention=other, override=True).config.attention == other
        same = dataclasses.replace(self.TILED, implementation="reference")
        assert load_checkpoint(tmp_path / "a", attention=same).config.attention == same

    def test_dense_weights_take_any(self, wan, small, tmp_path):
        save_checkpoint(wan.model(small), tmp_path / "a")
        assert "monarch" not in json.loads((tmp_path / "a" / "config.json").read_text())
        assert load_checkpoint(tmp_path / "a", attention=self.TILED).config.attention == self.TILED


class TestBadInput:
    @pytest.fixture
    def folder(self, wan, small, tmp_path):
        return save_checkpoint(wan.model(small), tmp_path / "model")

    @staticmethod
    def edit(folder, change):
        """Rewrites the weights after `change` of their dictionary."""
        arrays = dict(safetensors.numpy.load_file(folder / WEIGHTS))
        change(arrays)
        safetensors.numpy.save_file(arrays, folder / WEIGHTS)

    @pytest.mark.parametrize("keep", [0, 5, 100, -1, -10_000])
    def test_truncated_safetensors(self, folder, keep, tmp_path):
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(data[:keep])
        message = f"{WEIGHTS} is (truncated: .* bytes|not a safetensors file|empty)"
        for action in (load_checkpoint, inspect_checkpoint):
            with pytest.raises(ValueError, match=message):
                action(folder)
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(folder, tmp_path / "out", to="diffusers")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]

    def test_not_safetensors(self, folder):
        (folder / WEIGHTS).write_bytes(b"<html>" * 1000)
        with pytest.raises(ValueError, match="is a web page that was saved instead of the file; download it again"):
            load_checkpoint(folder)

    def test_missing_tensor(self, folder):
        self.edit(folder, lambda arrays: arrays.pop("blocks.1.self_attn.q.weight"))
        with pytest.raises(ValueError, match=r"lacks 1 of 69 tensors of a Wan model: blocks.1.self_attn.q.weight\."):
            load_checkpoint(folder)
        info = inspect_checkpoint(folder)
        assert info.missing == ("blocks.1.self_attn.q.weight",)
        assert not info.complete
        assert "missing     blocks.1.self_attn.q.weight" in info.lines()

    def test_unexpected_tensor(self, folder):
        self.edit(folder, lambda arrays: arrays.update({"vace.x": np.zeros(2, np.float32)}))
        with pytest.raises(ValueError, match=r"has 1 tensors that a Wan model does not have: vace.x"):
            load_checkpoint(folder)

    def test_wrong_shape(self, folder):
        self.edit(folder, lambda arrays: arrays.update({"head.head.bias": np.zeros(25, np.float32)}))
        with pytest.raises(ValueError, match=r"head.head.bias has shape \(25,\), not \(24,\)"):
            load_checkpoint(folder)

    def test_damaged_orbax(self, wan, small, tmp_path):
        folder = save_checkpoint(wan.model(small), tmp_path / "a", format="orbax")
        for file in (folder / "params").rglob("d/*"):
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"params is damaged: [\w.]+ cannot be read: "):
            load_checkpoint(folder)
        (folder / "params" / "_METADATA").unlink()
        with pytest.raises(ValueError, match="params is not a folder that Orbax wrote"):
            load_checkpoint(folder)

    def test_orbax_of_other_sizes(self, wan, small, tmp_path):
        folder = save_checkpoint(wan.model(small), tmp_path / "a", format="orbax")
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"ffn_dim": 96}))
        with pytest.raises(ValueError, match=r"blocks.ffn.fc1.bias has shape \(2, 80\), not \(2, 96\)"):
            load_checkpoint(folder)

    def test_lora(self, tmp_path):
        names = [f"blocks.0.self_attn.q.lora_{x}.weight" for x in "AB"]
        safetensors.numpy.save_file({name: np.zeros((2, 2), np.float32) for name in names}, tmp_path / "l.safetensors")
        with pytest.raises(ValueError, match=r"l.safetensors is a LoRA .* not a model: .*lora_A"):
            load_checkpoint(tmp_path / "l.safetensors")

    def test_i2v_as_t2v(self, wan, small, tmp_path):
        i2v = dataclasses.replace(small, model_type="i2v", in_channels=36, image_dim=24)
        save_checkpoint(wan.model(i2v), tmp_path / "a", format="diffusers")
        message = r"is i2v \(36 input channels, an image embedding\); config says model_type='t2v', t2v \(5 input"
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "a", config=small)

    def test_other_sizes(self, folder, small):
        with pytest.raises(ValueError, match=r"another model than config describes: num_layers=2 \(config: 3\)"):
            load_checkpoint(folder, config=dataclasses.replace(small, num_layers=3))

    def test_other_model(self, folder, tmp_path):
        (folder / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
        with pytest.raises(ValueError, match="describes a 'FluxTransformer2DModel', not a Wan transformer"):
            load_checkpoint(folder)
        safetensors.numpy.save_file({"x.weight": np.zeros(2, np.float32)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match=r"is not a Wan transformer: it holds x.weight"):
            load_checkpoint(tmp_path / "x.safetensors")

    def test_config_with_something_else_on(self, folder):
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | {"window_size": [8, 8]}))
        with pytest.raises(ValueError, match=r"window_size=\[8, 8\] is not supported"):
            load_checkpoint(folder)

    def test_folders(self, folder, tmp_path):
        with pytest.raises(ValueError, match=r"path='.*nothing' does not exist; give a checkpoint's file or folder"):
            load_checkpoint(tmp_path / "nothing")
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match=r"path='.*pipe' is a pipe or a device; save it as a file first"):
            load_checkpoint(tmp_path / "pipe")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"should hold one safetensors file.*found nothing of the kind"):
            load_checkpoint(tmp_path / "empty")
        (tmp_path / "empty" / ".metadata").write_text("")
        with pytest.raises(ValueError, match="torch distributed checkpoint; make one file of it first: python -m"):
            load_checkpoint(tmp_path / "empty")
        with pytest.raises(ValueError, match="exists and is not an empty folder"):
            convert_checkpoint(folder, folder, to="diffusers")
        with pytest.raises(ValueError, match=r"format='gguf' cannot be written; choices: 'official'"):
            convert_checkpoint(folder, tmp_path / "b", to="gguf")

    def test_missing_shard(self, wan, small, tmp_path):
        folder = save_checkpoint(wan.model(small), tmp_path / "a", max_shard_bytes=100_000)
        victim = sorted(folder.glob("*.safetensors"))[1]
        victim.unlink()
        with pytest.raises(ValueError, match=rf"lacks the shard {victim.name}"):
            load_checkpoint(folder)

    def test_failed_write_leaves_nothing(self, wan, small, tmp_path, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(ModelFile, "read", full)
        with pytest.raises(DiskFullError, match=rf"cannot write {tmp_path}/a: the disk is full; free some space and"):
            save_checkpoint(wan.model(small), tmp_path / "a")
        assert list(tmp_path.iterdir()) == []


def run_python(code, *arguments, **env):
    """A fresh interpreter at the root of the repository; returns what it prints."""
    root = Path(__file__).parents[2]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), **env}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_sharding(wan, small, tmp_path):
    """Parameters go straight to the devices asked for, split on the axis asked for."""
    save_checkpoint(wan.model(small), tmp_path / "a")
    code = f"""
        import jax
        from flax import nnx
        from jax.sharding import NamedSharding, PartitionSpec as P
        from monarchrt.models.wan.checkpoints import load_checkpoint

        mesh = jax.make_mesh((2,), ("x",))
        def place(path, shape):
            return NamedSharding(mesh, P(*([None] * (len(shape) - 1)), "x") if shape[-1] % 2 == 0 else P())
        model = load_checkpoint({str(tmp_path / "a")!r}, sharding=place)
        plain = load_checkpoint({str(tmp_path / "a")!r})
        for (path, leaf), (_, other) in zip(
            nnx.to_flat_state(nnx.state(model)), nnx.to_flat_state(nnx.state(plain)), strict=True
        ):
            assert leaf[...].sharding == place(path, leaf.shape), path
            assert (jax.device_get(leaf[...]) == jax.device_get(other[...])).all(), path
        try:
            load_checkpoint({str(tmp_path / "a")!r}, sharding=lambda path, shape: NamedSharding(
                mesh, P("x") if path[0] == "blocks" else P()
            ))
        except ValueError as error:
            assert "splits the layers (axis 0)" in str(error)
        print(len(jax.devices()), "ok")
    """
    assert run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=2") == "2 ok\n"


def test_safetensors_reader_reads_the_library(tmp_path):
    arrays = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.zeros((0, 3), np.float64), "c": np.float32(2)}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", metadata={"k": "v"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert file.metadata == {"k": "v"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)
        assert file.infos[name].dtype == array.dtype
    assert jnp.asarray(file.read("a")).dtype == jnp.float16
    assert jax.tree.leaves(file.read("c")) == [2.0]
