"""`monarchrt tune`: finds the fastest settings of the Triton kernels for one shape of attention on this GPU."""

import dataclasses
import functools
from collections.abc import Sequence

from monarchrt.models.errors import UserError
from monarchrt.train.cli.parsing import parse
from monarchrt.train.cli.tables import say

MAX_ERROR = 1e-2  # relative Frobenius norm against the reference in float64, for bfloat16 inputs


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Time settings of the Triton kernels for one shape of attention and store the fastest.

    monarchrt tune --grid 21 30 52 --tile 1 30 52

    monarchrt tune --grid 21 30 52 --tile 1 30 52 --query-frames 3
    """

    grid: tuple[int, int, int]
    """Latent frames, rows and columns of the keys' tokens."""
    tile: tuple[int, int, int]
    """Frames, rows and columns of a tile; each must divide the grid's."""
    heads: int = 12
    """Heads of the attention."""
    dim: int = 128
    """Channels per head."""
    query_frames: int | None = None
    """Frames of the queries, if fewer than the grid's, as in decoding with a cache."""

    def __post_init__(self) -> None:
        for name in ("heads", "dim", "query_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")


def tune_command(arguments: Sequence[str]) -> int:
    """`monarchrt tune`."""
    config = parse(TuneConfig, arguments, prog="monarchrt tune")
    import jax

    from monarch_jax.spec import MonarchSpec
    from monarchrt.triton_kernels import LEAST_BLOCK, MAX_DIM
    from monarchrt.triton_kernels.tune import tune

    frames = config.grid[0] if config.query_frames is None else config.query_frames
    try:
        spec = MonarchSpec(grid=(frames, *config.grid[1:]), key_frames=config.grid[0], tile=config.tile)
    except ValueError as error:
        raise UserError(str(error)) from None
    if frames > config.grid[0]:
        raise UserError(f"query_frames={frames} is more than the {config.grid[0]} frames of grid")
    if config.dim > MAX_DIM:
        raise UserError(f"dim is {config.dim}; the Triton kernels take at most {MAX_DIM}")
    rows, columns = spec.tile_shape[0] * spec.tile_shape[1], spec.tile_shape[2]
    if min(rows, columns) < LEAST_BLOCK:
        raise UserError(
            f"tile {config.tile} has {rows} rows (frames x height) of {columns}; the Triton kernels need {LEAST_BLOCK} "
            f"of both, at least"
        )
    if jax.default_backend() != "gpu":
        raise UserError(
            f"tune measures on a GPU, and JAX's default backend here is {jax.default_backend()!r}; run it on the "
            f"machine with the GPU, with JAX for CUDA installed: pip install 'monarchrt[cuda]'"
        )
    tune(
        grid=config.grid,
        tile=spec.tile_shape,
        heads=config.heads,
        dim=config.dim,
        query_frames=config.query_frames,
        check=lambda configs: check(config, configs),
        log=say,
    )
    return 0


def check(config: TuneConfig, configs) -> None:
    """Checks output and gradients of one head on two tiles of frames against the reference in float64.

    Args:
        config: Shape of the attention.
        configs: Kernel settings to check, a `triton_kernels.config.Configs`.

    Raises:
        UserError: If the kernels do not support the shape, or a relative error is above MAX_ERROR.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from monarch_jax import monarch_attention
    from monarchrt.triton_kernels.config import use

    grid = (2 * config.tile[0], *config.grid[1:])
    shape = (1, grid[0] * grid[1] * grid[2], 1, config.dim)
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key in jax.random.split(jax.random.key(1), 4)]

    def results(implementation, *arrays):
        attend = functools.partial(monarch_attention, grid=grid, tile=config.tile, implementation=implementation)

        @jax.jit
        def run(q, k, v, g):
            out, vjp = jax.vjp(attend, q, k, v)
            return out, *vjp(g)

        return run(*arrays)

    with use(configs):
        try:
            ours = results("triton", *arrays)
        except NotImplementedError as error:
            raise UserError(str(error)) from None
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        expected = [np.asarray(x) for x in results("reference", *wide)]
    for name, x, y in zip(("output", "dq", "dk", "dv"), ours, expected, strict=True):
        error = float(np.linalg.norm(np.asarray(x, np.float64) - y) / np.linalg.norm(y))
        if not error <= MAX_ERROR:
            raise UserError(
                f"{name} is off by {error:.1e} from the reference, more than {MAX_ERROR:.0e}, with {configs}"
            )
