"""Files that are not quite a Wan 2.1 checkpoint: other names for the same tensors are read, other models are named."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from monarchrt.models.checkpoints.names import strip_prefixes
from monarchrt.models.checkpoints.reading import weights_file
from monarchrt.models.errors import UserError
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.checkpoints import convert_checkpoint, inspect_checkpoint, load_checkpoint, save_checkpoint
from monarchrt.models.wan.checkpoints.source import ANCHORS
from monarchrt.train.model import check_pretrained
from tests.parameters import assert_same

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = wan_config("tiny", dim=128, num_heads=1, num_layers=2, text_len=512)
SUPPORTED = "supported are Wan 2.1 text-to-video and image-to-video"


@pytest.fixture(scope="module")
def model():
    return WanModel(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    return {name: save_checkpoint(model, folder / name, format=name) for name in ("official", "diffusers")}


@pytest.fixture(scope="module")
def official(saved):
    return safetensors.numpy.load_file(saved["official"] / WEIGHTS)


def write(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {name: np.zeros(a, np.float32) if isinstance(a, tuple) else np.asarray(a) for name, a in tensors.items()}
    safetensors.numpy.save_file({name: np.ascontiguousarray(a) for name, a in arrays.items()}, path)
    return path


PREFIXES = (
    *("model.", "model.diffusion_model.", "diffusion_model.", "module.", "_orig_mod.", "module.model._orig_mod."),
    *("module.module.", "_fsdp_wrapped_module.model._fsdp_wrapped_module.", "ema.", "generator.model."),
    *("generator_ema.", "pipe.dit.", "whatever.it.is."),
)
QUICK = {
    ("model.diffusion_model.", "official"),
    ("_fsdp_wrapped_module.model._fsdp_wrapped_module.", "diffusers"),
    ("whatever.it.is.", "official"),
}


@pytest.mark.parametrize("naming", ["official", "diffusers"])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_under_a_prefix(saved, tmp_path, prefix, naming):
    """Every tensor is found under its own name; nothing is read."""
    tensors = safetensors.numpy.load_file(saved[naming] / WEIGHTS)
    path = write(tmp_path / "x.safetensors", {prefix + name: array[:0] for name, array in tensors.items()})
    with safetensors.safe_open(path, "numpy") as file:
        found = strip_prefixes(file.keys(), anchors=ANCHORS, where=path)
    assert found == {name: prefix + name for name in tensors}


@pytest.mark.parametrize(
    ("prefix", "naming"),
    [
        pytest.param(prefix, naming, marks=[] if (prefix, naming) in QUICK else pytest.mark.slow)
        for prefix in PREFIXES
        for naming in ("official", "diffusers")
    ],
)
def test_prefixes(saved, model, tmp_path, prefix, naming):
    tensors = safetensors.numpy.load_file(saved[naming] / WEIGHTS)
    path = write(tmp_path / "x.safetensors", {prefix + name: array for name, array in tensors.items()})
    assert_same(load_checkpoint(path), model)


def test_wrappers_inside_names(official, model, tmp_path):
    def wrapped(name):
        for part in ("blocks.0.", "blocks.1.", "self_attn.", "ffn."):
            name = name.replace(part, f"{part}_checkpoint_wrapped_module._orig_mod._fsdp_wrapped_module.")
        return f"model._fsdp_wrapped_module.{name}"

    path = write(tmp_path / "x.safetensors", {wrapped(name): array for name, array in official.items()})
    assert_same(load_checkpoint(path), model)


def test_a_whole_pipeline_in_one_file(official, model, tmp_path):
    """ComfyUI's checkpoints: the other parts are left alone."""
    tensors = {f"model.diffusion_model.{name}": array for name, array in official.items()}
    tensors |= {"text_encoders.umt5xxl.transformer.shared.weight": (4, 4), "vae.conv1.weight": (2, 2, 1, 1, 1)}
    path = write(tmp_path / "x.safetensors", tensors)
    assert_same(load_checkpoint(path), model)
    assert inspect_checkpoint(path).complete


