"""What an attention kind is: a frozen dataclass that attends on a grid of tokens and over a cache of frames."""

import abc
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from monarch_jax import MonarchKVCache
from monarchrt.models.attention.explicit import on_explicit_axes, over_any_cache

type Grid = tuple[int, int, int]  # frames, rows and columns of tokens
type Number = int | Int[Array, ""] | None  # known, traced, or not there
type Steps = (
    Number | Int[Array, "B"] | Int[Array, "B frames"]
)  # of the whole call, each sample, or each frame of tokens
type Tokens = Float[Array, "B N n d"]  # N = F*h*w tokens of n heads
type Layer = Int[Array, ""] | None  # which of a cache of several
HOW = {"how": True}  # metadata of a field that says how, not what, is computed: weights do not depend on it


@runtime_checkable
class Sizes(Protocol):
    """What a kind is told of the network when it makes its parameters; `WanConfig` is one."""

    @property
    def dim(self) -> int:
        """Width of the residual stream, D."""
        ...

    @property
    def num_heads(self) -> int:
        """Attention heads, n."""
        ...

    @property
    def head_dim(self) -> int:
        """Channels of a head, d."""
        ...

    @property
    def dtype(self) -> str:
        """Of the computation."""
        ...

    @property
    def param_dtype(self) -> str:
        """Of the parameters."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """Where in the network and in the generation an attention is called, and what is a kind's own there.

    Attributes:
        layer: Number of the layer, from 0; traced inside a scan over layers.
        step: Call of the network within the sampler, from 0; the call that rewrites the cache comes after the last.
            In training on states of a sampler one for each sample, [B], or each frame of queries, [B, F]. None where
            there are no steps.
        block: Number of the block of frames in a roll-out, from 0. None where a whole clip is seen at once.
        inputs: () -> what queries, keys and values are projections of, [B, N, D], for gates.
        modules: Parameters of this layer by the name of the kind that made them.
    """

    layer: Number = None
    step: Steps = None
    block: Number = None
    inputs: Callable[[], Array] | None = None
    modules: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def own(self, setting: "Attention") -> Any:
        """The module that `setting.init` made for this layer.

        Raises:
            ValueError: If there is none, as in a model built for another attention.
        """
        if setting.name not in self.modules:
            raise ValueError(f"{setting}: the model has no parameters of its own for it; use model.with_attention.")
        return self.modules[setting.name]

    def of_frames(self, first: int | Int[Array, ""], frames: int, per_frame: int) -> "Context":
        """The context of some frames' queries: with their own steps and inputs.

        Args:
            first: The first of them, known or traced.
            frames: How many.
            per_frame: Tokens of a frame.
        """

        def own(x: Array, size: int) -> Array:
            return lax.dynamic_slice_in_dim(x, first * size, frames * size, axis=1)

        step, inputs = self.step, self.inputs
        return dataclasses.replace(
            self,
            step=own(jnp.asarray(step), 1) if jnp.ndim(0 if step is None else step) == 2 else step,
            inputs=None if inputs is None else lambda: own(inputs(), per_frame),
        )


NOWHERE = Context()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """What a call without a cache is about, the arguments of `Attention.__call__` as a kind gets them.

    Attributes:
        grid: (F, h, w) tokens.
        causal_block: Frames per block: a block sees itself and earlier ones. None sees everything.
        context: Where this is.
    """

    grid: Grid
    causal_block: int | None = None
    context: Context = NOWHERE

    def fields(self) -> dict[str, Any]:
        """The fields by name."""
        return {"grid": self.grid, "causal_block": self.causal_block, "context": self.context}

    @property
    def per_frame(self) -> int:
        """Tokens of a frame."""
        return self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        """Tokens of the whole clip, N."""
        return self.grid[0] * self.per_frame

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Where each causal block begins and ends, in frames; what it sees ends with it.

        Examples:
            >>> Clip(grid=(5, 1, 1), causal_block=2).blocks, Clip(grid=(5, 1, 1)).blocks
            ([(0, 2), (2, 4), (4, 5)], [(0, 5)])
        """
        frames = self.grid[0]
        step = self.causal_block or frames
        return [(start, min(start + step, frames)) for start in range(0, frames, step)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What a cache should hold; the fields but the last are the arguments of `monarch_jax.MonarchKVCache.init`.

    `block` is how many frames are written at a time, where that is always as many; None: it is not known.
    """

    batch: int
    frames: int
    height: int
    width: int
    heads: int
    head_dim: int
    layers: int | None = None
    rolling: bool = False
    sink_frames: int = 0
    detach_past: bool = False
    dtype: str = "bfloat16"
    block: int | None = None

    def fields(self) -> dict[str, Any]:
        """The arguments by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "block"}


