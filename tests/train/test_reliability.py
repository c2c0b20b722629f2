"""What a run promises when things go wrong, tried on real processes, files and disks."""

import json
import random
import shutil
import signal
import subprocess
import time

import pytest

from monarchrt.train.cli import main
from monarchrt.train.run_folder import FolderLock
from tests.clips import make_clip

from .conftest import history


def one_error_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert "Traceback" not in stderr, stderr
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, stderr
    return errors[0]


def steps_of(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def test_the_log_has_every_step_once(baseline):
    records = history(baseline)
    assert [record["step"] for record in records if "loss" in record] == list(range(1, 31))
    assert [record["step"] for record in records if "held_out_loss" in record] == [6, 12, 18, 24, 30]
    assert steps_of(baseline) == [24, 28, 30]  # keep 3
    assert json.loads((baseline / "config.json").read_text())["run"]["steps"] == 30
    assert list((baseline / "tensorboard").iterdir())


def test_training_lowers_the_held_out_loss(baseline):
    losses = [record["held_out_loss"] for record in history(baseline) if "held_out_loss" in record]
    assert losses[-1] < losses[0]


def test_killed_and_resumed_is_bit_for_bit_the_uninterrupted_run(baseline, arguments, start, run, tmp_path):
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    folder = tmp_path / "killed"
    log = folder / "log.jsonl"
    command = [*arguments, "--folder", folder, "--resume"]

    def reached(lines):
        return log.exists() and log.read_bytes().count(b"\n") >= lines if lines else folder.exists()

    # as soon as the folder is there, then after so many lines of the log
    for lines in [0, rng.randrange(1, 33)]:
        process = start(command)
        while process.poll() is None:
            if reached(lines):
                time.sleep(rng.random() * 0.05)  # anywhere in a step, or in a save
                process.kill()
                break
            time.sleep(0.002)
        _, stderr = process.communicate()
        assert process.returncode == -signal.SIGKILL, (seed, lines, stderr)
    assert history(folder) != history(baseline)
    code, stderr = run(command)
    assert code == 0, (seed, stderr)
    assert "resuming" in stderr
    assert history(folder) == history(baseline), seed
    assert steps_of(folder) == steps_of(baseline)


def test_ctrl_c_saves_and_exits_with_130(baseline, arguments, start, run, tmp_path):
    folder = tmp_path / "stopped"
    process = start([*arguments, "--folder", folder])
    while process.poll() is None and not ((folder / "log.jsonl").exists() and (folder / "log.jsonl").stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    stopped = history(folder)[-1]["step"]
    assert stopped < 30
    assert f"stopped at step {stopped} and saved" in stderr
    assert steps_of(folder)[-1] == stopped
    # settings that are not given come from config.json
    code, stderr = run(["train", "--folder", folder, "--resume"])
    assert code == 0, stderr
    assert history(folder) == history(baseline)


def test_corrupt_newest_checkpoint_falls_back_to_the_one_before(baseline, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(baseline, folder)
    data = max((folder / "checkpoints/30/state").rglob("d/*"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    code, stderr = run(["train", "--folder", folder, "--resume"])
    assert code == 0, stderr
    assert "the checkpoint of step 30 is corrupt, continuing from step 28" in stderr
    assert "Traceback" not in stderr
    assert history(folder) == history(baseline)
    assert steps_of(folder)[-1] == 30
    assert (folder / "unreadable_checkpoints/30").is_dir()


def test_no_readable_checkpoint_is_an_error_that_touches_nothing(baseline, run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(baseline, folder)
    for data in (folder / "checkpoints").glob("*/state/**/d/*"):
        data.write_bytes(b"")
    code, stderr = run(["train", "--folder", folder, "--resume"])
    assert code == 2, stderr
    assert "none of the checkpoints" in one_error_line(stderr)
    assert steps_of(folder) == [24, 28, 30]
    assert history(folder) == history(baseline)


def test_nonfinite_loss_stops_names_the_step_and_keeps_the_last_checkpoint(arguments, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main([*arguments, "--folder", str(folder), "--learning-rate", "1e30", "--clip-norm", "None"]) == 2
    stderr = capsys.readouterr().err
    line = one_error_line(stderr)
    assert "at step 2" in line
    assert "the checkpoint of step 0 is kept" in line
    assert steps_of(folder) == [0]
    assert history(folder)[-1]["loss"] in ("inf", "nan")
    # another learning rate may go on from there
    changes = ["--learning-rate", "1e-3", "--clip-norm", "10", "--steps", "5"]
    assert main(["train", "--folder", str(folder), "--resume", *changes]) == 0
    stderr = capsys.readouterr().err
    assert "learning_rate changes from 1e+30 to 0.001" in stderr
    assert [record["step"] for record in history(folder) if "loss" in record] == list(range(1, 6))


def test_file_size_limit_is_reported_as_no_room(arguments, run, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    folder = tmp_path / "run"
    code, stderr = run([*arguments, "--folder", folder], before=limit)
    assert code == 2, stderr
    line = one_error_line(stderr)
    assert "a file size limit was reached" in line
    assert "no checkpoint had been saved" in line


@pytest.mark.slow  # as a file size limit, but with checkpoints to keep
def test_full_disk_keeps_the_last_checkpoint(baseline, arguments, run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    # room for two checkpoints and a bit
    size = sum(path.stat().st_size for path in (baseline / "checkpoints/30").rglob("*") if path.is_file())
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(2.6 * size / 1024) + 60}k", "none", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        folder = disk / "run"
        code, stderr = run([*arguments, "--folder", folder])
        assert code == 2, stderr
        line = one_error_line(stderr)
        assert "the disk is full" in line
        kept = steps_of(folder)[-1]
        assert f"the checkpoint of step {kept} is kept" in line
        # what was kept is whole: with room, the run goes on from it to the same end
        roomy = tmp_path / "roomy"
        shutil.copytree(folder, roomy)
        code, stderr = run([*arguments, "--folder", roomy, "--resume"])
        assert code == 0, stderr
        assert f"at step {kept}" in stderr
        assert "corrupt" not in stderr
        assert history(roomy) == history(baseline)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_existing_folder_without_resume_in_a_real_process(baseline, arguments, run):
    before = history(baseline)
    code, stderr = run([*arguments, "--folder", baseline])
    assert code == 2
    assert "--resume" in one_error_line(stderr)
    assert history(baseline) == before


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--tile", "1", "1", "4"], ["tile is [1, 1, 4]", "None"]),
        (["--attention", "dense"], ["attention is dense", "monarch"]),
        (["--overrides", "num_layers=1", "dim=36", "num_heads=2", "ffn_dim=48"], ["overrides is", "dim=36", "dim=24"]),
        (["--frames", "4"], ["frames is 4", "has 3"]),
        (["--seed", "5"], ["seed is 5", "has 0"]),
        (["--batch", "4"], ["batch is 4", "has 2"]),
        (["--shift", "3"], ["shift is 3.0", "has 5.0"]),
        (["--ema-decay", "None"], ["ema_decay is None", "has 0.99"]),
    ],
)
def test_resume_with_other_settings_names_both(baseline, tmp_path, capsys, change, parts):
    before = history(baseline)
    assert main(["train", "--folder", str(baseline), "--resume", *change]) == 2
    line = one_error_line(capsys.readouterr().err)
    assert "cannot resume" in line
    assert "checkpoint of step 30" in line
    assert all(part in line for part in parts), line
    assert history(baseline) == before


def test_resume_to_fewer_steps_than_were_done(baseline, capsys):
    before = (baseline / "config.json").read_text()
    assert main(["train", "--folder", str(baseline), "--resume", "--steps", "20"]) == 2
    assert "steps is 20, but" in (error := one_error_line(capsys.readouterr().err))
    assert "has 30 already; give 30 or more" in error
    assert (baseline / "config.json").read_text() == before


def test_resume_while_another_process_has_the_folder(baseline, capsys):
    with FolderLock(baseline) as lock:
        lock.take()
        assert main(["train", "--folder", str(baseline), "--resume"]) == 2
    assert "in use by another run" in one_error_line(capsys.readouterr().err)


def test_resume_with_another_clip_is_refused_and_the_same_clip_elsewhere_is_not(baseline, clip, tmp_path, capsys):
    other = make_clip(tmp_path / "other.mp4", width=80)
    assert main(["train", "--folder", str(baseline), "--resume", "--video", str(other)]) == 2
    assert "data is" in one_error_line(capsys.readouterr().err)
    folder = tmp_path / "run"
    shutil.copytree(baseline, folder)
    same = shutil.copy(clip, tmp_path / "moved.mp4")
    assert main(["train", "--folder", str(folder), "--resume", "--video", str(same)]) == 0


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (["--tile", "1", "2", "3"], ["tile", "(1, 2, 3)", "4"]),
        (["--preset", "tyny"], ["preset", "'tyny'", "'tiny'"]),
        (["--blocks", "hf,w"], ["blocks", "hf,w", "fh,w"]),
        (["--width", "30"], ["width is 30", "patch 4"]),
        (["--height", "20"], ["height is 20", "multiple of 8", "16 and 24"]),
        (["--video", "missing.mp4"], ["missing.mp4", "does not exist"]),
        (["--frames", "20"], ["frames", "20"]),
        (["--accumulation", "3"], ["accumulation is 3", "batch 2"]),
        (["--overrides", "layers=3"], ["'layers'", "num_layers"]),
        (["--implementation", "cuda"], ["cuda", "xla"]),
        (["--init-from", "nowhere"], ["nowhere", "run folder"]),
        (["--frames-per-level", "2"], ["frames_per_level is 2", "1, 3"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(arguments, tmp_path, capsys, change, parts):
    folder = tmp_path / "run"
    assert main([*arguments, "--folder", str(folder), *change]) == 2
    line = one_error_line(capsys.readouterr().err)
    assert all(part in line for part in parts), line
    assert not folder.exists()


def test_init_from_a_run_of_other_heads_is_refused(baseline, arguments, tmp_path, capsys):
    """Every shape is the same; only the settings tell."""
    other = ["--overrides", "num_layers=1", "dim=24", "num_heads=4", "ffn_dim=48"]
    assert main([*arguments, "--folder", str(tmp_path / "run"), "--init-from", str(baseline), *other]) == 2
    line = one_error_line(capsys.readouterr().err)
    assert "num_heads=2 (here: 4)" in line
    assert str(baseline) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # the demo begins like this too
def test_init_from_starts_at_the_other_runs_average(baseline, arguments, tmp_path):
    folder = tmp_path / "finetune"
    options = f"--init-from {baseline} --attention dense --steps 1 --learning-rate 1e-9 --eval-every 1".split()
    assert main([*arguments, "--folder", str(folder), *options]) == 0
    dense = history(folder)[-1]["held_out_loss"]
    monarch = history(baseline)[-1]["held_out_loss"]
    # same parameters, other attention: close, and not equal
    assert dense == pytest.approx(monarch, rel=0.02)
    assert dense != monarch
