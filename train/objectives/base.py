"""What an objective does; the trainer knows nothing else of it.

How a batch travels: source -> devices -> draws -> the loss of each role that is due, with its gradient -> an update of
that role -> hooks. Settings and roles, which need no JAX, are declared in `monarchrt.train.objectives.settings`.
"""

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float32, Key

from monarchrt.models.errors import UserError
from monarchrt.train.config import DataConfig
from monarchrt.train.data import Batch, Source, spread
from monarchrt.train.objectives.registry import ObjectiveSettings
from monarchrt.train.sources import open_source
from monarchrt.train.watch import Check

Networks = Mapping[str, Any]
"""The networks by role: modules, with the parameters of this step; under `average_of(role)` with its moving average, if
the role is declared as `averaged`."""

Metrics = dict[str, Array]
"""Scalars by name."""

Sampler = Callable[..., Array]
"""(network, latents [B, F, h, w, C], text [B, L, D], noise like the latents) -> latents."""


def average_of(role: str) -> str:
    """Under which name a loss finds the network of a role with its moving average, among the `Networks`.

    Examples:
        >>> average_of("student")
        'student.average'
    """
    return f"{role}.average"


class HeldOut(NamedTuple):
    """One call of a held-out evaluation.

    Attributes:
        batch: Examples.
        draws: Their draws, fixed.
        weight: Factor of each error, of the errors' shape.
        count: How many examples count; those after them only fill the batch up.
    """

    batch: Batch
    draws: Any
    weight: np.ndarray
    count: int


class Objective(abc.ABC):
    """Losses of the roles that train, from networks, a batch and draws.

    Args:
        settings: The settings, with the roles.

    Whatever is random is a draw: a value that `draws` makes of a key and shapes, and an argument of `loss`, so that a
    loss can be compared with another implementation draw for draw.

    Attributes:
        rolls_out: Whether losses make clips block by block, in a loop around those over layers.
    """

    rolls_out: ClassVar[bool] = False

    def __init__(self, settings: Any):
        self.settings: ObjectiveSettings = settings

    def open_source(
        self,
        config: DataConfig,
        *,
        text_shape: tuple[int, int] = (1, 1),
        digests: Path | None = None,
        encode: bool = True,
    ) -> Source:
        """The data that a config names; arguments as `monarchrt.train.sources.open_source`, which is the default.

        Raises:
            UserError: If it cannot be used, or there are prompts alone and the objective needs clips.
        """
        if config.prompts is not None and self.settings.needs_clips:
            raise UserError(
                f"prompts {config.prompts} are texts without clips, which objective {self.settings.name} learns from; "
                f"give --latents or --video, or --objective dmd or self-forcing"
            )
        return open_source(config, text_shape=text_shape, digests=digests, encode=encode)

    def texts(self) -> Mapping[str, np.ndarray]:
        """Embeddings [L, D] that networks see beside those of the data, by what messages call them. Default: none."""
        return {}

    def extension(self, role: str) -> Callable[..., Any] | None:
        """(network, seed=) -> the network with parameters of the objective's own beside those it was read with.

        Default: None for every role, there are none.
        """
        return None

    def due(self, step: int) -> tuple[str, ...]:
        """The roles that a step, counted from 1, updates, in this order; a later one sees the earlier ones' update.

        Each different answer is a compiled program of its own. Default: all that train.
        """
        return self.settings.training

    @abc.abstractmethod
    def draws(self, key: Key[Array, ""], shapes: Batch) -> Mapping[str, Any]:
        """What the losses of a step draw at random.

        Args:
            key: Random key of the step.
            shapes: The batch as `jax.ShapeDtypeStruct`, or as arrays.

        Returns:
            For each role that trains, a tree of arrays: with the batch as first axis, which accumulation splits with
            the batch, or scalars, which all parts share.
        """

    @abc.abstractmethod
    def loss(self, role: str, networks: Networks, batch: Batch, draws: Any) -> tuple[Float32[Array, ""], Metrics]:
        """The loss of a role, a mean over the batch, which is differentiated by that role's parameters alone.

        Args:
            role: One that trains.
            networks: All networks.
            batch: Examples.
            draws: What `draws` made for the role.

        Returns:
            The loss and whatever else the log should show; scalars, averaged over those parts of an accumulation that
            have one: NaN says that there is none.
        """

    def parts(self, role: str) -> Mapping[str, Callable[[Networks, Batch, Any], Any] | None]:
        """What the loss of a role consists of, in order, to see how long each part takes.

        Returns:
            Name -> (networks, batch, draws of the role) -> what there is after that part; None for the loss itself, the
            last. Default: the loss, by the name of forward.
        """
        return {"forward": None}

    def turns(self, role: str) -> float:
        """How often on average those loops of a role's loss turn whose number of turns is drawn. Default: once."""
        return 1.0

    def typical(self, role: str, draws: Any) -> Any:
        """Draws of a role, of which numbers are given that decide how much is computed, for an estimate of time.

        Default: as they are. What `turns` tells of may stay as it is.
        """
        return draws

    def cache(self, role: str, networks: Networks, batch: Batch) -> Any:
        """What the loss of a role keeps of a clip while it makes it, as arrays or shapes, for an estimate of memory.

        Default: nothing.
        """
        return None

    def held_out(self, source: Source, *, windows: int, timesteps: int, batch: int) -> Iterator[HeldOut]:
        """What to measure on held-out examples, the same at every step and for every run.

        Default: as many draws of fixed keys as `timesteps` says, for batches of examples that are repeated until the
        last is full.

        Args:
            source: Its held-out part is used.
            windows: Examples, spread over the held-out part.
            timesteps: Noise levels, or rounds of draws.
            batch: Examples per call.

        Yields:
            The calls of `held_out_errors`.
        """
        indices = spread(source.held_out, windows)
        calls = max(1, -(-len(indices) // batch))
        for start in range(0, calls * batch, batch):
            examples = source.held_out_batch([indices[n % len(indices)] for n in range(start, start + batch)])
            for level in range(timesteps):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(20), start), level)
                yield HeldOut(examples, self.draws(key, examples), np.ones(()), 1)

    def held_out_errors(self, networks: Networks, batch: Batch, draws: Any) -> Mapping[str, Array]:
        """The errors of one call by role, compiled; averaged with the weights of `held_out`. Default: the losses."""
        return {role: self.loss(role, networks, batch, draws[role])[0] for role in self.settings.training}

    def checks(self) -> Sequence[Check]:
        """Figures of the log that show that a training collapses. Default: none."""
        return ()

    def samplers(self) -> Mapping[str, Sampler]:
        """What to show of the exported role while training: label -> sampler. Default: nothing."""
        return {}
