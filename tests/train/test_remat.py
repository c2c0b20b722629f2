"""`train --remat auto`: the least recomputation that fits, of figures by hand and of a real run."""

import json

import jaxtyping
import numpy as np
import pytest

from monarchrt.models.checkpoints.tensor_files import write_arrays
from monarchrt.models.errors import UserError
from monarchrt.models.generate.runs import CONFIG_NAME
from monarchrt.models.wan import config as wan
from monarchrt.train import programs
from monarchrt.train.cli import main
from monarchrt.train.cli.roles import parse_roles
from monarchrt.train.config import AUTO, REMAT, ModelConfig, RoleConfig, TrainConfig, from_dict, to_dict
from monarchrt.train.model import model_settings
from monarchrt.train.objectives.settings import DMDConfig
from monarchrt.train.remat import automatic, choose, with_remat
from monarchrt.train.run_folder import compare_identity

GIB = 2**30


def chosen(available, figures, estimates=None, **options):
    """The choice, and which kinds were compiled, of GiB by kind."""
    compiled, estimates = [], estimates or figures

    def compile_(kind):
        compiled.append(kind)
        return None if figures[kind] is None else figures[kind] * GIB

    def estimate(kind):
        return estimates[kind] * GIB

    choice = choose(("student",), available=available * GIB, estimate=estimate, compiled=compile_, **options)
    return choice, compiled


FIGURES = {"none": 150, "cheap": 71, "dots": 50, "attention": 20, "full": 18}


@pytest.mark.parametrize(
    ("available", "kind", "looked_at"),
    [
        (180, "none", ["none"]),
        (160, "cheap", ["none", "cheap"]),  # 150 of 160 leave too little
        (141, "cheap", ["none", "cheap"]),
        (119, "cheap", ["cheap"]),  # 150 is so far beyond that it is not compiled
        (75, "dots", ["cheap", "dots"]),
        (24, "attention", ["attention"]),
        (20, "full", ["attention", "full"]),
        (10, "full", ["full"]),
    ],
)
def test_the_least_that_fits(available, kind, looked_at):
    choice, found = chosen(available, FIGURES)
    assert (choice.kind, found) == (kind, looked_at)
    assert choice.fits == (available > 10)


def test_one_line_says_what_and_why():
    line = str(chosen(119, FIGURES)[0])
    assert line == "remat auto: cheap takes 71 GiB of 119 GiB on each device; none takes 150 GiB (estimate)"
    said = "remat auto: none takes 150 GiB of 200 GiB on each device, and nothing is recomputed"
    assert str(chosen(200, FIGURES)[0]) == said
    assert str(chosen(10, FIGURES)[0]).endswith("attention takes 20 GiB (estimate), and nothing takes less")


def test_compilers_that_say_nothing_leave_the_estimate():
    choice, _ = chosen(141, dict.fromkeys(FIGURES), FIGURES)
    assert choice.kind == "cheap"
    assert str(choice).startswith("remat auto: cheap takes 71 GiB (estimate) of 141 GiB")


def test_another_process_has_less_memory():
    """It fits here, and not there: all take the same."""
    answers = iter([False, False, True])
    choice, compiled = chosen(180, FIGURES, agreed=lambda fits: next(answers) and fits)
    assert (choice.kind, compiled) == ("dots", ["none", "cheap", "dots"])


@pytest.fixture
def unchecked():
    """Annotations are not checked, as in a user's program."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_kinds_are_those_of_the_network(unchecked):
    assert set(REMAT) == set(wan.REMAT)
    assert model_settings(ModelConfig(remat="cheap")).remat == "cheap"
    assert model_settings(ModelConfig(remat=AUTO)).remat == "full"
    with pytest.raises(UserError, match="remat is 'some'; choose from none, cheap, dots, attention, full, auto"):
        ModelConfig(remat="some")  # type: ignore[arg-type]


def test_what_was_a_flag_is_read(unchecked):
    assert [ModelConfig(remat=flag).remat for flag in (True, False)] == ["full", "none"]  # type: ignore[arg-type]
    stored = to_dict(ModelConfig())
    assert from_dict(ModelConfig, stored | {"remat": True}).remat == "full"
    with pytest.raises(UserError, match="remat is 3; choose from none, cheap"):
        from_dict(ModelConfig, stored | {"remat": 3})
    same = {"remat": True, "student.remat": False}, {"remat": "full", "student.remat": "none"}
    assert compare_identity(*same, step=1, folder=None) == []  # type: ignore[arg-type]
    assert compare_identity({"remat": True}, {"remat": AUTO}, step=1, folder=None) == [  # type: ignore[arg-type]
        "note: remat changes from full to auto"
    ]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["--remat"], "full"),
        (["--remat", "--steps", "3"], "full"),
        (["--no-remat"], "none"),
        (["--remat", "auto"], "auto"),
        (["--remat=cheap"], "cheap"),
        (["--student.remat", "--steps", "3"], "full"),
        ([], "none"),
    ],
)
def test_options(words, kind):
    assert parse_roles(words, default=TrainConfig()).model.remat == kind


def test_each_role_has_its_own():
    config = TrainConfig(
        model=ModelConfig(remat=AUTO),
        objective=DMDConfig(),
        roles={
            "critic": RoleConfig(model=ModelConfig(remat="dots")),
            "teacher": RoleConfig(model=ModelConfig(remat=AUTO), optimizer=None),
        },
    )
    assert automatic(config) == ("student",)  # a teacher keeps nothing
    assert automatic(config, given=("student",)) == ()
    changed = with_remat(config, ("student",), "cheap")
    assert {name: changed.role(name).model.remat for name in ("student", "critic", "teacher")} == {
        "student": "cheap",
        "critic": "dots",
        "teacher": AUTO,
    }


@pytest.mark.slow  # test_plan.py has the choice that a plan makes
def test_a_run_and_what_it_says(tmp_path, monkeypatch, capsys):
    """With so little memory that what all but one kind keep is too much for it; the choice is not a setting."""
    arrays = {"latents": np.ones((3, 4, 4, 16), np.float32), "text": np.zeros((2, 4), np.float32)}
    for number in range(2):
        write_arrays(tmp_path / f"latents/{number}.safetensors", arrays, metadata={})
    monkeypatch.setattr(programs, "device_memory", lambda device: 3 * 2**15)
    network = ["num_layers=2", "dim=12", "num_heads=1", "ffn_dim=16", "text_dim=4", "text_len=2", "freq_dim=16"]
    arguments = ["train", "--latents", tmp_path / "latents", "--overrides", *network, "--attention", "dense"]
    arguments += ["--batch", 1, "--held-out", 0.4, "--steps", 1, "--remat", "auto", "--folder", tmp_path / "run"]
    assert main(list(map(str, arguments))) == 0
    said = capsys.readouterr().err
    assert "remat auto: full takes " in said
    assert "of 96 KiB on each device; none takes " in said
    assert said.count("(estimate)") == len(REMAT) - 1
    assert json.loads((tmp_path / "run" / CONFIG_NAME).read_text())["model"]["remat"] == AUTO
