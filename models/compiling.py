"""Compiler options of XLA for the programs of large networks."""

import os
from collections.abc import Sequence
from typing import Any

# Matrix products by cuBLASLt with fused bias and GELU, without autotuning of Triton's: a cached call of Wan 1.3B on an
# H200 takes 4 to 5% less time, and compiling takes less, too. Products are not merged: that would concatenate weights
# in every call. For outermost programs only: JAX refuses options of a nested `jax.jit`. Other devices ignore them.
LIBRARY_PRODUCTS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}

# For training steps. This fusion writes the residuals of a layer directly into the stack of all layers' and computes
# them a second time for their other readers: with `remat="cheap"` all products of the forward pass ran twice. It is
# useful only if the other readers read the stack, as with `through_stacks`.
IN_STACKS = "xla_gpu_enable_dynamic_slice_fusion"
TRAINING = LIBRARY_PRODUCTS | {IN_STACKS: False}


# For meshes that split weights: the weights of a layer are gathered while the previous layer computes, in both passes.
# Loops are unrolled by two, without which the gathered arrays would be copied between iterations. A step of Wan 14B on
# two H200s takes as long as with gathers next to their own layer's products (6,055 ms, by `XLA_FLAGS`, and 6,046 ms),
# and 1 GB more.
GATHERED_AHEAD = {
    "xla_gpu_pipeline_all_gather": "COLLECTIVE_PIPELINING_MODE_ON",
    "xla_gpu_enable_while_loop_double_buffering": True,
}
_SAYS_WHEN = ("pipeline_all_gather", "pipelined_all_gather", "pipelined_collectives")


def gathers_ahead(devices: Sequence[Any], *, fsdp: int = 1) -> bool:
    """Whether `training_options` can gather weights one layer ahead: on GPUs, unless `XLA_FLAGS` sets such an option.

    Args:
        devices: Devices of the mesh.
        fsdp: Number of devices along its axis fsdp.
    """
    chosen = any(name in os.environ.get("XLA_FLAGS", "") for name in _SAYS_WHEN)
    return fsdp > 1 and not chosen and all(device.platform in ("gpu", "cuda") for device in devices)


def training_options(
    devices: Sequence[Any] = (), *, heads: int = 1, fsdp: int = 1, ahead: bool = True, stacks: bool = False
) -> dict[str, Any]:
    """Compiler options of a training step: `TRAINING`, with options for gathers and for exchanges between two devices.

    Two devices that share heads exchange halves of arrays. Between Hopper GPUs of one process this is a copy, which
    needs no multiprocessors: a training clip of Wan 1.3B on two H200s takes 485 ms, and 500 ms with the kernels of
    NCCL. Other GPUs were not tried, and XLA refuses it between processes.

    Other options that `XLA_FLAGS` sets are left as they are.

    Args:
        devices: Devices of the mesh.
        heads: Number of devices along its axis heads.
        fsdp: Number of devices along its axis fsdp.
        ahead: Whether to gather the weights of a layer while the previous one computes (`GATHERED_AHEAD`).
        stacks: Whether layers write their residuals directly into stacks; only for steps in which all trained layers
            use `through_stacks`.

    Returns:
        Options for the `compiler_options` of `jax.jit`.

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
