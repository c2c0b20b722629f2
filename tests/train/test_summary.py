"""`monarchrt inspect RUN`: what a run folder says of itself, whole, unfinished or damaged."""

import json
import shutil

import pytest

from monarchrt.train.cli import main

from .conftest import contents
from .test_runs_written_before import WRITTEN


@pytest.fixture
def made(baseline, tmp_path):
    shutil.copytree(baseline, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def inspect(capsys):
    """The exit code and the lines by their first words."""

    def inspect(path, *options):
        code = main(["inspect", str(path), *options])
        lines = capsys.readouterr().out.splitlines()
        found = {}
        for line in lines:
            name = line[:12].strip() or line
            assert name not in found
            found[name] = line[12:]
        return code, found

    return inspect


def test_a_finished_run(baseline, inspect):
    before = contents(baseline)
    code, said = inspect(baseline)
    assert code == 0
    assert said["checkpoint"] == "step 30, verified; older ones 28, 24"
    records = [json.loads(line) for line in (baseline / "log.jsonl").read_text().splitlines()]
    losses = [record["held_out_loss"] for record in records if "held_out_loss" in record]
    assert said["held-out"].startswith(f"{losses[-1]:.4f} at step 30; {losses[0]:.4f} at step ")
    assert said["log"] == "up to step 30"
    assert said["model"] == "dim 24, 1 layers, 2 heads, ffn 48, 48 channels"
    assert said["attention"].startswith("monarch, ")
    assert "24 tokens a sample, 3 x 2 x 4" in said["data"]
    assert said["objective"].startswith("flow; exported: student; shift 5.0")
    assert said["student"] == "from random parameters; AdamW at 0.001, constant, average 0.99"
    assert said["run"] == "30 steps of 2 samples, seed 0, fp32"
    assert "convert" not in said  # of pixels, no VAE decodes what a model of it makes
    assert said["generate"].startswith(f"monarchrt generate --checkpoint {baseline}    generates 3 frames of 16 x 32")
    assert said["generate"].endswith(", with the moving average of its weights")
    assert int(said["parameters"].replace(",", "")) > 1000
    assert contents(baseline) == before


def test_a_run_written_before_there_were_roles(inspect):
    code, said = inspect(WRITTEN / "run")
    assert code == 0
    assert said["checkpoint"] == "step 2, verified"
    assert said["held-out"] == "2.0461 at step 2"
    assert said["convert"].startswith(
        f"monarchrt convert {WRITTEN / 'run'} NEW    writes a model with the moving average"
    )
    assert said["generate"].startswith("needs a model written by convert")
    assert "AdamW at 0.001, cosine, average 0.9" in said["student"]


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path):
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 4, len(data) // 2):
        data[at] ^= 0x55
    path.write_bytes(data)


DAMAGE = {
    "a byte of the arrays": lambda step: flip(largest(step / "state" / "d" if (step / "state/d").is_dir() else step)),
    "the arrays": lambda step: shutil.rmtree(step / "state"),
    "the description": lambda step: (step / "about" / "metadata").write_text("{"),
    "what the description says": lambda step: (step / "about" / "metadata").write_text('{"arrays": {"a": 1}}'),
    "all": lambda step: [shutil.rmtree(child) if child.is_dir() else child.unlink() for child in step.iterdir()],
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_checkpoint_that_is_damaged(made, inspect, what):
    """The newest that can be read is named, and is the one that a model is made of."""
    DAMAGE[what](made / "checkpoints" / "30")
    code, said = inspect(made)
    assert code == 0
    assert said["checkpoint"].startswith("step 28, verified; older ones 24; step 30 cannot be")
    assert said["generate"].startswith("monarchrt generate")
    assert "dim 24" in said["model"]
    assert main(["convert", str(made), str(made.parent / "made")]) == 0


def test_no_checkpoint_can_be_read(made, inspect):
    for step in (made / "checkpoints").iterdir():
        shutil.rmtree(step / "state")
    code, said = inspect(made)
    assert code == 2
    assert said["checkpoint"].startswith("none can be read; step 30 cannot be read (")
    assert said["log"] == "up to step 30"


@pytest.mark.parametrize("text", ["{", "[]", '{"data": 3, "model": {}, "run": {}}', '{"model": {"preset": 7}}', "\0"])
def test_settings_that_are_damaged(made, inspect, text):
    (made / "config.json").write_text(text)
    code, said = inspect(made)
    assert code == 2
    assert "config.json" in said["settings"]
    assert said["checkpoint"].startswith("step 30")
    assert said["log"] == "up to step 30"


def test_what_is_left_of_a_run(made, inspect, tmp_path, capsys):
    shutil.rmtree(made / "checkpoints")
    code, said = inspect(made)
    assert code == 2
    assert said["checkpoint"] == "none; there is no checkpoints/"
    assert said["log"] == "up to step 30"
    for arguments in (["generate", "--checkpoint"], ["convert"]):
        last = ["--out", str(tmp_path / "a.mp4")] if arguments[0] == "generate" else [str(tmp_path / "made")]
        assert main([*arguments, str(made), *last]) == 2
        assert f"{made} is a run folder without checkpoints/; `monarchrt inspect` says" in capsys.readouterr().err
    (made / "config.json").unlink()
    code, said = inspect(made)
    assert (code, said["settings"]) == (2, "config.json does not exist")
    (made / "log.jsonl").write_text("")
    assert inspect(made)[1]["log"] == "no step yet"


def test_a_save_that_was_cut_off(made, inspect):
    (made / "checkpoints/30").rename(made / "checkpoints/30.orbax-checkpoint-tmp-7")
    code, said = inspect(made)
    assert code == 0
    assert said["checkpoint"].startswith("step 28, verified; older ones 24; 1 incomplete, still being written or left")


def test_other_folders_are_none(tmp_path, capsys, inspect):
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel"}')
    assert main(["inspect", str(tmp_path)]) == 2
    assert "run" not in capsys.readouterr().err.replace(str(tmp_path), "")


@pytest.mark.parametrize("option", [["--weights", "model"], ["--num-heads", "2"], ["--head-dim", "12"]])
def test_options_of_files(baseline, tmp_path, capsys, option):
    for arguments in (["inspect", str(baseline)], ["convert", str(baseline), str(tmp_path / "made")]):
        assert main([*arguments, *option]) == 2
        assert f"but {baseline} is a run folder; leave it out" in capsys.readouterr().err


def test_a_table_in_a_file_is_not_cut(capsys):
    from monarchrt.train.cli.tables import print_table

    cells = [[f"{number}.{'1234567890' * 5}" for number in range(4)]]
    print_table(["one", "two", "three", "four"], cells)
    out = capsys.readouterr().out
    assert all(cell in out for cell in cells[0])
