"""`MonarchSpec`: grid, tiles and block sizes of a tiled Monarch attention, with its cost in FLOPs and bytes."""

import dataclasses
import math
from typing import Literal

from monarch_jax.checks import flag, one_of, positive, triple

BLOCKS = ("fh,w", "w,fh", "f,hw", "hw,f", "fw,h", "h,fw")
AXES = ("frames", "rows", "columns")
MAX_ITERS = 100  # the steps are unrolled in the program; the paper uses 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MonarchSpec:
    """A tiled Monarch attention over a video's tokens (paper, Sections 4.1 and 4.2).

    Tokens are in row-major (frame, height, width) order. A tile is a spatiotemporal neighbourhood; inside it the
    tokens form a matrix of `block_rows` x `block_cols`, and each pair of a query tile and a key tile is one Monarch
    matrix with those block sizes.

    Examples:
        >>> spec = MonarchSpec(grid=(21, 30, 52), tile=(3, 30, 52))
        >>> spec.block_rows, spec.block_cols, spec.query_tiles, round(spec.sparsity, 3)
        (90, 52, 7, 0.97)

    Attributes:
        grid: (F_q, h, w), the query tokens' frames, rows and columns.
        key_frames: F_k, the keys' frames; None means F_q. Height and width are the grid's.
        tile: (n_f, n_h, n_w), frames, rows and columns of a tile; None means (1, h, w).
        blocks: Dimensions that form the rows and the columns of a tile, one of `BLOCKS`.
        num_iters: Refinement steps T, at most 100; 1 after finetuning (Section 4.3).
        causal_block: Frames per block of a block-causal mask, or None for bidirectional attention.

    Raises:
        ValueError: If a number is not positive, a tile does not divide its grid, a name is unknown, or causal keys
            have fewer frames than the queries.
    """

    grid: tuple[int, int, int]
    key_frames: int | None = None
    tile: tuple[int, int, int] | None = None
    blocks: str = "fh,w"
    num_iters: int = 1
    causal_block: int | None = None

    def __post_init__(self):
        grid = triple("grid", self.grid, "(frames, height, width)")
        tile = (1, *grid[1:]) if self.tile is None else triple("tile", self.tile, "(n_f, n_h, n_w)")
        key_frames = grid[0] if self.key_frames is None else positive("key_frames", self.key_frames)
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "tile", tile)
        object.__setattr__(self, "key_frames", key_frames)
        object.__setattr__(self, "num_iters", positive("num_iters", self.num_iters, most=MAX_ITERS))
        one_of("blocks", self.blocks, BLOCKS)
        for axis, size, n in zip(AXES, grid, tile, strict=True):
            _check_divides(tile, axis, n, size, f"of grid={grid}")
        _check_divides(tile, "frames", tile[0], key_frames, f"of the keys (key_frames={key_frames})")
        if self.causal_block is not None:
            block = positive("causal_block", self.causal_block)
            object.__setattr__(self, "causal_block", block)
            if block % tile[0]:
                raise ValueError(
                    f"causal_block={block} frames is not a multiple of the tile's {tile[0]} frames (tile={tile}); "
                    f"a tile must lie in one block."
                )
            if key_frames < grid[0]:
                raise ValueError(
                    f"causal_block={block}: the queries are the last {grid[0]} frames of the keys, "
                    f"which have {key_frames}."
                )

    @property
    def block_rows(self) -> int:
        """b1, rows of a tile: the size of the blocks of L."""
        return self._extent(self.blocks.split(",")[0])

    @property
    def block_cols(self) -> int:
        """b2, columns of a tile: the size of the blocks of R."""
        return self._extent(self.blocks.split(",")[1])

    @property
    def tiles_per_group(self) -> int:
        """Tiles that cover one group of n_f frames."""
        _, height, width = self.grid
        _, n_h, n_w = self.tile_shape
        return (height // n_h) * (width // n_w)

    @property
    def tile_shape(self) -> tuple[int, int, int]:
        """The tile (n_f, n_h, n_w), never None."""
        return self.tile or (1, *self.grid[1:])

    @property
    def total_key_frames(self) -> int:
        """F_k, never None."""
        return self.key_frames or self.grid[0]

    @property
    def query_tiles(self) -> int:
        """Number of query tiles, A."""
        return self.grid[0] // self.tile_shape[0] * self.tiles_per_group

    @property
    def key_tiles(self) -> int:
        """Number of key tiles, C."""
        return self.total_key_frames // self.tile_shape[0] * self.tiles_per_group

    @property
    def query_tokens(self) -> int:
        """Number of query tokens, F_q*h*w."""
        return math.prod(self.grid)

    @property
    def key_tokens(self) -> int:
        """Number of key tokens, F_k*h*w."""
        return self.total_key_frames * self.grid[1] * self.grid[2]

    @property
    def density(self) -> float:
        """Stored entries of L and R divided by the entries of the map, 1/b1 + 1/b2, at most 1 (Section 4.2)."""
        return min(1.0, 1 / self.block_rows + 1 / self.block_cols)

    @property
    def sparsity(self) -> float:
        """1 - density: the fraction of the attention map that is not stored."""
        return 1.0 - self.density

    @property
    def tile_pairs(self) -> int:
        """Number of pairs of a query tile and a key tile that it sees."""
        return sum(self.visible_tiles())

    def visible_tiles(self) -> tuple[int, ...]:
        """Number of leading key tiles that each query tile sees; the queries are the last frames of the keys."""
        n_f, group = self.tile_shape[0], self.tiles_per_group
        key_frames = self.total_key_frames
        counts = []
        for frame in range(0, self.grid[0], n_f):
            seen = key_frames
            if self.causal_block is not None:
                position = key_frames - self.grid[0] + frame
                seen = min(key_frames, (position // self.causal_block + 1) * self.causal_block)
            counts += [seen // n_f * group] * group
        return tuple(counts)

    def _extent(self, dims: str) -> int:
        sizes = dict(zip("fhw", self.tile_shape, strict=True))
        return math.prod(sizes[d] for d in dims)


def sparsity(*, grid: tuple[int, int, int], tile: tuple[int, int, int] | None = None, blocks: str = "fh,w") -> float:
    """Fraction of the attention map that tiled Monarch does not store, 1 - 1/b1 - 1/b2 (paper, Section 4.2).

    Examples:
        >>> round(sparsity(grid=(21, 30, 52)), 3), round(sparsity(grid=(21, 45, 80), tile=(3, 45, 80)), 3)
        (0.947, 0.98)

    Args:
        grid: (F, h, w).
        tile: (n_f, n_h, n_w); None means (1, h, w).
        blocks: One of `BLOCKS`.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: As in `MonarchSpec`.
    """
    return MonarchSpec(grid=grid, tile=tile, blocks=blocks).sparsity


def flops(
    spec: MonarchSpec, *, heads: int, head_dim: int, batch: int = 1, mode: Literal["forward", "vjp"] = "forward"
) -> int:
    """FLOPs of the matrix products of an attention, a multiply-add counted as 2; softmaxes are not counted.

    One refinement step needs six products per pair of tiles: scores of R, alpha, Y (each 2*b1*b2^2*D) and scores of
    L, output (each 2*b1^2*b2*D). Each further step repeats all but Y and the output and adds alpha_R. The vjp (T = 1)
    recomputes R, alpha, Y and L and needs two products for each one of the forward pass.

    Examples:
        >>> spec = MonarchSpec(grid=(21, 30, 52))
        >>> monarch, dense = (count(spec, heads=12, head_dim=128) for count in (flops, dense_flops))
        >>> f"{monarch / 1e12:.2f} TFLOP against {dense / 1e12:.2f}"
        '0.46 TFLOP against 6.59'

    Args:
        spec: The attention; with a causal mask only visible pairs of tiles count.
        heads: Number of heads H.
        head_dim: Size of a head D.
        batch: Batch size B.
        mode: "forward", or "vjp" for the backward pass alone.

    Returns:
        FLOPs for the whole batch.

    Raises:
        ValueError: If `mode` is unknown or a size is not positive.
    """
    per_head = _per_head(spec, batch, heads, head_dim)
    b1, b2 = spec.block_rows, spec.block_cols
    right, left = 2 * b1 * b2 * b2, 2 * b1 * b1 * b2  # one product of the R kind, one of the L kind
    extra = (spec.num_iters - 1) * (2 * right + 2 * left)
    match mode:
        case "forward":
            per_pair = 3 * right + 2 * left + extra
        case "vjp":
            per_pair = 3 * right + left + 2 * (3 * right + 2 * left) + 3 * extra
        case _:
            raise ValueError(f"mode={mode!r} is not 'forward' or 'vjp'.")
    return spec.tile_pairs * per_pair * per_head


def dense_flops(spec: MonarchSpec, *, heads: int, head_dim: int, batch: int = 1) -> int:
    """FLOPs of the forward pass of dense attention over the same pairs of tiles, 4*N_q*N_k*D without a mask.

    Examples:
        >>> dense_flops(MonarchSpec(grid=(1, 2, 2)), heads=1, head_dim=8)
        512

    Args:
        spec: Sizes and mask.
        heads: Number of heads H.
        head_dim: Size of a head D.
        batch: Batch size B.

    Returns:
        FLOPs for the whole batch.

    Raises:
        ValueError: If a size is not positive.
    """
    per_head = _per_head(spec, batch, heads, head_dim)
    return spec.tile_pairs * 4 * (spec.block_rows * spec.block_cols) ** 2 * per_head


def bytes_moved(
    spec: MonarchSpec, *, heads: int, head_dim: int, batch: int = 1, itemsize: int = 2, spill: bool = False
) -> int:
    """Bytes of device memory that the forward pass (T = 1) reads and writes: q, k and v once, the output once.

    Examples:
        >>> spec = MonarchSpec(grid=(21, 30, 52))
        >>> [f"{bytes_moved(spec, heads=12, head_dim=128, spill=x) / 1e9:.1f} GB" for x in (False, True)]
        ['0.4 GB', '8.9 GB']

    Args:
        spec: The attention.
        heads: Number of heads H.
        head_dim: Size of a head D.
        batch: Batch size B.
        itemsize: Bytes of one number, 2 for bfloat16.
        spill: Whether alpha and Y are written to device memory and read back, once each.

    Returns:
        Bytes for the whole batch.

    Raises:
        ValueError: If a size is not positive.
    """
    per_head = _per_head(spec, batch, heads, head_dim)
    vector = per_head * positive("itemsize", itemsize)
    total = (2 * spec.query_tokens + 2 * spec.key_tokens) * vector
    if flag("spill", spill):
        total += 4 * spec.tile_pairs * spec.block_rows * spec.block_cols * vector
    return total


def _per_head(spec: MonarchSpec, batch: int, heads: int, head_dim: int) -> int:
    if not isinstance(spec, MonarchSpec):
        raise ValueError(f"spec={spec!r} is not a MonarchSpec; make one, MonarchSpec(grid=(frames, height, width)).")
    return positive("batch", batch) * positive("heads", heads) * positive("head_dim", head_dim)


def _check_divides(tile: tuple[int, ...], axis: str, n: int, size: int, whose: str) -> None:
    if size % n:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        below = max((d for d in divisors if d < n), default=None)
        above = min((d for d in divisors if d > n), default=None)
        nearest = " or ".join(str(d) for d in (below, above) if d)
        raise ValueError(
            f"tile={tile}: {n} does not divide the {size} {axis} {whose}; the nearest that do are {nearest}."
            if below and above
            else f"tile={tile}: {n} does not divide the {size} {axis} {whose}; the nearest that does is {nearest}."
        )
