"""Options of the command line that are given several times."""

import pytest

from monarchrt.models.generate.config import GenerateConfig
from monarchrt.train import cli
from monarchrt.train.cli.parsing import parse
from monarchrt.train.cli.roles import parse_roles
from monarchrt.train.cli.train import parse_train
from monarchrt.train.config import TrainConfig


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["evaluate", "--seeds", "1", "--seeds", "2"], "seeds"),
        (["evaluate", "--attention=dense", "--steps", "2", "--attention", "vsa"], "attention"),
        (["train", "--objective", "dmd", *("--student.lora-layers", "q", "--student.lora_layers", "ffn")],
         "student.lora-layers"),
    ],
)  # fmt: skip
def test_a_list_that_is_given_twice(arguments, option, capsys, tmp_path, monkeypatch):
    """The last alone would count, without a word; of single values that is as everywhere."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option} is given twice; give all values after one --{option}, for example")


@pytest.mark.parametrize(
    ("words", "lora", "prompt"),
    [
        ("--lora a:2 --prompt x --lora b c", ("a:2", "b", "c"), "x"),
        ("--lora=a --lora=a --prompt x --prompt y", ("a", "a"), "y"),
        ("--prompt x --lora a b", ("a", "b"), "x"),
        ("--lora=-a:2 --lora=b --lora=--c --prompt x", ("./-a:2", "b", "./--c"), "x"),
    ],
)
def test_loras_are_joined(words, lora, prompt):
    config = parse(GenerateConfig, words.split())
    assert (config.lora, config.prompt) == (lora, prompt)


@pytest.mark.parametrize(
    ("words", "overrides"),
    [
        ("--overrides dim=96 num_layers=1 --steps 3 --overrides dim=24", ("num_layers=1", "dim=24")),
        ("--overrides dim=96 --steps 3 --overrides=text_len=4 --overrides qk_norm=false",
         ("dim=96", "text_len=4", "qk_norm=false")),
    ],
)  # fmt: skip
def test_overrides_are_joined(words, overrides):
    """Of one name the later counts."""
    config = parse_roles(words.split(), default=TrainConfig())
    assert (config.model.overrides, config.run.steps) == (overrides, 3)


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ("--overrides num_layers=2", {"num_layers": 2}),
        ("--overrides=qk_norm=false --steps 3 --overrides dim=96", {"dim": 96, "qk_norm": False}),
        ("--student.overrides num_layers=2", {"num_layers": 2}),
        ("--preset tiny", {}),
    ],
)
def test_overrides_are_joined_to_those_of_the_config(options, values):
    """Else one of them would make another network, in silence, of small's."""
    small = parse_train(["--config", "small", "--video", "a.mp4"]).model.override_values()
    assert small["dim"] == 64
    assert parse_train(["--config", "small", "--video", "a.mp4", *options.split()]).model.override_values() == (
        small | values
    )


def test_overrides_of_a_role_are_joined_to_its_own(tmp_path):
    (tmp_path / "a.json").write_text(
        '{"objective": {"name": "dmd"}, "model": {"overrides": ["dim=24"]},'
        ' "roles": {"critic": {"model": {"overrides": ["dim=48", "num_layers=3"]}}}}'
    )
    options = ["--critic.overrides", "num_layers=1", "--student.overrides", "text_len=4"]
    config = parse_train(["--config", str(tmp_path / "a.json"), *options])
    assert config.model.overrides == ("dim=24", "text_len=4")
    assert config.role("critic").model.overrides == ("dim=48", "num_layers=1")
    assert config.role("teacher").model.overrides == ()


def test_overrides_without_any_are_none():
    assert parse_train(["--config", "small", "--video", "a.mp4", "--overrides"]).model.overrides == ()
