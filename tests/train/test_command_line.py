"""Settings, logs and the command line, as far as no training is needed."""

import dataclasses
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import pytest

import monarch_jax
from monarchrt.models.errors import DiskFullError, UserError, disk_full_reason, report_full_disk
from monarchrt.train import cli, header
from monarchrt.train.cli.train import parse_train
from monarchrt.train.config import (
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
    from_dict,
    to_dict,
)
from monarchrt.train.logs import RunLog, read_log
from monarchrt.train.model import attention_setting, model_settings
from monarchrt.train.objectives.settings import DMDConfig, FlowConfig
from monarchrt.train.run_folder import FolderLock, claim_folder, compare_identity, identity, read_config, write_config


def test_config_survives_json(tmp_path):
    config = TrainConfig(
        data=DataConfig(video=Path("a.mp4"), flip=True),
        model=ModelConfig(tile=(1, 2, 4), overrides=("dim=96",)),
        optimizer=OptimizerConfig(clip_norm=None, ema_decay=None),
        run=RunConfig(folder=tmp_path / "run", resume=True),
    )
    assert from_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    write_config(config)
    # how it was called is no setting of the run
    fresh = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=False))
    assert read_config(tmp_path / "run") == fresh


def test_damaged_config_is_an_error(tmp_path):
    for damaged in (b'{"data": ', b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(damaged)
        with pytest.raises(UserError, match=r"config\.json is damaged"):
            read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"date": {}}')
    with pytest.raises(UserError, match="no field date"):
        read_config(tmp_path)


def test_options_have_no_prefix_and_mean_what_they_say():
    network = ["--tile", "1", "4", "7", "--overrides", "num_layers=2", "dim=96"]
    config = parse_train(["--video", "a.mp4", *network, "--clip-norm", "None", "--flip", "--steps", "7"])
    assert config.data.video == Path("a.mp4")
    assert config.data.flip
    assert config.model.tile == (1, 4, 7)
    assert config.model.override_values() == {"num_layers": 2, "dim": 96}
    assert config.optimizer.clip_norm is None
    assert config.run.steps == 7


def test_resume_takes_what_is_not_given_from_the_folder(tmp_path):
    write_config(TrainConfig(data=DataConfig(video=Path("a.mp4"), flip=True), run=RunConfig(folder=tmp_path, steps=9)))
    for form in (["--folder", str(tmp_path)], [f"--folder={tmp_path}"]):
        config = parse_train([*form, "--resume", "--batch", "8"])
        assert config.run.resume
        assert (config.run.steps, config.run.batch, config.data.video) == (9, 8, Path("a.mp4"))
        assert config.data.flip
    # what was given the first time may be given again
    assert parse_train(["--folder", str(tmp_path), "--resume", "--flip", "--video", "a.mp4"]).data.flip
    assert parse_train(["--folder", str(tmp_path)]).run.steps == RunConfig().steps


@pytest.mark.parametrize("part", [field.name for field in dataclasses.fields(TrainConfig) if field.name != "roles"])
def test_every_option_is_explained_in_the_help(part, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_train(["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    text = text[text.index("--help") :]  # after the examples
    assert "None)" not in text.replace("--clip-norm {None}|FLOAT", "")
    for field in dataclasses.fields(getattr(TrainConfig(), part)):
        start = text.index(
            f"--{field.name.replace('_', '-')}" + (", --no-" if isinstance(field.default, bool) else " ")
        )
        # a sentence between this option and the next
        explanation = re.split(r"(?<!,) --", text[start:])[0]
        assert len(explanation.split()) > 4, field.name
        assert "." in explanation, field.name


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (DataConfig, "frames", 0),
        (DataConfig, "held_out", 1.0),
        (DataConfig, "width", 30),
        (ModelConfig, "num_iters", 0),
        (ModelConfig, "overrides", ("dim",)),
        (FlowConfig, "shift", float("inf")),
        (OptimizerConfig, "learning_rate", 0.0),
        (OptimizerConfig, "learning_rate", float("inf")),
        (OptimizerConfig, "weight_decay", float("nan")),
        (OptimizerConfig, "ema_decay", 1.0),
        (OptimizerConfig, "accumulation", 0),
        (RunConfig, "steps", 0),
        (RunConfig, "checkpoint_every", 0),
        (RunConfig, "seed", -1),
        (RunConfig, "steps", 10**9),
    ],
)
def test_values_out_of_range_name_field_and_value(kind, field, value):
    with pytest.raises(UserError) as caught:
        kind(**{field: value})
    assert field in str(caught.value)
    assert str(value[0] if isinstance(value, tuple) else value) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tile", (1, 2, 2)),
        ("blocks", "h,fw"),
        ("num_iters", 2),
        ("implementation", "xla"),
        ("keep_intermediates", True),
    ],
)
def test_settings_of_monarch_need_monarch(name, value):
    with pytest.raises(UserError, match=f"{name} is .* {name} needs attention 'monarch'"):
        ModelConfig(attention="dense", **{name: value})


