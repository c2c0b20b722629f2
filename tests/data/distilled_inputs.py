"""Networks, draws and cases that published losses of a distillation and ours are both given."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from tests.train.objectives.networks import wan

FRAMES, BLOCK, SIDE, CHANNELS, ROWS = 21, 3, 2, 2, 2  # SIDE: rows and columns of tokens; ROWS: of a text
FRAME = SIDE * SIDE  # tokens
STEPS = (1000, 750, 500, 250)
TIME = 437  # of the scores, of 1000
SHAPE = (1, FRAMES, 2 * SIDE, 2 * SIDE, CHANNELS)
SEEDS = {"student": 1, "critic": 2, "teacher": 3}


class Case(NamedTuple):
    """A loss: whose, with which last step (from 0), which noise levels, and which tiles of the student's attention."""

    role: str
    last: int
    conversion: str
    tile: tuple[int, int, int] | None = None

    @property
    def name(self) -> str:
        """Of the arrays."""
        return f"{self.role} {self.last} {self.conversion} {self.tile}"


DENSE = [
    *(Case("student", last, conversion) for last in range(4) for conversion in ("published", "clean")),
    *(Case("critic", 1, conversion) for conversion in ("published", "clean")),
]
MONARCH = [Case("student", last, "clean", tile) for tile in ((1, 2, 2), (3, 2, 2), (3, 1, 2)) for last in (1, 3)]

BIDIRECTIONAL = [
    *(Case("student", last, conversion) for last in range(4) for conversion in ("published", "clean")),
    *(Case("critic", 1, conversion) for conversion in ("published", "clean")),
]
CONSISTENCY = ("consistency 48", "consistency 50")  # levels of the grid
PLACE = 24  # of them, from which the teacher goes on: there, too, published times are ours to the last bit
REGRESSIONS = ("diffusion forcing", "teacher forcing", "teacher forcing, noised", "ode")


def model(role: str, attention: str = "dense", *, causal: bool | None = None) -> Any:
    """Two layers of Wan, with parameters of NumPy; by default the student is causal alone."""
    block = BLOCK if causal or (causal is None and role == "student") else None
    found = wan(0, attention, num_layers=2, text_len=ROWS, causal_block=block)
    rng = np.random.default_rng(SEEDS[role])
    graph, params, rest = nnx.split(found, nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    drawn = [leaf + 0.2 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in map(np.zeros_like, leaves)]
    return nnx.merge(graph, jax.tree.unflatten(tree, drawn), rest)


def text() -> np.ndarray:
    """Of the clip."""
    return np.random.default_rng(10).standard_normal((1, ROWS, 4)).astype(np.float32)


def negative() -> np.ndarray:
    """What guidance leads away from."""
    return np.random.default_rng(11).standard_normal((1, ROWS, 4)).astype(np.float32)


def draws(role: str) -> dict[str, np.ndarray]:
    """Of a loss, [B, ..., H, W, C]."""
    rng = np.random.default_rng(20 + SEEDS[role])
    sizes = {"noise": SHAPE, "fresh": (1, len(STEPS) - 1, *SHAPE[1:]), "context": SHAPE, "scores": SHAPE}
    return {name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


def states() -> np.ndarray:
    """Of a trajectory, [B, steps + 1, F, H, W, C]; the last is the clip."""
    return np.random.default_rng(12).standard_normal((1, len(STEPS) + 1, *SHAPE[1:])).astype(np.float32)


def regression_draws() -> dict[str, np.ndarray]:
    """Noise, and for each frame a place in the published list of falling noise levels, or a state.

    At these places the published level and time, in float32, are ours to the last bit, as at half of all; at others
    they are one unit apart, which gradients show by 1e-5 and more.
    """
    blocks = {
        "index": (944, 171, 827, 438, 768, 698, 541),
        "clean index": (651, 370, 635, 653, 812, 727, 364),
        "state": (4, 0, 3, 1, 2, 0, 3),
    }
    of_frames = {name: np.repeat(np.array([places]), BLOCK, axis=1) for name, places in blocks.items()}
    return of_frames | {"noise": np.random.default_rng(13).standard_normal(SHAPE).astype(np.float32)}


def projected(gradients: Sequence[Any]) -> np.ndarray:
    """Of each parameter the norm of its gradient, and products with eight random vectors of norm 1 on average."""
    rows = []
    for number, gradient in enumerate(gradients):
        flat = np.asarray(gradient, np.float64).ravel()
        vectors = np.random.default_rng(1000 + number).standard_normal((8, flat.size)) / np.sqrt(flat.size)
        rows.append([np.linalg.norm(flat), *(vectors @ flat * np.sqrt(flat.size))])
    return np.array(rows)
