"""Checkpoints of a run, written by Orbax: asynchronous and atomic; the newest few are kept, and reading verifies them.

A checkpoint holds the arrays of a `TrainState` under readable names and, as JSON, the settings that they belong to (see
`monarchrt.train.run_folder.identity`) and a checksum of each array. It gets its final name only when it is complete, so
that the previous checkpoint is the newest one after a process was killed while saving.
"""

import contextlib
import errno
import itertools
import shlex
import shutil
import threading
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from monarchrt.models.checkpoints.checksums import checksums
from monarchrt.models.errors import UserError, report_full_disk
from monarchrt.models.generate.run_arrays import of_the_machine, read_checked, read_newest, stored_network
from monarchrt.models.generate.runs import CHECKPOINTS_NAME
from monarchrt.models.processes.agreement import is_first_process, run_in_first
from monarchrt.models.wan.kinds import PLACE
from monarchrt.train.run_folder import SET_ASIDE_NAME
from monarchrt.train.state import TrainState, from_arrays, parameter_names, to_arrays

FOLDER_NAME = CHECKPOINTS_NAME
_OWN = f"self_attn.{PLACE}."  # part of the names of parameters that belong to a kind of attention


class _Written:
    """A wrapper of an Orbax future for writing arrays that reports its error at once.

    Args:
        future: The future, which a thread of Orbax waits for.
        failed: Called with the error.
    """

    def __init__(self, future: Any, failed: Callable[[BaseException], None]):
        self._future, self._failed = future, failed

    def result(self, timeout: float | None = None) -> Any:
        """Waits for the future; see Orbax."""
        try:
            return self._future.result(timeout)
        except BaseException as error:
            self._failed(error)
            raise


def _arrays_written(failed: Callable[[BaseException], None]) -> ocp.PyTreeCheckpointHandler:
    """Orbax's handler of arrays, with a callback as soon as this process failed to write its part.

    Orbax itself reports the error only after all processes have written their parts, which then never happens.
    """
    handler: Any = ocp.PyTreeCheckpointHandler()
    save = handler.async_save

    async def async_save(*args: Any, **options: Any) -> list[Any]:
        return [_Written(future, failed) for future in await save(*args, **options) or ()]

    handler.async_save = async_save  # not a subclass: Orbax looks up the arguments of a handler by its type
    return handler


