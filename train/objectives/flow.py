"""The rectified-flow objective of Wan 2.1's training and of Self-Forcing's diffusion trainer.

A clean latent x0 and unit Gaussian noise eps are mixed at noise level sigma in (0, 1], x_t = (1 - sigma) x0 +
sigma eps, and the network learns the flow v = eps - x0. Noise levels come from a grid of N = 1000 values u = j/N,
shifted towards high noise, sigma = s u / (1 + (s - 1) u) (Esser et al. 2024, arXiv:2403.03206, section 5.3.2); the
timestep given to the network is t = N sigma. The loss of a sample is weighted by a bell curve around t = N/2.

A sample has one noise level, or one for each of its frames (diffusion forcing, Chen et al. 2024, arXiv:2407.01392).
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key

from monarchrt.models.attention.blocks import block_sizes
from monarchrt.models.errors import UserError, user_input
from monarchrt.models.sampling import Schedule, euler, guided, sample, uniform_schedule
from monarchrt.models.sampling.schedules import shifted
from monarchrt.train.data import Batch, Source, spread
from monarchrt.train.objectives.base import HeldOut, Metrics, Networks, Objective, Sampler
from monarchrt.train.objectives.settings import FlowConfig

Velocity = Callable[[Array, Array, Array], Array]
"""A flow prediction: (latents [B, F, h, w, C], timesteps [B] or [B, F], text [B, L, D]) -> v, like the latents."""


class NoiseLevels(NamedTuple):
    """The grid of noise levels, from low to high noise: sigma [N] and loss weight [N], float32."""

    sigma: Float32[np.ndarray, "n"]
    weight: Float32[np.ndarray, "n"]


def noise_levels(config: FlowConfig) -> NoiseLevels:
    """Computes the grid of noise levels and their weights.

    The Gaussian weight is exp(-2 ((t - N/2)/N)^2) over the shifted timesteps t, less its minimum, scaled to mean 1.

    Args:
        config: Shift, weighting and size of the grid.

    Returns:
        The shifted levels of u = 1/N ... 1, and their weights.

    Examples:
        >>> levels = noise_levels(FlowConfig(shift=5.0))
        >>> [round(float(x), 4) for x in (1000 * levels.sigma[0], levels.weight[0], levels.weight.max())]
        [4.9801, 0.0319, 2.0764]
    """
    count = config.num_train_timesteps
    u = np.arange(1, count + 1) / count
    sigma = shifted(u, config.shift)
    weight = np.ones(count)
    if config.weighting == "gaussian":
        bell = np.exp(-2 * (sigma - 0.5) ** 2)
        weight = bell - bell.min()
        weight /= weight.mean()
    return NoiseLevels(sigma.astype(np.float32), weight.astype(np.float32))


def add_noise(
    latents: Float[Array, "b f h w c"], noise: Float[Array, "b f h w c"], sigma: Float[Array, "b"] | Float[Array, "b f"]
) -> Float[Array, "b f h w c"]:
    """Mixes latents and noise, x_t = (1 - sigma) x0 + sigma eps.

    Args:
        latents: Clean latents x0.
        noise: Unit Gaussian noise eps.
        sigma: Noise level of each sample, or of each frame.

    Returns:
        Noisy latents x_t.

    Examples:
        >>> one = jnp.ones((1, 1, 1, 1, 1))
        >>> float(add_noise(one, -one, jnp.array([0.25]))[0, 0, 0, 0, 0])
        0.5
    """
    sigma = sigma.reshape(*sigma.shape, *[1] * (latents.ndim - sigma.ndim))
    return (1 - sigma) * latents + sigma * noise


def flow_errors(
    velocity: Velocity,
    latents: Float[Array, "b f h w c"],
    text: Float[Array, "b l d"],
    noise: Float[Array, "b f h w c"],
    sigma: Float32[Array, "b"] | Float32[Array, "b f"],
    *,
    num_train_timesteps: int = 1000,
) -> Float32[Array, "b"] | Float32[Array, "b f"]:
    """Mean squared error of the flow prediction for each noise level, unweighted.

    Args:
        velocity: The network.
        latents: Clean latents x0.
        text: Text embeddings.
        noise: Unit Gaussian noise.
        sigma: Noise level of each sample, or of each frame.
        num_train_timesteps: Scale of the timesteps, t = num_train_timesteps * sigma.

    Returns:
        Mean of (v - (eps - x0))^2 over each sample or frame, float32, in the shape of sigma.
    """
    predicted = velocity(add_noise(latents, noise, sigma), sigma * num_train_timesteps, text)
    error = predicted.astype(jnp.float32) - (noise - latents).astype(jnp.float32)
    return jnp.mean(jnp.square(error), axis=tuple(range(sigma.ndim, 5)))


def level_runs(config: FlowConfig, frames: int) -> list[int] | None:
    """Frames of each run that shares a noise level, in order; None if all frames of a sample share one.

    Examples:
        >>> level_runs(FlowConfig(frames_per_level=3, independent_first_frame=True), 7)
        [1, 3, 3]

    Raises:
        UserError: If the number of frames is not a whole number of runs.
    """
    run = config.frames_per_level
    if run is None:
        return None
    if config.independent_first_frame:
        with user_input():
            return block_sizes(frames, run, independent_first_frame=True)
    if frames % run:
        divisors = ", ".join(str(n) for n in range(1, frames + 1) if frames % n == 0)
        raise UserError(
            f"frames_per_level is {run}, which does not divide the {frames} frames of a window; it could be {divisors}"
        )
    return block_sizes(frames, run)


def level_shape(config: FlowConfig, batch: int, frames: int) -> tuple[int, ...]:
    """Shape of the noise levels of a batch: (B,), or (B, number of runs) (see `level_runs`)."""
    runs = level_runs(config, frames)
    return (batch,) if runs is None else (batch, len(runs))


def over_runs[Level: (Array, np.ndarray)](level: Level, runs: list[int] | None) -> Level:
    """Repeats values [..., runs] for the frames of each run: [..., frames]; unchanged if `runs` is None."""
    return level if runs is None else level[..., np.repeat(np.arange(len(runs)), runs)]


def draw_noise(
    key: Key[Array, ""], shape: tuple[int, ...], config: FlowConfig
) -> tuple[Int[Array, "b"] | Int[Array, "b f"], Float32[Array, "b f h w c"]]:
    """Draws the noise levels, as indices into their grid, and the noise of a batch.

    Args:
        key: Random key.
        shape: Shape (B, F, h, w, C) of the latents.
        config: Settings of the objective; indices are uniform on its grid.

    Returns:
        Indices [B], or [B, F] with `frames_per_level`, and unit Gaussian noise of the given shape.

    Raises:
        UserError: If the number of frames is not a whole number of runs of `frames_per_level`.
    """
    level_key, noise_key = jax.random.split(key)
    runs = level_runs(config, shape[1])
    wanted = level_shape(config, *shape[:2])
    level = over_runs(jax.random.randint(level_key, wanted, 0, config.num_train_timesteps), runs)
    return level, jax.random.normal(noise_key, shape, jnp.float32)


def flow_loss(
    velocity: Velocity,
    latents: Float[Array, "b f h w c"],
    text: Float[Array, "b l d"],
    *,
    level: Int[Array, "b"] | Int[Array, "b f"],
    noise: Float[Array, "b f h w c"],
    config: FlowConfig,
) -> Float32[Array, ""]:
    """The training loss: weighted squared error of the predicted flow.

    Args:
        velocity: The network.
        latents: Clean latents x0.
        text: Text embeddings.
        level: Index of each sample's or frame's noise level, from `draw_noise`.
        noise: Unit Gaussian noise, from `draw_noise`.
        config: Settings of the objective.

    Returns:
        Mean over the batch of weight(t) * mean (v - (eps - x0))^2, a float32 scalar.

    Examples:
        >>> config = FlowConfig()
        >>> level, noise = draw_noise(jax.random.key(0), (2, 1, 4, 4, 3), config)
        >>> zeros = jnp.zeros(noise.shape)
        >>> perfect = lambda latents, timesteps, text: noise
        >>> float(flow_loss(perfect, zeros, jnp.zeros((2, 1, 1)), level=level, noise=noise, config=config))
        0.0
    """
    levels = noise_levels(config)
    errors = flow_errors(
        velocity,
        latents,
        text,
        noise,
        jnp.asarray(levels.sigma)[level],
        num_train_timesteps=config.num_train_timesteps,
    )
    return jnp.mean(jnp.asarray(levels.weight)[level] * errors)


def evaluation_levels(config: FlowConfig, count: int) -> NoiseLevels:
    """Picks `count` levels evenly from the grid, the middles of `count` equal parts, for a deterministic loss.

    Examples:
        >>> [round(float(s), 3) for s in evaluation_levels(FlowConfig(), 4).sigma]
        [0.419, 0.751, 0.893, 0.972]
    """
    levels = noise_levels(config)
    index = np.floor((np.arange(count) + 0.5) / count * config.num_train_timesteps).astype(int)
    index = np.clip(index, 0, config.num_train_timesteps - 1)
    return NoiseLevels(levels.sigma[index], levels.weight[index])


def evaluation_indices(config: FlowConfig, level: int, count: int, frames: int) -> Int[np.ndarray, "*frames"]:
    """Indices of the noise levels of a held-out example in round `level` of `count`: one, or one for each frame.

    If runs of frames have levels of their own, run g has index (level + g * (count // 2 + 1)) mod count, so that
    neighboring runs differ much, and every run has every level once over all rounds.

    Args:
        config: Settings of the objective.
        level: Number of the round, from 0.
        count: Number of rounds, and of evaluation levels.
        frames: Number of frames of an example.

    Examples:
        >>> [evaluation_indices(FlowConfig(frames_per_level=1), level, 4, 3).tolist() for level in (0, 1)]
        [[0, 3, 2], [1, 0, 3]]
    """
    runs = level_runs(config, frames)
    if runs is None:
        return np.array(level)
    return over_runs((level + np.arange(len(runs)) * (count // 2 + 1)) % count, runs)


def evaluation_noise(index: int, level: int, shape: tuple[int, ...]) -> Float32[np.ndarray, "..."]:
    """The noise of held-out example `index` at evaluation level `level`, the same for every model and run."""
    return np.random.default_rng([20, index, level]).standard_normal(shape, np.float32)


def sampling_levels(config: FlowConfig, *, steps: int, start: float = 1.0) -> Float32[np.ndarray, "steps_plus_1"]:
    """Noise levels of a sampler: even in u, shifted like those of training, from `start` down to 0.

    Args:
        config: Settings of the objective, of which the shift is used.
        steps: Number of Euler steps.
        start: First noise level sigma in (0, 1]; below 1, sampling starts from a noised clip.

    Returns:
        Decreasing values of sigma, float32 [steps + 1].

    Examples:
        >>> [round(float(sigma), 3) for sigma in sampling_levels(FlowConfig(shift=5.0), steps=4)]
        [1.0, 0.938, 0.833, 0.625, 0.0]
    """
    return uniform_schedule(steps, config.shift, start=start).sigmas.astype(np.float32)


def euler_sample(
    velocity: Velocity,
    latents: Float[Array, "b f h w c"],
    text: Float[Array, "b l d"],
    *,
    levels: Float[np.ndarray, "steps_plus_1"],
    num_train_timesteps: int = 1000,
) -> Float[Array, "b f h w c"]:
    """Solves dx/dsigma = v from the first noise level to the last by Euler's method.

    Args:
        velocity: The network; if its call has an argument `step`, it gets the number of the step.
        latents: x at the first level: unit Gaussian noise for sigma = 1, or a noised clip.
        text: Text embeddings.
        levels: Decreasing noise levels, from `sampling_levels`.
        num_train_timesteps: Scale of the timesteps, t = num_train_timesteps * sigma.

    Returns:
        x at the last level.

    Examples:
        >>> straight = lambda latents, timesteps, text: jnp.ones(latents.shape)
        >>> x = jnp.full((1, 1, 1, 1, 1), 3.0)
        >>> float(euler_sample(straight, x, jnp.zeros((1, 1, 1)), levels=np.array([1.0, 0.5, 0.0]))[0, 0, 0, 0, 0])
        2.0
    """

    sigmas = np.asarray(levels, float)
    table = euler(Schedule(sigmas, num_train_timesteps * sigmas[:-1]))
    return sample(guided(velocity, text), latents, table, numbered=True)


def flow_sampler(config: FlowConfig, *, steps: int = 20, start: float = 1.0) -> Sampler:
    """A sampler that starts from clean latents noised to level `start`.

    Args:
        config: Settings of the objective, of which shift and scale of timesteps are used.
        steps: Number of Euler steps.
        start: First noise level; at 1, the clean latents have no influence.

    Returns:
        (network, latents, text, noise) -> sampled latents.
    """
    levels = sampling_levels(config, steps=steps, start=start)

    def sampler(network: Velocity, latents: Array, text: Array, noise: Array) -> Array:
        first = jnp.full((latents.shape[0],), start, jnp.float32)
        noised = add_noise(latents, noise, first)
        return euler_sample(network, noised, text, levels=levels, num_train_timesteps=config.num_train_timesteps)

    return sampler


def check_blocks(config: Any, block: int | None, *, independent: bool, name: str, options: str = "") -> None:
    """Checks that the blocks of a causal network are those of the objective.

    Args:
        config: Configuration of the network.
        block: Latent frames per block of the objective; None for a bidirectional network.
        independent: Whether the first frame is a block of its own.
        name: Name of the objective's setting of `block`.
        options: Prefix of the network's options, such as "student.".

    Raises:
        UserError: If they differ.
    """
    own = config.causal_block
    if own != block:
        other = f"--{options}overrides causal_block={block}, or another" if block else f"--{name} {own}, or no causal"
        raise UserError(f"{name} is {block}, but the network's causal_block is {own}; give {other} {name}")
    if block is not None and config.independent_first_frame != independent:
        raise UserError(
            f"independent_first_frame is {independent}, but the network's is {config.independent_first_frame}; give "
            f"--{options}overrides causal_block={own} independent_first_frame={str(independent).lower()}"
        )


class FlowDraws(NamedTuple):
    """Draws for a batch: the index of each sample's or frame's noise level, and noise."""

    level: Int[Array, "b"] | Int[Array, "b f"]
    noise: Float32[Array, "b f h w c"]


class FlowObjective(Objective):
    """Rectified flow: one network learns eps - x0 at random noise levels."""

    settings: FlowConfig

    def draws(self, key: Key[Array, ""], shapes: Batch) -> Mapping[str, FlowDraws]:
        """Draws a noise level for each sample or frame, and noise."""
        return {"student": FlowDraws(*draw_noise(key, shapes.latents.shape, self.settings))}

    def loss(self, role: str, networks: Networks, batch: Batch, draws: Any) -> tuple[Float32[Array, ""], Metrics]:
        """Weighted squared error of the predicted flow."""
        latents, text = map(jnp.asarray, batch)
        velocity = self.velocity(networks[role], latents, draws)
        level, noise = draws[:2]
        return flow_loss(velocity, latents, text, level=level, noise=noise, config=self.settings), {}

    def velocity(self, network: Any, latents: Array, draws: Any) -> Velocity:
        """The network's flow prediction for a batch.

        Args:
            network: The network.
            latents: Clean latents of the batch.
            draws: Draws for the batch; None in an evaluation.

        Raises:
            UserError: If the network is causal, and its first frame is a block of its own but not a run, or vice versa.
        """
        config = getattr(network, "config", None)
        block = getattr(config, "causal_block", None)
        if (
            config is not None
            and block is not None
            and config.independent_first_frame != self.settings.independent_first_frame
        ):
            check_blocks(config, block, independent=self.settings.independent_first_frame, name="frames_per_level")
        return network

    def held_out(self, source: Source, *, windows: int, timesteps: int, batch: int) -> Iterator[HeldOut]:
        """Each example at noise levels spread evenly over the training distribution, with fixed noise."""
        levels = evaluation_levels(self.settings, timesteps)
        indices = spread(source.held_out, windows)
        pairs = [(index, level) for index in indices for level in range(timesteps)]
        examples = {index: source.held_out_batch([index]) for index in indices}
        for start in range(0, len(pairs), batch):
            chunk = pairs[start : start + batch]
            full = chunk + [chunk[-1]] * (batch - len(chunk))  # all batches have one shape, for one compiled program
            clean = Batch(*(np.concatenate(part) for part in zip(*(examples[index] for index, _ in full), strict=True)))
            noise = np.stack([evaluation_noise(index, level, source.latent_shape) for index, level in full])
            frames = clean.latents.shape[1]
            level = np.stack([evaluation_indices(self.settings, level, timesteps, frames) for _, level in full])
            yield HeldOut(clean, (noise, levels.sigma[level]), levels.weight[level], len(chunk))

    def held_out_errors(self, networks: Networks, batch: Batch, draws: Any) -> Mapping[str, Array]:
        """Squared error of the flow at each noise level."""
        latents, text = map(jnp.asarray, batch)
        timesteps = self.settings.num_train_timesteps
        velocity = self.velocity(networks["student"], latents, None)
        return {"student": flow_errors(velocity, latents, text, *draws, num_train_timesteps=timesteps)}

    def samplers(self) -> Mapping[str, Sampler]:
        """A held-out window restored from noise level 0.6, and a sample from pure noise."""
        return {"restored": flow_sampler(self.settings, start=0.6), "sampled": flow_sampler(self.settings, start=1.0)}
