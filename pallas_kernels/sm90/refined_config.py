"""The choice of sizes for several refinement steps."""

import dataclasses

from monarchrt.pallas_kernels.sm90.config import BackwardConfig, LeftBackwardConfig, backward_config

MOST_REFINED_ROWS = 96  # b1 for which a warpgroup holds all of dq


def refined_config(rows: int, cols: int, dim: int) -> BackwardConfig | None:
    """The backward pass's configuration, whose kernels are those with a column or key row for a warpgroup alone."""
    config = backward_config(rows, cols, dim)
    if config is None or not config.keys.independent or rows > MOST_REFINED_ROWS:
        return None
    left = LeftBackwardConfig(columns=1, row_blocks=1, independent=True, stages=4)
    return dataclasses.replace(config, left=left)
