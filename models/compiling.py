"""How XLA compiles the programs of large networks."""

import os
from collections.abc import Sequence
from typing import Any

# Products by cuBLASLt, with bias and GELU at their end, not searched for among Triton's: 4 to 5% less time for a cached
# call of Wan 1.3B on an H200, and less to compile. None are merged: that would put weights together in every call.
# For programs of their own only: JAX refuses options of a `jax.jit` inside of another. Other devices ignore them.
LIBRARY_PRODUCTS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}

# Of training steps. XLA would write what a layer keeps for its backward pass right into the stack of all layers', and
# form it a second time for what else reads it: with `remat="cheap"` all products of the forward pass were done twice.
TRAINING = LIBRARY_PRODUCTS | {"xla_gpu_enable_dynamic_slice_fusion": False}


def training_options(devices: Sequence[Any] = (), *, heads: int = 1) -> dict[str, Any]:
    """How a training step is compiled: `TRAINING`, and how two devices that share heads swap halves of arrays.

    Hopper GPUs of one process copy them, which takes none of the multiprocessors that products hold: a training clip of
    Wan 1.3B on two H200s takes 485 ms, with all-to-alls by NCCL's kernels 500. No other GPUs were tried, and XLA
    refuses it between processes. A mode that `XLA_FLAGS` names is left as it is.

    Args:
        devices: Those of the mesh.
        heads: Devices along its axis of that name.

    Examples:
        >>> training_options() == TRAINING
        True
    """
    chosen = "xla_gpu_collective_permute_mode" in os.environ.get("XLA_FLAGS", "")
    hopper = all(str(getattr(device, "compute_capability", "")).startswith("9.") for device in devices)
    if heads != 2 or chosen or not hopper or len({device.process_index for device in devices}) != 1:
        return dict(TRAINING)
    return TRAINING | {"xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY"}