def test_the_average_of_two_models(official, model, tmp_path):
    tensors = {f"generator.{name}": array * 2 for name, array in official.items()}
    path = write(tmp_path / "x.safetensors", tensors | {f"generator_ema.{n}": array for n, array in official.items()})
    assert_same(load_checkpoint(path), model)
    tensors = {f"{prefix}.{name}": array for name, array in official.items() for prefix in ("a", "b")}
    with pytest.raises(ValueError, match=r"x.safetensors holds several models, under the prefixes 'a.', 'b.'"):
        load_checkpoint(write(tmp_path / "x.safetensors", tensors))


def test_a_prefix_that_some_tensors_have(official, model, tmp_path):
    tensors = {("model." if "patch" in name or "head" in name else "") + name: a for name, a in official.items()}
    assert_same(load_checkpoint(write(tmp_path / "x.safetensors", tensors)), model)


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".bin", ".pth"])
def test_training_checkpoints(official, model, tmp_path, suffix):
    """The states of optimizers beside a model are not taken for it, however many there are."""
    torch = pytest.importorskip("torch")
    state = {f"module.{name}": torch.from_numpy(array) for name, array in official.items()}
    moments = {
        name: {"exp_avg": tensor, "exp_avg_sq": tensor, "step": torch.ones(())} for name, tensor in state.items()
    }
    content = {"optimizer": {"state": moments, "param_groups": [{"lr": 1e-5, "params": [0, 1]}]}, "step": 7}
    torch.save(content | {"state_dict": state, "ema_decay": 0.99, "dtype": torch.bfloat16}, tmp_path / f"a{suffix}")
    assert_same(load_checkpoint(tmp_path / f"a{suffix}"), model)
    torch.save({"step": torch.ones(()), "state": {"model": state}}, tmp_path / f"b{suffix}")
    assert_same(load_checkpoint(tmp_path / f"b{suffix}"), model)


class TestFloat8:
    """Weights in float8: read exactly, with their scales where there are any."""

    @staticmethod
    def quantized(official, dtype, scale):
        tensors, exact = {}, {}
        for name, array in official.items():
            if not name.endswith("weight") or array.ndim != 2:
                tensors[name] = exact[name] = array
                continue
            tensors[name] = (array / scale(array)).astype(dtype)
            exact[name] = tensors[name].astype(np.float32) * scale(array)
        return tensors, exact

    @staticmethod
    def write(path, tensors):
        torch = pytest.importorskip("torch")
        import safetensors.torch

        kinds = {ml_dtypes.float8_e4m3fn: torch.float8_e4m3fn, ml_dtypes.float8_e5m2: torch.float8_e5m2}
        converted = {}
        for name, array in tensors.items():
            kind = kinds.get(array.dtype.type)
            data = torch.from_numpy(np.array(array.view(np.uint8) if kind else array))
            converted[name] = data.view(kind) if kind else data
        if path.suffix == ".pt":
            torch.save(converted, path)
        else:
            safetensors.torch.save_file(converted, path)
        return path

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    @pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
    def test_without_scales(self, official, tmp_path, dtype, suffix):
        tensors, exact = self.quantized(official, dtype, lambda array: np.float32(1))
        path = self.write(tmp_path / f"x{suffix}", tensors)
        found = load_checkpoint(path)
        got = np.asarray(found.blocks.ffn.fc1.kernel[...])[1]
        np.testing.assert_array_equal(got, exact["blocks.1.ffn.0.weight"].T)
        assert any("float8" in line and "without scales" in line for line in inspect_checkpoint(path).lines())

    @pytest.mark.parametrize("kind", ["number", "rows", "column", "blocks"])
    @pytest.mark.parametrize("leaf", ["scale_weight", "weight_scale"])
    def test_with_scales(self, official, tmp_path, kind, leaf):
        shape = {"number": (), "rows": (-1,), "column": (-1, 1), "blocks": (-1, 2, 1)}[kind]

        def factors(array):
            """What each number of a matrix is multiplied by."""
            rows = np.ones_like(array) if kind == "number" else np.ones_like(array) + np.arange(len(array))[:, None] / 7
            if kind == "blocks":
                rows[:, array.shape[1] // 2 :] *= 2
            return rows.astype(np.float32)

        def scale(array):
            """The same as it is stored."""
            found = factors(array)
            if kind == "blocks":
                return found[:, :: array.shape[1] // 2].reshape(shape)
            return found[0, 0] if kind == "number" else found[:, 0].reshape(shape)

        tensors, exact = self.quantized(official, ml_dtypes.float8_e4m3fn, factors)
        extra = {"scaled_fp8": np.zeros(2, ml_dtypes.float8_e4m3fn)}
        for name, array in official.items():
            if tensors[name].dtype == ml_dtypes.float8_e4m3fn:
                extra[f"{name.removesuffix('weight')}{leaf}"] = np.asarray(scale(array), np.float32)
        path = self.write(tmp_path / "x.safetensors", {f"diffusion_model.{n}": a for n, a in (tensors | extra).items()})
        got = np.asarray(load_checkpoint(path).blocks.ffn.fc1.kernel[...])[1]
        np.testing.assert_array_equal(got, exact["blocks.1.ffn.0.weight"].T)
        info = inspect_checkpoint(path)
        assert info.complete
        assert any("float8" in line and "with scales" in line for line in info.lines())

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("blocks.0.ffn.0.scale_weight", np.ones(3, np.float32), r"has shape \(3,\) for a weight of"),
            ("blocks.0.nothing.scale_weight", np.ones((), np.float32), "is not a float8 tensor in the file"),
            ("blocks.0.norm3.scale_weight", np.ones((), np.float32), "is not a float8 tensor in the file"),
            ("blocks.0.ffn.0.weight_scale", np.ones((), np.int32), "is a scale with dtype int32"),
            ("blocks.0.ffn.0.weight_scale", np.full((), np.nan, np.float32), "is not positive and finite"),
            ("blocks.0.ffn.0.weight_scale", np.zeros((), np.float32), "is not positive and finite"),
        ],
    )
    def test_scales_that_are_none(self, official, tmp_path, name, value, message):
        tensors, _ = self.quantized(official, ml_dtypes.float8_e4m3fn, lambda array: np.float32(1))
        with pytest.raises(ValueError, match=message):
            load_checkpoint(self.write(tmp_path / "x.safetensors", tensors | {name: value}))


