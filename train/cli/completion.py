"""`monarchrt completion`: scripts with which shells complete commands and their options."""

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from monarchrt.train.cli import COMMANDS, load
from monarchrt.train.cli.parsing import parse


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Print the lines that let a shell complete monarchrt's commands, options and files.

    bash: monarchrt completion bash >> ~/.bashrc

    zsh: monarchrt completion zsh >> ~/.zshrc (after compinit)

    fish: monarchrt completion fish > ~/.config/fish/completions/monarchrt.fish
    """

    shell: tyro.conf.Positional[Literal["bash", "zsh", "fish"]]
    """The shell."""


def completion_command(arguments: Sequence[str]) -> int:
    """`monarchrt completion bash|zsh|fish`."""
    config = parse(CompletionConfig, arguments, prog="monarchrt completion")
    options = {name: () if name == "completion" else command_options(name) for name in COMMANDS}
    print(_SCRIPTS[config.shell](options))
    return 0


def command_options(name: str) -> tuple[str, ...]:
    """The options of a command in the order of its help: `--video`, `--folder`, ..."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        load(name)(["--help"])
    # an option starts a line of the help, after the frame of its group; `--a, --b` are two names of one option
    rows = re.findall(r"^[\s│|]*((?:-\w, )?--[a-z][\w.-]*(?:, --[a-z][\w.-]*)*)", text.getvalue(), re.MULTILINE)
    return tuple(dict.fromkeys(word for row in rows for word in re.findall(r"--[a-z][\w.-]*", row)))


def _bash(options: Mapping[str, Sequence[str]]) -> str:
    cases = "\n".join(f"    {name}) words='{' '.join(words)}' ;;" for name, words in options.items() if words)
    return f"""_monarchrt() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words='{" ".join(options)}'
  if [ "$COMP_CWORD" -gt 1 ]; then
    case ${{COMP_WORDS[1]}} in
{cases}
    completion) words='{" ".join(_SCRIPTS)}' ;;
    *) words='' ;;
    esac
    case $word in
    -*) ;;
    *) [ "${{COMP_WORDS[1]}}" = completion ] || {{ COMPREPLY=($(compgen -f -- "$word")); return; }} ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o filenames -F _monarchrt monarchrt"""


def _zsh(options: Mapping[str, Sequence[str]]) -> str:
    return f"autoload -U +X bashcompinit && bashcompinit\n{_bash(options)}"


def _fish(options: Mapping[str, Sequence[str]]) -> str:
    rows = [
        f"complete -c monarchrt -n __fish_use_subcommand -f -a {name} -d {_quoted(summary)}"
        for name, summary in COMMANDS.items()
    ]
    for name, words in options.items():
        seen = f"-n '__fish_seen_subcommand_from {name}'"
        rows += [f"complete -c monarchrt {seen} -l {word.removeprefix('--')}" for word in words]
    rows.append(f"complete -c monarchrt -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(_SCRIPTS)}'")
    return "\n".join(rows)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SCRIPTS: dict[str, Callable[[Mapping[str, Sequence[str]]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