def test_settings_of_clips_are_refused_with_latents():
    DataConfig(latents=Path("folder"), held_out=0.5)
    with pytest.raises(UserError, match="flip is True, but latents are taken as they are in folder"):
        DataConfig(latents=Path("folder"), flip=True)
    with pytest.raises(UserError, match="frames is 21, but latents"):
        DataConfig(latents=Path("folder"), frames=21)


def test_model_settings_follow_the_config():
    settings = model_settings(
        ModelConfig(tile=(1, 2, 4), remat="full", overrides=("num_layers=3",)), channels=48, precision="bf16"
    )
    assert (settings.num_layers, settings.in_channels, settings.out_channels) == (3, 48, 48)
    assert (settings.dtype, settings.param_dtype, settings.remat) == ("bfloat16", "float32", "full")
    assert settings.attention == attention_setting(ModelConfig(tile=(1, 2, 4)))
    with pytest.raises(UserError, match="overrides names dtype"):
        model_settings(ModelConfig(overrides=("dtype=float16",)))


SIZES = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "image_dim")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", ["2000000000", "9" * 4000], ids=len)
def test_sizes_beyond_any_network_are_refused_in_a_few_words(name, size):
    """At once: each layer is an object, and the numbers of a matrix are allocated."""
    overrides = (f"num_heads={size}", f"dim={size[:-1]}0") if name == "num_heads" else (f"{name}={size}",)
    with pytest.raises(UserError, match=r"=\d{10,}(\.\.\.)? is too large; it should be at most") as caught:
        model_settings(ModelConfig(overrides=overrides))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("override", ["x" * 5000, "x" * 5000 + "=1", "remat"])
def test_a_long_override_is_shown_in_part(override):
    with pytest.raises(UserError, match=r"overrides has|is not a field") as caught:
        model_settings(ModelConfig(overrides=(override,)))
    assert len(str(caught.value)) < 600


