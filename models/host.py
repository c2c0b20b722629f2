"""Arrays of a running program that are handed to the host pass through a CPU device: whether there is one."""

import jax

from monarchrt.models.errors import UserError


def check_host(what: str) -> None:
    """Refuses to hand arrays on where JAX has no CPU device.

    Args:
        what: Who hands them on, the subject of the message.

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
            f"leaves out; it could be {platforms},cpu."
        ) from reason
