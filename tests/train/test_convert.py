"""The commands `monarchrt convert` and `monarchrt inspect`."""

import shutil

import jax
import jax.core
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import nnx

from monarchrt.models.checkpoints.tensor_files import TensorInfo, write_safetensors
from monarchrt.models.wan import MonarchAttention, WanModel, wan_config
from monarchrt.models.wan.checkpoints import load_checkpoint, save_checkpoint
from monarchrt.models.wan.checkpoints.mapping import checkpoint_shape, tensors
from monarchrt.models.wan.checkpoints.settings import config_to_json, dump_json
from monarchrt.train import cli, networks
from monarchrt.train.checkpointing import Checkpoints
from monarchrt.train.config import DataConfig, ModelConfig, OptimizerConfig, RunConfig, TrainConfig
from monarchrt.train.loop import train
from monarchrt.train.model import build_model
from monarchrt.train.run_folder import write_config
from monarchrt.train.state import create_role, create_state, make_training, split_model
from tests.clips import make_clip
from tests.untyped import untyped

from .conftest import DATA


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = wan_config("tiny", num_layers=2, attention=MonarchAttention(tile=(3, 4, 6)))
    model = nnx.jit(lambda: WanModel(config, rngs=nnx.Rngs(0)))()
    return save_checkpoint(model, tmp_path_factory.mktemp("wan") / "tiny")


