"""Pairs: states along a teacher's ODE trajectories, and their ends, which `monarchrt pairs` writes.

An example is a .safetensors file with `states` [n, F, h, w, C], with decreasing noise, `latents` [F, h, w, C], the end
of the trajectory, and `text` [L, D]; its header records how it was made. It is also a valid file of latents.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from monarchrt.models.checkpoints.tensor_files import SafetensorsFile
from monarchrt.models.errors import UserError, user_input
from monarchrt.train.config import DataConfig
from monarchrt.train.data import LatentFolder

FORMAT = "monarchrt pairs"
TOLERANCE = 2e-3  # largest difference of the noise levels of a state and of a student's step


@dataclass(frozen=True, kw_only=True)
class Made:
    """How pairs were made, as stored in the header of their files.

    Attributes:
        sigmas: Noise level of each state.
        shift: Timestep shift of the solver's noise levels.
        steps: Number of steps of the solver.
        solver: Name of the solver.
        guidance: Weight g of the teacher's guidance, v_negative + g (v_text - v_negative); 1 for none.
        teacher: Checkpoint of the teacher.
        seed: Seed of the noise.
    """

    sigmas: tuple[float, ...]
    shift: float
    steps: int
    solver: str
    guidance: float
    teacher: str
    seed: int

    def to_header(self) -> dict[str, str]:
        """The metadata to write into a file's header."""
        return {"format": FORMAT, "made": json.dumps(dataclasses.asdict(self))}

    @classmethod
    def of_header(cls, path: Path, header: Mapping[str, str]) -> "Made":
        """Parses the metadata in a file's header.

        Args:
            path: The file, for messages.
            header: Its metadata.

        Raises:
            UserError: If the file does not hold pairs.
        """
        if header.get("format") != FORMAT:
            raise UserError(f"latents {path} has no states of a solver; make pairs with `monarchrt pairs`")
        try:
            values = json.loads(header["made"])
            return cls(**values | {"sigmas": tuple(map(float, values["sigmas"]))})
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"latents {path} does not say how its states were made; make it again") from error


class PairFolder(LatentFolder):
    """A folder of pairs. The latents of an example are its states and its end, concatenated: [(n + 1) F, h, w, C].

    Args:
        folder: The folder.
        config: Settings of the data, of which `held_out` is used.
        digests: File with digests of an earlier start, as for `LatentFolder`.

    Raises:
        UserError: If a file does not hold pairs, or files were made with different settings.
    """

    def __init__(self, folder: Path | str, config: DataConfig, *, digests: Path | None = None):
        super().__init__(folder, config, digests=digests)
        files = self.train_files + self.held_out_files
        headers = {path: _header(path) for path in files}
        self.made, self.states = headers[files[0]]
        for path, (made, states) in headers.items():
            if dataclasses.replace(made, seed=self.made.seed) != self.made or states != self.states:
                raise UserError(f"latents {path} was made with other settings than {files[0]}: {made}, {self.made}")

    def check(self, sigmas: Sequence[float], shift: float) -> None:
        """Checks that the states are at the noise levels of a student's steps.

        Args:
            sigmas: Noise levels of the student's steps.
            shift: Timestep shift of these levels, for the message.

        Raises:
            UserError: If they are not.
        """
        made = self.made
        if len(sigmas) == len(made.sigmas) and np.allclose(sigmas, made.sigmas, rtol=0, atol=TOLERANCE):
            return
        theirs, ours = (" ".join(f"{sigma:.4g}" for sigma in levels) for levels in (made.sigmas, sigmas))
        hint = f"; give --shift {made.shift:g}" if made.shift != shift else "; give the --student-steps of the pairs"
        raise UserError(
            f"the pairs were made at shift {made.shift:g}, with states at the noise levels {theirs}, but the student's "
            f"steps at shift {shift:g} are at {ours}{hint}, or make other pairs"
        )

    @staticmethod
    def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
        """Reads an example: states and end [(n + 1) F, h, w, C] and text [L, D], float32."""
        with user_input():
            file = SafetensorsFile(path)
            parts: dict[str, Any] = {name: file.read(name).astype(np.float32) for name in ("states", "latents", "text")}
        trajectory = np.concatenate([*parts["states"], parts["latents"]])
        if not np.isfinite(trajectory).all():
            raise UserError(f"latents {path} has states that are NaN or infinite; make it again")
        return trajectory, parts["text"]


def _header(path: Path) -> tuple[Made, tuple[int, ...]]:
    with user_input():
        file = SafetensorsFile(path, only=("latents", "states"))
    made = Made.of_header(path, file.metadata)
    if "states" not in file.infos:
        raise UserError(f"latents {path} has no tensor 'states'; make it again with `monarchrt pairs`")
    shape = tuple(file.infos["states"].shape)
    if shape != (len(made.sigmas), *file.infos["latents"].shape):
        raise UserError(f"latents {path} has states of shape {shape}, which do not go with its latents; make it again")
    return made, shape
