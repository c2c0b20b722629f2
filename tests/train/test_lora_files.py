"""Files of LoRAs on the command line: generate with them, merge them, look into them, write them again."""

import numpy as np
import pytest
import safetensors.numpy

from monarchrt.models.checkpoints.tensor_files import SafetensorsFile
from monarchrt.models.generate.config import GenerateConfig
from monarchrt.models.generate.load import load_material
from monarchrt.models.media.writer import read_settings
from monarchrt.train.cli import main

QUICK = ["--mode", "windows", "--frames", "5", "--steps", "2", "--zoom", "1", "--quiet", "--condition", "none"]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def command(*words):
    return main([str(word) for word in words])


def pairs(width, ffn, seed=0):
    """A LoRA for a network of one block, in Wan's own names, with alpha half the rank."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, (n_in, n_out) in {"self_attn.q": (width, width), "ffn.0": (width, ffn), "ffn.2": (ffn, width)}.items():
        tensors[f"diffusion_model.blocks.0.{name}.lora_down.weight"] = rng.standard_normal((2, n_in)) / n_in**0.5
        tensors[f"diffusion_model.blocks.0.{name}.lora_up.weight"] = rng.standard_normal((n_out, 2))
        tensors[f"diffusion_model.blocks.0.{name}.alpha"] = np.ones(())
    return {name: np.asarray(array, np.float32) for name, array in tensors.items()}


@pytest.fixture
def style(tmp_path):
    """For the run of the other tests."""
    file = tmp_path / "style.safetensors"
    safetensors.numpy.save_file(pairs(24, 48), file)
    return file


class TestGenerate:
    def test_network(self, baseline, style):
        """Merged in the order given, into the network of a run."""
        kernels = [
            np.asarray(load_material(GenerateConfig(checkpoint=str(baseline), lora=lora, condition="none"))
                       .pipeline.model.blocks.ffn.fc2.kernel[0])
            for lora in ((), (f"{style}:0",), ("none",), (f"{style}:0.5", str(style)))
        ]  # fmt: skip
        tensors = pairs(24, 48)
        up, down = (tensors[f"diffusion_model.blocks.0.ffn.2.lora_{part}.weight"] for part in ("up", "down"))
        np.testing.assert_array_equal(kernels[1], kernels[0])
        np.testing.assert_array_equal(kernels[2], kernels[0])
        np.testing.assert_allclose(kernels[3], kernels[0] + 1.5 * 0.5 * (up @ down).T, atol=1e-6)

    @pytest.mark.slow
    def test_with_a_run(self, baseline, style, tmp_path, said):
        latents = {}
        for name, options in {
            "without": [],
            "none": ["--lora", f"{style}:0"],
            "with": ["--lora", f"{style}:0.5", style],
        }.items():
            out = ["--out", tmp_path / f"{name}.mp4", "--save-latents", tmp_path / name]
            assert command("generate", "--checkpoint", baseline, *QUICK, *options, *out) == 0
            latents[name] = safetensors.numpy.load_file(tmp_path / name)["latents"]
        assert f"lora {style}: rank 2, alpha 1, 3 layers, strength 0.5" in said()
        np.testing.assert_array_equal(latents["none"], latents["without"])
        assert np.abs(latents["with"] - latents["without"]).max() > 1e-3
        assert read_settings(tmp_path / "with.mp4")["lora"] == [f"{style}:0.5", str(style)]

        # once more from the video, which may not choose by itself what is read
        again = ["--from", tmp_path / "with.mp4", "--out", tmp_path / "again.mp4", "--save-latents", tmp_path / "again"]
        assert command("generate", *again, "--checkpoint", baseline) == 2
        assert f"names lora '{style}:0.5 {style}'; what a video names is read only if you say so" in said()
        assert command("generate", *again, "--checkpoint", baseline, "--lora", f"{style}:0.5", style, "--quiet") == 0
        np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "again")["latents"], latents["with"])
        again[-1] = tmp_path / "left out"
        again += ["--overwrite", "--checkpoint", baseline, "--lora", "none", "--quiet"]
        assert command("generate", *again) == 0
        np.testing.assert_array_equal(safetensors.numpy.load_file(again[5])["latents"], latents["without"])

    def test_what_does_not_fit(self, baseline, wan_folder, tmp_path, said):
        file = tmp_path / "large.safetensors"
        safetensors.numpy.save_file(pairs(5120, 8), file)
        for checkpoint, loaded in ((baseline, "width 24"), (wan_folder, "width 96")):
            given = ["--checkpoint", checkpoint, "--lora", file, "--prompt", "a cat", "--out", tmp_path / "a.mp4"]
            assert command("generate", *given) == 2
            error = said().splitlines()[-1]
            assert error.startswith(f"error: {file} is a LoRA for Wan 2.1 14B (width 5120, 1 blocks), but a Wan ")
            assert f"({loaded}, 1 blocks, text-to-video) is loaded: blocks.0." in error
        assert command("generate", "--checkpoint", baseline, "--lora", "nowhere:2", "--out", tmp_path / "a.mp4") == 2
        assert "error: lora 'nowhere' does not exist" in said()

    def test_is_not_overwritten(self, baseline, style, said):
        given = ["--checkpoint", baseline, *QUICK, "--lora", style, "--save-latents", style, "--overwrite"]
        assert command("generate", *given) == 2
        assert str(style) in said()


class TestConvert:
    @pytest.mark.parametrize(("to", "dtype"), [("official", "float32"), ("diffusers", "bfloat16")])
    def test_merges(self, wan_folder, tmp_path, to, dtype):
        file = tmp_path / "a.safetensors"
        tensors = pairs(96, 256)
        safetensors.numpy.save_file(tensors, file)
        given = [wan_folder, tmp_path / "merged", "--to", to, "--dtype", dtype, "--lora", f"{file}:0.8"]
        assert command("convert", *given) == 0
        names = {"official": "blocks.0.ffn.2.weight", "diffusers": "blocks.0.ffn.net.2.weight"}
        before = SafetensorsFile(wan_folder / "transformer" / WEIGHTS)
        after = SafetensorsFile(tmp_path / "merged" / WEIGHTS)
        up, down = (tensors[f"diffusion_model.blocks.0.ffn.2.lora_{part}.weight"] for part in ("up", "down"))
        wanted = before.read(names["diffusers"]) + 0.8 * 0.5 * (up @ down)
        found = after.read(names[to])
        assert found.dtype.name == dtype
        np.testing.assert_allclose(found.astype(np.float32), wanted, atol=1e-6 if dtype == "float32" else 0.02)
        same = {"official": "blocks.0.self_attn.k.weight", "diffusers": "blocks.0.attn1.to_k.weight"}
        np.testing.assert_array_equal(after.read(same[to]), before.read(same["diffusers"]).astype(found.dtype))

    def test_a_run(self, baseline, style, tmp_path):
        assert command("convert", baseline, tmp_path / "plain") == 0
        assert command("convert", baseline, tmp_path / "merged", "--lora", style) == 0
        plain, both = (SafetensorsFile(tmp_path / name / WEIGHTS) for name in ("plain", "merged"))
        change = {name for name in plain.infos if not np.array_equal(plain.read(name), both.read(name))}
        assert change == {f"blocks.0.{name}.weight" for name in ("self_attn.q", "ffn.0", "ffn.2")}

    def test_a_lora(self, style, tmp_path, said):
        for to in ("diffusers", "musubi", "official"):
            assert command("convert", style, tmp_path / f"{to}.safetensors", "--to", to, "--dtype", "float16") == 0
        names = {to: sorted(SafetensorsFile(tmp_path / f"{to}.safetensors").infos)[0] for to in ("diffusers", "musubi")}
        assert names["diffusers"].startswith("transformer.blocks.0.attn1.to_q.")
        assert names["musubi"] == "lora_unet_blocks_0_ffn_0.alpha"
        assert sorted(SafetensorsFile(tmp_path / "official.safetensors").infos) == sorted(pairs(24, 48))
        for options, message in (
            (["--to", "orbax"], "is a LoRA; choose from official, diffusers, musubi"),
            (["--lora", style], "is a LoRA itself"),
            (["--weights", "model"], "is a LoRA; leave it out"),
            (["--few-step"], "is a LoRA; leave it out"),
        ):
            assert command("convert", style, tmp_path / "x.safetensors", *options) == 2
            assert message in said()
        assert command("convert", style, style) == 2
        assert "exists; give another name" in said()

    def test_musubi_is_no_format_of_models(self, wan_folder, baseline, tmp_path, said):
        for path in (wan_folder, baseline):
            assert command("convert", path, tmp_path / "x", "--to", "musubi") == 2
            assert "a format of LoRAs" in said()


def test_inspect(style, tmp_path, capsys):
    assert command("inspect", style) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines == {
        "path": str(style),
        "format": "a LoRA, ComfyUI (Wan's own names)",
        "model": "a Wan transformer (width 24, 1 blocks)",
        "rank": "2",
        "alpha": "1 (a tensor for each layer)",
        "layers": "3: ffn 0 2, self_attn q in block 0",
        "differences": "none",
        "parameters": f"{2 * (4 * 24 + 2 * 48) + 3}",
        "dtype": "float32 (9 tensors)",
    }
    assert command("inspect", style, "--weights", "model") == 2
    assert "is a LoRA; leave it out" in capsys.readouterr().err
