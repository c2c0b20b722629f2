"""Messages of code that several commands share name no option that the command at hand lacks."""

import ast
import dataclasses
import re
import typing
from pathlib import Path

import pytest
import tyro

from monarchrt.models.generate.encode import EncodeConfig
from monarchrt.models.wan.checkpoints.convert import ConvertOptions, InspectOptions
from monarchrt.train.cli.bench import BenchOptions
from monarchrt.train.cli.generate import GenerateOptions
from monarchrt.train.cli.serve import ServeOptions
from monarchrt.train.evaluation.config import EvaluateConfig
from monarchrt.train.evaluation.vbench import VBenchConfig
from monarchrt.train.pairs import PairsConfig
from monarchrt.train.studies.config import MapConfig, MassConfig, TilesConfig

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "generate": GenerateOptions,
    "serve": ServeOptions,
    "bench": BenchOptions,
    "evaluate": EvaluateConfig,
    "evaluate vbench": VBenchConfig,
    "study map": MapConfig,
    "study mass": MassConfig,
    "study tiles": TilesConfig,
    "encode": EncodeConfig,
    "convert": ConvertOptions,
    "inspect": InspectOptions,
    "pairs": PairsConfig,
}
LIVE = ("generate", "serve", "bench")
STUDIES = ("study map", "study mass", "study tiles")
SAMPLING = (*LIVE, "evaluate", "evaluate vbench", "study mass", "study tiles")
OPENING = (*SAMPLING, "study map", "pairs")
# who reaches a module's messages; of models/serve, `bench` loads an engine and makes no session
REACHED = {
    "models/generate/plan.py": SAMPLING,
    "models/generate/load.py": (*SAMPLING, "encode"),
    "models/generate/material.py": SAMPLING,
    "models/generate/loras.py": (*LIVE, "convert"),
    "models/generate/pipeline.py": SAMPLING,
    "models/generate/places.py": ("generate",),
    "models/generate/run_checkpoint.py": OPENING,
    "models/generate/run_arrays.py": (*OPENING, "convert"),
    "models/generate/tensors.py": SAMPLING,
    "models/generate/text.py": SAMPLING,
    "models/serve/engine.py": ("serve",),
    "models/serve/load.py": ("serve", "bench"),
    "models/serve/peers.py": ("serve",),
    "models/serve/priority.py": ("serve", "bench"),
    "models/serve/session.py": ("serve",),
    "models/serve/uploads.py": ("serve",),
    "models/wan/checkpoints/settings.py": (*OPENING, "convert", "inspect"),
    "models/wan/checkpoints/convert.py": ("inspect",),
    "train/evaluation/subject.py": ("evaluate", "study map", "study tiles"),
    "train/evaluation/compare.py": ("evaluate",),
    "train/studies/results.py": STUDIES,
}
OPTION = r"--([a-z][a-z-]*)"


def options_of(command):
    """The options of a command: the fields that its dataclass does not hide."""
    hints = typing.get_type_hints(COMMANDS[command], include_extras=True)
    hidden = {name for name, hint in hints.items() if tyro.conf.Suppress in getattr(hint, "__metadata__", ())}
    return {field.name.rstrip("_").replace("_", "-") for field in dataclasses.fields(COMMANDS[command])} - {
        name.replace("_", "-") for name in hidden
    }


def messages(source):
    """The texts of a module that name an option, without what is put into them; no docstrings."""
    tree = ast.parse(source)
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    inner |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in inner or not isinstance(node, ast.JoinedStr | ast.Constant):
            continue
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
        if re.search(OPTION, text):
            yield text


def unnamed(text, command):
    """Options that a message names, and that neither the command has nor one that it names with them."""
    own = options_of(command)
    subject = text.split(" ", 1)[0].replace("_", "-")
    if subject in options_of("generate") - own:
        return []  # of a setting that the command does not have
    named = []
    for part in re.split(r"[;,:`(]", text):
        told = [name for name in COMMANDS if re.search(rf"\b{name}\b[^-]*--", part)]
        offered = own.union(*(options_of(name) for name in told))
        named += [option for option in re.findall(OPTION, part) if option not in offered]
    return named


@pytest.mark.parametrize("module", REACHED)
def test_shared_messages_name_options_of_the_command(module):
    found = list(messages((ROOT / module).read_text(encoding="utf-8")))
    pairs = [(text, command) for text in found for command in REACHED[module]]
    wrong = {pair: names for pair in pairs if (names := unnamed(*pair))}
    assert not wrong


def test_the_rule_notices():
    assert unnamed("note: --mode bidirectional suits it", "serve") == ["mode"]
    assert unnamed("note: --mode bidirectional suits it", "generate") == []
    assert unnamed("whole clips suit it: monarchrt generate --mode bidirectional", "serve") == []
    assert unnamed("give --frames 9", "serve") == ["frames"]
    assert unnamed("zoom is {}; give a smaller --zoom", "serve") == []
    assert list(messages('def f():\n    """Of --mode."""\n    raise E(f"a {x} " "--mode b")')) == ["a {} --mode b"]


def test_modules_that_name_options_are_looked_at():
    """Of the folders that several commands share."""
    apart = {"config.py", "encode.py", "make.py", "bench.py"}  # generate's, encode's and nvidia-smi's own
    for folder in ("models/generate", "models/serve"):
        for path in (ROOT / folder).glob("*.py"):
            name = f"{folder}/{path.name}"
            assert name in REACHED or path.name in apart or not list(messages(path.read_text(encoding="utf-8"))), name