def test_a_message_ends(capsys):
    """Whatever of the input it repeats."""
    assert cli.main(["x" * 100_000]) == 2
    assert cli.main(["x " * 100_000]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("error: command ")
        assert line.endswith("completion")
        assert len(line) < 4100


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    folder = tmp_path / "runs" / "a"
    with FolderLock(folder) as lock:
        lock.take()
        lock.take()
        with FolderLock(folder) as other, pytest.raises(UserError, match="in use by another run; wait for it"):
            other.take()
    with FolderLock(folder) as later:
        later.take()
    (tmp_path / "file").write_text("")
    with FolderLock(tmp_path / "file" / "a") as lock, pytest.raises(UserError, match="cannot be written to"):
        lock.take()


@pytest.mark.parametrize("exists", [False, True])
def test_nothing_to_resume(tmp_path, capsys, exists):
    folder = tmp_path / "run"
    if exists:
        folder.mkdir()
    assert cli.main(["train", "--folder", str(folder), "--resume"]) == 2
    assert f"error: folder {folder} holds no run to resume; give the folder of one, or start" in capsys.readouterr().err
    assert cli.main(["train", "--folder", str(folder)]) == 2
    assert "neither video nor latents was given" in capsys.readouterr().err
    assert folder.exists() == exists


def test_claim_folder(tmp_path):
    claim_folder(TrainConfig(run=RunConfig(folder=tmp_path)))  # empty
    claim_folder(TrainConfig(run=RunConfig(folder=tmp_path / "new")))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        claim_folder(TrainConfig(run=RunConfig(folder=tmp_path / "file")))
    with pytest.raises(UserError, match="holds other files, and no run"):
        claim_folder(TrainConfig(run=RunConfig(folder=tmp_path)))
    write_config(TrainConfig(run=RunConfig(folder=tmp_path)))
    with pytest.raises(UserError, match="--resume"):
        claim_folder(TrainConfig(run=RunConfig(folder=tmp_path)))
    claim_folder(TrainConfig(run=RunConfig(folder=tmp_path, resume=True)))


def test_identity_leaves_out_places_and_lengths_but_not_content():
    def of(fingerprint="x", **run):
        config = TrainConfig(data=DataConfig(video=Path(run.pop("video", "a"))), run=RunConfig(**run))
        return identity(config, fingerprint=fingerprint)

    assert of() == of(video="b", steps=999, folder=Path("elsewhere"), keep=9, resume=True)
    assert of() != of(fingerprint="y")
    assert of() != of(batch=8)
    assert of() != of(precision="bf16")


def test_a_decaying_schedule_remembers_where_it_ends():
    def of(steps, **optimizer):
        return identity(
            TrainConfig(optimizer=OptimizerConfig(**optimizer), run=RunConfig(steps=steps)), fingerprint="x"
        )

    assert of(10) == of(20)
    notes = compare_identity(of(10, schedule="cosine"), of(20, schedule="cosine"), step=1, folder=Path("run"))
    assert notes == ["note: decay_steps changes from 10 to 20"]


def test_an_end_of_a_learning_rate_that_stays_is_warned_of():
    def lines(objective, **optimizer):
        return header.undecayed(TrainConfig(objective=objective, optimizer=OptimizerConfig(**optimizer)), "student")

    said = "warning: {0}decay_steps is 9, but {0}schedule is constant, .*; give --{0}schedule cosine or linear"
    for objective, prefix in ((FlowConfig(), ""), (DMDConfig(), r"student\.")):
        (line,) = lines(objective, decay_steps=9)
        assert re.fullmatch(said.format(prefix), line)
        assert lines(objective) == lines(objective, decay_steps=9, schedule="linear") == []


def test_a_run_that_ends_before_its_warm_up_or_average_is_warned_of():
    def lines(objective, **optimizer):
        optimizer = OptimizerConfig(**optimizer)
        return header.not_reached(
            TrainConfig(objective=objective, optimizer=optimizer, run=RunConfig(steps=5)), "student"
        )

    for objective, prefix in ((FlowConfig(), ""), (DMDConfig(), "student.")):
        assert lines(objective, warmup=5, ema_start=4) == lines(objective, ema_decay=None) == []
        (line,) = lines(objective, warmup=6)
        assert line.startswith(
            f"warning: {prefix}warmup is 6 and the run has 5 steps, so the learning rate stays below"
        )
        (line,) = lines(objective, ema_start=5)
        assert line.startswith(f"warning: {prefix}ema_start is 5 and the run has 5 steps, so the moving average is")
        (line,) = lines(objective, ema_start=4, ema_decay=None)
        assert line == f"warning: {prefix}ema_start is 4, but {prefix}ema_decay is None, so there is no moving average"


def test_fewer_held_out_examples_than_asked_for_are_noted():
    said = "held out, so the held-out loss uses"
    assert header.few_examples(3, 4) == [f"note: only 3 examples are {said} 3 instead of --eval-windows 4"]
    assert header.few_examples(1, 4) == [f"note: only 1 example is {said} 1 instead of --eval-windows 4"]
    assert header.few_examples(4, 4) == []


def test_an_attention_that_was_written_otherwise_is_the_same():
    """Notation that left out what it says now, in a checkpoint of before."""

    def of(attention):
        return identity(TrainConfig(model=ModelConfig(attention=attention)), fingerprint="x")

    now = of("vsa(gate=False, implementation=xla)")
    before = now | {"attention": "vsa(gate=False)", "implementation": "vsa(implementation='xla', gate=False)"}
    assert now["attention"] == "vsa(keep=0.1, gate=False)"
    assert compare_identity(before, now, step=1, folder=Path("run")) == []
    with pytest.raises(UserError, match=r"attention is vsa\(keep=0.2, gate=False\), but the checkpoint"):
        compare_identity(before, of("vsa(keep=0.2, gate=False)"), step=1, folder=Path("run"))


def test_optimizer_changes_are_noted():
    saved, wanted = {"learning_rate": 0.1, "dim": 3}, {"learning_rate": 0.2, "dim": 3}
    notes = compare_identity(saved, wanted, step=1, folder=Path("run"))
    assert notes == ["note: learning_rate changes from 0.1 to 0.2"]


def test_log_is_cut_back_to_the_step_it_goes_on_from(tmp_path):
    with RunLog(tmp_path, step=0) as log:
        for step in range(1, 6):
            log.write(step, {"loss": 1 / step})
        log.write(5, {"held_out_loss": float("nan")})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    assert len(read_log(tmp_path)) == 6
    assert read_log(tmp_path)[-1] == {"step": 5, "held_out_loss": "nan"}
    with RunLog(tmp_path, step=3) as log:
        log.write(4, {"loss": 9.0})
    assert [(record["step"], record["loss"]) for record in read_log(tmp_path)] == [(1, 1), (2, 0.5), (3, 1 / 3), (4, 9)]


def test_what_is_not_finite_is_in_the_log_alone(tmp_path, caplog, capfd):
    """TensorBoard's library would print a warning for each."""
    with RunLog(tmp_path, step=0) as log:
        log.write(1, {"loss": float("nan"), "grad_norm": float("-inf")})
    assert read_log(tmp_path) == [{"step": 1, "loss": "nan", "grad_norm": "-inf"}]
    assert (caplog.text, capfd.readouterr().err) == ("", "")


def test_full_disk_is_recognised_through_other_libraries_errors():
    assert disk_full_reason(ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']"))
    chained = RuntimeError("failed")
    chained.__cause__ = OSError(28, "no room")
    assert disk_full_reason(chained)
    assert disk_full_reason(ValueError("other")) is None
    with pytest.raises(DiskFullError, match="cannot write here: the disk is full; all is well"), \
            report_full_disk("here", kept=lambda: "all is well"):  # fmt: skip
        raise OSError(28, "No space left on device")
    with pytest.raises(KeyError), report_full_disk("here"):
        raise KeyError("x")


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (UserError("tile is\n  wrong"), 2, "error: tile is wrong\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device; free some space\n"),
        (PermissionError(13, "Permission denied", "/a/b"), 2, "error: /a/b: Permission denied\n"),
        (MemoryError("9 TiB"), 2, "error: the machine's memory is used up: 9 TiB\n"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
            2,
            "error: the device's memory is used up: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.; make the "
            "batch, the clip or the network smaller\n",
        ),
    ],
)
def test_exit_codes(monkeypatch, capsys, raised, code, text):
    def command(arguments):
        raise raised

    monkeypatch.setitem(sys.modules, f"{cli.__name__}.fake", types.SimpleNamespace(fake_command=command))
    monkeypatch.setitem(cli.COMMANDS, "fake", "raises")
    monkeypatch.delenv(cli.DEBUG_VARIABLE, raising=False)
    assert cli.main(["fake"]) == code
    assert capsys.readouterr().err == text
    if isinstance(raised, UserError):
        with pytest.raises(UserError):
            cli.main(["--debug", "fake"])


