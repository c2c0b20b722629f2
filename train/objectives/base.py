"""The interface of objectives, through which the trainer uses them.

The path of a batch: source -> devices -> draws -> loss and gradient of each role that is due -> update of that role ->
hooks. Settings and roles, which need no JAX, are declared in `monarchrt.train.objectives.settings`.
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
"""Modules by role, with the current parameters; for roles declared as `averaged` also, under `average_of(role)`, the
network with its moving average."""

Metrics = dict[str, Array]
"""Scalars by name."""

Sampler = Callable[..., Array]
"""(network, latents [B, F, h, w, C], text [B, L, D], noise like the latents) -> latents."""


def average_of(role: str) -> str:
    """The key in `Networks` of a role's network with its moving average.

    Examples:
        >>> average_of("student")
        'student.average'
    """
    return f"{role}.average"


class HeldOut(NamedTuple):
    """One call of a held-out evaluation.

    Attributes:
        batch: Examples.
        draws: Their random values, the same in every evaluation.
        weight: Factor of each error, broadcastable to the errors.
        count: Number of examples that count; the others only pad the batch.
    """

    batch: Batch
    draws: Any
    weight: np.ndarray
    count: int


class Objective(abc.ABC):
    """Base class of objectives: the losses of the roles that train.

    All randomness is in the draws, which `draws` returns and `loss` takes as an argument, so that a loss can be
    compared with another implementation for the same draws.

    Args:
        settings: The settings, with the roles.

    Attributes:
        rolls_out: Whether losses generate clips block by block, in a loop around the loops over layers.
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
        """Opens the data of a config. Default: `monarchrt.train.sources.open_source`.

        Args:
            config: Settings of the data.
            text_shape: Shape (L, D) of the text embeddings of a video, which are zero.
            digests: File with digests of an earlier start, as for `LatentFolder`.
            encode: Whether to encode texts that are not encoded yet; otherwise their embeddings are zero.

        Raises:
            UserError: If the data cannot be used, or are prompts alone and the objective needs clips.
        """
        if config.prompts is not None and self.settings.needs_clips:
            raise UserError(
                f"prompts {config.prompts} are texts without clips, which objective {self.settings.name} learns from; "
                f"give --latents or --video, or --objective dmd or self-forcing"
            )
        return open_source(config, text_shape=text_shape, digests=digests, encode=encode)

    def texts(self) -> Mapping[str, np.ndarray]:
        """Text embeddings [L, D] other than those of the data, by their name in messages. Default: none."""
        return {}

    def extension(self, role: str) -> Callable[..., Any] | None:
        """A function (network, seed=) -> network that adds parameters of the objective to a role's network.

        Default: None for every role, which adds none.
        """
        return None

    def due(self, step: int) -> tuple[str, ...]:
        """The roles that a step, counted from 1, updates, in this order: later ones see the updates of earlier ones.

        Each distinct tuple needs a compiled program of its own. Default: all roles that train.
        """
        return self.settings.training

    @abc.abstractmethod
    def draws(self, key: Key[Array, ""], shapes: Batch) -> Mapping[str, Any]:
        """Draws the random values that the losses of a step use.

        Args:
            key: Random key of the step.
            shapes: The batch as `jax.ShapeDtypeStruct`, or as arrays.

        Returns:
            A tree of arrays for each role that trains. Arrays have the batch as first axis, along which accumulation
            splits them; scalars are shared by all parts.
        """

    @abc.abstractmethod
    def loss(self, role: str, networks: Networks, batch: Batch, draws: Any) -> tuple[Float32[Array, ""], Metrics]:
        """The loss of a role, a mean over the batch; only gradients with respect to that role's parameters are taken.

        Args:
            role: A role that trains.
            networks: All networks.
            batch: Examples.
            draws: The result of `draws` for the role.

        Returns:
            The loss and further scalars to log. Accumulation averages them over the parts of a batch, without NaN,
            which means that a part has no value.
        """

    def parts(self, role: str) -> Mapping[str, Callable[[Networks, Batch, Any], Any] | None]:
        """The stages of a role's loss, in order, for measuring the time of each.

        Returns:
            By name, a function (networks, batch, draws of the role) that computes the loss up to the end of that stage;
            None for the last, which is the whole loss. Default: one stage, `forward`.
        """
        return {"forward": None}

    def turns(self, role: str) -> float:
        """Mean number of iterations of the loops in a role's loss whose number of iterations is drawn. Default: 1.

        It is used to estimate the time of an update.
        """
        return 1.0

    def typical(self, role: str, draws: Any) -> Any:
        """Replaces the draws of a role that determine the amount of computation by typical ones, to estimate time.

        Draws that `turns` accounts for may be left unchanged. Default: unchanged.
        """
        return draws

    def cache(self, role: str, networks: Networks, batch: Batch) -> Any:
        """Arrays that a role's loss keeps in memory while it generates a clip, such as keys and values.

        It is traced to estimate the memory of an update. Default: None, for none.

        Args:
            role: A role that trains.
            networks: All networks.
            batch: Examples.
        """
        return None

    def held_out(self, source: Source, *, windows: int, timesteps: int, batch: int) -> Iterator[HeldOut]:
        """The calls of a held-out evaluation, the same at every step and in every run.

        Default: `timesteps` draws from fixed keys for each batch; examples are repeated to fill the last batch.

        Args:
            source: Data, of which the held-out part is used.
            windows: Number of examples, spread over the held-out part.
            timesteps: Number of noise levels, or of draws.
            batch: Examples per call.

        Yields:
            The arguments of each call of `held_out_errors`.
        """
        indices = spread(source.held_out, windows)
        calls = max(1, -(-len(indices) // batch))
        for start in range(0, calls * batch, batch):
            examples = source.held_out_batch([indices[n % len(indices)] for n in range(start, start + batch)])
            for level in range(timesteps):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(20), start), level)
                yield HeldOut(examples, self.draws(key, examples), np.ones(()), 1)

    def held_out_errors(self, networks: Networks, batch: Batch, draws: Any) -> Mapping[str, Array]:
        """The errors of one call by role, which are averaged with the weights of `held_out`. Default: the losses.

        Args:
            networks: All networks, with their evaluated parameters.
            batch: Examples of the call.
            draws: Draws of the call.

        Returns:
            Errors by role, of a shape to which the weights of `held_out` can be broadcast.
        """
        return {role: self.loss(role, networks, batch, draws[role])[0] for role in self.settings.training}

    def checks(self) -> Sequence[Check]:
        """Checks of logged figures that show that a training collapses. Default: none."""
        return ()

    def samplers(self) -> Mapping[str, Sampler]:
        """Samplers of the exported role for videos during training, by label. Default: none."""
        return {}
