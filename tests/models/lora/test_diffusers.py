"""The same LoRA in three formats, in diffusers and here."""

import copy
import json

import numpy as np
import pytest
from flax import nnx

from monarchrt.models.generate.loras import open_loras
from monarchrt.models.lora import merged, open_lora
from monarchrt.models.lora.writing import rewrite_lora

torch = pytest.importorskip("torch")
pytest.importorskip("peft")
loaders = pytest.importorskip("diffusers.loaders").WanLoraLoaderMixin

forward = nnx.jit(lambda model, *inputs: model(*inputs))


def opened(texts):
    return open_loras(texts, report=lambda line: None)


@pytest.fixture(scope="module")
def pair(wan, small):
    theirs = wan.diffusers_model(small)
    return theirs, wan.model_from_torch(small, theirs.state_dict()), wan.sample(small, grid=(2, 3, 4))


def outputs_of_theirs(model, inputs, file=None, scale=1.0):
    """With a LoRA as a user of diffusers loads it."""
    latents, timesteps, text = (torch.from_numpy(np.array(x)) for x in inputs)
    model = copy.deepcopy(model)
    if file is not None:
        tensors, metadata = loaders.lora_state_dict(str(file.parent), weight_name=file.name, return_lora_metadata=True)
        loaders.load_lora_into_transformer(tensors, transformer=model, adapter_name="a", metadata=metadata)
        model.set_adapters(["a"], [scale])
    with torch.no_grad():
        out = model(latents.permute(0, 4, 1, 2, 3), timesteps, text).sample
    return out.permute(0, 2, 3, 4, 1).numpy()


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "comfyui-AB", "musubi"])
def test_outputs(pair, small, loras, tmp_path, format):
    theirs, ours, inputs = pair
    file = loras.save(tmp_path / f"{format}.safetensors", *loras.FORMATS[format](loras.factors(small)))
    wanted = outputs_of_theirs(theirs, inputs, file, 0.7)
    found = np.asarray(forward(merged(ours, opened([f"{file}:0.7"])), *inputs))
    without = outputs_of_theirs(theirs, inputs)
    assert np.abs(wanted - without).max() > 0.1 * without.std()  # it does something
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1, wanted.std()))


@pytest.mark.parametrize(
    "patterns",
    [{r"blocks\.\d\.attn1\.to_[qk]": 5, "to_q": 9}, {"^attn1.to_q": 5, "^blocks.1.attn1.to_q": 9},
     {"attn1.to_q|ffn.net.2": 0.5, ".*to_out.0": 7, "o_v": 9}, {r"(?!.*attn1).*": 5}],
)  # fmt: skip
def test_patterns_of_names(pair, small, loras, tmp_path, patterns):
    theirs, ours, inputs = pair
    tensors, metadata = loras.as_diffusers(loras.factors(small))
    header = json.loads(metadata["lora_adapter_metadata"])
    found = {}
    for name, more in (("plain", {}), ("of-patterns", {"transformer.alpha_pattern": patterns})):
        said = {"lora_adapter_metadata": json.dumps(header | more)}
        file = loras.save(tmp_path / f"{name}.safetensors", tensors, metadata | said)
        wanted = outputs_of_theirs(theirs, inputs, file)
        found[name] = np.asarray(forward(merged(ours, opened([str(file)])), *inputs))
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-5 * max(1, wanted.std()))
    assert np.abs(found["plain"] - found["of-patterns"]).max() > 0.05 * found["plain"].std()


@pytest.mark.parametrize("format", ["diffusers", "comfyui", "musubi"])
def test_ours_are_read_by_diffusers(pair, small, loras, tmp_path, format):
    theirs, _, inputs = pair
    file = loras.save(tmp_path / "a.safetensors", *loras.as_musubi(loras.factors(small)))
    wanted = outputs_of_theirs(theirs, inputs, file)
    ours = rewrite_lora(open_lora(file), tmp_path / "b.safetensors", format=format)
    np.testing.assert_allclose(outputs_of_theirs(theirs, inputs, ours), wanted, rtol=0, atol=1e-5)


def test_layers_outside_of_blocks_and_differences(pair, small, loras, tmp_path):
    """As few-step LoRAs have them; diffusers takes them without alpha."""
    theirs, ours, inputs = pair
    rng = np.random.default_rng(5)
    tensors, _ = loras.as_comfyui(loras.factors(small, outer=True), alpha=None)
    for name in ("blocks.0.self_attn.q", "blocks.1.ffn.2", "head.head", "time_projection.1"):
        n_out = len(tensors[f"diffusion_model.{name}.lora_up.weight"])
        tensors[f"diffusion_model.{name}.diff_b"] = rng.standard_normal(n_out).astype(np.float32)
    file = loras.save(tmp_path / "a.safetensors", tensors)
    wanted = outputs_of_theirs(theirs, inputs, file)
    found = np.asarray(forward(merged(ours, opened([str(file)])), *inputs))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * max(1, wanted.std()))
