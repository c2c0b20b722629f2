"""Files that are made to be wrong: each ends in a ValueError that says what is wrong, and none in a crash or a hang."""

import dataclasses
import json
import pickle
import struct
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from monarchrt.models.checkpoints.tensor_files import SafetensorsFile, ShardedSafetensors, write_arrays
from monarchrt.models.checkpoints.torch_pickle import TorchFile
from monarchrt.models.umt5 import load_embeddings
from monarchrt.models.umt5.text import FORMAT
from monarchrt.models.wan.checkpoints import inspect_checkpoint, load_checkpoint, save_checkpoint

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(wan, small, tmp_path):
    return save_checkpoint(wan.model(small), tmp_path / "model")


@pytest.mark.parametrize("header", [b"[" * 100_000, b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,0]}}'])
def test_header(tmp_path, header):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="its header cannot be read"):
        SafetensorsFile(path)


@pytest.mark.parametrize("shard", [5, [1], None])
def test_index(tmp_path, shard):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="is not an index"):
        ShardedSafetensors(path)


def test_dictionary_that_holds_itself(tmp_path):
    content = {}
    content["model"] = content
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="holds no dictionary of tensors"):
        TorchFile(tmp_path / "a.pt")


@pytest.mark.parametrize("change", [{"eps": "x"}, {"eps": None}, {"patch_size": 2}, {"patch_size": None}])
def test_config_json(folder, change):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"config\.json: "):
        inspect_checkpoint(folder)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "is not an object of settings")])
def test_config_json_of_orbax(wan, small, tmp_path, text, message):
    folder = save_checkpoint(wan.model(small), tmp_path / "model", format="orbax")
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json {message}"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("_orig_mod.head.head.bias", (24,), "two tensors are head.head.bias"),
        ("patch_embedding.weight", (48, 20), "not five axes"),
        ("blocks.999999999.x", (1,), "lacks 27 of"),
        ("blocks.foo.x", (1,), "lacks 27 of"),
    ],
)
def test_tensors_without_config_json(folder, small, name, shape, message):
    arrays = safetensors.numpy.load_file(folder / WEIGHTS) | {name: np.zeros(shape, np.float32)}
    safetensors.numpy.save_file(arrays, folder / WEIGHTS)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder / WEIGHTS, config=dataclasses.replace(small, num_layers=3))


def test_settings_in_the_header(folder, small):
    arrays = safetensors.numpy.load_file(folder / WEIGHTS)
    safetensors.numpy.save_file(arrays, folder / WEIGHTS, metadata={"monarch": "{"})
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="the file's header is not JSON"):
        inspect_checkpoint(folder / WEIGHTS, config=small)


def test_integers_are_no_weights(folder, small, tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(a) for name, a in safetensors.numpy.load_file(folder / WEIGHTS).items()}
    state["blocks.0.self_attn.q.weight"] = state["blocks.0.self_attn.q.weight"].to(torch.int8)
    torch.save(state, tmp_path / "quantized.pt")
    with pytest.raises(ValueError, match=r"blocks\.0\.self_attn\.q\.weight is of int8, not floats"):
        load_checkpoint(tmp_path / "quantized.pt", config=small)


@pytest.mark.parametrize("format", ["official", "orbax"])
def test_home_is_expanded_as_in_loading(wan, small, tmp_path, monkeypatch, format):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert save_checkpoint(wan.model(small), "~/saved", format=format) == tmp_path / "saved"
    assert inspect_checkpoint("~/saved").complete


def test_embeddings_keep_their_order_past_four_digits(tmp_path):
    names = ["embedding.9999", "embedding.10000"]
    metadata = {"format": FORMAT} | {f"{name}.prompt": name for name in names}
    arrays = dict.fromkeys(names, np.ones((1, 1), np.float32))
    write_arrays(tmp_path / "text.safetensors", arrays, metadata=metadata)
    assert list(load_embeddings(tmp_path / "text.safetensors", length=1)) == names
