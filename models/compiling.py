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
# Unless all else reads the stack, as by `through_stacks`.
IN_STACKS = "xla_gpu_enable_dynamic_slice_fusion"
TRAINING = LIBRARY_PRODUCTS | {IN_STACKS: False}


# Of meshes that split weights: each layer's are gathered while the layer before it computes, in both passes, two layers
# a turn, without which arrays that were gathered would be copied from turn to turn. A step of Wan 14B on two H200s
# takes as long as with gathers beside their own layer's products (6,055, by `XLA_FLAGS`, and 6,046 ms), and 1 GB more.
GATHERED_AHEAD = {
    "xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON",
    "xla_gpu_enable_while_loop_double_buffering": True,
}
_SAYS_WHEN = ("pipeline_all_gather", "pipelined_all_gather", "pipelined_collectives")


def gathers_ahead(devices: Sequence[Any], *, fsdp: int = 1) -> bool:
    """Whether `training_options` can have weights gathered a layer ahead: on GPUs, unless `XLA_FLAGS` says otherwise.

    Args:
        devices: Those of the mesh.
        fsdp: Devices along its axis of that name.
    """
    chosen = any(name in os.environ.get("XLA_FLAGS", "") for name in _SAYS_WHEN)
    return fsdp > 1 and not chosen and all(device.platform in ("gpu", "cuda") for device in devices)


def training_options(
    devices: Sequence[Any] = (), *, heads: int = 1, fsdp: int = 1, ahead: bool = True, stacks: bool = False
) -> dict[str, Any]:
    """How a training step is compiled: `TRAINING`, when weights are gathered, and how halves of arrays are swapped.

    Two devices that share heads swap halves. Hopper GPUs of one process copy them, which takes none of the
    multiprocessors that products hold: a training clip of Wan 1.3B on two H200s takes 485 ms, with all-to-alls by
    NCCL's kernels 500. No other GPUs were tried, and XLA refuses it between processes.

    A mode that `XLA_FLAGS` names is left as it is.

    Args:
        devices: Those of the mesh.
        heads: Devices along its axis of that name.
        fsdp: Likewise.
        ahead: Whether a layer's weights are gathered while the one before computes: `GATHERED_AHEAD`.
        stacks: Whether what layers keep for the backward pass is written right into the stacks of all layers', which
            is for steps all of whose layers that train go through `through_stacks`.

    Examples:
        >>> training_options() == TRAINING
        True
    """
    named = os.environ.get("XLA_FLAGS", "")
    options: dict[str, Any] = TRAINING | {IN_STACKS: stacks}
    hopper = all(str(getattr(device, "compute_capability", "")).startswith("9.") for device in devices)
    if heads == 2 and hopper and len({device.process_index for device in devices}) == 1:
        options["xla_gpu_collective_permute_mode"] = "COLLECTIVES_PEER_MEMORY"
    if ahead and gathers_ahead(devices, fsdp=fsdp):
        options |= GATHERED_AHEAD
    return {name: value for name, value in options.items() if name in TRAINING or name not in named}