@pytest.mark.parametrize("bug", [ValueError("a bug"), jax.errors.JaxRuntimeError("INTERNAL: a bug")])
def test_bugs_keep_their_traceback(monkeypatch, bug):
    def command(arguments):
        raise bug

    monkeypatch.setitem(sys.modules, f"{cli.__name__}.fake", types.SimpleNamespace(fake_command=command))
    monkeypatch.setitem(cli.COMMANDS, "fake", "raises")
    with pytest.raises(type(bug), match="a bug"):
        cli.main(["fake"])


class Module:
    """Stands in for a module: Ctrl-C comes while a command imports from it."""

    def __init__(self):
        self.finished = False

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if not self.finished:
            signal.raise_signal(signal.SIGINT)
        self.finished = True
        return pytest.fail


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("monarchrt.train.cli.train", ["train"]),
        ("monarchrt.train.loop", ["train", "--video", "a.mp4", "--preset", "tiny", "--folder", "no/such/folder"]),
        ("monarchrt.train.demo.run", ["demo", "--folder", "no/such/folder"]),
        ("monarchrt.models.generate.make", ["generate", "--checkpoint", "no/such/checkpoint"]),
    ],
)
def test_ctrl_c_waits_for_the_imports(monkeypatch, capsys, module, arguments):
    """Broken off, an import may swallow it and print a traceback."""
    stand_in = Module()
    monkeypatch.setitem(sys.modules, module, stand_in)
    assert cli.main(arguments) == 130
    assert capsys.readouterr().err == "stopped\n"
    assert stand_in.finished


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["generate", "--checkpoint", ""], "checkpoint"),
        (["generate", "--checkpoint=", "--prompt", "a"], "checkpoint"),
        (["generate", "--lora", "a.safetensors", ""], "lora"),
        (["generate", "--from", ""], "from"),
        (["train", "--init-from", "", "--folder", "run"], "init_from"),
        (["train", "--student.init-from", ""], "student.init_from"),
        (["inspect", ""], "an argument"),
        (["convert", "a", ""], "an argument"),
    ],
)
def test_an_empty_value_is_no_folder(arguments, name, capsys, tmp_path, monkeypatch):
    """As a path it would be the one that one is in."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    said = f"error: {name} is empty, perhaps from a variable that is not set; give a value, or leave it out\n"
    assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"monarchrt {monarch_jax.__version__}\n"


def test_help_into_a_pipe_that_closes():
    command = f"'{sys.executable}' -m monarchrt generate --help | head -n 1"
    done = subprocess.run(command, shell=True, cwd=Path(cli.__file__).parents[3], capture_output=True, text=True)
    assert "usage: monarchrt generate" in done.stdout
    assert done.stderr == ""


class Unread(io.StringIO):
    """What is printed fails when it is written, at once or by `flush`."""

    null: Any

    def __init__(self, error, *, at_once):
        super().__init__()
        self.error, self.at_once = error, at_once

    def write(self, text):
        if self.at_once:
            raise self.error
        return len(text)

    def flush(self):
        raise self.error

    def fileno(self):
        return self.null.fileno()


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("asked", [["--help"], ["--version"], ["inspect", "--help"], []], ids=str)
def test_nobody_reads_what_is_printed(asked, at_once, tmp_path, monkeypatch, capsys):
    """`monarchrt --help | true`, also where each line is written at once."""
    stream = Unread(BrokenPipeError(), at_once=at_once)
    with open(tmp_path / "there", "w") as stream.null:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(asked) == 0
    assert capsys.readouterr().err == ""


def test_there_is_no_room_for_what_is_printed(tmp_path, monkeypatch, capsys):
    stream = Unread(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), at_once=False)
    with open(tmp_path / "there", "w") as stream.null:
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(["--version"]) == 2
    assert capsys.readouterr().err.endswith("; free some space\n")


def test_help_does_not_load_jax():
    program = (
        "import sys; from monarchrt.train.cli import main\n"
        "try:\n  main(['train', '--help'])\nexcept SystemExit: pass\n"
        "sys.exit('jax' in sys.modules or 'orbax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(cli.__file__).parents[3]).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--lerning-rate", "3"], ["--lerning-rate", "--learning-rate FLOAT"]),
        (["train", "--steps", "many"], ["--steps", "'many'"]),
        (["train", "--attention", "sparse"], ["attention=", "'sparse'", "kinds: dense, monarch"]),
        (["demo", "--sed", "1"], ["--sed", "--seed INT"]),
        (["train", "--tile", "1", "2"], ["--tile cannot be read", "expected argument count 3"]),
        (["convert", "from"], ["DST", "the folder to write"]),
    ],
)
def test_wrong_options_are_one_line_that_names_them(arguments, named, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not set("╭│╰─[") & set(error)
    for part in named:
        assert part in error