class Checkpoints:
    """The checkpoints of one run folder.

    Args:
        folder: The run folder; checkpoints go to its subfolder `checkpoints/`.
        keep: Number of checkpoints to keep, newest first.
        exported: The role whose network other runs and commands use; stored with each checkpoint.
        read_only: Whether to leave the folder unchanged, since another process may be writing to it.
    """

    def __init__(self, folder: Path, *, keep: int = 3, exported: str = "student", read_only: bool = False):
        self._exported = exported
        self.path = (folder / FOLDER_NAME).absolute()
        self._set_aside = folder.absolute() / SET_ASIDE_NAME
        if read_only:
            options = ocp.CheckpointManagerOptions(read_only=True)
        else:
            # left by a process that was killed while saving
            self._remove_unfinished()
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._failures: list[BaseException] = []  # of this process while writing its part
        with report_full_disk(self.path):
            self._manager = ocp.CheckpointManager(
                self.path,
                options=options,
                item_handlers={"state": _arrays_written(self._failures.append), "about": ocp.JsonCheckpointHandler()},
            )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        # read from the folder, since the manager also counts the one that is being written
        return sorted(ocp.utils.checkpoint_steps(self.path))

    def kept(self) -> str:
        """The newest complete checkpoint, in words for a message."""
        complete = self.steps()
        return f"the checkpoint of step {complete[-1]} is kept" if complete else "no checkpoint had been saved"

    def save(self, state: TrainState, identity: dict[str, Any]) -> None:
        """Starts to save; returns once the arrays are copied, and writes them in the background.

        Args:
            state: The state, which may be donated afterwards.
            identity: Settings that the state belongs to, as JSON values (see `run_folder.identity`).

        Raises:
            DiskFullError: If the disk is too full for this save, or was for the previous one.
        """
        step = int(state.step)
        arrays = to_arrays(state)
        if jax.default_backend() == "cpu":
            # on a CPU, Orbax would write the array's own buffer, which the next step overwrites
            arrays = jax.tree.map(jnp.copy, arrays)
        sums = jax.device_get(checksums(arrays))
        contents = {name: {"shape": list(leaf.shape), "checksum": int(sums[name])} for name, leaf in arrays.items()}
        about = {"step": step, "identity": identity, "exported": self._exported, "arrays": contents}
        with self._reporting():
            # wait for the previous save before the free space is measured
            self._finished()
            needed, free = sum(array.nbytes for array in arrays.values()), shutil.disk_usage(self.path).free
            if needed > free:
                raise OSError(errno.ENOSPC, f"a checkpoint needs {needed} bytes, and {free} are free")
            if step not in self._manager.all_steps():
                items = ocp.args.Composite(state=ocp.args.PyTreeSave(arrays), about=ocp.args.JsonSave(about))
                self._manager.save(step, args=items, force=True)

    def wait(self) -> None:
        """Waits until everything is written.

        Raises:
            DiskFullError: If the disk was full.
        """
        with self._reporting():
            self._finished()

    def _finished(self) -> None:
        """Waits for the pending save; if this process failed, not for the other processes."""
        if jax.process_count() > 1:
            waiting = threading.Thread(target=self._wait, daemon=True)
            waiting.start()
            while waiting.is_alive():
                waiting.join(timeout=0.2)
                if self._failures:
                    raise self._failures[0]
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def _wait(self) -> None:
        with contextlib.suppress(Exception):  # raised again in the thread that calls `_finished`
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the pending save, then closes the folder.

        Raises:
            DiskFullError: If the disk was full.
        """
        if jax.process_count() > 1 and self._failures:
            return  # the error has been raised, and closing would wait for the other processes
        try:
            self.wait()
        finally:
            self._manager.close()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            with report_full_disk(self.path, kept=self.kept):
                yield
        except UserError:
            self._remove_unfinished()
            raise

    def _remove_unfinished(self) -> None:
        if not is_first_process():
            return
        for leftover in self.path.glob(f"*{ocp.utils.TMP_DIR_SUFFIX}*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def check_newest(self, check: Callable[[dict[str, Any], int], None]) -> None:
        """Calls `check` with identity and step of the newest checkpoint that has them; reads no arrays.

        Raises:
            UserError: If `check` does.
        """
        for step in reversed(self.steps()):
            try:
                about = self._about(step)
            except Exception:  # `restore` reports the error
                continue
            check(about["identity"], step)
            return

    def restore(
        self,
        template: TrainState,
        *,
        check: Callable[[dict[str, Any], int], None],
        note: Callable[[str], None],
    ) -> TrainState | None:
        """Reads the newest checkpoint that is not corrupt.

        Corrupt ones are moved to `unreadable_checkpoints/` of the run folder.

        Args:
            template: A state of the same structure, shapes and shardings; its leaves may be `jax.ShapeDtypeStruct`.
            check: Called with identity and step of a checkpoint before its arrays are read; raises UserError if the
                checkpoint belongs to other settings.
            note: Called with one line for each corrupt checkpoint.

        Returns:
            The state; None if the folder has no checkpoint.

        Raises:
            UserError: If `check` raises it, if all checkpoints are corrupt, or if one cannot be read for a reason that
                is not its own, such as a lack of memory or of permissions, or an error of the disk.
        """
        complete = self.steps()
        newest = ""  # the error of the newest checkpoint
        for position in range(len(complete) - 1, -1, -1):
            step = complete[position]
            try:
                about = self._about(step)
                check(about["identity"], step)
                state = self._arrays(step, template, about["arrays"])
            except UserError:
                raise
            except Exception as error:  # Orbax raises whatever its storage layer raised
                reason = " ".join(str(error).split())[:160]
                if of_the_machine(error):
                    raise UserError(
                        f"the checkpoint of step {step} in {self.path} could not be read, which need not be its own "
                        f"fault ({type(error).__name__}: {reason}); nothing was changed, so try again with --resume"
                    ) from error
                newest = newest or f"{type(error).__name__}: {reason}"
                older = f"continuing from step {complete[position - 1]}" if position else "there is none before it"
                note(f"warning: the checkpoint of step {step} is corrupt, {older} ({type(error).__name__}: {reason})")
                continue
            for corrupt in complete[position + 1 :]:
                self._move_aside(corrupt)
            return state
        if complete:
            raise UserError(
                f"none of the checkpoints in {self.path} can be read (steps {', '.join(map(str, complete))}; "
                f"the newest: {newest}); start again with another --folder"
            )
        return None

    def restore_parameters(self, template: Any, *, fresh: Callable[[], Any] | None = None) -> Any:
        """Reads the exported network of the newest checkpoint that is not corrupt, by its moving average if any.

        Args:
            template: Parameters of the same structure, shapes and shardings, whether they trained or not.
            fresh: Makes new parameters of the template's structure, for those that belong to a kind of attention and
                are not in the checkpoint with that shape.

        Returns:
            The parameters.

        Raises:
            UserError: If there is no checkpoint that can be read, the run trained a LoRA, or parameters are missing or
                have other shapes.
        """

        def read(step: int) -> Any:
            stored = stored_network(self.path.parent, step)
            leaves, structure = jax.tree.flatten(template)
            names = parameter_names(template)
            wanted, arrays = dict(zip(names, leaves, strict=True)), {}
            if fresh is not None:
                own = {name for name in names if _OWN in name and stored.shapes.get(name) != wanted[name].shape}
                if own:
                    made = dict(zip(names, jax.tree.leaves(fresh()), strict=True))
                    arrays = {name: made[name] for name in own}
            if any(name.endswith(".lora_a") for name in stored.names):
                raise UserError(
                    f"{self.path.parent} trained a LoRA, which is not a network by itself; merge it into the one that "
                    f"it was trained on first: monarchrt convert NETWORK NEW --lora "
                    f"{shlex.quote(str(self.path.parent))}"
                )
            missing = sorted(set(names) - set(stored.names) - set(arrays))
            if missing:
                raise UserError(f"the checkpoint in {self.path} has no {missing[0]}; it belongs to another model")
            arrays |= stored.read({name: _target(wanted[name]) for name in names if name not in arrays})
            return jax.tree.unflatten(structure, [arrays[name] for name in names])

        return read_newest(self.path.parent, read)

    def _about(self, step: int) -> dict[str, Any]:
        about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        if not isinstance(about, dict) or {"identity", "arrays"} - about.keys():
            raise ValueError("the description is incomplete")
        return about

    def _arrays(self, step: int, template: TrainState, contents: dict[str, Any]) -> TrainState:
        leaves = to_arrays(template)
        stored = _stored_names(leaves, contents)
        arrays = self._read(step, {stored[name]: leaf for name, leaf in leaves.items()}, contents)
        # one stored array may be used for several leaves, each of which a step donates
        taken: set[str] = set()
        for name, other in stored.items():
            leaves[name] = jnp.copy(arrays[other]) if other in taken else arrays[other]
            taken.add(other)
        return from_arrays(template, leaves)

    def _read(self, step: int, names: dict[str, Any], contents: dict[str, Any]) -> dict[str, Any]:
        for name, leaf in names.items():
            if name not in contents:
                raise ValueError(f"it has no {name}")
            if (shape := tuple(contents[name]["shape"])) != leaf.shape:
                raise UserError(f"{name} in the checkpoint of step {step} has shape {shape}, not {leaf.shape}")
        target = {name: _target(leaf) for name, leaf in names.items()}
        return read_checked(self.path / str(step) / "state", target, contents)

    def _move_aside(self, step: int) -> None:
        def move() -> None:
            self._set_aside.mkdir(exist_ok=True)
            names = itertools.chain([str(step)], (f"{step}_{n}" for n in itertools.count(2)))
            target = next(path for name in names if not (path := self._set_aside / name).exists())
            shutil.move(self.path / str(step), target)

        run_in_first(f"aside/{step}", move)
        self._manager.reload()


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


_BEFORE_ROLES = {"params": "params", "frozen": "fixed", "optimizer": "optimizer", "average": "ema"}


def _stored_names(names: Iterable[str], contents: Container[str]) -> dict[str, str]:
    """The name of each array of a state in a checkpoint; those of versions without roles have other names.

    Examples:
        >>> names = ["step", "roles.student.average.bias", "roles.student.updates"]
        >>> _stored_names(names, {"step", "params.bias", "ema.bias"})
        {'step': 'step', 'roles.student.average.bias': 'ema.bias', 'roles.student.updates': 'step'}
    """
    if any(name in contents for name in names if name.startswith("roles.")):
        return {name: name for name in names}

    def old(name: str) -> str:
        if not name.startswith("roles."):
            return name
        part, dot, rest = name.split(".", 2)[2].partition(".")
        return "step" if part == "updates" else f"{_BEFORE_ROLES[part]}{dot}{rest}"

    return {name: old(name) for name in names}
