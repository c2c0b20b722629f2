"""The roles of kernels and their launch, and the base of their persistent blocks and of the items that these have.

A role says what a kernel's blocks do and what shared memory they have, by name. A block is an object made anew in each
warpgroup: `compute` is what most of them do, `load` what the last one does for them. Its turns are every `blocks`-th
item, from its own number on.
"""

import abc
import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from monarchrt.pallas_kernels.sm90.config import REDUCTIONS, ColumnBlocks, column_blocks
from monarchrt.pallas_kernels.sm90.shared import varying
from monarchrt.pallas_kernels.sm90.types import Index, Number, Place, Ref, Refs


@dataclasses.dataclass(frozen=True)
class Given:
    """What a block is given.

    Attributes:
        number: Its number among `blocks`.
        blocks: Blocks that share the work.
        inputs: References to the role's inputs.
        outputs: References to its outputs.
        scratch: References to its scratch, by name.
    """

    number: Number
    blocks: int
    inputs: Refs
    outputs: Refs
    scratch: types.SimpleNamespace


@dataclasses.dataclass(frozen=True)
class Role:
    """A computation that a kernel's persistent blocks carry out.

    Attributes:
        run: What a block does.
        name: What profilers call the kernel.
        outputs: Types of the outputs.
        scratch: Types of the scratch, by name.
        groups: Computing warpgroups; one more loads.
        blocks: Blocks that share the work.
        reduction_bytes: Scratch for reductions across the warps of a warpgroup; one warpgroup at a time may do them.
    """

    run: Callable[[Given], None]
    name: str
    outputs: tuple[jax.ShapeDtypeStruct, ...]
    scratch: Mapping[str, Any]
    groups: int
    blocks: int
    reduction_bytes: int = REDUCTIONS


def launch(role: Role, inputs: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """Runs a role as one kernel.

    Args:
        role: What its blocks do.
        inputs: As the role says.

    Returns:
        The role's outputs.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def body(*refs):
        def scoped(*scratch):
            named = types.SimpleNamespace(**dict(zip(role.scratch, scratch, strict=True)))
            number = lax.axis_index("block")
            role.run(Given(number, role.blocks, refs[: len(inputs)], refs[len(inputs) :], named))

        pl.run_scoped(scoped, *role.scratch.values(), collective_axes="group")

    body.__name__ = role.name
    results = plgpu.kernel(
        body,
        out_type=role.outputs,
        grid=(role.blocks,),
        grid_names=("block",),
        num_threads=role.groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=role.reduction_bytes
        ),
    )(*inputs)
    return tuple(varying(x, *inputs) for x in results)


class PersistentBlock(abc.ABC):
    """A block that takes turns; a kernel's own adds the arrays and its shared memory by name."""

    def __init__(self, given: Given) -> None:
        self.block, self.blocks = given.number, given.blocks
        self.group = lax.axis_index("group")

    def share(self, items: int) -> Number:
        """Turns that this block has of so many items."""
        return lax.div(items - self.block + self.blocks - 1, self.blocks)

    def number(self, turn: Index) -> Number:
        """Which item a turn is."""
        return self.block + turn * self.blocks

    @abc.abstractmethod
    def compute(self) -> None:
        """What a computing warpgroup does."""

    @abc.abstractmethod
    def load(self) -> None:
        """What the loading warpgroup does."""


def specialised(block: Callable[[Given], PersistentBlock], groups: int) -> Callable[[Given], None]:
    """`Role.run` of blocks whose first `groups` warpgroups compute and whose last one loads."""
    from jax.experimental import pallas as pl

    def run(given: Given) -> None:
        work = block(given)
        pl.when(work.group < groups)(work.compute)
        pl.when(work.group == groups)(work.load)

    return run


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkItems:
    """Some of the work on a chunk of heads and query tiles is an item.

    Attributes:
        q: Queries, [B, A, b1, b2, H, ...].
        heads: Heads of the chunk.
        tiles: Query tiles of the chunk.
        masked: Whether a query tile may see fewer than all pairs (c, k).
    """

    q: jax.ShapeDtypeStruct
    heads: int
    tiles: int
    masked: bool

    @functools.cached_property
    def split(self) -> ColumnBlocks:
        """Which columns of the chunk lie together in what has 64 of them."""
        return column_blocks(self.q.shape[3], self.tiles, self.masked)

    @property
    def packs(self) -> tuple[int, int] | None:
        """How the 64 rows of a pack of last columns are split: tiles and rows of each; None without such."""
        return (self.split.packed, self.split.tail_rows) if self.split.items > self.split.whole else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyRowItems(ChunkItems):
    """64 columns of a query tile, or the last ones of several, are an item of a key row.

    Attributes:
        pairs: C*b1, key rows of a head.
    """

    pairs: int

    @property
    def units(self) -> int:
        """Key rows of all heads and batch entries, with the items of each."""
        return self.q.shape[0] * self.heads * self.pairs

    def place(self, unit: Index) -> Place:
        """Batch entry, head of the chunk and key row of a unit."""
        pairs, heads = self.pairs, self.heads
        return lax.div(unit, heads * pairs), lax.rem(lax.div(unit, pairs), heads), lax.rem(unit, pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryTileItems(ChunkItems):
    """Some columns of a query tile and head are an item; `x` counts query tiles of all batch entries and heads.

    Attributes:
        pairs: C*b1, pairs (c, k) that a query tile may see.
    """

    pairs: int

    def seen_at(self, x: Index, limits: Ref, tile0: Index) -> tuple[Place, Index]:
        """Batch entry, head and tile of the chunk, and the pairs that the tile sees."""
        tile = lax.rem(x, self.tiles)
        limit = limits[tile0 + tile] if self.masked else jnp.int32(self.pairs)
        return (lax.div(x, self.heads * self.tiles), lax.rem(lax.div(x, self.tiles), self.heads), tile), limit
