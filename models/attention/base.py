"""The interface of attention kinds: frozen dataclasses that attend on a grid of tokens and over a cache of frames."""

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
from monarch_jax.checks import array
from monarchrt.models.attention.explicit import on_explicit_axes, over_any_cache

type Grid = tuple[int, int, int]  # frames, rows and columns of tokens
type Number = int | Int[Array, ""] | None  # static, traced, or absent
type Steps = (
    Number | Int[Array, "B"] | Int[Array, "B frames"]
)  # one for the call, one per sample, or one per frame of tokens
type Tokens = Float[Array, "B N n d"]  # N = F*h*w tokens of n heads
type Layer = Int[Array, ""] | None  # index of the layer in a cache of several
# metadata of fields that select how the same numbers are computed and are not stored with weights
NOT_STORED = {"stored": False}
# metadata of fields that the notation includes even at their default, such as the fraction that is kept
ALWAYS_WRITTEN = {"written": True}


@runtime_checkable
class Sizes(Protocol):
    """Sizes of the network, from which a kind creates its parameters; `WanConfig` implements it."""

    @property
    def dim(self) -> int:
        """Channels of the residual stream, D."""
        ...

    @property
    def num_heads(self) -> int:
        """Attention heads, n."""
        ...

    @property
    def head_dim(self) -> int:
        """Channels per head, d."""
        ...

    @property
    def dtype(self) -> str:
        """Dtype of the computation."""
        ...

    @property
    def param_dtype(self) -> str:
        """Dtype of the parameters."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
    """The place of a call in the network and in generation, and the parameters of attention kinds in this layer.

    Attributes:
        layer: Index of the layer; traced inside a scan over layers.
        step: Index of the network call within the sampler; the call that rewrites the cache comes last. In training on
            states of a sampler, one per sample, [B], or per frame of queries, [B, F]. None without a sampler.
        block: Index of the block of frames in a roll-out. None for a whole clip.
        inputs: Function that returns the input of the projections to queries, keys and values, [B, N, D], for gates.
        modules: Parameters of this layer by the name of their kind.
    """

    layer: Number = None
    step: Steps = None
    block: Number = None
    inputs: Callable[[], Array] | None = None
    modules: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def own(self, setting: "Attention") -> Any:
        """The module that `setting.init` created for this layer.

        Raises:
            ValueError: If there is none, as in a model that was built for another attention.
        """
        if setting.name not in self.modules:
            raise ValueError(f"{setting}: the model has no parameters of its own for it; use model.with_attention.")
        return self.modules[setting.name]

    def of_frames(self, first: int | Int[Array, ""], frames: int, per_frame: int) -> "Context":
        """The context restricted to the queries of some frames.

        Args:
            first: Index of the first frame, which may be traced.
            frames: Number of frames.
            per_frame: Tokens per frame.
        """

        def own(x: Array, size: int) -> Array:
            return lax.dynamic_slice_in_dim(x, first * size, frames * size, axis=1)

        step, inputs = self.step, self.inputs
        return dataclasses.replace(
            self,
            step=own(jnp.asarray(step), 1) if jnp.ndim(0 if step is None else step) == 2 else step,
            inputs=None if inputs is None else lambda: own(inputs(), per_frame),
        )


NO_CONTEXT = Context()  # for calls outside of a network


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """The checked arguments of a call without a cache, as `Attention.attend_clip` gets them.

    Attributes:
        grid: (F, h, w) tokens.
        causal_block: Frames per block of a block-causal mask; None for bidirectional attention.
        context: Place of the call in the network and in generation.
    """

    grid: Grid
    causal_block: int | None = None
    context: Context = NO_CONTEXT

    def fields(self) -> dict[str, Any]:
        """The fields by name."""
        return {"grid": self.grid, "causal_block": self.causal_block, "context": self.context}

    @property
    def per_frame(self) -> int:
        """Tokens per frame."""
        return self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        """Tokens of the whole clip, N."""
        return self.grid[0] * self.per_frame

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """First and last frame (exclusive) of each causal block; a block does not see frames after its end.

        Examples:
            >>> Clip(grid=(5, 1, 1), causal_block=2).blocks, Clip(grid=(5, 1, 1)).blocks
            ([(0, 2), (2, 4), (4, 5)], [(0, 5)])
        """
        frames = self.grid[0]
        step = self.causal_block or frames
        return [(start, min(start + step, frames)) for start in range(0, frames, step)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheShape:
    """Sizes of a cache; all fields but `block` are arguments of `monarch_jax.MonarchKVCache.init`.

    `block` is the number of frames written at a time, or None if it varies or is not known.
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
    """Keys and values of frames: a dataclass and pytree whose arrays all have, or all lack, a leading axis of layers.

    `monarch_jax.MonarchKVCache` implements it; a kind that caches more, such as pooled keys, needs its own class. A
    class with rotated keys outside `key` also needs a method `map_keys(function)`.
    """

    length: Any
    """int32 scalar, frames written so far, shared by all layers: it is stored once and set before each use."""

    def append(self, key: Array, value: Array, *, frame: Number = None, layer: Layer = None) -> "Cache":
        """The cache with a block of frames written at `frame` of the given layer.

        Args:
            key: Keys of the block, [B, N, heads, head_dim], rotated.
            value: Values, likewise.
            frame: Absolute index of the block's first frame, which may be traced; None: the frame after the
                newest.
            layer: Index into the caches of several layers; None: the cache has no axis of layers.
        """
        ...