FLOATS = (np.float32, np.float16, ml_dtypes.bfloat16, np.float64)
FEW = {(np.float32, "nan"), (ml_dtypes.bfloat16, "inf"), (np.float16, "-inf")}


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        pytest.param(dtype, float(value), marks=[] if (dtype, value) in FEW else pytest.mark.slow)
        for dtype in FLOATS
        for value in ("nan", "inf", "-inf")
    ],
)
def test_numbers_that_are_none(official, tmp_path, dtype, value):
    tensors = {name: array.astype(dtype) for name, array in official.items()}
    tensors["blocks.1.ffn.2.weight"][5, 7] = value
    path = write(tmp_path / "x.safetensors", tensors)
    for action in (load_checkpoint, lambda path: convert_checkpoint(path, tmp_path / "out", to="diffusers")):
        with pytest.raises(ValueError, match=r"x.safetensors: blocks.1.ffn.2.weight has 1 numbers of \d+ that are NaN"):
            action(path)
    assert not (tmp_path / "out").exists()


def test_large_and_small_numbers_are_finite(official, tmp_path):
    tensors = dict(official)
    tensors["head.head.bias"] = np.resize(
        np.array([3.4e38, -3.4e38, 1e-45, 0.0], np.float32), tensors["head.head.bias"].shape
    )
    load_checkpoint(write(tmp_path / "x.safetensors", tensors))


LORAS = {
    "peft": {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": (4, 8),
        "transformer.blocks.0.attn1.to_q.lora_B.weight": (8, 4),
    },
    "comfy": {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": (4, 8),
        "diffusion_model.blocks.0.self_attn.q.alpha": (),
    },
    "kohya": {"lora_unet_blocks_0_self_attn_q.lora_up.weight": (8, 4), "lora_unet_blocks_0_self_attn_q.alpha": ()},
    "adapter": {"base_model.model.blocks.0.self_attn.q.lora_A.default.weight": (4, 8)},
    "lokr": {"diffusion_model.blocks.0.self_attn.q.lokr_w1": (4, 4)},
    "patch": {"diffusion_model.blocks.0.self_attn.q.diff": (8, 8), "diffusion_model.blocks.0.self_attn.q.diff_b": (8,)},
}


