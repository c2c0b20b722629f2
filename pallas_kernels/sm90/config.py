"""Sizes of the Mosaic GPU kernels on Hopper (sm_90a): what is tuned, its shared memory, and the choice per problem."""

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

CAPABILITY = 9  # the major compute capability that all of this is for
SHARED_MEMORY = 227 * 1024  # bytes one block may use on sm_90
ROWS = 64  # rows of one warpgroup's matrix product
SLAB = 64  # 16-bit elements of a 128-byte swizzled row
# registers for a thread of a computing and of the loading warpgroup, per number of computing warpgroups: a block has
# 65536 for all its threads, and one that asks for more waits for ever
COMPUTE_REGISTERS = {1: 240, 2: 232, 3: 160}
LOAD_REGISTERS = {1: 40, 2: 40, 3: 24}
REDUCTIONS = 512  # bytes for reductions across the warps of a warpgroup


def block_bytes(*buffers: int, barriers: int, reductions: int = 0) -> int:
    """Shared memory of a block: every buffer, and scratch for reductions, at a multiple of 1,024 bytes; barriers."""
    return sum(-(-x // 1024) * 1024 for x in (*buffers, reductions)) + 8 * barriers


def _check_warpgroups(count: int) -> None:
    if count not in COMPUTE_REGISTERS:
        names = ", ".join(map(str, COMPUTE_REGISTERS))
        raise ValueError(f"{count} computing warpgroups is not one of {names}: registers would not suffice.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RightConfig:
    """The kernel that makes alpha, c_L and Y.

    Attributes:
        warpgroups: Computing warpgroups of a block; one more loads.
        query_stages: 64-row query tiles in flight, a multiple of `warpgroups`.
        key_stages: Pairs of a key row and its value row in flight.
        slab: Elements of D per swizzled row, 64 or 32. A product's depth, the columns l, is a multiple of it.
        together: Whether both products are under way at once, which takes more registers.
        blocks: Persistent blocks; one per multiprocessor.
    """

    warpgroups: int = 2
    query_stages: int = 4
    key_stages: int = 2
    slab: int = SLAB
    together: bool = False
    blocks: int = 132

    def __post_init__(self) -> None:
        _check_warpgroups(self.warpgroups)
        if self.query_stages % self.warpgroups:
            raise ValueError(
                f"query_stages={self.query_stages} is not a multiple of warpgroups={self.warpgroups}; "
                f"every stage belongs to one warpgroup."
            )

    def width(self, cols: int) -> int:
        """Columns l of the scores: a multiple of 8."""
        return -(-cols // 8) * 8

    def depth(self, cols: int) -> int:
        """Columns l in shared memory."""
        return -(-cols // self.slab) * self.slab

    def shared_memory(self, cols: int, dim: int, *, width: int = 2) -> int:
        """Bytes a block uses for tiles of `cols` columns; entries of alpha and Y leave in `width` bytes."""
        query = self.query_stages * ROWS * dim * 2
        keys = self.key_stages * 2 * self.depth(cols) * dim * 2
        out = self.warpgroups * 2 * ROWS * dim * width
        barriers = 2 * (self.key_stages + self.query_stages)
        return block_bytes(query, keys, out, barriers=barriers, reductions=REDUCTIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftConfig:
    """The kernel that attends from the rows of a column to alpha and Y.

    Attributes:
        columns: Columns j that a block works on at a time.
        row_blocks: Blocks of 64 rows i of each of them; columns * row_blocks computing warpgroups, one more loads.
        tail: Rows i after these that one more computing warpgroup takes in transposed products, 0, 8 or 16, where a
            block of 64 would be nearly empty; then columns is 1, and there are no further rows.
        stages: Blocks of alpha and Y in flight.
        key_block: (c, k) pairs per block of alpha and Y.
        query_stages: Query tiles in flight.
        newest_first: Whether heads and query tiles are taken from the last on: alpha and Y that were made last may
            still be in the L2 cache.
        alternate: Whether warpgroups start their products one after another, so that one's are beside another's
            softmax.
        blocks: Persistent blocks; one per multiprocessor.
    """

    columns: int = 2
    row_blocks: int = 1
    tail: int = 0
    stages: int = 2
    key_block: int = 64
    query_stages: int = 2
    newest_first: bool = False
    alternate: bool = False
    blocks: int = 132

    def __post_init__(self) -> None:
        _check_warpgroups(self.warpgroups)
        if self.tail not in (0, 8, 16) or (self.tail and self.columns > 1):
            raise ValueError(f"tail={self.tail} with columns={self.columns} is not 0, nor 8 or 16 of one column.")
        if self.alternate and (self.wide < 2 or min(self.stages, self.query_stages) < 2):
            raise ValueError(
                f"alternate=True with warpgroups={self.wide}, stages={self.stages} and "
                f"query_stages={self.query_stages}: one is behind another, which takes two of each."
            )

    @property
    def wide(self) -> int:
        """Computing warpgroups with 64 rows each."""
        return self.columns * self.row_blocks

    @property
    def warpgroups(self) -> int:
        """Computing warpgroups."""
        return self.wide + (self.tail > 0)

    @property
    def registers(self) -> tuple[int, int, int]:
        """Registers of a thread that computes with 64 rows, with the tail, and that loads."""
        if self.tail and self.wide == 2:
            return 208, 64, 24
        compute = COMPUTE_REGISTERS[self.warpgroups]
        return compute, compute, LOAD_REGISTERS[self.warpgroups]

    @property
    def reduction_bytes(self) -> int:
        """Scratch for reductions across warps, of which the tail has more."""
        return 2 * REDUCTIONS if self.tail else REDUCTIONS

    def shared_memory(self, dim: int) -> int:
        """Bytes a block uses."""
        keys = self.stages * self.columns * self.key_block
        query = self.query_stages * (self.wide * ROWS + self.tail) * dim * 2 + self.tail * self.key_block * 2
        return block_bytes(
            2 * keys * dim * 2,
            query,
            keys * 4,
            self.warpgroups * ROWS * 4,
            barriers=2 * self.query_stages + 4 * self.stages + 1,
            reductions=self.reduction_bytes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftE4M3Config(LeftConfig):
    """The same from alpha and Y in 8 bits; two warpgroups compute, one converts, one loads, and `stages` says nothing.

    Attributes:
        raw: Half steps, a block of alpha or of Y each, in flight in 8 bits.
        cells: Half steps that are there in 16 bits.
        converting: Registers of a thread that converts.
    """

    raw: int = 3
    cells: int = 3
    converting: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.wide != 2 or self.tail:
            raise ValueError(
                f"columns={self.columns}, row_blocks={self.row_blocks}, tail={self.tail}: alpha and Y in 8 bits "
                f"leave registers for two computing warpgroups and no tail."
            )
        if self.raw < 1 or self.cells < 2:
            raise ValueError(f"raw={self.raw}, cells={self.cells}: at least 1 and 2, an alpha and a Y.")

    @property
    def registers(self) -> tuple[int, int, int]:
        """Registers of a thread that computes (twice) and that loads."""
        return 208, 208, 24

    @property
    def raw_steps(self) -> int:
        """Steps whose c_L and scales are in flight: one's are in use until its Y is converted."""
        return self.raw // 2 + 1

    @property
    def steps(self) -> int:
        """Steps whose numbers are there for those that compute, who read them until they read Y."""
        return self.cells // 2 + 1

    def shared_memory(self, dim: int) -> int:
        """Bytes a block uses."""
        block = self.columns * self.key_block
        numbers = self.raw_steps * block * 4
        return block_bytes(
            self.query_stages * self.wide * ROWS * dim * 2,
            self.cells * block * dim * 2,
            self.raw * block * dim,
            numbers,
            numbers,
            self.steps * 3 * block * 4,
            self.wide * ROWS * 4,
            barriers=2 * (self.query_stages + self.raw + self.cells) + self.raw_steps + 1,
            reductions=self.reduction_bytes,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftBackwardConfig:
    """The kernel that takes gradients back through L.

    Attributes:
        columns: Columns j that a block works on at a time.
        row_blocks: Blocks of 64 rows i of each of them, all that there are; columns * row_blocks computing warpgroups,
            one more loads.
        independent: Whether two warpgroups take the steps of a column in turns, each with all rows i; then columns and
            row_blocks are 1.
        stages: Blocks of 64 pairs of alpha and Y in flight.
        blocks: Persistent blocks; one per multiprocessor.
    """

    columns: int = 2
    row_blocks: int = 1
    independent: bool = False
    stages: int = 2
    blocks: int = 132

    def __post_init__(self) -> None:
        _check_warpgroups(self.warpgroups)
        one = (self.columns, self.row_blocks) == (1, 1)
        if self.independent and not (one and self.stages >= 4 and self.stages % 2 == 0):
            raise ValueError(
                f"independent=True with columns={self.columns}, row_blocks={self.row_blocks}, stages={self.stages} "
                f"is not one column of one block of rows, with an even number of stages, 4 or more: a warpgroup's "
                f"last step leaves while it works on the next."
            )

    @property
    def warpgroups(self) -> int:
        """Computing warpgroups."""
        return 2 if self.independent else self.columns * self.row_blocks

    @property
    def registers(self) -> tuple[int, int]:
        """Registers for a thread of a computing and of the loading warpgroup.

        With two computing warpgroups a step takes more than `COMPUTE_REGISTERS`: a read from local memory in every step
        costs more than a few in the loading warpgroup, as shared memory leaves little of the L1 cache.
        """
        if self.warpgroups == 2:
            return 240, 24
        return COMPUTE_REGISTERS[self.warpgroups], LOAD_REGISTERS[self.warpgroups]

    def width(self, rows: int) -> int:
        """Rows i of a warpgroup that are not padding: a multiple of 8, the blocks' share of b1."""
        return -(-rows // (8 * self.row_blocks)) * 8

    def depth(self, rows: int) -> int:
        """Rows i of q and dO in shared memory for all of b1: a multiple of 64."""
        return -(-rows // ROWS) * ROWS if self.independent else self.row_blocks * ROWS

    def shared_memory(self, rows: int, dim: int) -> int:
        """Bytes a block uses for tiles of `rows` rows."""
        keys = self.stages * self.columns * ROWS
        loaded = (2 * keys * dim * 2, keys * 4)
        if self.independent:
            width = self.width(rows)
            query, factors = self.depth(rows) * 2 * dim * 2, self.warpgroups * width * ROWS * 2
            barriers = 2 + self.warpgroups + 2 * self.stages
            return block_bytes(*loaded, query, 2 * width * 4, factors, barriers=barriers, reductions=REDUCTIONS)
        query = self.warpgroups * 2 * ROWS
        factors = self.warpgroups * ROWS * ROWS * 2 * (2 if self.row_blocks > 1 else 1)
        rest = (query * 4, factors, self.warpgroups * ROWS * 4)
        barriers = 4 + 2 * self.columns * self.stages
        return block_bytes(*loaded, query * dim * 2, *rest, barriers=barriers, reductions=REDUCTIONS)

    def refine_shared_memory(self, rows: int, dim: int) -> int:
        """The same of the kernel for a refinement step before the last."""
        keys, width = self.stages * ROWS, self.width(rows)
        query, factors = self.depth(rows) * dim * 2, self.warpgroups * 2 * width * ROWS * 2
        barriers = 2 + self.warpgroups + 2 * self.stages
        numbers = (3 * keys * 4, 2 * width * 4)
        return block_bytes(query + 2 * keys * dim * 2, factors, *numbers, barriers=barriers, reductions=REDUCTIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RightBackwardConfig:
    """The kernel that takes gradients back through R, for keys and values.

    Attributes:
        independent: Whether a warpgroup has a key row of its own; else the warpgroups share one and exchange scores.
        stages: 64-row tiles of q, d_alpha and dY in flight; unless `independent`.
        ring: With `independent`, 64-row tiles of q, d_alpha or dY in flight, 6 or more.
        blocks: Persistent blocks; one per multiprocessor.
    """

    independent: bool = False
    stages: int = 3
    ring: int = 8
    blocks: int = 132

    def __post_init__(self) -> None:
        if self.ring < 6:
            raise ValueError(f"ring={self.ring} is below 6, three tiles for each of two warpgroups.")

    @property
    def warpgroups(self) -> int:
        """Computing warpgroups, one per tile at a time."""
        return 2

    def width(self, cols: int) -> int:
        """Columns l of a product: a multiple of 8."""
        return -(-cols // 8) * 8

    def shared_memory(self, cols: int, dim: int, *, values: bool = True) -> int:
        """Bytes a block uses for tiles of `cols` columns; without `values`, an item has two tiles (`independent`)."""
        width = self.width(cols)
        scores = self.warpgroups * 2 * width * ROWS * 2
        if self.independent:
            ahead = self.ring // (2 + values)
            rows, keys = self.ring * ROWS * dim * 2, self.warpgroups * 2 * width * dim * 2
            vectors = (ahead * ROWS * 4, self.warpgroups * width * 4)
            barriers = 2 * self.warpgroups * (ahead + 2) + ahead
            return block_bytes(rows, keys, scores, *vectors, barriers=barriers, reductions=REDUCTIONS)
        rows, keys = self.stages * ROWS * 3 * dim * 2, 2 * width * dim * 2
        barriers = 4 + 2 * self.stages
        return block_bytes(rows, keys, scores, self.stages * ROWS * 4, barriers=barriers, reductions=REDUCTIONS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QueryConfig:
    """The kernel that sums dq.

    Attributes:
        warpgroups: Computing warpgroups, one per block of 64 columns, which share the key rows: 2, 3 or 4.
        stages: Key rows, each with a tile of the scores' gradient for every warpgroup, in flight.
        blocks: Persistent blocks; one per multiprocessor.
    """

    warpgroups: int = 2
    stages: int = 4
    blocks: int = 132

    def __post_init__(self) -> None:
        if self.warpgroups not in (2, 3, 4):
            raise ValueError(f"warpgroups={self.warpgroups} must be 2, 3 or 4.")

    @property
    def registers(self) -> tuple[int, int]:
        """Registers for a thread of a computing and of the loading warpgroup."""
        return {2: (232, 40), 3: (152, 40), 4: (112, 32)}[self.warpgroups]

    def width(self, cols: int) -> int:
        """Columns l of a tile of the scores' gradient."""
        return -(-cols // 8) * 8

    def depth(self, cols: int) -> int:
        """Columns l of a product."""
        return -(-cols // SLAB) * SLAB

    def shared_memory(self, cols: int, dim: int) -> int:
        """Bytes a block uses for tiles of `cols` columns."""
        stage = self.depth(cols) * (dim + self.warpgroups * ROWS) * 2
        barriers = (2 + self.warpgroups) * self.stages + 2 * self.warpgroups
        return block_bytes(self.stages * stage, self.warpgroups * ROWS * dim * 2, barriers=barriers)


@dataclasses.dataclass(frozen=True)
class ColumnBlocks:
    """How the columns j of all query tiles fall into blocks of 64 rows of a matrix product.

    A tile's columns fill `full` whole blocks; the rest, padded to `tail_rows`, shares a block with the rest of `packed`
    tiles. A block is an item: first the whole ones, tile by tile, then the shared ones.

    Attributes:
        full: Whole blocks of a tile.
        tail_rows: Rows that the remaining columns take, a divisor of 64.
        packed: Tiles whose remaining columns share a block.
        whole: Whole blocks of all tiles.
        items: All blocks.
        used: Rows of a block that may be columns, a multiple of 8; those after them are padding in every block.
    """

    full: int
    tail_rows: int
    packed: int
    whole: int
    items: int
    used: int

    def place(self, tile: "jax.Array | int", column: "jax.Array | int") -> "tuple[jax.Array | int, jax.Array | int]":
        """Item and row of a column; integers or traced scalars."""
        from jax import lax

        rest = column - self.full * ROWS
        item = self.whole + lax.div(tile, self.packed)
        row = lax.rem(tile, self.packed) * self.tail_rows + rest
        if not self.full:
            return item, row
        if self.items == self.whole:
            return tile * self.full + lax.div(column, ROWS), lax.rem(column, ROWS)
        in_whole = rest < 0
        return (
            lax.select(in_whole, tile * self.full + lax.div(column, ROWS), item),
            lax.select(in_whole, lax.rem(column, ROWS), row),
        )


def column_blocks(cols: int, tiles: int, masked: bool) -> ColumnBlocks:
    """Blocks of `cols` columns of `tiles` query tiles; with masks every tile has its own, as each sees other keys."""
    full, tail = divmod(cols, ROWS)
    tail_rows = next((n for n in (8, 16, 32) if tail <= n), ROWS)
    if masked or tail_rows == ROWS:
        full, tail = -(-cols // ROWS), 0
    packed = ROWS // tail_rows
    items = tiles * full + (-(-tiles // packed) if tail else 0)
    used = min(-(-cols // 8) * 8, ROWS) if full == 1 and not tail else ROWS
    return ColumnBlocks(full, tail_rows, packed, tiles * full, items, used)


def right_config(cols: int, dim: int) -> RightConfig | None:
    """The first configuration that fits shared memory, or None."""
    sizes = ((4, 2, SLAB), (2, 2, SLAB), (2, 1, SLAB), (2, 1, SLAB // 2))
    candidates = (RightConfig(query_stages=n, key_stages=m, slab=slab) for n, m, slab in sizes)
    return next((c for c in candidates if c.shared_memory(cols, dim) <= SHARED_MEMORY), None)


def left_e4m3_config(rows: int, dim: int) -> LeftE4M3Config:
    """Two columns of up to 64 rows at a time, or two blocks of rows of one column."""
    one: dict[str, Any] = dict(columns=1, row_blocks=2, key_block=2 * ROWS, alternate=True)
    sizes = {} if rows <= ROWS else one
    rings = ((6, 6), (4, 4), (3, 3))
    candidates = (LeftE4M3Config(raw=n, cells=m, newest_first=True, **sizes) for n, m in rings)
    return next(c for c in candidates if c.shared_memory(dim) <= SHARED_MEMORY)


def left_config(rows: int, dim: int) -> LeftConfig:
    """Up to 64 rows: two columns at a time. More: one column, whose alpha and Y two or three warpgroups share.

    Up to 8 rows more than 128 are the tail of two blocks.
    """
    if rows <= ROWS:
        candidates = tuple(LeftConfig(stages=n) for n in (5, 4, 3, 2))
    elif 2 * ROWS < rows <= 2 * ROWS + 8:
        candidates = (LeftConfig(columns=1, row_blocks=2, tail=8, key_block=2 * ROWS, stages=2, alternate=True),)
    elif rows <= 2 * ROWS or rows > 3 * ROWS:
        candidates = tuple(LeftConfig(columns=1, row_blocks=2, stages=n) for n in (5, 4, 3))
    else:
        candidates = tuple(LeftConfig(columns=1, row_blocks=3, stages=n) for n in (4, 3))
    return next(c for c in candidates if c.shared_memory(dim) <= SHARED_MEMORY)


CLUSTER_VECTORS = 32  # key rows of a step times the columns that a warpgroup sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusedConfig:
    """Both stages in one kernel, whose clusters of blocks pass alpha and Y on without device memory.

    Attributes:
        clusters: Persistent clusters, at most as many as the card can run at a time; 0: not this kernel.
        blocks: Blocks of a cluster, each of which makes a key row in a step: 16, or 8 for b1 of up to 16 rows.
        columns: Columns j that a block sums: 4 with 16 blocks; 8, or 7 for less to the busiest block, with 8.
        resident: Whether a block takes the key rows with one k after another, whose query row it then loads once.
        overlap: Whether what makes key rows has a next product under way while it sends, for registers of what sums;
            its warps then wait for each other before they give room back.
        direct: Whether the output leaves from registers, so that the next item's queries come while it is made.
        spread: Whether the items that are left over when the clusters have had equally many are cut along the keys, a
            part for every cluster; without masks, with `direct`.
    """

    clusters: int = 0
    blocks: int = 16
    columns: int = 4
    resident: bool = False
    overlap: bool = False
    direct: bool = False
    spread: bool = False

    def __post_init__(self) -> None:
        if self.clusters < 0:
            raise ValueError(f"clusters={self.clusters} is negative; 0 is for two kernels.")
        if self.spread and not self.direct:
            raise ValueError("spread=True with direct=False: parts of an item leave from registers, so direct=True.")
        if (self.blocks, self.columns) not in ((16, 4), (8, 8), (8, 7)):
            raise ValueError(
                f"blocks={self.blocks} with columns={self.columns} must be 16 with 4, 8 with 8 or 8 with 7: two "
                f"warpgroups of a block sum what the cluster makes of up to 64 (8 blocks of 7: 56) columns."
            )

    @property
    def registers(self) -> tuple[int, int, int]:
        """Registers for a thread of a warpgroup that sums, one that makes key rows and the one that loads.

        A launch has 96 for each of 640, and a block that asks for more waits for ever.
        """
        return (112, 112, 32) if self.overlap else (128, 96, 32)

    @property
    def together(self) -> int:
        """Columns that a warpgroup sums, whose rows i share the 64 of a product."""
        return CLUSTER_VECTORS // self.blocks

    @property
    def rows(self) -> int:
        """Rows of a product for each of them."""
        return ROWS // self.together

    def serves(self, rows: int, cols: int, dim: int) -> bool:
        """Whether columns' rows fit their share of a product, all columns the cluster's blocks, and D two slabs."""
        return rows <= self.rows and cols <= self.blocks * self.columns and dim == 2 * SLAB

    def check(self, rows: int, cols: int, dim: int) -> None:
        """Raises where these clusters are asked for and cannot serve tiles of rows x cols."""
        if self.clusters and not self.serves(rows, cols, dim):
            raise ValueError(
                f"clusters={self.clusters} with blocks={self.blocks}, columns={self.columns} are for tiles of up to "
                f"{self.rows} x {self.blocks * self.columns} and head_dim={2 * SLAB}, not {rows} x {cols} and {dim}; "
                f"clusters=0 is for two kernels."
            )

    @staticmethod
    def shared_memory() -> int:
        """Bytes a block uses: two Q of columns, two of rows, three pairs of key and value rows; alpha and Y twice."""
        tile, vectors = ROWS * 2 * SLAB * 2, 2 * 2 * CLUSTER_VECTORS
        return block_bytes(10 * tile, 2 * vectors * 2 * SLAB * 2, vectors * 4 + 2 * ROWS * 4, 16 * 4, barriers=12)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ForwardConfig:
    """The kernels of the forward pass.

    Attributes:
        right: Stage 1.
        left: Stage 2; a `LeftE4M3Config` makes stage 1 store alpha and Y in 8 bits.
        chunk_bytes: Bytes of alpha and Y that may exist, when a single head and query tile does not need more.
        fused: Both stages at once, where alpha and Y are not to be kept.
    """

    right: RightConfig
    left: LeftConfig
    chunk_bytes: int = 1536 * 2**20
    fused: FusedConfig = FusedConfig()


def forward_config(rows: int, cols: int, dim: int, *, e4m3: bool = False) -> ForwardConfig | None:
    """The configuration for tiles of rows x cols tokens and heads of `dim`; None when nothing fits."""
    right = right_config(cols, dim)
    left = left_e4m3_config if e4m3 else left_config
    return None if right is None else ForwardConfig(right=right, left=left(rows, dim))


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    """The kernels of the backward pass.

    Attributes:
        right: Makes alpha, c_L and Y again.
        left: Back through L.
        keys: Back through R, for keys and values.
        query: Back through R, for queries.
        chunk_bytes: Bytes of alpha and Y that may exist, and as many of their gradients, when a single head and query
            tile does not need more.
    """

    right: RightConfig
    left: LeftBackwardConfig
    keys: RightBackwardConfig
    query: QueryConfig
    chunk_bytes: int = 768 * 2**20


MOST_ROWS = 3 * ROWS  # b1 whose dq a block's registers hold
MOST_COLUMNS = 96  # b2 whose dk and dv a block's registers hold beside the scores

# most of (D/64 + 1) * columns of a product for which a warpgroup holds all of dk and dv beside the scores
INDEPENDENT_WORK = 3 * 56


def backward_config(rows: int, cols: int, dim: int) -> BackwardConfig | None:
    """The configuration for tiles of rows x cols tokens and heads of `dim`; None when nothing fits."""
    right = right_config(cols, dim)
    if right is None or rows > MOST_ROWS or cols > MOST_COLUMNS:
        return None
    if rows <= ROWS:
        left = (LeftBackwardConfig(stages=n) for n in (4, 3, 2))
    else:
        left = (LeftBackwardConfig(columns=1, row_blocks=-(-rows // ROWS), stages=n) for n in (4, 3, 2))
    alone = (dim // SLAB + 1) * RightBackwardConfig().width(cols) <= INDEPENDENT_WORK
    keys = [RightBackwardConfig(independent=True, ring=n) for n in (12, 9, 8, 7, 6)] if alone else []
    keys += [RightBackwardConfig(stages=n) for n in (4, 3, 2)]
    query = (QueryConfig(stages=n) for n in (4, 3, 2))
    return BackwardConfig(
        right=right,
        left=next(c for c in left if c.shared_memory(rows, dim) <= SHARED_MEMORY),
        keys=next(c for c in keys if c.shared_memory(cols, dim) <= SHARED_MEMORY),
        query=next(c for c in query if c.shared_memory(cols, dim) <= SHARED_MEMORY),
    )
