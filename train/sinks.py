"""Sinks: optional destinations of a run's scalars besides its folder.

`_SINKS` maps settings of `RunConfig` to the sinks that they open.
"""

import importlib
import json
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from monarchrt.models.errors import UserError, report_full_disk
from monarchrt.train.config import TrainConfig, to_dict

WANDB_NAME = "wandb.json"  # file in the run folder with the id of the run at Weights & Biases


@runtime_checkable
class Sink(Protocol):
    """The interface of a destination of the scalars in log.jsonl."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the scalars of a step."""
        ...

    def close(self, *, failed: bool) -> None:
        """Closes the sink; `failed` if the run ended with an error."""
        ...


class Wandb:
    """Sends scalars to a project of Weights & Biases, or with WANDB_MODE=offline to the run folder's `wandb/`.

    A resumed run continues under the id that is stored in the run folder. After the start, the first error is printed
    as a warning, and the run continues without this sink.

    Args:
        config: The settings, which are sent as well.

    Raises:
        UserError: If the package is missing or cannot start.
    """

    def __init__(self, config: TrainConfig):
        folder = config.run.folder
        try:
            self._run = _wandb(config).init(
                project=config.run.wandb,
                name=folder.name,
                id=_identifier(folder / WANDB_NAME),
                resume="allow",
                dir=str(folder),
                config=to_dict(config),
            )
            # wandb's own counter would drop the steps of a resumed run that are below the last one sent
            self._run.define_metric("*", step_metric="step")
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"wandb cannot start ({_one_line(error)}); run `wandb login`, or set WANDB_MODE=offline to keep its "
                f"files in {folder}, and continue with --resume; or leave --wandb out, with another --folder"
            ) from error
        self._stopped = False

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends the scalars of one step."""
        self._try(lambda: self._run.log({"step": step, **scalars}))

    def close(self, *, failed: bool) -> None:
        """Finishes the run at Weights & Biases, as failed or finished."""
        self._try(lambda: self._run.finish(exit_code=int(failed)))

    def _try(self, action: Callable[[], Any]) -> None:
        if self._stopped:
            return
        try:
            action()
        except Exception as error:
            self._stopped = True
            print(f"warning: wandb failed ({_one_line(error)}); the run continues without it", file=sys.stderr)


_SINKS: dict[str, Callable[[TrainConfig], Sink]] = {"wandb": Wandb}


def check_sinks(config: TrainConfig) -> None:
    """Checks that the packages of the sinks in the settings are installed, without opening them.

    Raises:
        UserError: If a package is missing.
    """
    if config.run.wandb is not None:
        _wandb(config)


def open_sinks(config: TrainConfig) -> list[Sink]:
    """Opens the sinks in the settings.

    Raises:
        UserError: If a sink cannot start.
    """
    return [make(config) for name, make in _SINKS.items() if getattr(config.run, name) is not None]


def _wandb(config: TrainConfig) -> Any:
    try:
        module = importlib.import_module("wandb")
    except ImportError as error:
        reason = "is not installed" if getattr(error, "name", None) == "wandb" else f"cannot be imported ({error})"
        raise UserError(
            f"wandb is {config.run.wandb!r}, but the package wandb {reason}; pip install wandb, or leave --wandb out"
        ) from error
    if not hasattr(module, "init"):  # a folder wandb/, which wandb creates, is imported as a namespace package
        raise UserError(
            f"wandb is {config.run.wandb!r}, but the package wandb is not installed (a folder named wandb was imported "
            f"instead); pip install wandb, or leave --wandb out"
        )
    return module


def _identifier(path: Path) -> str:
    """The id of the run at Weights & Biases, read from the run folder, or created and stored there."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["id"]
        if isinstance(kept, str) and kept:
            return kept
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # there is no valid id yet
    new = uuid.uuid4().hex[:8]
    with report_full_disk(path):
        path.write_text(json.dumps({"id": new}) + "\n", encoding="utf-8")
    return new


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
