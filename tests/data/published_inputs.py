"""What published functions were given, for `make_published.py` and for the tests that compare with what they gave."""

import numpy as np


def normal(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def svg() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v, [1, 4, N, 16] on (6, 10, 13): heads by frame, by place, of noise, and one whose values are 0."""
    frames, tokens = 6, 130
    at_frame, at_place = np.repeat(np.arange(frames), tokens), np.tile(np.arange(tokens), frames)
    q, k, v = normal(3, 1, 4, frames * tokens, 16, seed=0)
    q, k = 0.3 * q, 0.3 * k
    for head, (number, count) in enumerate(((at_frame, frames), (at_place, tokens))):
        code = normal(count, 16, seed=1 + head)[number]
        q[0, head] += 1.5 * code
        k[0, head] += 1.5 * code
    v[0, 3] = 0.0
    return q, k, v


SVG_ROWS, SVG_LARGE = range(0, 75600, 3517), (0.05, 0.15)  # of 720p: rows of the band, and shares

VSA_LARGE = (21, 45, 80)  # 720p
VSA_GRID = (6, 5, 9)  # cubes of (4, 4, 4): 2 x 2 x 3, whole and partial
VSA_CUBES, VSA_SHARES = (455, 546, 624, 1260, 1440), (0.2, 0.15, 0.1, 0.05, 0.03)


def vsa(*, ties: bool) -> np.ndarray:
    """q, k, v, gate and weights of the output, [1, N, 2, 16].

    With ties, queries and keys are whole numbers, the keys of each third of the columns the same in all frames and
    rows: sums and scores are exact, and equal between cubes.
    """
    out = normal(5, 1, int(np.prod(VSA_GRID)), 2, 16, seed=10)
    if ties:
        frames, rows, columns = VSA_GRID
        rng = np.random.default_rng(11)
        out[0] = rng.integers(-2, 3, (1, 1, 2, 16))
        third = rng.integers(-2, 3, (3, 2, 16))[np.arange(columns) // 4]
        out[1] = np.broadcast_to(third, (frames, rows, columns, 2, 16)).reshape(1, -1, 2, 16)
    return out


TILES = {  # grid, tile, window
    "tokens 3 1 3": ((6, 8, 12), (2, 4, 4), (3, 1, 3)),
    "tokens 1 1 2": ((6, 8, 12), (2, 4, 4), (1, 1, 2)),  # even
    "tokens 4 2 1": ((6, 8, 12), (2, 4, 4), (4, 2, 1)),  # wider than the grid
    "tiles 3 3 5": ((18, 48, 80), (6, 8, 8), (3, 3, 5)),
    "tiles 3 1 10": ((18, 48, 80), (6, 8, 8), (3, 1, 10)),
    "tiles 3 3 9": ((21, 30, 52), (3, 5, 4), (3, 3, 9)),
    "tiles 720p 3 7 9": ((21, 45, 80), (3, 5, 4), (3, 7, 9)),
    "tiles 720p 5 5 5": ((21, 45, 80), (3, 5, 4), (5, 5, 5)),
}


def sla() -> tuple[np.ndarray, ...]:
    """q, k, v, [1, 2, 200, 16]; the projection's kernel and bias; weights of the output."""
    *x, weights = normal(4, 1, 2, 200, 16, seed=20)
    return *x, normal(16, 16, seed=21), normal(16, seed=22), weights


def clusters() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Tokens [heads, N, 16] and the centroids to begin with.

    Drawn ones, of which one is there twice (the second is empty at first) and one is out of reach; and, on a line, one
    that has members at first and loses them all.
    """
    tokens = normal(2, 150, 16, seed=30)
    first = tokens[:, np.random.default_rng(31).integers(0, 150, 9)].copy()
    first[:, 4] = first[:, 1]
    first[0, 6] = 100.0
    line, start = np.zeros((1, len(LINE), 16), np.float32), np.zeros((1, 3, 16), np.float32)
    line[0, :, 0] = LINE
    start[0, :, 0] = LINE_START
    return {"drawn": (tokens, first), "line": (line, start)}


LINE, LINE_START = (1.6, 1.7, 1.7, 2.0, 4.0, 4.3, 4.3, 4.4), (0.5, 3.0, 5.5)
DRAWN = (3, 40, 41, 77, 120), (5, 9, 30, 31, 64, 90, 101, 119, 5)  # of 128; the last of the keys' is there twice
ROUNDS = 1  # the second of what is there twice is empty
SHARES = (0.5, 0.2), (0.9, 0.0), (0.3, 1.0), (1e-6, 0.0)  # top_p and min_keep


def svg2() -> np.ndarray:
    """q, k, v and weights of the output, [1, 2, 128, 16]."""
    return normal(4, 1, 2, 128, 16, seed=32) * np.array([1.5, 1.5, 1.0, 1.0], np.float32)[:, None, None, None, None]
