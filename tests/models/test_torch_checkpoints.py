"""Pickled PyTorch files of Wan: what training code saves, and what must not be run or read from them."""

import dataclasses
import io
import os
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from monarchrt.models.checkpoints.torch_pickle import TorchFile
from monarchrt.models.wan.checkpoints import (
    UnsafePickleError,
    convert_checkpoint,
    inspect_checkpoint,
    load_checkpoint,
)
from tests.models.test_checkpoints import assert_same, official_tensors
from tests.untyped import untyped


class TestTorch:
    def write(self, path, **sets):
        torch = pytest.importorskip("torch")
        torch.save({name: {k: torch.tensor(v) for k, v in arrays.items()} for name, arrays in sets.items()}, path)

    def test_self_forcing_file(self, wan, small, tmp_path):
        config = dataclasses.replace(small, dim=128, num_heads=1, eps=1e-6, text_len=512)
        generator, average = wan.model(config, seed=1), wan.model(config, seed=2)
        wrapped = {
            "model." + name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module._checkpoint_wrapped_module."): array
            for name, array in official_tensors(generator).items()
        }
        averaged = {f"model.{name}": array for name, array in official_tensors(average).items()}
        self.write(tmp_path / "both.pt", generator=wrapped, generator_ema=averaged, critic=averaged)
        self.write(tmp_path / "one.pt", generator=wrapped)
        assert_same(load_checkpoint(tmp_path / "both.pt"), average)
        assert_same(load_checkpoint(tmp_path / "both.pt", weights="generator"), generator)
        assert_same(load_checkpoint(tmp_path / "one.pt"), generator)
        info = inspect_checkpoint(tmp_path / "both.pt")
        assert (info.sets, info.weights) == (("generator", "generator_ema", "critic"), "generator_ema")
        assert info.complete
        assert info.config == config
        convert_checkpoint(tmp_path / "both.pt", tmp_path / "official", to="official")
        assert_same(load_checkpoint(tmp_path / "official", config=config), average)
        with pytest.raises(ValueError, match=r"weights='ema' is not in .*'generator', 'generator_ema', 'critic'"):
            load_checkpoint(tmp_path / "both.pt", weights="ema")

    @pytest.mark.parametrize("format", ["official", "diffusers", "orbax"])
    def test_what_is_made_of_self_forcings_file_stays_few_step(self, wan, small, tmp_path, format):
        config = dataclasses.replace(small, dim=128, num_heads=1, eps=1e-6, text_len=512)
        arrays = {f"model.{name}": array for name, array in official_tensors(wan.model(config)).items()}
        self.write(tmp_path / "both.pt", generator_ema=arrays, critic=arrays)
        assert inspect_checkpoint(tmp_path / "both.pt").few_step
        assert not inspect_checkpoint(tmp_path / "both.pt", weights="critic").few_step
        convert_checkpoint(tmp_path / "both.pt", tmp_path / "a", to=format)
        convert_checkpoint(tmp_path / "a", tmp_path / "b", to="official")
        assert "sampling    few-step" in inspect_checkpoint(tmp_path / "b").lines()
        assert inspect_checkpoint(tmp_path / "b").config == config
        (tmp_path / "b" / "config.json").unlink()  # the weights' own header says so too
        assert inspect_checkpoint(tmp_path / "b").few_step
        convert_checkpoint(tmp_path / "both.pt", tmp_path / "c", to=format, weights="critic")
        assert not inspect_checkpoint(tmp_path / "c").few_step
        convert_checkpoint(tmp_path / "c", tmp_path / "d", to="official", few_step=True)
        assert inspect_checkpoint(tmp_path / "d").few_step

    def test_heads_cannot_be_guessed(self, wan, small, tmp_path):
        self.write(tmp_path / "a.pt", generator=official_tensors(wan.model(small)))
        with pytest.raises(ValueError, match=r"dim=48 is not a multiple of 128.*give num_heads or head_dim"):
            load_checkpoint(tmp_path / "a.pt")
        assert_same(load_checkpoint(tmp_path / "a.pt", config=small), wan.model(small))
        said = untyped(({"num_heads": small.num_heads}, {"head_dim": small.head_dim}))
        for heads in said:
            found = load_checkpoint(tmp_path / "a.pt", **heads)
            assert found.config.num_heads == small.num_heads
            assert inspect_checkpoint(tmp_path / "a.pt", **heads).config.head_dim == small.head_dim
        convert_checkpoint(tmp_path / "a.pt", tmp_path / "made", to="official", head_dim=small.head_dim)
        assert load_checkpoint(tmp_path / "made").config.num_heads == small.num_heads  # its config.json says it
        for wrong in map(untyped, ({"num_heads": 5}, {"head_dim": 7}, {"num_heads": 0}, {"head_dim": -1})):
            (name,) = wrong
            choices = "1, 2, 3, 4, 6, 8" if name == "num_heads" else "6, 8, 12, 16, 24, 48"
            with pytest.raises(ValueError, match=f"{name}={wrong[name]} does not fit .* width 48; choices: {choices}."):
                load_checkpoint(tmp_path / "a.pt", **wrong)
            with pytest.raises(ValueError, match=f"{name}={wrong[name]}: .* has {small.num_heads} heads of"):
                load_checkpoint(tmp_path / "made", **wrong)

    def test_torch_objects(self, tmp_path):
        """Half precision, parameters, views into a shared storage, and numbers beside the tensors."""
        torch = pytest.importorskip("torch")
        from monarchrt.models.checkpoints.torch_pickle import TorchFile

        base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
        module = torch.nn.Linear(3, 2).to(torch.bfloat16)
        content = {"model": {"t": base.T, "v": base[1:3, 2:5], "s": torch.tensor(3.5), "p": torch.nn.Parameter(base)}}
        content["generator"] = module.state_dict()
        torch.save(content | {"step": 600, "name": "x"}, tmp_path / "a.pt")
        file = TorchFile(tmp_path / "a.pt", weights="model")
        np.testing.assert_array_equal(file.read("t"), base.numpy().T)
        np.testing.assert_array_equal(file.read("v"), base.numpy()[1:3, 2:5])
        np.testing.assert_array_equal(file.read("p"), base.numpy())
        assert file.read("s") == 3.5
        file = TorchFile(tmp_path / "a.pt", weights="generator")
        assert file.infos["weight"].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(file.read("weight").astype(np.float32), module.weight.detach().float().numpy())

    def test_malicious_pickle_is_refused_and_not_run(self, tmp_path):
        torch = pytest.importorskip("torch")
        marker = tmp_path / "ran"

        class Evil:
            def __reduce__(self):
                return os.system, (f"touch {marker}",)

        torch.save({"generator": {"model.x": torch.zeros(2), "y": Evil()}}, tmp_path / "evil.pt")
        with pytest.raises(UnsafePickleError, match=r"evil.pt is refused: it asks for posix.system"):
            load_checkpoint(tmp_path / "evil.pt")
        assert not marker.exists()
        with zipfile.ZipFile(tmp_path / "evil.pt") as archive:  # it does run elsewhere
            data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))

        class Trusting(pickle.Unpickler):
            def persistent_load(self, pid):
                return None

            def find_class(self, module, name):
                return (lambda *_: None) if module.startswith("torch") else super().find_class(module, name)

        Trusting(io.BytesIO(data)).load()
        assert marker.exists()

    @pytest.mark.parametrize(
        "name",
        ["builtins.eval", "torch.storage._load_from_bytes", "torch.hub.load", "collections.OrderedDict.__init__"],
    )
    def test_no_other_global(self, tmp_path, name):
        module, _, attribute = name.rpartition(".")
        data = f"c{module}\n{attribute}\n(S'1'\ntR.".encode()
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
            archive.writestr("a/data.pkl", data)
        with pytest.raises(UnsafePickleError, match="Only tensors are read from pickles"):
            inspect_checkpoint(tmp_path / "a.pt")

    def test_tensor_outside_its_storage(self, tmp_path):
        torch = pytest.importorskip("torch")
        torch.save({"blocks.0.self_attn.q.weight": torch.zeros(2, 3)}, tmp_path / "a.pt")
        with zipfile.ZipFile(tmp_path / "a.pt") as archive:
            entries = {name: archive.read(name) for name in archive.namelist()}
        pkl = next(name for name in entries if name.endswith("data.pkl"))
        assert entries[pkl].count(b"K\x02K\x03\x86") == 1  # the shape (2, 3)
        entries[pkl] = entries[pkl].replace(b"K\x02K\x03\x86", b"K\x02K\x63\x86")
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        with pytest.raises(UnsafePickleError, match="a tensor lies outside its storage"):
            inspect_checkpoint(tmp_path / "b.pt")

    def test_files_from_before_1_6(self, wan, small, tmp_path):
        """Pickles in a row and then the numbers: the same tensors, views of one storage and other dtypes among them."""
        torch = pytest.importorskip("torch")
        one = torch.arange(24.0).reshape(4, 6)
        tensors = {"a": one, "b": one[1:3].T, "c": one[2, 3:], "d": one.half(), "e": torch.tensor([True, False]),
                   "f": torch.tensor(7), "g": torch.zeros(0, 3), "h": one.to(torch.bfloat16)}  # fmt: skip
        torch.save({"state": tensors, "epoch": 3}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
        file = TorchFile(tmp_path / "old.pt")
        assert file.weights == "state"
        for name, tensor in tensors.items():
            found = file.read(name)
            assert (found.shape, found.dtype.name) == (tuple(tensor.shape), str(tensor.dtype).split(".")[-1])
            np.testing.assert_array_equal(found.astype(np.float32), tensor.float().numpy())
        whole = (tmp_path / "old.pt").read_bytes()
        for cut in (len(whole) - 1, len(whole) - 40, len(whole) // 3, 40):
            (tmp_path / "cut.pt").write_bytes(whole[:cut])
            with pytest.raises(ValueError, match=r"cut\.pt cannot be read"):
                TorchFile(tmp_path / "cut.pt")

    @pytest.mark.parametrize(
        ("old", "new", "says"),
        [
            (b"\x80\x02M\xe9\x03.", b"\x80\x02M\xea\x03.", "it has protocol 1002; only 1001 is supported"),
            (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "a big-endian machine"),
            (b"ctorch\nFloatStorage", b"cos\nsystem", "it asks for os.system"),
        ],
    )
    def test_old_files_are_not_trusted_either(self, tmp_path, old, new, says):
        torch = pytest.importorskip("torch")
        torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        data = (tmp_path / "a.pt").read_bytes()
        assert data.count(old) == 1
        (tmp_path / "a.pt").write_bytes(data.replace(old, new))
        with pytest.raises(ValueError, match=says):
            TorchFile(tmp_path / "a.pt")

    def test_storages_that_are_not_there(self, tmp_path):
        """Lists and sizes that lie, in a file of the old kind."""
        torch = pytest.importorskip("torch")
        torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        data = (tmp_path / "a.pt").read_bytes()
        for count, says in ((2**62, "it is truncated"), (-1, "it is truncated"), (1, "has 4 bytes of 8")):
            lying = data[:-16] + count.to_bytes(8, "little", signed=True) + data[-8:]
            (tmp_path / "b.pt").write_bytes(lying)
            with pytest.raises(ValueError, match=says):
                TorchFile(tmp_path / "b.pt")

    def test_damaged(self, wan, small, tmp_path):
        self.write(tmp_path / "a.pt", generator=official_tensors(wan.model(small)))
        data = bytearray((tmp_path / "a.pt").read_bytes())
        (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
        with pytest.raises(ValueError, match=r"cut.pt is not a zip archive: it is truncated"):
            load_checkpoint(tmp_path / "cut.pt", config=small)
        data[len(data) // 2] ^= 1  # one bit of one weight
        (tmp_path / "flipped.pt").write_bytes(data)
        with pytest.raises(ValueError, match=r"flipped.pt: .* is damaged \(Bad CRC-32"):
            load_checkpoint(tmp_path / "flipped.pt", config=small)
