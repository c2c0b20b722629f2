"""Check for the CPU device that host callbacks of a running program need."""

import jax

from monarchrt.models.errors import UserError


def check_host(what: str) -> None:
    """Raises UserError if JAX has no CPU device, through which arrays pass from a running program to the host.

    Args:
        what: Name of the feature, the subject of the message.

    Raises:
        UserError: If `JAX_PLATFORMS` leaves the CPU out.
    """
    try:
        jax.local_devices(backend="cpu")
    except RuntimeError as reason:
        if not (platforms := jax.config.read("jax_platforms")):
            raise  # JAX found no CPU by itself, which is not the user's doing
        raise UserError(
            f"{what} takes arrays out of running programs through a CPU device, which JAX_PLATFORMS={platforms!r} "
            f"excludes; use {platforms},cpu."
        ) from reason
