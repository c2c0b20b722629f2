"""Combinations of kinds: by layer, or one for the first layers, sampling steps or blocks of frames and another after.

A choice by layer is made when the network is built. A choice by step or block is made in the compiled program, which
contains both kinds over one cache and selects by the index (`lax.cond`). If samples or frames have steps of their own,
as in training on a sampler's states, both kinds are computed.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from monarch_jax.checks import index
from monarchrt.models.attention.base import (
    NO_CONTEXT,
    Attention,
    CacheShape,
    Clip,
    Context,
    Density,
    Grid,
    Layer,
    Steps,
    Tokens,
    mean_density,
    visible_share,
)


def _require_kind(owner: str, name: str, value: Any) -> None:
    if not isinstance(value, Attention):
        raise ValueError(f"{owner}: {name}={value!r} is not a kind of attention, such as dense or a setting of one.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ByLayer(Attention):
    """A kind that is replaced by each layer's own setting when the network is built."""

    def _here(self, context: Context) -> Attention:
        if not isinstance(context.layer, int):
            raise ValueError(f"{self}: layer={context.layer} is not static; call self.for_layer(number) first.")
        return self.for_layer(context.layer)

    def attend_clip(self, query: Tokens, key: Tokens, value: Tokens, clip: Clip) -> Tokens:
        """Calls the layer's own setting; `context.layer` must be static."""
        return self._here(clip.context)(query, key, value, **clip.fields())

    def init_cache(self, shape: CacheShape) -> Any:
        """Raises ValueError: each layer's setting creates its own cache."""
        raise ValueError(f"{self} has a cache for each layer's setting; take self.for_layer(number).")

    def attend_cache(self, cache: Any, query: Tokens, *, layer: Layer = None, context: Context = NO_CONTEXT) -> Tokens:
        """Calls the layer's own setting; `context.layer` must be static."""
        return self._here(context).attend_cache(cache, query, layer=layer, context=context)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerLayer(_ByLayer):
    """A setting for each layer: `per_layer(2 * dense, 28 * monarch)`.

    Attributes:
        settings: One for each layer of the network.
    """

    name = "per_layer"
    repeated = "settings"
    settings: tuple[Attention, ...]

    def __post_init__(self):
        self._set(settings=tuple(self.settings))
        if not self.settings:
            raise ValueError("per_layer: there are no settings; give one for each layer, such as 30 * dense.")
        for setting in self.settings:
            _require_kind(self.name, "a setting", setting)

    def parts(self) -> tuple[Attention, ...]:
        """The settings."""
        return self.settings

    def for_layer(self, layer: int) -> Attention:
        """The setting with this index."""
        return self.settings[layer].for_layer(layer)

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError unless there is one setting per layer."""
        if len(self.settings) != num_layers:
            raise ValueError(
                f"attention has {len(self.settings)} settings for num_layers={num_layers}; give one setting, or one "
                f"per layer."
            )
        super().check_layers(num_layers)

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """The mean over the layers."""
        layers = [setting.for_layer(layer) for layer, setting in enumerate(self.settings)]
        return mean_density((1, layer.density(grid, causal_block=causal_block, steps=steps)) for layer in layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstLayers(_ByLayer):
    """One kind in the first layers, another in the rest: `first_layers(2, dense, monarch)`.

    Attributes:
        layers: Number of first layers.
        first: The kind of these layers.
        after: The kind of the other layers.
    """

    name = "first_layers"
    positional = ("layers", "first", "after")
    layers: int
    first: Attention
    after: Attention

    def __post_init__(self):
        _check_two(self, "layers", self.layers)

    def parts(self) -> tuple[Attention, ...]:
        """Both kinds."""
        return self.first, self.after

    def after_warm_up(self) -> Attention:
        """The kind of the other layers."""
        return self.after.after_warm_up()

    def for_layer(self, layer: int) -> Attention:
        """`first` or `after`."""
        return (self.first if layer < self.layers else self.after).for_layer(layer)

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError if `layers` exceeds the number of layers."""
        if self.layers > num_layers:
            raise ValueError(f"{self}: layers={self.layers} is more than num_layers={num_layers}.")
        super().check_layers(num_layers)

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """The density of `after`, as the number of layers is not known; `density_of_network` averages over layers."""
        return self.after.density(grid, causal_block=causal_block, steps=steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _OneThenOther(Attention):
    """One kind while an index is below a limit, and another from there on, over one cache."""

    first: Attention
    after: Attention

    @abc.abstractmethod
    def _early(self, context: Context) -> bool | Array:
        """Whether `first` applies: static, or traced, for the call, for each sample [B], or each frame [B, F]."""

    def _pick(self, context: Context, call: Callable[[Attention], Array]) -> Array:
        early = self._early(context)
        if isinstance(early, bool):
            return call(self.first if early else self.after)
        if not early.ndim:
            return lax.cond(early, lambda: call(self.first), lambda: call(self.after))
        first, after = call(self.first), call(self.after)
        early = early.reshape(len(early), -1)  # [B, 1] or [B, F]
        return jnp.where(jnp.repeat(early, first.shape[1] // early.shape[1], axis=1)[..., None, None], first, after)

    def parts(self) -> tuple[Attention, ...]:
        """Both kinds."""
        return self.first, self.after

    def after_warm_up(self) -> Attention:
        """The kind after the first steps or blocks."""
        return self.after.after_warm_up()

    def for_layer(self, layer: int) -> Attention:
        """This combination of both kinds' settings for the layer; a single setting if they are equal."""
        first, after = self.first.for_layer(layer), self.after.for_layer(layer)
        return first if first == after else dataclasses.replace(self, first=first, after=after)

    def attend_clip(self, query: Tokens, key: Tokens, value: Tokens, clip: Clip) -> Tokens:
        """Calls the kind that applies."""
        return self._pick(clip.context, lambda kind: kind(query, key, value, **clip.fields()))

    def init_cache(self, shape: CacheShape) -> Any:
        """The cache of `after` if `first` can read it, or the reverse.

        Raises:
            ValueError: If neither can read the other's.
        """
        for owner, reader in ((self.after, self.first), (self.first, self.after)):
            cache = owner.init_cache(shape)
            if reader.reads(cache):
                return cache
        raise ValueError(
            f"{self}: {self.first} and {self.after} cannot share a cache; of tiled kinds, the frames of one tile must "
            f"be a multiple of the other's."
        )

    def reads(self, cache: Any) -> bool:
        """Whether both kinds can read the cache."""
        return self.first.reads(cache) and self.after.reads(cache)

    @property
    def layers_apart(self) -> bool:
        """Whether either kind prefers a cache per layer."""
        return self.first.layers_apart or self.after.layers_apart

    def attend_cache(self, cache: Any, query: Tokens, *, layer: Layer = None, context: Context = NO_CONTEXT) -> Tokens:
        """Calls the kind that applies."""
        return self._pick(context, lambda kind: kind.attend_cache(cache, query, layer=layer, context=context))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstSteps(_OneThenOther):
    """One kind in the first sampling steps, another after: `first_steps(1, dense, monarch)`.

    Without steps, as in training on random noise levels, `after` applies.

    Attributes:
        steps: Number of first network calls of each clip or block of frames.
        first: The kind of these calls.
        after: The kind of all other calls, including the one that rewrites the cache.
    """

    name = "first_steps"
    positional = ("steps", "first", "after")
    steps: int

    def __post_init__(self):
        _check_two(self, "steps", self.steps)

    def _early(self, context: Context) -> bool | Array:
        return False if context.step is None else _less(context.step, self.steps)

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """The mean over `steps` sampling steps; the density of `after` if `steps` is None."""
        first, after = (part.density(grid, causal_block=causal_block, steps=steps) for part in (self.first, self.after))
        if steps is None:
            return after
        early = min(self.steps, steps)
        return mean_density([(early, first), (steps - early, after)])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstBlocks(_OneThenOther):
    """One kind in the first blocks of frames, another after: `first_blocks(1, dense, monarch)`.

    A whole clip with `causal_block` gives the same result as a roll-out block by block.

    Attributes:
        blocks: Number of first blocks.
        first: The kind for the queries of these blocks.
        after: The kind for the queries of later blocks, to the keys of all blocks so far.
    """

    name = "first_blocks"
    positional = ("blocks", "first", "after")
    blocks: int

    def __post_init__(self):
        _check_two(self, "blocks", self.blocks)

    @property
    def by_blocks(self) -> bool:
        """Always True."""
        return True

    def _early(self, context: Context) -> bool | Array:
        if context.block is None:
            raise ValueError(
                f"{self}: the number of the block is not known; generate block by block, or set causal_block for a "
                f"whole clip."
            )
        return _less(context.block, self.blocks)

    def attend_clip(self, query: Tokens, key: Tokens, value: Tokens, clip: Clip) -> Tokens:
        """Calls the kind that applies; in a whole clip, `first` for the first blocks and `after` for the others."""
        if clip.causal_block is None or clip.context.block is not None:
            return super().attend_clip(query, key, value, clip)
        frames = min(self.blocks * clip.causal_block, clip.grid[0])
        tokens, parts = frames * clip.per_frame, []
        if frames:
            early = (query[:, :tokens], key[:, :tokens], value[:, :tokens])
            context = clip.context.of_frames(0, frames, clip.per_frame)
            part = dataclasses.replace(clip, grid=(frames, *clip.grid[1:]), context=context)
            parts.append(self.first.for_frames(clip.grid[0])(*early, **part.fields()))
        if frames < clip.grid[0]:
            parts.append(self.after(query, key, value, **clip.fields())[:, tokens:])
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """The mean over the visible entries of all frames if `causal_block` is given; else the density of `after`."""
        if causal_block is None:
            return self.after.density(grid, steps=steps)
        frames = min(self.blocks * causal_block, grid[0])

        def parts(kind: Attention, count: int) -> tuple[float, Density]:
            """Visible pairs of frames for queries of the first `count` frames, and the kind's density there."""
            part = (count, *grid[1:])
            seen = visible_share(part, causal_block) * count**2
            if not count:
                return seen, Density(0, 0, 0)
            return seen, kind.for_frames(grid[0]).density(part, causal_block=causal_block, steps=steps)

        (all_seen, late), (early_seen, early), (_, apart) = (
            parts(self.after, grid[0]),
            parts(self.first, frames),
            parts(self.after, frames),
        )
        asked, visible = ((all_seen * late[n] + early_seen * (early[n] - apart[n])) / all_seen for n in (0, 2))
        return Density(asked, visible * visible_share(grid, causal_block), visible)


def _less(number: Steps, limit: int) -> bool | Array:
    """Whether a number, static or traced, is below the limit."""
    return number < limit if isinstance(number, int) else jnp.asarray(number) < limit


def _check_two(setting: Any, name: str, count: int) -> None:
    """Raises ValueError unless `count` is an integer of at least 0 and `first` and `after` are attention kinds."""
    count = int(index(name, count))
    if count < 0:
        raise ValueError(f"{setting.name}: {name}={count} must be at least 0.")
    setting._set(**{name: count})
    for part in ("first", "after"):
        _require_kind(setting.name, part, getattr(setting, part))