def map_keys(cache: Any, function: Callable[[Array], Array]) -> Any:
    """The cache with a shape-preserving function, such as a rotation, applied to its keys."""
    if hasattr(cache, "map_keys"):
        return cache.map_keys(function)
    return dataclasses.replace(cache, key=function(cache.key))


class Density(NamedTuple):
    """The fraction of the attention map, N^2 entries for N tokens, that is kept.

    Examples:
        >>> print(Density(asked=0.03, kept=0.017, visible=0.03))
        1.7% of the map, 3.0% of what is visible

    Attributes:
        asked: Fraction that the setting requests.
        kept: Fraction of all N^2 entries that is computed or, for a structured map, stored.
        visible: Kept fraction of the entries that are not masked; equals `kept` unless attention is block-causal.

    Fractions that depend on the data are NaN.
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
    """Fraction of the map that is not masked.

    Examples:
        >>> round(visible_share((21, 30, 52), 3), 3)
        0.571
    """
    if causal_block is None:
        return 1.0
    frames = grid[0]
    return sum(min(frames, (frame // causal_block + 1) * causal_block) for frame in range(frames)) / frames**2


def mean_density(parts: Iterable[tuple[int | float, Density]]) -> Density:
    """The weighted mean of densities."""
    parts = list(parts)
    total = sum(weight for weight, _ in parts)
    return Density(*(sum(weight * values[n] for weight, values in parts) / total for n in range(3)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention(abc.ABC):
    """A kind of self-attention and its settings. Subclasses are frozen, keyword-only dataclasses with a `name`.

    Only `attend_clip`, `attend_cache` and `density` are required; the other methods have defaults for a kind without
    parameters that reads keys in token order. `__call__` checks its arguments and calls `attend_clip`. `str(setting)`
    is its notation, see `monarchrt.models.attention.notation`.

    Fields hold numbers, strings, bools, None, tuples of these, or other kinds; check them in `__post_init__` as far as
    that is possible without a grid. A field with `metadata=NOT_STORED`, such as the name of a backend, selects how the
    same numbers are computed and is not stored with weights. One with `metadata=ALWAYS_WRITTEN` is in the notation even
    with its default.
    """

    name: ClassVar[str]
    """Name in the registry and in the notation."""

    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that the notation writes first and without their names."""

    repeated: ClassVar[str | None] = None
    """A field holding a tuple of kinds, which the notation writes as its positional arguments."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "attend_cache" in vars(cls):
            cls.attend_cache = over_any_cache(cls.attend_cache, no_context=NO_CONTEXT)

    def __str__(self) -> str:
        from monarchrt.models.attention.notation import to_text

        return to_text(self)

    def _set(self, **values: Any) -> None:
        """Sets fields of the frozen dataclass, in `__post_init__`."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    # Composition

    def parts(self) -> tuple["Attention", ...]:
        """The kinds that this one combines; none unless it is a wrapper."""
        return ()

    def for_layer(self, layer: int) -> "Attention":
        """The setting of one layer. Consecutive layers with equal settings form one scan."""
        return self

    def for_frames(self, frames: int) -> "Attention":
        """The setting for a call on the beginning of a clip of this many frames, if its mask depends on the number."""
        return self._with_parts(lambda part: part.for_frames(frames))

    def after_warm_up(self) -> "Attention":
        """The setting without the warm-up: first layers, steps or blocks that have another kind."""
        return self._with_parts(lambda part: part.after_warm_up())

    def _with_parts(self, change: "Callable[[Attention], Attention]", **changes: Any) -> "Attention":
        """The setting with `change` applied to every kind in its fields, and with other changes of fields."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Attention):
                changes[field.name] = change(value)
            elif isinstance(value, tuple) and any(isinstance(item, Attention) for item in value):
                changes[field.name] = tuple(change(item) for item in value)
        return dataclasses.replace(self, **changes) if changes else self

    def check_layers(self, num_layers: int) -> None:
        """Raises ValueError unless the setting is valid for a network with this many layers."""
        for part in self.parts():
            part.check_layers(num_layers)

    @property
    def unit(self) -> Grid | None:
        """Tokens (f, h, w) that must divide a grid, for messages; None if any grid is valid or it is not known."""
        return next((part.unit for part in self.parts() if part.unit is not None), None)

    @property
    def by_blocks(self) -> bool:
        """Whether it needs the index of the block of frames, so that a whole clip needs `causal_block`."""
        return any(part.by_blocks for part in self.parts())

    # Without a cache

    def check(self, grid: Grid | None, *, causal_block: int | None = None) -> None:
        """Raises ValueError unless the setting fits the grid (None: at least one grid) and the causal blocks."""
        for part in self.parts():
            part.check(grid, causal_block=causal_block)

    def check_block(self, grid: Grid, *, whole: Grid | None = None) -> None:
        """Raises ValueError unless the setting fits a block of frames over a cache.

        Args:
            grid: Tokens (F, h, w) of the block.
            whole: Tokens of the whole clip or cache, if known.
        """
        for part in self.parts():
            part.check_block(grid, whole=whole)
        if not self.parts():
            self.check(grid)

    def init(self, sizes: Sizes, *, rngs: nnx.Rngs) -> nnx.Module | None:
        """Creates the parameters of one layer, a module that `context.own(self)` returns; None without parameters.

        They are stacked over layers and treated like the block's other parameters by the optimizer, checkpoints,
        averages and exports.
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
        context: Context = NO_CONTEXT,
    ) -> Tokens:
        """Attention among all tokens of a grid, after the rotary embedding.

        Args:
            query: [B, F*h*w, heads, head_dim].
            key: As `query`.
            value: As `query`.
            grid: (F, h, w) tokens.
            causal_block: Frames per block of a block-causal mask; None for bidirectional attention.
            context: Place of the call in the network and in generation.

        Returns:
            An array like `query`, in its dtype.

        Raises:
            ValueError: If the setting or the tokens do not fit the grid.
        """
        if causal_block is not None and causal_block < 1:
            raise ValueError(f"causal_block={causal_block} must be at least 1, or None for attention to all frames.")
        clip = Clip(grid=grid, causal_block=causal_block, context=context)
        query, key, value = (array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
        for name, tokens in {"query": query, "key": key, "value": value}.items():
            if tokens.ndim != 4 or 0 in tokens.shape:
                form = f"[B, {clip.tokens}, heads, head_dim], each at least 1"
                raise ValueError(f"{name} has shape {tokens.shape}; it should be {form}.")
            if tokens.shape[1] != clip.tokens:
                raise ValueError(f"{name} has {tokens.shape[1]} tokens; grid={grid} has {clip.tokens}.")
            if tokens.shape != query.shape or tokens.dtype != query.dtype:
                what = f"shape {tokens.shape}, dtype {tokens.dtype.name}; query has {query.shape}, {query.dtype.name}"
                raise ValueError(f"{name} has {what}.")
        self.check(grid, causal_block=causal_block)
        if not jax.typeof(query).sharding.mesh.explicit_axes:
            return self.attend_clip(query, key, value, clip)

        def attend(query: Tokens, key: Tokens, value: Tokens, context: Context) -> Tokens:
            return self.attend_clip(query, key, value, dataclasses.replace(clip, context=context))

        return on_explicit_axes(attend, (query, key, value), context)

    def attend_clip(self, query: Tokens, key: Tokens, value: Tokens, clip: Clip) -> Tokens:
        """Attention of a clip; the arguments have been checked.

        Args:
            query: [B, F*h*w, heads, head_dim].
            key: As `query`.
            value: As `query`.
            clip: Grid, causal block and context.

        Returns:
            An array like `query`, in its dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define attend_clip, which every kind needs.")

    # Over a cache

    def init_cache(self, shape: CacheShape) -> Any:
        """An empty `Cache`; by default keys and values in token order."""
        return MonarchKVCache.init(**shape.fields())

    def reads(self, cache: Any) -> bool:
        """Whether `attend_cache` can read a cache created by another kind, as kinds in a schedule share one."""
        return isinstance(cache, MonarchKVCache)

    @property
    def layers_apart(self) -> bool:
        """Whether generation with unrolled layers (`unroll_layers`) gives each layer its own cache, read as `layer` 0.

        This suits kernels that cannot read one layer of a stacked cache in place, for which XLA would copy the whole
        layer in every call.
        """
        return False

    @abc.abstractmethod
    def attend_cache(self, cache: Any, query: Tokens, *, layer: Layer = None, context: Context = NO_CONTEXT) -> Tokens:
        """Attention of the newest block's queries over one layer's cache, which already contains the block.

        Like `attend_clip`, it runs in auto mode on meshes with explicit axes (`explicit.over_any_cache`).

        Args:
            cache: A cache from `init_cache`, or one that this kind `reads`.
            query: [B, F*h*w, heads, head_dim].
            layer: Index of the layer, if the cache holds several.
            context: Place of the call in the network and in generation.

        Returns:
            An array like `query`.
        """

    # Cost

    @abc.abstractmethod
    def density(self, grid: Grid, *, causal_block: int | None = None, steps: int | None = None) -> Density:
        """The fraction of the attention map that is kept.

        Args:
            grid: (F, h, w) tokens.
            causal_block: As in the call.
            steps: Number of sampling steps to average over, for settings that depend on the step.

        Returns:
            The fractions.

        Raises:
            ValueError: If the setting does not fit the grid.
        """

    def flops(self, grid: Grid, *, key_frames: int | None = None, heads: int, head_dim: int) -> int:
        """FLOPs of the matrix products of one forward pass with all keys visible, a multiply-add counted as 2.

        Args:
            grid: (F, h, w) of the queries.
            key_frames: Frames of the keys; None: F.
            heads: Number of attention heads.
            head_dim: Channels of a head.

        Returns:
            FLOPs for one sample; by default those of dense attention times the density, or without this factor if the
            density depends on the data.
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
        context: Context = NO_CONTEXT,
    ) -> Float[Array, "B n N N"]:
        """The attention map, the matrix that multiplies the values, for small inputs and plots.

        It is the output for unit vectors as values, computed for head_dim of them at a time.

        Args:
            query: As in the call.
            key: As in the call.
            grid: As in the call.
            causal_block: As in the call.
            context: As in the call.

        Returns:
            [B, heads, N, N], rows by query.
        """
        batch, tokens, heads, width = query.shape
        units = jnp.eye(tokens, -(-tokens // width) * width, dtype=query.dtype)
        call = functools.partial(self, query, key, grid=grid, causal_block=causal_block, context=context)
        columns = [
            call(jnp.broadcast_to(units[:, None, at : at + width], (batch, tokens, heads, width)))
            for at in range(0, tokens, width)
        ]
        return jnp.moveaxis(jnp.concatenate(columns, axis=-1)[..., :tokens], 2, 1)

    # Serialisation

    def stored(self) -> "Attention":
        """The setting as stored with weights: without fields that select how the same numbers are computed."""
        defaults = {
            field.name: field.default for field in dataclasses.fields(self) if not field.metadata.get("stored", True)
        }
        return self._with_parts(lambda part: part.stored(), **defaults)

    @classmethod
    def from_old_json(cls, data: Any) -> "Attention | None":
        """Reads the JSON that files contained before the notation; None if it is not of this kind."""
        return None


def zero_linear(inputs: int, outputs: int, sizes: Sizes, *, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer with bias, initialised to zero, so that adding its output does not change the model at first.

    Examples:
        >>> from monarchrt.models.wan import wan_config
        >>> bool(zero_linear(2, 3, wan_config("tiny"), rngs=nnx.Rngs(0))(jnp.ones((1, 2))).any())
        False

    Args:
        inputs: Width of the input.
        outputs: Width of the output.
        sizes: Has the dtypes of computation and parameters.
        rngs: Random numbers that Flax asks for.
    """
    zeros = nnx.initializers.zeros_init()
    dtypes: dict[str, Any] = {"dtype": jnp.dtype(sizes.dtype), "param_dtype": jnp.dtype(sizes.param_dtype)}
    return nnx.Linear(inputs, outputs, kernel_init=zeros, bias_init=zeros, **dtypes, rngs=rngs)


def leaves(setting: Attention) -> list[Attention]:
    """The innermost kinds of a setting, those that compute the attention.

    Examples:
        >>> from monarchrt.models.attention.notation import parse
        >>> [leaf.name for leaf in leaves(parse("first_layers(2, dense, first_steps(1, dense, monarch))"))]
        ['dense', 'dense', 'monarch']
    """
    parts = setting.parts()
    return [leaf for part in parts for leaf in leaves(part)] if parts else [setting]
