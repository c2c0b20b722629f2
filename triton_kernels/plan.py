"""Which kernels run, on what, in which order: plain data, without Triton, for `launch` to execute."""

import dataclasses
import math

from monarchrt.triton_kernels.config import Config, Configs, Stream, power_of_two


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one call: arrays are [batch, query_tiles or key_tiles, b1, b2, heads, dim]."""

    batch: int
    query_tiles: int
    key_tiles: int
    b1: int
    b2: int
    heads: int
    dim: int
    itemsize: int

    @property
    def pairs(self) -> int:
        """Independent (batch, head) pairs."""
        return self.batch * self.heads

    @property
    def key_rows(self) -> int:
        """Key rows (c, k)."""
        return self.key_tiles * self.b1


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel call. `writes` are the operands that it changes; the first to write an array creates it.

    `registers` is the most that a thread may have, None what the compiler likes. `arrays` says which array an operand
    is, where that is not the one of its name.
    """

    kernel: str
    writes: tuple[str, ...]
    grid: tuple[int, int, int]
    constants: dict
    warps: int
    stages: int
    registers: int | None = None
    arrays: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Steps, one after the other, and the launches of each.

    Attributes:
        steps: Operand `step` of each: (first pair, first query tile), in the forward pass as `overlapped.forward` says.
        launches: What every step runs.
        ends: What the first and the last step run instead, where that differs.
        num_iters: Refinement steps; of several, forward goes chunk by chunk.
        pairs: (batch, head) pairs per step.
        tiles: Query tiles per step.
        stream: Set if the forward pass is one launch.
    """

    steps: tuple[tuple[int, ...], ...]
    launches: tuple[Launch, ...]
    pairs: int
    tiles: int
    stream: Stream | None = None
    ends: tuple[tuple[Launch, ...], tuple[Launch, ...]] | None = None
    num_iters: int = 1

    def launches_of(self, n: int) -> tuple[Launch, ...]:
        """What step n runs; the steps between the first and the last are alike."""
        if self.ends and n in (0, len(self.steps) - 1):
            return self.ends[n > 0]
        return self.launches

    @property
    def summed(self) -> bool:
        """Whether several launches add to the same dk and dv."""
        return self.num_iters > 1 or any(step[1] for step in self.steps)


def scratch_shapes(shape: Shape, plan: Plan, *, backward: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of what lives for one step only, or what the one launch of a stream passes on."""
    if plan.stream:
        slots, rows = plan.stream.slots, plan.stream.rows
        return {"mid": (slots, rows, shape.key_rows, 2, shape.dim), "stats": (slots, rows, shape.key_rows)}
    rows = plan.tiles * shape.b2
    shapes = {
        "mid": (plan.pairs, rows, shape.key_rows, 2, shape.dim),
        "stats": (plan.pairs, rows, shape.key_rows),
    }
    if plan.num_iters > 1 and backward:  # of each step; log-sum-exp and delta of L are those of all query tokens
        sizes = {"mid": shapes["mid"], "stats": (3, *shapes["stats"])}
        tokens = (shape.batch, shape.query_tiles, shape.b1, shape.b2, shape.heads)
        sizes |= {"lse": tokens, "delta": tokens}
        several = {_of(name, n): size for n in range(plan.num_iters) for name, size in sizes.items()}
        return several | {"dq_left": (plan.pairs, rows, shape.b1, shape.dim)}
    if plan.num_iters > 1:  # stats: log-sum-exp (unused) and c_L
        return shapes | {"stats": (2, *shapes["stats"])}
    if not backward:  # slots that alternate; stats: log-sum-exp (unused) and c_L
        slots = min(2, len(plan.steps) - 1)
        return {"mid": (slots, *shapes["mid"]), "stats": (slots, 2, *shapes["stats"])}
    return shapes | {"stats": (3, *shapes["stats"]), "dq_left": (plan.pairs, rows, shape.b1, shape.dim)}