def test_convert(folder, tmp_path, capsys):
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    assert cli.main(["convert", str(folder), there, "--to", "diffusers"]) == 0
    assert capsys.readouterr().out.strip() == there
    assert cli.main(["convert", there, back, "--to", "official", "--max-shard-gb", "0.001"]) == 0
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    before, after = (jax.tree.leaves(nnx.state(load_checkpoint(path))) for path in (folder, back))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_run_becomes_a_model(baseline, tmp_path, capsys):
    """The moving average of a run's newest checkpoint, bit for bit; the run folder is only read."""
    run = tmp_path / "run"
    shutil.copytree(baseline, run)
    saving = run / "checkpoints" / f"99{ocp.utils.TMP_DIR_SUFFIX}1"  # another process is writing it
    saving.mkdir()
    assert cli.main(["convert", str(run), str(tmp_path / "made")]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(tmp_path / "made")
    assert f"note: {run} was trained on pixels, so no VAE can decode what {tmp_path / 'made'} generates" in printed.err
    assert saving.is_dir()
    model = load_checkpoint(tmp_path / "made")
    with Checkpoints(baseline, read_only=True) as checkpoints:
        expected = checkpoints.restore_parameters(nnx.state(model, nnx.Param))
    for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert cli.main(["convert", str(tmp_path), str(tmp_path / "other")]) == 2
    assert f"holds runs; give one of them: {run}" in capsys.readouterr().err


def test_a_run_whose_newest_checkpoint_is_damaged(baseline, tmp_path, capsys):
    """The one before is taken, as if it were the newest, and that is said."""
    damaged, older = tmp_path / "damaged", tmp_path / "older"
    for run in (damaged, older):
        shutil.copytree(baseline, run)
    for data in (damaged / "checkpoints/30/state").rglob("d/*"):  # which one holds what convert reads is not known
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    shutil.rmtree(older / "checkpoints/30")
    assert cli.main(["convert", str(damaged), str(tmp_path / "one")]) == 0
    assert "the checkpoint of step 30" in (said := capsys.readouterr().err)
    assert "that of step 28 is used instead" in said
    assert cli.main(["convert", str(older), str(tmp_path / "other")]) == 0
    assert "instead" not in capsys.readouterr().err
    pairs = zip(*(jax.tree.leaves(nnx.state(load_checkpoint(tmp_path / x))) for x in ("one", "other")), strict=True)
    assert all(np.array_equal(one, other) for one, other in pairs)
    assert (damaged / "checkpoints/30").is_dir()


@pytest.mark.slow
def test_a_run_on_latents_of_other_channels_becomes_a_model(tmp_path):
    settings = TrainConfig(
        data=DataConfig(latents=tmp_path / "moved"),
        model=ModelConfig(attention="dense", overrides=("num_layers=1", "dim=24", "num_heads=2", "ffn_dim=48")),
        run=RunConfig(folder=tmp_path / "run"),
    )
    write_config(settings)
    params, fixed = split_model(build_model(settings.model, channels=6, seed=0))[1:]
    with Checkpoints(tmp_path / "run") as checkpoints:
        role = create_role(params, fixed, make_training(OptimizerConfig(), updates=1))
        checkpoints.save(create_state({"student": role}, seed=0), {})
    assert cli.main(["convert", str(tmp_path / "run"), str(tmp_path / "made")]) == 0
    model = load_checkpoint(tmp_path / "made")
    assert (model.config.in_channels, model.config.out_channels) == (6, 6)
    for a, b in zip(jax.tree.leaves(nnx.state(model)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inspect(folder, capsys):
    assert cli.main(["inspect", str(folder)]) == 0
    report = capsys.readouterr().out
    for line in (
        "format      official",
        "model       t2v, dim 96, 2 layers, 4 heads, ffn 256, 16 -> 16 channels",
        "attention   monarch(tile=(3,4,6))",
        "dtype       float32 (69 tensors)",
        "missing     none",
    ):
        assert line in report


def test_advice_for_a_run_can_be_pasted(tmp_path, capsys):
    run = tmp_path / "my run"
    write_config(TrainConfig(data=DataConfig(latents=tmp_path), run=RunConfig(folder=run)))
    (run / "checkpoints").mkdir()
    assert cli.main(["generate", "--checkpoint", str(run), "--out", str(tmp_path / "a.mp4")]) == 2
    assert f"`monarchrt convert '{run}' NEW`" in capsys.readouterr().err


def test_errors_are_one_line(folder, tmp_path, capsys):
    path = tmp_path / "cut.safetensors"
    path.write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes()[:-1])
    for arguments, message in (
        (["inspect", str(path)], "is truncated"),
        (["inspect", str(tmp_path / "nothing")], "does not exist"),
        (["convert", str(path), str(tmp_path / "out")], "is truncated"),
        (["convert", str(folder), str(folder)], "is not an empty folder"),
        (["convert", str(folder), str(path / "below")], "Not a directory"),
        (["convert", str(folder), str(tmp_path / "out"), "--max-shard-gb", "0"], "max_shard_gb=0.0 must be positive"),
    ):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["cut.safetensors"]


@pytest.mark.parametrize("command", ["convert", "inspect"])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"monarchrt {command}" in capsys.readouterr().out


def test_training_starts_from_a_checkpoint(tmp_path, capsys, monkeypatch):
    """`--init-from` takes a Wan checkpoint; its sizes must be the network's, its attention need not be."""

    def traced_only(*args, **kwargs):
        model = build_model(*args, **kwargs)
        # a 1.3B model would be held twice if random parameters were drawn first
        assert all(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(nnx.state(model)))
        return model

    monkeypatch.setattr(networks, "build_model", traced_only)
    clip = make_clip(tmp_path / "clip.mp4")
    overrides = {"num_layers": 1, "dim": 24, "num_heads": 2, "ffn_dim": 48, "in_channels": 48, "out_channels": 48}
    config = wan_config("tiny", attention=MonarchAttention(tile=(3, 1, 2)), **overrides)
    model = nnx.jit(lambda: WanModel(config, rngs=nnx.Rngs(7)))()
    save_checkpoint(model, tmp_path / "wan", format="diffusers")
    settings = TrainConfig(
        data=DataConfig(video=clip, frames=3, height=16, width=32, patch=4, gap=1, held_out=0.3),
        model=ModelConfig(attention="dense", overrides=("num_layers=1", "dim=24", "num_heads=2", "ffn_dim=48")),
        optimizer=OptimizerConfig(learning_rate=1e-9),
        run=RunConfig(folder=tmp_path / "run", steps=1, batch=2, eval_windows=1, init_from=tmp_path / "wan"),
    )
    result = train(settings, quiet=True)
    for a, b in zip(
        jax.tree.leaves(result.state.roles["student"].params), jax.tree.leaves(nnx.state(model)), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)
    folders = ["--folder", str(tmp_path / "other"), "--init-from", str(tmp_path / "wan")]
    assert cli.main(["train", "--video", str(clip), *DATA, *folders]) == 2
    assert "is another model than config describes: dim=24 (config: 96)" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_finetuning_from_the_released_model_says_what_is_needed(tmp_path, capsys):
    """A checkpoint of the released sizes: preset and data are asked for by name before a weight is read."""
    config = wan_config("wan2.1-t2v-1.3b", param_dtype="bfloat16")
    infos = {
        tensor.official: TensorInfo(checkpoint_shape(config, tensor), np.dtype(ml_dtypes.bfloat16))
        for tensor in tensors(config)
    }
    folder = tmp_path / "Wan2.1-T2V-1.3B"
    folder.mkdir()
    (folder / "config.json").write_text(dump_json(config_to_json(config, "official")))
    weights = folder / "diffusion_pytorch_model.safetensors"
    # a header, and a hole where 2.8 GB of weights would be
    header = untyped(write_safetensors(weights, infos, lambda name: np.zeros((), np.int8)))
    with pytest.raises(ValueError, match="is not the announced"):
        next(header)
    header.close()
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size + sum(info.nbytes for info in infos.values()))
    assert cli.main(["inspect", str(folder)]) == 0
    assert "825 of 825" in capsys.readouterr().out

    latents = tmp_path / "latents"
    latents.mkdir()
    for i in range(3):
        example = {"latents": np.zeros((3, 8, 8, 16), np.float32), "text": np.zeros((5, 4096), np.float32)}
        safetensors.numpy.save_file(example, latents / f"{i}.safetensors")
    command = ["train", "--init-from", str(folder), "--folder", str(tmp_path / "run")]
    assert cli.main([*command, "--latents", str(latents)]) == 2
    assert capsys.readouterr().err.endswith("Give --preset wan2.1-t2v-1.3b.\n")
    clip = make_clip(tmp_path / "clip.mp4")
    assert cli.main([*command, "--preset", "wan2.1-t2v-1.3b", "--video", str(clip), *DATA]) == 2
    assert "The data has 48 channels; give --latents, a folder" in capsys.readouterr().err
    assert cli.main([*command, "--latents", str(latents), "--preset", "wan2.1-t2v-1.3b", "--tile", "3", "3", "4"]) == 2
    assert "tile=(3, 3, 4): 3 does not divide the 4" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
