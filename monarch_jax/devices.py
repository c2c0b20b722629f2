"""Where JAX runs by default: asked when a call is traced, never when something is imported."""

import jax


def on_cuda(*, capability: int | float = 0) -> bool:
    """Whether JAX runs on an NVIDIA GPU by default (`jax.default_device` counts), of at least a compute capability."""
    present = cuda_capability()
    return present is not None and present >= capability


def cuda_capability() -> float | None:
    """Compute capability of the NVIDIA GPU that JAX runs on by default (9.0 is Hopper), else None."""
    chosen = jax.config.jax_default_device
    platform = getattr(chosen, "platform", chosen) or jax.default_backend()
    if platform not in ("gpu", "cuda"):
        return None
    device = jax.devices(platform)[0] if chosen is None or isinstance(chosen, str) else chosen
    return float(device.compute_capability) if "cuda" in device.client.platform_version.lower() else None
