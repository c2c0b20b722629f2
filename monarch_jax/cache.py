"""A KV cache for autoregressive video: keys and values of whole frames, kept in tiled order (Self-Forcing)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

from monarch_jax._typing import Array, Float, Int
from monarch_jax.attention import attend_tiles
from monarch_jax.checks import array, flag, float_dtype, index, positive, triple
from monarch_jax.partitioning import on_mesh_of, split_like, whole_tokens
from monarch_jax.spec import MonarchSpec
from monarch_jax.tiles import tiles_to_tokens, tokens_to_tiles

Rest = TypeVar("Rest")


@jax.custom_jvp
def _detach_layer(buffer: jax.Array, layer: int | jax.Array) -> jax.Array:
    """`lax.stop_gradient` of one layer's keys or values, [layers, B, ...]; nothing is copied."""
    return buffer


@_detach_layer.defjvp
def _detach_layer_jvp(primals, tangents):
    (buffer, layer), tangent = primals, tangents[0]
    none = jnp.zeros(tangent.shape[1:], tangent.dtype)
    return buffer, lax.dynamic_update_index_in_dim(tangent, none, layer, 0)


def _attend_newest_last(
    spec: MonarchSpec, q: jax.Array, k: jax.Array, v: jax.Array, frames: jax.Array, places: Any, options: dict[str, Any]
) -> jax.Array:
    """`attend_tiles`, for whose gradient the frame groups at two places change theirs: the newest comes last.

    The order of keys does not matter, and backends leave out gradients of all but the last tiles (`grad_tiles`).

    Args:
        spec: Sizes and options of the call.
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        v: As k.
        frames: Number of valid frames.
        places: Two int32 scalars, the group that has gradients and the last one that is valid.
        options: Options of `attend_tiles`.
    """
    size = spec.tiles_per_group

    def swapped(x: jax.Array, places: Any) -> jax.Array:
        here, there = (lax.dynamic_slice_in_dim(x, place * size, size, 1) for place in places)
        x = lax.dynamic_update_slice_in_dim(x, there, places[0] * size, 1)
        return lax.dynamic_update_slice_in_dim(x, here, places[1] * size, 1)

    def run(q, k, v, frames):
        return attend_tiles(spec, q, k, v, kv_frames=frames, **options)

    @jax.custom_vjp
    def attend(q, k, v, frames, places):
        return run(q, k, v, frames)

    def forward(q, k, v, frames, places):
        out, pull = jax.vjp(lambda q, k, v: run(q, k, v, frames), q, swapped(k, places), swapped(v, places))
        return out, (pull, places)

    def backward(kept, d_out):
        pull, places = kept
        dq, dk, dv = pull(d_out)
        return dq, swapped(dk, places), swapped(dv, places), None, None

    attend.defvjp(forward, backward)
    return attend(q, k, v, frames, places)


def _known(number: int | jax.Array) -> int | jax.Array:
    """An int, unless it is traced."""
    return number if isinstance(number, int | Tracer) else int(number)


