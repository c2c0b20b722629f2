"""What a newcomer types: help, mistyped commands, words without an option, what is missing."""

import pytest

from monarchrt.train import cli


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("evaluate", "--mesh"),
        ("convert", "--mesh"),
        ("inspect", "--sharding"),
        ("study map", "--mesh"),
        ("pairs", "--mesh"),
    ],
)
@pytest.mark.parametrize("between", [" ", "="])
def test_a_mesh_where_none_is_taken(capsys, command, option, between):
    assert cli.main(f"{command} {option}{between}fsdp".split()) == 2
    said = f"error: monarchrt {command} takes no {option}: it uses one device, also for networks trained on a mesh; "
    assert capsys.readouterr().err == f"{said}leave {option} out\n"


def test_other_options_that_do_not_exist_say_so(capsys):
    assert cli.main(["generate", "--sharding", "fsdp"]) == 2  # there is a mesh
    assert capsys.readouterr().err.startswith("error: Unrecognized options: --sharding, fsdp")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            ["generate", "a cat"],
            "'a cat' belongs to no option; give the option before it, for example --prompt 'a cat'",
        ),
        (["serve", "a cat"], "'a cat' belongs to no option; give the option before it; see monarchrt serve --help"),
        (
            ["evaluate", "runs/few"],
            "'runs/few' belongs to no option; give the option before it, for example --checkpoint",
        ),
        (
            ["train", "clip.mp4"],
            "'clip.mp4' belongs to no option; give the option before it; see monarchrt train",
        ),
        (
            ["inspect"],
            "missing PATH (a folder or file with weights, or a Hugging Face repository owner/name); see "
            "monarchrt inspect --help",
        ),
        (
            ["tune"],
            "missing --grid INT INT INT (latent frames, rows and columns of the keys' tokens) and --tile",
        ),
        (["completion"], "missing {bash,zsh,fish} (the shell); see monarchrt completion --help"),
    ],
)
def test_words_without_an_option_and_what_is_missing(capsys, line, said):
    assert cli.main(line) == 2
    assert capsys.readouterr().err.startswith(f"error: {said}")


@pytest.mark.parametrize("path", ["./self_forcing_dmd.pt", "models/self_forcing_dmd.pt", "../nowhere"])
def test_a_path_that_does_not_exist_is_not_looked_for_on_the_hub(capsys, path):
    assert cli.main(["inspect", path]) == 2
    assert capsys.readouterr().err.startswith(
        f"error: path='{path}' does not exist; give a checkpoint's file or folder"
    )


def test_help_is_a_command(capsys):
    assert cli.main(["help"]) == 0
    assert capsys.readouterr().out == cli.usage() + "\n"
    with pytest.raises(SystemExit) as stop:
        cli.main(["help", "tune"])
    assert not stop.value.code
    assert capsys.readouterr().out.startswith("usage: monarchrt tune [-h]")


@pytest.mark.parametrize("command", ["train", "serve", "evaluate", "pairs"])
def test_a_list_that_is_empty_has_no_default_in_the_help(capsys, command):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert "(default: )" not in out
    assert command == "train" or "video of --from" not in out


def test_unknown_command_and_no_command(capsys):
    assert cli.main(["trian"]) == 2
    assert "command 'trian' is unknown (did you mean 'train'?); choose from train" in capsys.readouterr().err
    assert cli.main(["xyz"]) == 2
    assert "command 'xyz' is unknown; choose from train" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert cli.main(["--help"]) == 0
    assert "monarchrt COMMAND --help" in capsys.readouterr().out