@pytest.mark.parametrize("name", LORAS)
def test_loras(tmp_path, name):
    with pytest.raises(ValueError, match=f"is a LoRA or a patch for a model, not a model.*{SUPPORTED}"):
        inspect_checkpoint(write(tmp_path / "x.safetensors", LORAS[name]))


# names of tensors that each of these has beside Wan's own, and what it is to be called
RELATIVES = {
    "VACE": {"vace_patch_embedding.weight": (8, 96, 1, 2, 2), "vace_blocks.0.before_proj.weight": (8, 8)},
    "S2V": {"casual_audio_encoder.weights": (1, 25, 1, 1), "cond_encoder.weight": (8, 16, 1, 2, 2)},
    "Animate": {"face_adapter.fuser_blocks.0.k_norm.weight": (8,), "pose_patch_embedding.weight": (8, 16, 1, 2, 2)},
    "Fun Camera": {"control_adapter.conv.weight": (8, 8, 2, 2)},
    "Fun Control": {"ref_conv.weight": (8, 16, 2, 2)},
    "HuMo": {"audio_proj.audio_proj_glob_1.layer.bias": (8,)},
    "MultiTalk": {"blocks.0.audio_cross_attn.q_linear.weight": (8, 8), "audio_proj.proj1.weight": (8, 8)},
    "ReCamMaster": {"blocks.0.cam_encoder.weight": (8, 12), "blocks.0.projector.weight": (8, 8)},
    "SkyReels V2": {"fps_embedding.weight": (2, 8), "fps_projection.0.weight": (8, 8)},
    "FLF2V": {"img_emb.emb_pos": (1, 514, 1280)},
    "bitsandbytes": {"blocks.0.ffn.0.weight.absmax": (8,), "blocks.0.ffn.0.weight.quant_map": (16,)},
    "nunchaku": {"blocks.0.ffn.0.qweight": (8, 8), "blocks.0.ffn.0.wscales": (8,)},
    "GPTQ or AWQ": {"blocks.0.ffn.0.qweight": (8, 8), "blocks.0.ffn.0.qzeros": (8,)},
    "nvfp4": {"blocks.0.ffn.0.weight_scale_2": ()},
    "VSA": {"blocks.0.self_attn.to_gate_compress.weight": (8, 8)},
}


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives(official, tmp_path, name):
    path = write(tmp_path / "x.safetensors", {f"model.{n}": a for n, a in (official | RELATIVES[name]).items()})
    with pytest.raises(ValueError, match=rf"x.safetensors is .*{name}.*: it holds .*; {SUPPORTED}"):
        inspect_checkpoint(path)


