"""Problems of block-sparse attention, and what comes out of whole maps in NumPy, float64; nothing of it is ours."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Blocks of `rows` queries and `columns` keys at most; sizes vary if `ragged`, and some keys lie in no block."""

    batch: int = 1
    heads: int = 2
    dim: int = 16
    rows: int = 16
    columns: int = 16
    query_blocks: int = 3
    key_blocks: int = 4
    ragged: bool = False
    band: tuple[int, int] | None = None  # width, sink
    keep: float = 0.5
    rest: int = 0  # keys after the last block
    half: bool = False
    sharpness: float = 1.0
    shared: bool = False  # one list for all samples and heads
    seed: int = 0

    def starts(self):
        """Where blocks begin; ragged ones hold any number from none to all."""
        rng = np.random.default_rng(self.seed)
        out = []
        sides = ((self.query_blocks, self.rows, (1, 0)), (self.key_blocks, self.columns, (0, 1)))
        for blocks, most, (full, single) in sides:
            sizes = np.full(blocks, most)
            if self.ragged:
                sizes = rng.integers(0, most + 1, blocks)
                sizes[2:3], sizes[full], sizes[single] = 0, most, 1
            out.append(np.concatenate([[0], sizes.cumsum()]).astype(np.int32))
        return out

    def arrays(self):
        """q, k, v and a cotangent, [B, tokens, H, D]."""
        rng = np.random.default_rng(self.seed + 1)
        queries, keys = (int(x[-1]) for x in self.starts())
        tokens = (queries, keys + self.rest, keys + self.rest, queries)
        q, k, v, g = (rng.standard_normal((self.batch, n, self.heads, self.dim)) for n in tokens)
        return [x.astype(np.float16 if self.half else np.float32) for x in (q * self.sharpness, k, v, g)]

    def seen(self):
        """bool [B, H, Qb, Kb]; the first block of queries and the last of keys see and are seen by nothing."""
        rng = np.random.default_rng(self.seed + 2)
        lead = (1, 1) if self.shared else (self.batch, self.heads)
        seen = rng.random((*lead, self.query_blocks, self.key_blocks)) < self.keep
        seen[:, :, 0], seen[..., -1] = False, False
        seen[:, :, 1:, 0] = True
        return seen

    def places(self):
        """int32 [B, H, tokens] of queries and keys, ascending, with gaps and with ties."""
        rng = np.random.default_rng(self.seed + 3)
        queries, keys = (int(x[-1]) for x in self.starts())
        shape = (self.batch, self.heads)
        most = max(queries, keys + self.rest)
        mine, theirs = (rng.integers(0, most, (*shape, n)) for n in (queries, keys + self.rest))
        return np.sort(mine).astype(np.int32), np.sort(theirs).astype(np.int32)

    def near(self):
        """bool [B, H, Nq, Nk], what is in the band."""
        mine, theirs = self.places()
        width, sink = self.band or (0, 0)
        return (np.abs(mine[..., :, None] - theirs[..., None, :]) <= width) | (theirs < sink)[..., None, :]

    def cut(self):
        """Which pairs of blocks the band cuts, and every third that it does not."""
        starts, near = self.starts(), self.near()
        out = np.zeros((*self.seen().shape[:2], self.query_blocks, self.key_blocks), bool)
        for i in range(self.query_blocks):
            for j in range(self.key_blocks):
                part = near[:, :, starts[0][i] : starts[0][i + 1], starts[1][j] : starts[1][j + 1]]
                out[:, :, i, j] = ~part.all((2, 3)) | ((i + j) % 3 == 0)
        return out

    def options(self) -> dict[str, Any]:
        """Arguments of `block_mask` besides the map and where blocks begin."""
        options: dict[str, Any] = {"rows": self.rows, "columns": self.columns}
        if self.band:
            query_places, key_places = self.places()
            options |= {"width": self.band[0], "sink": self.band[1], "cut": self.cut()}
            options |= {"query_places": query_places, "key_places": key_places}
        return options

    def tokens(self):
        """bool [B, H, Nq, Nk], which keys each query sees."""
        starts, seen = self.starts(), self.seen()
        shape = (self.batch, self.heads, int(starts[0][-1]), int(starts[1][-1]) + self.rest)
        out = np.zeros(shape, bool)
        for i in range(self.query_blocks):
            for j in range(self.key_blocks):
                part = np.s_[:, :, starts[0][i] : starts[0][i + 1], starts[1][j] : starts[1][j + 1]]
                out[part] = seen[:, :, i, j, None, None]
        return out & self.near() if self.band else out

    def expected(self, arrays=None):
        """Output, dq, dk, dv by the formulas, of the case's arrays or of these."""
        q, k, v, g = (np.moveaxis(x.astype(np.float64), 2, 1) for x in arrays or self.arrays())
        seen = self.tokens()
        scores = np.where(seen, q @ np.swapaxes(k, -1, -2) / np.sqrt(self.dim), -np.inf)
        top = scores.max(-1, keepdims=True)
        p = np.exp(scores - np.where(np.isinf(top), 0.0, top))
        total = p.sum(-1, keepdims=True)
        p /= np.where(total == 0, 1, total)
        out = p @ v
        d_scores = p * (g @ np.swapaxes(v, -1, -2) - (g * out).sum(-1, keepdims=True)) / np.sqrt(self.dim)
        results = (out, d_scores @ k, np.swapaxes(d_scores, -1, -2) @ q, np.swapaxes(p, -1, -2) @ g)
        return [np.moveaxis(x, 1, 2) for x in results]


CASES = {
    "whole": Case(batch=2),
    "ragged": Case(ragged=True, query_blocks=4, key_blocks=5, rest=19),
    "band": Case(band=(20, 3), heads=1, query_blocks=2, key_blocks=3),
    "band, ragged": Case(batch=2, ragged=True, band=(12, 3), rest=3, query_blocks=4),
    "blocks of odd sizes": Case(rows=12, columns=20, heads=1, shared=True),
    "two parts, padded dim": Case(rows=27, columns=40, dim=12, heads=1, query_blocks=2, keep=0.9),
    "two parts, ragged, band": Case(rows=32, columns=33, band=(30, 2), ragged=True, heads=1, query_blocks=2),
    "sharp": Case(sharpness=20.0, heads=1, ragged=True),
    "short blocks": Case(ragged=True, key_blocks=9, keep=0.9, heads=1, rest=5, seed=1),
    "half": Case(half=True, ragged=True, heads=1),
}


def error(x, expected):
    """Relative Frobenius error."""
    x, expected = np.asarray(x, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(x - expected) / np.linalg.norm(expected))