class Cache(Protocol):
    """Keys and values of frames: a dataclass and a pytree whose arrays all have a leading axis of layers, if any has.

    `monarch_jax.MonarchKVCache` is one; a kind that keeps more, such as pooled keys, brings its own. One that holds
    rotated keys elsewhere than in `key` has a method `map_keys(function)` too.
    """

    length: Any
    """int32 scalar, frames written so far. The same for all layers, it is kept once, and put in before each use."""

    def append(self, key: Array, value: Array, *, frame: Any = None, layer: Any = None) -> Any:
        """With the tokens of a block of frames written at `frame`, in the given layer."""
        ...


def map_keys(cache: Any, function: Callable[[Array], Array]) -> Any:
    """The cache with its keys passed through a function that keeps shapes, such as a rotation."""
    if hasattr(cache, "map_keys"):
        return cache.map_keys(function)
    return dataclasses.replace(cache, key=function(cache.key))


class Density(NamedTuple):
    """How much of the attention map, N^2 entries for N tokens, there is.

    Examples:
        >>> print(Density(asked=0.03, kept=0.017, visible=0.03))
        1.7% of the map, 3.0% of what is visible

    Attributes:
        asked: Share that the setting names.
        kept: Share of all N^2 entries that is computed or, for a structured map, stored.
        visible: Share of the entries that are not masked: `kept`, unless attention is block-causal.

    Shares that depend on the data are NaN.
    """

    asked: float
    kept: float
    visible: float

    def __str__(self) -> str:
        if math.isnan(self.kept):
            return "a part of the map that depends on the data"
        text = f"{self.kept:.1%} of the map"
        if abs(self.visible - self.kept) > 5e-4:
            text += f", {self.visible:.1%} of what is visible"
        if abs(self.asked - self.visible) > 5e-4:
            text += f" (asked for: {self.asked:.1%})"
        return text


