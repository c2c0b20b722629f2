"""What other kernels need of Triton's for several refinement steps: `refine_pairs` on arrays in Hopper's order.

A chunk has `heads` heads and `tiles` query tiles from start = (head, query tile) on, int32. `split` are the items of
columns, all of them, whole ones of a query tile, rows of a shared one, query tiles that share one.
"""

import dataclasses

import jax
import jax.numpy as jnp

from monarchrt.triton_kernels import launch
from monarchrt.triton_kernels.config import Config, power_of_two, target
from monarchrt.triton_kernels.plan import Launch


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Block sizes; `rows` are those that the shape asks for.

    Attributes:
        refine: The next step's queries.
        delta: What the gradient of L's softmax subtracts.
        query: The gradient of queries.
    """

    refine: Config
    delta: Config
    query: Config


def pairs_config(rows: int) -> PairsConfig:
    """What was the fastest on an H200 for tiles of 30 and of 90 rows, by which is nearer."""
    few = rows <= 32
    return PairsConfig(
        refine=Config(rows=0, keys=64, stages=3 if few else 4),
        delta=Config(rows=0, keys=128 if few else 64, stages=2),
        query=Config(rows=0, keys=0, stages=3),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """A chunk of a call.

    Attributes:
        q: [B, A, b1, b2, H, D].
        k: [B, C, b1, b2, H, D].
        visible: int32 [A], key tiles that a query tile sees, C at most.
        start: int32, the chunk's first head and query tile first.
        scale: Softmax scale.
        heads: Heads of the chunk.
        tiles: Query tiles of the chunk.
        split: Items, whole items of a query tile, rows of a shared item, query tiles that share one.
        config: Block sizes; None: `pairs_config`.
    """

    q: jax.Array
    k: jax.Array
    visible: jax.Array
    start: jax.Array
    scale: float
    heads: int
    tiles: int
    split: tuple[int, int, int, int]
    config: PairsConfig | None = None

    @property
    def sizes(self) -> PairsConfig:
        """Block sizes."""
        return self.config or pairs_config(self.q.shape[2])

    def refine(self, alpha: jax.Array, c: jax.Array, *, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The next step's queries as alpha, factors as c, and stats [lanes, tiles, b2, 2, width] but for delta."""
        lanes, cols = alpha.shape[0], self.q.shape[3]
        stats = jax.ShapeDtypeStruct((lanes, self.tiles, cols, 2, width), jnp.float32)
        new = {"u": _like(alpha), "factors": _like(c), "stats": stats}
        found = self._column("refine_pairs", self.sizes.refine, new, width, {"alpha": alpha, "c": c})
        return found["u"], found["factors"], found["stats"]

    def query(self, u: jax.Array, dz: jax.Array, factors: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The gradients of a step's queries as u, and their products with them as factors."""
        config, cols = self.sizes.query, self.q.shape[3]
        sizes = {"J": power_of_two(cols, 16), "L": power_of_two(dz.shape[3], 16)}
        constants = self._constants(factors) | sizes | {"KEYS": dz.shape[3], "ROWS": dz.shape[4]}
        grid = (self.k.shape[1] * self.k.shape[2], u.shape[0], 1)
        arrays = {"k": self.k, "u": u, "dz": dz, "factors": factors}
        new = {"du": _like(u), "products": _like(factors)}
        found = self._call("query_pairs", config, grid, constants, arrays, new)
        return found["du"], found["products"]

    def delta(
        self,
        alpha: jax.Array,
        du: jax.Array,
        c: jax.Array,
        factors: jax.Array,
        products: jax.Array,
        stats: jax.Array,
    ) -> jax.Array:
        """`stats` with delta times the scale."""
        arrays = {"alpha": alpha, "du": du, "c": c, "factors": factors, "products": products, "stats": stats}
        new = {"stats": _like(stats)}
        return self._column("delta_pairs", self.sizes.delta, new, stats.shape[-1], arrays)["stats"]

    def _column(
        self, kernel: str, config: Config, new: dict, width: int, arrays: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        """A kernel whose programs have a query column each."""
        constants = self._constants(arrays["c"])
        constants |= {"W": width, "I": power_of_two(width, 16), "N": config.keys}
        grid = (self.tiles * self.q.shape[3], arrays["c"].shape[0], 1)
        return self._call(kernel, config, grid, constants, {"q": self.q, **arrays, "scale": self.scale}, new)

    def _constants(self, numbers: jax.Array) -> dict[str, int | str]:
        _, tiles, rows, cols, heads, dim = self.q.shape
        items, full, tail, packed = self.split
        shape = {"A": tiles, "C": self.k.shape[1], "B1": rows, "B2": cols, "H": heads, "D": dim, "HC": self.heads}
        places = {"AC": self.tiles, "ITEMS": items, "FULL": full, "TAIL": tail, "PACKED": packed}
        return shape | places | {"P": numbers.shape[-1], "DP": power_of_two(dim, 16), "PRECISION": "ieee"}

    def _call(
        self, kernel: str, config: Config, grid: tuple[int, int, int], constants: dict, arrays: dict, new: dict
    ) -> dict[str, jax.Array]:
        constants = constants | {"STAGES": config.stages}
        todo = Launch(kernel, tuple(new), grid, constants, config.warps, config.stages, config.registers)
        arrays = {"start": self.start, "visible": self.visible} | arrays
        return launch.call(todo, arrays, new, target().compute_capability)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
