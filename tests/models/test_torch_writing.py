"""`.pt` files that are written without torch: torch and our own reader read them back, bit for bit."""

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from monarchrt.models.checkpoints.tensor_files import TensorInfo
from monarchrt.models.checkpoints.torch_pickle import TorchFile
from monarchrt.models.checkpoints.torch_writing import write_torch
from monarchrt.models.wan import WanModel, wan_config
from monarchrt.models.wan.checkpoints import convert_checkpoint, inspect_checkpoint, load_checkpoint, save_checkpoint
from monarchrt.models.wan.checkpoints.mapping import checkpoint_shape, tensors
from monarchrt.train.cli import main

SHAPES = {"a.weight": (3, 5), "b": (7,), "one": (), "none": (0, 4), "convolution": (2, 3, 1, 2, 2)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64, np.int64])
def test_every_shape_and_dtype(tmp_path, dtype):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    arrays = {name: np.asarray(100 * rng.standard_normal(shape)).astype(dtype) for name, shape in SHAPES.items()}
    arrays["turned"] = arrays["a.weight"].T  # not in the order of memory
    infos = {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}
    path = tmp_path / "made.pt"
    assert dict(write_torch(path, "generator_ema", infos, arrays.__getitem__)) == {
        k: v.nbytes for k, v in arrays.items()
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["made.pt"]
    for mmap in (False, True):
        found = torch.load(path, weights_only=True, mmap=mmap)
        assert list(found) == ["generator_ema"]
        assert list(found["generator_ema"]) == list(arrays)
        for name, array in arrays.items():
            tensor = found["generator_ema"][name]
            assert tensor.shape == array.shape
            assert tensor.is_contiguous()
            np.testing.assert_array_equal(tensor.double().numpy(), array.astype(np.float64))
            assert str(tensor.dtype) == f"torch.{np.dtype(dtype).name}"
    ours = TorchFile(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(ours.read(name), array)


def test_a_dtype_that_torch_has_no_name_for_leaves_nothing(tmp_path):
    infos = {"a": TensorInfo((1,), np.dtype(np.uint16))}
    with pytest.raises(ValueError, match=r"a is uint16, which a \.pt file cannot hold"):
        list(write_torch(tmp_path / "a.pt", "model", infos, lambda name: np.zeros(1, np.uint16)))
    assert not list(tmp_path.iterdir())


def test_what_fails_halfway_leaves_nothing(tmp_path):
    def read(name):
        if name == "b":
            raise OSError("gone")
        return np.zeros(1, np.float32)

    infos = {name: TensorInfo((1,), np.dtype(np.float32)) for name in "ab"}
    with pytest.raises(OSError, match="gone"):
        list(write_torch(tmp_path / "a.pt", "model", infos, read))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def model():
    config = wan_config("tiny", dim=128, num_heads=1, ffn_dim=16, num_layers=1, freq_dim=8, text_dim=4)
    return nnx.jit(lambda: WanModel(config, rngs=nnx.Rngs(0)))()


def test_names_and_shapes_are_self_forcings(model, tmp_path, capsys):
    """Those of the released model under its wrapper's prefix; and back again every bit is kept."""
    torch = pytest.importorskip("torch")
    save_checkpoint(model, tmp_path / "official", few_step=True)
    assert main(["convert", str(tmp_path / "official"), str(tmp_path / "student.pt"), "--to", "torch"]) == 0
    assert "holds no settings; give attention, blocks, shift and steps" in capsys.readouterr().err
    found = torch.load(tmp_path / "student.pt", weights_only=True)
    assert list(found) == ["generator_ema"]
    shapes = {f"model.{t.official}": checkpoint_shape(model.config, t) for t in tensors(model.config)}
    assert {name: tuple(tensor.shape) for name, tensor in found["generator_ema"].items()} == shapes
    assert "model.blocks.0.self_attn.norm_q.weight" in shapes
    info = inspect_checkpoint(tmp_path / "student.pt")
    assert (info.format, info.complete, info.few_step) == ("torch", True, True)
    convert_checkpoint(tmp_path / "student.pt", tmp_path / "back", to="official")
    for one, other in ((load_checkpoint(tmp_path / "back"), model), (load_checkpoint(tmp_path / "student.pt"), model)):
        for a, b in zip(map(np.asarray, _leaves(one)), map(np.asarray, _leaves(other)), strict=True):
            np.testing.assert_array_equal(a, b)
    save_checkpoint(model, tmp_path / "many.pt", format="torch", dtype="bfloat16")
    many = torch.load(tmp_path / "many.pt", weights_only=True)
    assert list(many) == ["model"]
    assert many["model"]["model.head.modulation"].dtype == torch.bfloat16
    assert not inspect_checkpoint(tmp_path / "many.pt").few_step


def _leaves(model):
    import jax

    return jax.tree.leaves(nnx.state(model, nnx.Param))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["made", "--to", "torch"], "to is 'torch', which is a file, but dst is"),
        (["made.pt"], "to is 'official', which is a folder; give --to torch"),
        (["there.pt", "--to", "torch"], "exists; name a new file"),
    ],
)
def test_bad_targets(model, tmp_path, capsys, arguments, said):
    save_checkpoint(model, tmp_path / "official")
    (tmp_path / "there.pt").write_text("mine")
    name, *options = arguments
    assert main(["convert", str(tmp_path / "official"), str(tmp_path / name), *options]) == 2
    assert said in capsys.readouterr().err
    assert (tmp_path / "there.pt").read_text() == "mine"


def test_heads_that_could_not_be_told_are_refused(tmp_path):
    small = nnx.eval_shape(lambda: WanModel(wan_config("tiny", num_layers=1), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"heads of \d+ channels could not be told: the released models' have 128"):
        save_checkpoint(small, tmp_path / "a.pt", format="torch")
