"""The lines of `monarchrt completion`, in a bash."""

import shutil
import subprocess

import pytest

from monarchrt.models.errors import UserError
from monarchrt.train.cli import COMMANDS, completion


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    """The file of the bash lines, with the options of two commands only: those of others take a second to list."""
    path = tmp_path_factory.mktemp("shell") / "lines"
    options = dict.fromkeys(COMMANDS, ()) | {name: completion.command_options(name) for name in ("inspect", "tune")}
    path.write_text(completion._SCRIPTS["bash"](options))
    return path


def completed(lines, *words, folder):
    """What bash offers for the last of the words."""
    script = (
        f"source {lines}; COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; "
        f'_monarchrt; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=folder)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
class TestBash:
    def test_commands(self, lines, tmp_path):
        assert completed(lines, "monarchrt", "", folder=tmp_path) == list(COMMANDS)
        assert completed(lines, "monarchrt", "in", folder=tmp_path) == ["inspect"]

    def test_options_are_those_of_the_command(self, lines, tmp_path):
        assert completed(lines, "monarchrt", "inspect", "--num", folder=tmp_path) == ["--num-heads"]
        assert completed(lines, "monarchrt", "tune", "--num", folder=tmp_path) == []
        assert completed(lines, "monarchrt", "inspect", "--", folder=tmp_path)[0] == "--help"

    def test_files(self, lines, tmp_path):
        (tmp_path / "weights.pt").touch()
        assert completed(lines, "monarchrt", "inspect", "we", folder=tmp_path) == ["weights.pt"]

    def test_shells(self, lines, tmp_path):
        assert completed(lines, "monarchrt", "completion", "", folder=tmp_path) == ["bash", "zsh", "fish"]


def test_fish_lists_commands_and_options(capsys, monkeypatch):
    monkeypatch.setattr(completion, "COMMANDS", {"inspect": "it's a summary", "completion": "this"})
    assert completion.completion_command(["fish"]) == 0
    printed = capsys.readouterr().out
    assert "-f -a inspect -d 'it\\'s a summary'" in printed
    assert "'__fish_seen_subcommand_from inspect' -l num-heads\n" in printed


def test_a_shell_that_is_not_known():
    with pytest.raises(UserError, match=r"tcsh.*bash.*zsh.*fish"):
        completion.completion_command(["tcsh"])
