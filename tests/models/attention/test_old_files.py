"""Checkpoints, videos and run folders that were written before settings had a notation are read as they were meant."""

import json
import pathlib
import tarfile

import pytest

from monarchrt.models.attention.dense import DenseAttention
from monarchrt.models.attention.monarch import MonarchAttention
from monarchrt.models.generate.config import from_stored
from monarchrt.models.media.writer import read_settings
from monarchrt.models.wan.checkpoints import load_checkpoint
from monarchrt.models.wan.checkpoints.source import open_source
from monarchrt.train import cli
from monarchrt.train.model import attention_setting
from monarchrt.train.run_folder import read_config

ARCHIVE = pathlib.Path(__file__).parents[2] / "data" / "before_the_notation.tar.xz"
TILED = MonarchAttention(tile=(1, 2, 4), blocks="f,hw", num_iters=2)


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize(
    ("name", "attention", "causal_block", "few_step"),
    [
        ("dense-official", DenseAttention(), None, False),
        ("dense-causal-official", DenseAttention(), 3, True),
        ("monarch-official", TILED, None, False),
        ("monarch-diffusers", TILED, None, False),
        ("layers-official", (DenseAttention(), TILED, MonarchAttention()), 2, True),
        ("layers-orbax", (DenseAttention(), TILED, MonarchAttention()), 2, True),
    ],
)
def test_checkpoints(old, tmp_path, name, attention, causal_block, few_step):
    source = open_source(old / name)
    assert (source.config.attention, source.config.causal_block) == (attention, causal_block)
    assert source.few_step == few_step
    assert load_checkpoint(old / name).config.attention == attention
    if name == "layers-official":
        assert cli.main(["convert", str(old / name), str(tmp_path / "new")]) == 0
        own = json.loads((tmp_path / "new" / "config.json").read_text())["monarch"]
        text = "per_layer(dense, monarch(tile=(1,2,4), blocks='f,hw', num_iters=2), monarch)"
        assert own == {"attention": text, "causal_block": 2, "few_step": True}


def test_videos(old):
    dense, monarch, stored = (
        from_stored(read_settings(old / f"{name}.mp4"), source=old) for name in ("dense", "monarch", "stored")
    )
    assert (dense.attention, stored.attention) == ("dense", "stored")
    assert monarch.attention_text() == "monarch(tile=(2,2,4), blocks='f,hw', num_iters=2, implementation='xla')"
    assert (monarch.attention, monarch.tile) == ("monarch", (2, 2, 4))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("dense", "dense", marks=pytest.mark.slow),
        ("monarch", "monarch(tile=(2,2,4), implementation='xla')"),
    ],
)
def test_runs_are_resumed(old, monkeypatch, name, text):
    monkeypatch.chdir(old)
    folder = old / f"run-{name}"
    config = read_config(folder)
    assert config is not None
    assert str(attention_setting(config.model)) == text
    assert cli.main(["train", "--folder", str(folder), "--resume", "--steps", "3"]) == 0
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3
    written = json.loads((folder / "config.json").read_text())["model"]
    assert (written["attention"], written["tile"]) == (text, None)
    again = read_config(folder)
    assert again is not None
    assert again.model == config.model
