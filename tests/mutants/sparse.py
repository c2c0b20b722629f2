"""Faults of sparse attention, those among them that comparisons with published functions should notice."""

from tests.mutants.fault import Fault

TRITON = ("tests/kernels/test_triton.py",)
PUBLISHED = ("tests/models/attention/test_published.py",)

SPARSE_FAULTS = (
    Fault("triton_kernels/sparse_rounds.py", "turn + PROGRAMS, TURNS", "turn + 1, TURNS", TRITON, "interpreter_agrees"),
    Fault(
        "triton_kernels/sparse_rounds.py",
        "* (BLOCKS + 1) + block + 1)",
        "* (BLOCKS + 1) + block)",
        TRITON,
        "interpreter_agrees",
    ),
    Fault(
        "models/attention/radial.py",
        "> sizes) > 3 * by_block(count > 0)",
        "> sizes) >= 3 * by_block(count > 0)",
        PUBLISHED,
        "Radial",
    ),
    Fault(
        "models/attention/svg.py",
        "reach, masks = 2 * places.per_frame // self.block,",
        "reach, masks = -(-2 * places.per_frame // self.block),",
        PUBLISHED,
        "SVG",
    ),
    Fault(
        "models/attention/svg.py",
        "near | (theirs < places.per_frame)",
        "near | (theirs < places.per_frame - 1)",
        PUBLISHED,
        "SVG",
    ),
    Fault(
        "models/attention/svg2.py",
        "jnp.maximum(sizes, 1.0)[..., None], centres)",
        "jnp.maximum(sizes, 1.0)[..., None], 0.0)",
        PUBLISHED,
        "SVG2",
    ),
    Fault(
        "models/attention/sliding_tile.py",
        "halves = np.array(windows) // 2",
        "halves = (np.array(windows) - 1) // 2",
        PUBLISHED,
        "SlidingTile",
    ),
)
