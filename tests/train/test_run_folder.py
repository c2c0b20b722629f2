"""No start loses what a folder holds: without what it needs to go on, a run is refused and nothing is touched."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from monarchrt.models.errors import UserError
from monarchrt.train.cli import main
from monarchrt.train.cli.parsing import read_settings
from monarchrt.train.cli.train import parse_train, takes_small
from monarchrt.train.config import DataConfig, RunConfig, TrainConfig, replace_settings, to_dict
from monarchrt.train.demo.config import DemoConfig, dense_run
from monarchrt.train.logs import RunLog, read_log
from monarchrt.train.model import model_settings
from monarchrt.train.objectives.registry import objective_names, settings_class
from monarchrt.train.run_folder import claim_folder, compare_identity, identity, read_config, write_config

from .conftest import contents


def empty_checkpoints(run):
    for path in (run / "checkpoints").iterdir():
        shutil.rmtree(path)


def only(*names):
    def keep(run):
        for path in run.iterdir():
            if path.name not in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return keep


def set_aside(run):
    (run / "unreadable_checkpoints").mkdir()
    (run / "checkpoints/30").rename(run / "unreadable_checkpoints/30")
    only("config.json", "unreadable_checkpoints")(run)


def with_samples(run):
    (run / "samples").mkdir()
    (run / "samples/step_000006.mp4").write_bytes(b"film")
    only("config.json", "samples")(run)


def unfinished_save(run):
    (run / "checkpoints/30").rename(run / "checkpoints/30.orbax-checkpoint-tmp-7")
    for step in (24, 28):
        shutil.rmtree(run / f"checkpoints/{step}")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda run: shutil.rmtree(run / "checkpoints"), "the log of a run up to step 30"),
        (empty_checkpoints, "the log of a run up to step 30"),
        (unfinished_save, "the log of a run up to step 30"),
        (only("log.jsonl"), "the log of a run up to step 30"),
        (only("config.json", "log.jsonl"), "the log of a run up to step 30"),
        (only("tensorboard"), "the TensorBoard files of a run whose log is gone"),
        (only("config.json", "tensorboard"), "the TensorBoard files of a run whose log is gone"),
        (set_aside, "checkpoints of a run that were set aside as unreadable"),
        (with_samples, "samples of a run"),
    ],
)
@pytest.mark.parametrize("resume", [["--resume"], []])
def test_what_is_left_of_a_run_is_not_run_over(baseline, arguments, tmp_path, capsys, damage, said, resume):
    folder = tmp_path / "run"
    shutil.copytree(baseline, folder)
    damage(folder)
    before = contents(folder)
    assert main([*arguments, "--folder", str(folder), *resume]) == 2
    error = capsys.readouterr().err
    assert f"error: folder {folder} holds {said}, and no checkpoint to continue from; nothing was changed" in error
    assert "give another --folder" in error
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"holiday.jpg": "x"}, "holds other files, and no run"),
        ({"config.json": '{"_class_name": "WanModel"}', "model.safetensors": "x"}, "is not the config.json of a run"),
        ({"config.json": "[" * 100_000}, "config.json is damaged"),
        ({"config.json": '{"run": ' + "9" * 5000 + "}"}, "config.json is damaged"),
        ({"config.json": "[1]"}, "is not the config.json of a run"),
        ({"config.json": '{"run": {"steps": "many"}}'}, "steps is 'many'; it must be a whole number"),
        ({"config.json": '{"run": {"steps": 2.5}}'}, "steps is 2.5; it must be a whole number"),
        ({"config.json": '{"model": {"tile": [1, 2]}}'}, "tile is [1, 2]; it must have 3 entries"),
        ({"config.json": '{"model": {"attention": "sparse"}}'}, "'sparse' is not a kind of attention; kinds: dense"),
        ({"config.json": '{"data": {"flip": 1}}'}, "flip is 1; it must be true or false"),
        ({"config.json": '{"optimizer": {"eps": 1' + "0" * 400 + "}}"}, "it must be a number"),
    ],
)
def test_a_folder_of_something_else_is_not_resumed(arguments, tmp_path, capsys, files, said):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    assert main([*arguments, "--folder", str(tmp_path), "--resume"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert len(error) < 900
    assert contents(tmp_path) == before


def test_a_run_that_had_no_checkpoint_yet_begins_again_but_not_as_another(tmp_path):
    def config(**run):
        return TrainConfig(run=RunConfig(folder=tmp_path, resume=True, **run))

    write_config(config(seed=3))
    with RunLog(tmp_path, step=-1) as log:
        log.write(0, {"held_out_loss": 1.0})  # of a start from another run
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".DS_Store").touch()
    claim_folder(config(seed=3, steps=7))
    with pytest.raises(UserError, match=r"settings of another run, .*: seed is 3 there and 4 here; use that value"):
        claim_folder(config(seed=4))


def test_a_file_browsers_file_does_not_fill_a_folder(tmp_path):
    (tmp_path / ".DS_Store").touch()
    claim_folder(TrainConfig(run=RunConfig(folder=tmp_path)))


def test_lines_that_a_resume_goes_back_before_are_kept(tmp_path):
    with RunLog(tmp_path, step=-1) as log:
        for step in range(1, 6):
            log.write(step, {"loss": float(step)})
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'\xff\xfe broken\n{"step": 6, "loss": 6}\n[7]\n{"step": 7, "lo')
    assert [record["step"] for record in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]
    for step in (6, 4):
        RunLog(tmp_path, step=step).close()
        assert [record["step"] for record in read_log(tmp_path)] == list(range(1, step + 1))
    dropped = (tmp_path / "log_dropped.jsonl").read_bytes().splitlines()
    assert dropped[:3] == [b"\xff\xfe broken", b"[7]", b'{"step": 7, "lo']
    assert [json.loads(line)["step"] for line in dropped[3:]] == [5, 6]


def test_a_checkpoint_from_before_there_was_a_setting_has_its_default(tmp_path):
    now = identity(TrainConfig(), fingerprint="x")
    before = {name: value for name, value in now.items() if name not in ("fps", "trainable", "flip")}
    assert compare_identity(before, now, step=1, folder=tmp_path) == []
    with pytest.raises(UserError, match=r"flip is True, but the checkpoint of step 1 in .* has False"):
        compare_identity(before, now | {"flip": True}, step=1, folder=tmp_path)


@pytest.mark.parametrize("name", objective_names())
def test_so_has_every_setting_of_objectives_and_roles(name, tmp_path):
    now = identity(TrainConfig(objective=settings_class(name)()), fingerprint="x")
    fields = {field.name for field in dataclasses.fields(settings_class(name))} & now.keys()
    assert fields
    of_roles = {key for key in now if key.endswith((".lora_rank", ".lora_alpha", ".trainable"))}
    before = {key: value for key, value in now.items() if key not in fields | of_roles}
    assert compare_identity(before, now, step=1, folder=tmp_path) == []


class TestSettingsFile:
    def test_options_go_before_the_file_and_the_file_before_the_folder(self, tmp_path):
        write_config(TrainConfig(run=RunConfig(folder=tmp_path / "run", steps=9, batch=8, seed=5)))
        toml = tmp_path / "settings.toml"
        toml.write_text(f'steps = 7\nbatch = 2\nfolder = "{tmp_path}/run"\n[model]\ntile = [1, 4, 7]\n')
        for form in (["--config", str(toml)], [f"--config={toml}"]):
            config = parse_train([*form, "--batch", "1", "--resume"])
            assert (config.run.steps, config.run.batch, config.run.seed, config.model.tile) == (7, 1, 5, (1, 4, 7))
            assert config.run.folder == tmp_path / "run"
            assert parse_train(form).run.seed == RunConfig().seed

    def test_the_config_of_a_run_is_one(self, baseline, tmp_path):
        config = parse_train(["--config", str(baseline / "config.json"), "--folder", str(tmp_path)])
        found = read_config(baseline)
        assert found is not None
        assert (config.data, config.model, config.run.steps) == (found.data, found.model, found.run.steps)
        assert config.run.folder == tmp_path

    def test_small_are_the_settings_of_the_demo(self, tmp_path):
        demo = to_dict(dense_run(DemoConfig(video=Path("a.mp4"), folder=tmp_path)))
        options = ["--video", "a.mp4", "--attention", "dense", "--folder", str(tmp_path / "dense")]
        ours = to_dict(parse_train(["--config", "small", *options]))
        often = {"eval_every": 100, "checkpoint_every": 100, "keep": 3}
        assert ours == demo | {"run": demo["run"] | often}

    def test_small_is_taken_where_nothing_is_said_of_the_network(self, tmp_path):
        """Else a video of plain defaults would end in noise: a token of 192 numbers in a network 96 wide."""
        small = parse_train(["--config", "small", "--video", "a.mp4", "--steps", "7"])
        assert parse_train(["--video=a.mp4", "--steps=7", "--objective=flow"]) == small
        (tmp_path / "a.toml").write_text("steps = 7\n")
        for other in (
            ["--preset", "tiny"],
            ["--overrides", "dim=96"],
            ["--overrides=dim=96"],
            ["--config", str(tmp_path / "a.toml")],
            ["--resume"],
            ["--init-from", str(tmp_path)],  # no run
            ["--objective", "ode", "--latents", "a"],
        ):
            assert not takes_small(["--video", "a.mp4", *other])
        assert not takes_small(["--latents", "a"])
        assert parse_train(["--video", "a.mp4", "--preset", "tiny"]).data.patch == DataConfig().patch
        network = replace_settings(TrainConfig(), read_settings(Path("small")))
        settings = model_settings(network.model, channels=3 * network.data.patch**2)
        assert settings.patch_features <= settings.dim

    @pytest.mark.parametrize(
        ("name", "text", "said"),
        [
            ("no.toml", None, "cannot be read: No such file"),
            ("a.yaml", "steps: 7", "ends in neither .toml nor .json"),
            ("a.toml", "steps = ", "is not TOML"),
            ("a.json", "[" * 100_000, "is not JSON"),
            ("a.json", "[]", "holds no settings by name"),
            ("a.toml", 'folder = "café"'.encode("cp1252"), "is not UTF-8 (byte 14 is 0xe9), probably cp1252; "),
            ("a.toml", "step = 7", "there is no setting step; did you mean steps"),
            ("a.toml", 'steps = "7"', "steps is '7'; it must be a whole number"),
            ("a.toml", "steps = 7\n[run]\nsteps = 8", "steps is given twice"),
            ("a.toml", "run = 7", "run is 7; it must be a table"),
            ("a.toml", "[run]\nstep = 7", "there is no setting step; did you mean steps"),
            ("a.toml", "steps = 0", "steps is 0; it must be at least 1"),
            ("a.json", f'{{"steps": {10**40}}}', "steps is 1000000000000000000000000000000000000...; it must be"),
            ("a.toml", "batch = 10000000000", "batch is 10000000000; it must be at most 100000"),
            ("a.toml", "warmup = 10000000000", "warmup is 10000000000; it must be at most 1000000000"),
            ("a.toml", "eval_timesteps = 1_000_000_000_000", "eval_timesteps is 1000000000000; it must be at most"),
        ],
    )
    def test_what_is_wrong_in_it_names_the_file(self, tmp_path, capsys, name, text, said):
        path = tmp_path / name
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert main(["train", "--config", str(path)]) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert said in error
        assert error.count("\n") == 1

    @pytest.mark.parametrize(
        "words", [["--config"], ["--config", "--resume"], ["--config", "a.toml", "--config=b.toml"]]
    )
    def test_it_is_one_file(self, words, capsys):
        assert main(["train", *words]) == 2
        assert "error: config is " in capsys.readouterr().err