def visible_share(grid: Grid, causal_block: int | None) -> float:
    """Share of the map that is not masked.

    Examples:
        >>> round(visible_share((21, 30, 52), 3), 3)
        0.571
    """
    if causal_block is None:
        return 1.0
    frames = grid[0]
    return sum(min(frames, (frame // causal_block + 1) * causal_block) for frame in range(frames)) / frames**2


def mean_density(parts: Iterable[tuple[int | float, Density]]) -> Density:
    """The mean of densities by weight."""
    parts = list(parts)
    total = sum(weight for weight, _ in parts)
    return Density(*(sum(weight * values[n] for weight, values in parts) / total for n in range(3)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(abc.ABC):
    """A kind of self-attention and its settings. Subclasses are frozen, keyword-only dataclasses with a `name`.

    Only `attend_clip`, `attend_cache` and `density` must be written; the rest has defaults for a kind that has no
    parameters and reads keys in token order. `attend_clip` gets what `__call__` has checked. `str(setting)` is its
    notation, see `monarchrt.models.attention.notation`.

    Fields hold numbers, strings, bools, None, tuples of these, or other kinds; they should be checked in
    `__post_init__`, as far as that is possible without a grid. A field with `metadata=HOW`, such as the name of a
    backend, says how the same numbers are computed; it is not stored with weights.
    """

    name: ClassVar[str]
    """In the registry and in the notation."""

    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that the notation writes without their names, first."""

    repeated: ClassVar[str | None] = None
    """A field, a tuple of kinds, that the notation writes as all its positional arguments."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "attend_cache" in vars(cls):
            cls.attend_cache = over_any_cache(cls.attend_cache, nowhere=NOWHERE)

    def __str__(self) -> str:
        from monarchrt.models.attention.notation import to_text

        return to_text(self)

    def _set(self, **values: Any) -> None:
        """Fields in their normal form, for `__post_init__`."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    # Composition

    def parts(self) -> tuple["Attention", ...]:
        """The kinds that this one is made of; none unless it is a wrapper."""
        return ()

    def for_layer(self, layer: int) -> "Attention":
        """The setting of one layer. Layers of equal settings that follow each other are one scan."""
        return self

    def for_frames(self, frames: int) -> "Attention":
        """The setting for a call on the beginning of a clip of so many frames, where what it keeps depends on that."""
        return self._with_parts(lambda part: part.for_frames(frames))

    def after_warm_up(self) -> "Attention":
        """The setting without first layers, steps or blocks that have another kind."""
        return self._with_parts(lambda part: part.after_warm_up())

    def _with_parts(self, change: "Callable[[Attention], Attention]", **changes: Any) -> "Attention":
        """With every kind in a field changed, and other changes."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Attention):
                changes[field.name] = change(value)
            elif isinstance(value, tuple) and any(isinstance(item, Attention) for item in value):
                changes[field.name] = tuple(change(item) for item in value)
        return dataclasses.replace(self, **changes) if changes else self

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError unless the setting suits a network of so many layers."""
        for part in self.parts():
            part.check_layers(num_layers)

    @property
    def unit(self) -> Grid | None:
        """Tokens that must divide a grid, for advice; None if any grid will do, or if it cannot be told."""
        return next((part.unit for part in self.parts() if part.unit is not None), None)

    @property
    def by_blocks(self) -> bool:
        """Whether it must be told the block of frames, so that a whole clip needs `causal_block`."""
        return any(part.by_blocks for part in self.parts())

    # Without a cache

    def check(self, grid: Grid | None, *, causal_block: int | None = None) -> None:
        """Raises ValueError unless the setting fits a grid, or some grid if it is None, and the causal blocks."""
        for part in self.parts():
            part.check(grid, causal_block=causal_block)

    def check_block(self, grid: Grid, *, whole: Grid | None = None) -> None:
        """Raises ValueError unless the setting fits a block of frames over a cache.

        Args:
            grid: Tokens (F, h, w) of the block.
            whole: Those of the clip, or that the cache holds, if that is known by now.
        """
        for part in self.parts():
            part.check_block(grid, whole=whole)
        if not self.parts():
            self.check(grid)

    def init(self, sizes: Sizes, *, rngs: nnx.Rngs) -> nnx.Module | None:
        """Parameters of one layer, `nnx.Param`s in a module, which come back as `context.own(self)`; None: it has none.

        All layers have them, stacked like the block's other parameters. They live in the block, so the optimizer,
        checkpoints, averages and exports hold them as they hold the others.
        """
        return None

    def __call__(
        self,
        query: Tokens,
        key: Tokens,
        value: Tokens,
        *,
        grid: Grid,
        causal_block: int | None = None,
        context: Context = NOWHERE,
    ) -> Tokens:
        """Attention among all tokens of a grid, after the rotary embedding.

        Args:
            query: [B, F*h*w, heads, head_dim].
            key: As `query`.
            value: As `query`.
            grid: (F, h, w) tokens.
            causal_block: Frames per block: a block sees itself and earlier ones. None sees everything.
            context: Where this is.

        Returns:
            As `query`, in its dtype.

        Raises:
            ValueError: If the setting, or the tokens, do not fit the grid.
        """
        if causal_block is not None and causal_block < 1:
            raise ValueError(f"causal_block={causal_block} must be at least 1, or None for attention to all frames.")
        clip = Clip(grid=grid, causal_block=causal_block, context=context)
        for name, tokens in {"query": query, "key": key, "value": value}.items():
            if tokens.shape[1] != clip.tokens:
                raise ValueError(f"{name} has {tokens.shape[1]} tokens; grid={grid} has {clip.tokens}.")
        self.check(grid, causal_block=causal_block)
        if not jax.typeof(query).sharding.mesh.explicit_axes:
            return self.attend_clip(query, key, value, clip)

        def attend(query: Tokens, key: Tokens, value: Tokens, context: Context) -> Tokens:
            return self.attend_clip(query, key, value, dataclasses.replace(clip, context=context))

        return on_explicit_axes(attend, (query, key, value), context)

    def attend_clip(self, query: Tokens, key: Tokens, value: Tokens, clip: Clip) -> Tokens:
        """What a kind does in a call; grid and causal block were checked.

        Args:
            query: [B, F*h*w, heads, head_dim].
            key: As `query`.
            value: As `query`.
            clip: Grid, causal block and context.

        Returns:
            As `query`, in its dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} has no attend_clip, which a kind must have.")

    # Over a cache

    def init_cache(self, shape: CacheShape) -> Any:
        """An empty `Cache`; by default keys and values in token order."""
        return MonarchKVCache.init(**shape.fields())

    def reads(self, cache: Any) -> bool:
        """Whether `attend_cache` takes a cache that another kind made; kinds in a schedule share one."""
        return isinstance(cache, MonarchKVCache)

    @property
    def layers_apart(self) -> bool:
        """Whether generation with layers apart (`unroll_layers`) makes each a cache of its own, read with `layer` 0.

        A kernel that cannot read one layer where those of all lie reads a copy of it, of all frames that there is room
        for, in every call.
        """
        return False

    @abc.abstractmethod
    def attend_cache(self, cache: Any, query: Tokens, *, layer: Layer = None, context: Context = NOWHERE) -> Tokens:
        """Attention of the newest block's queries over one layer's cache, the block written.

        On a mesh of explicit axes it sees none of them, as `attend_clip` (`explicit.over_any_cache`).

        Args:
            cache: One that `init_cache` made, or that this kind `reads`.
            query: [B, F*h*w, heads, head_dim].
            layer: Which layer, if the cache is that of several.
            context: Where this is.

        Returns:
            As `query`.
        """

    # What it costs

    @abc.abstractmethod
    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """How much of the attention map there is.

        Args:
            grid: (F, h, w) tokens.
            causal_block: As in the call.
            steps: Sampling steps to average over, for settings that depend on the step.

        Returns:
            The shares.

        Raises:
            ValueError: If the setting does not fit the grid.
        """

    def flops(self, grid: Grid, *, key_frames: int | None = None, heads: int, head_dim: int) -> int:
        """Multiply-adds, counted as 2, in the matrix products of one forward, all keys visible.

        Args:
            grid: (F, h, w) of the queries.
            key_frames: Frames of the keys; None: F.
            heads: Attention heads.
            head_dim: Channels of a head.

        Returns:
            The count for one sample; by default the product of dense attention with the density, or dense attention's
            if that depends on the data.
        """
        tokens = grid[0] * grid[1] * grid[2]
        keys = (key_frames or grid[0]) * grid[1] * grid[2]
        share = self.density(grid).visible
        return round(4 * tokens * keys * head_dim * heads * (1.0 if math.isnan(share) else share))

    def attention_map(
        self,
        query: Tokens,
        key: Tokens,
        *,
        grid: Grid,
        causal_block: int | None = None,
        context: Context = NOWHERE,
    ) -> Float[Array, "B n N N"]:
        """The map that the output is the product of with the values, in small cases and for pictures.

        It is what comes out for values that are unit vectors, head_dim of them at a time.
        """
        batch, tokens, heads, width = query.shape
        units = jnp.eye(tokens, -(-tokens // width) * width, dtype=query.dtype)
        call = functools.partial(self, query, key, grid=grid, causal_block=causal_block, context=context)
        columns = [
            call(jnp.broadcast_to(units[:, None, at : at + width], (batch, tokens, heads, width)))
            for at in range(0, tokens, width)
        ]
        return jnp.moveaxis(jnp.concatenate(columns, axis=-1)[..., :tokens], 2, 1)

    # As data

    def stored(self) -> "Attention":
        """The setting as it is kept with weights: without what says how, not what, is computed."""
        how = {field.name: field.default for field in dataclasses.fields(self) if field.metadata.get("how")}
        return self._with_parts(lambda part: part.stored(), **how)

    @classmethod
    def from_old_json(cls, data: Any) -> "Attention | None":
        """The setting in a form that files had before the notation, if it is one of this kind; else None."""
        return None


def zero_linear(inputs: int, outputs: int, sizes: Sizes, *, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer that starts at zero, [inputs, outputs] and a bias: with it a kind begins as without.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> bool(zero_linear(2, 3, wan_config("tiny"), rngs=nnx.Rngs(0))(jnp.ones((1, 2))).any())
        False
    """
    zeros = nnx.initializers.zeros_init()
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(sizes.dtype), "param_dtype": jnp.dtype(sizes.param_dtype)}
    return nnx.Linear(inputs, outputs, kernel_init=zeros, bias_init=zeros, **dtypes, rngs=rngs)


def leaves(setting: Attention) -> list[Attention]:
    """The kinds that a setting is made of in the end, which attend themselves.

    Examples:
        >>> from monarchrt.models.attention.notation import parse
        >>> [leaf.name for leaf in leaves(parse("first_layers(2, dense, first_steps(1, dense, monarch))"))]
        ['dense', 'dense', 'monarch']
    """
    parts = setting.parts()
    return [leaf for part in parts for leaf in leaves(part)] if parts else [setting]
