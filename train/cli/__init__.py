"""The command line: `monarchrt COMMAND ...`.

A command's module is imported only when the command runs, so that help is quick and a missing dependency of one
command does not affect the others.
"""

import contextlib
import difflib
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from monarchrt.models.errors import UserError, disk_full_reason
from monarchrt.train.cli.compile_cache import OFF_VARIABLE, keep_programs
from monarchrt.train.cli.platform import keep_cpu, leave_out_cuda
from monarchrt.train.cli.registry import COMMANDS
from monarchrt.train.cli.streams import to_nowhere, usable_streams
from monarchrt.train.interrupt import finish_first, stoppable

DEBUG_VARIABLE = "MONARCHRT_DEBUG"
_WORD, _MESSAGE = 500, 4000  # most characters of a word, and of a whole error message, that are printed
_MAY_BE_EMPTY = ("--negative-prompt", "--prompt", "--wandb", "--config")  # valid if empty, or checked elsewhere
_SMALLER = "make the batch, the clip or the network smaller"


def usage() -> str:
    """The text of `monarchrt --help`."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items()]
    return "\n".join(
        [
            "usage: monarchrt [--version] [--debug] COMMAND ...",
            "",
            "Tiled Monarch attention for video diffusion transformers, in JAX.",
            "",
            *lines,
            "",
            "To begin, run `monarchrt doctor`, or `monarchrt demo`, which needs only a CPU and 10 minutes.",
            "",
            "`monarchrt COMMAND --help` lists a command's options. Bad input ends in one line, `error: ...`, and exit",
            f"code 2; --debug, or {DEBUG_VARIABLE}=1, shows the traceback as well. Compiled programs are kept in",
            f"~/.cache/monarchrt/programs, so that the next run starts at once; {OFF_VARIABLE}=1 keeps none.",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: The arguments after the program's name; None for those of the process.

    Returns:
        The exit code: 0 on success; 2 for invalid input, for files that cannot be read or written, and if memory runs
        out; 130 after Ctrl-C and 143 after SIGTERM, once the run has saved its state.
    """
    if arguments is None:  # called as a program, not from Python
        keep_programs()
    with usable_streams():
        return _main(list(sys.argv[1:] if arguments is None else arguments))


def _main(given: list[str]) -> int:
    debug = bool(os.environ.get(DEBUG_VARIABLE))
    if given and given[0] == "--debug":
        debug, given = True, given[1:]
    if not debug:
        _quiet_storage()
    try:
        with _flushed():
            return _answer(given)
    except UserError as error:
        if debug:
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(_one_line(error) or "stopped", file=sys.stderr)
        return getattr(error, "code", 130)
    except BrokenPipeError:  # `monarchrt train --help | head`, `monarchrt --version | true`
        to_nowhere(sys.stdout.fileno())
        return 0
    except MemoryError as error:
        if debug:
            raise
        print(f"error: the machine's memory is used up: {_one_line(error) or 'no more could be had'}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if debug or type(error).__name__ != "JaxRuntimeError" or not _is_memory(error):  # JAX may not be there
            raise
        print(f"error: the device's memory is used up: {_one_line(error)}; {_SMALLER}", file=sys.stderr)
        return 2
    except OSError as error:
        full = disk_full_reason(error) is not None
        if debug or not (full or error.filename):
            raise
        # a file that cannot be read or written is not a bug
        reason = _one_line(error) if error.filename is None else f"{error.filename}: {error.strerror}"
        print(f"error: {reason}{'; free some space' if full else ''}", file=sys.stderr)
        return 2


def _answer(given: list[str]) -> int:
    """Handles `--help` and `--version`, or runs a command; returns the exit code."""
    if len(given) > 1 and given[0] == "help":
        given = [given[1], "--help"]
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if given else 2
    if given[0] == "--version":
        print(f"monarchrt {importlib.import_module('monarch_jax').__version__}")
        return 0
    leave_out_cuda()
    keep_cpu()
    with stoppable():
        return _run(given[0], given[1:])


@contextlib.contextmanager
def _flushed() -> Iterator[None]:
    """Flushes standard output on exit, so that a closed pipe or a full disk is reported as an error of the command."""
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError:
            to_nowhere(sys.stdout.fileno())  # otherwise Python would try, and fail, again at exit
            raise


def _run(name: str, arguments: list[str]) -> int:
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(f"command {name!r} is unknown{hint}; choose from {', '.join(COMMANDS)}")
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            shown = os.fsencode(argument).decode(errors="backslashreplace")
            raise UserError(
                f"argument '{shown}' is not UTF-8, which the libraries that read and write files here need; rename the "
                f"file or folder"
            ) from error
    _check_none_is_empty(arguments)
    with finish_first():
        command = load(name)
    return command(arguments) or 0


def _check_none_is_empty(arguments: list[str]) -> None:
    """Raises UserError for an empty value, which as a path would mean the current folder."""
    option = "--an argument"
    for word in arguments:
        value = word
        if word.startswith("--"):
            option, equals, value = word.partition("=")
            value = value if equals else word
        if not value and option.replace("_", "-") not in _MAY_BE_EMPTY:
            name = option[2:].replace("-", "_")
            raise UserError(f"{name} is empty, perhaps from a variable that is not set; give a value, or leave it out")


def _quiet_storage() -> None:
    """Silences Orbax's logs when a checkpoint cannot be written, so that only the error itself is printed.

    Orbax logs the errors that it also raises; its abandoned coroutines and storage threads report them again.
    """
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            report(unraisable)

    sys.unraisablehook = hook


def load(name: str) -> Callable[[list[str]], int | None]:
    """Imports the function of a command, one of COMMANDS; it takes the arguments after the command's name."""
    return getattr(importlib.import_module(f"{__name__}.{name}"), f"{name}_command")


def _one_line(error: BaseException) -> str:
    """The message of an error on one line, with control characters escaped, and long words and messages shortened."""
    words = [_cut(word, _WORD) for word in str(error).split()]
    text = _cut(" ".join(words), _MESSAGE)
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _cut(text: str, most: int) -> str:
    """A text, without its middle if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 60]} ... {text[-50:]}"


def _is_memory(error: BaseException) -> bool:
    """Whether an error of JAX reports that the memory of a device, or of the machine, is exhausted."""
    return "out of memory" in str(error).lower()
