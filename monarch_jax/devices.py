"""Properties of JAX's default device. Functions query it when called, so importing this module initializes nothing."""

import jax


def on_cuda(*, capability: int | float = 0) -> bool:
    """Whether the default device, which `jax.default_device` may set, is an NVIDIA GPU of at least this capability."""
    present = cuda_capability()
    return present is not None and present >= capability


def cuda_capability() -> float | None:
    """Compute capability of the default device if it is an NVIDIA GPU (9.0 is Hopper), else None."""
    chosen = jax.config.jax_default_device
    platform = getattr(chosen, "platform", chosen) or jax.default_backend()
    if platform not in ("gpu", "cuda"):
        return None
    device = jax.devices(platform)[0] if chosen is None or isinstance(chosen, str) else chosen
    return float(device.compute_capability) if "cuda" in device.client.platform_version.lower() else None
