"""A KV cache for autoregressive video: keys and values of whole frames, stored in tiled order (Self-Forcing)."""

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
    """`lax.stop_gradient` for one layer of a buffer [layers, B, ...], without copying the buffer."""
    return buffer


@_detach_layer.defjvp
def _detach_layer_jvp(primals, tangents):
    (buffer, layer), tangent = primals, tangents[0]
    none = jnp.zeros(tangent.shape[1:], tangent.dtype)
    return buffer, lax.dynamic_update_index_in_dim(tangent, none, layer, 0)


def _attend_newest_last(
    spec: MonarchSpec, q: jax.Array, k: jax.Array, v: jax.Array, frames: jax.Array, places: Any, options: dict[str, Any]
) -> jax.Array:
    """`attend_tiles` whose backward pass swaps the newest frame group of the keys and values with the last valid one.

    Backends compute gradients only for the last tiles (`grad_tiles`), and the result does not depend on the order of
    the keys, so swapping the two groups gives the newest group its gradients.

    Args:
        spec: The attention of this call.
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        v: As `k`.
        frames: int32 scalar, number of valid key frames.
        places: Two int32 scalars: index of the newest frame group, and of the last valid one.
        options: Keyword arguments of `attend_tiles`.
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
    """The number as a Python int, unless it is traced."""
    return number if isinstance(number, int | Tracer) else int(number)


@functools.partial(jax.tree_util.register_dataclass, drop_fields=("_newest",))
@dataclasses.dataclass(frozen=True, kw_only=True)
class MonarchKVCache:
    """A KV cache that stores keys and values in tiles. A pytree whose shapes do not change.

    `append` writes a block of frames. The newest block may be rewritten in place, as every denoising step does. With
    `rolling`, frames past the capacity overwrite the oldest ones except the first `sink_frames`; since attention does
    not depend on the order of the slots, nothing is ever shifted. Keys are stored with RoPE of their absolute position.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> cache = MonarchKVCache.init(batch=1, frames=6, height=4, width=5, heads=2, head_dim=8, dtype=jnp.float32)
        >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 3 * 4 * 5, 2, 8))  # a block of 3 frames
        >>> cache = cache.append(k, v)
        >>> cache.attend(q).shape, int(cache.valid_frames)
        ((1, 60, 2, 8), 3)

    One cache may hold all layers of a network (`init(layers=...)`) and be the carry of a loop over the layers: blocks
    are then written in place, and if `layer` is the loop counter, XLA can pass slices to kernels without a copy.

    Attributes:
        key: [B, tiles, b1, b2, H, D], tiles of frame groups in slot order; [layers, B, ...] with `layers`.
        value: As `key`.
        length: int32 scalar, frames written so far, including evicted ones; -1 after a block that could not be placed.
        spec: Grid of one frame group, capacity (`key_frames`), tile and layout.
        sink_frames: Leading frames that are never evicted.
        rolling: Whether frames past the capacity evict the oldest.
        detach_past: Whether gradients reach only the keys and values of the newest block.
    """

    key: Any  # arrays, or placeholders when JAX rebuilds the pytree
    value: Any
    length: Any
    spec: MonarchSpec = dataclasses.field(metadata={"static": True})
    sink_frames: int = dataclasses.field(default=0, metadata={"static": True})
    rolling: bool = dataclasses.field(default=False, metadata={"static": True})
    detach_past: bool = dataclasses.field(default=False, metadata={"static": True})
    # frames of the newest block; set only on the object that `append` returns, and not part of the pytree
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
        """Creates an empty cache.

        Args:
            batch: Batch size B.
            frames: Capacity in frames, a multiple of the tile's n_f.
            height: Token rows of a frame, h.
            width: Token columns of a frame, w.
            heads: Number of heads H.
            head_dim: Size of a head D.
            tile: (n_f, n_h, n_w) as in `monarch_attention`; default (1, h, w).
            blocks: Layout as in `monarch_attention`.
            rolling: Whether frames past the capacity overwrite the oldest; otherwise they are an error.
            sink_frames: Leading frames that a rolling cache never evicts, a multiple of n_f below `frames`.
            detach_past: Whether gradients reach only the newest block's keys and values, not those cached before it
                (Self-Forcing training).
            layers: Number of layers, if the cache holds all layers of a network; `append` and `attend` then need a
                `layer`. None: a cache of one layer.
            dtype: Dtype of keys and values.

        Returns:
            The cache, filled with zeros.

        Raises:
            ValueError: If a size is invalid, sizes are inconsistent, or the dtype is not a float.
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
        """Capacity in frames."""
        return self.spec.total_key_frames

    @property
    def valid_frames(self) -> Int[Array, ""]:
        """int32 scalar, number of leading frames of the buffer that hold data.

        After a block that could not be placed it is the capacity, so that queries see the NaN at frame 0.
        """
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

        Writing at the frame where the newest block began rewrites that block in place. The written block becomes the
        newest: later frames are discarded. A block cannot be placed before frame 0, after a gap, past the capacity, or
        among frames that a rolling cache has evicted. This raises if `frame` and the cache's length are known, that is,
        outside of `jax.jit` or for static values. Otherwise such a block, or a `layer` that is out of range, is written
        as NaN at frame 0, and attention returns NaN until a block is written at frame 0 again.

        For tokens on a mesh with explicit axes, JAX can differentiate this only if the mesh is set (`jax.set_mesh`).

        Args:
            key: [B, n*h*w, H, D], tokens of n frames, RoPE of their absolute position applied.
            value: As `key`.
            frame: Absolute index of the first frame, an integer or int32 scalar, a multiple of n_f; default: the frame
                after the newest. Required in a cache with `layers`, since all layers write the same frames.
            layer: Index of the layer, an integer or int32 scalar, in a cache with `layers`.

        Returns:
            The cache with the block.

        Raises:
            ValueError: If shapes or dtypes do not match the cache, or the block is known not to have a place in it.
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
        # contiguous runs of tiles: their slice of the block, and the index of their first tile in the buffer
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
        """Whether the tiles of a frame group are stored in the same order as its tokens."""
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
        """`append` with a custom write, such as a kernel, into a cache that stores tokens in order; not differentiable.

        Args:
            write: Called as write(key, value, misplaced, slots) with the buffers [layers, B, slots, tokens of a frame
                group, H*D], a bool scalar that says whether the block cannot be placed (NaN must be written then), and
                int32 slots, one per frame group of the block. Returns both buffers and any other result.
            frames: Number of frames of the block.
            frame: As in `append`.
            layer: As in `append`.

        Returns:
            The cache with the block, and the third result of `write`.

        Raises:
            ValueError: If the cache does not store tokens in order (`in_token_order`), or as in `append`.
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

        If the cache is empty or a block could not be placed, this raises outside of `jax.jit` and returns NaN inside,
        where the cache's length is not known.

        Args:
            query: [B, n*h*w, H, D], the tokens of the newest n frames.
            num_iters: As in `monarch_attention`, like the remaining arguments.
            scale: Softmax scale; default D**-0.5.
            causal_block: Frames per causal block, if the queries hold more than one block. In a rolling cache the
                queries must be one block, or an equal part of one.
            layer: Index of the layer, in a cache with `layers`; a traced one is checked by `append`, not here.
            intermediates: As in `monarch_attention`.
            implementation: As in `monarch_attention`.

        Returns:
            [B, n*h*w, H, D] in the query's dtype.

        Raises:
            ValueError: If a shape, a dtype or an argument is invalid, or the cache is known to hold fewer frames than
                the query.
            NotImplementedError: If the requested implementation does not support this call.
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
            causal_block = None  # all cached frames come before the block's end
        spec = dataclasses.replace(block, key_frames=self.capacity, num_iters=num_iters, causal_block=causal_block)
        key, value = (on_mesh_of(x, query) for x in self._arrays(layer))
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
        """Runs the checks of `attend`, for callers that attend inside `jax.shard_map`, where less is known.

        Examples:
            >>> cache = MonarchKVCache.init(batch=1, frames=3, height=4, width=5, heads=2, head_dim=8)
            >>> cache.check_query(jnp.ones((1, 20, 2, 8), jnp.bfloat16))
            Traceback (most recent call last):
            ...
            ValueError: query: the cache holds none of the 1 frames that it has; append their keys and values first.

        Args:
            query: As in `attend`.
            layer: As in `attend`.

        Raises:
            ValueError: As in `attend`.
        """
        block = self._block_spec(query, "query")
        self._check_layer(layer)
        self._check_filled(block.grid[0])

    def of_arrays(
        self,
        key: Float[Array, "*layers B C b1 b2 H D"],
        value: Float[Array, "*layers B C b1 b2 H D"],
        length: Int[Array, ""],
    ) -> "MonarchKVCache":
        """This cache with other arrays, such as one device's part of each inside `jax.shard_map`.

        Examples:
            >>> cache = MonarchKVCache.init(batch=2, frames=3, height=4, width=5, heads=2, head_dim=8)
            >>> half = cache.of_arrays(cache.key[:1], cache.value[:1], cache.length)
            >>> half.key.shape, half.spec == cache.spec
            ((1, 3, 4, 5, 2, 8), True)

        Args:
            key: Shaped like the cache's `key`, except for batch and heads.
            value: Shaped like `key`.
            length: int32 scalar, as the attribute.

        Returns:
            The cache.
        """
        return self._with(key, value, length, newest=self._newest)

    def tokens(
        self, *, layer: int | Int[Array, ""] | None = None
    ) -> tuple[Float[Array, "B N H D"], Float[Array, "B N H D"]]:
        """Keys and values of all slots as tokens, for inspection.

        Args:
            layer: As in `attend`.

        Returns:
            Keys and values, each [B, capacity*h*w, H, D], in the order of the slots.
        """
        key, value = self._arrays(layer)
        return tiles_to_tokens(key, self.spec), tiles_to_tokens(value, self.spec)

    def _place(
        self, frames: int, frame: int | jax.Array | None, layer: int | jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A block's first frame (int32), whether it cannot be placed (bool), and the slots of its groups (int32)."""
        n_f = self.spec.tile_shape[0]
        start = _known(self.length if frame is None else index("frame", frame))
        if isinstance(start, int):
            self._check_place(start, frames)
        first = jnp.asarray(start, jnp.int32)
        misplaced = self._misplaced(first, frames)
        if layer is not None:
            misplaced |= (layer < 0) | (layer >= self.key.shape[0])
        first = jnp.where(misplaced, 0, first)  # every query sees frame 0, and so the NaN
        position = first // n_f + jnp.arange(frames // n_f)  # frame groups, absolute
        sinks, groups = self.sink_frames // n_f, self.capacity // n_f
        slot = jnp.where(position < groups, position, sinks + (position - sinks) % (groups - sinks))
        return first, misplaced, slot

    def _written(
        self, key: jax.Array, value: jax.Array, first: jax.Array, misplaced: jax.Array, frames: int
    ) -> "MonarchKVCache":
        """The cache with the buffers after a write of a block of `frames` at `first`."""
        length = jnp.where(misplaced, -1, first + frames)  # after -1 only a block at frame 0 can be placed
        return self._with(key, value, length, newest=frames)

    def _with(self, key: jax.Array, value: jax.Array, length: jax.Array, *, newest: int | None) -> "MonarchKVCache":
        cache = dataclasses.replace(self, key=key, value=value, length=length)
        object.__setattr__(cache, "_newest", newest)
        return cache

    def _misplaced(self, first: jax.Array, frames: int) -> jax.Array:
        """Whether a block of `frames` cannot be placed at `first`; bool scalar."""
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
        """Raises ValueError for a block that cannot be placed, as far as that is known (`length` is, if not traced)."""
        end, n_f = first + frames, self.spec.tile_shape[0]
        length = _known(self.length)
        if not isinstance(length, int):
            length = None
        if first == length == -1:
            raise ValueError("frame=None: an earlier block had no place in the cache; begin again at frame=0.")
        if first < 0 or first % n_f:
            raise ValueError(f"frame={first} is not a multiple of the tile's {n_f} frames of at least 0.")
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
        """Raises ValueError if the cache holds fewer frames than the queries, as far as that is known."""
        length = _known(self.length)
        if not isinstance(length, int) or length >= frames:
            return
        if length < 0:
            raise ValueError("an earlier block had no place in the cache; begin again with append(..., frame=0).")
        held = f"{length} of the {frames}" if length else f"none of the {frames}"
        raise ValueError(f"query: the cache holds {held} frames that it has; append their keys and values first.")

    def _grad_tiles(self) -> int | None:
        """Number of last tiles that hold the newest block, if only that block has gradients; else None.

        In a rolling cache the newest block need not be last; `attend` swaps it to the end if it is one frame group, and
        larger blocks give None.
        """
        if self._newest is None or not self.detach_past:
            return None
        groups = self._newest // self.spec.tile_shape[0]
        return None if self.rolling and groups > 1 else groups * self.spec.tiles_per_group

    def _newest_places(self) -> tuple[jax.Array, jax.Array]:
        """Indices in the buffer of the newest frame group and of the last valid one."""
        n_f = self.spec.tile_shape[0]
        sinks, groups = self.sink_frames // n_f, self.capacity // n_f
        newest = jnp.maximum(self.length // n_f - 1, 0)
        slot = jnp.where(newest < groups, newest, sinks + (newest - sinks) % (groups - sinks))
        return slot, jnp.minimum(newest, groups - 1)

    def _arrays(self, layer) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, tiles, b1, b2, H, D] of a layer, or of the cache if it has no layers."""
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
