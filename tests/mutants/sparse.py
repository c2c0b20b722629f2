"""Faults that comparisons with published functions should notice."""

from tests.mutants.fault import Fault

PUBLISHED = ("tests/models/attention/test_published.py",)

BESIDE_PUBLISHED = (
    Fault(
        "models/attention/radial.py",
        "    if distance == 0:\n",
        "    if distance <= (0 if general else 1):\n",
        PUBLISHED,
        "Radial",
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

SPARSE_MOSAIC = ("tests/kernels/test_sparse_mosaic.py",)

BLOCK_SPARSE = (
    Fault(
        "pallas_kernels/sm90/block_sparse.py",
        "column < self.problem.columns, s, LOWEST",
        "column < ROWS, s, LOWEST",
        SPARSE_MOSAIC,
        "whole_maps",
    ),
    Fault(
        "pallas_kernels/sm90/block_sparse.py",
        "total * shrink + p.sum(axis=1)",
        "total + p.sum(axis=1)",
        SPARSE_MOSAIC,
        "whole_maps",
    ),
    Fault("pallas_kernels/sm90/block_sparse.py", "none, jnp.inf, lse", "none, 0.0, lse", SPARSE_MOSAIC, "whole_maps"),
    Fault("pallas_kernels/sm90/block_sparse.py", "@pl.when(end > start)", "@pl.when(end > -1)", SPARSE_MOSAIC, "empty"),
    Fault(
        "pallas_kernels/sm90/block_sparse.py", "jnp.minimum(n + 1, l", "jnp.minimum(n, l", SPARSE_MOSAIC, "whole_maps"
    ),
    Fault(
        "monarch_jax/block_sparse_xla.py",
        "jnp.where(jnp.swapaxes(seen, -1, -2), pick(x, columns), 0)",
        "pick(x, columns)",
        ("tests/kernels/test_block_sparse.py",),
        "may_be_nan",
    ),
)