@functools.partial(jax.tree_util.register_dataclass, drop_fields=("_newest",))
@dataclasses.dataclass(frozen=True, kw_only=True)
class MonarchKVCache:
    """Keys and values of the frames so far, rearranged into tiles once, when written. A pytree of fixed shapes.

    A block of frames is written with `append` and may be rewritten in place while it is the newest (every denoising
    step does). With `rolling`, frames past the capacity overwrite the oldest ones except the first `sink_frames`; the
    order of slots does not matter to the attention, so nothing is ever shifted. Keys carry their absolute RoPE.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> cache = MonarchKVCache.init(batch=1, frames=6, height=4, width=5, heads=2, head_dim=8, dtype=jnp.float32)
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 3 * 4 * 5, 2, 8))  # a block of 3 frames
        >>> cache = cache.append(k, v)
        >>> cache.attend(q).shape, int(cache.valid_frames)
        ((1, 60, 2, 8), 3)

    One cache may hold all layers of a network (`init(layers=...)`), for a loop over them that carries it: blocks are
    then written where they lie, and where `layer` is the loop's own counter XLA may hand them to kernels uncopied.

    Attributes:
        key: [B, tiles, b1, b2, H, D], tiles of frame groups in slot order; [layers, B, ...] with `layers`.
        value: As `key`.
        length: int32 scalar, frames written so far, evicted ones included; -1 after a block that had no place.
        spec: Grid of one frame group, capacity (`key_frames`), tile and layout.
        sink_frames: Leading frames that are never evicted.
        rolling: Whether frames past the capacity evict the oldest.
        detach_past: Whether gradients reach only the keys and values of the newest block.
    """

    key: Any  # arrays, but JAX also builds pytrees of placeholders
    value: Any
    length: Any
    spec: MonarchSpec = dataclasses.field(metadata={"static": True})
    sink_frames: int = dataclasses.field(default=0, metadata={"static": True})
    rolling: bool = dataclasses.field(default=False, metadata={"static": True})
    detach_past: bool = dataclasses.field(default=False, metadata={"static": True})
    # frames of the newest block, only on the object that `append` returned: caches stay pytrees of one structure
    _newest: int | None = dataclasses.field(default=None, init=False, repr=False, compare=False)

    @classmethod
    def init(
        cls,
        *,
        batch: int,
        frames: int,
        height: int,
        width: int,
        heads: int,
        head_dim: int,
        tile: tuple[int, int, int] | None = None,
        blocks: str = "fh,w",
        rolling: bool = False,
        sink_frames: int = 0,
        detach_past: bool = False,
        layers: int | None = None,
        dtype: DTypeLike = jnp.bfloat16,
    ) -> "MonarchKVCache":
        """An empty cache.

        Args:
            batch: B.
            frames: Capacity in frames, a multiple of the tile's n_f.
            height: Token rows of a frame, h.
            width: Token columns of a frame, w.
            heads: H.
            head_dim: D.
            tile: (n_f, n_h, n_w) as in `monarch_attention`; default (1, h, w).
            blocks: Layout as in `monarch_attention`.
            rolling: Whether frames past the capacity overwrite the oldest; otherwise they are an error.
            sink_frames: Leading frames that a rolling cache keeps for ever, a multiple of n_f below `frames`.
            detach_past: Whether gradients reach only the newest block's keys and values, not what was cached before
                (Self-Forcing training).
            layers: Keys and values of so many layers at once; `append` and `attend` then take a `layer`.
            dtype: Of keys and values.

        Returns:
            The cache, zeros.

        Raises:
            ValueError: If sizes do not fit each other or the dtype is not a float.
        """
        n_f = 1 if tile is None else triple("tile", tile, "(n_f, n_h, n_w)")[0]
        sizes = dict(batch=batch, frames=frames, height=height, width=width, heads=heads, head_dim=head_dim)
        batch, frames, height, width, heads, head_dim = (positive(name, size) for name, size in sizes.items())
        spec = MonarchSpec(grid=(n_f, height, width), key_frames=frames, tile=tile, blocks=blocks)
        dtype = float_dtype("dtype", dtype)
        rolling, detach_past = flag("rolling", rolling), flag("detach_past", detach_past)
        sink_frames = int(index("sink_frames", sink_frames))
        if sink_frames % n_f or not 0 <= sink_frames < frames:
            raise ValueError(
                f"sink_frames={sink_frames} is not a multiple of the tile's {n_f} frames, below frames={frames}."
            )
        if sink_frames and not rolling:
            raise ValueError(f"sink_frames={sink_frames} needs rolling=True; a fixed cache evicts nothing.")
        shape = (batch, spec.key_tiles, spec.block_rows, spec.block_cols, heads, head_dim)
        if layers is not None:
            shape = (positive("layers", layers), *shape)
        return cls(
            key=jnp.zeros(shape, dtype),
            value=jnp.zeros(shape, dtype),
            length=jnp.zeros((), jnp.int32),
            spec=spec,
            sink_frames=sink_frames,
            rolling=rolling,
            detach_past=detach_past,
        )

    @property
    def capacity(self) -> int:
        """Frames that fit."""
        return self.spec.total_key_frames

    @property
    def valid_frames(self) -> Int[Array, ""]:
        """int32 scalar, leading frames of the buffer that hold data; all, NaN first, after a misplaced block."""
        return jnp.where(self.length < 0, self.capacity, jnp.minimum(self.length, self.capacity))

    def append(
        self,
        key: Float[Array, "B N H D"],
        value: Float[Array, "B N H D"],
        *,
        frame: int | Int[Array, ""] | None = None,
        layer: int | Int[Array, ""] | None = None,
    ) -> "MonarchKVCache":
        """Writes a block of frames and returns the new cache.

        Of tokens on a mesh of explicit axes JAX has gradients of this only where the mesh is set (`jax.set_mesh`).

        Writing at the frame where the newest block began rewrites that block in place. The block written becomes the
        newest: frames after it are forgotten. A block that cannot be placed (before frame 0, with a gap before it, past
        the capacity, or back among frames that a rolling cache has evicted) raises if that is known when tracing, or
        outside of `jax.jit`; one that only shows when running, as a layer that there is not, is written as NaN at frame
        0, and the cache gives NaN until it begins again there.

        Args:
            key: [B, n*h*w, H, D], tokens of n frames, RoPE of their absolute position applied.
            value: As `key`.
            frame: Absolute index of the first frame, an integer or int32 scalar, a multiple of n_f; default: after the
                newest frame. A cache with `layers` needs it, since all of them write the same frames.
            layer: Whose keys and values these are, an integer or int32 scalar, in a cache with `layers`.

        Returns:
            The cache with the block.

        Raises:
            ValueError: If shapes or dtypes do not fit the cache, or the block is known to have no place in it.
        """
        self._check_layer(layer)
        if layer is not None and frame is None:
            raise ValueError("frame=None: pass the block's first frame, the same for every layer of the cache.")
        key, value = array("key", key), array("value", value)
        block = self._block_spec(key, "key")
        if value.shape != key.shape or value.dtype != key.dtype:
            raise ValueError(
                f"value has shape {value.shape}, dtype {value.dtype.name}; key has {key.shape}, {key.dtype.name}."
            )
        frames, n_f, group = block.grid[0], self.spec.tile_shape[0], self.spec.tiles_per_group
        first, misplaced, slot = self._place(frames, frame, layer)
        # tiles that lie side by side: which of the block, and where they go
        together = 1 if self.rolling else frames // n_f
        runs = [(slice(n * group, (n + together) * group), slot[n] * group) for n in range(0, frames // n_f, together)]
        zero = jnp.zeros((), jnp.int32)

        def write(buffer, tokens):
            buffer = on_mesh_of(buffer, tokens)
            (tokens,) = whole_tokens(tokens, tiles=buffer)
            tiles = tokens_to_tiles(tokens, block)
            tiles = jnp.where(misplaced, jnp.nan, tiles).astype(buffer.dtype)
            if self.detach_past:
                buffer = lax.stop_gradient(buffer) if layer is None else _detach_layer(buffer, layer)
            for which, to in runs:
                part, at = tiles[:, which], [zero, to.astype(jnp.int32), zero, zero, zero, zero]
                if layer is not None:
                    part, at = part[None], [jnp.asarray(layer, jnp.int32), *at]
                buffer = lax.dynamic_update_slice(buffer, part, at)
            return buffer

        return self._written(write(self.key, key), write(self.value, value), first, misplaced, frames)

    @property
    def in_token_order(self) -> bool:
        """Whether a group of frames lies in the order of its tokens, one after the other."""
        tile, grid = self.spec.tile_shape, self.spec.grid
        return tile[1:] == grid[1:] and self.spec.blocks in ("fh,w", "f,hw")

    def append_by(
        self,
        write: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, Rest]],
        frames: int,
        *,
        frame: int | Int[Array, ""],
        layer: int | Int[Array, ""],
    ) -> tuple["MonarchKVCache", Rest]:
        """`append` by a function that writes a block itself, without gradients, into a cache in the order of tokens.

        Args:
            write: Of keys and values [layers, B, slots, tokens of a group of frames, H*D], whether the block is
                misplaced (a bool scalar; NaN is to be written then), and int32 slots, one for each of its groups: both
                arrays, written, and anything else.
            frames: Number of frames in the block.
            frame: As in `append`.
            layer: As in `append`.

        Returns:
            The cache with the block, and what else `write` gave.

        Raises:
            ValueError: If the cache is in another order, or as `append` says.
        """
        self._check_layer(layer)
        if not self.in_token_order:
            raise ValueError(f"the cache is in the order of tiles {self.spec.tile_shape}, not in that of tokens.")
        first, misplaced, slots = self._place(frames, frame, layer)
        shape = self.key.shape
        group = self.spec.tiles_per_group * shape[3] * shape[4]
        rows = (*shape[:2], -1, group, shape[5] * shape[6])
        key, value, rest = write(self.key.reshape(rows), self.value.reshape(rows), misplaced, slots)
        return self._written(key.reshape(shape), value.reshape(shape), first, misplaced, frames), rest

    def attend(
        self,
        query: Float[Array, "B N H D"],
        *,
        num_iters: int = 1,
        scale: float | None = None,
        causal_block: int | None = None,
        layer: int | Int[Array, ""] | None = None,
        intermediates: str | None = None,
        implementation: str | None = None,
    ) -> Float[Array, "B N H D"]:
        """Attention of a block's queries over all valid frames; equals a block-causal call over the whole clip.

        There should be a block: over an empty cache, or after a block that had no place, this raises outside of
        `jax.jit`; inside, where it cannot be known, the result is NaN.

        Args:
            query: [B, n*h*w, H, D], the tokens of the newest n frames.
            num_iters: As in `monarch_attention`, like the remaining arguments.
            scale: Softmax scale; default D**-0.5.
            causal_block: Frames per causal block, when the queries hold more than one block. A rolling cache takes one
                block at a time, or equal parts of one.
            layer: Which layer's keys and values, in a cache with `layers`; a traced one is not checked here, but where
                it is written.
            intermediates: As in `monarch_attention`.
            implementation: Backend.

        Returns:
            [B, n*h*w, H, D].

        Raises:
            ValueError: If shapes, dtypes or arguments do not fit, or the cache is known to hold fewer frames.
            NotImplementedError: If the implementation asked for cannot serve this call.
        """
        query = array("query", query)
        self.check_query(query, layer=layer)
        block = self._block_spec(query, "query")
        if causal_block is not None and self.rolling:
            if positive("causal_block", causal_block) % block.grid[0]:
                raise ValueError(
                    f"causal_block={causal_block}: a rolling cache does not keep frames in time order; "
                    f"attend one block at a time, not {block.grid[0]} frames."
                )
            causal_block = None  # all that is kept comes before the block's end
        spec = dataclasses.replace(block, key_frames=self.capacity, num_iters=num_iters, causal_block=causal_block)
        key, value = (on_mesh_of(x, query) for x in self._of(layer))
        (whole,) = whole_tokens(query, tiles=key)
        tiles, frames = (tokens_to_tiles(whole, spec), key, value), self.valid_frames
        options = {"scale": scale, "implementation": implementation, "grad_tiles": self._grad_tiles()}
        options["intermediates"] = intermediates
        if self.rolling and options["grad_tiles"] is not None:
            out = _attend_newest_last(spec, *tiles, frames, self._newest_places(), options)
        else:
            out = attend_tiles(spec, *tiles, kv_frames=frames, **options)
        return split_like(tiles_to_tokens(out, spec), query)

    def check_query(self, query: Float[Array, "B N H D"], *, layer: int | Int[Array, ""] | None = None) -> None:
        """What `attend` checks of its queries: for who calls it inside `jax.shard_map`, where less is known.

        Examples:
            >>> cache = MonarchKVCache.init(batch=1, frames=3, height=4, width=5, heads=2, head_dim=8)
            >>> cache.check_query(jnp.ones((1, 20, 2, 8), jnp.bfloat16))
            Traceback (most recent call last):
            ...
            ValueError: query: the cache holds none of the 1 frames that it has; append their keys and values first.

        Args:
            query: As in `attend`.
            layer: Likewise.

        Raises:
            ValueError: As `attend`.
        """
        block = self._block_spec(query, "query")
        self._check_layer(layer)
        self._check_filled(block.grid[0])

    def of_arrays(
        self, key: Float[Array, "*layers B C b1 b2 H D"], value: Float[Array, "*layers B C b1 b2 H D"], length: Any
    ) -> "MonarchKVCache":
        """The same cache of other arrays, such as a device's part of each inside `jax.shard_map`.

        Examples:
            >>> cache = MonarchKVCache.init(batch=2, frames=3, height=4, width=5, heads=2, head_dim=8)
            >>> half = cache.of_arrays(cache.key[:1], cache.value[:1], cache.length)
            >>> half.key.shape, half.spec == cache.spec
            ((1, 3, 4, 5, 2, 8), True)

        Args:
            key: As the cache's; another batch and other heads.
            value: Likewise.
            length: int32 scalar.
        """
        return self._with(key, value, length, newest=self._newest)

    def tokens(
        self, *, layer: int | Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "B N H D"], Float[Array, "B N H D"]]:
        """Keys and values of all slots as tokens [B, capacity*h*w, H, D], for inspection."""
        key, value = self._of(layer)
        return tiles_to_tokens(key, self.spec), tiles_to_tokens(value, self.spec)

    def _place(
        self, frames: int, frame: int | jax.Array | None, layer: int | jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The first frame of a block that is written, whether it has no place, and the slots of its groups."""
        n_f = self.spec.tile_shape[0]
        start = _known(self.length if frame is None else index("frame", frame))
        if isinstance(start, int):
            self._check_place(start, frames)
        first = jnp.asarray(start, jnp.int32)
        misplaced = self._misplaced(first, frames)
        if layer is not None:
            misplaced |= (layer < 0) | (layer >= self.key.shape[0])
        first = jnp.where(misplaced, 0, first)  # the NaN lies where every query sees it
        position = first // n_f + jnp.arange(frames // n_f)  # frame groups, absolute
        sinks, groups = self.sink_frames // n_f, self.capacity // n_f
        slot = jnp.where(position < groups, position, sinks + (position - sinks) % (groups - sinks))
        return first, misplaced, slot

    def _written(
        self, key: jax.Array, value: jax.Array, first: jax.Array, misplaced: jax.Array, frames: int
    ) -> "MonarchKVCache":
        """The cache with other arrays, whose newest block has these frames."""
        length = jnp.where(misplaced, -1, first + frames)  # -1: only a block at frame 0 has its place after that
        return self._with(key, value, length, newest=frames)

    def _with(self, key: jax.Array, value: jax.Array, length: jax.Array, *, newest: int | None) -> "MonarchKVCache":
        cache = dataclasses.replace(self, key=key, value=value, length=length)
        object.__setattr__(cache, "_newest", newest)
        return cache

    def _misplaced(self, first: jax.Array, frames: int) -> jax.Array:
        """Whether the buffer would not hold what it should after writing `frames` at `first`; bool scalar."""
        end = first + frames
        wrong = (first < 0) | (first % self.spec.tile_shape[0] != 0) | (first > jnp.maximum(self.length, 0))
        past = end > self.capacity
        if not self.rolling:
            return wrong | past
        if frames > self.capacity - self.sink_frames:  # would overwrite itself
            wrong |= past
        evicted = (self.length > self.capacity) & (first > self.sink_frames)
        return wrong | (evicted & (end < self.length))

    def _check_place(self, first: int, frames: int) -> None:
        """The same as far as it is known: `length` is, outside of a trace."""
        end, n_f = first + frames, self.spec.tile_shape[0]
        length = _known(self.length)
        if not isinstance(length, int):
            length = None
        if first == length == -1:
            raise ValueError("frame=None: an earlier block had no place in the cache; begin again at frame=0.")
        if first < 0 or first % n_f:
            raise ValueError(f"frame={first} is not a multiple of the tile's {n_f} frames from 0 on.")
        if end > self.capacity and not self.rolling:
            raise ValueError(
                f"frame={first}: {frames} frames from there end past the cache's {self.capacity}; "
                f"make it larger or pass rolling=True to MonarchKVCache.init."
            )
        if end > self.capacity and frames > self.capacity - self.sink_frames:
            raise ValueError(
                f"frame={first}: {frames} frames from there overwrite each other in a rolling cache of {self.capacity} "
                f"with sink_frames={self.sink_frames}; append at most {self.capacity - self.sink_frames} at a time."
            )
        if length is None:
            return
        if first > max(length, 0):
            raise ValueError(f"frame={first} leaves a gap: the cache ends at frame {max(length, 0)}.")
        if length > self.capacity and first > self.sink_frames and end < length:
            raise ValueError(
                f"frame={first}: the frames before it were evicted; {frames} frames can begin from frame "
                f"{length - frames} to {length}, or at 0."
            )

    def _check_filled(self, frames: int) -> None:
        """That the cache holds the frames of the queries, as far as that is known: outside of a trace."""
        length = _known(self.length)
        if not isinstance(length, int) or length >= frames:
            return
        if length < 0:
            raise ValueError("an earlier block had no place in the cache; begin again with append(..., frame=0).")
        held = f"{length} of the {frames}" if length else f"none of the {frames}"
        raise ValueError(f"query: the cache holds {held} frames that it has; append their keys and values first.")

    def _grad_tiles(self) -> int | None:
        """How many of the last tiles hold the newest block, if they are the last and the only ones with gradients.

        In a rolling cache a block of one frame group, which `attend` puts last.
        """
        if self._newest is None or not self.detach_past:
            return None
        groups = self._newest // self.spec.tile_shape[0]
        return None if self.rolling and groups > 1 else groups * self.spec.tiles_per_group

    def _newest_places(self) -> tuple[jax.Array, jax.Array]:
        """Which frame group of the buffer is the newest, and which is the last that is valid."""
        n_f = self.spec.tile_shape[0]
        sinks, groups = self.sink_frames // n_f, self.capacity // n_f
        newest = jnp.maximum(self.length // n_f - 1, 0)
        slot = jnp.where(newest < groups, newest, sinks + (newest - sinks) % (groups - sinks))
        return slot, jnp.minimum(newest, groups - 1)

    def _of(self, layer) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, tiles, b1, b2, H, D] of a layer, or all there are."""
        self._check_layer(layer)
        if layer is None:
            return self.key, self.value
        at = jnp.asarray(layer, jnp.int32)
        key, value = (lax.dynamic_index_in_dim(x, at, keepdims=False) for x in (self.key, self.value))
        return key, value

    def _check_layer(self, layer) -> None:
        layers = self.key.shape[0] if self.key.ndim == 7 else None
        if (layers is None) != (layer is None):
            needs = "has no layers; leave layer out" if layers is None else f"holds {layers} layers; pass which"
            raise ValueError(f"layer={layer}: the cache {needs}.")
        if layers is None:
            return
        layer = _known(index("layer", layer))
        if isinstance(layer, int) and not 0 <= layer < layers:
            raise ValueError(f"layer={layer} is not from 0 to {layers - 1}, the cache's layers.")

    def _block_spec(self, tokens: jax.Array, name: str) -> MonarchSpec:
        _, height, width = self.spec.grid
        n_f, batch, (heads, dim) = self.spec.tile_shape[0], self.key.shape[-6], self.key.shape[-2:]
        step = n_f * height * width
        if tokens.ndim != 4 or tokens.shape[1] % step or not tokens.shape[1]:
            raise ValueError(
                f"{name} has shape {tokens.shape}; it should be [{batch}, n*{step}, {heads}, {dim}]: "
                f"whole tiles of {n_f} frames of {height}x{width} tokens."
            )
        if (tokens.shape[0], *tokens.shape[2:]) != (batch, heads, dim):
            raise ValueError(
                f"{name} has shape {tokens.shape}; the cache holds batch {batch}, heads {heads}, head_dim {dim}."
            )
        if tokens.dtype != self.key.dtype:
            raise ValueError(f"{name} has dtype {tokens.dtype.name}, the cache has {self.key.dtype.name}.")
        frames = tokens.shape[1] // (height * width)
        if frames > self.capacity:
            raise ValueError(f"{name} has {frames} frames, more than the cache's {self.capacity}.")
        return dataclasses.replace(self.spec, grid=(frames, height, width))