def forward(shape: Shape, configs: Configs, precision: str) -> Plan:
    """One kernel per step does R of a chunk and L of the chunk before, so there is one more step than chunks.

    Where all fits at once, a single chunk in two launches is faster than chunks that overlap. With `configs.stream` one
    kernel does it all, where a key row's columns fit one block.
    """
    columns = configs.right_forward.keys + configs.right_forward.more_keys
    if configs.stream and shape.b2 <= columns:
        return _streamed(shape, configs, configs.stream, precision)
    chunks, pairs, tiles = _chunks(shape, configs.scratch_bytes)
    if len(chunks) > 1:
        chunks, pairs, tiles = _chunks(shape, configs.scratch_bytes // 2)
    nothing = (shape.pairs, 0)
    steps = tuple(
        (*now, *before, n % 2)
        for n, (now, before) in enumerate(zip((*chunks, nothing), (nothing, *chunks), strict=True))
    )
    right = configs.right_forward
    common = _common(shape, pairs, tiles, precision) | {"SPLIT": right.split, "AP": power_of_two(tiles)}

    def launch(work: str, left: Config, at: Config) -> Launch:
        constants = common | _both(right, left) | {"WORK": work}
        programs = {
            "right": pairs * shape.key_rows * right.split,
            "left": pairs * tiles * shape.b2 * _row_blocks(shape, left),
        }
        grid = (programs.get(work) or sum(programs.values()), 1, 1)
        return Launch("forward", ("mid", "stats", "out", "lse"), grid, constants, at.warps, at.stages, at.registers)

    left, last = configs.left_forward, configs.left_last or configs.left_forward
    ends = ((launch("right", left, right),), (launch("left", last, last),))
    return Plan(steps, (launch("both", left, right),), pairs, tiles, ends=ends)


def refined(shape: Shape, configs: Configs, precision: str, num_iters: int) -> Plan:
    """The forward pass of several refinement steps: R and back to its next queries through L, then R and L as ever.

    Args:
        shape: Sizes of the call.
        configs: Sizes of the kernels.
        precision: Precision of matrix products, as Triton names it.
        num_iters: Refinement steps, at least 2.

    Returns:
        The plan.
    """
    steps, pairs, tiles = _chunks(shape, configs.refine_scratch_bytes or configs.scratch_bytes)
    common = _common(shape, pairs, tiles, precision)
    rights = (configs.right_first or configs.right_forward, configs.right_again or configs.right_forward)
    launches = []
    for n in range(num_iters - 1):
        launches.append(_right_forward(shape, rights[n > 0], common, again=n > 0, values=False))
        launches.append(_left_refine(shape, configs, common, keep=False))
    launches.append(_right_forward(shape, rights[1], common, again=True))
    left = configs.left_last or configs.left_forward
    launches.append(_left(shape, "left_last", left, common | {"I2": left.more_rows}, ("out", "lse"), blocks=True))
    return Plan(steps, tuple(launches), pairs, tiles, num_iters=num_iters)


def refined_backward(shape: Shape, configs: Configs, precision: str, grad_tiles: int | None, num_iters: int) -> Plan:
    """All steps of a chunk again, each with a `mid` and `stats` of its own, then back from the last to the first.

    Args:
        shape: Sizes of the call.
        configs: Sizes of the kernels.
        precision: Precision of matrix products, as Triton names it.
        grad_tiles: Newest key tiles that get gradients; None: all.
        num_iters: Refinement steps, at least 2.

    Returns:
        The plan.
    """
    steps, pairs, tiles = _chunks(shape, (configs.refine_scratch_bytes or configs.scratch_bytes) // num_iters)
    common = _common(shape, pairs, tiles, precision)
    last = num_iters - 1
    first = configs.right_first or configs.right_forward
    launches = [_renamed(_right_forward(shape, first, common, save=True, values=False), 0)]
    for n in range(1, num_iters):
        launches.append(_renamed(_left_refine(shape, configs, common, keep=True), n - 1))
        launches.append(_right_further(shape, configs, common, n, values=n == last))
    launches += [_renamed(x, last, "mid", "stats") for x in _left_backward(shape, configs, common)]
    for n in range(last, 0, -1):
        launches += _right_further_backward(shape, configs, common, grad_tiles, n, values=n == last)
        launches += _left_refine_backward(shape, configs, common, n - 1)
    back = _right_backward(shape, configs, common, grad_tiles, summed=True, values=False)
    launches += [_renamed(x, 0, "mid", "stats") for x in back]
    return Plan(steps, tuple(launches), pairs, tiles, num_iters=num_iters)


def _of(name: str, n: int) -> str:
    """The array of refinement step n."""
    return f"{name}_{n}"


def _renamed(launch: Launch, n: int, *names: str) -> Launch:
    """A launch on arrays of refinement step n, by default on all that each has of its own."""
    arrays = {name: _of(name, n) for name in names or ("mid", "stats", "lse", "delta")}
    return dataclasses.replace(launch, arrays=arrays | launch.arrays)


def _left_refine(shape: Shape, configs: Configs, common: dict, *, keep: bool) -> Launch:
    refine = configs.left_refine or configs.left_forward
    if shape.b1 > refine.rows + refine.more_rows:
        refine = dataclasses.replace(refine, more_rows=0)
    constants = common | {"I2": refine.more_rows, "KEEP": keep}
    writes = ("mid", "stats", "lse") if keep else ("mid", "lse")
    return _left(shape, "left_refine", refine, constants, writes, blocks=False)


def _right_further(shape: Shape, configs: Configs, common: dict, n: int, *, values: bool) -> Launch:
    config = configs.right_again or configs.right_forward
    launch = _right_forward(shape, config, common, values=values)
    constants = {name: x for name, x in launch.constants.items() if name not in ("SAVE", "AGAIN")}
    launch = dataclasses.replace(launch, kernel="right_further", constants=constants)
    return _renamed(dataclasses.replace(launch, arrays={"queries": _of("mid", n - 1)}), n)


def _right_further_backward(
    shape: Shape, configs: Configs, common: dict, grad_tiles: int | None, n: int, *, values: bool
) -> list[Launch]:
    """Keys and values, then queries: from what the first saved, where it could, by a launch like one forward."""
    keys, _ = _right_backward(shape, configs, common, grad_tiles, summed=True, values=values)
    saved = keys.constants["SAVE_DZ"]
    # `mid` is a result even where it stays as it is: the queries' launch changes it after that, and XLA needs no copy
    writes = ("mid", *(name for name in keys.writes if name != "mid"))
    keys = dataclasses.replace(keys, kernel="right_further_backward", writes=writes)
    again, back = configs.right_again or configs.right_forward, configs.right_backward
    right = dataclasses.replace(again, keys=power_of_two(shape.b2, 16)) if saved else back
    constants = common | _right(shape, right, common["AC"])
    constants |= {"SPLIT": right.split, "SAVED_DZ": saved, "VALUES": values}
    del constants["L2"]
    grid, writes = (shape.key_rows, right.split, common["ZC"]), ("mid", "stats")
    queries = Launch("right_further_query", writes, grid, constants, right.warps, right.stages, right.registers)
    arrays = {"queries": _of("mid", n - 1)}
    return [_renamed(dataclasses.replace(x, arrays=arrays), n, "mid", "stats") for x in (keys, queries)]


def _left_refine_backward(shape: Shape, configs: Configs, common: dict, n: int) -> list[Launch]:
    """Back from step n + 1 to step n."""
    arrays = {"further_mid": _of("mid", n + 1), "further_stats": _of("stats", n + 1)}
    launches = []
    configs = dataclasses.replace(configs, left_backward=configs.left_refine_backward or configs.left_backward)
    for launch in _left_backward(shape, configs, common):
        constants = {name: x for name, x in launch.constants.items() if name != "TRANSPOSED"}
        writes = launch.writes + ("delta",) * constants["QUERY"]
        launch = dataclasses.replace(launch, kernel="left_refine_backward", constants=constants, writes=writes)
        launches.append(_renamed(dataclasses.replace(launch, arrays=arrays), n))
    return launches


def _streamed(shape: Shape, configs: Configs, stream: Stream, precision: str) -> Plan:
    right, left = configs.right_forward, configs.left_forward
    stream = dataclasses.replace(stream, rows=min(stream.rows, shape.query_tiles * shape.b2))
    constants = _common(shape, 1, 1, precision)
    del constants["ZC"], constants["AC"]
    constants |= _both(right, left)
    chunks = shape.pairs * math.ceil(shape.query_tiles * shape.b2 / stream.rows)
    lag = min(stream.lag, chunks)
    constants |= {"RC": stream.rows, "TILES": stream.tiles, "LAG": lag, "SLOTS": stream.slots}
    of_right = shape.b1 * math.ceil(stream.rows / right.rows) * math.ceil(shape.key_tiles / stream.tiles)
    programs = chunks * (of_right + stream.rows * _row_blocks(shape, left))
    writes = ("counters", "mid", "stats", "out", "lse")
    launch = Launch(
        "streamed", writes, (programs, 1, 1), constants, right.warps, right.stages, registers=stream.registers
    )
    return Plan(((),), (launch,), 1, shape.query_tiles, stream)


def counters(shape: Shape, stream: Stream) -> int:
    """How many counters a stream has: two per chunk."""
    return 2 * shape.pairs * math.ceil(shape.query_tiles * shape.b2 / stream.rows)


def _both(right: Config, left: Config) -> dict:
    """Block sizes of R and L side by side."""
    of_right = {"M": right.rows, "L": right.keys, "L2": right.more_keys, "RIGHT_STAGES": right.stages}
    return of_right | {"I": left.rows, "I2": left.more_rows, "N": left.keys, "LEFT_STAGES": left.stages}


def _row_blocks(shape: Shape, config: Config) -> int:
    """Blocks of rows i of a query column."""
    return math.ceil(shape.b1 / (config.rows + config.more_rows))


def backward(shape: Shape, configs: Configs, precision: str, grad_tiles: int | None) -> Plan:
    """Right again, back through left, then back through right for the keys and for the queries.

    Args:
        shape: Sizes of the call.
        configs: Sizes of the kernels.
        precision: Precision of matrix products, as Triton names it.
        grad_tiles: Newest key tiles that get gradients; None: all.

    Returns:
        The plan.
    """
    steps, pairs, tiles = _chunks(shape, configs.scratch_bytes)
    common = _common(shape, pairs, tiles, precision)
    launches = [_right_forward(shape, configs.right_forward, common, save=True)]
    launches += _left_backward(shape, configs, common)
    launches += _right_backward(shape, configs, common, grad_tiles, summed=any(first for _, first in steps))
    return Plan(steps, tuple(launches), pairs, tiles)


def _left_backward(shape: Shape, configs: Configs, common: dict) -> list[Launch]:
    """One launch where a block has all rows, else one for the queries and one for the rest."""
    left = configs.left_backward
    flags = {"TRANSPOSED": left.transposed, "APART": 64 <= left.keys < 16 * left.warps}  # products by warpgroups
    if shape.b1 <= left.rows + left.more_rows:
        flags |= {"FUSED": True, "QUERY": True, "I2": left.more_rows}
        writes = ("mid", "stats", "dq_left")
        return [_left(shape, "left_backward", left, common | flags, writes, blocks=False)]
    left = dataclasses.replace(left, more_rows=0)
    flags |= {"FUSED": False, "QUERY": True, "I2": 0}
    queries = _left(shape, "left_backward", left, common | flags, ("dq_left",), blocks=True)
    flags["QUERY"] = False
    return [queries, _left(shape, "left_backward", left, common | flags, ("mid", "stats"), blocks=False)]


def _right_backward(
    shape: Shape, configs: Configs, common: dict, grad_tiles: int | None, *, summed: bool, values: bool = True
) -> list[Launch]:
    right, query = configs.right_backward, configs.right_query
    columns = [x.keys + x.more_keys for x in (right, query)]
    save_dz = grad_tiles is None and shape.b2 <= min(*columns, 2 * shape.dim)
    if not save_dz:  # sizes are found for reading it: what makes it again takes more shared memory
        query = dataclasses.replace(query, rows=min(query.rows, 64), stages=min(query.stages, 2))
    keys = _right_keys(shape, right, common, grad_tiles)
    keys = dataclasses.replace(
        keys,
        writes=(*["mid"] * save_dz, "dk", *["dv"] * values),
        constants=keys.constants | {"ACCUMULATE": summed, "SAVE_DZ": save_dz, "VALUES": values},
    )
    tiles = common["AC"]
    queries = Launch(
        "right_query",
        ("dq",),
        (math.ceil(tiles * shape.b2 / query.rows), shape.b1, common["ZC"]),
        common | _right(shape, query, tiles) | {"SAVED_DZ": save_dz, "VALUES": values},
        query.warps,
        query.stages,
        query.registers,
    )
    return [keys, queries]


def _right_keys(shape: Shape, right: Config, common: dict, grad_tiles: int | None) -> Launch:
    key_tiles = shape.key_tiles if grad_tiles is None else min(grad_tiles, shape.key_tiles)
    grid = (key_tiles * shape.b1, math.ceil(shape.b2 / (right.keys + right.more_keys)), common["ZC"])
    constants = common | _right(shape, right, common["AC"])
    return Launch("right_backward", ("dk", "dv"), grid, constants, right.warps, right.stages, right.registers)


def _chunks(shape: Shape, limit: int) -> tuple[tuple[tuple[int, int], ...], int, int]:
    """Steps, pairs per step and query tiles per step: whole heads where they fit, else equal runs of tiles of one."""
    tile_bytes = shape.key_rows * shape.b2 * (2 * shape.dim * shape.itemsize + 12)
    most = max(1, limit // tile_bytes)
    runs = math.ceil(shape.query_tiles / min(shape.query_tiles, most))
    tiles = math.ceil(shape.query_tiles / runs)
    together = 1 if runs > 1 else min(shape.pairs, max(1, most // shape.query_tiles))
    pairs = math.ceil(shape.pairs / math.ceil(shape.pairs / together))
    firsts = range(0, shape.pairs, pairs)
    return tuple((z, a) for z in firsts for a in range(0, shape.query_tiles, tiles)), pairs, tiles


def _common(shape: Shape, pairs: int, tiles: int, precision: str) -> dict:
    return {
        "A": shape.query_tiles,
        "C": shape.key_tiles,
        "B1": shape.b1,
        "B2": shape.b2,
        "H": shape.heads,
        "D": shape.dim,
        "ZC": pairs,
        "AC": tiles,
        "Z": shape.pairs,
        "DP": power_of_two(shape.dim, 16),
        "PRECISION": precision,
    }


def _right(shape: Shape, config: Config, tiles: int) -> dict:
    constants = {"M": config.rows, "L": config.keys, "L2": config.more_keys}
    return constants | {"AP": power_of_two(tiles), "STAGES": config.stages}


def _right_forward(
    shape: Shape, config: Config, common: dict, *, save: bool = False, again: bool = False, values: bool = True
) -> Launch:
    pairs, tiles = common["ZC"], common["AC"]
    flags = {"SPLIT": config.split, "SAVE": save, "AGAIN": again, "VALUES": values}
    constants = common | _right(shape, config, tiles) | flags
    grid = (shape.key_rows, config.split, pairs)
    return Launch("right_forward", ("mid", "stats"), grid, constants, config.warps, config.stages, config.registers)


def _left(shape: Shape, kernel: str, config: Config, common: dict, writes: tuple[str, ...], *, blocks: bool) -> Launch:
    constants = common | {"I": config.rows, "N": config.keys, "STAGES": config.stages}
    grid = (common["AC"] * shape.b2, _row_blocks(shape, config) if blocks else 1, common["ZC"])
    return Launch(kernel, writes, grid, constants, config.warps, config.stages, config.registers)
