"""Finds configs for a shape on the local GPU and keeps them; `monarchrt tune` is the command.

Nothing here runs unless it is asked for. The result is a JSON file per device in the user's cache folder, which
`config.configs` prefers to the shipped one. A candidate is timed only if its results agree with those of the configs
that the search began with.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from monarchrt.triton_kernels import config
from monarchrt.triton_kernels.config import Config, Configs, Stream

BACKWARD = ("left_backward", "right_backward", "right_query")
MAX_DIFFERENCE = 1e-2  # relative Frobenius norm, bfloat16
CALLS = 8  # sent without waiting, so that the time to launch one hides behind the one before


def tune(
    *,
    grid: tuple[int, int, int],
    tile: tuple[int, int, int],
    heads: int = 12,
    dim: int = 128,
    query_frames: int | None = None,
    check: Callable[[Configs], None] | None = None,
    log: Callable[[str], None] = print,
) -> Configs:
    """Searches configs for a video's attention in bfloat16 and stores them; takes minutes and needs the GPU alone.

    Args:
        grid: (frames, height, width) of the keys in latent tokens.
        tile: (n_f, n_h, n_w), dividing the grid; tiles of rows n_f*n_h and columns n_w.
        heads: Heads of the attention.
        dim: Size of a head.
        query_frames: Frames of the queries where they are fewer than the keys' (decoding with a KV cache): then only
            the forward pass is tuned, and kept as the entry for that case.
        check: Called with the configs at the start and with those found, before they are stored; raises if the results
            that they give are wrong.
        log: Takes the times at the start, then a line per improvement.

    Returns:
        The best configs found, as stored.

    Raises:
        RuntimeError: If there is no local GPU.
    """
    if jax.default_backend() != "gpu":
        raise RuntimeError(
            f"tune measures on a GPU; JAX's default backend is {jax.default_backend()!r}. Run it on the machine with "
            f"the GPU, with JAX for CUDA installed (pip install 'monarchrt[cuda]')."
        )
    b1, b2 = tile[0] * tile[1], tile[2]
    per_frame = grid[1] * grid[2]
    tiles = grid[0] * per_frame // (b1 * b2)
    query_tiles = tiles if query_frames is None else query_frames * per_frame // (b1 * b2)
    few = query_tiles < tiles
    where = config.target()
    shape = {"b1": b1, "b2": b2, "dim": dim, "itemsize": 2, "few": few}
    keys = jax.random.split(jax.random.key(0), 4)
    counts = (query_tiles, tiles, tiles, query_tiles)
    arrays = [
        jax.random.normal(key, (1, n, b1, b2, heads, dim), jnp.bfloat16) for key, n in zip(keys, counts, strict=True)
    ]
    start = config.configs(where, **shape)
    if check:
        check(start)
    measure = functools.partial(measured, arrays, expected_results(arrays, start, few))
    best = search(start, measure, rows=query_tiles * b2, key_tiles=tiles, few=few, log=log)
    if check:
        check(best)
    path = config.store(where, best, **shape)
    log(f"stored in {path}")
    return best


def search(
    start: Configs,
    measure: Callable[[Configs, bool], float],
    *,
    rows: int,
    key_tiles: int,
    few: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Configs:
    """Goes through the kernels and the ways to run the forward pass, and moves to what is faster while that helps.

    Args:
        start: Where to begin.
        measure: Milliseconds of configs, of the backward pass if the second argument is true; infinity where they
            do not run.
        rows: Rows (a, j) of a (batch, head) pair.
        key_tiles: Key tiles.
        few: Leaves the backward pass out.
        log: Takes the times at the start, then a line per improvement.

    Returns:
        The best configs seen.
    """
    seen: dict[tuple[Configs, bool], float] = {}

    def ms(configs: Configs, backward: bool) -> float:
        if (configs, backward) not in seen:
            seen[configs, backward] = measure(configs, backward)
        return seen[configs, backward]

    def better(best: Configs, trials: Iterator[Configs], backward: bool) -> Configs:
        for trial in trials:
            if ms(trial, backward) < ms(best, backward):
                log(f"{'backward' if backward else 'forward'} {ms(trial, backward):.3f} ms: {_change(best, trial)}")
                best = trial
        return best

    best, forward = start, ("right_forward", "left_forward")
    for name, backward in (("forward", False),) if few else (("forward", False), ("backward", True)):
        log(f"{name} {ms(start, backward):.3f} ms at the start")
    best = better(best, (dataclasses.replace(best, stream=x) for x in (None, *streams(rows, key_tiles))), False)
    for name in config.KERNELS:
        if few and name not in forward:
            continue
        before = None
        while before != best:
            before = best
            trials = (dataclasses.replace(before, **{name: x}) for x in neighbours(getattr(before, name), name))
            best = better(best, trials, name in BACKWARD)
    before = None
    while before != best:
        before = best
        trials = neighbours(before.left_last or before.left_forward, "left_forward")
        best = better(best, (dataclasses.replace(before, left_last=x) for x in trials), False)
    return better(best, (dataclasses.replace(best, stream=x) for x in (None, *streams(rows, key_tiles))), False)


def neighbours(at: Config, kernel: str) -> Iterator[Config]:
    """Configs of a kernel one step away: sizes half and double, a stage more or less, another second part."""
    limits = {"rows": (16, 128), "keys": (16, 128), "warps": (4, 8)}
    if kernel == "right_forward":
        limits["split"] = (1, 8)
    for field, (least, most) in limits.items():
        value = getattr(at, field)
        for changed in (value // 2, value * 2):
            if least <= changed <= most:
                yield dataclasses.replace(at, **{field: changed})
    for stages in (at.stages - 1, at.stages + 1):
        if 1 <= stages <= 4:
            yield dataclasses.replace(at, stages=stages)
    if kernel != "left_forward":  # it shares its launch with `right_forward`
        for registers in (None, 128):  # 128: two blocks of 8 warps on a multiprocessor
            if registers != at.registers:
                yield dataclasses.replace(at, registers=registers)
    part = "more_rows" if kernel.startswith("left") else "more_keys"
    for more in (0, 16, 32):
        if more != getattr(at, part):
            yield dataclasses.replace(at, **{part: more})
    if kernel == "left_backward":
        yield dataclasses.replace(at, transposed=not at.transposed)


def streams(rows: int, key_tiles: int) -> Iterator[Stream]:
    """Ways to run the forward pass in one launch, for so many rows (a, j) of a pair and key tiles."""
    sizes = sorted({min(rows, n) for n in (52, 64, 80, 128)})
    for size in sizes:
        for tiles in sorted({key_tiles, -(-key_tiles // 3)}):
            for lag, slots in ((1, 3), (2, 4), (3, 6), (4, 12)):
                for registers in (None, 128):
                    yield Stream(rows=size, tiles=tiles, lag=lag, slots=slots, registers=registers)


def compiled(arrays: list[jax.Array], configs: Configs, backward: bool) -> Callable[..., tuple[jax.Array, ...]]:
    """The forward pass (q, k, v, visible) or the backward pass (q, k, v, d_out, lse, delta, visible), ready to run."""
    from monarchrt.triton_kernels import operation

    q, k, v, d_out = arrays
    scale = q.shape[-1] ** -0.5
    visible = jax.ShapeDtypeStruct(q.shape[1:2], jnp.int32)
    with config.use(configs):
        if not backward:
            return jax.jit(lambda *x: operation.forward(scale, *x)).lower(q, k, v, visible).compile()
        lse = jax.ShapeDtypeStruct(q.shape[:-1], jnp.float32)
        run = jax.jit(lambda *x: operation.backward(scale, None, *x))
        return run.lower(q, k, v, d_out, lse, lse, visible).compile()


def expected_results(arrays: list[jax.Array], configs: Configs, few: bool) -> dict[bool, tuple]:
    """Inputs and results of the forward pass (False) and the backward pass (True), with given configs."""
    q, k, v, d_out = arrays
    visible = jnp.full(q.shape[1], k.shape[1], jnp.int32)
    inputs = (q, k, v, visible)
    out, lse = compiled(arrays, configs, False)(*inputs)
    calls: dict[bool, tuple] = {False: (inputs, (out, lse))}
    if not few:
        delta = jnp.einsum("baijhd,baijhd->baijh", d_out, out, preferred_element_type=jnp.float32)
        inputs = (q, k, v, d_out, lse, delta, visible)
        calls[True] = (inputs, compiled(arrays, configs, True)(*inputs))
    return calls


def measured(
    arrays: list[jax.Array], expected: dict[bool, tuple], configs: Configs, backward: bool, repeats: int = 5
) -> float:
    """Median ms of a pass on tiles q, k, v, d_out [1, A or C, b1, b2, H, D]; infinity if it fails or is wrong.

    Args:
        arrays: The tiles.
        expected: Inputs and right results by pass, from `expected_results`.
        configs: Sizes to time.
        backward: Whether to time the backward pass.
        repeats: Measurements, of which the median is taken.

    Returns:
        Milliseconds.
    """
    inputs, results = expected[backward]
    try:
        run = compiled(arrays, configs, backward)
        out = jax.block_until_ready(run(*inputs))
    except Exception as error:  # too much shared memory or too many registers, said by compiler or driver
        if isinstance(error, TypeError | AttributeError | NameError):
            raise
        return float("inf")
    if not all(agree(x, y) for x, y in zip(out, results, strict=True)):
        return float("inf")
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(CALLS):
            out = run(*inputs)
        jax.block_until_ready(out)
        times.append(1e3 * (time.perf_counter() - start) / CALLS)
    return statistics.median(times)


def agree(x: jax.Array, y: jax.Array) -> bool:
    """Whether the relative Frobenius norm of the difference is within MAX_DIFFERENCE; NaN never is."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    return bool(np.asarray(jnp.linalg.norm(x - y) <= MAX_DIFFERENCE * jnp.linalg.norm(y)))


def _change(before: Configs, after: Configs) -> str:
    names = [field.name for field in dataclasses.fields(before)]
    return ", ".join(f"{n}={getattr(after, n)}" for n in names if getattr(after, n) != getattr(before, n))