OTHERS = {
    "a Wan VAE": {"encoder.downsamples.0.residual.0.gamma": (8, 1, 1, 1), "decoder.conv1.weight": (8, 8, 3, 3, 3)},
    "an autoencoder": {"decoder.up_blocks.0.resnets.0.conv1.weight": (8, 8), "encoder.conv_in.bias": (8,)},
    "a umT5 text encoder": {"token_embedding.weight": (8, 8), "blocks.0.pos_embedding.embedding.weight": (32, 8)},
    "a T5 text encoder": {"shared.weight": (8, 8), "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)},
    "a CLIP encoder": {"visual.transformer.0.attn.to_qkv.weight": (8, 8), "textual.norm.weight": (8,)},
    "HunyuanVideo": {"double_blocks.0.img_attn_qkv.weight": (8, 8), "txt_in.individual_token_refiner.x": (8,)},
    "LTX-Video": {"transformer_blocks.0.attn1.to_q.weight": (8, 8), "patchify_proj.weight": (8, 8)},
    "CogVideoX": {"transformer_blocks.0.attn1.to_q.weight": (8, 8), "transformer_blocks.0.norm1.linear.weight": (8, 8)},
    "Flux": {"double_blocks.0.img_attn.qkv.weight": (8, 8), "single_blocks.0.linear1.weight": (8, 8)},
    "U-Net": {"model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3)},
    "a language model": {"model.layers.0.self_attn.q_proj.weight": (8, 8), "model.embed_tokens.weight": (8, 8)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models(tmp_path, name):
    path = write(tmp_path / "x.safetensors", OTHERS[name])
    with pytest.raises(ValueError, match=rf"x.safetensors is not a Wan transformer but .*{name}.*; {SUPPORTED}"):
        inspect_checkpoint(path)


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        pytest.param(
            {"in_channels": 48, "out_channels": 48, "dim": 3072, "num_heads": 24, "ffn_dim": 8},
            "Wan 2.2 TI2V-5B",
            marks=pytest.mark.slow,
        ),
        ({"in_channels": 36, "out_channels": 16}, "one of the two networks of Wan 2.2 I2V-A14B"),
        ({"in_channels": 48, "out_channels": 16, "model_type": "i2v"}, "Fun Control"),
        ({"in_channels": 52, "out_channels": 16}, "control input"),
    ],
)
@pytest.mark.parametrize("format", ["official", pytest.param("diffusers", marks=pytest.mark.slow)])
def test_models_with_other_channels(tmp_path, sizes, name, format):
    config = wan_config("tiny", **({"dim": 128, "num_heads": 1, "num_layers": 1} | sizes))
    folder = save_checkpoint(WanModel(config, rngs=nnx.Rngs(0)), tmp_path / "a", format=format)
    with pytest.raises(ValueError, match=f"{name}.*{SUPPORTED}"):
        inspect_checkpoint(folder)


class TestFolders:
    """Wan 2.2 A14B is two networks, and other pipelines are others."""

    @pytest.fixture
    def pipeline(self, saved, tmp_path):
        folder = tmp_path / "pipeline"
        shutil.copytree(saved["diffusers"], folder / "transformer")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", "boundary_ratio": None}))
        return folder

    def index(self, folder, **entries):
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"} | entries))

    @pytest.mark.parametrize("part", ["", "transformer", "transformer_2"])
    def test_two_networks(self, pipeline, tmp_path, part):
        assert inspect_checkpoint(pipeline).complete
        shutil.copytree(pipeline / "transformer", pipeline / "transformer_2")
        message = f"Wan 2.2 A14B.*transformer_2.*{SUPPORTED}"
        for index in ({}, {"boundary_ratio": 0.875}):
            self.index(pipeline, **index)
            path = pipeline / part
            for action in (inspect_checkpoint, load_checkpoint):
                with pytest.raises(ValueError, match=message):
                    action(path)
            with pytest.raises(ValueError, match=message):
                convert_checkpoint(path, tmp_path / "out", to="official")
            with pytest.raises(UserError, match=message):
                check_pretrained(path, CONFIG)

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ({"boundary_ratio": 0.9}, "Wan 2.2 A14B"),
            ({"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "Wan 2.2 A14B"),
            ({"expand_timesteps": True}, "Wan 2.2 TI2V-5B"),
            ({"_class_name": "WanVACEPipeline"}, "a pipeline of 'WanVACEPipeline', not of Wan 2.1"),
            ({"_class_name": "HunyuanVideoPipeline"}, "a pipeline of 'HunyuanVideoPipeline'"),
        ],
    )
    def test_pipelines(self, pipeline, entries, message):
        self.index(pipeline, **entries)
        with pytest.raises(ValueError, match=f"{message}.*{SUPPORTED}"):
            inspect_checkpoint(pipeline)

    @pytest.mark.parametrize("part", ["", "high_noise_model", "low_noise_model"])
    def test_official_experts(self, saved, tmp_path, part):
        for name in ("high_noise_model", "low_noise_model"):
            shutil.copytree(saved["official"], tmp_path / "w" / name)
        with pytest.raises(ValueError, match=f"Wan 2.2 A14B.*{SUPPORTED}"):
            inspect_checkpoint(tmp_path / "w" / part)

    @pytest.mark.parametrize(
        "name", ["wan2.2_t2v_high_noise_14B_fp16.safetensors", "Wan2_2-T2V-A14B-LowNoise.safetensors"]
    )
    def test_single_experts(self, official, tmp_path, name):
        with pytest.raises(ValueError, match=f"one of the two networks of Wan 2.2 A14B.*{SUPPORTED}"):
            inspect_checkpoint(write(tmp_path / name, official))

    def test_settings_without_a_class(self, saved, model, tmp_path):
        for name, folder in saved.items():
            shutil.copytree(folder, tmp_path / name)
            data = json.loads((folder / "config.json").read_text())
            del data["_class_name"]
            for text in (data, {}, {"_diffusers_version": "0.30.0"}):
                (tmp_path / name / "config.json").write_text(json.dumps(text))
                assert_same(load_checkpoint(tmp_path / name), model)

    @pytest.mark.parametrize(
        "change", [{"num_layers": 10**9}, {"dim": 10**12}, {"text_len": 2**40}, {"num_layers": 10**30}]
    )
    def test_sizes_that_no_model_has(self, saved, tmp_path, change):
        shutil.copytree(saved["official"], tmp_path / "a")
        data = json.loads((saved["official"] / "config.json").read_text()) | change
        (tmp_path / "a" / "config.json").write_text(json.dumps(data))
        with pytest.raises(ValueError, match=r"config\.json"):
            inspect_checkpoint(tmp_path / "a")

    def test_what_macos_leaves(self, saved, model, tmp_path):
        shutil.copytree(saved["official"], tmp_path / "a")
        junk = b"\0\5\26\7\0\2\0\0Mac OS X        " + bytes(4072)
        for name in (WEIGHTS, "config.json", f"{WEIGHTS}.index.json", "model.pt"):
            (tmp_path / "a" / f"._{name}").write_bytes(junk)
        assert weights_file(tmp_path / "a", preferred=()) == tmp_path / "a" / WEIGHTS
        assert_same(load_checkpoint(tmp_path / "a"), model)
        with pytest.raises(ValueError, match="what macOS leaves beside a file"):
            inspect_checkpoint(tmp_path / "a" / f"._{WEIGHTS}")

    def test_shards(self, model, tmp_path):
        folder = save_checkpoint(model, tmp_path / "a", max_shard_bytes=400_000)
        one = sorted(folder.glob("*.safetensors"))[1]
        index = f"{WEIGHTS}.index.json"
        with pytest.raises(ValueError, match=f"is one of several files of one model; give its folder, or .*{index}"):
            inspect_checkpoint(one)
        (folder / index).unlink()
        with pytest.raises(ValueError, match=f"lacks {index}, the index of its"):
            inspect_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [
        ("wan2.1-t2v-14b-Q4_K_M.gguf", b"GGUF\3\0\0\0", "a GGUF file"),
        ("wan.onnx", b"\x08\x0a\x12\x07pytorch", "an ONNX model"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS.*git lfs pull"),
        ("a.safetensors", b"<!DOCTYPE html>", "a web page"),
        ("a.safetensors", bytes(4096), "begins with zeros; download it again"),
        ("a.safetensors", b"", "is empty"),
        ("a.pt", b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        ("a.pt", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "pickle exhausted before seeing STOP"),
        ("a.npz", b"PK\3\4" + bytes(40), "is not a zip archive"),
        ("a.mp4", b"\0\0\0\x20ftypisom", "a video"),
    ],
)
def test_files_of_other_kinds(tmp_path, name, start, message):
    (tmp_path / name).write_bytes(start)
    with pytest.raises(ValueError, match=rf"{name} is .*{message}|{message}"):
        inspect_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["wan2.1-t2v-14b-Q4_K_M.gguf", "model.onnx", "diffusion_pytorch_model.safetensors.part"]
)
def test_folders_of_other_kinds(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=f"holds {name}; {SUPPORTED}"):
        inspect_checkpoint(tmp_path)


def test_files_are_told_by_what_is_in_them(official, model, tmp_path):
    torch = pytest.importorskip("torch")
    assert_same(load_checkpoint(write(tmp_path / "a.bin", official)), model)
    torch.save({name: torch.from_numpy(array) for name, array in official.items()}, tmp_path / "a.safetensors")
    assert_same(load_checkpoint(tmp_path / "a.safetensors"), model)
