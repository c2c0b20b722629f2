"""Where the numbers of a run go besides its folder. A sink is optional: a run never needs one.

A sink has `write(step, scalars)` and `close(failed)`; `_SINKS` says which setting of `RunConfig` opens which.
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

WANDB_NAME = "wandb.json"  # in the run folder: the id under which a resumed run goes on


@runtime_checkable
class Sink(Protocol):
    """Takes what is also written to log.jsonl."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes the scalars of one step."""
        ...

    def close(self, *, failed: bool) -> None:
        """Ends; `failed` if the run did not come to its end."""
        ...


class Wandb:
    """Sends scalars to a project of Weights & Biases, or with WANDB_MODE=offline to the run folder's `wandb/`.

    A resumed run goes on under the id that the run folder keeps. What goes wrong after the start is said once, and the
    run goes on without.

    Args:
        config: The settings; they are sent along.

    Raises:
        UserError: If it cannot start.
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
            # steps are ours: after a resume they begin before the last one sent, which its own counter would drop
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
        """Ends the run there, as failed or finished."""
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
    """Looks whether the packages of the sinks that are asked for are installed; opens nothing.

    Raises:
        UserError: If one is missing.
    """
    if config.run.wandb is not None:
        _wandb(config)


def open_sinks(config: TrainConfig) -> list[Sink]:
    """Opens the sinks that the settings ask for.

    Raises:
        UserError: If one cannot start.
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
    if not hasattr(module, "init"):  # a folder of that name, such as wandb leaves behind, is taken for a package
        raise UserError(
            f"wandb is {config.run.wandb!r}, but the package wandb is not installed (a folder wandb beside you is "
            f"taken for it); pip install wandb, or leave --wandb out"
        )
    return module


def _identifier(path: Path) -> str:
    """The id of the run at wandb: that in the run folder, or a new one that is kept there."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))["id"]
        if isinstance(kept, str) and kept:
            return kept
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass  # none yet, or none that can be used
    new = uuid.uuid4().hex[:8]
    with report_full_disk(path):
        path.write_text(json.dumps({"id": new}) + "\n", encoding="utf-8")
    return new


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
