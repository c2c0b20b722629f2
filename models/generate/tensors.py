"""Noise and latents as files, for exchange with other implementations."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from monarchrt.models.checkpoints.tensor_files import SafetensorsFile, write_arrays
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.generate.plan import Plan
from monarchrt.models.sampling import Noise, Rollout

LAYOUT = "[frames, height, width, channels]"


def new_latents(plan: Plan, *, given: int = 0) -> int:
    """Number of latent frames that need noise; a last window may generate more than the video has."""
    if isinstance(plan.settings, Rollout):
        return plan.latents[0] - given
    return sum(plan.settings.new_frames(plan.latents[0], given=given))


def seed_noise(plan: Plan, *, channels: int, given: int = 0) -> Noise:
    """The noise of the plan's seed for all latent frames after the `given` ones, with a batch of one."""
    return plan.settings.noise(jax.random.key(plan.config.seed), (1, *plan.latents, channels), given=given)


def save_noise(path: Path, noise: Noise) -> Path:
    """Writes `noise` and, for stochastic samplers, `fresh`, of the batch's first element in float32.

    Raises:
        UserError: If the file cannot be written.
    """
    arrays = {"noise": np.asarray(noise.first[0], np.float32)}
    if noise.fresh is not None:
        arrays["fresh"] = np.asarray(noise.fresh[:, 0], np.float32)
    write_arrays(path, arrays, metadata={"format": "monarchrt noise", "layout": LAYOUT})
    return path


def save_latents(path: Path, latents: Float[np.ndarray, "F h w C"]) -> Path:
    """Writes `latents`, float32.

    Raises:
        UserError: If the file cannot be written.
    """
    arrays = {"latents": np.asarray(latents, np.float32)}
    write_arrays(path, arrays, metadata={"format": "monarchrt latents", "layout": LAYOUT})
    return path


def read_noise(path: Path, plan: Plan, *, channels: int, given: int = 0) -> Noise:
    """Reads noise for a plan.

    Args:
        path: Safetensors with `noise` [F, h, w, C], and `fresh` [n, F, h, w, C] if steps add noise (else the seed's).
        plan: The plan.
        channels: Channels of a latent.
        given: Number of leading latent frames that are given and need no noise.

    Returns:
        The noise, with a batch of one.

    Raises:
        UserError: If the file cannot be read, or the noise is missing, of another shape or not finite.
    """
    if not path.is_file():
        raise UserError(f"noise {path} is not a file; give one of --save-noise")
    with user_input():
        file = SafetensorsFile(path)
    if "noise" not in file.infos:
        raise UserError(f"noise {path} holds {', '.join(sorted(file.infos)) or 'nothing'}, but no tensor named noise")
    shape = (new_latents(plan, given=given), *plan.latents[1:], channels)
    first = _read(file, "noise", shape, path)
    if "fresh" not in file.infos:
        return Noise(first[None])
    count = len(plan.settings.table().noisy)
    if not count:
        raise UserError(f"noise {path} holds fresh noise, which the sampler {plan.config.sampler} does not add")
    return Noise(first[None], _read(file, "fresh", (count, *shape), path)[:, None])


def _read(file: SafetensorsFile, name: str, shape: tuple[int, ...], path: Path) -> Float[Array, "..."]:
    stored = file.infos[name].shape
    if stored != shape:
        hint = ""
        frames, height, width, channels = shape[-4:]
        for axes in ((channels, frames, height, width), (frames, channels, height, width)):
            if stored[-4:] == axes and axes != shape[-4:]:
                hint = "; its channels are not last, as in PyTorch: move that axis to the end"
        raise UserError(f"noise {path}: {name} is {list(stored)}, and {list(shape)} is needed, {LAYOUT} last{hint}")
    array = np.asarray(file.read(name), np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"noise {path}: {name} is NaN or infinite")
    return jnp.asarray(array)
